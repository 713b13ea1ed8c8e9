"""Paths on this machine and in buckets (gs://, s3://), as one kind to the rooms.

A local path stays a pathlib.Path. One in a bucket is a `BucketPath` (buckets.py), which
has the methods of pathlib.Path that this package uses. What only one of the two can do
stands here: whole trees, and what a bucket has in place of a rename.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import platform
import re
import shutil
import stat
import tempfile
from pathlib import Path, PurePath
from typing import Any, cast

from gamayun_jax.fields import BUCKETS, SCHEMES, AnyPath, UserError


class InUseError(UserError):
    """Another process writes a folder."""


# pathlib takes one of an address's slashes away.
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)


def scheme_of(path: AnyPath | PurePath) -> str:
    """The scheme of an address, such as gs; "" of a path on this machine."""
    text = os.fspath(path)
    found = ADDRESS.fullmatch(text)
    return found[1] if found and ("://" in text or isinstance(path, PurePath)) else ""


def is_bucket(path: AnyPath | PurePath) -> bool:
    """Whether a path is in a bucket."""
    return scheme_of(path) in BUCKETS


def bucket_of(path: AnyPath | PurePath) -> tuple[str, str]:
    """(bucket, key) of an address, as the user's or as pathlib has it."""
    found = ADDRESS.fullmatch(os.fspath(path))
    assert found, path
    bucket, _, key = found[2].partition("/")
    return bucket, key


def as_path(path: AnyPath | PurePath, where: str = "") -> Path:
    """The path that a user gave: a pathlib.Path, or a BucketPath with its methods.

    Args:
      where: the beginning of an error's message: what the path is given as.

    Raises:
      UserError: an address that no package reads here, or without a bucket's name.
    """
    scheme = scheme_of(path)
    if not scheme:
        return Path(path)
    if scheme not in BUCKETS:
        raise UserError(
            f"{where}{path} is an address of a kind that is not read: give a path on "
            f"this machine or one of {', '.join(SCHEMES)}; or mount what is there"
        )
    try:
        from gamayun_jax.buckets import BucketPath
    except ImportError as e:  # etils comes with Orbax, its parts for paths may not
        raise _no_package(where, path, scheme) from e
    bucket, rest = bucket_of(path)
    if len(bucket) < 3:
        raise UserError(
            f"{where}{path}: {bucket!r} is no bucket's name, which has three letters "
            f"or more: write {scheme}://BUCKET/FOLDER"
        )
    made = BucketPath(f"{scheme}://{bucket}/{rest}")
    try:
        _ = made.fs
    except ImportError as e:
        raise _no_package(where, path, scheme) from e
    return cast(Path, made)


def _no_package(where: str, path: Any, scheme: str) -> UserError:
    return UserError(
        f"{where}{path}: buckets of {scheme}:// are read by the package "
        f"{BUCKETS[scheme]}, which is not installed: pip install 'gamayun_jax[buckets]'"
    )


def with_checkpoints(folder: Path) -> Path:
    """The folder itself.

    Raises:
      UserError: checkpoints cannot be written or read there.
    """
    if (scheme := scheme_of(folder)) not in ("", "gs"):
        raise UserError(
            f"{folder}: checkpoints are written and read by Orbax, which knows disks "
            f"and gs://, not {scheme}://: give one of these, and copy what should be "
            "there (`aws s3 sync`)"
        )
    return folder


def as_given(path: Path) -> Path:
    """An absolute path; one in a bucket always is."""
    return path if is_bucket(path) else path.absolute()


def lexists(path: Path) -> bool:
    """Whether there is anything at a path, a broken link included."""
    return path.exists() if is_bucket(path) else os.path.lexists(path)


def remove_tree(folder: Path) -> None:
    """Delete a folder and all below it; nothing if there is none."""
    if is_bucket(folder):
        cast(Any, folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(old: Path, new: Path) -> None:
    """Move a file or folder within a file system, or within a bucket, which has no
    rename: all is copied first, and nothing is lost if it ends midway."""
    if not is_bucket(old):
        old.rename(new)
        return
    from gamayun_jax.buckets import move

    move(cast(Any, old), cast(Any, new))


def bucket_refuses(error: OSError) -> bool:
    """Whether an error of a bucket says nothing of the object itself, which may be
    whole."""
    from gamayun_jax.buckets import refuses

    return refuses(error)


def listed_once(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A block that asks much of a folder that nobody else changes meanwhile: each
    request costs time in a bucket, where a listing answers many."""
    if not is_bucket(folder):
        return contextlib.nullcontext()
    from gamayun_jax.buckets import listed_once

    return listed_once(cast(Any, folder))


def check_writable(folder: Path) -> None:
    """Raise UserError, which says why, unless objects can be written below a folder of
    a bucket: one is, and is deleted."""
    from gamayun_jax.buckets import reason_of

    probe = folder / f".{os.getpid()}.tmp"
    try:
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: {reason_of(e, cast(Any, folder))}") from e


def sizes_below(folder: Path) -> dict[str, int]:
    """Path -> bytes of all objects below a folder of a bucket, by listing it: a request
    for a thousand.

    Raises:
      UserError: the bucket cannot be listed.
    """
    from gamayun_jax.buckets import listed_sizes, reason_of

    try:
        return listed_sizes(cast(Any, folder))
    except OSError as e:
        raise UserError(f"{folder}: {reason_of(e, cast(Any, folder))}") from e


def upload(local: Path, out: Path) -> None:
    """Put the files of a local folder into a bucket; those that complete it last."""
    from gamayun_jax.buckets import upload

    upload(local, cast(Any, out))


def download_file(path: Path, local: Path) -> None:
    """Copy an object to a file on this machine."""
    from gamayun_jax.buckets import download_file

    download_file(cast(Any, path), local)


@functools.cache
def local_file(path: Path) -> Path:
    """A path on this machine with what is at `path`: itself; or a copy, made once, of
    what is in a bucket, which goes with this process."""
    if not is_bucket(path):
        return path
    local = Path(tempfile.mkdtemp(dir=process_folder()), path.name)
    download_file(path, local)
    return local


@functools.cache
def process_folder() -> Path:
    """A temporary folder of this process, deleted when it ends. Where it is killed, the
    next process that asks for its own deletes it: the system drops the lock on it."""
    # With the host's name: machines may share the folder above, and not its locks.
    root = Path(tempfile.gettempdir(), f"gamayun-{os.getuid()}-{platform.node()}")
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    alone = not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid()
    if alone:
        root = Path(tempfile.mkdtemp(prefix="gamayun-"))  # that one is somebody else's
    all_of_them = os.open(root, os.O_RDONLY)
    unlocked = contextlib.suppress(OSError)  # on NFS: nothing is deleted there
    with unlocked:  # none is half made while they are looked at
        fcntl.flock(all_of_them, fcntl.LOCK_EX)
    for former in root.iterdir():
        with unlocked:
            held = os.open(former, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(former, ignore_errors=True)
            finally:
                os.close(held)
    made, owner = Path(tempfile.mkdtemp(dir=root)), os.getpid()
    with unlocked:  # not closed: the lock lives as long as the process, and its forks
        fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)
    os.close(all_of_them)

    def delete() -> None:
        if os.getpid() == owner:
            shutil.rmtree(root if alone else made, ignore_errors=True)

    atexit.register(delete)
    return made


def upload_file(local: Path, out: Path) -> None:
    """Put a local file in the place of an object, whole or not at all."""
    from gamayun_jax.buckets import upload_file

    upload_file(local, cast(Any, out))
