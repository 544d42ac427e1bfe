"""Asking the LLM: the client and its retries, the store of replies, and many calls with their results in order.

May import ``augcon.data``, ``augcon.errors`` and ``augcon.text``.
"""
