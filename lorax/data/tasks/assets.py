import os
from pathlib import Path

from lorax.errors import LoraxError

_PROJECT = Path(__file__).resolve().parents[3]


def find_asset(name: str) -> Path:
    """The folder of a fetched asset (`minilm` or `reviews`).

    Looks in `$LORAX_ASSETS`, then in `assets` of the working directory and of the project.

    Raises:
      LoraxError: it is in none of them.
    """
    given = os.environ.get("LORAX_ASSETS")
    roots = [Path(given)] if given else []
    roots += [Path("assets"), _PROJECT / "assets"]
    for root in roots:
        if (root / name).is_dir():
            return root / name
    raise LoraxError(
        f"asset {name!r} is not in {', '.join(map(str, roots))}: "
        f"run `python scripts/fetch_assets.py`, or set LORAX_ASSETS"
    )
