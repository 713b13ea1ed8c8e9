"""Google Kubernetes Engine: a JobSet, whose controller restarts what is preempted.

jobset.sigs.k8s.io, v1alpha2; cloud.google.com/kubernetes-engine/docs/how-to/tpus. Nodes
are the cluster's: a node pool of the slice's topology, or its autoprovisioning.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from typing import Any

from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import LaunchError, Tool, say

API = "jobset.x-k8s.io/v1alpha2"
GRACE = 600  # seconds to save in; of spot nodes the cloud gives less
SHOWN = 40  # lines of a failed pod's log


def manifest(launch: Launch) -> dict[str, Any]:
    """The JobSet of a launch, as plain data: one Job for each slice, a pod a VM.

    A pod whose trainer refuses its input (exit 2) fails the JobSet at once; whatever
    else ends one restarts all of them, which go on from what was saved.
    """
    part, pod = launch.slice, pod_spec(launch)
    job: dict[str, Any] = {
        "parallelism": part.hosts,
        "completions": part.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "gamayun",
                        "operator": "In",
                        "values": [2],
                    },
                }
            ]
        },
        "template": {"spec": pod},
    }
    if launch.budget_hours < math.inf:
        job["activeDeadlineSeconds"] = math.floor(launch.budget_hours * 3600)
    spec: dict[str, Any] = {
        "suspend": False,  # `stop` suspends it, and to apply it again goes on
        "failurePolicy": {
            "maxRestarts": launch.max_restarts,
            "rules": [
                {
                    "name": "refusedInputOrBudget",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                }
            ],
        },
        "replicatedJobs": [
            {"name": "slice", "replicas": launch.slices, "template": {"spec": job}}
        ],
    }
    if launch.delete_when_done:
        spec["ttlSecondsAfterFinished"] = 300
    # A slice has a node pool of its own.
    annotations = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    return {
        "apiVersion": API,
        "kind": "JobSet",
        "metadata": {
            "name": launch.name,
            "namespace": launch.namespace,
            "annotations": annotations,
        },
        "spec": spec,
    }


def pod_spec(launch: Launch) -> dict[str, Any]:
    """A pod: one VM of a slice."""
    part = launch.slice
    commands = [
        shlex.join(["gamayun", "train", *words, "--distributed"])
        for words in launch.commands
    ]
    chips = {"google.com/tpu": part.chips_per_host}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": part.accelerator.gke,
        "cloud.google.com/gke-tpu-topology": part.topology,
    }
    if launch.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if launch.flex:
        selector["cloud.google.com/gke-flex-start"] = "true"
    if launch.reservation:
        selector["cloud.google.com/reservation-name"] = launch.reservation
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "nodeSelector": selector,
        # TPU nodes, and spot ones, take no pods that do not ask for them.
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "cloud.google.com/gke-spot", "operator": "Exists"},
        ],
        "terminationGracePeriodSeconds": GRACE,
        "containers": [
            {
                "name": "gamayun",
                "image": launch.image,
                "command": ["bash", "-ec", script(launch, commands)],
                "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
                "resources": {"requests": dict(chips), "limits": dict(chips)},
            }
        ],
    }
    if launch.service_account:
        pod["serviceAccountName"] = launch.service_account
    return pod


def script(launch: Launch, commands: list[str]) -> str:
    """What a pod runs: the setup, then the commands; SIGTERM reaches the trainer."""
    lines = []
    if launch.setup:
        with open(launch.setup) as file:
            lines.append(file.read().rstrip())
    for command in commands:
        lines += [f"{command} &", "trainer=$!", "trap 'kill -TERM $trainer' TERM"]
        # `wait` ends when the trap has run, the trainer later.
        lines += ["status=0", "wait $trainer || status=$?"]
        lines += ["if kill -0 $trainer 2> /dev/null; then"]
        lines += ["  status=0", "  wait $trainer || status=$?", "fi"]
        lines += ["if [ $status != 0 ]; then exit $status; fi"]
    return "\n".join(lines) + "\n"


class JobSets:
    """The launch's JobSet in a cluster, by kubectl."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.kubectl = Tool("kubectl", launch.dry_run)
        self.place = ["--namespace", launch.namespace]
        if launch.context:
            self.place += ["--context", launch.context]

    def up(self) -> None:
        """Print the JobSet, for `kubectl apply --filename -`."""
        print(self.text(), end="")

    def text(self) -> str:
        """The JobSet as YAML."""
        import yaml

        return yaml.safe_dump(manifest(self.launch), sort_keys=False, width=88)

    def run(self) -> None:
        """Apply the JobSet and follow it to its end.

        Raises:
          LaunchError: refused, failed, or stopped.
        """
        answer = self.kubectl(
            "apply", "--filename", "-", *self.place, given=self.text()
        )
        if answer.status:
            raise LaunchError(
                1, f"kubectl refuses {self.launch.name}: {answer.complaint}"
            )
        say(f"{self.launch.name} is applied; `logs` shows worker 0's log")
        shown = ""
        while True:
            state = self.state()
            if self.launch.dry_run or state == "Completed":
                say("the run is complete")
                return
            if state == "Failed":
                self.failed()
            if state == "Suspended":
                raise LaunchError(3, "stopped as asked; the same command goes on")
            if state != shown:
                say(f"{self.launch.name}: {state}")
            shown = state
            time.sleep(self.launch.poll)

    def state(self) -> str:
        """Completed, Failed, Suspended, or how many restarts there were."""
        answer = self.kubectl(
            "get", "jobset", self.launch.name, *self.place, "--output", "json"
        )
        if self.launch.dry_run:
            return "not asked"
        if answer.missing:
            raise LaunchError(
                2,
                f"there is no JobSet {self.launch.name}: apply it by run, or check "
                "--context and --namespace",
            )
        if answer.status:
            return f"no answer: {answer.complaint}"
        jobset = json.loads(answer.out)
        status = jobset.get("status", {})
        if status.get("terminalState"):
            return status["terminalState"]
        if jobset["spec"].get("suspend"):
            return "Suspended"
        return f"running, {status.get('restarts', 0)} restarts"

    def failed(self) -> None:
        """Show the ends of the failed pods' logs, whichever they are, and raise.

        Raises:
          LaunchError: always; 2 where the trainer refused its input.
        """
        which = f"jobset.sigs.k8s.io/jobset-name={self.launch.name}"
        answer = self.kubectl(
            "get", "pods", "--selector", which, *self.place, "--output", "json"
        )
        pods = json.loads(answer.out)["items"] if not answer.status else []
        codes = {}
        for pod in pods:
            for container in pod.get("status", {}).get("containerStatuses", ()):
                ended = container.get("state", {}).get("terminated")
                if ended and ended["exitCode"] not in (0, 3):
                    codes[pod["metadata"]["name"]] = ended["exitCode"]
        last = ""
        for name in codes:
            log = self.kubectl("logs", name, "--tail", str(SHOWN), *self.place).out
            say(f"the end of the log of {name} (exit {codes[name]}):")
            print(log, end="")
            last = next(
                (x for x in log.splitlines() if x.startswith("gamayun: ")), last
            )
        if 2 in codes.values():
            raise LaunchError(
                2, f"gamayun train refused its input: {last or 'see above'}"
            )
        raise LaunchError(
            5,
            f"{self.launch.name} failed, after its restarts or its hours: see above, "
            f"or `kubectl describe jobset {self.launch.name}`",
        )

    def logs(self) -> int:
        """Follow the log of one pod of the first slice."""
        job = f"job/{self.launch.name}-slice-0"
        which = f"batch.kubernetes.io/job-completion-index={self.launch.worker}"
        words = ("logs", "--follow", "--selector", f"job-name={job[4:]},{which}")
        return self.kubectl.follow(*words, *self.place)

    def status(self) -> None:
        """Print the state of the JobSet and of its pods."""
        print(f"{self.launch.name}: {self.state()}")
        which = f"jobset.sigs.k8s.io/jobset-name={self.launch.name}"
        self.kubectl.follow("get", "pods", "--selector", which, *self.place)

    def stop(self) -> None:
        """Let the trainers save and end: `run` goes on."""
        self.patch({"spec": {"suspend": True}})

    def patch(self, change: dict[str, Any]) -> None:
        words = ("patch", "jobset", self.launch.name, "--type", "merge", "--patch")
        answer = self.kubectl(*words, json.dumps(change), *self.place)
        if answer.status:
            raise LaunchError(
                1, f"could not stop {self.launch.name}: {answer.complaint}"
            )

    def delete(self) -> None:
        """Delete the JobSet; the nodes are the cluster's to take away."""
        answer = self.kubectl("delete", "jobset", self.launch.name, *self.place)
        if answer.status and not answer.missing:
            raise LaunchError(
                1, f"could not delete {self.launch.name}: {answer.complaint}"
            )
        say(f"{self.launch.name} is deleted; its nodes cost until their pool is empty")
