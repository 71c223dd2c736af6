"""The engine: one step, and requests coming and going."""
