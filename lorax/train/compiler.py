"""What XLA is told when it compiles a step."""

from functools import cache

import jax

Options = dict[str, str | bool]
# On a CPU, XLA of jaxlib 0.10 gathers products and what surrounds them into large graphs of its
# library YNNPACK, which compute much twice. Products alone go there instead.
CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# It drops barriers early there, too: what was to be computed again is then shared, and kept.
CPU_BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@cache
def compiler_options(keeps_barriers: bool = False) -> Options:
    """Options for the default backend; none where XLA does not know them.

    Args:
      keeps_barriers: what `jax.checkpoint` computes again is computed again, as on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = CPU | CPU_BARRIERS if keeps_barriers else CPU
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except Exception:  # an XLA of another version: the error's type is not documented
        return {}
    return options
