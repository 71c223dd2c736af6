"""Published pages in files, so that a later process finds them again."""
