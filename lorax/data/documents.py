"""Texts for a decoder, and the targets in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Documents:
    """A split of texts for a decoder.

    Attributes:
      texts: complete texts, targets included.
      targets: the target spans [start, end) of each text, in characters.
      form: `prompt` gets the special tokens of the tokenizer; `chat` has them all from its
        template; `text` is long and is split into blocks, of which every token is a target.
    """

    texts: list[str]
    targets: list[tuple[Span, ...]]
    form: Literal["prompt", "chat", "text"] = "prompt"

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Documents":
        """The documents at `indices`, in that order."""
        texts, targets = self.texts, self.targets
        return Documents([texts[i] for i in indices], [targets[i] for i in indices], self.form)
