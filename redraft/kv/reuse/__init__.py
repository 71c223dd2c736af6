"""Which spans come from elsewhere?"""
