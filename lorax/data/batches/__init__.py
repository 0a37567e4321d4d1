"""Batches: their examples, the order of these, and their packing into rows or padding."""
