"""What to launch, where, and for how much: one description for all back ends.

Every field is a flag (`max_hours`: --max-hours) and a key of a YAML file; usage.py has
what they mean.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.fields import UserError, call_in_file, nearest
from gamayun_jax.launch.slices import Slice, slice_of
from gamayun_jax.training.chips import CHIPS

ACTIONS = ("up", "run", "logs", "status", "stop", "delete")
BACKENDS = ("queued", "compute", "gke", "vm", "hosts")
LOG_DIR = "runs/launch"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?")


@dataclass(frozen=True)
class Launch:
    """A launch: what each field means stands in usage.py."""

    name: str = ""
    backend: str = "queued"
    zone: str = ""
    project: str = ""
    hosts: str = ""
    context: str = ""
    namespace: str = "default"
    type: str = ""
    topology: str = ""
    version: str = ""
    slices: int = 1
    spot: bool = False
    flex: bool = False
    reservation: str = ""
    network: str = ""
    subnet: str = ""
    service_account: str = ""
    image: str = ""
    setup: str = ""
    python: str = "python3.11"
    extra: str = ""
    allow_dirty: bool = False
    max_restarts: int = 50
    poll: int = 20
    backoff: int = 30
    log_dir: str = ""
    max_hours: float = math.inf
    max_cost: float = math.inf
    price: float = 0.0
    delete_when_done: bool = False
    worker: int = 0
    dry_run: bool = False
    checkout: str = "."
    commands: tuple[tuple[str, ...], ...] = ()  # arguments of `gamayun train`

    @property
    def slice(self) -> Slice:
        """Kind, topology and chips of one slice; UserError where it names none."""
        return slice_of(self.type, self.topology)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.slice.chips

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def logs(self) -> Path:
        """Folder of the copied logs."""
        return Path(self.log_dir or Path(self.checkout) / LOG_DIR / self.name)

    @property
    def price_per_hour(self) -> float:
        """Of all chips. UserError where the price of a chip is not known."""
        price = self.price or CHIPS[self.slice.kind].price
        if not price:
            raise UserError(
                f"--max-cost: the price of {self.slice.kind} is not known here: give "
                "--price, of a chip-hour"
            )
        return price * self.chips

    @property
    def budget_hours(self) -> float:
        """Hours of VMs that --max-hours and --max-cost allow; inf without either."""
        hours = self.max_hours
        if self.max_cost < math.inf:
            hours = min(hours, self.max_cost / self.price_per_hour)
        return hours


# --- reading it -----------------------------------------------------------------------


FIELDS = {f.name: f for f in dataclasses.fields(Launch) if f.name != "commands"}
KINDS: dict[str, Any] = {name: type(f.default) for name, f in FIELDS.items()}


def parse(words: Sequence[str]) -> tuple[str, Launch]:
    """The action and the launch of a command line.

    Raises:
      UserError: one line on what is wrong.
    """
    action, rest = words[0], list(words[1:])
    given: dict[str, Any] = {}
    if action not in ACTIONS:
        raise UserError(
            f"unknown command {action!r}: use {', '.join(ACTIONS[:-1])} or "
            f"{ACTIONS[-1]}, or see --help"
        )
    values: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        if word == "--":
            values["commands"] = split_commands(rest)
            break
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in {*FIELDS, "file"}:
            near = nearest(flag, [f"--{n.replace('_', '-')}" for n in FIELDS])
            hint = f", did you mean {near}?" if near else ""
            raise UserError(
                f"unknown argument {flag!r}{hint}: see --help; arguments of gamayun "
                "train follow --"
            )
        if KINDS.get(name) is bool:
            if equals:
                raise UserError(f"{flag} takes no value: see --help")
            given[name] = True
            continue
        if not equals:
            if not rest:
                raise UserError(f"{flag} needs a value: see --help")
            value = rest.pop(0)
        given[name] = value
    if "file" in given:
        values = read_file(Path(given.pop("file"))) | values
    values |= {name: convert(name, value) for name, value in given.items()}
    launch = Launch(**values)
    if launch.hosts:
        launch = dataclasses.replace(launch, backend="hosts")
    check(action, launch)
    return action, launch


def split_commands(words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Arguments of several `gamayun train`, which --then keeps apart."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    return tuple(map(tuple, commands)) if words else ()


def convert(name: str, value: Any) -> Any:
    """A flag's or file's value as its field has it; UserError where it does not fit."""
    kind, flag = KINDS[name], f"--{name.replace('_', '-')}"
    if kind is int and not (
        re.fullmatch(r"0|[1-9]\d{0,6}", str(value)) and not isinstance(value, bool)
    ):
        raise UserError(
            f"{flag} {value} is not a whole number: give one, e.g. {flag} 2"
        )
    if kind is float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not number > 0:
            raise UserError(
                f"{flag} {value} is not a number above 0: give one, e.g. {flag} 100"
            )
        return number
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name}: {value!r} is neither true nor false")
        return value
    return kind(value)


def read_file(path: Path) -> dict[str, Any]:
    """Fields of a launch from a YAML file, or from a Python file's get_launch().

    Raises:
      UserError: no such file, not of this form, or an unknown field.
    """
    if path.suffix == ".py":
        _, made = call_in_file(path, "get_launch")
        if not isinstance(made, Launch):
            raise UserError(f"--file {path}: get_launch() must return a Launch")
        return {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"--file {path} cannot be read as YAML: {e}") from e
    if not isinstance(data, Mapping):
        raise UserError(f"--file {path} is no mapping: write `name: ...` a line")
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name == "commands":
            whole = isinstance(value, list) and all(isinstance(x, str) for x in value)
            if not whole:
                raise UserError(
                    f"--file {path}: commands must be a list of texts, each the "
                    "arguments of gamayun train"
                )
            values["commands"] = tuple(tuple(shlex.split(x)) for x in value)
        elif name in FIELDS:
            values[name] = convert(name, value)
        else:
            near = nearest(name, FIELDS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UserError(f"--file {path}: there is no field {key!r}.{hint}")
    return values


def check(action: str, launch: Launch) -> None:
    """Raise UserError for a launch that cannot be, before anything is asked for."""
    if not NAME.fullmatch(launch.name):
        raise UserError(
            f"--name {launch.name!r} is no name for a TPU: give lower-case letters, "
            "digits and hyphens, a letter first"
        )
    if launch.backend not in BACKENDS:
        raise UserError(
            f"--backend {launch.backend!r} is unknown: choose one of "
            f"{', '.join(BACKENDS)}"
        )
    on_google = launch.backend not in ("gke", "hosts")
    if on_google and not launch.zone:
        raise UserError(
            "--zone is missing: give the zone of the TPU, e.g. --zone us-west4-a"
        )
    if not launch.slices:
        raise UserError("--slices 0 leaves no TPU: give 1 or more")
    if launch.backend == "hosts" and not launch.hosts.strip(", "):
        raise UserError("--backend hosts: name the machines, e.g. --hosts node1,node2")
    if action in ("up", "run") and launch.backend in ("queued", "compute", "gke"):
        check_machines(launch)
    if action == "run":
        check_commands(launch)
        budget = launch.budget_hours
        if budget < 1:
            raise UserError(
                f"the budget allows {budget:.2g} hours: below one hour hardly a step "
                "is made; raise --max-hours or --max-cost"
            )


def check_machines(launch: Launch) -> None:
    """Raise UserError where a back end has no such machines."""
    if not launch.type and not launch.topology:
        raise UserError(
            "--type is missing: give the accelerator type, e.g. --type "
            "v5litepod-256, or --topology"
        )
    if launch.spot + launch.flex + bool(launch.reservation) > 1:
        raise UserError("--spot, --flex and --reservation exclude each other: give one")
    if launch.backend == "queued":
        if launch.flex:
            raise UserError("--flex is for --backend compute and gke")
        if not launch.version and not launch.slice.accelerator.version:
            raise UserError(
                f"queued resources have no {launch.slice.kind}: use --backend compute "
                "or gke"
            )
        if launch.max_cost < math.inf:
            launch.price_per_hour  # noqa: B018
        return
    part = launch.slice
    if not part.topology:
        raise UserError(
            f"--type {launch.type} leaves the topology open: give --topology instead, "
            f"e.g. {part.kind}:2x2x4"
        )
    if launch.backend == "compute" and not part.accelerator.image:
        raise UserError(
            f"Compute Engine has no groups of {part.kind}: use --backend queued or gke"
        )
    if launch.backend == "gke" and not launch.image:
        raise UserError(
            "--image is missing: gke needs a container with gamayun, see Containerfile"
        )


def check_commands(launch: Launch) -> None:
    """Raise UserError where there is nothing to train, or nowhere to keep it."""
    if not launch.commands or not all(launch.commands):
        raise UserError("run has no config: end with -- CONFIG --workdir DIR")
    for words in launch.commands:
        workdir = value_of("--workdir", words)
        if not workdir.startswith(("/", "gs://", "s3://")):
            raise UserError(
                f"--workdir {workdir!r} must be an absolute path on storage that all "
                "workers share, or gs://...: see docs/tpu.md"
            )
    if launch.setup and not Path(launch.setup).is_file():
        raise UserError(f"--setup {launch.setup} is no file: name a bash script")


def value_of(flag: str, words: Sequence[str]) -> str:
    """The value of a flag among arguments; empty if it is not there."""
    value = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value
