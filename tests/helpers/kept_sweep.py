"""A sweep as lorax 0.1.0 wrote it in November 2026, and the trials that it was asked for.

`tests/kept/sweep-2026-11.tar.gz` holds its directory: two trials of a pack that finished, a pack of
two that was killed at step 4 of 8, a trial alone that finished, one alone that was killed, and one
of head-only training. The base and the data are made again by `write_world`; paths are relative,
since they are a part of trial ids.
"""

import random
import tarfile
from pathlib import Path

from lorax.config import TrialConfig
from tests.helpers.world import ROOT, World, write_base, write_glue

ARCHIVE = ROOT / "tests" / "kept" / "sweep-2026-11.tar.gz"
TRAIN = {"max_steps": 8, "eval_every": 4, "keep_checkpoints": False, "batch_size": 16}


def write_world() -> World:
    """The base and the data that the kept sweep was trained on, in the working directory."""
    write_base(Path("base"))
    write_glue(Path("glue"), random.Random(0))
    return World(Path("base"), Path("glue"))


def unpack() -> Path:
    """The kept sweep in the working directory; its folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(".", filter="data")
    return Path("outputs") / "tiny"


def trials_of(world: World) -> dict[str, list[TrialConfig]]:
    """The trials of the kept sweep, by what became of them."""

    def trial(**changes: object) -> TrialConfig:
        train = {**TRAIN, **changes.pop("train", {})}
        return world.trial("outputs", train=train, **changes)

    return {
        "packed": [trial(lora={"rank": rank, "alpha": 4.0}, seed=1) for rank in (1, 2)],
        "packed, killed": [trial(lora={"rank": rank, "alpha": 4.0}, seed=2) for rank in (1, 2)],
        "alone": [trial(seed=3)],
        "alone, killed": [trial(seed=4)],
        "head": [trial(train={"mode": "head"}, seed=5)],
    }
