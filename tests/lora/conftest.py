from collections.abc import Iterator

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("lora", max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def rank_promotion_raises() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield
