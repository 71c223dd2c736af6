"""Who runs, how many rows?"""
