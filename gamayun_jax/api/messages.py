"""Errors in a notebook's words: `workdir` where the command line has --workdir."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

from gamayun_jax.config import UserError

# What a message tells to run, and the call that does the same.
Words = str | Callable[[re.Match[str]], str]
CALLS: tuple[tuple[str, Words], ...] = (
    (
        r"`gamayun corpus build CONFIG --out ([^`]+)`",
        lambda found: f"`gx.build_corpus(cfg, {found[1]!r})`",
    ),
    (r"`gamayun corpus build`", "`gx.build_corpus(cfg)`"),
    (r"`gamayun train`", "`gx.train`"),
)


def in_words_of_calls(message: str, parameters: Collection[str]) -> str:
    """A message in which options are named as the parameters of a function.

    Args:
      parameters: of the function; other options, and commands, stay.
    """
    for command, call in CALLS:
        message = re.sub(command, call, message)

    def name(match: re.Match[str]) -> str:
        word = (match["option"] or "").replace("-", "_")
        return word if word in parameters else match[0]

    message = re.sub(r"--set (?=\S)", "", message)
    return re.sub(r"`[^`]*`|--(?P<option>[a-z][a-z-]+)", name, message)


def speak_of_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors name its parameters, not options of a command."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as e:
            e.args = (in_words_of_calls(str(e), parameters),)
            raise

    return call
