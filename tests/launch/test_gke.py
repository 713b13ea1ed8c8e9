"""The JobSet of a launch: against the published schema, and by a played kubectl."""

import json
import math
import subprocess

import pytest
import yaml
from test_launch_tpu import TRAIN, Cloud, one_line

from gamayun_jax.launch import description, gke

FLAGS = [
    "--name", "pod", "--backend", "gke", "--topology", "v6e:4x4", "--image", "r/g:1",
]  # fmt: skip

KUBECTL = """#!{python} -S
import json, sys
from pathlib import Path

cloud = Path({cloud!r})
words = sys.argv[1:]
with open(cloud / "calls", "a") as f:
    f.write(json.dumps(words) + "\\n")
scenario = json.loads((cloud / "scenario").read_text())
looks = cloud / "looks"
if words[0] == "apply":
    if "refuse" in scenario:
        sys.exit("error: " + scenario["refuse"])
    (cloud / "applied").write_text(sys.stdin.read())
elif words[:2] == ["get", "jobset"]:
    if not (cloud / "applied").exists():
        sys.exit('Error from server (NotFound): jobsets "pod" not found')
    number = int(looks.read_text()) if looks.exists() else 0
    looks.write_text(str(number + 1))
    status = scenario["status"][min(number, len(scenario["status"]) - 1)]
    suspend = status == "suspended"
    status = {} if suspend else status
    print(json.dumps({"spec": {"suspend": suspend}, "status": status}))
elif words[:2] == ["get", "pods"]:
    print(json.dumps({"items": [
        {"metadata": {"name": f"pod-slice-0-{i}-x"}, "status": {"containerStatuses": [
            {"state": {"terminated": {"exitCode": code}}}]}}
        for i, code in enumerate(scenario["codes"])]}))
elif words[0] == "logs":
    print("gamayun: no field 'sed' in", words[1])
"""

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
    action, launch = description.parse(["run", *FLAGS, *flags, *train])
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
    assert job["activeDeadlineSeconds"] == 9 * 3600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["image"] == "r/g:1"
    # Input that is refused is not tried again.
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
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
    script = gke.script(launch, ["gamayun train one", "gamayun train two"])
    assert subprocess.run(["bash", "-ec", script], timeout=20).returncode == status
    assert (tmp_path / "said").read_text().split() == said.split()


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
    assert yaml.safe_load(cluster("up", *FLAGS).stdout)["kind"] == "JobSet"
