"""launch_tpu.sh and `gamayun launch` against recording stand-ins of gcloud and kubectl.

The stand-in keeps the state of one queued resource in a folder and runs what is sent to
a worker in a local bash, with a home folder per worker: the scripts for the workers are
run for real, only the cloud, Python's venv and the trainer are played.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gamayun_jax.launch import description

SCRIPT = Path("launch_tpu.sh").resolve()
WHERE = ["--name", "pod", "--zone", "zone-a"]
WHAT = [*WHERE, "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
FAST = ["--poll", "0", "--backoff", "0"]
TRAIN = ["--", "experiments/small.py", "--workdir", "/mnt/run"]

GCLOUD = """#!{python} -S
import json, os, shutil, subprocess, sys
from pathlib import Path

cloud = Path({cloud!r})
words = sys.argv[1:]
with open(cloud / "calls", "a") as f:
    f.write(json.dumps(words) + "\\n")
scenario = json.loads((cloud / "scenario").read_text())
state = cloud / "state"

def flag(name, default=None):
    return words[words.index(name) + 1] if name in words else default

def fail(text):
    sys.exit("ERROR: (gcloud) " + text)

if words[2] == "queued-resources":
    verb = words[3]
    if verb == "create":
        if "refuse" in scenario:
            fail(scenario["refuse"])
        if state.exists():
            fail("ALREADY_EXISTS")
        state.write_text(scenario.get("created", "ACTIVE"))
        (cloud / "nodes").write_text(flag("--node-count", "1"))
    elif not state.exists():
        fail("NOT_FOUND: Resource was not found")
    elif verb == "describe":
        if "nodeCount" in flag("--format"):
            print((cloud / "nodes").read_text())
        elif "error" in flag("--format"):
            print(scenario.get("error", ""))
        else:
            print(state.read_text())
    elif verb == "delete":
        state.unlink()
        shutil.rmtree(cloud / "homes", ignore_errors=True)
else:
    if not state.exists() or state.read_text() != "ACTIVE":
        fail("ssh: connection refused")
    copy = words[3] == "scp"
    node, _, target = (words[5] if copy else words[4]).partition(":")
    workers = range(scenario["workers"]) if flag("--worker") == "all" else [
        int(flag("--worker"))]
    status = 0
    for worker in workers:
        home = cloud / "homes" / (node + "-" + str(worker))
        home.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copy(words[4], home / target)
            continue
        env = dict(os.environ, HOME=str(home), CLOUD=str(cloud), WORKER=home.name)
        done = subprocess.run(["bash", "-c", flag("--command")], env=env, cwd=home)
        status = done.returncode or status
    sys.exit(status)
"""

# Stands for Python on a worker: a venv whose gamayun acts the scenario's next part.
PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\n' > "$3/bin/pip"
cp "$CLOUD/gamayun" "$3/bin/gamayun"
chmod +x "$3/bin/pip"
"""

GAMAYUN = """#!{python} -S
import json, os, signal, sys, time
from pathlib import Path

cloud, worker = Path(os.environ["CLOUD"]), os.environ["WORKER"]
record = cloud / ("starts-" + worker)
with open(record, "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
start = len(record.read_text().splitlines()) - 1
acts = json.loads((cloud / "scenario").read_text())["acts"]
act = acts[min(start, len(acts) - 1)]
if isinstance(act, dict):
    act = act.get(worker, "wait")
print(worker, "start", start, act, flush=True)
if act == "preempt":
    (cloud / "state").write_text("SUSPENDED")
    sys.exit(1)
if act == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    (cloud / ("waits-" + worker)).touch()
    time.sleep(15)
if act == 2:
    print("gamayun: no field 'sed'. Did you mean 'seed'?", file=sys.stderr)
sys.exit(act)
"""


class Cloud:
    """A checkout with the script, and the folder of the played cloud."""

    def __init__(self, root, **programs):
        self.root, self.folder = root / "checkout", root / "cloud"
        tools = root / "bin"
        for path in (self.root / "experiments", self.folder, tools):
            path.mkdir(parents=True)
        shutil.copy(SCRIPT, self.root)
        (self.root / "experiments" / "small.py").write_text("# a config\n")
        (self.root / ".gitignore").write_text("/runs/\n")
        self.env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        self.env["PYTHONPATH"] = str(SCRIPT.parent)
        self.env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        for who in ("AUTHOR", "COMMITTER"):
            self.env |= {f"GIT_{who}_NAME": "t", f"GIT_{who}_EMAIL": "t@example.org"}
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
            subprocess.run(["git", *words], cwd=self.root, env=self.env, check=True)
        fill = dict(python=sys.executable, cloud=str(self.folder))
        for path, text in (
            *((tools / k, text) for k, text in ({"gcloud": GCLOUD} | programs).items()),
            (tools / "fakepython", PYTHON),
            (self.folder / "gamayun", GAMAYUN),
        ):
            for key, value in fill.items():
                shown = repr(value) if key == "cloud" else value
                text = text.replace(
                    "{cloud!r}" if key == "cloud" else "{python}", shown
                )
            path.write_text(text)
            path.chmod(0o755)
        self.play()

    def play(self, *acts, workers=1, **more):
        text = json.dumps({"acts": acts or [0], "workers": workers, **more})
        (self.folder / "scenario").write_text(text)

    def words(self, *words):
        return ["bash", str(self.root / "launch_tpu.sh"), *words]

    def __call__(self, *words, timeout=30):
        return subprocess.run(
            self.words(*words),
            env=self.env, cwd=self.root, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def run(self, *flags, train=TRAIN):
        return self("run", *WHAT, *FAST, "--python", "fakepython", *flags, *train)

    def calls(self, *words):
        """Recorded calls of gcloud that contain these words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [c for c in map(json.loads, lines) if set(words) <= set(c)]

    def starts(self, worker="pod-0"):
        """Arguments of each start of the trainer on a worker."""
        path = self.folder / f"starts-{worker}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, name):
        for _ in range(200):
            if (self.folder / name).exists():
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} did not appear")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def one_line(done, status):
    """The last message of a failed command, after checking its form."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_fresh_start_runs_on_every_worker_and_ends(cloud):
    cloud.play(0, workers=2)
    done = cloud.run("--spot", "--network", "net", "--service-account", "a@b")
    assert done.returncode == 0, done.stderr
    [create] = cloud.calls("create")
    assert create[create.index("--node-id") + 1] == "pod"
    assert create[create.index("--network") + 1] == "net"
    assert "--spot" in create
    assert "--node-count" not in create
    for worker in ("pod-0", "pod-1"):
        expected = ["train", "experiments/small.py", "--workdir", "/mnt/run"]
        assert cloud.starts(worker) == [[*expected, "--distributed"]]
    assert "pod-0 start 0" in done.stdout
    assert "still cost" in done.stderr
    log = cloud.root / "runs" / "launch" / "pod" / "worker0.log"
    assert "pod-0 start 0" in log.read_text()
    code = cloud.folder / "homes" / "pod-0" / "gamayun-pod" / "code"
    assert (code / "experiments" / "small.py").exists()


def test_existing_slice_is_reused(cloud):
    assert cloud("up", *WHAT, *FAST).returncode == 0
    assert cloud("up", *WHAT, *FAST).returncode == 0
    assert cloud.run().returncode == 0
    assert len(cloud.calls("create")) == 1
    assert not cloud.calls("delete")


def test_preempted_is_created_again_and_resumed_until_finished(cloud):
    cloud.play("preempt", "preempt", 0)
    done = cloud.run("--spot")
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == 3
    assert len(cloud.calls("delete")) == 2
    assert len(cloud.starts()) == 3


def test_a_dead_worker_takes_the_others_into_the_restart(cloud):
    cloud.play({"pod-1": 1}, 0, workers=2)  # the first time worker 0 waits for ever
    done = cloud.run()
    assert done.returncode == 0, done.stderr
    assert len(cloud.starts("pod-0")) == len(cloud.starts("pod-1")) == 2
    assert len(cloud.calls("create")) == 1


def test_bad_input_is_not_retried(cloud):
    cloud.play(2)
    message = one_line(cloud.run(), 2)
    assert "Did you mean 'seed'" in message
    assert len(cloud.starts()) == 1


@pytest.mark.parametrize(
    "scenario",
    [
        {"refuse": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' exceeded"},
        {"created": "FAILED", "error": "Quota limit 'TPUV5sLitepod' exceeded"},
    ],
)
def test_refused_quota_is_said_and_not_retried(cloud, scenario):
    cloud.play(**scenario)
    message = one_line(cloud.run(), 4)
    assert "quota refused for v5litepod-16 x 1 in zone-a" in message
    assert "TPUV5sLitepod" in message
    assert "ask for more" in message
    assert len(cloud.calls("create")) == 1
    assert not cloud.starts()


def test_arguments_reach_the_trainer_unchanged(cloud):
    odd = ["--set", "a.b='x y' \"z\" $HOME `id` \\ *; é\n", "--set", ""]
    assert cloud.run(train=[*TRAIN, *odd]).returncode == 0
    assert cloud.starts()[0][4:-1] == odd


def test_setup_script_runs_before_every_start(cloud, tmp_path):
    setup = tmp_path / "mount it.sh"
    setup.write_text('echo "it\'s $WORKER" >> "$CLOUD/mounted"\n')
    cloud.play("preempt", 0)
    assert cloud.run("--setup", str(setup)).returncode == 0
    assert (cloud.folder / "mounted").read_text() == "it's pod-0\n" * 2


@pytest.mark.parametrize("command", ["up", "run", "logs", "status", "stop", "delete"])
def test_dry_run_runs_nothing(cloud, command):
    flags = WHAT if command in ("up", "run") else WHERE
    train = TRAIN if command == "run" else []
    done = cloud(command, *flags, "--dry-run", *train)
    assert done.returncode == 0, done.stderr
    assert not cloud.calls()
    lines = done.stdout.splitlines()
    assert any(line.startswith("gcloud 'compute' 'tpus'") for line in lines)
    assert all(word in done.stdout for word in ("'pod'", "'zone-a'"))
    shlex.split(done.stdout)


def test_stop_sends_term_and_the_follower_ends(cloud):
    cloud.play("wait", workers=2)
    words = cloud.words("run", *WHAT, "--poll", "1", "--python", "fakepython", *TRAIN)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, env=cloud.env, cwd=cloud.root, **pipes) as follower:
        cloud.wait_for("waits-pod-0")
        cloud.wait_for("waits-pod-1")
        assert "pod: ACTIVE" in cloud("status", *WHERE).stdout
        other = cloud.run(train=[*TRAIN, "--set", "seed=2"])
        assert "other arguments" in one_line(other, 2)
        stopped = cloud("stop", *WHERE)
        assert stopped.returncode == 0, stopped.stderr
        assert stopped.stdout.count("asked the trainer") == 2
        _, errors = follower.communicate(timeout=20)
    assert follower.returncode == 3
    assert "stopped as asked" in errors
    assert len(cloud.starts()) == 1
    for worker in ("pod-0", "pod-1"):
        folder = cloud.folder / "homes" / worker / "gamayun-pod"
        assert (folder / "exit").read_text() == "3\n"


def test_several_slices_are_one_resource(cloud):
    cloud.play(0, workers=2)
    done = cloud.run("--slices", "2")
    assert done.returncode == 0, done.stderr
    [create] = cloud.calls("create")
    assert create[create.index("--node-count") + 1] == "2"
    assert create[create.index("--node-prefix") + 1] == "pod"
    for worker in ("pod-0-0", "pod-0-1", "pod-1-0", "pod-1-1"):
        assert len(cloud.starts(worker)) == 1
    # Later commands ask the cloud for the number of slices.
    assert cloud("status", *WHERE).stdout.count("gamayun-worker") == 4


def test_gives_up_after_max_restarts(cloud):
    cloud.play(1)
    message = one_line(cloud.run("--max-restarts", "1"), 5)
    assert "without finishing" in message
    assert len(cloud.starts()) == 2


def test_delete_may_be_repeated(cloud):
    assert cloud("up", *WHAT, *FAST).returncode == 0
    assert cloud("delete", *WHERE).returncode == 0
    assert cloud("delete", *WHERE).returncode == 0
    assert "there is no pod in zone-a" in one_line(cloud("status", *WHERE), 2)


def test_uncommitted_changes_are_refused_unless_allowed(cloud):
    (cloud.root / "experiments" / "small.py").write_text("# changed\n")
    assert "--allow-dirty" in one_line(cloud.run(), 2)
    assert not cloud.calls()
    assert cloud.run("--allow-dirty").returncode == 0
    code = cloud.folder / "homes" / "pod-0" / "gamayun-pod" / "code"
    assert (code / "experiments" / "small.py").read_text() == "# changed\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start"], "unknown command 'start'"),
        (["status", "--name", "pod"], "--zone is missing"),
        (["status", "--name", "a b", "--zone", "z"], "no name for a TPU"),
        (["up", *WHERE], "--type is missing"),
        (["up", *WHAT, "--slices", "two"], "not a whole number"),
        (["up", *WHAT, "--sluces", "2"], "unknown argument '--sluces'"),
        (["up", *WHAT, "--slices"], "needs a value"),
        (["run", *WHAT], "run has no config"),
        (["run", *WHAT, "--", "no.py", "--workdir", "/r"], "is not in commit"),
        (["run", *WHAT, *TRAIN[:2], "--workdir", "r"], "must be an absolute path"),
        (["run", *WHAT, "--setup", "nowhere", *TRAIN], "is no file"),
    ],
)
def test_bad_input_is_one_line(cloud, words, message):
    done = cloud(*words)
    assert message in one_line(done, 2)
    assert len(done.stderr.splitlines()) == 1
    assert not cloud.calls()


def test_help_explains_every_flag(cloud):
    text = cloud("--help").stdout
    flags = {f"--{name.replace('_', '-')}" for name in description.FIELDS}
    assert all(f"  {flag} " in text for flag in flags)
    assert set(re.findall(r"^  (--[a-z-]+) ", text, re.M)) == {
        *flags,
        "--file",
        "--help",
    }


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_is_silent():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
