"""Tensors that no model can be trained from are refused by name."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import check_checkpoint, load_checkpoint
from lorax.models.checkpoints.lazy_parameter import LazyParameter

WEIGHTS = "model.safetensors"
NAME = "encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_with_values_that_are_not_finite_is_refused(write_checkpoint, load, tmp_path, value):
    write_checkpoint()
    tensors = dict(load_file(tmp_path / WEIGHTS))
    tensors[NAME][3, 5] = value
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(LoraxError, match=rf"model\.source=.*: {NAME} holds NaN or infinity: "):
        load()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_part_of_a_weight_is_looked_at_as_it_is_read(dtype):
    import jax.numpy as jnp

    table = np.ones((3, 2**20 + 1), jnp.dtype(dtype))
    assert LazyParameter(table, table.shape).read().shape == table.shape
    table[2, 2**20] = np.inf
    weight = LazyParameter(table, table.shape, name="table")
    assert weight.read(((0, 2), (0, 5))).shape == (2, 5)
    with pytest.raises(LoraxError, match=r"^table holds NaN or infinity"):
        weight.read(((2, 3), (0, 2**20 + 1)))


@pytest.mark.parametrize(
    ("dtype", "named"),
    [("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("int8", "int8"), ("bool", "bool")],
)
def test_a_dtype_that_weights_are_not_read_from_is_refused(
    write_checkpoint, tmp_path, dtype, named
):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    write_checkpoint()
    tensors = load_file(tmp_path / WEIGHTS)
    odd = tensors[NAME].to(getattr(torch, dtype))
    save_file(tensors | {NAME: odd}, tmp_path / WEIGHTS)
    with pytest.raises(LoraxError, match=f"{NAME} is stored as {named}, not in one of float64, "):
        check_checkpoint(ModelConfig(source=str(tmp_path)), 3)
    if named.startswith("F8"):
        with pytest.raises(LoraxError, match=f"{NAME} is stored as {named}"):
            load_checkpoint(tmp_path)
    save_file(tensors | {"cls.predictions.bias": odd}, tmp_path / WEIGHTS)
    check_checkpoint(ModelConfig(source=str(tmp_path)), 3)
