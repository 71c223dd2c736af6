"""What stays in the cache?"""
