import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Cli = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def cli(world, tmp_path_factory) -> Iterator[Cli]:
    """Run command lines of experiments.finetune in one process: see `command_server`."""
    folder = tmp_path_factory.mktemp("commands")
    server = world.start("-m", "tests.helpers.command_server", reads=True)
    count = 0

    def run(command_lines: list[list[str]], **environment: str) -> list[dict[str, Any]]:
        nonlocal count
        count += 1
        file = folder / f"{count}.json"
        request = {"command_lines": command_lines, "environment": environment, "file": str(file)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n", server.poll()
        return json.loads(file.read_text())

    yield run
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="session")
def finetune(cli) -> Callable[..., dict[str, Any]]:
    """Run one command line to its end, where no process of its own is needed for it."""
    return lambda *words, **environment: cli([[*map(str, words)]], **environment)[0]
