import json
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished trial; None while it is not finished.

    Raises:
      LoraxError: a file that is there and not JSON.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as fault:
        raise LoraxError(f"{path} is damaged ({fault}); delete it to run the trial again") from None
