"""The commands of `gamayun`: one function each, whose signature and docstring are what
the command line reads and what its help says (cli.py tells how).

Modules that import JAX are imported by the command that needs them, so that help and
wrong arguments answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from gamayun_jax.config import UserError
from gamayun_jax.fields import LOCAL, is_local
from gamayun_jax.storage import check_writable, is_bucket, with_checkpoints

REPOSITORY = Path(__file__).parents[2]
FORMATS = (".png", ".svg", ".pdf")  # of pictures that matplotlib writes


def can_write(folder: Path) -> bool:
    """Whether files can be written into a folder, which may have to be made; UserError
    says why not of one in a bucket."""
    if is_bucket(folder):
        check_writable(folder)
        return True
    folder = folder.absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    return there.is_dir() and os.access(there, os.W_OK)


# A Path is on this machine or in a bucket. A Local one is what is executed, mapped into
# memory, locked, or written bit by bit.
LOCAL_PATH = (LOCAL, is_local)
Local = Annotated[Path, LOCAL_PATH]
# What a command writes in the end is looked at before the work begins.
WRITABLE = ("a folder that can be made and written", can_write)
Folder = Annotated[Path, WRITABLE]
LocalFolder = Annotated[Local, WRITABLE]
# A folder that gets checkpoints.
RunFolder = Annotated[Path, ("where checkpoints can be", with_checkpoints), WRITABLE]
File = Annotated[
    Local,
    (
        "a file in a folder that can be made and written",
        lambda p: not p.is_dir() and can_write(p.parent),
    ),
]
Picture = Annotated[
    File, (f"named {', '.join(FORMATS)}", lambda p: p.suffix.lower() in FORMATS)
]
Repeated = Annotated[Sequence[str], "append"]  # an option that may be given many times
# Help of parameters that several commands share; a docstring may say something else.
COMMON = """\
  config: Python experiment file (executed).
  corpus: corpus folder with held-out sets (default: the run's own).
  languages (LANGUAGE): only these languages (default: all).
  limit (N): most items per language and task (default: all).
  model: run folder, checkpoint or Hugging Face folder.
  out: folder to write.
  set_ (A.B=VALUE): change one field of the config; may be repeated.
  work: folder for the downloads (default: OUT/downloads).
"""


def note(text: str) -> None:
    """Print a line on stderr: for the person who waits, not for the output's reader."""
    print(text, file=sys.stderr, flush=True)


def in_repository(path: str) -> Path:
    """A path in a clone of the repository; UserError where this package is not one."""
    if not (REPOSITORY / path).exists():
        raise UserError(
            f"{REPOSITORY / path} is missing: this command is for a clone of the "
            "repository, installed with `pip install -e .`"
        )
    return REPOSITORY / path
