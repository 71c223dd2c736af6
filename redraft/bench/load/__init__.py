"""How does a server hold under load? A client of the OpenAI protocol that needs nothing else of Redraft, and no PyTorch."""
