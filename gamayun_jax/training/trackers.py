"""Where a run can be watched besides its folder: TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from gamayun_jax.config import LogConfig
from gamayun_jax.training.run_folder import SAMPLES, RunFolder

Scalars = Mapping[str, float | None]  # by tag; None: not known


class Tracker(Protocol):
    """Takes what the first process records."""

    def start(self, step: int, tokens: int) -> None:
        """Before the records that follow `step`; older ones of those are void."""

    def write(
        self, step: int, tokens: int, scalars: Scalars, texts: Mapping[str, str]
    ) -> None:
        """What was measured at a step; texts are Markdown, by tag."""

    def close(self) -> None:
        """After the last record of this process."""


@contextmanager
def open_trackers(cfg: LogConfig, folder: RunFolder) -> Iterator[list[Tracker]]:
    """The trackers that a config asks for; none where this process does not write."""
    trackers: list[Tracker] = []
    if folder.writer and cfg.tensorboard:
        trackers.append(TensorBoard(folder.path))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class TensorBoard:
    """Event files in a run folder, over tokens."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._events: Any = None

    def start(self, step: int, tokens: int) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        self._events = SummaryWriter(str(self._folder), purge_step=tokens + 1)

    def write(
        self, step: int, tokens: int, scalars: Scalars, texts: Mapping[str, str]
    ) -> None:
        for tag, value in scalars.items():
            if value is not None:
                self._events.add_scalar(tag, value, tokens)
        for tag, text in texts.items():
            self._events.add_text(tag, text, tokens)
        self._events.flush()

    def close(self) -> None:
        if self._events:
            self._events.close()


def sample_text(items: Iterable[Mapping[str, Any]]) -> str:
    """What was written for the first items of a generation task, as Markdown."""

    def part(name: str, text: str) -> str:
        # As code, in which no sign of a model's text means anything to Markdown.
        return f"{name}:\n\n{textwrap.indent(text, '    ', lambda line: True)}"

    return "\n\n---\n\n".join(
        "\n\n".join(
            [
                part("asked", item["prompt"]),
                part("answer", item["answers"][0]),
                part("written", item["text"] or "(nothing)"),
            ]
        )
        for item in islice(items, SAMPLES)
    )
