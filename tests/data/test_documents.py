"""What is predicted follows from the characters, by the bytes that each token stands for."""

import logging
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lorax.data import Documents, encode_documents, encode_documents_cached, subsample
from lorax.data.tokens import token_cache as cache
from lorax.data.tokens.token_cache import key_of_documents
from lorax.errors import LoraxError

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = st.sampled_from(
    ["what is", " caf\u00e9s", "\n\n", "    ", "\u4e2d\u6587", "\U0001f600", "x"]
)
PIECE = st.one_of(ANY, WORDS, st.lists(WORDS, max_size=4).map("".join))
EOS = 1


def pieces(*parts):
    """A document of given and, in turn, of predicted parts."""
    spans = list(pairwise(accumulate(map(len, parts), initial=0)))
    return Documents(["".join(parts)], [tuple(spans[1::2])])


def bytes_of(tokenizer, number):
    """The bytes that a token of a byte-level tokenizer stands for."""
    letters = tokenizer.id_to_token(int(number))
    return b"" if letters in ("<s>", "</s>") else BYTES(letters)


def BYTES(letters):  # noqa: N802 (a table, by OpenAI's order of bytes)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [n for n in range(256) if n not in shown]
    table = {chr(n): n for n in shown} | {chr(256 + k): n for k, n in enumerate(hidden)}
    return bytes(table[letter] for letter in letters)


def expected_marks(tokenizer, ids, parts):
    """Which tokens hold a byte of a predicted part, told by bytes alone."""
    is_target = b"".join(bytes([n % 2]) * len(part.encode()) for n, part in enumerate(parts))
    ends = list(accumulate((len(bytes_of(tokenizer, n)) for n in ids), initial=0))
    return [int(any(is_target[start:end])) for start, end in pairwise(ends)]


@settings(deadline=None, max_examples=80)
@given(parts=st.lists(PIECE, min_size=2, max_size=5))
@example(parts=[" ", "", "what"])  # a target of nothing within a token
@example(parts=["a", "b", "", "", "c"])
def test_a_token_is_predicted_if_it_holds_a_byte_of_a_target(bpe, bpe_bos, parts):
    for tokenizer, n_special in ((bpe, 0), (bpe_bos, 1)):
        try:
            encoded = encode_documents(tokenizer, pieces(*parts), 1000)
        except LoraxError as error:  # nothing, or the first token alone
            assert "no token to be predicted" in str(error)
            ids = tokenizer.encode("".join(parts)).ids
            assert not any(expected_marks(tokenizer, ids, parts)[1:])
            continue
        ids, marks = encoded.input_ids[0], encoded.token_type_ids[0]
        assert b"".join(bytes_of(tokenizer, n) for n in ids) == "".join(parts).encode()
        assert marks.tolist() == [0, *expected_marks(tokenizer, ids, parts)[1:]]
        assert (len(ids) - len(bpe.encode("".join(parts)).ids)) == n_special
        assert ids.dtype == marks.dtype == np.int32


@settings(deadline=None, max_examples=60)
@given(prompt=PIECE, completion=PIECE.filter(len))
def test_what_is_predicted_decodes_to_the_completion(bpe_bos, prompt, completion):
    encoded = encode_documents(bpe_bos, pieces(prompt, completion), 1000, eos_id=EOS)
    ids, marks = encoded.input_ids[0], encoded.token_type_ids[0] == 1
    assert ids[-1] == EOS and marks[-1]
    said = b"".join(bytes_of(bpe_bos, n) for n in ids[marks])
    given_ = b"".join(bytes_of(bpe_bos, n) for n in ids[~marks])
    assert given_ + said == (prompt + completion).encode()
    assert said.endswith(completion.encode()) and prompt.encode().startswith(given_)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(PIECE, min_size=2, max_size=5))
def test_trimmed_offsets_lose_no_token_of_blanks(bpe, bpe_trimmed, parts):
    for tokenizer in (bpe, bpe_trimmed):
        ids = tokenizer.encode("".join(parts)).ids
    whole = Documents(["".join(parts)], [((0, len("".join(parts))),)])
    if len(ids) > 1:
        marks = encode_documents(bpe_trimmed, whole, 1000).token_type_ids[0]
        assert marks.tolist() == [0] + [1] * (len(ids) - 1)
    try:
        marks = encode_documents(bpe_trimmed, pieces(*parts), 1000).token_type_ids[0]
    except LoraxError:
        return
    assert all(marks <= expected_marks(bpe_trimmed, ids, parts))  # what is given is not predicted


def test_indentation_is_predicted_under_trimmed_offsets(bpe_trimmed):
    encoded = encode_documents(bpe_trimmed, pieces("x:\n", "    \n\n    y"), 100)
    ids, marks = encoded.input_ids[0], encoded.token_type_ids[0]
    expected = expected_marks(bpe_trimmed, ids, ["x:\n", "    \n\n    y"])
    assert marks.tolist() == expected and sum(expected) > 2


def test_offsets_are_those_of_the_text_as_it_was():
    """A tokenizer that lowers, strips accents and drops blanks, with its own tokens around."""
    words = {word: n for n, word in enumerate(["[CLS]", "[SEP]", "[UNK]", "cafe", "au", "lait"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    steps = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    encoded = encode_documents(tokenizer, pieces("  Caf\u00e9 ", "A\u00fb ", " Lait"), 9, eos_id=1)
    assert encoded.input_ids[0].tolist() == [0, 3, 4, 5, 1]
    assert encoded.token_type_ids[0].tolist() == [0, 0, 1, 0, 0]
    encoded = encode_documents(tokenizer, pieces("  Caf\u00e9 ", "Lait"), 9, eos_id=1)
    assert encoded.input_ids[0].tolist() == [0, 3, 5, 1]  # its own [SEP] ends it
    assert encoded.token_type_ids[0].tolist() == [0, 0, 1, 1]


def test_a_tokenizer_like_llamas():
    """Blanks as letters, one put before the text, and bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "_", "a", "b", "_a"]
    tokenizer = Tokenizer(
        models.BPE({w: n for n, w in enumerate(words)}, [("_", "a")], byte_fallback=True)
    )
    steps = [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    encoded = encode_documents(tokenizer, pieces("a\u00e9 ", "a\u4e2d", "b", "</s>"), 99, eos_id=2)
    tokens = [tokenizer.id_to_token(n) for n in encoded.input_ids[0]]
    first = ["<s>", "_a", "<0xC3>", "<0xA9>"]
    assert tokens == [*first, "_a", "<0xE4>", "<0xB8>", "<0xAD>", "b", "</s>"]
    assert encoded.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1]


def test_the_same_ids_as_transformers(base, bpe_bos):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(base)
    texts = ["What is it?", "\u4e2d\u6587 <s> \U0001f600", "x"]
    documents = Documents(texts, [((0, len(text)),) for text in texts])
    ours = encode_documents(bpe_bos, documents, 1000)
    assert [ids.tolist() for ids in ours.input_ids] == theirs(texts)["input_ids"]
    chat = Documents(texts[:2], documents.targets[:2], "chat")
    ours = encode_documents(bpe_bos, chat, 1000)
    expected = theirs(texts[:2], add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in ours.input_ids] == expected


@pytest.mark.parametrize(
    ("parts", "has_one_more"),
    [
        (("a", "b"), True),
        (("a", "b", "c"), False),
        (("a", "b", "c", ""), False),
        (("a", "b</s>"), False),
        (("a", "b</s>\n"), False),
        (("a", "b</s> c"), True),
        (("a", "b", "", "</s>"), False),
    ],
)
def test_a_document_ends_once(bpe, parts, has_one_more):
    ids = bpe.encode("".join(parts)).ids
    encoded = encode_documents(bpe, pieces(*parts), 100, eos_id=EOS)
    assert encoded.input_ids[0].tolist() == ids + [EOS] * has_one_more
    assert encoded.token_type_ids[0][-1] == (parts[2:3] != ("c",))
    plain = encode_documents(bpe, pieces(*parts), 100)
    assert plain.input_ids[0].tolist() == ids


def test_cut_from_the_right_and_left_out(bpe, tmp_path, caplog):
    texts = ["xxxxzz", "xz", "xxxxxxxxz", "xxz"]
    targets = [((4, 6),), ((1, 2),), ((8, 9),), ((2, 3),)]
    documents = Documents(texts, targets)
    lengths = [len(bpe.encode(text).ids) for text in texts]
    assert lengths == [6, 2, 9, 3]
    bpe.enable_truncation(3)  # as another use of it may have left it
    for _ in range(2):  # the second time from the disk
        encoded = encode_documents_cached(bpe, b"", documents, 5, tmp_path, eos_id=EOS)
        assert [ids.tolist() for ids in encoded.input_ids] == [
            bpe.encode("xxxxz").ids,
            [*bpe.encode("xz").ids, EOS],
            [*bpe.encode("xxz").ids, EOS],
        ]
        assert [m.tolist() for m in encoded.token_type_ids] == [
            [0, 0, 0, 0, 1],
            [0, 1, 1],
            [0, 0, 1, 1],
        ]
        assert encoded.labels.tolist() == [0, 0, 0] and encoded.labels.dtype == np.int32
        (record,) = caplog.records
        assert record.getMessage().startswith("1 of 4 documents are left out")
        assert record.levelno == logging.WARNING and "task.max_length=5" in record.getMessage()
        caplog.clear()
    with pytest.raises(LoraxError, match=r"no token to be predicted is left in 1 documents"):
        encode_documents(bpe, documents.subset([2]), 5)
    with pytest.raises(LoraxError, match=r"task\.max_length=1 is too short: at least 2"):
        encode_documents(bpe, documents, 1)


def test_subset_keeps_the_form(bpe):
    documents = Documents(["a", "b", "c"], [((0, 1),), (), ((0, 1),)], "chat")
    part = documents.subset([2, 1])
    assert (part.texts, part.targets, part.form) == (["c", "b"], [((0, 1),), ()], "chat")
    assert len(subsample(documents, 2)) == 2


@settings(deadline=None, max_examples=100)
@given(text=st.lists(PIECE, min_size=1, max_size=30).map("".join), length=st.integers(3, 9))
def test_blocks_hold_the_whole_text(bpe, bpe_bos, text, length):
    ids = bpe.encode(text).ids
    for tokenizer, given_ in ((bpe, []), (bpe_bos, [0])):
        room = length - len(given_)
        blocks = [given_ + ids[n : n + room] for n in range(0, len(ids), room)]
        blocks = [block for block in blocks if len(block) > 1]
        documents = Documents([text], [((0, len(text)),)], "text")
        if not blocks:
            with pytest.raises(LoraxError, match="no token to be predicted"):
                encode_documents(tokenizer, documents, length, eos_id=EOS)
            continue
        encoded = encode_documents(tokenizer, documents, length, eos_id=EOS)
        assert [block.tolist() for block in encoded.input_ids] == blocks
        assert [m.tolist() for m in encoded.token_type_ids] == [
            [0] + [1] * (len(block) - 1) for block in blocks
        ]


def test_kept_by_all_that_it_follows_from(bpe, tmp_path, monkeypatch):
    one = pieces("a", "b", "c", "d")
    tries = [
        (one, 9, EOS),
        (one, 8, EOS),
        (one, 9, None),
        (Documents(one.texts, one.targets, "chat"), 9, EOS),
        (Documents(one.texts, [((1, 2),)]), 9, EOS),
        (Documents(["abcx"], one.targets), 9, EOS),
        (Documents(["abcd"] * 2, one.targets * 2), 9, EOS),
    ]
    plain = [encode_documents(bpe, d, length, eos_id=eos) for d, length, eos in tries]
    for _ in range(2):
        for (documents, length, eos), expected in zip(tries, plain, strict=True):
            kept = encode_documents_cached(bpe, b"", documents, length, tmp_path, eos_id=eos)
            for name in ("input_ids", "token_type_ids"):
                ours, theirs = getattr(kept, name), getattr(expected, name)
                assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]
            np.testing.assert_array_equal(kept.labels, expected.labels, strict=True)
        assert len(list(tmp_path.iterdir())) == len(tries)
        monkeypatch.setattr(cache, "encode_documents", None)  # not needed any more
    assert key_of_documents(b"", one, 9, EOS) != key_of_documents(b" ", one, 9, EOS)


def test_blocks_of_a_text_do_not_end_by_a_token_that_the_tokenizer_adds():
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = Documents(["a b a</s> b a"], [((0, 13),)], "text")
    encoded = encode_documents(tokenizer, text, 5)
    assert [ids.tolist() for ids in encoded.input_ids] == [[0, 2, 3, 2], [0, 1, 3, 2]]
