"""Our parameters out of a Hugging Face checkpoint: by name, shape and layout."""

import re
from collections.abc import Mapping

import numpy as np

from lorax.errors import refuse
from lorax.models.checkpoints.lazy_parameter import LazyParameter, Shaped, Tensor
from lorax.models.checkpoints.safetensors import FLOATS
from lorax.models.checkpoints.tensor_names import (
    find_rule,
    is_transposed,
    normalize_name,
    tensor_name,
)
from lorax.models.families import family_of

_FLOATS = ", ".join(map(str, FLOATS))
# Of a tied decoder these two are one array.
_WORDS, _OUTPUT = "decoder.word.embedding", "lm_head.kernel"
_ROWS = 4096  # of a table that are read at once


def is_untied(tensors: Mapping[str, Tensor], model_type: str) -> bool:
    """Whether a decoder's checkpoint has an output layer unlike its word embeddings.

    Its config may say that they are tied all the same. Where both are stored they are read, a few
    rows at a time.
    """
    given = {normalize_name(name, family_of(model_type).prefix): x for name, x in tensors.items()}
    words, output = (given.get(tensor_name(path, model_type)) for path in (_WORDS, _OUTPUT))
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
    """Picks our parameters out of a checkpoint: the arrays of `find_parameters`, read."""
    found = find_parameters(tensors, wanted, model_type, load_head=load_head)
    return {path: parameter.read() for path, parameter in found.items()}


def find_parameters(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Shaped],
    model_type: str,
    *,
    load_head: bool,
) -> dict[str, LazyParameter]:
    """Finds our parameters in a checkpoint, by names and shapes; reads none of them.

    Args:
      tensors: the checkpoint; names with or without the prefix of the base model, such as `bert.`.
        Of a decoder with tied embeddings it may hold the output layer in their place.
      wanted: dotted path to the shape that our model expects, the head's included.
      model_type: a key of `lorax.models.families.FAMILIES`.
      load_head: take the head's modules too where the checkpoint has them. An output layer for
        another number of outputs is left out, as is what the checkpoint does not have.

    Returns:
      Dotted path to lazy parameter: every one of the base, and the head's that exist.

    Raises:
      LoraxError: every missing, mis-shaped, doubled and unexpected weight, in one line.
    """
    family = family_of(model_type)
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(normalize_name(name, family.prefix), []).append(name)
    given = {name: tensors[stored[0]] for name, stored in names.items()}
    found: dict[str, LazyParameter] = {}
    used, faults = set(), []
    absent = _absent_head_modules(wanted, given, model_type) if load_head else ("head.",)
    for path, want in wanted.items():
        if path.startswith(absent):
            continue
        rule, name = find_rule(path, model_type)[0], tensor_name(path, model_type)
        if path == _WORDS and name not in given and _OUTPUT not in wanted:
            output = tensor_name(_OUTPUT, model_type)
            name = output if output in given else name  # a tied model may keep either
        used.add(name)
        if name not in given:
            faults.append(f"missing {name}")
            continue
        turned = is_transposed(path, model_type)
        shape, (part, of) = tuple(want.shape), rule.part or (0, 1)
        whole = (*shape[:-1], shape[-1] * of)
        expected = whole[::-1] if turned else whole
        if tuple(given[name].shape) != expected:
            faults.append(f"{name} has shape {tuple(given[name].shape)}, expected {expected}")
        elif given[name].dtype not in FLOATS:
            faults.append(f"{name} is stored as {given[name].dtype}, not in one of {_FLOATS}")
        found[path] = LazyParameter(given[name], shape, turned, part * shape[-1], name=name)
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
        name = tensor_name(module, model_type)
        bias = tensors.get(f"{name}.bias")
        no_tensor = bias is None and f"{name}.weight" not in tensors
        resized = bias is not None and bias.shape != tuple(wanted[f"{module}.bias"].shape)
        if no_tensor or (resized and module == "head.out"):
            absent.append(f"{module}.")
    return tuple(absent)
