"""What is one step?"""
