"""Files that are damaged in many ways, by a seed."""

import copy
import json
import random
from typing import Any

WORD = "x" * 5000
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 2**31, 2**63, -(2**63), 10**400, 1e308, 1e-320,
    float("nan"), float("inf"), "", "4", "\n", "\0", "../x", "~nouser/x", WORD, [], {}, [[]],
    [None], ["a"], {"a": 1}, {"content": 5}, [1, "2", None],
]  # fmt: skip


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes below the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, child in items:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += _places(child, (*path, key))
    return found


def mutated_value(content: dict[str, Any], rng: random.Random) -> Any:
    """A JSON object in which one or two nodes are other values, absent or under another name."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 2)):
        places = _places(content)
        if not places:
            break
        *parents, key = rng.choice(places)
        node = content
        for parent in parents:
            node = node[parent]
        way = rng.random()
        if way < 0.75:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif way < 0.9 or not isinstance(node, dict):
            del node[key]
        else:
            node[rng.choice([WORD, "", "\n", "hidden_size"])] = node.pop(key)
    return content


def mutated_text(content: dict[str, Any], rng: random.Random) -> bytes:
    """A JSON file, mostly well-formed, with one fault or two."""
    way = rng.random()
    if way < 0.9:
        return json.dumps(mutated_value(content, rng)).encode()
    if way < 0.92:
        return b"[" * 100_000 + b"]" * 100_000
    if way < 0.94:
        return json.dumps(rng.choice(VALUES[:-1])).encode()
    return mutated_bytes(json.dumps(content).encode(), rng)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are others, or the end is missing."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)
