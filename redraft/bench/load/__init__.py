"""Load tests of a server: a client of the OpenAI protocol that needs no PyTorch and nothing else of Redraft."""
