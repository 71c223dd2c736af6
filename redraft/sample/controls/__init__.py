"""Controls: what decides, beside the model, how a text goes on. One method per file; control.py defines the interface."""
