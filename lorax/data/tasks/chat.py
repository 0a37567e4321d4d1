"""Chats as text, by the tokenizer's own template, and the spans of the assistant's turns.

Templates are Jinja, rendered as `transformers` does: the same sandbox, filters and variables
(https://huggingface.co/docs/transformers/chat_templating_writing).
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorax.data.documents import Span
from lorax.data.files import read_text
from lorax.data.tokens.special_tokens import control_tokens, read_json, special_tokens
from lorax.errors import LoraxError, brief

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# Enclose the spans that the template marks; Unicode reserves these two as noncharacters.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    r"""A tokenizer's chat template.

    Attributes:
      source: Jinja.
      special: texts of special tokens, which the template reads by name.
      controls: texts that no message may contain: the tokenizer would read them as special tokens
        and could take the message for another role's.

    >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ...                         "{% if add_generation_prompt %}assistant: {% endif %}", {}, ())
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> template.render(chat)
    'user: Hi\nassistant: Hello\n'
    >>> template.with_spans(chat)
    ('user: Hi\nassistant: Hello\n', ((20, 26),))
    """

    source: str
    special: dict[str, str]
    controls: tuple[str, ...]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A chat as text.

        Args:
          messages: each with `role` and `content`.
          add_generation_prompt: end with the opening of the assistant's next turn.

        Raises:
          LoraxError: the template refuses them or fails on them, or a message contains one of
            `controls`.
        """
        self._check(messages)
        return self._plain(messages, add_generation_prompt)

    def with_spans(self, messages: Sequence[Message]) -> tuple[str, tuple[Span, ...]]:
        """A chat as text, with the spans [start, end) in characters of the assistant's turns.

        The template marks them by `{% generation %}`. In a template without it, a turn is the
        difference between the chat rendered to the end of the turn, and rendered up to the turn
        with the generation prompt.

        Raises:
          LoraxError: see `render`; or the first messages alone are not rendered as in the whole
            chat, so that turns cannot be located.
        """
        self._check(messages)
        if self._has_marks:
            return _unmark(self._marked(messages))
        whole = self._plain(messages)
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        return whole, tuple(self._turn(messages, n, whole) for n in turns)

    def fault_of_ends(self, chats: Iterable[tuple[str, tuple[Span, ...]]]) -> str | None:
        """Why these chats do not teach a model to end its turn, in one line; None if they do.

        A turn teaches it if it ends with a special token, or if it ends the chat, where the
        end-of-text token is added.

        Args:
          chats: from `with_spans`.
        """
        tokens = tuple(filter(None, (*self.controls, *self.special.values())))
        turns = [(text, end) for text, spans in chats for _, end in spans]
        if any(end == len(text) or text[:end].rstrip().endswith(tokens) for text, end in turns):
            return None
        # The rest of the chat after its last turn ends that turn.
        closing = re.compile(rf"\s*({'|'.join(map(re.escape, tokens)) or '(?!)'})")
        last = [closing.match(text, end) for text, end in turns if _is_bare(text[end:], tokens)]
        if self._has_marks and (found := next(filter(None, last), None)):
            return (
                f"the chat template's {{% generation %}} block ends before {found[1]!r}, so that "
                "the model does not learn to end its turn: put {% endgeneration %} behind that "
                "token"
            )
        return (
            "no turn of the assistant ends with a special token or at the end of its chat, so that "
            "the model does not learn to end its turn: put eos_token behind the assistant's words "
            "in the chat template, within {% generation %} if it has that"
        )

    def _turn(self, messages: Sequence[Message], turn: int, whole: str) -> Span:
        before = self._plain(messages[:turn], True)
        until = self._plain(messages[: turn + 1])
        if not (until.startswith(before) and whole.startswith(until)):
            raise LoraxError(
                f"messages[{turn}] cannot be told from the rest, as the chat template renders a "
                "part of the chat in another way than the whole: mark the assistant's words in it "
                "by {% generation %} ... {% endgeneration %}"
            )
        return len(before), len(until)

    def _plain(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return _unmark(self._marked(messages, add_generation_prompt))[0]

    def _marked(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        template = self._compiled
        try:
            return template.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as error:  # a template may raise any error
            raise LoraxError(f"the chat template refuses it ({_line(error)})") from error

    def _check(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages):
            if found := next(filter(None, map(self._forbidden.search, _texts(message))), None):
                raise LoraxError(
                    f"messages[{number}] holds {found[0]!r}, which the tokenizer reads as a "
                    "special token: write it in another way"
                )

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, (*self.controls, OPEN, CLOSE))))

    @cached_property
    def _has_marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # from Jinja or the compiled template
            raise LoraxError(f"the chat template is no Jinja ({_line(error)})") from error


def _environment() -> "ImmutableSandboxedEnvironment":
    """A sandbox that compiles templates as `transformers` does; only chats import Jinja."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: puts `OPEN` and `CLOSE` around it."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own name for them)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def fail(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": fail, "strftime_now": _strftime_now}
    return environment


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """A value as JSON; unlike Jinja's own filter it does not escape for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def load_chat_template(folder: Path) -> ChatTemplate:
    """The chat template in a tokenizer's folder.

    It is `chat_template.jinja`, or else `chat_template` in `chat_template.json` or
    `tokenizer_config.json`; among several named ones it is `default`.

    Args:
      folder: of `tokenizer.json` and related files.

    Raises:
      LoraxError: there is none, or a file is malformed.
    """
    return ChatTemplate(_source(folder), special_tokens(folder), tuple(control_tokens(folder)))


def _source(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):
            named = [x for x in found if isinstance(x, dict) and x.get("name") == "default"]
            found = named[-1].get("template") if named else None
        if isinstance(found, str):
            return found
        if found is not None:
            raise LoraxError(f"{folder / name}: chat_template={brief(found)} is not a text")
    raise LoraxError(
        f"{folder}: the tokenizer has no chat template: put one in chat_template.jinja there, or "
        'give each line as {"prompt": ..., "completion": ...}'
    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _texts(part)


def _is_bare(text: str, tokens: Sequence[str]) -> bool:
    """Whether a text has only blanks and special tokens."""
    for token in tokens:
        text = text.replace(token, "")
    return not text.strip()


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _unmark(marked: str) -> tuple[str, tuple[Span, ...]]:
    """A text without the marks, and the spans that they enclosed."""
    parts = re.split(f"[{OPEN}{CLOSE}]", marked)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    spans = [(ends[n], ends[n + 1]) for n in range(1, len(parts), 2)]
    return "".join(parts), tuple(span for span in spans if span[0] < span[1])
