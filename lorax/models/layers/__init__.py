"""Layers: attention, Dense, embeddings, norm, MLP, RoPE, quantization, pooling, token losses."""
