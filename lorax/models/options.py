"""The types and ranges of what a `config.json` may say."""

import types
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from lorax.errors import LoraxError, brief


class Bounds(NamedTuple):
    """The values that a number may have, both ends included, and how a message says so."""

    least: float
    most: float
    words: str


Size = Annotated[int, Bounds(1, 2**20, "a whole number from 1 to 1048576")]
Layers = Annotated[int, Bounds(1, 1000, "a whole number from 1 to 1000")]
Length = Annotated[int, Bounds(1, 2**31 - 1, "a whole number from 1 to 2147483647")]
Count = Annotated[int, Bounds(0, 2**31 - 1, "a whole number from 0 to 2147483647")]
Limit = Annotated[int, Bounds(-1, 2**31 - 1, "a whole number from -1 to 2147483647")]
Rate = Annotated[float, Bounds(0, 1 - 2**-24, "a number from 0 to below 1")]
Epsilon = Annotated[float, Bounds(0, 1, "a number from 0 to 1")]
Positive = Annotated[float, Bounds(1e-12, 1e12, "a positive number from 1e-12 to 1e12")]
Factor = Annotated[float, Bounds(0, 1e12, "a number from 0 to 1e12")]

_WORDS: dict[Any, str] = {bool: "true or false", str: "a text", dict: "a dict"}


def check_option(name: str, value: Any, kind: Any) -> None:
    """Refuses a value of the wrong type or out of range.

    Args:
      name: of the option in `config.json`.
      value: as JSON has it; a list stands for a tuple.
      kind: an annotation: one of those above, bool, str, dict, a tuple of any number of one kind,
        or a union of these. None counts as absent, and is not checked.

    Raises:
      LoraxError: saying which values are right.

    >>> check_option("num_attention_heads", "4", Size)
    Traceback (most recent call last):
      ...
    lorax.errors.LoraxError: config.json: num_attention_heads='4' is not a whole number from 1 to \
1048576
    """
    if value is not None and not _fits(value, kind):
        raise LoraxError(f"config.json: {name}={brief(value)} is not {_words(kind)}")


def read_option(config: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """An option's value, checked, a list as a tuple; `default` where it is absent or null."""
    value = config.get(name)
    check_option(name, value, kind)
    value = default if value is None else value
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        part, _ = get_args(kind)
        return isinstance(value, list | tuple) and all(_fits(x, part) for x in value)
    if get_origin(kind) is Annotated:
        number, bounds = get_args(kind)
        is_number = type(value) is int or (number is float and type(value) is float)
        return is_number and bounds.least <= value <= bounds.most
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " or ".join(_words(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].words)
    return _WORDS[kind]
