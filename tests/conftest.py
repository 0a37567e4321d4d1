"""What all tests stand on: a small world, and a process that does not run out of memory maps."""

import random
from pathlib import Path

import pytest

from tests.helpers.world import World, write_base, write_glue

MOST_MAPS = 20_000  # Linux grants 65,530


@pytest.fixture(scope="session", autouse=True)
def tokens_apart(tmp_path_factory):
    """Tests leave no tokens in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAX_TOKEN_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs take several memory maps each, and a process has a limited number."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        import gc

        import jax

        from lorax.train import measure

        measure._COMPILED.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base")
    write_glue(root / "glue", random.Random(0))
    return World(root / "base", root / "glue", root / "jax-cache")
