import reprlib


class LoraxError(ValueError):
    """A fault the user can mend: one line that names the offender and what would be right.

    Entry points print the message without a traceback and exit with status 2.
    """


SHOWN_FAULTS = 5
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


def brief(value: object) -> str:
    """The `repr` of a value, shortened if it is long, for a message of one line."""
    return one_line(_repr.repr(value), 200)


def one_line(text: object, most: int = 300) -> str:
    """A text, such as another library's error, on one line of at most so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def refuse(place: str, faults: list[str]) -> None:
    """Raise a `LoraxError` of one line if there is any fault."""
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = [one_line(fault, 1000) for fault in faults[:SHOWN_FAULTS]] + [
            f"and {more} more"
        ] * (more > 0)
        raise LoraxError(f"{place}: {'; '.join(shown)}")
