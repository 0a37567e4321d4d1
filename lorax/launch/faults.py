"""Faults of Hydra, OmegaConf and the system as one line that names the intended setting."""

import difflib
import errno
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException

from lorax.errors import LoraxError
from lorax.launch.settings import SYNONYMS, setting_names


def one_line(fault: Exception) -> str:
    """A fault of Hydra or OmegaConf as one line, with the valid keys."""
    if isinstance(fault, LoraxError):
        return str(fault)
    if isinstance(fault, OSError) and not isinstance(fault, HydraException):
        return system_fault(fault)
    return _hydra_fault(fault)


def _hydra_fault(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    text = lines[0] if lines else type(fault).__name__
    key = getattr(fault, "full_key", None)
    unknown = re.match(r"Key '(.+)' (?:is not in struct|not in '.+')", text)
    if unknown:
        return _unknown_key(key or unknown.group(1))
    text = text.rstrip(".")
    for pattern, remedy in REMEDIES.items():
        text = re.sub(pattern, remedy, text)
    if override := getattr(fault, "override", None):  # an override that does not parse
        if override.startswith("--"):
            return flag_fault(override)
        return f"{override}: {_parse_error(override, lines)}"
    if key and key not in text:
        text = f"{key}: {text}"
    if options := _available(lines):
        return f"{text}; there are {', '.join(options)}"
    return text


# Hydra's messages that name no remedy, shortened, each with a remedy.
REMEDIES = {
    r"^(Ambiguous value for argument .*)$": r"\1: a sweep over it needs -m",
    r"^.*Could not load 'hydra/sweeper/optuna'$": (
        "hydra/sweeper=lorax_optuna needs an extra: pip install -c constraints.txt -e '.[optuna]'"
    ),
}


def _parse_error(override: str, lines: Sequence[str]) -> str:
    """Hydra's message without the override itself and the link."""
    said = [line for line in lines if not line.startswith(("Error parsing override", "See http"))]
    if said and said[0].startswith("LexerNoViableAlt"):  # the name of a parser exception
        name, _, value = override.partition("=")
        return f"the value needs quotes: \"{name}='{value}'\""
    return said[0] if said else "not a setting and its value"


def _available(lines: Sequence[str]) -> list[str]:
    """Hydra's list of a group's options, which ends where its search path begins."""
    heads = [n for n, line in enumerate(lines) if line.startswith("Available options")]
    if not heads:
        return []
    return list(itertools.takewhile(lambda line: not line.endswith(":"), lines[heads[0] + 1 :]))


def _unknown_key(key: str) -> str:
    if key.startswith("hydra."):
        part = key.rpartition(".")[0]
        return f"{key!r} is not a setting; to see those there are: --cfg hydra -p {part}"
    known = setting_names()
    for name in known:
        if key.startswith(f"{name}."):
            entry = key.removeprefix(f"{name}.")
            return (
                f"{key!r} is not there yet; to add an entry: +{key}=..., "
                f"to sweep over it: '+{name}={{{entry}:4}},{{{entry}:8}}'"
            )
    if meant := meant_setting(key):
        return f"{key!r} is not a setting; did you mean {meant!r}?"
    group = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    return f"{key!r} is not a setting; there are {', '.join(siblings or known)}"


def meant_setting(key: str) -> str | None:
    """The setting that a name most likely means: by synonym, or the most similar name.

    >>> [meant_setting(key) for key in ("learning_rate", "lora.r", "train.epoch", "epochs")]
    ['optimizer.lr', 'lora.rank', 'train.epochs', 'train.epochs']
    """
    known = setting_names()
    last = key.rpartition(".")[2].replace("-", "_").lower()
    if last in SYNONYMS:
        return SYNONYMS[last]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return same[0]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), None)


def flag_fault(flag: str, following: str | None = None) -> str:
    """One line on a flag that was given instead of an override.

    >>> flag_fault("--lora_r", "8")
    '--lora_r is not an option; settings are given as name=value: lora.rank=8'

    Args:
      flag: `--name` or `--name=value`.
      following: the next word, which may be its value.
    """
    name, _, value = flag.partition("=")
    if not value and following and not following.startswith("-") and "=" not in following:
        value = following
    meant = meant_setting(name.lstrip("-"))
    if meant is None:
        return f"{name} is not an option; settings are given as name=value, and --help lists them"
    form = meant if "=" in meant else f"{meant}={value or '...'}"
    return f"{name} is not an option; settings are given as name=value: {form}"


# Errors that only a write raises.
OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EEXIST, errno.ENOTEMPTY}


def system_fault(fault: OSError) -> str:
    """One line on a read or a write that the system refused.

    >>> system_fault(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.tsv"))
    'cannot read a.tsv: No such file or directory'
    """
    reason = fault.strerror or str(fault) or type(fault).__name__
    if fault.filename is None:
        is_written = fault.errno in OF_WRITING
        return f"cannot write the output: {reason}" if is_written else f"system error: {reason}"
    path = Path(os.fsdecode(fault.filename))
    if fault.errno in OF_WRITING or fault.filename2 is not None:
        is_written = True
    elif fault.errno in (errno.EACCES, errno.EPERM):  # a missing file was to be created
        is_written = not os.path.lexists(path) or os.access(path, os.R_OK)
    else:  # a parent in the path is a file, not a folder
        is_written = fault.errno == errno.ENOTDIR
    return f"cannot {'write' if is_written else 'read'} {path}: {reason}"
