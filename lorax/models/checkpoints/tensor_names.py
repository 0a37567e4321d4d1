"""The names that Hugging Face gives our modules and parameters.

Paths are dotted, as in `encoder.layers.0.attention.query.kernel`. A family's rules turn the path of
one of our modules into the name that `transformers` gives it. Reading checkpoints and writing
adapters both use them.
"""

import re

from lorax.errors import LoraxError
from lorax.models.families import family_of
from lorax.models.families.family import Rule, rule_of

_LEAVES = {"embedding": "weight", "scale": "weight", "bias": "bias"}
_TURNED = (".kernel", ".taps")  # outputs last; a convolution's window first
_LEAVES |= {leaf.removeprefix("."): "weight" for leaf in _TURNED}
# Norms of TensorFlow's time.
_SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def hf_module(path: str, model_type: str) -> str:
    """Hugging Face's name of a module, or of a parameter, of ours.

    Args:
      path: dotted path of a module (`encoder.layers.0.mlp.up`) or of its parameter (`....kernel`).
      model_type: a key of `lorax.models.families.FAMILIES`.

    Returns:
      The name within the family's model with a head: `BertForSequenceClassification` and the like.

    Raises:
      LoraxError: no rule of the family matches.

    >>> hf_module("encoder.layers.0.attention.query", "bert")
    'bert.encoder.layer.0.attention.self.query'
    >>> hf_module("head.out.kernel", "roberta")
    'classifier.out_proj.weight'
    """
    return find_rule(path, model_type)[1]


def is_transposed(path: str, model_type: str) -> bool:
    """Whether Hugging Face stores this parameter of ours transposed."""
    return path.endswith(_TURNED) and find_rule(path, model_type)[0].transposed


def find_rule(path: str, model_type: str) -> tuple[Rule, str]:
    """The rule of a module or parameter of ours, and its name; arguments as of `hf_module`.

    Raises:
      LoraxError: no rule of the family matches.
    """
    module, _, leaf = path.rpartition(".")
    if leaf not in _LEAVES:
        module, leaf = path, ""
    found = rule_of(family_of(model_type).rules, module)
    if found is None:
        raise LoraxError(f"{path}: no Hugging Face name in the rules of {model_type}")
    rule, name = found
    return rule, f"{name}.{_LEAVES[leaf]}" if leaf else name


def normalize_name(name: str, prefix: str) -> str:
    """A tensor's name in a checkpoint without the base model's prefix, and in today's spelling."""
    name = re.sub(rf"^({prefix}|bert|roberta)\.", "", name)  # the latter two on either's names
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def tensor_name(path: str, model_type: str) -> str:
    """The name of a parameter of ours, as `normalize_name` returns it."""
    return normalize_name(find_rule(path, model_type)[1], family_of(model_type).prefix)
