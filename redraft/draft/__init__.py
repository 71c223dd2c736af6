"""Drafters, which propose the next tokens. One drafter per file; drafter.py defines their interface."""
