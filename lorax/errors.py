class LoraxError(ValueError):
    """A fault the user can mend: one line that names the offender and what would be right.

    Entry points print the message without a traceback and exit with status 2.
    """


SHOWN_FAULTS = 5


def refuse(place: str, faults: list[str]) -> None:
    """Raise a `LoraxError` of one line if there is any fault."""
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = faults[:SHOWN_FAULTS] + [f"and {more} more"] * (more > 0)
        raise LoraxError(f"{place}: {'; '.join(shown)}")
