"""lorax: honest LoRA rank ablations in JAX and Flax."""

from lorax.errors import LoraxError as LoraxError
from lorax.lora import *  # noqa: F403

__version__ = "0.1.0"
