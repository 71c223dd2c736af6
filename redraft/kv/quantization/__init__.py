"""Quantization: the formats in which pages are stored."""
