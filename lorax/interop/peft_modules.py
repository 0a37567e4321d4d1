"""Converts adapted kernels to PEFT's adapted modules: ranks, alphas, pairs, fused parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax.errors import LoraxError
from lorax.interop.peft_fused import fuse
from lorax.interop.peft_names import fused_part, is_within, module_of, name_of
from lorax.lora import LoraSpec, LoraTree
from lorax.lora.spec import SCALINGS
from lorax.models.families import family_of


class Module(NamedTuple):
    """The numbers of one adapted module of PEFT."""

    rank: int
    alpha: float


def by_name(lora: LoraTree, model_type: str, *, bare: bool) -> dict[str, list[str]]:
    """PEFT's module names to lorax's paths: one, or the adapted parts of a fused module."""
    names: dict[str, list[str]] = {}
    for path in lora:
        names.setdefault(name_of(module_of(path), model_type, bare=bare), []).append(path)
    return names


def as_module(
    paths: list[str], lora: LoraTree, spec: LoraSpec, model_type: str, *, bare: bool
) -> tuple[Mapping[str, Any], Module]:
    """The pair of a PEFT module, and its numbers in the config."""
    for path in paths:
        _check_pair(path, lora[path], spec)
        _check_head_module(path, model_type, bare=bare)
    first, *_ = paths
    rank, alpha = spec.rank_of(first), spec.alpha_of(first)
    if fused_part(first, model_type) is None:
        return lora[first], Module(rank, alpha)
    pairs, of = {}, 1
    for path in paths:
        n, of = fused_part(path, model_type) or (0, 1)
        share = spec.scale(path) / spec.scale(first)
        pairs[n] = np.asarray(lora[path]["a"]), share * np.asarray(lora[path]["b"])
    a, b = fuse(pairs, of)
    # The alpha that gives the first part's scale at the rank of the whole.
    return {"a": a, "b": b}, Module(len(a), SCALINGS[spec.scaling](alpha, rank / len(a)))


def _check_pair(path: str, pair: Mapping[str, Any], spec: LoraSpec) -> None:
    if set(pair) != {"a", "b"}:
        raise LoraxError(f"the adapter of {path!r} has {', '.join(pair)}; PEFT's format has a, b")
    rank, stored = spec.rank_of(path), pair["a"].shape[0]
    if rank != stored:
        raise LoraxError(
            f"the adapter of {path!r} is of rank {stored}, its spec says {rank}: unpad it first"
        )


def _check_head_module(path: str, model_type: str, *, bare: bool) -> None:
    """Refuse an adapter of a layer of the head that PEFT cannot adapt.

    `BertModel` has a pooler to adapt; a classifier's output layer is always stored whole.
    """
    if not path.startswith("head."):
        return
    name = name_of(module_of(path), model_type, bare=False)
    is_in_base = name.startswith(f"{family_of(model_type).prefix}.")
    if is_within(name, "classifier") or (bare and not is_in_base):
        raise LoraxError(
            f"{path!r} is of the head, whose adapter PEFT's format has no place for: give "
            "head=params['head'], into which it is merged"
        )
