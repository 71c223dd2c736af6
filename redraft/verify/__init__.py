"""Verifiers, which accept or reject drafted tokens. One verifier per file; verifier.py defines their interface."""
