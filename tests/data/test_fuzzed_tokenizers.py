"""Whatever is in a tokenizer's files, only a `LoraxError` of one line leaves their loaders."""

import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax.data import find_eos_id, largest_id, load_chat_template, load_tokenizer, special_tokens
from lorax.data.tokens.special_tokens import control_tokens
from lorax.data.tokens.tokenize import BROKEN, refusing
from lorax.errors import LoraxError
from tests.helpers.mutations import mutated_text

WORDS = {word: n for n, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "b", "##b", "ab"])}
KINDS = {
    "words": models.WordLevel(WORDS, unk_token="[UNK]"),
    "pieces": models.WordPiece(WORDS, unk_token="[UNK]"),
    "pairs": models.BPE({"a": 0, "b": 1, "ab": 2, "[CLS]": 3, "[SEP]": 4}, [("a", "b")]),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
BESIDE = {
    "tokenizer_config.json": {
        "eos_token": {"content": "[SEP]"},
        "bos_token": "[CLS]",
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    },
    "special_tokens_map.json": {"eos_token": "[SEP]", "pad_token": {"content": "[UNK]"}},
    "chat_template.json": {"chat_template": TEMPLATE},
    "config.json": {"eos_token_id": [2], "bos_token_id": 1},
}


def content_of(kind):
    tokenizer = Tokenizer(KINDS[kind])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[SEP]", "[CLS]"])
    ids = {name: tokenizer.token_to_id(name) for name in ("[SEP]", "[CLS]")}
    tokenizer.post_processor = processors.BertProcessing(*ids.items())
    return json.loads(tokenizer.to_str())


def check(call):
    """Whether the call succeeds; else it is a `LoraxError` of one line, neither long nor empty."""
    try:
        call()
    except LoraxError as error:
        message = str(error)
        assert message
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1500, message
        return False
    return True


def use(folder):
    tokenizer = load_tokenizer(folder)
    largest_id(tokenizer)
    with refusing(BROKEN):
        tokenizer.encode_batch(["a ab b", "", "[SEP] \u00e9"])
    control_tokens(folder)
    find_eos_id(tokenizer, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers(kind, tmp_path):
    rng, content, outcomes = random.Random(kind), content_of(kind), []
    for name, beside in BESIDE.items():
        (tmp_path / name).write_text(json.dumps(beside))
    for _ in range(150):
        (tmp_path / "tokenizer.json").write_bytes(mutated_text(content, rng))
        outcomes.append(check(lambda: use(tmp_path)))
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_the_tokenizer(name, tmp_path):
    rng, outcomes = random.Random(name), []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content_of("words")))
    for other, beside in BESIDE.items():
        (tmp_path / other).write_text(json.dumps(beside))

    def read():
        special_tokens(tmp_path)
        find_eos_id(load_tokenizer(tmp_path), tmp_path)
        load_chat_template(tmp_path).render([{"role": "user", "content": "a"}])

    for _ in range(60):
        (tmp_path / name).write_bytes(mutated_text(BESIDE[name], rng))
        outcomes.append(check(read))
    assert any(outcomes)
