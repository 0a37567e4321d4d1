"""What a trial is trained on: its data, its tokenizer, its base, and its masks' generator.

A path says where files are, not what they are. So their digests are recorded in `config.json`,
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

from lorax.config import CONTENT, EARLIER_MASKS, ModelConfig, TrialConfig
from lorax.data import content_of as data_content
from lorax.data import get_task
from lorax.errors import LoraxError
from lorax.lora.dropout import GENERATOR
from lorax.models import dropout_rates, load_config, resolve_source
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
    """What a trial is trained on; None where a part is not known.

    Attributes:
      data: SHA-256 of the task's files; see `lorax.data.content_of`.
      tokenizer: SHA-256 of `TOKENIZER_FILES`; of a base from the hub, its commit.
      base: SHA-256 of `config.json` and the weights; of a base from the hub, its commit.
      masks: the generator of its dropout masks; None if it draws none.
    """

    data: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    masks: str | None = None

    def other_parts(self, recorded: Mapping[str, Any]) -> list[str]:
        """The parts that are known here and in a record, and are not the same."""
        pairs = {part: (own, recorded.get(part)) for part, own in dataclasses.asdict(self).items()}
        return [part for part, (own, other) in pairs.items() if own and other and own != other]


def content_of(config: TrialConfig) -> Content:
    """The content that a config names; of parts that it does not name, as it is on disk now."""
    named = _named(config)
    if named.data and named.tokenizer and named.base:
        return dataclasses.replace(named, masks=named.masks or _masks(config, named.base))
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
    parts = now.other_parts(dataclasses.asdict(named))
    if "masks" in parts:
        raise LoraxError(
            f"train.dropout_generator={named.masks}: this version draws the masks of dropout by "
            f"{now.masks}; leave the setting out, to train another trial"
        )
    if named.masks and now.base and now.masks is None:
        raise LoraxError(
            f"train.dropout_generator={named.masks}: this trial draws no masks, as its rates of "
            "dropout are 0; leave the setting out"
        )
    if parts:
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
    _refuse(trial, {"masks": EARLIER_MASKS} | (recorded or {}), content)
    if recorded is None:
        log.warning(
            "%s: its checkpoint, of an earlier version, does not record what it was trained on; "
            "it resumes with the data and the base that are there now",
            trial.directory,
        )


def _refuse(trial: Trial, recorded: Mapping[str, Any], content: Content) -> None:
    parts = content.other_parts(recorded)
    if "masks" in parts:
        raise LoraxError(
            f"{trial.directory} was trained with dropout masks drawn by another generator "
            f"({recorded['masks']}, now {content.masks}): set another "
            "sweep.name, or delete the directory to train it again"
        )
    if parts:
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
    task, model, generator = config.task, config.model, config.train.dropout_generator
    return Content(task.content, model.tokenizer_content, model.content, generator)


def _content_now(config: TrialConfig) -> Content:
    task, model = config.task, config.model
    base = _base_content(model.source, model.revision)
    data = data_content(task.name, task.data_dir)
    return Content(data, *base, _masks(config, base[1]))


def _masks(config: TrialConfig, base: str | None) -> str | None:
    """The generator, where training draws masks; None for a base that is not there."""
    if config.train.mode == "lora" and config.lora.dropout:
        return GENERATOR
    model = config.model
    try:
        is_decoder = get_task(config.task.name).kind == "causal_lm"
        place = (model.source, model.revision, model.pooling, model.dropout)
        return GENERATOR if base and _has_dropout(place, is_decoder, base) else None
    except LoraxError:  # loading it reports that
        return None


@lru_cache(maxsize=64)  # once for a sweep, not once for a trial
def _has_dropout(place: tuple[Any, ...], is_decoder: bool, base: str) -> bool:
    """Whether a model's own dropout is on; `base` is its digest: a changed one is read again."""
    del base
    source, revision, pooling, dropout = place
    model = ModelConfig(source=source, revision=revision, pooling=pooling, dropout=dropout)
    return any(dropout_rates(load_config(model, is_decoder=is_decoder)).values())


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
