"""`gamayun launch` on Compute Engine, by ssh and on a TPU VM that exists; budgets,
several commands, logs of the worker that failed. The clouds are played."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clouds import COMPUTE, FAST, SSH, TRAIN, WHAT, Cloud, one_line

from gamayun_jax.fields import UserError
from gamayun_jax.launch import budget, command, description, slices, worker_scripts
from gamayun_jax.launch.workers import judge, read_workers

POD = ["--name", "pod", "--zone", "zone-a"]
FLEET = [*POD, "--backend", "compute", "--topology", "v6e:2x4"]  # two VMs


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def fleet(tmp_path):
    return Cloud(tmp_path, gcloud=COMPUTE)


def go(cloud, *flags, train=TRAIN):
    return cloud("run", *flags, *FAST, "--python", "fakepython", *train)


# --- Compute Engine -------------------------------------------------------------------


def test_a_slice_is_a_policy_a_template_and_a_group(fleet):
    done = go(fleet, *FLEET, "--spot", "--delete-when-done")
    assert done.returncode == 0, done.stderr
    [policy] = fleet.calls("workload-policy")
    assert policy[policy.index("--accelerator-topology") + 1] == "2x4"
    assert policy[policy.index("--region") + 1] == "zone"
    [template] = fleet.calls("instance-templates", "create")
    assert template[template.index("--machine-type") + 1] == "ct6e-standard-4t"
    assert template[template.index("--provisioning-model") + 1] == "SPOT"
    assert template[template.index("--maintenance-policy") + 1] == "TERMINATE"
    [group] = fleet.calls("managed", "create")
    assert group[group.index("--size") + 1] == "2"
    # A policy's bare name is refused there.
    where = "projects/my-project/regions/zone/resourcePolicies/pod"
    assert group[group.index("--workload-policy") + 1] == where
    assert group[group.index("--target-size-policy-mode") + 1] == "bulk"
    for number in range(2):  # each is told who it is
        [words] = fleet.starts(f"pod-v{number}")
        assert words[-6:] == ["--coordinator", "pod-v0:8476", "--num-processes", "2",
                              "--process-id", str(number)]  # fmt: skip
    shared = ["instance-templates", "resource-policies"]
    deleted = [call[1] for call in fleet.calls("delete")]
    assert deleted == [*shared, "instance-groups", *shared]  # of a former launch first


@pytest.mark.slow
def test_preempted_groups_are_made_anew(fleet):
    fleet.play("preempt", 0)
    done = go(fleet, *FLEET, "--spot")
    assert done.returncode == 0, done.stderr
    assert len(fleet.calls("managed", "create")) == 2
    assert len(fleet.starts("pod-v0")) == len(fleet.starts("pod-v1")) == 2
    assert "was taken away" in done.stderr
    assert fleet("delete", *FLEET[:6]).returncode == 0
    assert fleet("delete", *FLEET[:6]).returncode == 0  # may be repeated
    assert "there is no pod" in one_line(fleet("status", *FLEET[:6]), 2)


def test_several_slices_are_several_groups(fleet, tmp_path):
    done = go(fleet, *FLEET, "--slices", "2")
    assert done.returncode == 0, done.stderr
    assert [c[4] for c in fleet.calls("managed", "create")] == ["pod-0", "pod-1"]
    status = fleet("status", *FLEET[:6])
    assert status.stdout.count("gamayun-worker") == 4
    starts = [c for c in fleet.calls("ssh") if any("MEGASCALE" in word for word in c)]
    assert [re.search(r"SLICE_ID=(\d)", c[4])[1] for c in starts].count("1") == 2


def test_half_of_the_slices_are_not_kept(fleet):
    """The second group is refused: the first one is deleted, and it is said."""
    # After list, two deletions, policy, project, template and a group.
    fleet.play(failing=[8])
    done = go(fleet, *FLEET, "--slices", "2")
    assert "could not create" in one_line(done, 1)
    assert "deleting what was made" in done.stderr
    assert len(fleet.calls("managed", "create")) == 2
    assert not [*(fleet.folder / "groups").iterdir()]


@pytest.mark.slow
def test_a_name_is_not_that_of_another_launch(fleet):
    """A group NAME-2 of its own is no third slice: neither used nor deleted."""
    other = ["--name", "pod-2", *FLEET[2:]]
    assert fleet("up", *other, *FAST).returncode == 0
    assert "there is no pod" in one_line(fleet("status", *FLEET[:6]), 2)
    assert fleet("delete", *FLEET[:6]).returncode == 0
    assert "already exists" in one_line(go(fleet, *FLEET, "--slices", "3"), 1)
    assert [p.name for p in (fleet.folder / "groups").iterdir()] == ["pod-2"]
    assert go(fleet, *FLEET, "--slices", "2").returncode == 0


@pytest.mark.slow
def test_what_a_former_launch_left_is_made_anew(fleet):
    """Its template may be of other machines, and not of spot ones."""
    assert go(fleet, *FLEET).returncode == 0
    shutil.rmtree(fleet.folder / "groups")  # they were deleted elsewhere
    assert go(fleet, *FLEET, "--spot").returncode == 0
    assert "SPOT" in (fleet.folder / "made-instance-templates-pod").read_text()
    elsewhere = [*POD[:2], "--zone", "zone-b", *FLEET[4:]]
    (fleet.folder / "groups" / "pod").rename(fleet.folder / "groups" / "hidden")
    done = go(fleet, *elsewhere)
    assert "taken by another launch" in one_line(done, 1)
    assert "costs until" not in done.stderr  # nothing is there
    fleet.play(failing=[len(fleet.calls()) + 2])
    assert "could not replace what a former launch left of pod" in one_line(
        go(fleet, *elsewhere), 1
    )


@pytest.mark.parametrize(
    "scenario",
    [
        {"refuse": "Quota 'TPUS_PER_TPU_FAMILY' exceeded"},
        {"status": "", "code": "QUOTA_EXCEEDED"},
    ],
)
def test_refused_quota_of_compute_engine(fleet, scenario):
    fleet.play(**scenario)
    message = one_line(go(fleet, *FLEET), 4)
    assert "quota refused for v6e:2x4 x 1 in zone-a" in message
    assert not fleet.starts("pod-v0")


def test_flex_start_and_reservations(fleet):
    words = [*FLEET, "--dry-run", *TRAIN]
    flex = fleet("run", "--flex", "--max-hours", "24", *words).stdout
    assert "'FLEX_START'" in flex
    assert "'86400s'" in flex
    reserved = fleet("run", "--reservation", "mine", *words).stdout
    assert "'RESERVATION_BOUND'" in reserved
    assert "'--reservation' 'mine'" in reserved
    seventh = ["run", *POD, "--backend", "compute", "--topology", "tpu7x:2x2x2"]
    text = fleet(*seventh, "--dry-run", *TRAIN).stdout
    assert "'tpu7x-standard-4t'" in text
    assert "tpu-tpu7x" in text
    assert not fleet.calls()


def test_gcloud_knows_every_command_and_flag(fleet):
    """Against the installed gcloud's own list of its command line, which calls none."""
    home = Path(shutil.which("gcloud") or "/").resolve().parents[1]
    path = home / "data" / "cli" / "gcloud_completions.py"
    if not path.exists():
        pytest.skip("no Google Cloud CLI here")
    spec = importlib.util.spec_from_file_location("gcloud_completions", path)
    completions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(completions)
    tree = completions.STATIC_COMPLETION_CLI_TREE
    everywhere = {"--project", "--quiet", "--format", "--filter"}
    everywhere |= {"--target-size-policy-mode"}  # of 2025, newer than some gclouds
    go(fleet, *FLEET, "--spot", "--subnet", "s", "--delete-when-done")
    queued = fleet("run", *WHAT, "--spot", "--slices", "2", "--dry-run", *TRAIN).stdout
    calls = fleet.calls()
    calls += [re.findall(r"'([^']*)'", line) for line in queued.splitlines()
              if line.startswith("gcloud")]  # fmt: skip
    assert len(calls) > 20
    for call in calls:
        node, words = tree, list(call)
        while words and words[0] in node.get("commands", {}):
            node = node["commands"][words.pop(0)]
        assert "commands" not in node or not node["commands"], call
        flags = {w for w in words if re.fullmatch(r"--[a-z-]+", w)}
        assert flags <= set(node["flags"]) | everywhere, call


# --- by ssh, and a TPU VM that exists -------------------------------------------------


def test_hosts_that_exist(tmp_path):
    cloud = Cloud(tmp_path, ssh=SSH, scp=SSH)
    flags = ["--name", "pod", "--hosts", "me@a,b"]
    done = go(cloud, *flags)
    assert done.returncode == 0, done.stderr
    assert cloud.starts("me-a")[0][-6:] == [
        "--coordinator", "a:8476", "--num-processes", "2", "--process-id", "0"
    ]  # fmt: skip
    assert cloud.starts("b")[0][-1] == "1"
    assert "still cost" not in done.stderr
    assert "not deleted" in one_line(cloud("delete", *flags), 2)
    alone = go(cloud, "--name", "one", "--hosts", "c", train=TRAIN)
    assert alone.returncode == 0, alone.stderr
    assert cloud.starts("c") == [["train", *TRAIN[1:]]]


def test_a_tpu_vm_that_exists_is_not_created(cloud):
    words = [*POD, "--backend", "vm"]
    text = cloud("run", *words, "--dry-run", *TRAIN).stdout
    assert "'create'" not in text
    assert "'tpu-vm' 'describe' 'pod'" in text


# --- commands, budgets, logs ----------------------------------------------------------


def test_commands_follow_one_another(cloud):
    second = [
        "experiments/small.py",
        "--workdir",
        "gs://bucket/2",
        "--init-from",
        "/mnt/run",
    ]
    cloud.play(0, 1, 0)  # the second one fails once
    done = cloud.run(train=[*TRAIN, "--then", *second])
    assert done.returncode == 0, done.stderr
    first = ["train", *TRAIN[1:], "--distributed"]
    again = ["train", *second, "--distributed"]
    assert cloud.starts() == [first, again, again]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--max-hours=2", "--max-cost=40"])
def test_a_spent_budget_saves_and_deletes(cloud, how):
    """16 chips at 1.25: two hours are 40; all but a second of them are used before."""
    log = cloud.root / "runs" / "launch" / "pod"
    log.mkdir(parents=True)
    spent = {"seconds": 2 * 3600 - 1, "since": 0.0}
    (log / "machine_seconds.json").write_text(json.dumps(spent))
    cloud.play("wait")
    done = cloud("run", *WHAT, how, "--price", "1.25", "--poll", "1", "--backoff", "0",
                 "--python", "fakepython", *TRAIN)  # fmt: skip
    assert "2.0 of 2 hours" in one_line(done, 6)
    assert len(cloud.starts()) == 1
    assert len(cloud.calls("delete")) == 1  # after the trainer has ended
    again = cloud.run("--max-hours", "2")
    assert "spent already" in one_line(again, 2)
    assert len(cloud.calls("create")) == 1


def test_hours_are_counted_over_all_that_happens(tmp_path):
    launch = description.Launch(name="pod", log_dir=str(tmp_path), max_hours=5)
    clock = iter([100.0, 3700.0, 4000.0, 9000.0, 9000.0 + 7200])
    counter = budget.Budget(launch, now=lambda: next(clock))
    counter.count(True)
    counter.count(True)  # an hour
    counter.count(False)  # gone within the next 300 s: counted whole
    assert counter.hours == pytest.approx(3900 / 3600)
    later = budget.Budget(launch, now=lambda: next(clock))  # another process
    later.count(True)  # what lay between is free
    assert later.hours == pytest.approx(3900 / 3600)
    later.count(True)
    assert later.hours == pytest.approx(3900 / 3600 + 2)
    assert not later.spent


def test_the_log_of_the_worker_that_failed_is_shown(cloud):
    """Whichever it is: not worker 0's alone."""
    cloud.play({"pod-1": 2}, workers=2)
    done = cloud.run("--delete-when-done")
    assert "Did you mean 'seed'" in one_line(done, 2)
    assert "pod-1 start 0 2" in done.stderr  # its log
    kept = list((cloud.root / "runs" / "launch" / "pod").glob("failed-*.log"))
    assert len(kept) == 1
    assert len(cloud.calls("delete")) == 1
    assert "is deleted" in done.stderr


def test_machines_of_another_run_are_never_deleted(cloud):
    cloud.play("wait")
    assert cloud("up", *WHAT, *FAST).returncode == 0
    home = cloud.folder / "homes" / "pod-0" / "gamayun-pod"
    home.mkdir(parents=True)
    (home / "arguments").write_text("others")
    (home / "pid").write_text(str(os.getpid()))  # it runs, and nobody ends it
    done = cloud.run("--delete-when-done")
    assert "other arguments" in one_line(done, 2)
    assert not cloud.calls("delete")


# --- descriptions ---------------------------------------------------------------------


def test_a_file_describes_and_flags_come_on_top(cloud):
    (cloud.root / "launch.yaml").write_text(
        "name: pod\nzone: zone-a\ntype: v5litepod-16\nmax-hours: 10\nspot: true\n"
        "commands:\n- experiments/small.py --workdir '/mnt/run 1'\n"
    )
    action, launch = command.parse(
        ["run", "--file", str(cloud.root / "launch.yaml"), "--slices=2"]
    )
    assert action == "run"
    assert (launch.slices, launch.spot, launch.max_hours) == (2, True, 10.0)
    assert launch.commands == (("experiments/small.py", "--workdir", "/mnt/run 1"),)
    assert launch.chips == 32
    python = cloud.root / "launch.py"
    python.write_text(
        "from gamayun_jax.launch.description import Launch\n"
        "def get_launch():\n"
        "    return Launch(name='pod', zone='z', type='v5litepod-16')\n"
    )
    assert command.parse(["up", "--file", str(python)])[1].zone == "z"
    for wrong in ("commands: a b", "commands: [a 'b]", "commands: [1]"):
        (cloud.root / "launch.yaml").write_text(wrong)
        with pytest.raises(UserError, match="commands must be a list of texts"):
            command.parse(["run", "--file", str(cloud.root / "launch.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v6e:2x4x4"], "slices of v6e have 2 sizes"),
        (["--topology", "v9:2x4"], "'v9:2x4' is unknown"),
        (["--topology", "v6e:3x3"], "VMs have 4 chips each"),
        (["--topology", "v6e:7x4"], "v6e has 1x1, 2x2"),
        (["--type", "v6e-28"], "'v6e-28' is not known"),
        (["--name", "x" * 41], "at most 40"),
        (["--max-hours", "-5"], "max_hours=-5.0 must be greater than 0"),
        (["--type", "v5p-16", "--backend", "compute"], "leaves the topology open"),
        (["--topology", "tpu7x:2x2x1"], "queued resources have no tpu7x"),
        (["--topology", "v5e:4x4", "--backend", "compute"], "no groups of v5e"),
        (["--type", "v5litepod-16", "--backend", "gke"], "--image is missing"),
        (["--type", "v5litepod-16", "--backend", "aws"], "backend='aws' is unknown"),
        (["--type", "v5litepod-16", "--max-hours", "0.5"], "allows 0.5 hours"),
        (["--type", "v5litepod-16", "--max-hours", "no"], "invalid float value: 'no'"),
        (["--type", "v5litepod-16", "--max-cost", "10"], "allows 0.52 hours"),
        (["--topology", "tpu7x:2x2x1", "--backend", "compute", "--max-cost", "9"],
         "price of tpu7x is not known"),
        (["--type", "v5litepod-16", "--spot", "--flex"], "exclude each other"),
        (["--type", "v5litepod-16", "--spot=no"], "ignored explicit argument"),
        (["--type", "v5litepod-16", "--max-hour", "3"], "did you mean --max-hours?"),
        (["--type", "v5litepod-256", "--topology", "v5e:1x1"], "give one of the two"),
        (["--type", "v6e-16", "--topology", "v5p:2x2x4"], "give one of the two"),
        (["--type", "ct6e-standard-4t", "--topology", "v6e:4x4"], "--topology alone"),
        (["--file", "none.yaml"], "cannot be read as YAML"),
        (["--hosts", ","], "name the machines"),
    ],
)  # fmt: skip
def test_wrong_descriptions_are_one_line(words, message):
    with pytest.raises(UserError, match=re.escape(message)) as e:
        command.parse(["run", *POD, *words, *TRAIN])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir", "gs://"], "gs://BUCKET/FOLDER"),
        (["--workdir", "gs://bucket"], "gs://BUCKET/FOLDER"),
        (["--workdir", "gs://bucket/"], "gs://BUCKET/FOLDER"),
        (["--workdir", "gs://bucket//"], "gs://BUCKET/FOLDER"),
        (["--workdir", "/a/", "--then", "x.py", "--workdir", "/a"], "two commands"),
        (["--workdir", "runs/a"], "absolute path"),
        (["--workdir", "s3://bucket/a"], "gs://BUCKET/FOLDER"),
        (["--workdir", "/a", "--then", "x.py", "--workdir", "/a"], "two commands"),
        (["--workdir", "/a", "--init-from", "nowhere"], "--init-from 'nowhere'"),
    ],
)
def test_commands_that_cannot_be_are_one_line(words, message):
    words = ["--type", "v5litepod-16", "--", "experiments/small.py", *words]
    with pytest.raises(UserError, match=re.escape(message)) as e:
        command.parse(["run", *POD, *words])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"seconds": 3600000, "sin', "", "[]", "{}", '{"seconds": NaN, "since": 0}',
        '{"seconds": null, "since": 0}', '{"seconds": -1, "since": 0}',
        f'{{"seconds": 1{"0" * 400}, "since": 0}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_count_of_hours_is_not_none(tmp_path, text):
    """It is said before machines are made, and what is there is left as it is."""
    (tmp_path / "machine_seconds.json").write_text(text)
    launch = description.Launch("pod", log_dir=str(tmp_path), max_hours=10.0)
    counter = budget.Budget(launch)
    with pytest.raises(UserError, match=r"machine_seconds\.json.*is damaged"):
        counter.announce()
    counter.count(True)  # `status` and `delete` go on
    assert (tmp_path / "machine_seconds.json").read_text() == text


def test_a_folder_for_logs_that_cannot_be_is_said_before_machines_are_made(cloud):
    (cloud.folder / "file").write_text("")
    done = cloud.run("--log-dir", str(cloud.folder / "file" / "logs"))
    assert "give --log-dir a folder" in one_line(done, 2)
    assert not cloud.calls("create")


def test_a_count_that_cannot_be_written_ends_no_watch(tmp_path, capsys):
    launch = description.Launch("pod", log_dir=str(tmp_path / "logs"))
    clock = iter((0.0, 3600.0))
    counter = budget.Budget(launch, now=lambda: next(clock) + 1)
    counter.announce()
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("")
    counter.count(True)
    counter.count(True)
    assert counter.hours == 1
    assert "hours count in memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("type_", "topology", "expected"),
    [
        ("v5litepod-256", "", ("v5e", "16x16", 256, 64)),
        ("v5p-256", "", ("v5p", "", 128, 32)),
        ("v4-8", "", ("v4", "", 4, 1)),
        ("", "v6e:1x1", ("v6e", "1x1", 1, 1)),
        ("tpu7x-128", "tpu7x:4x4x4", ("tpu7x", "4x4x4", 64, 16)),
    ],
)
def test_slices(type_, topology, expected):
    part = slices.slice_of(type_, topology)
    assert (part.kind, part.topology, part.chips, part.hosts) == expected


def test_prices_are_of_chips_and_hours():
    launch = description.Launch(topology="v6e:4x4", slices=2, max_cost=864.0)
    assert launch.price_per_hour == pytest.approx(32 * 2.7)
    assert launch.budget_hours == pytest.approx(10)
    assert description.Launch(topology="v6e:4x4").budget_hours == math.inf


def test_what_workers_do_together():
    def of(*states):
        lines = [f"gamayun-worker {state} abc host" for state in states]
        return judge(read_workers("\n".join(lines)), ["abc"])

    assert of("exit 0", "exit 0") == "done"
    assert of("exit 0", "exit 2") == "bad"
    assert of("running 0", "exit 0") == of("exit 3", "running 0") == "ending"
    assert of("running 0", "dead 0") == of("running 0", "exit 1") == "broken"
    assert of("running 0", "none 0") == of("exit 3", "exit 3") == "broken"
    assert of("stopped 3", "stopped 0") == "stopped"
    assert of("none 0", "none 0") == "idle"
    assert of() == "unreachable"
    assert judge(read_workers("gamayun-worker running 0 abc h"), ["x"]) == "other"


def test_words_reach_a_shell_unchanged():
    odd = ["it's", "", "a b\n$HOME `id` \\ é"]
    command = worker_scripts.remote_command('printf "%s\\0" "$@"', "pod", odd)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == ["pod", *odd]


def test_pins_are_within_what_the_package_asks_for():
    packaging = pytest.importorskip("packaging.requirements")
    lines = Path("constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name in (
        "requirements.txt",
        "requirements-tpu.txt",
        "requirements-buckets.txt",
    ):
        for line in Path(name).read_text().splitlines():
            if line and not line.startswith("#"):
                asked = packaging.Requirement(line)
                pin = pins[re.sub(r"[-_.]+", "-", asked.name).lower()]
                assert asked.specifier.contains(pin), (line, pin)
    container = Path("Containerfile").read_text()
    assert re.search(r"^FROM \S+:3\.11\.\d+-", container, re.M)  # their Python
    assert "constraints.txt" in container


def test_launching_needs_python_alone():
    """No package: a laptop needs not install any."""
    code = "import sys; before = {*sys.modules}; import gamayun_jax.launch.command; "
    code += "print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert tops - set(sys.stdlib_module_names) == {"gamayun_jax"}
