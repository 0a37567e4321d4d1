"""A model's output from one compiled program; called plainly, each operation would be compiled."""

import functools

import jax
from flax import nnx

# Small programs that run once: LLVM's optimizing costs more than it saves.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=0)
def _called(graphdef, state, args, options):
    return nnx.merge(graphdef, state)(*args, **options)


def run(model, *args, **options):
    """What `model(*args, **options)` returns."""
    return _called(*nnx.split(model), args, options)
