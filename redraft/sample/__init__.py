"""How is a token chosen?"""
