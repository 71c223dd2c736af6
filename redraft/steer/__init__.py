"""Steering: changes of hidden states between layers. One method per file; steer.py defines the interface."""
