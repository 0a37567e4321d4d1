"""Analysis of finished trials: reads results from disk, never the code that trains."""

from lorax.analysis.report import write_report

__all__ = ["write_report"]
