"""Reuse of the cache of another text."""
