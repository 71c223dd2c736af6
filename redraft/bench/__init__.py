"""Benchmarks: speed, memory, and whether texts are right."""
