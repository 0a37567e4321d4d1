"""Texts for a decoder, and the part of each that it learns to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Documents:
    """A split as text to go on with.

    Attributes:
      texts: each whole, what is to be predicted included.
      targets: of each text the spans [start, end), in characters, that are to be predicted.
      form: `prompt` gets the special tokens of the tokenizer; `chat` has them all from its
        template; `text` is long and is cut into blocks, of which all is predicted.
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
