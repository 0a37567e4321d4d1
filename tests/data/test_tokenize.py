import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax.data import Examples, encode, find_asset, largest_id, load_tokenizer, subsample
from lorax.errors import LoraxError

TEXTS = ["A film.", "", "Caf\u00e9s & na\u00efvet\u00e9!", "word " * 200, "\u4e2d\u6587 \U0001f600"]
LONG = [" ".join(f"w{i}" for i in range(n)) for n in (3, 17, 40, 41, 90)]


def word_tokenizer():
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


@pytest.fixture
def minilm():
    try:
        return find_asset("minilm")
    except LoraxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("max_length", [5, 16, 64, 512])
@pytest.mark.parametrize("pairs", [False, True])
def test_equals_transformers(minilm, max_length, pairs):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    first = [a for a in TEXTS + LONG for _ in LONG]
    second = LONG * len(TEXTS + LONG) if pairs else None
    labels = np.arange(len(first), dtype=np.int32)
    encoded = encode(load_tokenizer(minilm), Examples(first, second, labels), max_length)
    expected = theirs(
        first, second, truncation="longest_first", max_length=max_length, padding=False
    )
    assert [x.tolist() for x in encoded.input_ids] == expected["input_ids"]
    assert [x.tolist() for x in encoded.token_type_ids] == expected["token_type_ids"]
    assert encoded.lengths.max() <= max_length


def test_ignores_the_files_own_padding_and_truncation(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(source)
        assert loaded.padding is None
        assert loaded.truncation is None


def test_encoded():
    examples = Examples(["a b c", "d"], ["e f", "g h a"], np.array([1.5, 2.0], np.float32))
    tokenizer = word_tokenizer()
    encoded = encode(tokenizer, examples, 7)
    assert tokenizer.truncation is None  # another use of it is not cut
    assert encoded.input_ids[0].tolist() == [1, 4, 5, 2, 8, 9, 2]
    assert encoded.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert encoded.input_ids[0].dtype == encoded.token_type_ids[0].dtype == np.int32
    assert encoded.lengths.tolist() == [7, 7]
    last = encoded.subset([1])
    assert (len(last), last.labels.tolist()) == (1, [2.0])
    assert last.input_ids[0].tolist() == [1, 7, 2, 10, 11, 4, 2]


def test_faults(tmp_path):
    with pytest.raises(LoraxError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(LoraxError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    labels = np.zeros(1, np.int32)
    with pytest.raises(LoraxError, match=r"task\.max_length=2 is too short: at least 3"):
        encode(word_tokenizer(), Examples(["a"], None, labels), 2)
    with pytest.raises(LoraxError, match=r"task\.max_length=4 is too short: at least 5"):
        encode(word_tokenizer(), Examples(["a"], ["b"], labels), 4)


def test_the_largest_id_is_not_the_count():
    tokenizer = word_tokenizer()
    assert largest_id(tokenizer) == 11
    tokenizer.add_tokens(["new"])
    assert largest_id(tokenizer) == 12
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 70))
    assert largest_id(tokenizer) == 70
    holes = Tokenizer(models.WordLevel({"a": 0, "b": 500}, unk_token="a"))
    assert (holes.get_vocab_size(), largest_id(holes)) == (2, 500)
    assert largest_id(Tokenizer(models.WordLevel({}, unk_token="a"))) == -1


def test_subsample_is_fixed_and_nested():
    examples = Examples([str(i) for i in range(50)], None, np.arange(50, dtype=np.int32))
    ten, twenty = subsample(examples, 10), subsample(examples, 20)
    assert ten.first == twenty.first[:10] == [str(i) for i in ten.labels]
    assert ten.labels.tolist() == [9, 36, 39, 31, 16, 2, 48, 28, 18, 43]
    assert subsample(examples, None) is subsample(examples, 50) is examples
    with pytest.raises(LoraxError, match="cannot keep 0 examples"):
        subsample(examples, 0)
    encoded = encode(word_tokenizer(), examples, 8)
    assert subsample(encoded, 10).labels.tolist() == ten.labels.tolist()
