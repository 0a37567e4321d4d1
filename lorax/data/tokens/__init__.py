"""Tokens: examples and documents as ids, special tokens, and the cache of ids on disk."""
