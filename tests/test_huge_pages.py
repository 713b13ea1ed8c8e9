"""The command begins again with memory in huge pages: once, and nobody notices."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from gamayun_jax import huge_pages

ON = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
CLEAN = {
    k: v
    for k, v in os.environ.items()
    if k not in ("GLIBC_TUNABLES", "LD_PRELOAD", huge_pages.RESTARTED)
}
needs_glibc = pytest.mark.skipif(
    not huge_pages.changes(CLEAN), reason="this system has no use for the tunable"
)


@pytest.fixture
def thp(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


@pytest.mark.parametrize(
    ("environment", "version", "expected"),
    [
        ({}, "glibc 2.35", ON),
        ({}, "glibc 2.36.9000", ON),
        ({}, "glibc 2.34", {}),
        ({}, "", {}),  # musl, macOS
        ({}, "musl 9.9", {}),
        ({}, "glibc unknown", {}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc 2.40", {}),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "glibc 2.40", {}),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
            "glibc 2.40",
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"},
        ),
    ],
)
def test_only_where_glibc_can_and_nobody_has_said_otherwise(
    thp, environment, version, expected
):
    assert huge_pages.changes(environment, version, thp) == expected
    # What a changed process finds, it leaves.
    assert huge_pages.changes(environment | expected, version, thp) == {}


def test_not_where_the_system_has_none(tmp_path, thp):
    assert huge_pages.changes({}, "glibc 2.40", tmp_path / "nothing") == {}
    thp.write_text("always madvise [never]\n")
    assert huge_pages.changes({}, "glibc 2.40", thp) == {}


def run(code, *words, environment=CLEAN, executable=sys.executable, **options):
    program = "from gamayun_jax import huge_pages\n" + textwrap.dedent(code)
    command = [executable, "-c", program, *words]
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run(command, env=environment, **options)


TELL = """
import os, sys
print("begun", os.getpid(), flush=True)
huge_pages.restart()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.stdin.read(), flush=True)
sys.exit(7)
"""


@needs_glibc
def test_process_begins_again_once_as_the_same_one():
    done = run(TELL, "a b", "--c=d", "", input="typed")
    first, again, told = done.stdout.splitlines()
    assert first == again
    assert told == "glibc.malloc.hugetlb=1 ['a b', '--c=d', ''] typed"
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize(
    "change",
    [
        ON,
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        {"LD_PRELOAD": "libc.so.6"},
    ],
    ids=str,
)
def test_process_that_has_or_refuses_them_stays(change):
    done = run(TELL, environment=CLEAN | change, input="")
    assert done.stdout.count("begun") == 1
    assert done.returncode == 7


@needs_glibc
def test_no_loop_where_the_setting_is_taken_away_again(tmp_path):
    """By a wrapper around the interpreter, or by the loader of a privileged one."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nunset GLIBC_TUNABLES\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    code = TELL.replace(
        "huge_pages.restart()",
        f"""
sys.executable = {str(wrapper)!r}
huge_pages.restart()""",
    )
    done = run(code, input="")
    assert done.stdout.count("begun") == 2
    assert done.returncode == 7


@needs_glibc
def test_goes_on_where_the_interpreter_is_gone():
    code = TELL.replace(
        "huge_pages.restart()",
        """
sys.executable = "/nowhere/python"
huge_pages.restart()""",
    )
    done = run(code, input="x")
    assert (done.stdout.count("begun"), done.returncode) == (1, 7)


@needs_glibc
def test_signals_end_it_as_they_would():
    code = """
    import os, time
    huge_pages.restart()
    print("ready", flush=True)
    time.sleep(60)
    """
    program = "from gamayun_jax import huge_pages\n" + textwrap.dedent(code)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with process:
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            assert process.wait(30) in (-number, 130)


@needs_glibc
def test_fresh_memory_takes_few_faults():
    """The tunable does here what it is there for; NumPy's own advice is off."""
    code = """
    import resource
    import numpy as np
    huge_pages.restart()
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    before = faults()
    for _ in range(4):
        np.ones(100 << 20, np.uint8)
    print(faults() - before)
    """
    small = {"NUMPY_MADVISE_HUGEPAGE": "0"}
    off = {**CLEAN, **small, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    many = int(run(code, environment=off).stdout)
    few = int(run(code, environment=CLEAN | small).stdout)
    pages = 4 * (100 << 20) // resource.getpagesize()
    assert many > 0.9 * pages
    assert few < 0.5 * pages


@needs_glibc
def test_command_has_them_and_calls_in_process_do_not():
    code = """
    import os
    from gamayun_jax import {what}
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        {call}
    finally:
        print(os.environ.get("GLIBC_TUNABLES"))
    """
    entry = dict(what="__main__", call="__main__.main()")
    inside = dict(what="cli", call='cli.main(["curriculum"])')
    assert "hugetlb=1" in run(code.format(**entry), "--version").stdout
    assert run(code.format(**inside)).stdout.splitlines()[-1] == "None"
