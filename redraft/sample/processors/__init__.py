"""What changes the distribution of a token before it is drawn. One step per file; the seam is processor.py."""
