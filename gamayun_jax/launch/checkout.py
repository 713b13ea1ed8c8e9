"""The code that is trained: a commit of a clone, as one file to send."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gamayun_jax.fields import UserError
from gamayun_jax.launch.description import Launch


def pack(launch: Launch, folder: Path) -> tuple[str, Path]:
    """The commit to train, and an archive of its code.

    Raises:
      UserError: no clone, uncommitted changes, or a config that is not in it.
    """
    root = launch.checkout

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, check=False
        )

    root = git("rev-parse", "--show-toplevel").stdout.strip() or root
    changed = git("status", "--porcelain")
    commit = git("rev-parse", "HEAD").stdout.strip()
    if changed.returncode or not commit:
        raise UserError(f"{root} is no git checkout: clone the project with git")
    if changed.stdout and not launch.allow_dirty:
        raise UserError(
            f"{root} has uncommitted changes: commit them, or give --allow-dirty"
        )
    if changed.stdout:
        # A commit of the changed files that no branch names; none of new files.
        commit = git("stash", "create").stdout.strip() or commit
    for words in launch.commands:
        if git("cat-file", "-e", f"{commit}:{words[0]}").returncode:
            raise UserError(
                f"config {words[0]} is not in commit {commit[:12]} of {root}: give "
                "its path from there, and commit it"
            )
    archive = folder / "code.tgz"
    git("archive", "--format", "tar.gz", "-o", str(archive.absolute()), commit)
    return commit, archive
