"""A world small enough that a trial takes a second: a random BERT, its tokenizer, some GLUE."""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lorax.config import TrialConfig
from lorax.runs.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
POLAR = {"negative": ["bad", "dull", "awful", "poor"], "positive": ["good", "fine", "great", "fun"]}
NEUTRAL = [f"w{n}" for n in range(200)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
DEFAULTS: dict[str, Any] = {
    "task": {"name": "sst2", "max_length": 16},
    "model": {"name": "tiny", "dropout": 0.0},
    "lora": {"rank": 2, "alpha": 4.0},
    "optimizer": {"lr": 0.01},
    "train": {
        "batch_size": 16,
        "eval_batch_size": 32,
        "max_shapes": 1,
        "max_steps": 4,
        "keep_checkpoints": True,
    },
    "tracking": {"kind": "none"},
    "sweep": {"name": "tiny"},
}


@dataclasses.dataclass(frozen=True)
class World:
    """Where the tiny base and the tiny tasks lie."""

    source: Path
    data_dir: Path

    def trial(self, output_dir: Path | str = "unused", **changes: Any) -> TrialConfig:
        """A short LoRA trial on SST-2; `train={"max_steps": 9}` and its like change fields."""
        config = TrialConfig(output_dir=str(output_dir))
        config.task.data_dir, config.model.source = str(self.data_dir), str(self.source)
        for name, value in [*DEFAULTS.items(), *changes.items()]:
            part = getattr(config, name)
            new = dataclasses.replace(part, **value) if dataclasses.is_dataclass(part) else value
            setattr(config, name, new)
        return config

    def overrides(self, output_dir: Path, *more: str) -> list[str]:
        """The same trial in Hydra's words."""
        words = [f"{group}.{k}={v}" for group in DEFAULTS for k, v in DEFAULTS[group].items()]
        words = [w for w in words if not w.startswith(("task.name", "tracking"))]
        places = [f"output_dir={output_dir}", f"task.data_dir={self.data_dir}"]
        base = f"model.source={self.source}"
        flags = [word for word in more if word.startswith("-")]
        rest = [word for word in more if word not in flags]
        return [*flags, "task=sst2", "tracking=none", base, *words, *places, *rest]

    def start(self, *arguments: Any, reads: bool = False, **environment: str) -> subprocess.Popen:
        """Start `python <arguments>` in the repository; `reads` gives it an input."""
        import os

        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if reads else None,
            stdout=subprocess.PIPE,
            stderr=None if reads else subprocess.PIPE,
            text=True,
        )

    def finetune(self, *overrides: Any, **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m experiments.finetune` to its end."""
        process = self.start("-m", "experiments.finetune", *overrides, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill_when(self, process: subprocess.Popen, is_time: Callable[[], Any]) -> None:
        """Stop a process as soon as `is_time`; kill it if it still is: stopped, it cannot go on."""
        try:
            while process.poll() is None:
                if is_time():
                    process.send_signal(signal.SIGSTOP)
                    if is_time():
                        break
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.0005)
        finally:
            process.kill()
            said = "".join(process.communicate())
        assert process.returncode == -signal.SIGKILL, f"ended before it was killed: {said[-2000:]}"


def of(trials: Iterable[TrialConfig]) -> tuple[Trial, ...]:
    """The trials of configs."""
    return tuple(map(Trial.of, trials))


def write_base(folder: Path, std: float = 0.2, **sizes: int) -> None:
    """A random BERT, of one layer if not told otherwise, and a tokenizer of words."""
    import json

    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True)
    words = [*SPECIAL, *POLAR["negative"], *POLAR["positive"], *NEUTRAL]
    config = {**BERT, "vocab_size": len(words), **sizes}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_bert_weights(config, std), folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_wide_base(folder: Path) -> None:
    """One layer whose kernels are large enough to be cut over `fsdp`: 2**16 elements and more."""
    write_base(folder, std=0.07, hidden_size=256, intermediate_size=1024, num_hidden_layers=1)


def _bert_weights(config: dict[str, Any], std: float) -> dict[str, np.ndarray]:
    """The tensors of `transformers.BertModel`: normal, norms' scales about 1, the rest about 0."""
    d, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
    }

    def linear(name: str, out: int, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, width), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (d,), (d,)

    norm("embeddings.LayerNorm")
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{n}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", d, d)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, d)
        linear(f"{layer}.output.dense", d, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", d, d)
    rng = np.random.default_rng(0)
    means = {name: float(name.endswith("LayerNorm.weight")) for name in shapes}
    return {
        name: rng.normal(means[name], std, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_glue(root: Path, rng: random.Random) -> None:
    """Four of GLUE's tasks: polarity of a text, and likeness of two."""

    def text(polarity: str) -> str:
        words = rng.sample(NEUTRAL, rng.randint(1, 9)) + rng.sample(POLAR[polarity], 2)
        return " ".join(rng.sample(words, len(words)))

    def single(n: int) -> list[str]:
        names = ("negative", "positive")
        labels = [rng.randint(0, 1) for _ in range(n)]
        return ["sentence\tlabel", *(f"{text(names[y])}\t{y}" for y in labels)]

    def pairs(n: int, header: str, row: str, names: tuple[str, ...]) -> list[str]:
        lines = [header]
        for _ in range(n):
            a, b = rng.choice(["negative", "positive"]), rng.choice(["negative", "positive"])
            label = names[0] if a == b else names[1 + rng.randint(0, len(names) - 2)]
            lines.append(row.format(text(a), text(b), label))
        return lines

    def write(folder: str, split: str, lines: list[str]) -> None:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")

    entailment = ("entailment", "neutral", "contradiction")
    for split, n in (("train", 150), ("dev", 50)):
        write("SST-2", split, single(n))
        header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        write("MRPC", split, pairs(n, header, "{2}\t1\t2\t{0}\t{1}", ("1", "0")))
        header = "sentence1\tsentence2\tscore"
        write("STS-B", split, pairs(n, header, "{}\t{}\t{}", ("4.5", "1.25", "0.75")))
    for split, n in (("train", 90), ("dev_matched", 40), ("dev_mismatched", 33)):
        header = "sentence1\tsentence2\tgold_label"
        write("MNLI", split, pairs(n, header, "{}\t{}\t{}", entailment))
