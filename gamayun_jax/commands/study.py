"""The command on studies."""

from __future__ import annotations

from pathlib import Path

from gamayun_jax.commands import Local, LocalFolder
from gamayun_jax.config import Whole


def study(
    file: Local,
    *,
    out: LocalFolder,
    plan: bool = False,
    side_by_side: Whole = 0,
    keep_runs: bool = False,
    arms: str = "*",
) -> int:
    """Make the runs of a study that have no record yet, then its page.

    The first start freezes hypotheses, outcomes and arms in OUT/registration.json.
    The same command goes on where it was stopped; started several times, on one machine
    or on a shared folder, the processes share the work.

    Examples:
      gamayun study experiments/order/study.py --out experiments/order --plan
      gamayun study experiments/order/study.py --out experiments/order
      gamayun study experiments/order/study.py --out experiments/order --side-by-side 32

    Args:
      file (STUDY): a Python file with get_study() -> Study.
      out: folder of the registration, the records and the page.
      plan: train nothing; print the runs, what they cost and what they can show.
      side_by_side (N): train up to N runs in one program, on one device; 0: one after
        the other, each an ordinary run.
      keep_runs: keep the folders of finished runs, with their checkpoints.
      arms (GLOB): only the runs of arms whose names match.
    """
    from gamayun_jax.training import xla

    xla.set_flags()
    from gamayun_jax.study import design, planning, runner

    asked = design.load_study(file)
    if plan:
        print(planning.plan_text(asked, out))
        return 0
    xla.keep_compilations(out / "compiled")
    if status := runner.run_study(asked, out, side_by_side, keep_runs, arms):
        return status
    show_study(out)
    return 0


def show_study(folder: Path) -> None:
    """Write a study's page and files from its records, and print its tables."""
    from gamayun_jax.report import study as report
    from gamayun_jax.report import study_tables
    from gamayun_jax.study import findings

    found = findings.analyse(folder)
    page = report.write_study(found, folder)
    print(f"{study_tables.study_text(found)}\n\n{page}")
