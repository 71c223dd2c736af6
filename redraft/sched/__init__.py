"""Schedulers, which decide the sequences of a step and their rows. One per file; scheduler.py defines the interface."""
