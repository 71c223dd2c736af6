"""Layer skipping: which layers run. One method per file; layer_skipping.py defines the interface."""
