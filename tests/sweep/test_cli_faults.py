"""What a user can get wrong is one line on stderr and exit status 2, before anything trains."""

import re
import shutil

import pytest

CASES = {
    "unknown key": (["lora.rnak=4"], r"'lora.rnak' is not a setting; did you mean 'lora.rank'\?"),
    "unknown key, added": (["+train.epoch=4"], r"'train.epoch' is not .*'train.epochs'"),
    "a name of the Trainer's": (["learning_rate=1e-3"], r"did you mean 'optimizer.lr'\?"),
    "a name of PEFT's": (["+lora.lora_alpha=8"], r"did you mean 'lora.alpha'\?"),
    "a value without quotes": (["model.source=~a/x"], r"needs quotes: \"model.source='~a/x'\""),
    "a flag": (["--epochs=3"], "--epochs is not an option; .* name=value: train.epochs=3"),
    "a flag of PEFT's": (["--lora_r=8"], "--lora_r is not an option; .*: lora.rank=8"),
    "a sweep over a mapping": (
        ["-m", "lora.rank_pattern.query=4,8"],
        r"to sweep over it: '\+lora.rank_pattern=\{query:4\},\{query:8\}'",
    ),
    "unknown group": (["optimiser.lr=1"], r"did you mean 'optimizer.lr'\?"),
    "unknown option of a launcher": (
        ["hydra.launcher.cpus=2"],
        "'hydra.launcher.cpus' is not a setting; .* --cfg hydra -p hydra.launcher",
    ),
    "word for a number": (["lora.rank=eight"], r"lora.rank: .*'eight'.*Integer"),
    "fraction for a count": (["train.batch_size=1.5"], r"train.batch_size: .*'1.5'"),
    "half an override": (["lora.rank"], "lora.rank: missing EQUAL"),
    "a sweep without -m": (["lora.rank=1,2"], "'lora.rank=1,2': a sweep over it needs -m"),
    "open bracket": (["lora.targets=[q"], r"lora.targets=\[q: no viable alternative"),
    "entry of a mapping": (["lora.rank_pattern={query:8}"], r"\+lora.rank_pattern.query="),
    "rank 0": (["lora.rank=0"], "lora.rank=0 is not a whole number of at least 1"),
    "rank too large": (["lora.rank=33"], "33.*32"),
    "target that matches nothing": (["lora.targets=quary"], "'quary' matches no .*mean 'query'"),
    "unknown task": (["task.name=mprc"], r"unknown task.name 'mprc': did you mean 'mrpc'\?"),
    "unknown task file": (["task=mprc"], "task/mprc.*there are cola, e2e, .*, mnli, mrpc"),
    "unknown mode": (["train.mode=lorra"], "train.mode='lorra' is unknown; use one of lora, full"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr=-1.0 is not a positive number"),
    "rate that is none": (["optimizer.lr=nan"], "optimizer.lr=nan is not a positive number"),
    "infinite alpha": (["lora.alpha=inf"], "lora.alpha=inf is not a positive number"),
    "negative seed": (["seed=-1"], r"seed=-1 is not in \[0, 2\*\*32\)"),
    "micro-batches": (["train.grad_accum=3"], "train.grad_accum=3 does not divide .*=16"),
    "padding": (
        ["train.pad_rank=4", "+lora.rank_pattern={query:8}"],
        "train.pad_rank=4 is below rank 8",
    ),
    "bf16 where it trains": (["train.mode=full", "train.base_dtype=bf16"], "base_dtype=bf16"),
    "few bits where it trains": (
        ["train.mode=full", "train.base_dtype=nf4"],
        "train.base_dtype=nf4 is for a frozen base",
    ),
    "few bits in pieces": (
        ["train.base_dtype=int8", "sweep.mesh.fsdp=2"],
        "train.base_dtype=int8 is not served on sweep.mesh.fsdp=2",
    ),
    "too long": (["task.max_length=99"], "task.max_length=99 is above the 40 positions"),
    "no such base": (["model.source=./nowhere"], "'./nowhere' is no folder"),
    "no such data": (["task.data_dir=/nowhere"], "task.data_dir='/nowhere' holds neither"),
    "malformed row": (["task.data_dir={broken}/row"], r"row/SST-2/train.tsv:7: 3 fields, exp"),
    "unknown label": (["task.data_dir={broken}/label"], r"label/SST-2/dev.tsv:3: unknown label"),
    "weight missing": (["model.source={broken}/missing"], "missing .*layer.0.*query.weight"),
    "weight too many": (["model.source={broken}/extra"], "unexpected encoder.layer.2.odd"),
    "weight misshaped": (["model.source={broken}/shape"], r"query.weight has shape \(32, 31\)"),
    "weights cut short": (["model.source={broken}/cut"], "model.safetensors is damaged"),
    "tokenizer damaged": (["model.source={broken}/tokenizer"], "not a tokenizer.json"),
    "config damaged": (["model.source={broken}/config"], "config.json is not readable JSON"),
    "cudnn without a GPU": (["model.attention=cudnn"], "attention=cudnn needs a GPU and bf16"),
    "halving of a single trial": (
        ["sweep.halving.after=1"],
        "lockstep: add -m hydra/launcher=packed",
    ),
    "halving after the end": (
        ["-m", "hydra/launcher=packed", "seed=0,1", "sweep.halving.after=3"],
        "after=3 would cut nothing: .* every 10 steps and trained for 4; lower train.eval_every",
    ),
    "several values for a sweep": (
        ["-m", "hydra/launcher=packed", "sweep.lanes=1,2"],
        "sweep.lanes must be the same for all trials",
    ),
    "no micro-batches": (["-m", "hydra/launcher=packed", "train.grad_accum=0"], "grad_accum=0"),
    "one bad trial of a sweep": (["-m", "lora.rank=1,2,99"], "99.*trial sst2-lora-r99-"),
    "bad value in a sweep": (["-m", "seed=0,x"], "seed: .*'x'"),
}


def write_broken(world, root):
    """Copies of the base and of the data, each with one fault."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    query = "encoder.layer.0.attention.self.query.weight"

    def base(name, change):
        shutil.copytree(world.source, root / name)
        path = root / name / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    base("missing", lambda w: w.pop(query))
    base("extra", lambda w: w.update({"encoder.layer.2.odd": np.zeros(3, np.float32)}))
    base("shape", lambda w: w.update({query: np.zeros((32, 31), np.float32)}))
    for name, file in (
        ("cut", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
        ("config", "config.json"),
    ):
        shutil.copytree(world.source, root / name)
        path = root / name / file
        path.write_bytes(path.read_bytes()[:100])
    for name, split, line, text in (
        ("row", "train", 6, "one\ttoo\tmany"),
        ("label", "dev", 2, "good\t7"),
    ):
        shutil.copytree(world.data_dir / "SST-2", root / name / "SST-2")
        path = root / name / "SST-2" / f"{split}.tsv"
        lines = path.read_text().splitlines()
        lines[line] = text
        path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def outcomes(world, cli, tmp_path_factory):
    """All cases, run one after another in one process."""
    root = tmp_path_factory.mktemp("faults")
    write_broken(world, root / "broken")
    output = root / "outputs"
    lines = [
        world.overrides(output, *(word.replace("{broken}", str(root / "broken")) for word in words))
        for words, _ in CASES.values()
    ]
    return output, dict(zip(CASES, cli(lines), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_one_line(outcomes, case):
    ended = outcomes[1][case]
    assert ended["code"] == 2, ended["err"]
    (line,) = ended["err"].splitlines()
    assert line.startswith("error: ")
    assert re.search(CASES[case][1], line), line
    assert "Traceback" not in ended["out"]


def test_nothing_was_trained(outcomes):
    output, _ = outcomes
    left = {path.name for path in output.rglob("*") if path.is_file()}
    assert not left & {"metrics.jsonl", "config.json", "result.json"}
