"""Google Kubernetes Engine: a JobSet, whose controller restarts what is preempted.

jobset.sigs.k8s.io, v1alpha2; cloud.google.com/kubernetes-engine/docs/how-to/tpus. Nodes
are the cluster's: a node pool of the slice's topology, or its autoprovisioning.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import LaunchError, Tool, say

API = "jobset.x-k8s.io/v1alpha2"
GRACE = 600  # seconds to save in; of spot nodes the cloud gives less
SHOWN = 40  # lines of a failed pod's log
DEADLINE = "gamayun-jax/deadline"  # annotation: seconds since 1970
# A JobSet's own timers begin anew with each restart, so the pods watch the clock. One
# SIGTERM reaches the trainer: a second one would end it before it has saved. `wait`
# ends when the trap has run, the trainer later.
SCRIPT = """\
deadline={deadline}
trainer= stopping=
end() {{
  trap '' TERM
  stopping=1
  if [ -n "$trainer" ]; then kill -TERM "$trainer" 2> /dev/null || true; fi
}}
trap end TERM
check_deadline() {{
  if [ -n "$deadline" ] && [ "$(date +%s)" -ge "$deadline" ]; then exit 6; fi
}}
run() {{
  check_deadline
  if [ -n "$stopping" ]; then exit 3; fi
  "$@" &
  trainer=$!
  if [ -n "$stopping" ]; then kill -TERM "$trainer" 2> /dev/null || true; fi
  timer=
  if [ -n "$deadline" ]; then
    (
      sleep "$((deadline - $(date +%s)))"
      kill -TERM "$$"
      sleep {grace}
      kill -KILL "$trainer"
    ) &
    timer=$!
  fi
  status=0
  wait "$trainer" || status=$?
  if [ -n "$stopping" ]; then
    status=0
    wait "$trainer" || status=$?
  fi
  if [ -n "$timer" ]; then kill "$timer" 2> /dev/null || true; fi
  case $status in
    0) ;;
    2) exit 2 ;;
    *) check_deadline; exit "$status" ;;
  esac
}}
"""


def manifest(launch: Launch, deadline: float = math.inf) -> dict[str, Any]:
    """The JobSet of a launch, as plain data: one Job for each slice, a pod a VM.

    A pod whose trainer refuses its input (exit 2) or meets the deadline (6) fails the
    JobSet at once; whatever else ends one restarts all of them, which go on from what
    was saved.

    Args:
      deadline: seconds since 1970; at this time the trainers save and end for good.
    """
    part = launch.slice
    codes = {"containerName": "gamayun", "operator": "In", "values": [2, 6]}
    job: dict[str, Any] = {
        "parallelism": part.hosts,
        "completions": part.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod_spec(launch, deadline)},
    }
    slices = {"name": "slice", "replicas": launch.slices, "template": {"spec": job}}
    for_good = {
        "name": "refusedInputOrDeadline",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    spec: dict[str, Any] = {
        "suspend": False,  # `stop` suspends it, and to apply it again goes on
        "failurePolicy": {"maxRestarts": launch.max_restarts, "rules": [for_good]},
        "replicatedJobs": [slices],
    }
    if launch.delete_when_done:
        spec["ttlSecondsAfterFinished"] = 300
    # A slice has a node pool of its own.
    annotations = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    if deadline < math.inf:
        annotations[DEADLINE] = f"{deadline:.0f}"
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


def pod_spec(launch: Launch, deadline: float) -> dict[str, Any]:
    """A pod: one VM of a slice."""
    part = launch.slice
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
                "command": ["bash", "-ec", script(launch, deadline)],
                "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
                "resources": {"requests": dict(chips), "limits": dict(chips)},
            }
        ],
    }
    if launch.service_account:
        pod["serviceAccountName"] = launch.service_account
    return pod


def script(launch: Launch, deadline: float) -> str:
    """What a pod runs: the setup, then the commands; SIGTERM reaches the trainer."""
    setup = Path(launch.setup).read_text().rstrip() + "\n" if launch.setup else ""
    shown = f"{deadline:.0f}" if deadline < math.inf else ""
    text = setup + SCRIPT.format(deadline=shown, grace=GRACE)
    for words in launch.commands:
        text += shlex.join(["run", "gamayun", "train", *words, "--distributed"]) + "\n"
    return text


class JobSets:
    """The launch's JobSet in a cluster, by kubectl."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.kubectl = Tool("kubectl", launch.dry_run)
        self.place = ["--namespace", launch.namespace]
        if launch.context:
            self.place += ["--context", launch.context]

    costs = ""  # nodes are the cluster's

    def up(self) -> None:
        """Print the JobSet, for `kubectl apply --filename -`."""
        print(self.text(self.deadline({})), end="")

    def text(self, deadline: float) -> str:
        """The JobSet as YAML."""
        import yaml

        jobset = manifest(self.launch, deadline)
        return yaml.safe_dump(jobset, sort_keys=False, width=88)

    def deadline(self, jobset: dict[str, Any]) -> float:
        """Of a JobSet that exists, else of one made now: seconds since 1970."""
        if jobset:
            annotations = jobset["metadata"].get("annotations", {})
            return float(annotations.get(DEADLINE, math.inf))
        return time.time() + self.launch.budget_hours * 3600

    def run(self) -> None:
        """Apply the JobSet and follow it to its end.

        Raises:
          LaunchError: refused, failed, out of hours, or stopped.
        """
        launch = self.launch
        deadline = self.deadline(self.get())
        text = self.text(deadline)
        answer = self.kubectl("apply", "--filename", "-", *self.place, given=text)
        if answer.status:
            raise LaunchError(
                1,
                f"kubectl refuses {launch.name}: {answer.complaint}; to change what a "
                "JobSet runs, `delete` it before",
            )
        if launch.dry_run:
            say("a dry run: nothing was called")
            return
        say(f"{launch.name} is applied; `logs` shows worker 0's log")
        if deadline < math.inf:
            say(f"it ends by {time.strftime('%F %T %Z', time.localtime(deadline))}")
        shown = ""
        while True:
            state = self.state()
            if state == "Completed":
                say("the run is complete")
                return
            if state == "Failed":
                self.failed(over=time.time() >= deadline)
            if state == "Suspended":
                raise LaunchError(3, "stopped as asked; the same command goes on")
            if state == "Missing":
                raise LaunchError(
                    1,
                    f"the JobSet {launch.name} is gone: it ended and deleted itself "
                    "(--delete-when-done), or somebody did it; the run folder tells",
                )
            if state != shown:
                say(f"{launch.name}: {state}")
            shown = state
            time.sleep(launch.poll)

    def get(self) -> dict[str, Any]:
        """The JobSet as the cluster has it; empty if it has none.

        Raises:
          LaunchError: the cluster does not answer.
        """
        name = self.launch.name
        answer = self.kubectl("get", "jobset", name, *self.place, "--output", "json")
        if answer.status and not answer.missing:
            raise LaunchError(1, f"could not ask for {name}: {answer.complaint}")
        return json.loads(answer.out or "{}")

    def state(self) -> str:
        """Completed, Failed, Suspended, Missing, or how many restarts there were."""
        try:
            jobset = self.get()
        except LaunchError as e:  # for a while, perhaps
            return str(e)
        status = jobset.get("status", {})
        if not jobset or status.get("terminalState"):
            return status.get("terminalState", "Missing")
        if jobset["spec"].get("suspend"):
            return "Suspended"
        return f"running, {status.get('restarts', 0)} restarts"

    def failed(self, over: bool) -> None:
        """Show the ends of the failed pods' logs, whichever they are, and raise.

        Args:
          over: whether the deadline is.

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
                if ended and ended["exitCode"] not in (0, 3, 6):
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
        if over:
            raise LaunchError(
                6, "the hours are over: the run is saved; `delete` and run again go on"
            )
        raise LaunchError(
            5,
            f"{self.launch.name} failed, after its restarts: see above, or `kubectl "
            f"describe jobset {self.launch.name}`; `delete` it before it is run again",
        )

    def logs(self) -> int:
        """Follow the log of one pod of the first slice."""
        job = f"job-name={self.launch.name}-slice-0"
        which = f"batch.kubernetes.io/job-completion-index={self.launch.worker}"
        words = ("logs", "--follow", "--tail", "200", "--selector", f"{job},{which}")
        return self.kubectl.follow(*words, *self.place)

    def status(self) -> None:
        """Print the state of the JobSet and of its pods."""
        if not self.get() and not self.launch.dry_run:
            raise LaunchError(
                2,
                f"there is no JobSet {self.launch.name}: apply it by run, or check "
                "--context and --namespace",
            )
        print(f"{self.launch.name}: {self.state()}")
        which = f"jobset.sigs.k8s.io/jobset-name={self.launch.name}"
        self.kubectl.follow("get", "pods", "--selector", which, *self.place)

    def stop(self) -> None:
        """Let the trainers save and end: `run` goes on."""
        words = ("patch", "jobset", self.launch.name, "--type", "merge", "--patch")
        change = json.dumps({"spec": {"suspend": True}})
        answer = self.kubectl(*words, change, *self.place)
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
