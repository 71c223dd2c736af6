"""What may come next? One drafter per file; the seam is drafter.py."""
