"""The trainer of Redraft's embedded model pair. It may import `redraft`; `redraft` never imports it."""
