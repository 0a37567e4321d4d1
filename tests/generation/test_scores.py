import math
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.errors import LoraxError
from lorax.generation.nist import corpus_nist
from lorax.generation.scores import METRICS, MTEVAL, score_texts

pytestmark = pytest.mark.slow

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java")

HYPOTHESES = [
    "The Golden Palace is a cheap coffee shop in the riverside area.",
    "Blue Spice, a family-friendly pub, serves Italian food for £20-25.",
    "near Café Rouge there is The Mill, rated 3.5 out of 5 & not cheap",
    "The Cricketers isn't a place for children; it's \"high priced\".",
    "Loch Fyne offers French food French food French food .",
]
REFERENCES = [
    [
        "The Golden Palace is a low-priced coffee shop by the river.",
        "Cheap coffee is served in the riverside area at The Golden Palace.",
    ],
    ["Blue Spice is a pub with Italian dishes at £20-25 and is family-friendly."],
    [
        "The Mill, near Café Rouge, has a rating of 3.5 out of 5, but is not cheap.",
        "Rated 3.5 out of 5, The Mill (near Café Rouge) is expensive.",
        "There is an expensive place near Café Rouge called The Mill.",
    ],
    [
        "The Cricketers is not for children and has high prices.",
        "High-priced food is on offer at The Cricketers, which isn't child-friendly.",
    ],
    ["Loch Fyne offers French food."],
]
# What the E2E challenge's tool says of them. BLEU and NIST: its pymteval.py, which the wheel of
# gem-metrics-fork 0.1.dev0 holds (gem_metrics_fork/impl/pymteval.py). The others: pycocoevalcap
# 1.2, by the tool's way through COCO, loadRes and COCOEvalCap, which score_texts does not take.
TOOL = {
    "bleu": 0.32953461228036024,
    "nist": 4.710982637186224,
    "meteor": 0.40691594562994216,
    "rouge_l": 0.6226301883813081,
    "cider": 3.08412036863783,
}


@pytest.mark.parametrize("metrics", [MTEVAL, pytest.param(METRICS, marks=needs_java)])
def test_scores_are_those_of_the_e2e_challenges_tool(metrics):
    scores = score_texts(HYPOTHESES, REFERENCES, metrics)
    assert list(scores) == list(metrics)
    assert scores == pytest.approx({name: TOOL[name] for name in metrics}, rel=1e-12)


def test_bleu_by_hand_with_unequal_numbers_of_references():
    # All n-grams match; 8 words for 12 + 4. The first text's missing reference is not one of 0
    # words, which would be closer in length to its 4 than 12 is.
    hypotheses, references = ["a b c d", "s t u v"], [["a b c d e f g h i j k l"], ["s t u v"] * 2]
    assert score_texts(hypotheses, references, ["bleu"])["bleu"] == pytest.approx(math.exp(1 - 2))


def test_nist_by_hand():
    # Six unlike words: each tells log2(6), the word after it nothing more; 4 of 6 words halve it.
    six = ["a", "b", "c", "d", "e", "f"]
    assert corpus_nist([six[:4]], [[six]]) == pytest.approx(math.log2(6) / 2)
    # A match counts as often as in the reference that has most of it: 2 of 3, at log2(5 / 3) each;
    # of the bigrams 1 of 2, at log2(3 / 1). Mean reference length 2.5: no penalty.
    score = corpus_nist([["x"] * 3], [[["x", "x", "y"], ["x", "z"]]])
    assert score == pytest.approx(2 / 3 * math.log2(5 / 3) + 1 / 2 * math.log2(3))


@needs_java
def test_rouge_l_by_hand():
    # LCS 2 with the first (recall 2/3), 1 with the second (recall 1/1); precision at best 2/4.
    p, r = 1 / 2, 1
    score = score_texts(["a b c d"], [["a c e", "d"]], ["rouge_l"])["rouge_l"]
    assert score == pytest.approx((1 + 1.2**2) * p * r / (r + 1.2**2 * p))


@needs_java
def test_texts_equal_to_their_references_have_the_highest_scores():
    texts = [refs[0] for refs in REFERENCES]
    scores = score_texts(texts, [[text] for text in texts], ["bleu", "rouge_l", "cider"])
    assert scores == pytest.approx({"bleu": 1, "rouge_l": 1, "cider": 10})


WORDS = ["the", "a", "pub", "river", "cheap", "3.5", "£20-25", "Café", "food."]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1)
PAIRS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_neither_the_order_of_texts_nor_of_references_matters(pairs, random):
    def scores(pairs):
        hypotheses = [" ".join(words) for words, _ in pairs]
        references = [[" ".join(words) for words in refs] for _, refs in pairs]
        return score_texts(hypotheses, references, MTEVAL)

    before = scores(pairs)
    shuffled = [(words, random.sample(refs, len(refs))) for words, refs in pairs]
    assert scores(random.sample(shuffled, len(shuffled))) == pytest.approx(before)
    assert 0 <= before["bleu"] <= 1 + 1e-12
    assert before["nist"] >= 0


@needs_java
def test_the_order_of_references_does_not_matter_to_coco_metrics():
    backwards = [refs[::-1] for refs in REFERENCES]
    scores = score_texts(HYPOTHESES, backwards, ["rouge_l", "cider"])
    assert scores == pytest.approx({"rouge_l": TOOL["rouge_l"], "cider": TOOL["cider"]})


@needs_java
def test_breaks_within_a_text_are_spaces():
    broken = [text.replace(" ", "\n", 1).replace(" ", "\u2028\r", 1) for text in HYPOTHESES]
    metrics = ["bleu", "nist", "rouge_l", "cider"]
    scores = score_texts(broken, REFERENCES, metrics)
    assert scores == pytest.approx({name: TOOL[name] for name in metrics})


@needs_java
@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_hypotheses(empty):
    metrics = ["bleu", "nist", "rouge_l", "cider"]
    nothing = score_texts([empty] * 5, REFERENCES, metrics)
    assert nothing == dict.fromkeys(metrics, 0)
    last = score_texts([*HYPOTHESES[:4], empty], REFERENCES, metrics)
    assert all(last[name] > 0 for name in metrics)
    # Only the last text's own part of the mean is gone.
    own = score_texts(HYPOTHESES[4:], REFERENCES[4:], ["rouge_l"])["rouge_l"]
    assert last["rouge_l"] == pytest.approx(TOOL["rouge_l"] - own / 5)


@pytest.mark.parametrize(
    ("hypotheses", "references", "metrics", "message"),
    [
        ([], [], MTEVAL, "one or more texts"),
        ("text", [["text"]] * 4, MTEVAL, "hypotheses: give a list"),
        (["a", "b"], [["a"]], MTEVAL, "2 hypotheses, but references for 1 texts"),
        (["a", "b"], [["a"], []], MTEVAL, r"references\[1\] = \[\]"),
        (["a"], ["a"], MTEVAL, r"references\[0\] = 'a': give a list"),
        (["a"], [["a", " "]], MTEVAL, r"references\[0\]\[1\] is blank"),
        (["a"], [["a"]], ["bleu", "rouge_2"], "rouge_2.*bleu, nist, meteor, rouge_l, cider"),
        (["a"], [["a"]], "bleu", "metrics='bleu'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(hypotheses, references, metrics, message):
    with pytest.raises(LoraxError, match=message) as error:
        score_texts(hypotheses, references, metrics)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "asked"),
    [("sacrebleu", "bleu, nist"), ("pycocoevalcap", "meteor, rouge_l, cider")],
)
def test_a_package_that_is_not_installed_is_named_with_its_metrics(monkeypatch, package, asked):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LoraxError, match=rf"^{asked}: {package} is not .*lorax-flax\[nlg\]"):
        score_texts(["a"], [["a"]])


def test_without_java_its_metrics_are_refused_and_the_others_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "^rouge_l, cider: there is no working `java`; install .* metrics=.*bleu.*nist"
    with pytest.raises(LoraxError, match=message):
        score_texts(HYPOTHESES, REFERENCES, ["bleu", "rouge_l", "cider"])
    assert score_texts(HYPOTHESES, REFERENCES, ["bleu"])["bleu"] == pytest.approx(TOOL["bleu"])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "no working `java`"),  # as macOS's stub does
        ("", "other lines than its input"),  # starts, and has no memory for more
    ],
)
def test_a_java_that_fails_is_no_score(monkeypatch, tmp_path, script, message):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(LoraxError, match=message):
        score_texts(HYPOTHESES, REFERENCES, ["rouge_l"])


@pytest.mark.parametrize("script", ["exit 1", "echo no number; exec cat > /dev/null"])
def test_a_process_ends_after_a_java_that_fails_meteor(tmp_path, script):
    java = tmp_path / "java"
    # The tokenizer's last argument is its file of texts; METEOR reads its input.
    java.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*PTBTokenizer*) for last; do :; done; cat "$last";;\n'
        f"*meteor*) {script};;\n"
        "esac\n"
    )
    java.chmod(0o755)
    code = (
        "from lorax.generation.scores import score_texts; score_texts(['a'], [['a']], ['meteor'])"
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "LoraxError: meteor: pycocoevalcap failed" in done.stderr
