"""Hugging Face checkpoints to our parameter trees: names, layouts, and what may go wrong.

Paths are dotted, as in `encoder.layers.0.attention.query.kernel`. A family's rules turn the path of
one of our modules into the name that `transformers` gives it, so that adapters can be written with
them too.
"""

import re
from collections.abc import Mapping

import numpy as np

from lorax.errors import LoraxError, refuse
from lorax.models.families import family_of
from lorax.models.family import Rule, rule_of
from lorax.models.stored import FLOATS
from lorax.models.weight import Shaped, Tensor, Weight

_LEAVES = {"embedding": "weight", "scale": "weight", "bias": "bias"}
_TURNED = (".kernel", ".taps")  # outputs last; a convolution's window first
_LEAVES |= {leaf.removeprefix("."): "weight" for leaf in _TURNED}
_FLOATS = ", ".join(map(str, FLOATS))
# Of a tied decoder these two are one array.
_WORDS, _OUTPUT = "decoder.word.embedding", "lm_head.kernel"
_ROWS = 4096  # of a table that are read at once
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
    return _find(path, model_type)[1]


def is_transposed(path: str, model_type: str) -> bool:
    """Whether Hugging Face stores this parameter of ours transposed."""
    return path.endswith(_TURNED) and _find(path, model_type)[0].transposed


def _find(path: str, model_type: str) -> tuple[Rule, str]:
    module, _, leaf = path.rpartition(".")
    if leaf not in _LEAVES:
        module, leaf = path, ""
    found = rule_of(family_of(model_type).rules, module)
    if found is None:
        raise LoraxError(f"{path}: no Hugging Face name in the rules of {model_type}")
    rule, name = found
    return rule, f"{name}.{_LEAVES[leaf]}" if leaf else name


def _strip(name: str, prefix: str) -> str:
    """A tensor's name without the base model's prefix, and in today's spelling."""
    name = re.sub(rf"^({prefix}|bert|roberta)\.", "", name)  # the latter two on either's names
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _stripped(path: str, model_type: str) -> str:
    """The name of a parameter of ours, as `_strip` leaves names."""
    return _strip(_find(path, model_type)[1], family_of(model_type).prefix)


def is_untied(tensors: Mapping[str, Tensor], model_type: str) -> bool:
    """Whether a decoder's checkpoint has an output layer unlike its word embeddings.

    Its config may say that they are tied all the same. Where both are stored they are read, a few
    rows at a time.
    """
    given = {_strip(name, family_of(model_type).prefix): x for name, x in tensors.items()}
    words, output = (given.get(_stripped(path, model_type)) for path in (_WORDS, _OUTPUT))
    if words is None or output is None:
        return False
    shape = tuple(words.shape)
    if len(shape) != 2 or tuple(output.shape) != shape:
        return True
    columns = slice(0, shape[1])
    parts = ((slice(n, min(n + _ROWS, shape[0])), columns) for n in range(0, shape[0], _ROWS))
    return not all(np.array_equal(words[part], output[part]) for part in parts)


def convert(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Shaped],
    model_type: str,
    *,
    load_head: bool,
) -> dict[str, np.ndarray]:
    """Picks our parameters out of a checkpoint: the arrays of `find_weights`, read."""
    found = find_weights(tensors, wanted, model_type, load_head=load_head)
    return {path: weight.read() for path, weight in found.items()}


def find_weights(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Shaped],
    model_type: str,
    *,
    load_head: bool,
) -> dict[str, Weight]:
    """Finds our parameters in a checkpoint, by names and shapes; reads none of them.

    Args:
      tensors: the checkpoint; names with or without the prefix of the base model, such as `bert.`.
        Of a decoder with tied embeddings it may hold the output layer in their place.
      wanted: dotted path to the shape that our model expects, the head's included.
      model_type: a key of `lorax.models.families.FAMILIES`.
      load_head: take the head's modules too where the checkpoint has them. An output layer for
        another number of outputs is left out, as is what the checkpoint does not have.

    Returns:
      Dotted path to weight, in our layout: every parameter of the base, and the head's that exist.

    Raises:
      LoraxError: every missing, mis-shaped, doubled and unexpected weight, in one line.
    """
    family = family_of(model_type)
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(_strip(name, family.prefix), []).append(name)
    given = {name: tensors[stored[0]] for name, stored in names.items()}
    found: dict[str, Weight] = {}
    used, faults = set(), []
    absent = _absent_head_modules(wanted, given, model_type) if load_head else ("head.",)
    for path, want in wanted.items():
        if path.startswith(absent):
            continue
        rule, name = _find(path, model_type)[0], _stripped(path, model_type)
        if path == _WORDS and name not in given and _OUTPUT not in wanted:
            output = _stripped(_OUTPUT, model_type)
            name = output if output in given else name  # a tied model may keep either
        used.add(name)
        if name not in given:
            faults.append(f"missing {name}")
            continue
        turned = rule.transposed and path.endswith(_TURNED)
        shape, (part, of) = tuple(want.shape), rule.part or (0, 1)
        whole = (*shape[:-1], shape[-1] * of)
        expected = whole[::-1] if turned else whole
        if tuple(given[name].shape) != expected:
            faults.append(f"{name} has shape {tuple(given[name].shape)}, expected {expected}")
        elif given[name].dtype not in FLOATS:
            faults.append(f"{name} is stored as {given[name].dtype}, not in one of {_FLOATS}")
        found[path] = Weight(given[name], shape, turned, part * shape[-1], name=name)
    twice = sorted(name for name in used if len(names.get(name, ())) > 1)
    faults += [f"{name} is there twice, as {' and '.join(names[name])}" for name in twice]
    rest = sorted(given.keys() - used)
    faults += [f"unexpected {name}" for name in rest if not re.fullmatch(family.unneeded, name)]
    refuse(f"checkpoint does not fit {model_type}", faults)
    return found


def _absent_head_modules(
    wanted: Mapping[str, Shaped], tensors: Mapping[str, Shaped], model_type: str
) -> tuple[str, ...]:
    """Prefixes of the head's modules that start fresh.

    These have no tensor at all in the checkpoint, or are an output layer of another width.
    """
    absent = []
    for module in sorted({path.rpartition(".")[0] for path in wanted if path.startswith("head.")}):
        name = _stripped(module, model_type)
        bias = tensors.get(f"{name}.bias")
        no_tensor = bias is None and f"{name}.weight" not in tensors
        resized = bias is not None and bias.shape != tuple(wanted[f"{module}.bias"].shape)
        if no_tensor or (resized and module == "head.out"):
            absent.append(f"{module}.")
    return tuple(absent)
