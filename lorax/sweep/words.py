"""Words of messages."""


def counted(n: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "job"), counted(2, "job")
    ('1 job', '2 jobs')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"
