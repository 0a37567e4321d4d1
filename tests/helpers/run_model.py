"""A model's output from one compiled program; called plainly, each operation would be compiled."""

import functools

from flax import nnx

from tests.helpers.lora import quick_jit

__all__ = ["quick_jit", "run"]


@functools.partial(quick_jit, static_argnums=0)
def _called(graphdef, state, args, options):
    return nnx.merge(graphdef, state)(*args, **options)


def run(model, *args, **options):
    """What `model(*args, **options)` returns."""
    return _called(*nnx.split(model), args, options)
