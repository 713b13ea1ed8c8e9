"""The one place from which gcloud, ssh and kubectl are called, or only printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gamayun_jax.fields import UserError
from gamayun_jax.launch.worker_scripts import quoted

INSTALL_HINTS = {
    "gcloud": "install the Google Cloud CLI and run `gcloud auth login`",
    "kubectl": "install it and run `gcloud container clusters get-credentials`",
    "ssh": "install OpenSSH's client",
    "scp": "install OpenSSH's client",
}
MISSING = re.compile(r"NOT_FOUND|was not found|does not exist|NotFound", re.I)
QUOTA = re.compile(r"quota|RESOURCE_EXHAUSTED", re.I)


class LaunchError(Exception):
    """What ends a launch: one line, and the exit status."""

    def __init__(self, status: int, message: str):
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a tool said."""

    status: int
    out: str = ""
    err: str = ""

    @property
    def missing(self) -> bool:
        """Whether what was asked for does not exist."""
        return bool(self.status and MISSING.search(self.err))

    @property
    def complaint(self) -> str:
        """The first line of what the tool complained about."""
        return complaint(self.err)


def complaint(text: str) -> str:
    """The line of a text that names an error, else its first; what a colon introduces
    there belongs to it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    last = first + 1
    while lines[last - 1 : last] and lines[last - 1].endswith(":"):
        last += 1
    return " ".join(lines[first:last]) or "no message"


def say(text: str) -> None:
    """A line for the person who launches."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


class Tool:
    """A command line tool; on a dry run its calls are printed instead."""

    def __init__(self, program: str, dry_run: bool):
        self.program, self.dry_run = program, dry_run
        if not dry_run and not shutil.which(program):
            raise UserError(f"{program} is not on the PATH: {INSTALL_HINTS[program]}")

    def __call__(self, *words: str, given: str | None = None) -> Answer:
        """Call it; on a dry run the answer is empty. `given`: its standard input."""
        if self.dry_run:
            self.show(words, given)
            return Answer(0)
        source = (
            {"input": given} if given is not None else {"stdin": subprocess.DEVNULL}
        )
        done = subprocess.run(
            [self.program, *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            **source,  # type: ignore[call-overload]
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def follow(self, *words: str) -> int:
        """Call it with its output on the screen."""
        if self.dry_run:
            self.show(words, None)
            return 0
        done = subprocess.run([self.program, *words], stdin=subprocess.DEVNULL)
        return done.returncode

    def show(self, words: Sequence[str], given: str | None) -> None:
        """Print a call as a shell would take it."""
        line = f"{self.program} {' '.join(map(quoted, words))}"
        if given is not None:
            line += f" << 'END'\n{given.rstrip()}\nEND"
        print(line, flush=True)
