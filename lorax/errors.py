class LoraxError(ValueError):
    """A fault the user can mend: one line that names the offender and what would be right.

    Entry points print the message without a traceback and exit with status 2.
    """
