"""Logits processors, which change the distribution of a token before it is drawn. One per file; processor.py defines the interface."""
