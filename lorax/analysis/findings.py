"""The findings of a sweep as sentences computed from its numbers, and their caveats."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorax.analysis.groups import (
    CONTEXT,
    Choice,
    Group,
    best_choices,
    display,
    is_tuned,
    partition,
    short_names,
    varying_keys,
)
from lorax.analysis.results import Sweep
from lorax.analysis.statistics import anova, welch_interval
from lorax.analysis.table import format_score, lanes_of, scale, were_packed
from lorax.metric_direction import lower_is_better

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Finding:
    """Sentences about one comparison: a task, a model, a choice of target modules."""

    title: str
    sentences: tuple[str, ...]


def findings(groups: Sequence[Group]) -> list[Finding]:
    """One finding for each comparison of ranks in the sweep."""
    keys = varying_keys(groups)
    compared = [key for key in keys if not is_tuned(key) and key not in {"train.mode", "lora.rank"}]
    found = []
    for context in partition(groups, [key for key in keys if key in CONTEXT]):
        lora = [group for group in context if group.mode == "lora"]
        for variant in partition(lora, compared):
            choices = best_choices(variant, ["lora.rank"])
            if not choices:
                continue
            title = describe(variant[0], compared) or "Summary"
            tuned = [key for key in varying_keys(variant) if is_tuned(key)]
            sentences = (*_across_ranks(choices, tuned), *_references(choices, context))
            notes = (
                *_constant(choices),
                *_passed_over(choices, tuned),
                *_halved(choices, variant),
            )
            found.append(Finding(title, (*sentences, *notes)))
    return found or [Finding("Summary", ("No LoRA trial has finished.",))]


def caveats(sweep: Sweep, groups: Sequence[Group]) -> list[str]:
    """The caveats that apply to this sweep's numbers."""
    lora = [group for group in groups if group.mode == "lora"]
    tuned = [key for key in varying_keys(lora) if is_tuned(key)]
    ranks = {group.rank for group in lora}
    lines = [
        "Scores are dev scores. The best epoch is picked on the same dev set, which flatters it; "
        "the last epoch is not picked.",
        "Intervals cover what the seed changes (initialisation, data order, dropout), not the "
        "choice of dev examples: another dev set may move all rows together.",
    ]
    if len(ranks) > 1:
        if tuned:
            names = ", ".join(short_names(tuned).values())
            lines.append(f"Each rank's best setting ({names}) is picked by dev score: optimistic.")
        if not any(key.startswith("optimizer.") for key in tuned):
            lines.append(
                "All ranks share one learning rate, so their differences are partly a matter of "
                "how well it suits each rank."
            )
        if len({group.value("lora.alpha") for group in lora}) == 1 and _plain_scale(lora):
            lines.append(
                "Alpha is the same at every rank, so the scale alpha / rank falls as rank grows."
            )
    if any(group.value("train.pad_rank") for group in lora):
        lines.append(
            "Adapters are padded to one rank (train.pad_rank), so that ranks share a compiled "
            "step: s/step and memory are those of the padded rank."
        )
    if constant := sum(len(group.constant) for group in groups):
        total = sum(len(group.trials) for group in groups)
        lines.append(
            f"{constant} of {total} finished trials predict the same for every dev example (the "
            "majority class, for instance): they have learned nothing that the metric can see."
        )
    lines += [*_halving_caveats(sweep, groups), *_packing_caveats(groups)]
    if min((len(group.trials) for group in groups if group.has_row), default=5) < 5:
        lines.append("Rows of fewer than five seeds have wide intervals and shaky deviations.")
    if len(_devices(sweep)) > 1:
        lines.append("Trials ran on several devices: s/step compares only within one.")
    return lines


def describe(group: Group, keys: Iterable[str]) -> str:
    """A group by some of its settings: `reviews, minilm, targets qv, lr 1e-3`."""
    keys = tuple(keys)
    names = short_names(keys)
    parts = [
        display(group, key) if key in CONTEXT else f"{names[key]} {display(group, key)}"
        for key in keys
        if group.has(key)
    ]
    return ", ".join(parts)


def _across_ranks(choices: Sequence[Choice], tuned: Sequence[str]) -> list[str]:
    best = _best(choices)
    others = [choice.group for choice in choices if choice.group is not best]
    setting = describe(best, tuned)
    detail = f" ({setting})" if setting else ""
    if not others:
        return [f"Rank {best.rank}{detail} is the only rank: {_mean(best)}."]
    sentences = [_first(best, others, detail)]
    if test := anova([choice.group.scores() for choice in choices]):
        verdict = (
            "The ranks differ by more than seed noise"
            if test.p < SIGNIFICANCE
            else "Differences among ranks are within seed noise"
        )
        at_best = ", each at its best setting" if _is_chosen(choices) else ""
        sentences.append(
            f"{verdict} (one-way ANOVA over {test.between + 1} ranks{at_best}: "
            f"F({test.between}, {test.within}) = {test.statistic:.2f}, {format_p(test.p)})."
        )
    sentences += _against_best(best, others)
    return sentences + _grid_edges(choices)


def _best(choices: Sequence[Choice]) -> Group:
    """The best group; among groups with the same mean, the one of the lowest rank."""
    top = max((choice.group for choice in choices), key=Group.signed_score)
    tied = (choice.group for choice in choices if _is_tied(choice.group, top))
    return min(tied, key=lambda group: group.rank)


def _first(best: Group, others: Sequence[Group], detail: str) -> str:
    """Which rank has the best mean, or which ranks share it."""
    extreme = "lowest" if lower_is_better(best.metric) else "highest"
    tied = [group.rank for group in others if _is_tied(group, best)]
    if not tied:
        return f"Rank {best.rank}{detail} has the {extreme} mean: {_mean(best)}."
    score = f"{best.metric} {format_score(best.summary().mean, best.metric)}"
    if len(tied) == len(others):
        return f"All {len(tied) + 1} ranks have the same mean: {score}. None is ahead."
    names = _ranks(sorted([best.rank, *tied]))
    return f"{names.capitalize()} share the {extreme} mean: {score}."


def _is_tied(a: Group, b: Group) -> bool:
    """Whether two means are equal up to the rounding of their sums."""
    return math.isclose(a.signed_score(), b.signed_score(), rel_tol=1e-12)


def _against_best(best: Group, others: Sequence[Group]) -> list[str]:
    testable = [group for group in others if min(len(group.trials), len(best.trials)) > 1]
    if not testable:
        return ["With a single seed a rank, nothing can be said about seed noise."]
    verdicts: dict[bool | None, list[int]] = {True: [], False: [], None: []}
    for group in testable:
        verdicts[_distinct(best, group)].append(group.rank)
    sentences = []
    if behind := verdicts[True]:
        sentences.append(
            f"Rank {best.rank} is ahead of {_ranks(behind)} (Welch's 95% interval of each "
            "difference excludes zero; not corrected for the number of comparisons)."
        )
    if alike := verdicts[False]:
        sentences.append(
            f"Rank {best.rank} cannot be told apart from {_ranks(alike)}, which is not proof that "
            "they are equal."
        )
    if untested := verdicts[None]:
        sentences.append(
            f"The scores of rank {best.rank} and of {_ranks(untested)} do not vary over seeds: "
            "without spread, no test can tell a difference from chance."
        )
    return sentences


def _references(choices: Sequence[Choice], context: Sequence[Group]) -> list[str]:
    best = _best(choices)
    sentences = []
    for mode, name in (("full", "full fine-tuning"), ("head", "the head alone")):
        rows = best_choices((group for group in context if group.mode == mode), ["train.mode"])
        if rows:
            sentences.append(_difference(best, rows[0].group, name))
    return sentences


def _difference(best: Group, reference: Group, name: str) -> str:
    mean = (best.summary().mean - reference.summary().mean) * scale(best.metric)
    unit = " points" if scale(best.metric) == 100.0 else ""
    opening = f"Rank {best.rank} minus {name}: {mean:+.2f}{unit}"
    low, high = welch_interval(best.scores(), reference.scores())
    if not math.isfinite(low):
        is_short = min(len(best.scores()), len(reference.scores())) < 2
        reason = "too few seeds" if is_short else "no spread over seeds in either"
        return f"{opening} ({reason} for an interval)."
    low, high = low * scale(best.metric), high * scale(best.metric)
    verdict = "beyond seed noise" if low > 0 or high < 0 else "within seed noise"
    return f"{opening}, 95% interval {low:+.2f} to {high:+.2f} (Welch): {verdict}."


def _grid_edges(choices: Sequence[Choice]) -> list[str]:
    """The ranks whose best learning rate is at an end of the grid: the optimum may be beyond."""
    edges = []
    for choice in choices:
        rates = {group.value("optimizer.lr") for group in choice.among}
        tied = [group for group in choice.among if group.trials and _is_tied(group, choice.group)]
        best = {group.value("optimizer.lr") for group in tied}
        if len(rates) > 1 and len(best) == 1 and best <= {min(rates), max(rates)}:
            edges.append(choice.group.rank)
    if not edges:
        return []
    return [
        f"The best learning rate of {_ranks(edges)} is an end of the grid: a wider one might "
        "change the order."
    ]


def _constant(choices: Sequence[Choice]) -> list[str]:
    """The ranks at which trials predict the same for every dev example."""
    groups = [choice.group for choice in choices if choice.group.constant]
    if not groups:
        return []
    counts = sum(len(group.constant) for group in groups), sum(len(g.trials) for g in groups)
    return [
        f"{counts[0]} of {counts[1]} trials of {_ranks([group.rank for group in groups])} predict "
        "the same for every dev example at their best evaluation: such a score is a constant's, "
        "and shows nothing about the rank."
    ]


def _passed_over(choices: Sequence[Choice], tuned: Sequence[str]) -> list[str]:
    """Settings that were excluded from the choice, although their remaining seeds did better."""
    better = [
        group
        for choice in choices
        for group in choice.among
        if group.trials and group.signed_score() > choice.group.signed_score()
    ]
    if not better:
        return []
    best = max(better, key=Group.signed_score)
    setting = describe(best, ["lora.rank", *tuned])
    return [
        "Settings with seeds that diverged or were cut are not chosen from, though those left did "
        f"better in {len(better)} of them: {setting} has {_mean(best)} of {len(best.ended)}."
    ]


def _halved(choices: Sequence[Choice], variant: Sequence[Group]) -> list[str]:
    """The effect of halving on the comparison of ranks."""
    thinned = [choice.group.rank for choice in choices if choice.group.cut]
    compared = {choice.group.rank for choice in choices}
    gone = sorted({group.rank for group in variant if group.cut} - compared)
    sentences = []
    if thinned:
        sentences.append(
            f"Halving cut seeds of {_ranks(thinned)}: those that are left did best, so the mean is "
            "biased upwards, which no interval or test here allows for."
        )
    if gone:
        sentences.append(f"No trial of {_ranks(gone)} outlived the halving: not compared here.")
    return sentences


def _halving_caveats(sweep: Sweep, groups: Sequence[Group]) -> list[str]:
    cut = sweep.with_status("cut")
    if not cut:
        return []
    rows = [group for group in groups if group.has_row]
    thinned = sum(bool(group.trials and group.cut) for group in rows)
    gone = len(groups) - len(rows)
    lines = [
        f"Successive halving cut {len(cut)} of {len(sweep.trials)} trials by dev score. They are "
        "in no mean: a score from before a trial's end is not evidence about its setting at full "
        "length, and a setting that only starts slowly may have been cut."
    ]
    if thinned:
        lines.append(
            f"In {thinned} of {len(rows)} rows halving cut some of the seeds. A mean over the "
            "surviving seeds alone is biased upwards, as they survived by their scores."
        )
    if gone:
        name = "setting has" if gone == 1 else "settings have"
        lines.append(f"{gone} {name} no row, as halving cut every trial: see Cut by halving.")
    return lines


def _packing_caveats(groups: Sequence[Group]) -> list[str]:
    if not were_packed(groups):
        return []
    lanes = lanes_of(groups)
    lines = [
        "Trials ran in packs (lanes above 1): times are even shares of the pack's, so they are the "
        "same for every rank in it, and memory is the whole pack's."
    ]
    if len(lanes) > 1:
        *most, last = map(str, lanes)
        kinds = "packed and unpacked trials" if lanes[0] == 1 else "packs of several sizes"
        lines.append(
            f"Costs of {kinds} stand in one table ({', '.join(most)} and {last} lanes): compare "
            "times and memory only between rows of the same lanes."
        )
    return lines


def _distinct(a: Group, b: Group) -> bool | None:
    """Whether the interval of the difference excludes zero; None where there is no interval."""
    low, high = welch_interval(a.scores(), b.scores())
    return low > 0 or high < 0 if math.isfinite(low) else None


def _mean(group: Group) -> str:
    summary, metric = group.summary(), group.metric
    text = f"{metric} {format_score(summary.mean, metric)}"
    if not math.isfinite(summary.low):
        seeds = "one seed" if summary.n == 1 else f"the same for all {summary.n} seeds"
        return f"{text} ({seeds}, no interval)"
    low, high = format_score(summary.low, metric), format_score(summary.high, metric)
    return f"{text} (95% interval {low} to {high}, {summary.n} seeds)"


def _ranks(ranks: Sequence[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def format_p(p: float) -> str:
    """A formatted p-value: two decimals, three for a small one, never zero."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _is_chosen(choices: Sequence[Choice]) -> bool:
    return any(len(choice.among) > 1 for choice in choices)


def _plain_scale(lora: Sequence[Group]) -> bool:
    return {group.value("lora.scaling") for group in lora} <= {"lora"}


def _devices(sweep: Sweep) -> set[str]:
    environments = [trial.result.get("environment") or {} for trial in sweep.trials]
    return {str(env["device"]) for env in environments if "device" in env}
