"""Eviction: which slots stay in the cache."""
