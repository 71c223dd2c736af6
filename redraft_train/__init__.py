"""Trains drafters for a model, from text that the model writes itself (redraft train). Needs PyTorch; redraft never imports it."""
