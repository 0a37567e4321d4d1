"""Teach a language model the style of a text, and measure what it gains and what it forgets.

    python scripts/fetch_assets.py smollm2 reviews
    python -m experiments.style data=shakespeare.txt
    python -m experiments.style data=letters.txt plain=other.txt lora.rank=16 train.epochs=3

`data` is a UTF-8 text; its last tenth is held out. `plain` is a text in another style, to see
what is forgotten: by default the dev split of the movie reviews. Other arguments are overrides
of experiments.finetune. The report is printed, and written to `style.md` and `style.json` beside
the trial's result. The same command resumes an interrupted trial and reuses a finished one.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lorax import data
from lorax.config import TrialConfig
from lorax.data.files import read_text
from lorax.errors import LoraxError
from lorax.generation import GenerationConfig, generate
from lorax.launch import compose_trial, own_arguments, run_command
from lorax.models import load_config, resolve_source
from lorax.runs.files import write_json
from lorax.runs.trial_id import trial_dir
from lorax.sweep import show_plan_if_asked
from lorax.sweep.run_serial import run_and_log
from lorax.train.dataset import Dataset, load_dataset
from lorax.train.evaluation import predict_all
from lorax.train.metrics import perplexity
from lorax.train.setup import Setup, check_trial, prepare
from lorax.train.trained import check_leaves_adapter, model_of, trained_part

SAMPLES, PROMPT_TOKENS = 3, 24
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 64}


def trial_of(text: Path, overrides: Sequence[str]) -> TrialConfig:
    """The trial of a text; its directory is named by the text's name and content.

    Raises:
      LoraxError: no such file, or an override that is not right.
    """
    if not text.is_file():
        raise LoraxError(f"data={str(text)!r}: no such file")
    trial = compose_trial("style", overrides, text, fixed=("sweep.name",))
    check_leaves_adapter(trial)
    name = f"style-{text.stem}-{str(trial.task.content)[:8]}"
    return replace(trial, sweep=replace(trial.sweep, name=name))


def _check_room(trial: TrialConfig) -> None:
    room, needed = load_config(trial.model, is_decoder=True).max_length, SAMPLING["max_new_tokens"]
    if room < PROMPT_TOKENS + needed:
        raise LoraxError(
            f"model.source={trial.model.source} has {room} positions, and a sample takes "
            f"{PROMPT_TOKENS + needed}"
        )


def plain_text(trial: TrialConfig, plain: Path | None, longest: int) -> data.Encoded:
    """Blocks of a text in another style: of a whole file, or of the movie reviews' dev split."""
    if plain is None:
        text = "\n".join(data.load_split("reviews", "dev").first)
    elif plain.is_file():
        text = read_text(plain)
    else:
        raise LoraxError(f"plain={str(plain)!r}: no such file")
    documents = data.Documents([text], [((0, len(text)),)], "text")
    tokenizer = data.load_tokenizer(resolve_source(trial.model.source, trial.model.revision))
    blocks = data.encode_documents(tokenizer, documents, longest)
    return data.subsample(blocks, trial.task.max_dev_samples)


def sample(
    trial: TrialConfig, setup: Setup, dataset: Dataset, parts: Sequence[Any]
) -> list[list[str]]:
    """Prompts from the held-out text, with the continuation by each trainable part."""
    tokenizer = data.load_tokenizer(resolve_source(trial.model.source, trial.model.revision))
    (dev,) = dataset.dev.values()
    step = max(1, len(dev) // SAMPLES)
    prompts = [ids[:PROMPT_TOKENS].tolist() for ids in dev.input_ids[::step][:SAMPLES]]
    columns = [[tokenizer.decode(prompt) for prompt in prompts]]
    for part in parts:
        model, key = model_of(setup, part), jax.random.key(trial.seed)
        config = GenerationConfig.from_dict(SAMPLING)
        made = generate(model, prompts, config, tokenizer=tokenizer, key=key)
        columns.append([str(completion.text) for completion in made])
    return columns


def report_of(record: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = [f"| {name} | {x['before']:.2f} | {x['after']:.2f} | {x['tokens']:,} |"
            for name, x in record["perplexity"].items()]  # fmt: skip
    lines = ["| perplexity | before | after | tokens |", "|---|---|---|---|", *rows]
    for sample in record["samples"]:
        lines += ["", f"**{' '.join(sample['prompt'].split())}** ...", ""]
        lines += [f"- {name}: {' '.join(sample[name].split())}" for name in ("before", "after")]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Train, measure, sample; print the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    own, overrides = own_arguments(arguments, ("data", "plain"))
    if "data" not in own:
        raise LoraxError("give data=<file.txt>, a text whose style is to be learned")
    trial = trial_of(Path(own["data"]), overrides)
    check_trial(trial)
    _check_room(trial)
    dataset = load_dataset(trial)
    longest = min(trial.task.max_length, dataset.layout.row_length)  # of a short text's blocks
    plain = plain_text(trial, Path(own["plain"]) if "plain" in own else None, longest)
    show_plan_if_asked([trial])
    result = run_and_log(trial)
    if result["status"] == "diverged":
        raise LoraxError(f"the trial diverged ({result['reason']}): take a lower optimizer.lr")
    setup = prepare(trial)
    parts = {"before": setup.trainable, "after": trained_part(trial, setup)}
    (held_out,) = dataset.dev.values()
    record: dict[str, Any] = {"perplexity": {}}
    for name, text in {"held-out text": held_out, "plain English": plain}.items():
        scores = {
            when: predict_all(setup, dataset, text, part, trial.train.eval_batch_size)
            for when, part in parts.items()
        }
        record["perplexity"][name] = {
            **{when: perplexity(outputs) for when, outputs in scores.items()},
            "tokens": int(scores["before"][:, 1].sum()),
        }
    samples = sample(trial, setup, dataset, list(parts.values()))
    names = ("prompt", *parts)
    record["samples"] = [dict(zip(names, row, strict=True)) for row in zip(*samples, strict=True)]
    report, folder = report_of(record), trial_dir(trial)
    write_json(folder / "style.json", record)
    (folder / "style.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\n{folder / 'style.md'}")


if __name__ == "__main__":
    run_command(main, __doc__)
