"""Compute Engine: a managed instance group of TPU VMs for each slice.

A workload policy makes a group's VMs one slice, an instance template says what they are
(docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice, and
/tpu/docs/spot-compute).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import QUOTA, Answer, LaunchError, Tool, say
from gamayun_jax.launch.vms import PORT, SshMachines, slice_names
from gamayun_jax.launch.worker_scripts import remote_command

GONE = {"STOPPING", "STOPPED", "TERMINATED", "SUSPENDING", "SUSPENDED"}
IMAGE_PROJECT = "ubuntu-os-accelerator-images"
IN_USE = re.compile(r"being used|in use|resourceInUse", re.IGNORECASE)
FLEX_HOURS = 168.0  # the most that flex-start grants


class InstanceGroups(SshMachines):
    """Groups NAME, or NAME-0, NAME-1, ... of several slices."""

    def __init__(self, launch: Launch):
        super().__init__(launch)
        self.gcloud = Tool("gcloud", launch.dry_run)
        self.everywhere = ["--quiet"]
        if launch.project:
            self.everywhere += ["--project", launch.project]
        self.place = ["--zone", launch.zone, *self.everywhere]
        self.names: list[str] = []  # of the VMs, slice by slice
        self.found = 0  # groups
        self.was_active = False

    def group(self, *words: str) -> Answer:
        managed = ("compute", "instance-groups", "managed")
        return self.gcloud(*managed, *words, *self.place)

    def groups(self) -> list[tuple[str, int]] | None:
        """Name and size of the groups that there are; None if it is not known."""
        name = self.launch.name
        answer = self.gcloud(
            "compute", "instance-groups", "managed", "list",
            "--filter", f"name~^{name}(-[0-9]+)?$", "--zones", self.launch.zone,
            "--format", "value(name,targetSize,instanceTemplate.basename())",
            *self.everywhere,
        )  # fmt: skip
        self.error = answer.complaint
        if answer.status:
            return None
        rows = (line.split() for line in answer.out.splitlines())
        # NAME-1 may be another launch's, whose template has that name.
        found = [(row[0], int(row[1])) for row in rows if row[2:] == [name]]
        return sorted(found, key=lambda row: (len(row[0]), row[0]))

    def state(self) -> str:
        groups = self.groups()
        if not groups:
            return "UNKNOWN" if groups is None else "MISSING"
        self.found, names, vms = len(groups), [], []
        for group, size in groups:
            answer = self.group(
                "list-instances", group,
                "--format", "json(instance,instanceStatus,currentAction,lastAttempt)",
            )  # fmt: skip
            self.error = answer.complaint
            if answer.status:
                return "UNKNOWN"
            found = sorted(
                json.loads(answer.out or "[]"), key=lambda vm: vm["instance"]
            )
            vms += found + [{}] * (size - len(found))
            names += [vm["instance"].rpartition("/")[2] for vm in found]
        self.names = names
        if vms and all(vm.get("instanceStatus") == "RUNNING" for vm in vms):
            self.was_active = True
            return "ACTIVE"
        if QUOTA.search(self.problems(vms)):
            self.error = self.problems(vms)
            return "FAILED"
        taken = any(
            vm.get("instanceStatus") in GONE and vm.get("currentAction") == "NONE"
            for vm in vms
        )
        return "SUSPENDED" if taken or self.was_active else "PROVISIONING"

    @staticmethod
    def problems(vms: list[dict[str, Any]]) -> str:
        """Codes and messages of what failed while VMs were created, a line each."""
        return "\n".join(
            f"{error.get('code', '')}: {error.get('message', '')}"
            for vm in vms
            for error in vm.get("lastAttempt", {}).get("errors", {}).get("errors", ())
        )

    def failure(self) -> str:
        return self.error

    def workers(self) -> list[str]:
        if self.launch.dry_run:
            hosts = (
                self.launch.slice.hosts
                if self.launch.type or self.launch.topology
                else 1
            )
            return [
                f"{group}-{i}"
                for group in slice_names(self.launch.name, self.launch.slices)
                for i in range(hosts)
            ]
        return self.names

    # --- making and deleting ------------------------------------------------------

    def prepare(self) -> None:
        """Delete what a former launch of this name left: it may be of other machines.

        Raises:
          LaunchError: another launch uses it, or that is refused.
        """
        for call in self.shared():
            answer = self.gcloud("compute", *call)
            if answer.status and IN_USE.search(answer.err):
                raise LaunchError(
                    1,
                    f"{self.launch.name} is taken by another launch, perhaps in "
                    f"another zone: give another --name ({answer.complaint})",
                )
            if answer.status and not answer.missing:
                raise self.refuse("replace what a former launch left of", answer)

    def create(self) -> None:
        launch, part = self.launch, self.launch.slice
        say(
            f"creating {part.hosts} x {part.machine} x {launch.slices} as {launch.name}"
        )
        policy = []
        if part.hosts > 1:
            self.make(
                "resource-policies", "create", "workload-policy", launch.name,
                "--type", "HIGH_THROUGHPUT", "--accelerator-topology", part.topology,
                "--region", launch.region, *self.everywhere,
            )  # fmt: skip
            where = f"projects/{self.project()}/regions/{launch.region}"
            # In bulk all VMs of a slice come at once, or none.
            policy = ["--workload-policy", f"{where}/resourcePolicies/{launch.name}"]
            policy += ["--target-size-policy-mode", "bulk"]
        self.make("instance-templates", "create", launch.name, *self.template_words())
        try:
            for group in slice_names(launch.name, launch.slices):
                self.make(
                    "instance-groups", "managed", "create", group,
                    "--size", str(part.hosts), "--template", launch.name, *policy,
                    "--default-action-on-vm-failure", "do-nothing", *self.place,
                )  # fmt: skip
        except LaunchError as e:
            say(f"{e}; deleting what was made")
            self.remove()
            raise

    def template_words(self) -> list[str]:
        """Flags of the instance template."""
        launch, part = self.launch, self.launch.slice
        image = launch.image or part.accelerator.image
        words = ["--machine-type", part.machine, "--maintenance-policy", "TERMINATE"]
        words += ["--image-family", image, "--image-project", IMAGE_PROJECT]
        words += ["--boot-disk-size", "200GB", "--scopes", "cloud-platform"]
        if part.kind == "tpu7x":
            words += ["--boot-disk-type", "hyperdisk-balanced"]
        if launch.spot:
            words += ["--provisioning-model", "SPOT"]
            words += ["--instance-termination-action", "STOP"]
        elif launch.flex:
            hours = min(launch.max_hours, FLEX_HOURS)
            words += ["--provisioning-model", "FLEX_START"]
            words += ["--max-run-duration", f"{math.floor(hours * 3600)}s"]
            words += ["--instance-termination-action", "DELETE"]
        elif launch.reservation:
            words += ["--provisioning-model", "RESERVATION_BOUND"]
            words += ["--instance-termination-action", "DELETE"]
            words += ["--reservation-affinity", "specific"]
            words += ["--reservation", launch.reservation]
        for flag, value in (
            ("--network", launch.network),
            ("--subnet", launch.subnet),
            ("--service-account", launch.service_account),
        ):
            words += [flag, value] if value else []
        if launch.subnet:
            words += ["--region", launch.region]
        return [*words, *self.everywhere]

    def make(self, *words: str) -> None:
        """Create something; LaunchError where it is refused."""
        answer = self.gcloud("compute", *words)
        if answer.status:
            self.refuse_quota(answer.err)
            raise self.refuse("create", answer)

    def project(self) -> str:
        """The project's name, which a policy's address needs."""
        if self.launch.project or self.launch.dry_run:
            return self.launch.project or "PROJECT"
        answer = self.gcloud("config", "get", "project")
        if answer.status or not answer.out.strip():
            raise self.refuse("find the project (give --project) of", answer)
        return answer.out.strip()

    def shared(self) -> list[tuple[str, ...]]:
        """Calls that delete what a launch's groups share."""
        name, region = self.launch.name, self.launch.region
        policy = ("resource-policies", "delete", name, "--region", region)
        return [
            ("instance-templates", "delete", name, *self.everywhere),
            (*policy, *self.everywhere),
        ]

    def remove(self) -> None:
        self.was_active = False
        groups = [group for group, _ in self.groups() or ()]
        if self.launch.dry_run:
            groups = slice_names(self.launch.name, self.launch.slices)
        calls = [
            ("instance-groups", "managed", "delete", group, *self.place)
            for group in groups
        ]
        for call in calls + self.shared():
            answer = self.gcloud("compute", *call)
            if answer.status and not answer.missing:
                raise self.refuse("delete (it may still cost)", answer)

    # --- the workers --------------------------------------------------------------

    def environment(self, number: int) -> str:
        """What libtpu must know of several slices."""
        slices = self.launch.slices if self.launch.dry_run else self.found
        if slices == 1:
            return ""
        machines = self.workers()
        return (
            f"MEGASCALE_COORDINATOR_ADDRESS={machines[0]}:{PORT + 1} "
            f"MEGASCALE_NUM_SLICES={slices} "
            f"MEGASCALE_SLICE_ID={number * slices // len(machines)}"
        )

    def run(self, machine: str, command: str) -> Answer:
        ssh = ("compute", "ssh", machine, "--command", command)
        return self.gcloud(*ssh, *self.place)

    def send(self, machine: str, path: str, target: str) -> Answer:
        return self.gcloud("compute", "scp", path, f"{machine}:{target}", *self.place)

    def follow(self, worker: int, script: str) -> int:
        command = remote_command(script, self.launch.name, ())
        ssh = ("compute", "ssh", self.machine(worker), "--command", command)
        return self.gcloud.follow(*ssh, *self.place)
