"""What XLA is told when it compiles a step."""

import logging
from functools import cache

import jax

log = logging.getLogger(__name__)
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
    wanted = [CPU, CPU_BARRIERS] if keeps_barriers else [CPU]
    return {name: value for part in wanted if _is_known(part) for name, value in part.items()}


def _is_known(options: Options) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except Exception as fault:  # an XLA of another version: the error's type is not documented
        log.warning("XLA does not take %s: %s", options, str(fault).splitlines()[0])
        return False
    return True
