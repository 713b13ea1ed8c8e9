"""What to launch, where, and for how much: one description for all back ends.

Every field is a flag (`max_hours`: --max-hours), with its help, and a key of a file.
"""

# ruff: noqa: RUF009 - `option` makes fields
from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from gamayun_jax.fields import (
    Count,
    Positive,
    Share,
    UserError,
    Whole,
    call_in_file,
    decode,
)
from gamayun_jax.launch.slices import Slice, slice_of
from gamayun_jax.training.chips import CHIPS

LOG_DIR = "runs/launch"
# VMs, pods and node pools get longer names made of it, of at most 63 characters.
Name = Annotated[
    str,
    (
        "lower-case letters, digits and hyphens, at most 40, a letter first",
        re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?").fullmatch,
    ),
]
# Where workers, which are other machines, keep a run and find a model.
SHARED = re.compile(r"/|gs://[^/]{3,}/+[^/]")
MODEL = re.compile(r"/|(gs|s3)://[^/]{3,}/+[^/]")
Backend = Literal["queued", "compute", "gke", "vm", "hosts"]


def option(default: Any, help: str, group: str = "") -> Any:
    """A field, with its flag's help; `group` begins a new part of the list of flags."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class Launch:
    """A launch; `commands` are arguments of `gamayun train`, one after the other."""

    name: Name = option("", "of what is created; required", "where")
    backend: Backend = option(
        "queued",
        "queued (the default): queued resources of the TPU API, v4-v6e; compute: "
        "Compute Engine's instance groups, v5p, v6e and tpu7x; gke: a JobSet in a "
        "cluster of Kubernetes, by kubectl; vm: a TPU VM that exists, by its name; "
        "hosts: machines that exist, by ssh",
    )
    zone: str = option("", "e.g. us-west4-a; required, but for gke and hosts")
    project: str = option("", "project (default: gcloud's own setting)")
    hosts: str = option("", "--backend hosts, and their names as ssh has them: a,b")
    context: str = option("", "gke: kubectl's context (default: its own)")
    namespace: str = option("default", "gke: namespace")

    type: str = option(
        "",
        "accelerator type, e.g. v5litepod-256; required, or --topology",
        "what (up and run)",
    )
    topology: str = option("", "as `gamayun plan` has it: v6e:16x16, tpu7x:4x4x4")
    version: str = option("", "queued: runtime (default: the chip's)")
    slices: Count = option(1, "this many slices, trained together")
    spot: bool = option(False, "spot VMs: cheaper, may be taken away at any time")
    flex: bool = option(
        False, "compute, gke: flex-start, for --max-hours (at most 168)"
    )
    reservation: str = option("", "VMs of a reservation (queued: of the project's)")
    network: str = option("", "VPC network (default: the project's)")
    subnet: str = option("", "a subnet of it")
    service_account: str = option(
        "",
        "the account that the VMs act as, e.g. to read a bucket (gke: Kubernetes' own)",
    )
    image: str = option(
        "", "gke: container, see Containerfile; compute: family of images"
    )

    setup: str = option(
        "",
        "file of a bash script that workers run before each start, e.g. to mount the "
        "disk of the corpus; must bear repetition",
        "how (run)",
    )
    python: str = option(
        "",
        "Python on the workers, 3.11 or newer (default: python3.12 where it is there, "
        "else python3.11, by apt-get if it is missing)",
    )
    extra: str = option(
        "", "extra of the package they install (default: tpu; hosts: cuda)"
    )
    allow_dirty: bool = option(
        False, "train with uncommitted changes; new files not under git are left out"
    )
    max_restarts: Whole = option(50, "give up after this many restarts")
    poll: Whole = option(20, "seconds between looks at the workers")
    backoff: Whole = option(
        30, "seconds before a restart; doubled with each that fails, up to 16 times"
    )
    log_dir: str = option("", f"folder for the workers' logs (default: {LOG_DIR}/NAME)")

    max_hours: Positive = option(
        math.inf,
        "hours of machines, over all restarts; then the trainer saves, and they are "
        "deleted (gke: hours since the first run, waiting too)",
        "for how long (run)",
    )
    max_cost: Positive = option(math.inf, "the same, by the price of all chips")
    price: Share = option(
        0.0, "of a chip-hour (default: on demand in the US, USD, if known)"
    )
    delete_when_done: bool = option(
        False,
        "delete the machines at the end, of failed runs too; not of a stopped one",
    )

    worker: Whole = option(0, "logs: which worker, of the first slice", "other")
    checkout: str = option(".", "clone of the project whose commit is trained")
    dry_run: bool = option(
        False, "print the calls of gcloud, kubectl and ssh, make none"
    )
    commands: tuple[tuple[str, ...], ...] = ()

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


def make_launch(
    action: str, given: Mapping[str, Any], file: str, commands: Sequence[str] | None
) -> Launch:
    """The launch of a file's fields with those that are given on top, checked.

    Args:
      action: what is to be done with it, which needs some fields.
      commands: what follows "--" on a command line; None without one.

    Raises:
      UserError: one line on what is wrong.
    """
    values = (read_file(Path(file)) if file else {}) | dict(given)
    if commands is not None:
        values["commands"] = split_commands(commands)
    if values.get("hosts"):
        values["backend"] = "hosts"
    launch = decode(values, Launch, "")
    check(action, launch)
    return launch


def split_commands(words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Arguments of several `gamayun train`, which --then keeps apart."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    return tuple(map(tuple, commands)) if words else ()


def read_file(path: Path) -> dict[str, Any]:
    """Fields of a launch from a YAML file, or from a Python file's get_launch().

    Raises:
      UserError: no such file, or not of this form.
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
    values = {str(key).replace("-", "_"): value for key, value in data.items()}
    try:
        given: list[str] = values.get("commands", [])
        if not isinstance(given, list):
            raise TypeError("no list")
        commands = [shlex.split(words) for words in given]
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(
            f"--file {path}: commands must be a list of texts, each the arguments of "
            f"gamayun train, as a shell has them: {e}"
        ) from e
    return values | {"commands": commands}


def check(action: str, launch: Launch) -> None:
    """Raise UserError for a launch that cannot be, before anything is asked for."""
    if not launch.name:
        raise UserError("--name is missing: name what is created")
    if launch.backend not in ("gke", "hosts") and not launch.zone:
        raise UserError(
            "--zone is missing: give the zone of the TPU, e.g. --zone us-west4-a"
        )
    if launch.backend == "hosts" and not launch.hosts.strip(", "):
        raise UserError("--backend hosts: name the machines, e.g. --hosts node1,node2")
    if action in ("up", "run") and launch.backend in ("queued", "compute", "gke"):
        check_machines(launch)
    if action == "run" or (action == "up" and launch.backend == "gke"):
        check_commands(action, launch)
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
    if launch.type and launch.topology:
        b = launch.slice
        try:
            a = slice_of(launch.type, "")
        except UserError as e:
            raise UserError(
                f"--type {launch.type!r} is not known here: give --topology alone"
            ) from e
        if (a.kind, a.chips) != (b.kind, b.chips):
            raise UserError(
                f"--type {launch.type} is {a.chips} chips of {a.kind}, --topology "
                f"{launch.topology} is {b.chips} of {b.kind}: give one of the two"
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


def check_commands(action: str, launch: Launch) -> None:
    """Raise UserError where there is nothing to train, or nowhere to keep it."""
    if not launch.commands or not all(launch.commands):
        raise UserError(f"{action} has no config: end with -- CONFIG --workdir DIR")
    workdirs = [value_of("--workdir", words) for words in launch.commands]
    for words, workdir in zip(launch.commands, workdirs, strict=True):
        if not SHARED.match(workdir):
            raise UserError(
                f"--workdir {workdir!r} must be an absolute path on storage that all "
                "workers share, or gs://BUCKET/FOLDER: see docs/tpu.md"
            )
        if [w.rstrip("/") for w in workdirs].count(workdir.rstrip("/")) > 1:
            raise UserError(
                f"--workdir {workdir} is that of two commands: each needs its own"
            )
        model = value_of("--init-from", words)
        if model and not MODEL.match(model):
            raise UserError(
                f"--init-from {model!r} must be an absolute path on the workers, or an "
                "address such as gs://BUCKET/FOLDER"
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
