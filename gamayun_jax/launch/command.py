"""The command line of `gamayun launch`; its flags are the fields of a `Launch`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gamayun_jax.fields import UserError, nearest
from gamayun_jax.launch.description import Launch, make_launch
from gamayun_jax.launch.gke import JobSets
from gamayun_jax.launch.supervise import Supervisor
from gamayun_jax.launch.tools import LaunchError, say

ACTIONS = ("up", "run", "logs", "status", "stop", "delete")
USAGE = """gamayun launch COMMAND --name NAME --zone ZONE [flags]
       ./launch_tpu.sh COMMAND ... (the same, with Python alone)"""
COMMANDS = """\
commands
  up       create the machines, or reuse them; wait until they are there (gke: print the
           JobSet)
  run      up, copy the code, install, start on every worker, show worker 0's log; after
           a preemption or a crash create what is missing and resume, until the run is
           complete:
           run [flags] -- CONFIG --workdir DIR [arguments of gamayun train]
               [--then CONFIG --workdir DIR ...]
           A run that is already going is followed, not started twice.
  logs     print the log of one worker and follow it (see --worker)
  status   print the state of the machines and of the trainer on every worker
  stop     ask the trainer to save and stop (SIGTERM); the VMs stay, and cost
  delete   delete the machines; what is on their own disks is lost
"""
EPILOG = """\
exit status
  0 done, 1 the cloud failed, 2 bad input (here or in gamayun train; never retried),
  3 stopped by `stop` after saving, 4 quota refused, 5 too many restarts, 6 the budget
  is spent: saved and deleted

The corpus and --workdir must be under the same absolute path on every worker, on
storage that outlives the VMs, or in a bucket (gs://...): docs/tpu.md says how.

examples
  gamayun launch run --name gamayun --zone us-west4-a --type v5litepod-256 --spot \\
      --max-cost 20000 --delete-when-done \\
      -- experiments/stage1.py --workdir gs://bucket/runs/stage1 \\
      --then experiments/stage2.py --workdir gs://bucket/runs/stage2 \\
      --init-from gs://bucket/runs/stage1
  gamayun launch delete --name gamayun --zone us-west4-a
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")


def make_parser() -> Parser:
    """The parser of what comes before "--"."""
    parser = Parser(
        prog="gamayun launch",
        usage=USAGE,
        description=COMMANDS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "action", choices=ACTIONS, metavar="COMMAND", help=argparse.SUPPRESS
    )
    group: Any = parser
    for f in dataclasses.fields(Launch):
        if not f.metadata:
            continue
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if f.default is False:
            group.add_argument(flag, help=text, action="store_true")
            continue
        if isinstance(f.default, int) or f.default in ("default", "."):
            text += f" (default: {f.default})"
        kind: Any = type(f.default)
        metavar = {int: "N", float: "X"}.get(kind)  # else the field's name
        group.add_argument(flag, help=text, type=kind, metavar=metavar)
    text = "fields of the launch: YAML, or Python with get_launch(); flags come on top"
    group.add_argument("--file", help=text, metavar="FILE", default="")
    return parser


def parse(words: Sequence[str]) -> tuple[str, Launch]:
    """The action and the launch of a command line.

    Raises:
      UserError: one line on what is wrong.
    """
    own = list(words).index("--") if "--" in words else len(words)
    parser = make_parser()
    given, unknown = parser.parse_known_args(words[:own])
    if unknown:
        near = nearest(unknown[0].partition("=")[0], parser._option_string_actions)
        hint = f", did you mean {near}?" if near else ""
        raise UserError(
            f"unknown argument {unknown[0]!r}{hint}: see --help; arguments of gamayun "
            "train follow --"
        )
    values = vars(given)
    commands = words[own + 1 :] if own < len(words) else None
    return values["action"], make_launch(
        values.pop("action"), values, values.pop("file"), commands
    )


def main(words: Sequence[str]) -> int:
    """`gamayun launch`: returns the exit status."""
    own = words[: list(words).index("--")] if "--" in words else words
    if not words or {"-h", "--help", "help"} & {*own}:
        make_parser().print_help(sys.stdout if words else sys.stderr)
        return 0 if words else 2
    does: JobSets | Supervisor | None = None
    try:
        action, launch = parse(words)
        does = JobSets(launch) if launch.backend == "gke" else Supervisor(launch)
        return getattr(does, action)() or 0
    except UserError as e:
        status, text = 2, str(e)
    except LaunchError as e:
        status, text = e.status, str(e)
    except OSError as e:
        status, text = 1, f"{e.filename or ''}: {e.strerror or e}".lstrip(": ")
    except KeyboardInterrupt:
        status = 130
        text = "interrupted: what was started goes on, the same command follows it"
    say(text + (does.costs if does else ""))
    return status
