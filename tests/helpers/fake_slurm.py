"""A Slurm of one machine: what submitit calls of `sbatch`, `srun`, `sacct`, `scontrol`, `scancel`.

`install(folder)` writes the five commands; put `folder` first on PATH. Jobs run at once, an array's
elements side by side. A job's state is a file `<folder>/jobs/<id>`, which `sacct` reads. Each job
starts with the environment of its `sbatch`, as Slurm's default `--export=ALL` has it, or with PATH
and HOME alone under `FAKE_SLURM_EXPORT=NONE`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol", "scancel")


def install(folder: Path) -> Path:
    """Write the commands into `folder`; returns it."""
    (folder / "jobs").mkdir(parents=True)
    for name in COMMANDS:
        words = [sys.executable, str(Path(__file__).resolve()), str(folder), name]
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def sbatch(root: Path, script: str) -> None:
    """Start a job, or every element of an array, each under a process that outlives this one."""
    number = 1000 + len(list(root.glob("job-*")))
    kept = root / f"job-{number}"
    kept.write_text(Path(script).read_text())  # Slurm keeps a copy, too
    array = re.search(r"#SBATCH --array=0-(\d+)", kept.read_text())
    indices = range(int(array.group(1)) + 1) if array else [None]
    for index in indices:
        name = str(number) if index is None else f"{number}_{index}"
        (root / "jobs" / name).write_text("PENDING")
        words = [sys.executable, __file__, str(root), "_job", str(kept), name]
        subprocess.Popen(
            words,
            start_new_session=True,
            env=_environment(number, index),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    print(f"Submitted batch job {number}")


def _environment(number: int, index: int | None) -> dict[str, str]:
    sent = dict(os.environ)
    if sent.get("FAKE_SLURM_EXPORT") == "NONE":
        sent = {name: sent[name] for name in ("PATH", "HOME") if name in sent}
    sent |= {"SLURM_JOB_ID": str(number + (index or 0)), "SLURM_NTASKS": "1"}
    sent |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    if index is not None:
        sent |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
    return sent


def _job(root: Path, script: str, name: str) -> None:
    """Run a job's script, again while `scontrol requeue` asks for it."""
    state = root / "jobs" / name
    while True:
        state.write_text("RUNNING")
        code = subprocess.call(["bash", script])
        if state.read_text() != "REQUEUED":
            break
    ended = "COMPLETED" if code == 0 else "OUT_OF_MEMORY" if code == 137 else "FAILED"
    state.write_text("CANCELLED" if state.read_text() == "CANCELLED" else ended)


def srun(_root: Path, *words: str) -> None:
    """`srun --unbuffered --output FILE [--error FILE] command`."""
    out, err, rest = None, None, list(words)
    while rest[0].startswith("--"):
        flag = rest.pop(0)
        if flag == "--output":
            out = _opened(rest.pop(0))
        elif flag == "--error":
            err = _opened(rest.pop(0))
    code = subprocess.call(rest, stdout=out, stderr=err or out)
    sys.exit(128 - code if code < 0 else code)


def _opened(pattern: str) -> object:
    ids = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%j": "SLURM_JOB_ID"}
    for tag, variable in ids.items():
        pattern = pattern.replace(tag, os.environ.get(variable, ""))
    return Path(pattern.replace("%t", "0")).open("a")


def sacct(root: Path, *_words: str) -> None:
    """Every job there is; submitit picks its own."""
    print("JobID|State|NodeList")
    for state in sorted((root / "jobs").iterdir()):
        print(f"{state.name}|{state.read_text()}|here")


def scontrol(root: Path, _requeue: str, name: str) -> None:
    """`scontrol requeue <id>`."""
    (root / "jobs" / name).write_text("REQUEUED")


def scancel(root: Path, name: str) -> None:
    """Note the wish; the process itself is the test's to end."""
    (root / "jobs" / name).write_text("CANCELLED")


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
