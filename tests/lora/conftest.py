import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests, in any import mode

hypothesis.settings.register_profile("lora", max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def rank_promotion_raises() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield
