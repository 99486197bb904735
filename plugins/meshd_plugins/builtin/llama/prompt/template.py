"""Renders a conversation with the template that came with the model; runs inside the worker only.

The template is a program from a file of unknown origin. It runs in jinja2's immutable sandbox, in a
process without network or keys, for at most `RENDER_S` and `RENDER_MEMORY_BYTES`, and with arithmetic
that cannot make huge things. What it renders is bounded as well.
"""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_round
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_BYTES_MAX: Final = 256 * 1024
PROMPT_CHARACTERS_MAX: Final = 4 * 1024 * 1024
RENDER_S: Final = 2.0
RENDER_MEMORY_BYTES: Final = 512 * 1024 * 1024
ROUND_DIGITS_MAX: Final = 20
_PROBE: Final = "Is this read?"
PRODUCT_MAX: Final = 1_000_000  # of a * b in a template, for a number, and length for a sequence


class TemplateError(Exception):
    """The template is broken or hostile, or refuses this conversation. The message is for people."""


class _Environment(ImmutableSandboxedEnvironment):
    """Forbids the operators that turn a few characters into gigabytes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002  jinja2's signature
        """Compute `left operator right` if both are small numbers."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not numbers or abs(left * right) > PRODUCT_MAX:
            raise jinja2.exceptions.SecurityError(f"{operator} is not allowed here")
        return left * right


class _Generation(Extension):
    """`{% generation %}`: marks what an assistant says, for those who train on it; here it is as if not there."""

    tags = {"generation"}  # noqa: RUF012  jinja2 has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:200])


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    """Jinja's filter for few digits: for 100,000,000 it takes minutes in which no signal is handled."""
    if abs(precision) > ROUND_DIGITS_MAX:
        raise jinja2.exceptions.SecurityError(f"rounding to {precision} digits is not allowed here")
    return do_round(value, precision, method)  # type: ignore[arg-type]


def _to_json(value: object, indent: int | None = None, **_options: object) -> str:
    """Jinja's filter with the arguments that templates give it; what a filter yields is a list."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_listed)


def _listed(value: object) -> list[object]:
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} is no value of JSON")
    return list(cast("Iterator[object]", value))


class ChatTemplate:
    """A compiled template.

    Attributes:
        wants_parts: whether it knows contents only as lists of {"type": "text", "text"}, as those of some models
            that see do: it would leave out what it is given as a text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile it. Raises TemplateError."""
        if len(source) > TEMPLATE_BYTES_MAX:
            raise TemplateError(f"the chat template has {len(source)} characters")
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,  # the output is a prompt, not HTML
            extensions=[loopcontrols, _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.filters["round"] = _round
        # update(): jinja2 types the values of this dict by what it holds at first
        functions: dict[str, Any] = {
            "raise_exception": _raise_exception,
            "strftime_now": time.strftime,
        }
        environment.globals.update(functions)
        self.source = source
        self.wants_parts = False
        self._special_tokens = special_tokens
        try:
            with _bounded():
                self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, TimeoutError) as error:
            raise TemplateError(
                f"the model's chat template cannot be used: {_words(error)}"
            ) from None
        self.wants_parts = not self._shows(_PROBE) and self._shows(
            [{"type": "text", "text": _PROBE}]
        )

    def _shows(self, content: object) -> bool:
        """Whether what a user says reaches the prompt in this form."""
        try:
            return _PROBE in self.render([{"role": "user", "content": content}])
        except TemplateError:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt, up to where the answer begins. Raises TemplateError.

        Args:
            messages: the conversation.
            tools: as OpenAI has them; None: there are none.
            options: further variables (`enable_thinking`); they replace none of the others.
        """
        size = 0
        parts: list[str] = []
        try:
            with _bounded():
                variables = {
                    **(options or {}),
                    **self._special_tokens,
                    "messages": messages,
                    "add_generation_prompt": True,
                    "tools": tools,
                }
                for part in self._template.generate(variables):
                    size += len(part)
                    if size > PROMPT_CHARACTERS_MAX:
                        raise TemplateError(
                            "the chat template renders more than any model can read"
                        )
                    parts.append(part)
                return "".join(parts)
        except TemplateError:
            raise
        except Exception as error:  # noqa: BLE001  a template raises what it likes: TypeError, ZeroDivisionError
            raise TemplateError(
                f"the model's chat template fails on this: {_words(error)}"
            ) from None


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:200]


@contextmanager
def _bounded() -> Generator[None]:
    """Bound time and memory of what is inside. Main thread only."""

    def too_slow(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it takes longer than {RENDER_S:g} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + RENDER_MEMORY_BYTES
    previous = signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    signal.setitimer(signal.ITIMER_REAL, RENDER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)
