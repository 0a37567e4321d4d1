"""A checkpoint's outputs in the order of a task's labels."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Other names of the labels of GLUE and of sentiment, in the spelling of `_normal`.
_ALIASES = {
    "entail": "entailment",
    "entails": "entailment",
    "not_entail": "not_entailment",
    "contradict": "contradiction",
    "contradicts": "contradiction",
    "neg": "negative",
    "pos": "positive",
}


def output_order(config: Mapping[str, Any], labels: Sequence[str]) -> tuple[int, ...] | None:
    """For each label the index of the checkpoint's output of that name; None: names do not match.

    Names match without regard to case and separators, and some by an alias (`pos`,
    `non-entailment`). A checkpoint's own names are unknown where it has none, `LABEL_0` and its
    like, the same name twice, or an `id2label` that contradicts `label2id` or `num_labels`.

    Args:
      config: the dict of the checkpoint's `config.json`.
      labels: of the task, in the order of its class ids.

    >>> output_order({"id2label": {"0": "NEUTRAL", "1": "Entailment"}}, ("entailment", "neutral"))
    (1, 0)
    >>> output_order({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("entailment", "neutral"))
    """
    theirs = _names(config)
    index = {_normal(name): n for n, name in enumerate(theirs)}
    ours = [_normal(label) for label in labels]
    if not ours or len(index) != len(theirs) or sorted(index) != sorted(ours):
        return None
    return tuple(index[name] for name in ours)


def _names(config: Mapping[str, Any]) -> list[str]:
    """The names of the outputs in order; empty: unknown."""
    given = config.get("id2label")
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        return []
    names = [given.get(str(n)) for n in range(len(given))]
    if None in names or any(re.fullmatch(r"(?i)label_\d+", str(name)) for name in names):
        return []
    if config.get("label2id") not in (None, {name: n for n, name in enumerate(names)}):
        return []
    if config.get("num_labels") not in (None, len(names)):
        return []  # transformers then names them LABEL_0, LABEL_1, ...
    return [str(name) for name in names]


def _normal(name: str) -> str:
    """A name in lower case with `_` for separators, and `not_` for other negations."""
    name = re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")
    name = re.sub(r"^(non|no)_", "not_", name)
    return _ALIASES.get(name, name)
