"""The JobSet of a launch: against the published schema, and by a played kubectl."""

import dataclasses
import json
import math
import subprocess
import time

import pytest
import yaml
from clouds import KUBECTL, TRAIN, Cloud, one_line

from gamayun_jax.launch import command, description, gke

FLAGS = [
    "--name", "pod", "--backend", "gke", "--topology", "v6e:4x4", "--image", "r/g:1",
]  # fmt: skip

# Excerpts, with all fields that are written here. JobSet: kubernetes-sigs/jobset,
# hack/python-sdk/swagger.json (jobset.v1alpha2.JobSetSpec, .FailurePolicy,
# .FailurePolicyRule, .ReplicatedJob) and config/components/crd. Job and pod: the Python
# client of Kubernetes, 37.0 (V1JobSpec, V1PodFailurePolicy, V1PodSpec, V1Container,
# V1Toleration).
TEXT, COUNT, FLAG = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
)
TEXTS = {"type": "object", "additionalProperties": TEXT}


def record(required=(), **fields):
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item):
    return {"type": "array", "items": item}


CONTAINER = record(
    ["name"], name=TEXT, image=TEXT, command=several(TEXT), args=several(TEXT),
    ports=several(record(["containerPort"], containerPort=COUNT, name=TEXT)),
    resources=record(requests={"type": "object"}, limits={"type": "object"}),
)  # fmt: skip
POD = record(
    ["containers"], containers=several(CONTAINER), nodeSelector=TEXTS,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]}, serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    tolerations=several(record(
        key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT,
        effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]})),
)  # fmt: skip
EXIT_CODES = record(
    ["operator", "values"], containerName=TEXT, operator={"enum": ["In", "NotIn"]},
    values=several(COUNT),
)  # fmt: skip
JOB = record(
    ["template"], parallelism=COUNT, completions=COUNT, backoffLimit=COUNT,
    completionMode={"enum": ["NonIndexed", "Indexed"]}, activeDeadlineSeconds=COUNT,
    podFailurePolicy=record(["rules"], rules=several(record(
        ["action"], onExitCodes=EXIT_CODES,
        action={"enum": ["FailIndex", "FailJob", "Ignore", "Count"]}))),
    template=record(spec=POD),
)  # fmt: skip
RULE = record(
    ["action", "name"], name={"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": [
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=several({"enum": [
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
        "MaxFailedIndexesExceeded", "PodFailurePolicy"]}),
)  # fmt: skip
JOBSET = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"},
    metadata=record(["name"], name=TEXT, namespace=TEXT, annotations=TEXTS),
    spec=record(
        suspend=FLAG, ttlSecondsAfterFinished=COUNT,
        failurePolicy=record(maxRestarts=COUNT, rules=several(RULE)),
        replicatedJobs=several(record(
            ["name", "template"], name=TEXT, replicas=COUNT,
            template=record(spec=JOB)))),
)  # fmt: skip


def made(*flags, train=TRAIN):
    action, launch = command.parse(["run", *FLAGS, *flags, *train])
    assert action == "run"
    return gke.manifest(launch)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--spot", "--slices", "2", "--service-account", "trainer", "--max-hours", "9"],
        ["--flex", "--delete-when-done"],
        ["--reservation", "mine"],
    ],
)
def test_the_jobset_is_of_the_published_schema(flags):
    jsonschema = pytest.importorskip("jsonschema")
    text = yaml.safe_dump(made(*flags))
    jsonschema.validate(yaml.safe_load(text), JOBSET)


def test_what_the_jobset_asks_for(tmp_path):
    whole = made("--spot", "--slices", "2", "--max-hours", "9", "--max-restarts", "7")
    spec = whole["spec"]
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert replicated["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4  # VMs of 4 chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["image"] == "r/g:1"
    # Input that is refused is not tried again.
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 6]
    assert (
        "PodFailurePolicy" in spec["failurePolicy"]["rules"][0]["onJobFailureReasons"]
    )
    seventh = description.Launch(topology="tpu7x:2x2x1", image="i")
    selector = gke.manifest(seventh)["spec"]["replicatedJobs"][0]["template"]["spec"]
    selector = selector["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu7x"
    assert seventh.budget_hours == math.inf


@pytest.mark.parametrize(
    ("first", "status", "said"),
    [("exit 0", 0, "one two"), ("exit 2", 2, "one"), ("wait", 3, "one")],
)
def test_a_pod_runs_its_commands_and_hands_sigterm_on(tmp_path, first, status, said):
    """In a real bash, with a program of the name gamayun."""
    program = tmp_path / "gamayun"
    waits = "trap 'exit 3' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"
    program.write_text(
        f"#!/bin/bash\necho $2 >> {tmp_path}/said\n"
        f"if [ $2 = one ]; then {waits if first == 'wait' else first}; fi\n"
    )
    program.chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={tmp_path}:$PATH\n")
    launch = description.Launch(setup=str(setup))
    launch = dataclasses.replace(launch, commands=(("one",), ("two",)))
    assert in_bash(gke.script(launch, math.inf)) == status
    assert (tmp_path / "said").read_text().split() == said.split()


def in_bash(script):
    return subprocess.run(["bash", "-ec", script], timeout=20).returncode


def test_the_deadline_is_of_all_restarts_together(tmp_path):
    """The trainer gets one SIGTERM, saves and ends; after it nothing starts."""
    program = tmp_path / "gamayun"
    program.write_text(
        f"#!/bin/bash\ntrap 'echo term >> {tmp_path}/said; sleep 0.5; exit 3' TERM\n"
        f"echo start >> {tmp_path}/said\nwhile :; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={tmp_path}:$PATH\n")
    launch = description.Launch(setup=str(setup), commands=(("one",), ("two",)))
    deadline = time.time() + 2
    for _ in range(2):  # the second attempt is too late
        assert in_bash(gke.script(launch, deadline)) == 6
    assert (tmp_path / "said").read_text().split() == ["start", "term"]
    program.write_text("#!/bin/bash\nexit 1\n")
    assert in_bash(gke.script(launch, time.time() + 3600)) == 1


@pytest.fixture
def cluster(tmp_path):
    return Cloud(tmp_path, kubectl=KUBECTL)


def test_it_is_applied_and_followed_to_its_end(cluster):
    cluster.play(
        status=[{"restarts": 0}, {"restarts": 1}, {"terminalState": "Completed"}]
    )
    done = cluster("run", *FLAGS, "--context", "c", "--poll", "0", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "running, 1 restarts" in done.stderr
    applied = yaml.safe_load((cluster.folder / "applied").read_text())
    assert applied["metadata"]["name"] == "pod"
    assert all(call[-4:-2] != [] for call in cluster.calls("--context", "c"))


def test_failed_pods_show_their_logs(cluster):
    cluster.play(status=[{"terminalState": "Failed"}], codes=[0, 2, 3])
    done = cluster("run", *FLAGS, "--poll", "0", *TRAIN)
    assert "no field 'sed' in pod-slice-0-1-x" in one_line(done, 2)
    assert len(cluster.calls("logs")) == 1
    cluster.play(status=[{"terminalState": "Failed"}], codes=[1])
    assert "failed, after its restarts" in one_line(
        cluster("run", *FLAGS, "--poll", "0", *TRAIN), 5
    )


def test_hours_count_from_the_first_run(cluster):
    flags = [*FLAGS, "--max-hours", "2", "--poll", "0"]
    cluster.play(status=[*["suspended"] * 3, {"terminalState": "Failed"}], codes=[])
    first = time.time()
    assert cluster("run", *flags, *TRAIN).returncode == 3
    text = (cluster.folder / "applied").read_text()
    deadline = float(yaml.safe_load(text)["metadata"]["annotations"][gke.DEADLINE])
    assert deadline == pytest.approx(first + 7200, abs=20)
    assert cluster("run", *flags, *TRAIN).returncode == 3  # once more
    assert (cluster.folder / "applied").read_text() == text
    over = text.replace(f"{deadline:.0f}", f"{first - 1:.0f}")
    (cluster.folder / "applied").write_text(over)
    assert "the hours are over" in one_line(cluster("run", *flags, *TRAIN), 6)


def test_stop_suspends_and_run_goes_on(cluster):
    cluster.play(status=["suspended"])
    done = cluster("run", *FLAGS, "--poll", "0", *TRAIN)
    assert "stopped as asked" in one_line(done, 3)
    assert cluster("stop", *FLAGS[:4]).returncode == 0
    [patch] = cluster.calls("patch")
    assert json.loads(patch[patch.index("--patch") + 1]) == {"spec": {"suspend": True}}
    assert (
        yaml.safe_load((cluster.folder / "applied").read_text())["spec"]["suspend"]
        is False
    )
    assert cluster("delete", *FLAGS[:4]).returncode == 0


def test_a_cluster_that_refuses_or_has_none(cluster):
    cluster.play(refuse="no matches for kind JobSet", status=[])
    assert "no matches for kind" in one_line(cluster("run", *FLAGS, *TRAIN), 1)
    assert "there is no JobSet pod" in one_line(cluster("status", *FLAGS[:4]), 2)


def test_a_dry_run_prints_the_yaml(cluster):
    done = cluster("run", *FLAGS, "--dry-run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert not cluster.calls()
    assert "kubectl 'apply' '--filename' '-'" in done.stdout
    text = done.stdout.split("<< 'END'\n")[1].split("\nEND")[0]
    assert yaml.safe_load(text)["kind"] == "JobSet"
    assert "complete" not in done.stderr
    printed = cluster("up", *FLAGS, *TRAIN).stdout
    assert yaml.safe_load(printed)["kind"] == "JobSet"
    assert "up has no config" in one_line(cluster("up", *FLAGS), 2)
