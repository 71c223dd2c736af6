"""The Backend interface, its float64 definition, and the fast backends."""
