"""Clouds that are played by stand-ins of gcloud, kubectl, ssh and scp.

They keep the state of what was created in a folder and run what is sent to a worker in
a local bash, with a home folder per worker: the scripts for the workers are run for
real, only the cloud, Python's venv and the trainer are played.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path("launch_tpu.sh").resolve()
WHERE = ["--name", "pod", "--zone", "zone-a"]
WHAT = [*WHERE, "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
FAST = ["--poll", "0", "--backoff", "0"]
TRAIN = ["--", "experiments/small.py", "--workdir", "/mnt/run"]

# Every program begins so; `failing` are the numbers of calls that fail.
HEAD = """#!{python} -S
import json, os, re, shutil, subprocess, sys
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

def in_shell(home, command):
    home.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, HOME=str(home), CLOUD=str(cloud), WORKER=home.name)
    return subprocess.run(["bash", "-c", command], env=env, cwd=home).returncode

if len((cloud / "calls").read_text().splitlines()) in scenario.get("failing", ()):
    fail("it is said here:\\n no such luck")
"""
GCLOUD = """
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
        if copy:
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(words[4], home / target)
            continue
        status = in_shell(home, flag("--command")) or status
    sys.exit(status)
"""

COMPUTE = """
groups = cloud / "groups"
groups.mkdir(exist_ok=True)
verbs = words[1:4]
if verbs == ["instance-groups", "managed", "create"]:
    if "refuse" in scenario:
        fail(scenario["refuse"])
    if (groups / words[4]).exists():
        fail("The resource already exists")
    (groups / words[4]).write_text(flag("--size") + "\\t" + flag("--template"))
    state.write_text("RUNNING")
elif verbs == ["instance-groups", "managed", "list"]:
    key, _, wanted = flag("--filter").partition("~")
    assert key == "name" and flag("--format") == (
        "value(name,targetSize,instanceTemplate.basename())")
    for group in sorted(groups.iterdir()):
        if re.search(wanted, group.name):
            print(group.name, group.read_text(), sep="\\t")
elif verbs == ["instance-groups", "managed", "list-instances"]:
    status = scenario.get("status", "RUNNING")
    if state.read_text() == "SUSPENDED":
        status = "STOPPED"
    error = {"errors": {"errors": [{"code": scenario.get("code", ""), "message": "m"}]}}
    print(json.dumps([
        {"instance": f"https://x/instances/{words[4]}-v{i}", "instanceStatus": status,
         "currentAction": "NONE", "lastAttempt": error}
        for i in range(int((groups / words[4]).read_text().split()[0]))]))
elif verbs == ["instance-groups", "managed", "delete"]:
    (groups / words[4]).unlink()
    shutil.rmtree(cloud / "homes", ignore_errors=True)
elif words[1] in ("instance-templates", "resource-policies"):
    name = words[4 if words[3] == "workload-policy" else 3]
    made = cloud / ("made-" + words[1] + "-" + name)
    users = [g for g in groups.iterdir() if g.read_text().split()[1] == name]
    if words[2] == "delete":
        if not made.exists():
            fail("The resource was not found")
        if users:
            fail("The resource is already being used by " + users[0].name)
        made.unlink()
    elif made.exists():
        fail("The resource already exists")
    else:
        made.write_text(json.dumps(words))
elif words[:2] == ["config", "get"]:
    print("my-project")
elif words[1] == "scp":
    machine, _, target = words[3].partition(":")
    home = cloud / "homes" / machine
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(words[2], home / target)
elif words[1] == "ssh":
    sys.exit(in_shell(cloud / "homes" / words[2], flag("--command")))
else:
    fail("unknown command " + " ".join(words))
"""

SSH = """
copies = sys.argv[0].endswith("scp")
machine = sys.argv[-1].partition(":")[0] if copies else sys.argv[-2]
home = cloud / "homes" / machine.replace("@", "-")
home.mkdir(parents=True, exist_ok=True)
if copies:
    shutil.copy(sys.argv[-2], home / sys.argv[-1].partition(":")[2])
    sys.exit()
sys.exit(in_shell(home, sys.argv[-1]))
"""


KUBECTL = """
looks = cloud / "looks"
if words[0] == "apply":
    if "refuse" in scenario:
        sys.exit("error: " + scenario["refuse"])
    (cloud / "applied").write_text(sys.stdin.read())
elif words[:2] == ["get", "jobset"]:
    applied = cloud / "applied"
    if not applied.exists():
        sys.exit('Error from server (NotFound): jobsets "pod" not found')
    found = re.search(r"gamayun-jax/deadline: '(\\d+)'", applied.read_text())
    metadata = {"annotations": {"gamayun-jax/deadline": found[1]}} if found else {}
    number = int(looks.read_text()) if looks.exists() else 0
    looks.write_text(str(number + 1))
    status = scenario["status"][min(number, len(scenario["status"]) - 1)]
    suspend = status == "suspended"
    status = {} if suspend else status
    spec = {"suspend": suspend}
    print(json.dumps({"metadata": metadata, "spec": spec, "status": status}))
elif words[:2] == ["get", "pods"]:
    print(json.dumps({"items": [
        {"metadata": {"name": f"pod-slice-0-{i}-x"}, "status": {"containerStatuses": [
            {"state": {"terminated": {"exitCode": code}}}]}}
        for i, code in enumerate(scenario["codes"])]}))
elif words[0] == "logs":
    print("gamayun: no field 'sed' in", words[1])
"""

# Stands for Python on a worker: a venv whose gamayun acts the scenario's next part.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exit 0; fi
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

    def __init__(self, root, gcloud=GCLOUD, **programs):
        programs["gcloud"] = gcloud
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
        programs = {k: HEAD + text for k, text in programs.items()}
        for path, text in (
            *((tools / name, text) for name, text in programs.items()),
            (tools / "fakepython", PYTHON),
            (self.folder / "gamayun", GAMAYUN),
        ):
            text = text.replace("{cloud!r}", repr(str(self.folder)))
            path.write_text(text.replace("{python}", sys.executable))
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


def one_line(done, status):
    """The last message of a failed command, after checking its form."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]
