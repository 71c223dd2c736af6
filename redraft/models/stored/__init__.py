"""Folders whose matrices are stored quantized: one file for each way, found by `quant_method` in config.json."""
