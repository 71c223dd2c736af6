"""Is it true, is it fast?"""
