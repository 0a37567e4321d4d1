"""Batches: which examples come together, packed into rows or padded, and in which order."""
