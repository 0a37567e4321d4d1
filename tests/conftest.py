"""What all tests stand on: a small world, and a process that does not run out of memory maps."""

import gc
import random
from pathlib import Path

import pytest

from tests.helpers import programs
from tests.helpers.world import World, write_base, write_glue

MOST_MAPS = 20_000  # Linux grants 65,530
LONG = ("tests/sweep", "tests/train")
APART = ("_kill.py", "_and_resume.py", "_memory.py", "_disk.py", "_disk_faults.py", "_locks.py")


def pytest_configure(config: pytest.Config) -> None:
    """Compile as users do for the tests that ask for it: `pytest -m production`."""
    programs.prepare(is_production=config.option.markexpr == "production")
    gc.set_threshold(50_000, 50, 100)  # tracing makes many objects, few of them in cycles


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that two processes end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file's tests in one process, for what they share; one test at a time that kills or fills.

    Two of those would slow each other's processes down, and each waits for a moment in them.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "apart" if file.endswith(APART) else file

    return Files(config, log)


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
        import jax

        from lorax.runtime import compiler

        compiler._COMPILED.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shallow_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base of one layer: what most tests train."""
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base")
    write_glue(root / "glue", random.Random(0))
    return World(root / "base", root / "glue")


@pytest.fixture(scope="session")
def deep_world(shallow_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two layers, for tests that tell them apart; such a module's `world` is this one."""
    source = tmp_path_factory.mktemp("deep") / "base"
    write_base(source, num_hidden_layers=2)
    return World(source, shallow_world.data_dir)


@pytest.fixture(scope="session")
def world(shallow_world: World) -> World:
    return shallow_world
