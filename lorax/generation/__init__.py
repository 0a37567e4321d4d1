"""Text from decoders: greedy, sampled, by beam search."""

from lorax.generation.completions import Completion, generate
from lorax.generation.config import GenerationConfig

__all__ = ["Completion", "GenerationConfig", "generate"]
