"""Asking the LLM: the client, what its failures mean, and the store of replies."""
