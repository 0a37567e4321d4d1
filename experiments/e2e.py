"""E2E NLG: adapt a decoder, describe the test set's restaurants by beam search, score the texts.

    pip install -c constraints.txt -e ".[hub,nlg]"
    python -m experiments.e2e data=<folder of the challenge's CSV files>
    python -m experiments.e2e data=<folder> model=gpt2 lora.rank=1 seed=1

The settings are the paper's (Hu et al. 2021, Table 11), with GPT-2 medium; arguments are overrides
of experiments.finetune, and `metrics=bleu,nist` does without Java. Texts and scores are kept as
`e2e.txt` (a line for each meaning representation) and `e2e.json` beside the trial's result.
Published for GPT-2 M: BLEU 70.4, NIST 8.85, METEOR 46.8, ROUGE-L 71.8, CIDEr 2.53. Not run by us
on GPT-2's weights, which are on the hub alone.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from lorax import data
from lorax.checkpoint import write_json
from lorax.config import TrialConfig
from lorax.data.e2e import prompt_of, separator_of
from lorax.errors import LoraxError
from lorax.generation import GenerationConfig, generate
from lorax.generation.scores import METRICS, check_metrics, score_texts
from lorax.models import resolve_source
from lorax.sweep import at_the_door, config_of, own_arguments
from lorax.sweep.serial import run_and_tell
from lorax.train.setup import prepare
from lorax.train.trained import model_of, trained_part
from lorax.trial_id import trial_dir

# The paper's search, and the repeats that its code forbids.
SEARCH = {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 64}


def trial_of(folder: Path, overrides: Sequence[str]) -> TrialConfig:
    """The trial on the challenge's files in a folder."""
    with initialize_config_module("conf", version_base=None):
        trial = config_of(compose("finetune", ["experiment=e2e", *overrides]))
    return replace(trial, task=replace(trial.task, data_dir=str(folder.resolve())))


def describe(trial: TrialConfig, meanings: Sequence[str]) -> list[str]:
    """A text for each meaning representation, by the finished trial's model."""
    setup = prepare(trial)
    base = resolve_source(trial.model.source, trial.model.revision)
    tokenizer = data.load_tokenizer(base)
    search: dict[str, Any] = {**SEARCH, "eos_token_id": data.find_eos_id(tokenizer, base)}
    made = generate(
        model_of(setup, trained_part(trial, setup)),
        [prompt_of(meaning) + separator_of(base) for meaning in meanings],
        GenerationConfig.from_dict(search),
        tokenizer=tokenizer,
        batch_size=trial.train.eval_batch_size,
    )
    return [" ".join(str(completion.text).split()) for completion in made]


def main(arguments: Sequence[str]) -> None:
    """Train, generate, score; print the scores."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    own, overrides = own_arguments(arguments, ("data", "metrics"))
    if "data" not in own:
        raise LoraxError("give data=<folder>, which holds the E2E challenge's CSV files")
    metrics = own["metrics"].split(",") if "metrics" in own else METRICS
    check_metrics(metrics)
    trial = trial_of(Path(own["data"]), overrides)
    references = data.references_by_mr("test", Path(own["data"]))
    result = run_and_tell(trial)
    if result["status"] == "diverged":
        raise LoraxError(f"the trial diverged ({result['reason']}): take a lower optimizer.lr")
    texts, folder = describe(trial, list(references)), trial_dir(trial)
    (folder / "e2e.txt").write_text("".join(f"{text}\n" for text in texts))
    scores = score_texts(texts, list(references.values()), metrics)
    write_json(folder / "e2e.json", {"scores": scores, "search": SEARCH, "texts": len(texts)})
    print("\n".join(f"{name:8}{score:8.4f}" for name, score in scores.items()))
    print(folder / "e2e.json")


if __name__ == "__main__":
    at_the_door(lambda: main(sys.argv[1:]))
