import jax
import jaxlib.utils
import numpy as np
import pytest

from lorax.runtime import compiler
from lorax.runtime.compiler import compile_cost
from lorax.train.step import train_step


@pytest.fixture(autouse=True)
def fresh():
    compiler.compiler_options.cache_clear()
    yield
    compiler.compiler_options.cache_clear()


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "CPU", {"xla_cpu_no_such_option": "true"})
    assert compiler.compiler_options() == {}
    assert compiler.compiler_options(keeps_barriers=True) == compiler.CPU_BARRIERS


def test_other_backends_get_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler.compiler_options() == {}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="CPU options")
def test_the_options_change_no_result(bench):
    assert compiler.compiler_options() == compiler.CPU
    trial = bench()
    parts = trial.setup.program, trial.state, trial.setup.frozen, trial.hyper, trial.batches()[0]
    lowered = train_step.lower(*parts)
    results = []
    for options in ({}, compiler.CPU, compiler.compiler_options(keeps_barriers=True)):
        state = jax.tree.map(lambda x: x.copy(), trial.state)
        new, loss = lowered.compile(options)(state, *parts[2:])
        results.append(jax.tree.map(np.asarray, (new.trainable, loss)))
    assert not np.isnan(results[0][1])
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other
        )


def test_xlas_own_log_is_off_while_a_program_is_compiled(monkeypatch):
    levels = []
    monkeypatch.setattr(jaxlib.utils, "absl_set_min_log_level", levels.append)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    cost, _ = compile_cost(jax.jit(lambda x: x + 1), np.ones(3))
    assert levels == [compiler.FATAL, 0] and cost.memory_bytes > 0
