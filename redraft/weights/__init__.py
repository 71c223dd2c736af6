"""Weight quantizers, which decide how weights are stored. One per file; quant.py defines the interface."""
