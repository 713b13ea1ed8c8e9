"""launch_tpu.sh and `gamayun launch` with queued resources, whose cloud is played."""

import re
import shlex
import shutil
import signal
import subprocess

import pytest
from clouds import FAST, SCRIPT, TRAIN, WHAT, WHERE, Cloud, one_line

from gamayun_jax.launch import command


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


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


def test_logs_of_all_that_failed_are_shown(cloud):
    cloud.play({"pod-0": 1, "pod-1": 1, "pod-2": 0}, 0, workers=3)
    done = cloud.run()
    assert done.returncode == 0, done.stderr
    for worker in ("pod-0", "pod-1", "pod-2"):
        assert (f"{worker} start 0 1" in done.stderr) == (worker != "pod-2")


def test_an_interrupted_launch_says_what_goes_on(cloud):
    cloud.play("wait")
    words = cloud.words("run", *WHAT, "--poll", "1", "--python", "fakepython", *TRAIN)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, env=cloud.env, cwd=cloud.root, **pipes) as launcher:
        cloud.wait_for("waits-pod-0")
        launcher.send_signal(signal.SIGINT)
        _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    last = errors.splitlines()[-1]
    assert "the same command follows it; what is there of pod in zone-a costs" in last


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


@pytest.mark.slow
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
        (["start"], "invalid choice: 'start'"),
        (["status", "--name", "pod"], "--zone is missing"),
        (
            ["status", "--name", "a b", "--zone", "z"],
            "must be lower-case letters, digits",
        ),
        (["up", *WHERE], "--type is missing"),
        (["up", *WHAT, "--slices", "two"], "invalid int value: 'two'"),
        (["up", *WHAT, "--sluces", "2"], "unknown argument '--sluces'"),
        (["up", *WHAT, "--slices"], "expected one argument"),
        (["run", *WHAT], "run has no config"),
        (["run", *WHAT, "--", "no.py", "--workdir", "/r"], "is not in commit"),
        (["run", *WHAT, *TRAIN[:2], "--workdir", "r"], "must be an absolute path"),
        # No machine is paid for where no checkpoint can be written.
        (["run", *WHAT, *TRAIN[:2], "--workdir", "s3://b/r"], "must be an absolute"),
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
    flags = {*command.make_parser()._option_string_actions} - {"-h", "--help"}
    assert len(flags) > 30
    assert all(re.search(rf"^  {flag}(?: \S+)?\s+\S", text, re.M) for flag in flags)


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
def test_whatever_call_fails_what_still_costs_is_said(cloud, once):
    """Each call of a run in turn, alone or with all that follow it."""
    number = 0
    while True:
        number += 1
        (cloud.folder / "state").unlink(missing_ok=True)
        (cloud.folder / "calls").unlink(missing_ok=True)
        shutil.rmtree(cloud.root / "runs", ignore_errors=True)
        cloud.play(failing=[number] if once else [*range(number, 500)])
        done = cloud.run("--delete-when-done", "--max-restarts", "4")
        assert "Traceback" not in done.stderr
        there, last = (cloud.folder / "state").exists(), done.stderr.splitlines()[-1]
        if there:
            assert done.returncode == 1
            assert "costs until `gamayun launch delete`" in last
            assert "it is said here: no such luck" in last
        if len(cloud.calls()) < number:
            assert done.returncode == 0
            assert not there
            break
        if done.returncode:
            assert "it is said here: no such luck" in done.stderr
    assert number > 5


def test_machines_that_cannot_be_set_up_are_not_kept_for_ever(cloud):
    """Without a key in the agent of ssh, say: it is told, and tried three times."""
    (cloud.folder.parent / "bin" / "fakepython").write_text("#!/bin/sh\nexit 1\n")
    message = one_line(cloud.run("--delete-when-done"), 1)
    assert "pod in zone-a is there, but the installation failed" in message
    assert not (cloud.folder / "state").exists()
    assert len(cloud.calls("scp")) == 3


def test_the_python_of_the_image_is_taken(cloud):
    """Ubuntu 24.04, of TPU7x, has 3.12 and no 3.11."""
    tools = cloud.folder.parent / "bin"
    shutil.copy(tools / "fakepython", tools / "python3.12")
    done = cloud("run", *WHAT, *FAST, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert len(cloud.starts()) == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_is_silent():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
