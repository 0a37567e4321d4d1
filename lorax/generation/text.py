"""Decodes token ids to text, and finds the stop text that ends it."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from lorax.errors import LoraxError


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids`, without special tokens.

    They are decoded with the token before them: some tokenizers drop a text's first space.
    """
    before = tokenizer.decode(list(prompt[-1:]))
    together = tokenizer.decode([*prompt[-1:], *ids])
    if together.startswith(before):
        return together[len(before) :]
    return tokenizer.decode(list(ids))


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop text in it; None without one.

    >>> cut("one. two; three", (";", "."))
    'one'
    """
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else None


@dataclass(frozen=True)
class Stops:
    """Texts that end a row; each may span tokens, or end within one.

    Args:
      texts: any of them.
      tokenizer: of the model.

    Raises:
      LoraxError: they could never be found: a special token is in one, or there is no tokenizer.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        if self.texts and self.tokenizer is None:
            raise LoraxError(f"stop={self.texts!r} needs a tokenizer")
        added = self.tokenizer.get_added_tokens_decoder() if self.tokenizer else {}
        special = {token.content: n for n, token in added.items() if token.special}
        for text in self.texts:
            if token := next((token for token in special if token and token in text), None):
                raise LoraxError(
                    f"stop={text!r}: {token!r} is a special token, which texts leave out: "
                    f"set eos_token_id={special[token]}"
                )

    def are_in(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether one of them is in the text of `ids`, which follow a prompt's."""
        if self.tokenizer is None or not self.texts:
            return False
        return cut(text_after(self.tokenizer, prompt, ids), self.texts) is not None

    def tokens_to(self, prompt: Sequence[int], ids: Sequence[int]) -> int | None:
        """Number of `ids` up to the end of the first stop text; None if the text has none."""
        if not self.are_in(prompt, ids):
            return None
        return bisect_left(range(len(ids)), True, key=lambda n: self.are_in(prompt, ids[:n]))
