"""How the tests, and the processes that they start, compile: quickly, and each program once."""

import os

import jax

from lorax.runtime.process import cache_dir, cache_root

# Most programs of a test run a few times on a few numbers: optimizing costs more than it saves.
# Of a cold compile, the fusion emitters are half, LLVM's optimizing and splitting a fifth.
# LORAX_TEST_XLA=production compiles as users do.
QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
# pytest-xdist runs a process on each core: more threads would wait for each other.
ONE_THREAD = {"NPROC": "1", "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
CACHE = cache_root() / "tests" / cache_dir().name  # programs hold for one kind of machine


def xla_flags(*flags: str) -> str:
    """`XLA_FLAGS` for a test's process: these, and the level that this session compiles at."""
    is_production = os.environ.get("LORAX_TEST_XLA") == "production"
    return " ".join(flags if is_production else (QUICK, *flags))


def prepare(*, is_production: bool = False) -> None:
    """Set this process and, by the environment, those that it starts; before JAX computes."""
    if is_production:
        os.environ["LORAX_TEST_XLA"] = "production"
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": xla_flags(),
    }
    if "PYTEST_XDIST_WORKER" in os.environ:
        settings |= ONE_THREAD
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
