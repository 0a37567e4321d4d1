"""Tokens from the disk are the tokens that the tokenizer gives, whatever happens to the files."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax.data import Examples, encode, encode_cached, find_asset, load_tokenizer, token_dir
from lorax.data.tokens import token_cache as module
from lorax.data.tokens.token_cache import key_of
from lorax.errors import LoraxError
from lorax.train.dataset import load_dataset

ANY_TEXTS = st.lists(st.text(max_size=20), max_size=6)
FIRST = ["a film", "", "na\u00efve \U0001f600"]
PAIR = Examples(FIRST, ["b", "", "c d"], np.arange(3, dtype=np.int32))


@lru_cache(maxsize=1)
def content():
    """A tokenizer.json of bytes: unlike texts, unlike ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made.to_str().encode()


def tokenizer():
    return Tokenizer.from_str(content().decode())


def tokens(examples, folder, max_length=24):
    return encode_cached(tokenizer(), content(), examples, max_length, folder)


def plain(examples, max_length=24):
    return encode(tokenizer(), examples, max_length)


def files(folder):
    return sorted(folder.rglob("tokens-*"))


def assert_equal(one, other):
    for ours, theirs in (
        (one.input_ids, other.input_ids),
        (one.token_type_ids, other.token_type_ids),
    ):
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]
        assert {x.dtype for x in [*ours, *theirs]} <= {np.dtype(np.int32)}
    np.testing.assert_array_equal(one.labels, other.labels, strict=True)
    np.testing.assert_array_equal(one.lengths, other.lengths, strict=True)


@pytest.fixture
def warnings(caplog):
    """The lines of the log, emptied by reading."""
    caplog.set_level(logging.WARNING)

    def read():
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return lines

    return read


@settings(deadline=None)
@given(first=ANY_TEXTS, data=st.data(), max_length=st.integers(5, 30), scores=st.booleans())
def test_the_same_cold_warm_and_without(first, data, max_length, scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "not" / "yet"
    size = len(first)
    second = data.draw(st.none() | st.lists(st.text(max_size=20), min_size=size, max_size=size))
    labels = np.arange(size, dtype=np.float32 if scores else np.int32)
    examples = Examples(first, second, labels)
    expected = plain(examples, max_length)
    assert_equal(tokens(examples, None, max_length), expected)
    assert_equal(tokens(examples, folder, max_length), expected)
    assert len(files(folder)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode", None)  # not needed any more
        assert_equal(tokens(examples, folder, max_length), expected)
        relabelled = Examples(first, second, labels + 1)
        assert_equal(tokens(relabelled, folder, max_length), plain(relabelled, max_length))


def test_the_base_models_tokens(tmp_path, monkeypatch):
    try:
        source = find_asset("minilm")
    except LoraxError as error:
        pytest.skip(str(error))
    words = (source / "tokenizer.json").read_bytes()
    first = ["Caf\u00e9s & na\u00efvet\u00e9!", "word " * 200, "\u4e2d\u6587 \U0001f600", ""]
    examples = Examples(first, first[::-1], np.zeros(4, np.int32))
    expected = encode(load_tokenizer(source), examples, 64)
    for _ in range(2):
        assert_equal(encode_cached(load_tokenizer(source), words, examples, 64, tmp_path), expected)
        monkeypatch.setattr(module, "encode", None)


FEW = st.lists(st.text("ab", max_size=2), max_size=3)


@given(one=st.tuples(FEW, st.none() | FEW), other=st.tuples(FEW, st.none() | FEW))
def test_the_key_is_one_of_the_texts(one, other):
    keys = {key_of(b"{}", Examples(*texts, np.zeros(0)), 16) for texts in (one, other)}
    assert (len(keys) == 1) == (one == other)


def test_whatever_changes_the_tokens_is_another_file(tmp_path, monkeypatch):
    a, b = ["a b", "c"], ["d", "e"]
    tries = [(a, b, 24), (a, b, 25), (b, a, 24), (a, None, 24), (["a ", "bc"], b, 24)]
    for n, (first, second, max_length) in enumerate(tries):
        examples = Examples(first, second, np.zeros(2, np.int32))
        assert_equal(tokens(examples, tmp_path, max_length), plain(examples, max_length))
        assert len(files(tmp_path)) == n + 1
    keys = {key_of(content(), PAIR, 24), key_of(content() + b" ", PAIR, 24)}
    monkeypatch.setattr(tokenizers, "__version__", "0")
    keys.add(key_of(content(), PAIR, 24))
    monkeypatch.setattr(module, "FORMAT", 0)
    keys.add(key_of(content(), PAIR, 24))
    assert len(keys) == 4


def test_too_short_a_length_is_an_error_as_ever(tmp_path):
    for folder in (tmp_path, None):
        with pytest.raises(LoraxError, match=r"task\.max_length=4 is too short: at least 5"):
            tokens(PAIR, folder, 4)
    assert not files(tmp_path)


def test_the_place(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAX_TOKEN_CACHE", raising=False)
    assert token_dir(tmp_path) == tmp_path / "tokens"
    monkeypatch.setenv("LORAX_TOKEN_CACHE", str(tmp_path / "mine"))
    assert token_dir(tmp_path) == tmp_path / "mine"
    monkeypatch.setenv("LORAX_TOKEN_CACHE", "~/mine")
    assert token_dir(tmp_path) == Path.home() / "mine"
    monkeypatch.setenv("LORAX_TOKEN_CACHE", "off")
    assert token_dir(tmp_path) is None


def test_a_trials_splits_are_kept(world, tmp_path, monkeypatch):
    sizes = []
    for limit, place in ((30, tmp_path), (31, "off"), (32, "")):  # read once in a process, each
        monkeypatch.setenv("LORAX_TOKEN_CACHE", str(place))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        load_dataset(world.trial(task={"max_train_samples": limit}))
        sizes.append(len(files(tmp_path)))
    assert sizes == [2, 2, 4]  # train and dev
    assert len(files(tmp_path / "home" / "lorax" / "tokens")) == 2


def test_only_the_owner_reads_them(tmp_path):
    tokens(PAIR, tmp_path)
    assert files(tmp_path)[0].stat().st_mode & 0o777 == 0o600


def test_any_damaged_byte_and_any_truncation_is_found(tmp_path, warnings):
    expected = plain(PAIR)
    tokens(PAIR, tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [whole[:n] for n in range(0, len(whole), 31)]
    flips = [
        whole[:n] + bytes([whole[n] ^ rng.integers(1, 256)]) + whole[n + 1 :]
        for n in range(0, len(whole), 3)
    ]
    missed = 0
    for damaged in cuts + flips:
        path.write_bytes(damaged)
        assert_equal(tokens(PAIR, tmp_path), expected)
        said = warnings()
        if said:
            assert len(said) == 1 and str(path) in said[0] and "\n" not in said[0]
            assert len(files(tmp_path)) == 1
            assert path.read_bytes() != damaged  # written anew
        else:  # a date, or another part of a zip that nobody reads
            missed += 1
        assert_equal(tokens(PAIR, tmp_path), expected)
        assert not warnings()
    assert missed < len(flips) / 4


def test_a_header_that_ends_the_reading_too_soon_is_found(tmp_path, warnings):
    many = Examples(FIRST * 1000, None, np.zeros(3000, np.int32))
    tokens(many, tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"'descr': '<u2'", b"'descr': '<u1'"))
    assert path.read_bytes() != whole
    assert_equal(tokens(many, tmp_path), plain(many))
    assert len(warnings()) == 1


def foreign(kind, path):
    """Another file in the place of one of ours."""
    one = np.ones(3, np.int32)
    if kind == "text":
        path.write_text("no tokens")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, one)
    elif kind == "npz":
        np.savez(path, a=one)
    elif kind == "objects":
        np.savez(path, key=np.asarray([{}]), ids=one, types=one, lengths=one)
    elif kind == "renamed":
        other = Examples(["x", "y", "z"], ["x", "y", "z"], np.zeros(3, np.int32))
        tokens(other, path.parent / "other")
        files(path.parent / "other")[0].replace(path)
    elif kind == "misfit":
        np.savez(path, key=np.asarray(path.stem), ids=one, types=one, lengths=one[:2])


@pytest.mark.parametrize("kind", ["text", "npy", "npz", "objects", "renamed", "misfit"])
def test_a_foreign_file_is_written_anew(tmp_path, warnings, kind):
    path = tmp_path / f"tokens-{key_of(content(), PAIR, 24)}.npz"
    foreign(kind, path)
    assert_equal(tokens(PAIR, tmp_path), plain(PAIR))
    (line,) = warnings()
    assert line.startswith(f"{path} is ignored") and "\n" not in line
    assert_equal(tokens(PAIR, tmp_path), plain(PAIR))
    assert not warnings()


def test_a_folder_that_cannot_be_is_one_line(tmp_path, warnings):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "tokens"):
        assert_equal(tokens(PAIR, folder), plain(PAIR))
        (line,) = warnings()
        assert line.startswith("tokens are not kept: ") and str(tmp_path) in line
    blocked = tmp_path / f"tokens-{key_of(content(), PAIR, 24)}.npz"
    (blocked / "inside").mkdir(parents=True)
    assert_equal(tokens(PAIR, tmp_path), plain(PAIR))
    assert [line.split(" ")[-1] for line in warnings()][1:] == [f"'{blocked}'"]
    assert files(tmp_path) == [blocked]  # nothing half done is left


CODE = """
import os, resource, sys
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer
from lorax.data import Examples, encode_cached

content, folder = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
examples = Examples(["word " * n for n in range(60)], None, np.zeros(60, np.int32))

def once():
    return encode_cached(Tokenizer.from_buffer(content), content, examples, 64, folder)
"""
FULL = """
assert once().lengths.max() == 64
for limit in range(0, 16_000, 1000):
    for path in folder.iterdir():
        path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    assert once().lengths.max() == 64
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(limit, len(list(folder.iterdir())))
"""
WRITE = """
print("ready", flush=True)
while True:
    once()
    for path in folder.glob("*.npz"):
        path.unlink(missing_ok=True)
"""


def start(code, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content())
    arguments = [sys.executable, "-c", CODE + code, tmp_path / "tokenizer.json", tmp_path / "kept"]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    out, err = start(FULL, tmp_path).communicate(timeout=120)
    kept = [line.split()[1] for line in out.splitlines()]
    failures = kept.count("0")
    assert kept == ["0"] * failures + ["1"] * (16 - failures)
    assert 5 < failures < 15
    assert err.splitlines() == ["tokens are not kept: [Errno 27] File too large"] * failures


def test_processes_write_at_once_and_are_killed(tmp_path, warnings):
    writers = [start(WRITE, tmp_path) for _ in range(2)]
    examples = Examples(["word " * n for n in range(60)], None, np.zeros(60, np.int32))
    expected, folder = plain(examples, 64), tmp_path / "kept"
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for _ in range(30):
            assert_equal(tokens(examples, folder, 64), expected)
    finally:
        for writer in writers:
            writer.kill()
        said = [writer.communicate()[1] for writer in writers]
    assert said == ["", ""]
    assert {writer.returncode for writer in writers} == {-signal.SIGKILL}
    assert_equal(tokens(examples, folder, 64), expected)
    assert len(list(folder.glob("*.npz"))) == 1
    assert not warnings()


def test_threads_write_at_once(tmp_path, warnings):
    with ThreadPoolExecutor(8) as pool:
        for encoded in pool.map(lambda _: tokens(PAIR, tmp_path), range(40)):
            assert_equal(encoded, plain(PAIR))
    assert len(files(tmp_path)) == 1
    assert not warnings()


def test_those_unused_for_longest_go(tmp_path, monkeypatch):
    def split(n):
        return Examples([str(n)], None, np.zeros(1, np.int32))

    def path(n):
        return tmp_path / f"tokens-{key_of(content(), split(n), 24)}.npz"

    not_ours = tmp_path / "tokens-mine.bin"
    not_ours.write_bytes(bytes(10_000))
    os.utime(not_ours, (0, 0))
    for n in range(4):
        tokens(split(n), tmp_path)
        os.utime(path(n), (n, n))
    partial = tmp_path / f"{path(0).stem}-xyz.partial"  # as a killed writer leaves it
    partial.write_bytes(path(0).read_bytes())
    os.utime(partial, (0, 0))
    tokens(split(0), tmp_path)  # a use
    monkeypatch.setattr(module, "MOST_BYTES", 3 * path(0).stat().st_size)
    tokens(split(4), tmp_path)
    assert files(tmp_path) == sorted([*(path(n) for n in (0, 3, 4)), not_ours])
