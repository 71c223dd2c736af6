"""How are weights stored?"""
