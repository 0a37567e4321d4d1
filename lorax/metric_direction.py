"""Which way a metric is better."""


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss, on whichever split.

    >>> [lower_is_better(name) for name in ("loss_mismatched", "perplexity", "accuracy")]
    [True, True, False]
    """
    return metric.partition("_")[0] in ("loss", "perplexity")


def signed(metric: str, value: float) -> float:
    """The value, signed so that more is better.

    >>> signed("perplexity", 12.5)
    -12.5
    """
    return -value if lower_is_better(metric) else value
