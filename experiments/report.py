"""Tables, figures and one HTML page from a sweep directory.

    python -m experiments.report <sweep dir>

Reads the files that trials have left (config.json, metrics.jsonl, result.json), so it also serves
a sweep that is still running: unfinished trials are named and left out.
"""

import argparse
import sys
from collections.abc import Sequence

from lorax.analysis.report import build_report, save_report
from lorax.errors import LoraxError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a sweep and write its report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Reports on a sweep of LoRA trials."
    )
    parser.add_argument("sweep_dir", help="the directory whose sub-directories are trials")
    parser.add_argument("--output", help="where to write; default: <sweep dir>/report")
    arguments = parser.parse_args(argv)
    try:
        report = build_report(arguments.sweep_dir)
        page = save_report(report, arguments.output)
    except LoraxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.text())
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
