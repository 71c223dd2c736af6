"""Workers, which compute requests: one in the server's process, or several in processes of their own. host.py defines the interface."""
