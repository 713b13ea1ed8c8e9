"""Machines that are reached by ssh: of queued resources, of TPU VMs, or any others."""

from __future__ import annotations

import abc
import concurrent.futures
import re
from collections.abc import Callable

from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import QUOTA, Answer, LaunchError, Tool, say
from gamayun_jax.launch.worker_scripts import remote_command

AT_ONCE = 32  # connections by ssh
PORT = 8476  # of JAX's coordinator, and of MegaScale's one after it


class Machines(abc.ABC):
    """The machines of a launch: whether they are there, and how to reach them.

    States are those of queued resources: ACTIVE, MISSING, FAILED (why: `failure`),
    SUSPENDED (taken away, at least in part), UNKNOWN (`error`), or others to wait for.
    """

    def __init__(self, launch: Launch):
        self.launch = launch
        self.error = ""  # of the last call that failed

    @abc.abstractmethod
    def state(self) -> str:
        """What has become of the machines."""

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Take away what would be in the way of `create`."""

    @abc.abstractmethod
    def create(self) -> None:
        """Ask for them; LaunchError where that is refused."""

    @abc.abstractmethod
    def remove(self) -> None:
        """Delete all that `create` makes, or what is left of it."""

    def failure(self) -> str:
        """Why they are FAILED."""
        return ""

    def count_slices(self) -> None:  # noqa: B027 - most have one, or know
        """Learn from the cloud how many slices there are."""

    @abc.abstractmethod
    def copy(self, path: str, target: str) -> Answer:
        """Copy a file into the home folder of every worker."""

    @abc.abstractmethod
    def on_all(self, script: str, *arguments: str) -> Answer:
        """Run a script on every worker; fails if one does."""

    @abc.abstractmethod
    def start(self, script: str, *arguments: str) -> Answer:
        """`on_all`, with each worker's environment and way to join before the rest."""

    @abc.abstractmethod
    def on_worker(self, worker: int, script: str, *arguments: str) -> Answer:
        """Run a script on one worker of the first slice."""

    @abc.abstractmethod
    def follow(self, worker: int, script: str) -> int:
        """The same, with its output on the screen."""

    def refuse_quota(self, text: str) -> None:
        """Raise LaunchError where a text says that the quota is too small."""
        if QUOTA.search(text):
            what = self.launch.type or self.launch.topology
            line = next(x for x in text.splitlines() if QUOTA.search(x)).strip()
            raise LaunchError(
                4,
                f"quota refused for {what} x {self.launch.slices} in "
                f"{self.launch.zone}: {line}; ask for more at IAM & Admin > Quotas, or "
                "take a smaller --type, another --zone or --spot",
            )

    def refuse(self, what: str, answer: Answer) -> LaunchError:
        """The error for a call that failed."""
        where = f"{self.launch.name} in {self.launch.zone}"
        return LaunchError(1, f"could not {what} {where}: {answer.complaint}")


class QueuedResources(Machines):
    """TPU VMs by a queued resource of the TPU API: all slices are one resource."""

    def __init__(self, launch: Launch):
        super().__init__(launch)
        self.gcloud = Tool("gcloud", launch.dry_run)
        self.slices = launch.slices
        self.place = ["--zone", launch.zone, "--quiet"]
        if launch.project:
            self.place += ["--project", launch.project]

    def resource(self, *words: str) -> Answer:
        tpus = ("compute", "tpus", "queued-resources")
        return self.gcloud(*tpus, *words, *self.place)

    def describe(self, field: str) -> Answer:
        return self.resource(
            "describe", self.launch.name, "--format", f"value({field})"
        )

    def state(self) -> str:
        answer = self.describe("state.state")
        self.error = answer.complaint
        if self.launch.dry_run or answer.missing:
            return "MISSING"
        return "UNKNOWN" if answer.status else "".join(answer.out.split())

    def failure(self) -> str:
        answer = self.describe("state.failedData.error.message")
        return answer.out + answer.err

    def count_slices(self) -> None:
        answer = self.describe("tpu.nodeSpec[0].multisliceParams.nodeCount")
        if re.fullmatch(r"[1-9]\d*", answer.out.strip()):
            self.slices = int(answer.out)

    @property
    def nodes(self) -> list[str]:
        """Names of the slices, as `create` gives them."""
        return slice_names(self.launch.name, self.slices)

    def create(self) -> None:
        launch = self.launch
        type_ = launch.type
        if not type_:
            part = launch.slice
            type_ = f"{part.accelerator.type}-{part.chips * part.accelerator.per_type}"
        version = launch.version or launch.slice.accelerator.version
        words = ["create", launch.name, "--accelerator-type", type_]
        words += ["--runtime-version", version]
        if self.slices == 1:
            words += ["--node-id", launch.name]
        else:
            words += ["--node-count", str(self.slices), "--node-prefix", launch.name]
        for flag, value in (
            ("--spot", launch.spot),
            ("--reserved", bool(launch.reservation)),
            ("--network", launch.network),
            ("--subnetwork", launch.subnet),
            ("--service-account", launch.service_account),
        ):
            words += [flag] if value is True else [flag, value] if value else []
        say(f"creating {type_} x {self.slices} as {launch.name} in {launch.zone}")
        answer = self.resource(*words, "--async")
        if answer.status:
            self.refuse_quota(answer.err)
            raise self.refuse("create", answer)

    def remove(self) -> None:
        answer = self.resource("delete", self.launch.name, "--force")
        if answer.status and not answer.missing:
            raise self.refuse("delete (it may still cost)", answer)

    # --- the workers --------------------------------------------------------------

    def ssh_words(self, node: str, worker: str, command: str) -> list[str]:
        words = ["compute", "tpus", "tpu-vm", "ssh", node, "--worker", worker]
        return [*words, *self.place, "--command", command]

    def copy(self, path: str, target: str) -> Answer:
        scp = ("compute", "tpus", "tpu-vm", "scp", path)
        to_all = ("--worker", "all", *self.place)
        return joined([self.gcloud(*scp, f"{n}:{target}", *to_all) for n in self.nodes])

    def on_all(self, script: str, *arguments: str) -> Answer:
        command = remote_command(script, self.launch.name, arguments)
        return joined(
            [self.gcloud(*self.ssh_words(n, "all", command)) for n in self.nodes]
        )

    def start(self, script: str, *arguments: str) -> Answer:
        return self.on_all(script, "", "--distributed", *arguments)

    def on_worker(self, worker: int, script: str, *arguments: str) -> Answer:
        command = remote_command(script, self.launch.name, arguments)
        return self.gcloud(*self.ssh_words(self.nodes[0], str(worker), command))

    def follow(self, worker: int, script: str) -> int:
        command = remote_command(script, self.launch.name, ())
        words = self.ssh_words(self.nodes[0], str(worker), command)
        return self.gcloud.follow(*words)


class TpuVm(QueuedResources):
    """A TPU VM that exists, however it was made: it is used, and deleted if asked."""

    def state(self) -> str:
        vm = ("compute", "tpus", "tpu-vm", "describe", self.launch.name)
        answer = self.gcloud(*vm, "--format", "value(state)", *self.place)
        self.error = answer.complaint
        if self.launch.dry_run:
            return "ACTIVE"
        if answer.status:
            return "MISSING" if answer.missing else "UNKNOWN"
        state = answer.out.strip()
        return {"READY": "ACTIVE", "PREEMPTED": "MISSING"}.get(state, state)

    def count_slices(self) -> None:
        """One VM or slice, always."""

    def create(self) -> None:
        raise LaunchError(
            2,
            f"there is no TPU VM {self.launch.name} in {self.launch.zone}: check "
            "--name and --zone, or leave out --backend vm to create it",
        )

    def remove(self) -> None:
        words = ("compute", "tpus", "tpu-vm", "delete", self.launch.name)
        answer = self.gcloud(*words, *self.place)
        if answer.status and not answer.missing:
            raise self.refuse("delete (it may still cost)", answer)


class SshMachines(Machines):
    """Workers that are called one by one, and told how to find each other."""

    called = False  # any of them

    @abc.abstractmethod
    def workers(self) -> list[str]:
        """Names of all machines, slice by slice."""

    @abc.abstractmethod
    def run(self, machine: str, command: str) -> Answer:
        """Run a command on a machine."""

    @abc.abstractmethod
    def send(self, machine: str, path: str, target: str) -> Answer:
        """Copy a file into a machine's home folder."""

    def environment(self, number: int) -> str:
        """NAME=VALUE words of a worker's environment."""
        return ""

    def join(self, number: int) -> str:
        """How a worker joins the others, as arguments of `gamayun train`."""
        machines = self.workers()
        if len(machines) == 1:
            return ""
        first = machines[0].rpartition("@")[2]
        return (
            f"--coordinator {first}:{PORT} --num-processes {len(machines)} "
            f"--process-id {number}"
        )

    def each(self, do: Callable[[int, str], Answer]) -> Answer:
        """Do something with the number and name of every machine, several at once."""
        machines = self.workers()
        # The first call may make a key for ssh and hand it to the cloud: alone.
        at_once = 1 if self.launch.dry_run or not self.called else AT_ONCE
        answers = [do(0, machines[0])] if machines and not self.called else []
        self.called = True
        rest = range(len(answers), len(machines))
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            return joined([*answers, *pool.map(do, rest, machines[len(answers) :])])

    def copy(self, path: str, target: str) -> Answer:
        return self.each(lambda _, machine: self.send(machine, path, target))

    def on_all(self, script: str, *arguments: str) -> Answer:
        command = remote_command(script, self.launch.name, arguments)
        return self.each(lambda _, machine: self.run(machine, command))

    def start(self, script: str, *arguments: str) -> Answer:
        def one(number: int, machine: str) -> Answer:
            own = (self.environment(number), self.join(number), *arguments)
            return self.run(machine, remote_command(script, self.launch.name, own))

        return self.each(one)

    def on_worker(self, worker: int, script: str, *arguments: str) -> Answer:
        command = remote_command(script, self.launch.name, arguments)
        return self.run(self.machine(worker), command)

    def machine(self, worker: int) -> str:
        """The name of a worker; LaunchError where there are not so many."""
        machines = self.workers()
        if worker >= len(machines):
            raise LaunchError(
                2, f"--worker {worker}: there are {len(machines)} of them"
            )
        return machines[worker]


class Hosts(SshMachines):
    """Machines that are there and stay: GPU hosts, TPU VMs by their address."""

    def __init__(self, launch: Launch):
        super().__init__(launch)
        self.ssh = Tool("ssh", launch.dry_run)
        self.scp = Tool("scp", launch.dry_run)

    def workers(self) -> list[str]:
        return [name.strip() for name in self.launch.hosts.split(",") if name.strip()]

    def state(self) -> str:
        return "ACTIVE"

    def create(self) -> None:
        """Nothing: they are there."""

    def remove(self) -> None:
        raise LaunchError(2, "--hosts are not created here, so they are not deleted")

    def run(self, machine: str, command: str) -> Answer:
        return self.ssh("-o", "BatchMode=yes", machine, command)

    def send(self, machine: str, path: str, target: str) -> Answer:
        return self.scp("-q", "-o", "BatchMode=yes", path, f"{machine}:{target}")

    def follow(self, worker: int, script: str) -> int:
        command = remote_command(script, self.launch.name, ())
        return self.ssh.follow(self.machine(worker), command)


def slice_names(name: str, slices: int) -> list[str]:
    """NAME, or NAME-0, NAME-1, ... of several."""
    return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]


def joined(answers: list[Answer]) -> Answer:
    """Several answers as one, which fails if one of them does."""
    status = next((a.status for a in answers if a.status), 0)
    return Answer(
        status, "".join(a.out for a in answers), "".join(a.err for a in answers)
    )
