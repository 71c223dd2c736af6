"""What is accepted? One verifier per file; the seam is verifier.py."""
