"""Which layers run?"""
