"""Asking the LLM: the client, what its failures mean, and the store of replies.

May import ``augcon.data``, ``augcon.errors`` and ``augcon.text``.
"""
