"""Where do keys live?"""
