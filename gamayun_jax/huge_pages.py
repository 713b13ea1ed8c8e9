"""Memory in huge pages for processes that compute on CPUs, asked of glibc's malloc.

XLA's CPU client frees its buffers after every step, and the system clears and maps
their pages anew, 4 kB at a time. In pages of 2 MB that is one fault instead of 512.
glibc reads the setting before a process begins, so it has to be in the environment by
then. docs/speed.md has what it is worth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
RESTARTED = "GAMAYUN_RESTARTED"  # the process that has been: never twice


def libc() -> str:
    """The C library with its version, as in "glibc 2.36"; empty if it is another."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # Windows; musl, macOS
        return ""


def changes(
    environment: Mapping[str, str] = os.environ,
    version: str | None = None,
    thp: Path = THP,
) -> dict[str, str]:
    """What a process to be started needs in its environment for huge pages.

    Empty where there is nothing to do: not glibc 2.35 or newer, huge pages switched off
    in the system, a library loaded before all others (an allocator, it may be), or the
    tunable set already. So `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` switches them off.

    Args:
      version: as `libc` gives it; default: this process's.
    """
    name, _, number = (libc() if version is None else version).partition(" ")
    given = environment.get("GLIBC_TUNABLES", "")
    try:
        old = name != "glibc" or tuple(map(int, number.split(".")[:2])) < (2, 35)
        never = "[never]" in thp.read_text()
    except (OSError, ValueError):
        return {}
    if old or never or environment.get("LD_PRELOAD") or f"{TUNABLE}=" in given:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (given, f"{TUNABLE}=1")))}


def restart() -> None:
    """Begin this process again, once, with huge pages; returns if there is no need.

    It stays the same process to whoever started it: number, arguments, open streams.
    Call it before anything is imported or read. Not under a debugger, which would lose
    the process.
    """
    number = str(os.getpid())
    new = changes()
    if not new or not sys.executable or sys.gettrace():
        return
    if os.environ.get(RESTARTED) == number:  # something took the setting away again
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    try:
        os.execve(sys.executable, command, {**os.environ, **new, RESTARTED: number})
    except OSError:  # the interpreter is not where it was: go on as it is
        return
