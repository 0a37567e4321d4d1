"""The plugin of the Optuna sweeper: Hydra finds sweepers only in this namespace package.

Every Hydra application of an environment imports it, so lorax and Optuna wait until it is used.
"""

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper


class LoraxOptunaSweeper(Sweeper):
    """hydra-optuna-sweeper with studies that resume; see `lorax.launch.optuna_search`.

    Options are those of hydra-optuna-sweeper, under `hydra.sweeper`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, **context: Any) -> None:
        """Keep what Hydra gives a sweeper: `hydra_context`, `task_function` and `config`."""
        self.context = context

    def sweep(self, arguments: Sequence[str]) -> None:
        """Search; see `lorax.launch.optuna_search.search`."""
        from lorax.launch.optuna_search import search

        search(self.options, self.context, list(arguments))
