"""Sparse attention: which keys a row reads."""
