"""Families: a file each, what they share (encoder, decoder, family), and their registry."""

from lorax.models.families.registry import DECODERS, ENCODERS, FAMILIES, family_of

__all__ = ["DECODERS", "ENCODERS", "FAMILIES", "family_of"]
