"""What a trial is trained on: digests of its data, its tokenizer and its base.

A path says where these are, not what they are. So their digests are recorded in `config.json`,
every checkpoint, `result.json` and the adapter, and a trial goes on with the same ones only.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorax.config import CONTENT, TrialConfig
from lorax.data import content_of as data_content
from lorax.errors import LoraxError
from lorax.models import resolve_source
from lorax.runs.trial import Trial
from lorax.runs.trial_id import recorded_content
from lorax.runtime.digest import files_digest

log = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Content:
    """Digests of what a trial is trained on; None where a part is not known.

    Attributes:
      data: SHA-256 of the task's files; see `lorax.data.content_of`.
      tokenizer: SHA-256 of `TOKENIZER_FILES`; of a base from the hub, its commit.
      base: SHA-256 of `config.json` and the weights; of a base from the hub, its commit.
    """

    data: str | None = None
    tokenizer: str | None = None
    base: str | None = None

    def other_parts(self, recorded: Mapping[str, Any]) -> list[str]:
        """The parts that are known here and in a record, and are not the same."""
        pairs = {part: (own, recorded.get(part)) for part, own in dataclasses.asdict(self).items()}
        return [part for part, (own, other) in pairs.items() if own and other and own != other]


def content_of(config: TrialConfig) -> Content:
    """The content that a config names; of parts that it does not name, as it is on disk now."""
    named = _named(config)
    if all(dataclasses.asdict(named).values()):
        return named
    now = _content_now(config)
    return Content(*(a or b for a, b in zip(*map(dataclasses.astuple, (named, now)), strict=True)))


def with_content(config: TrialConfig, content: Content | None = None) -> TrialConfig:
    """The config with its content named: the one given, or that of `content_of`.

    What it names already stays. Another content is then another trial of another id.
    """
    own = dataclasses.asdict(content or content_of(config))
    for part, key in CONTENT.items():
        section, _, name = key.partition(".")
        old = getattr(config, section)
        if getattr(old, name) is None:
            new = dataclasses.replace(old, **{name: own[part]})
            config = dataclasses.replace(config, **{section: new})
    return config


def checked_content(config: TrialConfig) -> Content:
    """`content_of` a trial about to be trained.

    Raises:
      LoraxError: files that are not those which the config names.
    """
    named, now = _named(config), _content_now(config)
    if parts := now.other_parts(dataclasses.asdict(named)):
        raise LoraxError(
            f"{_places(config, parts)} changed since the command was given: give it again, to "
            f"train on what is there now (as other trials), or put back what was there"
        )
    return content_of(config)


def refuse_other_content(trial: Trial) -> None:
    """Refuse a trial that was trained on other content in its directory.

    Raises:
      LoraxError: naming the part that has changed.
    """
    if trial.has_started:
        _refuse(trial, recorded_content(trial.directory), content_of(trial.config))


def check_record(trial: Trial, record: Mapping[str, Any], content: Content) -> None:
    """Refuse a checkpoint of other content; warn about one that does not record its content.

    Args:
      trial: that is to be resumed.
      record: of the checkpoint.
      content: what the trial is trained on now.

    Raises:
      LoraxError: naming the part that has changed.
    """
    recorded = record.get("content")
    if recorded is None:
        log.warning(
            "%s: its checkpoint, of an earlier version, does not record what it was trained on; "
            "it resumes with the data and the base that are there now",
            trial.directory,
        )
        return
    _refuse(trial, recorded, content)


def _refuse(trial: Trial, recorded: Mapping[str, Any], content: Content) -> None:
    if parts := content.other_parts(recorded):
        raise LoraxError(
            f"{trial.directory} was trained with another content of "
            f"{_places(trial.config, parts)}: put that back, or set another sweep.name, or delete "
            "the directory to train it again"
        )


def _places(config: TrialConfig, parts: list[str]) -> str:
    places = {
        "data": f"task.data_dir={config.task.data_dir}",
        "tokenizer": f"the tokenizer of model.source={config.model.source}",
        "base": f"the weights or config of model.source={config.model.source}",
    }
    return " and ".join(places[part] for part in parts)


def _named(config: TrialConfig) -> Content:
    task, model = config.task, config.model
    return Content(task.content, model.tokenizer_content, model.content)


def _content_now(config: TrialConfig) -> Content:
    task, model = config.task, config.model
    base = _base_content(model.source, model.revision)
    return Content(data_content(task.name, task.data_dir), *base)


def _base_content(source: str, revision: str | None) -> tuple[str | None, str | None]:
    """(tokenizer's, base's) digests; None for what is not there: loading it reports that."""
    try:
        if commit := _hub_commit(source, revision):
            return commit, commit  # of files that never change
        folder = resolve_source(source, revision)
        present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        weights = sorted(folder.glob("*.safetensors*"))
        tokenizer = files_digest(present) if present else None
        return tokenizer, files_digest([folder / "config.json", *weights]) if weights else None
    except LoraxError:
        return None, None


@lru_cache(maxsize=64)  # one call of the hub a process, not one a trial
def _hub_commit(source: str, revision: str | None) -> str | None:
    """The commit that a base is taken from on the hub; None for a local folder."""
    folder = resolve_source(source, revision)
    is_snapshot = folder.parent.name == "snapshots" and "snapshots" not in Path(source).parts
    return folder.name if is_snapshot and re.fullmatch("[0-9a-f]{40}", folder.name) else None
