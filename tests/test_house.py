"""Imports run one way; the table is CONTRIBUTING's."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASICS = {"errors", "config", "effective", "metric_direction"}
BELOW_TRAINING = BASICS | {"runtime", "lora", "models", "data", "runs"}
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "effective": set(),
    "metric_direction": set(),
    "runtime": {"errors"},
    "lora": BASICS,
    "models": BASICS | {"runtime", "lora"},
    "data": BASICS | {"runtime"},
    "generation": BASICS | {"lora", "models", "data"},
    "runs": BASICS | {"runtime", "lora", "models", "data"},
    "train": BELOW_TRAINING,
    "sweep": BELOW_TRAINING | {"train"},
    "launch": BELOW_TRAINING | {"train", "sweep"},
    "interop": BASICS | {"lora", "models"},
    "analysis": BASICS | {"lora"},
}
# Peers and extras: never at import time.
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "submitit",
    "ray",
    "gguf",
    "sacrebleu",
    "pycocoevalcap",
}


def imports(path):
    """Modules that a file names in its import statements, with whether it is at top level."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "lorax":
                names = [f"lorax.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below(room):
    place = ROOT / "lorax" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        for name, _ in imports(path):
            if name.startswith("lorax."):
                assert name.split(".")[1] in MAY_IMPORT[room] | {room}, (path, name)


def test_no_room_is_forgotten():
    here = {p.stem for p in (ROOT / "lorax").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert here - {"__init__", "__pycache__"} == set(MAY_IMPORT)


def test_peers_and_extras_are_never_imported_with_the_library():
    for path in (ROOT / "lorax").rglob("*.py"):
        for name, is_top_level in imports(path):
            assert not (is_top_level and name.split(".")[0] in HEAVY), (path, name)
