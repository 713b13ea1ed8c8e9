"""`gamayun launch`: create, start, watch, restart, and delete.

Nothing is remembered here but the log folder: what exists, what runs and how it ended
is asked from the machines each time, so any command may be interrupted and repeated.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gamayun_jax.fields import SCHEMES
from gamayun_jax.launch import worker_scripts as scripts
from gamayun_jax.launch.budget import Budget
from gamayun_jax.launch.checkout import pack
from gamayun_jax.launch.compute_engine import InstanceGroups
from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import LaunchError, complaint, say
from gamayun_jax.launch.vms import Hosts, Machines, QueuedResources, TpuVm
from gamayun_jax.launch.workers import Worker, judge, read_workers

BACKENDS: dict[str, Callable[[Launch], Machines]] = {
    "queued": QueuedResources,
    "compute": InstanceGroups,
    "vm": TpuVm,
    "hosts": Hosts,
}
LOOKS = 5  # at workers that do not answer, before they are started again
ENDING_LOOKS = 45  # while some are through and others write: a quarter of an hour
TRIES = 3  # in a row, to install and start on machines that are there, and to delete
SAVING = 900.0  # seconds that a trainer may take to save, once the budget is spent


class Supervisor:
    """One launch on machines that are reached by ssh."""

    def __init__(self, launch: Launch):
        self.launch, self.machines = launch, BACKENDS[launch.backend](launch)
        self.budget = Budget(launch)
        self.where = f"{launch.name} in {launch.zone}" if launch.zone else launch.name
        self.asked = False  # for machines, by this process
        self.seen = 0  # bytes of worker 0's log
        self.told = ""  # the last of what failed workers logged
        self.sums = [scripts.checksum(words) for words in launch.commands]

    def state(self) -> str:
        """Of the machines; what they cost is counted."""
        state = self.machines.state()
        if not self.launch.dry_run:
            self.budget.count(state == "ACTIVE")
        return state

    @property
    def costs(self) -> str:
        """What is to be said of money when a command failed; empty if nothing is."""
        theirs = self.launch.backend == "hosts" or self.launch.dry_run
        if theirs or not (self.asked or self.budget.since):
            return ""
        return f"; what is there of {self.where} costs until `gamayun launch delete`"

    # --- machines -----------------------------------------------------------------

    def up(self) -> None:
        """Create, recreate or wait, until the machines are there; waits for ever.

        Raises:
          LaunchError: they are refused, or cannot be asked for.
        """
        shown, unknown, created, launch = "", 0, False, self.launch
        while True:
            state = self.state()
            unknown = unknown + 1 if state == "UNKNOWN" else 0
            if state == "ACTIVE":
                say(f"{launch.name} is up")
                return
            if state == "MISSING":
                # Right after it was asked for it may not be visible yet.
                if not created:
                    self.machines.prepare()
                    self.asked = True
                    self.machines.create()
                created = True
                if launch.dry_run:
                    return
            elif state == "FAILED":
                why = self.machines.failure()
                self.machines.refuse_quota(why)
                if created:
                    raise LaunchError(
                        1,
                        f"{self.where} failed: {complaint(why)}; correct the flags or "
                        "try another zone",
                    )
                say(f"{launch.name} failed before: deleting it")
                self.machines.remove()
            elif state == "SUSPENDED":
                say(f"{launch.name} was taken away: deleting what is left")
                created = False
                self.machines.remove()
            elif unknown >= LOOKS:
                raise self.unasked()
            elif state not in ("UNKNOWN", shown):
                say(f"{launch.name}: {state}")
            shown = state
            time.sleep(launch.poll)

    def unasked(self) -> LaunchError:
        return LaunchError(
            1,
            f"could not ask for {self.where}: {self.machines.error}; check `gcloud "
            "auth list`, --project and --zone",
        )

    def need(self) -> str:
        """The state of what exists; LaunchError where nothing does."""
        state = self.state()
        if state == "MISSING" and not self.launch.dry_run:
            raise LaunchError(
                2,
                f"there is no {self.where}: create it with up or run, or check --name, "
                "--zone and --project",
            )
        if state == "UNKNOWN":
            raise self.unasked()
        if not self.launch.dry_run:
            self.machines.count_slices()
        return state

    def delete(self) -> None:
        """Delete the machines; done, if there are none.

        Raises:
          LaunchError: the cloud refuses, again and again.
        """
        for last in (False,) * (TRIES - 1) + (True,):
            try:
                self.machines.remove()
                break
            except LaunchError as e:
                if last or e.status == 2:
                    raise
                say(f"{e}; trying again")
                time.sleep(self.launch.poll)
        if self.launch.dry_run:
            return
        self.asked = False
        self.budget.count(False)
        say(f"{self.where} is deleted")

    # --- the run ------------------------------------------------------------------

    def install_and_start(
        self, commit: str, archive: Path, words: Sequence[str]
    ) -> str:
        """Copy, install and start on every worker; says what failed, if anything."""
        launch = self.launch
        setup = Path(launch.setup).read_text() if launch.setup else ""
        extra = launch.extra or ("cuda" if launch.backend == "hosts" else "tpu")
        words_of_all = " ".join(word for c in launch.commands for word in c)
        if any(scheme in words_of_all for scheme in SCHEMES):
            extra += ",buckets"
        install = (scripts.INSTALL, commit, launch.python, setup, extra)
        say(f"installing commit {commit[:12]} on every worker")
        answer = self.machines.copy(str(archive), f"gamayun-{launch.name}.tgz")
        if answer.status:
            return f"the code cannot be copied: {answer.complaint}"
        answer = self.machines.on_all(*install)
        if answer.status:
            return f"the installation failed: {answer.complaint}"
        say(f"starting gamayun train {words[0]}")
        self.seen = 0
        answer = self.machines.start(scripts.START, *words)
        return f"the start failed: {answer.complaint}" if answer.status else ""

    def look(self) -> tuple[str, list[Worker]]:
        """What the workers do; the logs of those that failed are kept."""
        answer = self.machines.on_all(scripts.LOOK)
        if answer.status:
            return "unreachable", []
        workers = read_workers(answer.out)
        logs: dict[str, list[str]] = {}
        for host, line in re.findall(r"^gamayun-log (\S*) ?(.*)", answer.out, re.M):
            logs.setdefault(host, []).append(line)
        for host, lines in logs.items():
            self.launch.logs.mkdir(parents=True, exist_ok=True)
            text = "\n".join(lines) + "\n"
            (self.launch.logs / f"failed-{host}.log").write_text(text)
            named = [x for x in lines if x.startswith("gamayun: ")]
            self.told = (named or [x for x in lines if x.strip()] or [self.told])[-1]
        return judge(workers, self.sums), workers

    def show_failed(self, workers: Sequence[Worker]) -> None:
        """Print the ends of the logs of the workers that failed, whichever they are."""
        for worker in workers:
            log = self.launch.logs / f"failed-{worker.host}.log"
            failed = worker.state == "dead" or worker.status not in (0, 3)
            if failed and log.exists():
                say(
                    f"worker {worker.host} ended with {worker.state} {worker.status}; "
                    f"the end of its log ({log}):"
                )
                sys.stderr.write(log.read_text())

    def show_log(self) -> None:
        """Copy what is new in worker 0's log to the screen and to the log folder.

        It is polled, not streamed, so that a broken connection loses nothing.
        """
        answer = self.machines.on_worker(0, scripts.LOG_FROM, str(self.seen + 1))
        if answer.status or self.launch.dry_run:
            return
        self.seen += len(answer.out.encode())
        sys.stdout.write(answer.out)
        sys.stdout.flush()
        self.launch.logs.mkdir(parents=True, exist_ok=True)
        with (self.launch.logs / "worker0.log").open("a") as file:
            file.write(answer.out)

    def follow(self) -> tuple[str, list[Worker]]:
        """Follow the trainer until it ends one way or another, or the budget does."""
        lost = odd = ending = 0
        while True:
            found, workers = self.look()
            self.show_log()
            self.budget.count(True)
            if self.budget.spent:
                return "spent", workers
            if found == "running":
                lost = odd = ending = 0
            elif found == "ending":
                ending += 1
                if ending >= ENDING_LOOKS:
                    return found, workers
            elif found == "broken":
                # Workers end within seconds of each other, not at once: look again
                # before taking one that ended for a failure.
                odd += 1
                if odd >= 2:
                    return found, workers
            elif found == "unreachable":
                lost += 1
                if self.state() not in ("ACTIVE", "UNKNOWN") or lost >= LOOKS:
                    return found, workers
            else:
                return found, workers
            time.sleep(self.launch.poll)

    def run(self) -> None:
        """All commands of the launch, one after the other, through all restarts.

        Raises:
          LaunchError: how it ended, where that is not well.
        """
        launch = self.launch
        with tempfile.TemporaryDirectory() as folder:
            commit, archive = pack(launch, Path(folder))
            self.budget.announce()
            self.up()
            if launch.dry_run:
                for words in launch.commands:
                    self.install_and_start(commit, archive, words)
                self.look()
                self.show_log()
                self.delete_if_asked()
                say("a dry run: nothing was called")
                return
            first, going = self.going()
            for number in range(first, len(launch.commands)):
                self.run_one(launch.commands[number], commit, archive, going)
                going = False
        kept = not launch.delete_when_done and launch.backend != "hosts"
        say(f"the run is complete{'; the VMs still cost: `delete` them' * kept}")
        self.delete_if_asked()

    def going(self) -> tuple[int, bool]:
        """Which command to begin with, and whether it runs already."""
        found, workers = self.look()
        if found == "other":
            raise LaunchError(
                2,
                f"{self.launch.name} already trains with other arguments: stop it "
                "first, or use another --name",
            )
        if found not in ("running", "ending"):
            return 0, False
        say("it runs already: following it")
        sums = {worker.checksum for worker in workers}
        known = [number for number, s in enumerate(self.sums) if s in sums]
        return (known or [0])[0], True

    def run_one(
        self, words: Sequence[str], commit: str, archive: Path, going: bool
    ) -> None:
        """One command to its end; `going`: it runs already.

        Raises:
          LaunchError: refused, stopped, out of budget or of restarts.
        """
        restarts = failures = unset = 0
        while True:
            began = time.monotonic()
            workers: list[Worker] = []
            fault = "" if going else self.install_and_start(commit, archive, words)
            if fault:
                say(fault)
                found = "unreachable"
            else:
                found, workers = self.follow()
            going = False
            self.settle(found, workers)
            if found == "done":
                return
            state, restarts = self.state(), restarts + 1
            unset = unset + 1 if fault and state == "ACTIVE" else 0
            if unset >= TRIES:
                raise self.given_up(
                    1, f"{self.where} is there, but {fault}; see docs/tpu.md"
                )
            if restarts > self.launch.max_restarts:
                raise self.given_up(
                    5,
                    f"{self.where} ended {restarts} times without finishing: see "
                    f"{self.launch.logs}, then run again or raise --max-restarts "
                    f"{self.launch.max_restarts}",
                )
            # A try that lasted ten minutes did something: begin with short waits again.
            if time.monotonic() - began >= 600:
                failures = 0
            wait = self.launch.backoff << failures
            say(
                f"{self.launch.name} is {state} and the trainer {found}: restart "
                f"{restarts} of at most {self.launch.max_restarts} in {wait} s"
            )
            time.sleep(wait)
            failures = min(failures + 1, 4)
            self.up()
            self.machines.on_all(scripts.KILL)

    def settle(self, found: str, workers: Sequence[Worker]) -> None:
        """End the launch where nothing is to be tried again, by LaunchError."""
        if found in ("bad", "broken"):
            self.show_failed(workers)
        if found == "bad":
            self.machines.on_all(scripts.KILL)
            raise self.given_up(
                2,
                f"gamayun train refused its input on {self.launch.name}: "
                f"{self.told or f'see {self.launch.logs}'}; correct it and run again",
            )
        if found == "stopped":
            raise LaunchError(
                3,
                "stopped as asked; the same command goes on",
            )
        if found == "spent":
            self.save_and_delete()

    def given_up(self, status: int, message: str) -> LaunchError:
        """The error for a run that is not tried again; deletes, if that was asked."""
        try:
            self.delete_if_asked()
        except LaunchError as e:
            message += f"; {e}"
        return LaunchError(status, message)

    def delete_if_asked(self) -> None:
        """What --delete-when-done is for; hosts are not ours."""
        if self.launch.delete_when_done and self.launch.backend != "hosts":
            self.delete()

    def save_and_delete(self) -> None:
        """Let the trainers save, wait for them, delete; LaunchError says so."""
        say(f"the budget is spent ({self.budget.text}): saving, then deleting")
        self.machines.on_all(scripts.TERMINATE, "asked")
        until, found = time.monotonic() + SAVING, ""
        while time.monotonic() < until:
            found, _ = self.look()
            if found not in ("running", "ending", "unreachable"):
                break
            time.sleep(min(self.launch.poll, 5))
        self.show_log()
        if self.launch.backend != "hosts":
            self.delete()
        saved = "the run is saved" if found == "stopped" else "it was not seen to save"
        raise LaunchError(
            6, f"{self.budget.text}: {saved}; more hours go on from there"
        )

    # --- other commands -----------------------------------------------------------

    def status(self) -> None:
        """Print the state of the machines and what each worker does."""
        state = self.need()
        print(f"{self.launch.name}: {state}", flush=True)
        if state == "ACTIVE" or self.launch.dry_run:
            self.on_all(scripts.LOOK)

    def stop(self) -> None:
        """Ask the trainers to save and stop."""
        self.need()
        self.on_all(scripts.TERMINATE, "asked")

    def on_all(self, *words: str) -> None:
        answer = self.machines.on_all(*words)
        sys.stdout.write(answer.out)
        if answer.status:
            raise LaunchError(
                1,
                f"some workers of {self.where} do not answer: repeat the command, or "
                "`run` again to recreate them",
            )

    def logs(self) -> int:
        """Follow the log of one worker."""
        self.need()
        return self.machines.follow(self.launch.worker, scripts.LOG_FOLLOW)
