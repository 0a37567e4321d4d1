"""E2E NLG: adapt a decoder, describe the test set's restaurants by beam search, score the texts.

    pip install -c constraints.txt -e ".[hub,nlg]"
    python -m experiments.e2e data=<folder of the challenge's CSV files>
    python -m experiments.e2e data=<folder> model=gpt2 lora.rank=1 seed=1

The settings are the paper's (Hu et al. 2021, Table 11), with GPT-2 medium; arguments are overrides
of experiments.finetune, and `metrics=bleu,nist` needs no Java. Texts and scores are written to
`e2e.txt` (one line per meaning representation) and `e2e.json` beside the trial's result.
Published for GPT-2 M: BLEU 70.4, NIST 8.85, METEOR 46.8, ROUGE-L 71.8, CIDEr 2.53. We have not
run it on GPT-2's weights, which are only on the hub.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax import data
from lorax.config import TrialConfig
from lorax.data.tasks.e2e import prompt_of, separator_of
from lorax.errors import LoraxError
from lorax.generation import GenerationConfig, generate
from lorax.generation.scores import METRICS, check_metrics, score_texts
from lorax.launch import compose_trial, own_arguments, run_command
from lorax.models import load_config, resolve_source
from lorax.runs.files import write_json
from lorax.runs.trial_id import trial_dir
from lorax.sweep import show_plan_if_asked
from lorax.sweep.run_serial import run_and_log
from lorax.train.setup import prepare
from lorax.train.trained import check_leaves_adapter, model_of, trained_part

# The paper's search, and the repeats that its code forbids.
SEARCH: dict[str, Any] = {
    "num_beams": 10,
    "length_penalty": 0.9,
    "no_repeat_ngram_size": 4,
    "max_new_tokens": 64,
}


def prompts_of(trial: TrialConfig, base: Path, meanings: Sequence[str]) -> list[str]:
    """A prompt for each meaning representation, checked for the trial's model.

    Raises:
      LoraxError: a prompt is malformed or too long for the model; or the trial has no adapter.
    """
    check_leaves_adapter(trial)
    prompts = [prompt_of(meaning) + separator_of(base) for meaning in meanings]
    tokenizer = data.load_tokenizer(base)
    longest = max(len(tokenizer.encode(prompt).ids) for prompt in prompts)
    room = load_config(trial.model, is_decoder=True).max_length
    if longest + SEARCH["max_new_tokens"] > room:
        raise LoraxError(
            f"a prompt of {longest} tokens and {SEARCH['max_new_tokens']} new ones are above the "
            f"{room} positions of model.source={trial.model.source}"
        )
    return prompts


def describe(trial: TrialConfig, base: Path, prompts: Sequence[str]) -> list[str]:
    """A text for each prompt, by the finished trial's model."""
    setup, tokenizer = prepare(trial), data.load_tokenizer(base)
    search = {**SEARCH, "eos_token_id": data.find_eos_id(tokenizer, base)}
    made = generate(
        model_of(setup, trained_part(trial, setup)),
        prompts,
        GenerationConfig.from_dict(search),
        tokenizer=tokenizer,
        batch_size=max(1, trial.train.eval_batch_size // SEARCH["num_beams"]),
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
    trial = compose_trial("e2e", overrides, Path(own["data"]))
    references = data.references_by_mr("test", Path(own["data"]))
    base = resolve_source(trial.model.source, trial.model.revision)
    prompts = prompts_of(trial, base, list(references))
    show_plan_if_asked([trial])
    result = run_and_log(trial)
    if result["status"] == "diverged":
        raise LoraxError(f"the trial diverged ({result['reason']}): take a lower optimizer.lr")
    texts, folder = describe(trial, base, prompts), trial_dir(trial)
    (folder / "e2e.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    scores = score_texts(texts, list(references.values()), metrics)
    write_json(folder / "e2e.json", {"scores": scores, "search": SEARCH, "texts": len(texts)})
    print("\n".join(f"{name:8}{score:8.4f}" for name, score in scores.items()))
    print(folder / "e2e.json")


if __name__ == "__main__":
    run_command(main, __doc__)
