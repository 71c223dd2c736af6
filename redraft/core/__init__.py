"""The plain types that a step is made of: Python integers and numpy only."""
