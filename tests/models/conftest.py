import functools

import jax
import pytest

from tests.helpers.encoders import load_classifier, make_batch, strictly, write_encoder


@pytest.fixture(autouse=True)
def strict():
    with strictly():
        yield


@pytest.fixture
def mixed(strict):
    """For bf16: flax and jax.nn promote inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes a random checkpoint of `transformers` to `tmp_path` and returns the torch model."""
    return functools.partial(write_encoder, tmp_path)


@pytest.fixture
def load(tmp_path):
    """Loads the checkpoint in `tmp_path`."""
    return functools.partial(load_classifier, tmp_path)


@pytest.fixture
def batch():
    return make_batch
