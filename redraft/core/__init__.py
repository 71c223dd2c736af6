"""What is a step made of? Plain types: Python integers and numpy only."""
