"""Where a run can be watched: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import queue
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

from gamayun_jax.config import Config, UserError, to_dict
from gamayun_jax.data.files import read_json, write_json
from gamayun_jax.training.run_folder import SAMPLES, RunFolder
from gamayun_jax.training.spool import Spool

Scalars = Mapping[str, float | None]  # by tag; None: not known
EVENTS = 10_000  # in a file of a bucket, which is sent whole each time
BACKLOG = 10_000  # calls that wait for a service; then it is given up
PATIENCE = 30.0  # seconds that the end of a run waits for a service


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
def open_trackers(
    cfg: Config, folder: RunFolder, log: Callable[[str], None]
) -> Iterator[list[Tracker]]:
    """The trackers that a config asks for; none where this process does not write.

    Raises:
      UserError: the package of `log.tracker` is missing or broken.
    """
    trackers: list[Tracker] = []
    if folder.writer and cfg.log.tensorboard:
        trackers.append(TensorBoard(folder.spool))
    if folder.writer and cfg.log.tracker:
        trackers.append(Service(cfg, folder, log))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class TensorBoard:
    """Event files in a run folder, over tokens."""

    def __init__(self, spool: Spool):
        self._spool = spool
        self._events: Any = None
        self._written = 0

    def start(self, step: int, tokens: int) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        # Older events of what comes are void, from the first file on.
        self._events = SummaryWriter(str(self._spool.folder), purge_step=tokens + 1)
        self._written = 0

    def write(
        self, step: int, tokens: int, scalars: Scalars, texts: Mapping[str, str]
    ) -> None:
        if self._spool.remote and self._written > EVENTS:
            self.start(step, tokens)  # a new file: the former one is sent no more
        self._written += len(scalars)
        for tag, value in scalars.items():
            if value is not None:
                self._events.add_scalar(tag, value, tokens)
        for tag, text in texts.items():
            self._events.add_text(tag, text, tokens)
        self._events.flush()

    def close(self) -> None:
        if self._events:
            self._events.close()


class Service:
    """A run at Weights & Biases or trackio: the scalars, by steps.

    A thread of its own makes all calls, so that training waits for no network; whatever
    fails there is said once, and training goes on without. What the run is called there
    and the last step of each kind of record are in tracker.<package>.json of the run
    folder: started again it goes on there, and steps that are made again are not sent
    again. A copy of the folder under another name is another run there.
    """

    def __init__(self, cfg: Config, folder: RunFolder, log: Callable[[str], None]):
        """Raises UserError if the package is missing or broken."""
        self._cfg, self._folder, self._log = cfg, folder.spool.folder, log
        self._name = folder.path.resolve().name
        package = cfg.log.tracker
        try:
            # A folder of that name, such as wandb makes, would be an empty module.
            self._init = importlib.import_module(package).init
        except Exception as e:  # also of a package that does not fit another one
            raise UserError(
                f"log.tracker={package!r}: the package cannot be imported "
                f"({type(e).__name__}: {e}): pip install {package}, or leave "
                "log.tracker out"
            ) from e
        self._former = folder.path / f"tracker.{package}.json"
        self._path = self._folder / self._former.name
        self._thread: threading.Thread | None = None
        self._failed = False

    def start(self, step: int, tokens: int) -> None:
        known = read_json(self._former, missing={}) if step else {}
        # The copy of a folder, which may go on beside the original, has its file, too.
        if known.get("name") != self._name:
            self.close()
            known = {"id": uuid.uuid4().hex[:8], "name": self._name, "last_steps": {}}
        self._known = known

    def write(
        self, step: int, tokens: int, scalars: Scalars, texts: Mapping[str, str]
    ) -> None:
        kind, last_steps = next(iter(scalars)), self._known["last_steps"]
        if self._failed or step <= last_steps.get(kind, -1):
            return
        if not self._thread:
            self._calls: queue.Queue[Any] = queue.Queue(BACKLOG)
            self._thread = threading.Thread(target=self._send, daemon=True)
            self._thread.start()
        last_steps[kind] = step
        write_json(self._path, self._known)
        values = {k: v for k, v in scalars.items() if v is not None}
        self._call(({"tokens": tokens, **values}, step))

    def close(self) -> None:
        if self._thread and not self._failed:
            self._call(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._fail(f"no answer for {PATIENCE:.0f} s")
        self._thread = None

    def _call(self, call: tuple[dict[str, float], int] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{BACKLOG:,} records wait to be sent")

    def _send(self) -> None:
        """The thread: one run of the service, from its beginning to its end."""
        key, name = self._known["id"], self._name
        if self._cfg.log.tracker == "wandb":
            own = {"name": name, "id": key, "dir": str(self._folder)}
        else:  # trackio knows a run by its name
            own = {"name": f"{name}-{key}", "embed": False}
        try:
            run = self._init(
                project=self._cfg.log.project,
                config=to_dict(self._cfg),
                resume="allow",
                **own,
            )
            while call := self._calls.get():
                run.log(call[0], step=call[1])
            run.finish()
        except Exception as e:
            self._fail(f"{type(e).__name__}: {e}")

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._log(
                f"log.tracker={self._cfg.log.tracker!r} failed, and training goes on "
                f"without it: {reason}"
            )


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
