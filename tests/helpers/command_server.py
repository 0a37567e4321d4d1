"""A process with all imports done, which forks for each list of commands that it is asked to run.

    python -m tests.helpers.command_server

A line of its input is JSON: the command lines of `experiments.finetune`, the environment, and the
file to write to: the exit code and both streams of each command. The commands of a list run in
one process, one after another, and share what is compiled. Nothing is computed before the fork,
since the threads that JAX starts then would be missing after it.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from experiments.finetune import finetune
from lorax.launch import hydra_main


def run(arguments: list[str]) -> dict[str, Any]:
    """What `python -m experiments.finetune <arguments>` does: its exit code and both streams."""
    GlobalHydra.instance().clear()
    sys.argv = ["finetune.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            hydra_main(finetune, "finetune")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = "raised"
            traceback.print_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def serve() -> None:
    """Fork for each request, one at a time; print the child's exit status."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            request = json.loads(line)
            os.environ.update(request["environment"])
            ended = [run(arguments) for arguments in request["command_lines"]]
            Path(request["file"]).write_text(json.dumps(ended))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
