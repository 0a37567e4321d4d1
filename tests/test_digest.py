"""A file is hashed once for as long as it is the same, and again whenever it changes."""

import hashlib
import os

import pytest

from lorax.errors import LoraxError
from lorax.runtime import digest


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where digests are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lorax" / "digests"


def sha(data):
    return hashlib.sha256(data).hexdigest()


def in_another_process(path):
    digest._digest.cache_clear()
    return digest.file_digest(path)


@pytest.mark.parametrize("size", [3, digest.KEPT_FROM])
def test_a_file_that_changed_under_an_old_size_and_time_is_hashed_again(tmp_path, kept, size):
    path = tmp_path / "weights"
    for byte in (b"a", b"b"):
        path.write_bytes(byte * size)
        os.utime(path, ns=(1, 1))
        assert digest.file_digest(path) == in_another_process(path) == sha(byte * size)


def test_large_files_are_hashed_once_by_all_processes(tmp_path, kept):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * digest.KEPT_FROM)
    right = digest.file_digest(path)
    (file,) = kept.iterdir()
    assert file.read_text() == right
    file.write_text("f" * 64)  # what is there is believed
    assert in_another_process(path) == "f" * 64
    for damaged in ("", "f" * 63, "\xff" * 64):
        file.write_text(damaged)
        assert in_another_process(path) == right == file.read_text()


def test_small_files_and_a_cache_that_cannot_be_written_leave_nothing(tmp_path, kept):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"a")
    assert digest.file_digest(small) == sha(b"a")
    assert not kept.exists()
    kept.parent.mkdir(parents=True)
    kept.write_text("a file where the folder would be")
    large.write_bytes(b"a" * digest.KEPT_FROM)
    assert digest.file_digest(large) == sha(b"a" * digest.KEPT_FROM)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(LoraxError, match=r"weights: cannot be read \(No such file"):
        digest.file_digest(tmp_path / "weights")
