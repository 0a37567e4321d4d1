"""Where the trials of a pack stand, and so where it goes on from."""

import jax
import numpy as np

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.sweep.pack import Pack, is_open
from lorax.train.lane import Progress
from lorax.train.measure import Meter
from lorax.train.restore import Found, lane_of, own_steps, pointed_to, read_pack
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state
from lorax.train.trial import Start
from lorax.trial_id import trial_dir, trial_id


def checkpoint_of(pack: Pack) -> Found | None:
    """The checkpoint that a pack goes on from as it was; None when a trial stands elsewhere."""
    found = read_pack(pack.checkpoints) if pack.checkpoints.is_dir() else None
    if found is None:
        return None
    opened = [trial for trial in members_of(pack, found) if is_open(trial)]
    return found if all(_stands_in(pack, step_of(found), trial) for trial in opened) else None


def step_of(found: Found) -> int:
    """Optimizer steps done at a checkpoint of a pack."""
    return max(lane["progress"]["step"] for lane in found[1]["lanes"].values())


def members_of(pack: Pack, found: Found) -> list[TrialConfig]:
    """The trials in a checkpoint's lanes, in their order; a pack may have shrunk before it."""
    trials = dict(zip(pack.ids, pack.trials, strict=True))
    lanes = sorted(found[1]["lanes"].items(), key=lambda item: item[1]["index"])
    return [trials[name] for name, _ in lanes]


def _stands_in(pack: Pack, step: int, trial: TrialConfig) -> bool:
    """False if a trial went on by itself or in another pack since, or was deleted."""
    directory = trial_dir(trial)
    place = pointed_to(directory)
    is_here = place is None or place == pack.checkpoints.absolute() or not place.is_dir()
    has_records = (directory / "metrics.jsonl").exists()
    return is_here and has_records and max(own_steps(directory), default=0) <= step


def beginning(trial: TrialConfig) -> Start:
    """A trial's start at its first step."""
    setup = prepare(trial)
    state = init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
    return Start(setup, state, jax.tree.map(np.asarray, state.trainable), Progress(), Meter())


def start_in(pack: Pack, found: Found, trial: TrialConfig) -> Start:
    """A trial's start at its place in a pack's checkpoint.

    Raises:
      LoraxError: a checkpoint of other shapes.
    """
    start = beginning(trial)
    try:
        like = {"state": start.state, "best": start.best}
        arrays, record = lane_of(found, trial_id(trial), like)
    except LoraxError as fault:
        where = f"{pack.checkpoints} does not fit its trials ({fault})"
        raise LoraxError(f"{where}; delete {pack.directory} to start over") from None
    progress = Progress(**record["progress"])
    if trial.sweep.halving.after is None:
        progress.cut = None  # cut by an earlier command; now it goes on
    meter = Meter.restore(record["costs"])
    return Start(start.setup, arrays["state"], arrays["best"], progress, meter)
