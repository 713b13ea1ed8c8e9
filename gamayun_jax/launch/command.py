"""The command line of `gamayun launch`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from gamayun_jax.fields import UserError
from gamayun_jax.launch.description import parse
from gamayun_jax.launch.gke import JobSets
from gamayun_jax.launch.supervise import Supervisor
from gamayun_jax.launch.tools import LaunchError, say
from gamayun_jax.launch.usage import USAGE


def main(words: Sequence[str]) -> int:
    """`gamayun launch`: returns the exit status."""
    if not words or {"-h", "--help", "help"} & {*words[: _own(words)]}:
        print(USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        action, launch = parse(words)
        does = JobSets(launch) if launch.backend == "gke" else Supervisor(launch)
        return getattr(does, action)() or 0
    except UserError as e:
        say(str(e))
        return 2
    except LaunchError as e:
        say(str(e))
        return e.status
    except OSError as e:
        say(f"{e.filename or ''}: {e.strerror or e}".lstrip(": "))
        return 1
    except KeyboardInterrupt:
        say("interrupted: what was started goes on, the same command follows it again")
        return 130


def _own(words: Sequence[str]) -> int:
    """How many words come before those of `gamayun train`."""
    with contextlib.suppress(ValueError):
        return list(words).index("--")
    return len(words)
