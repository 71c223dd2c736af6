"""How is a page stored?"""
