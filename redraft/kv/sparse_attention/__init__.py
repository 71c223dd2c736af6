"""What is read this step?"""
