"""What entry points set for their process: each in a process of its own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Fills and frees 64 MB twice; how many pages the second time had to be fetched for.
FAULTS = """
import resource, sys
import numpy as np
from lorax.runtime.process import keep_freed_memory

print(keep_freed_memory())
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**26, np.uint8).fill(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
# Compiles a program that takes a moment; prints where programs are kept.
COMPILE = """
import jax, jax.numpy as jnp
from lorax.runtime.process import prepare_process

prepare_process()
def slow(x):
    for n in range(100):
        x = jnp.sin(x) @ x + n
    return x
jax.jit(slow)(jnp.ones((4, 4))).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


def run(code, **environment):
    """What a process of a user's prints: nothing that the tests set is in its environment."""
    dropped = {"JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "XLA_FLAGS"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_not_fetched_again():
    is_kept, faults = run(FAULTS)
    if is_kept == "False":
        pytest.skip("no glibc")
    left_alone, faults_before = run(FAULTS, MALLOC_ARENA_MAX="8")
    assert left_alone == "False"  # what the environment says goes before
    assert int(faults) < 50 < int(faults_before)


def test_compiled_programs_are_kept_for_the_next_process(tmp_path):
    (place,) = run(COMPILE, XDG_CACHE_HOME=str(tmp_path))
    assert place.startswith(str(tmp_path / "lorax" / "programs" / "jaxlib-"))
    kept = sorted(path.name for path in (tmp_path / "lorax").rglob("*-cache"))
    assert len(kept) == 1
    run(COMPILE, XDG_CACHE_HOME=str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "lorax").rglob("*-cache")) == kept
    assert run(COMPILE, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == [
        str(tmp_path / "mine")
    ]


def test_steps_wait_for_one_another():
    code = """
import jax
from lorax.runtime.process import PREPARED, prepare_process

prepare_process()
print(PREPARED["runs_a_step_at_a_time"])
x = jax.numpy.ones((1500, 1500))
product = jax.jit(lambda x: x @ x @ x)
product(x)
print(product(x).is_ready())
"""
    known, is_ready = run(code)
    assert known == "True"
    assert is_ready == "True"
