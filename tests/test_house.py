"""Imports run one way; the table is CONTRIBUTING's."""

import ast
import graphlib
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
# Within a room of several packages: what each part may import of the room.
PARTS = {
    "models": {
        "options": set(),
        "layers": {"options"},
        "families": {"options", "layers"},
        "checkpoints": {"layers", "families"},
        "labels": set(),
        "classifier": {"layers", "families"},
        "causal_lm": {"layers", "families"},
        "build": {"families", "checkpoints", "classifier", "causal_lm"},
        "load": {"checkpoints", "labels", "classifier", "causal_lm", "build"},
    },
    "data": {
        "examples": set(),
        "documents": set(),
        "files": set(),
        "tokens": {"examples", "documents", "files"},
        "tasks": {"examples", "documents", "files", "tokens"},
        "batches": {"tokens"},
    },
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
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            is_room = node.module == "lorax"
            names = [name if is_room or is_module(name) else node.module for name in below]
        for name in names:
            yield name, node in tree.body


def is_module(name):
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(place):
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    return files


def parts_of(folder):
    names = {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    return names - {"__init__", "__pycache__"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below(room):
    for path in files_of(ROOT / "lorax" / room):
        for name, _ in imports(path):
            if name.startswith("lorax."):
                assert name.split(".")[1] in MAY_IMPORT[room] | {room}, (path, name)


def test_no_room_is_forgotten():
    assert parts_of(ROOT / "lorax") == set(MAY_IMPORT)


@pytest.mark.parametrize("room", PARTS)
def test_a_part_imports_only_from_parts_below(room):
    assert parts_of(ROOT / "lorax" / room) == set(PARTS[room])
    for part, below in PARTS[room].items():
        for path in files_of(ROOT / "lorax" / room / part):
            for name, _ in imports(path):
                assert name != f"lorax.{room}", (path, "imports its own room as a whole")
                if name.startswith(f"lorax.{room}."):
                    assert name.split(".")[2] in below | {part}, (path, name)


@pytest.mark.parametrize("room", ["models", "data", "lora"])
def test_files_do_not_import_each_other_in_a_circle(room):
    files = {module_of(path): path for path in files_of(ROOT / "lorax" / room)}
    graph = {module: {name for name, _ in imports(path)} for module, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_peers_and_extras_are_never_imported_with_the_library():
    for path in (ROOT / "lorax").rglob("*.py"):
        for name, is_top_level in imports(path):
            assert not (is_top_level and name.split(".")[0] in HEAVY), (path, name)
