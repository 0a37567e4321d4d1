import json
from collections.abc import Callable
from typing import Any

import pytest

# One process for many command lines: each is what `python -m experiments.finetune` runs.
DRIVER = """
import contextlib, io, json, sys, traceback
from hydra.core.global_hydra import GlobalHydra
from experiments.finetune import finetune
from lorax.sweep import hydra_main

def run(arguments):
    GlobalHydra.instance().clear()
    sys.argv = ["finetune.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = hydra_main(finetune, "finetune") or 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = "raised"
            traceback.print_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

json.dump([run(arguments) for arguments in json.loads(sys.argv[1])], sys.__stdout__)
"""


@pytest.fixture(scope="session")
def cli(world) -> Callable[[list[list[str]]], list[dict[str, Any]]]:
    """Run command lines in one process: the exit code and both streams of each."""

    def run(command_lines: list[list[str]]) -> list[dict[str, Any]]:
        process = world.start("-c", DRIVER, json.dumps(command_lines))
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return json.loads(out)

    return run
