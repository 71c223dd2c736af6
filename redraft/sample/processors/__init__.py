"""What changes the law of a token before it is drawn. One step per file; the seam is processor.py."""
