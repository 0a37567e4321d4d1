"""An adapter stack: several adapters of one base in one pytree, of mixed ranks, targets and scales.

Ranks are zero-padded to the largest and missing targets are zero (see `stack`), scales are data.
So another adapter in a slot changes numbers alone, and a compiled program serves it as it is.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.lora.adapter import LoraTree
from lorax.lora.merge import Scales, scales_of
from lorax.lora.pad import pad
from lorax.lora.stack import stack, union


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapters:
    """K adapters of one base, as a pytree: it goes through `jax.jit` and `jax.grad`.

    Attributes:
      lora: `{path: {"a": (K, r, d_in), "b": (K, d_out, r)}}`; r is a target's largest rank.
      scales: the factors on B A by path, (K,) each; 0 where an adapter lacks the target.
    """

    lora: LoraTree
    scales: dict[str, jax.Array]

    def __len__(self) -> int:
        """K, the number of slots."""
        return len(next(iter(self.scales.values())))

    def replace(self, index: int, lora: LoraTree, scales: Scales) -> "Adapters":
        """The same with another adapter in the slot `index`; shapes, and so programs, stay.

        Args:
          index: the slot, from 0 to K - 1.
          lora: an adapter of the same base, of no target and no rank that the stack lacks.
          scales: its spec, or the factors on its B A by path.

        Raises:
          LoraxError: no such slot, or an adapter that does not fit; naming the target.

        >>> one = {"w": {"a": jnp.ones((1, 3)), "b": jnp.ones((2, 1))}}
        >>> pool = stack_adapters([(one, {"w": 0.5}), (one, {"w": 2.0})])
        >>> pool.replace(1, one, {"w": 4.0}).scales["w"].tolist()
        [0.5, 4.0]
        """
        if not 0 <= operator.index(index) < len(self):
            raise LoraxError(
                f"no slot {index} in a stack of {len(self)} adapters, 0 to {len(self) - 1}"
            )
        check_room(lora, self.slot)
        factors = scales_of(lora, scales)

        def put(path: str, slots: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if path not in lora:
                return {part: leaf.at[index].set(0) for part, leaf in slots.items()}
            pair = pad({path: lora[path]}, slots["a"].shape[-2])[path]
            return {part: leaf.at[index].set(pair[part]) for part, leaf in slots.items()}

        return Adapters(
            {path: put(path, slots) for path, slots in self.lora.items()},
            {
                path: s.at[index].set(factors[path] if path in lora else 0.0)
                for path, s in self.scales.items()
            },
        )

    @property
    def slot(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The shapes of one slot."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.lora)


def stack_adapters(adapters: Sequence[tuple[LoraTree, Scales]], like: Any = None) -> Adapters:
    """Adapters of one base as the slots of a stack, in the order given.

    Args:
      adapters: each with its spec, or with the factors on its B A by path. `({}, {})` is an empty
        slot: the plain base, until `Adapters.replace` fills it.
      like: an adapter or its shapes, whose targets and ranks there shall be room for; None: the
        room is what these adapters need.

    Raises:
      LoraxError: no adapter or no target at all, an adapter without a scale, one that does not
        fit into `like`, or two of different bases; naming the target.

    >>> small = {"q": {"a": jnp.ones((1, 3)), "b": jnp.ones((2, 1))}}
    >>> large = {"v": {"a": jnp.ones((4, 3)), "b": jnp.ones((2, 4))}}
    >>> pool = stack_adapters([(small, {"q": 2.0}), (large, {"v": 0.5})])
    >>> jax.tree.map(jnp.shape, pool.lora["v"]), pool.scales["v"].tolist()
    ({'a': (2, 4, 3), 'b': (2, 2, 4)}, [0.0, 0.5])
    """
    trees = [lora for lora, _ in adapters]
    room = union(trees if like is None else [like])
    if not trees or not room:
        raise LoraxError("no adapter to stack: give at least one, or empty slots and their like=")
    for lora in trees:
        check_room(lora, room)
    factors = [dict(scales_of(lora, scales)) for lora, scales in adapters]
    kept = [{path: f[path] for path in lora} for lora, f in zip(trees, factors, strict=True)]
    scalar = {path: jax.ShapeDtypeStruct((), jnp.float32) for path in room}
    return Adapters(*jax.tree.map(jnp.asarray, (stack(trees, room), stack(kept, scalar))))


def check_room(lora: LoraTree, slot: Mapping[str, Any]) -> None:
    """Refuse an adapter that a slot has no room for.

    Raises:
      LoraxError: a target that the slot lacks, a rank above its, or widths of another base.
    """
    for path, pair in lora.items():
        if path not in slot:
            raise LoraxError(f"the adapter's target {path!r} has no place in the stack")
        a, b = (jnp.shape(pair[part]) for part in ("a", "b"))
        room_a, room_b = (slot[path][part].shape for part in ("a", "b"))
        widths = (a[:-2], a[-1], b[:-1], b[-1])
        if widths != (room_a[:-2], room_a[-1], room_b[:-1], a[-2]):
            raise LoraxError(
                f"the adapter of {path!r} has A {a} and B {b}; the stack holds A {room_a} and "
                f"B {room_b}, of another base"
            )
        if a[-2] > room_a[-2]:
            raise LoraxError(
                f"the adapter of {path!r} is of rank {a[-2]}, the stack has room for rank "
                f"{room_a[-2]}: stack anew with like= a larger one"
            )
