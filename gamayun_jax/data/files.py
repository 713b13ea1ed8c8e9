"""Files and folders written whole or not at all, checksums, and locks on folders."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.storage import (
    as_path,
    is_bucket,
    lexists,
    process_folder,
    remove_tree,
    upload,
    upload_file,
)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path on this machine that becomes `path`, durably, if the block
    succeeds; in a bucket by one upload."""
    if is_bucket(path):
        with tempfile.TemporaryDirectory(dir=process_folder()) as folder:
            temporary = Path(folder, path.name)
            yield temporary
            upload_file(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_new(out: AnyPath) -> None:
    """Raise UserError if there is anything at `out` but an empty folder."""
    out = as_path(out)
    if lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: give a new folder, or delete it")


@contextlib.contextmanager
def new_folder(out: AnyPath) -> Iterator[Path]:
    """A folder on this machine that becomes `out`, durably, if the block succeeds: a
    hidden one beside it, or, for one in a bucket, a temporary one. There its
    manifest.json or config.json comes last, and a folder without it is not whole.

    Raises:
      UserError: there is something at `out` already.
    """
    check_new(out)
    out = as_path(out)
    if is_bucket(out):
        with tempfile.TemporaryDirectory(dir=process_folder()) as folder:
            yield Path(folder)
            upload(Path(folder), out)
        return
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    remove_tree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        os.replace(temporary, out)
        sync(out.parent)
    except BaseException:
        remove_tree(temporary)
        raise


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def json_text(data: Any) -> str:
    """Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Raises ValueError for NaN and infinities, which JSON does not have."""
    write_text(path, json_text(data))


def json_lines(data: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    r"""(line without its end, the JSON object in it or None) of each line, ended by
    "\n" alone: JSON texts hold other characters that str.splitlines takes for ends."""
    lines = data.split(b"\n")
    for line in lines if lines[-1] else lines[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield line, value if isinstance(value, dict) else None


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file, whole or not at all; ValueError for NaN and infinities."""
    lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)
    write_text(path, "".join(lines))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; ValueError names a line that is not one."""
    objects = []
    for number, (line, row) in enumerate(json_lines(path.read_bytes()), 1):
        if row is None:
            raise ValueError(f"line {number} is no JSON object: {line[:60]!r}")
        objects.append(row)
    return objects


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with as_path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_files_limit() -> int:
    """How many files this process may have open, having raised that as far as the
    system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard % 2**63, 2**16)  # unlimited is -1
    if soft % 2**63 < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return min(soft % 2**63, 2**16)


@contextlib.contextmanager
def lock(path: Path, busy: UserError) -> Iterator[None]:
    """A file or folder of this machine for one process at a time; the lock goes with
    the process.

    Raises:
      UserError: `busy`, if another process has it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise busy from e
        yield
    finally:
        os.close(fd)


def read_json(
    path: Path, advice: str = "copy it again", missing: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      missing: what is returned where there is no file; an error without it.

    Raises:
      UserError: it is not there or may not be read; or it is damaged, and then with
        `advice`.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as e:
        gone = isinstance(e, FileNotFoundError)
        # A link to what is not mounted is there.
        if missing is not None and gone and (is_bucket(path) or not lexists(path)):
            return missing
        raise unreadable(path, e) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}): {advice}") from e
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: {advice}")
    return data


def read_text(path: Path, advice: str = "copy it again") -> str:
    """The text of a file in UTF-8. Raises as `read_json`."""
    try:
        return path.read_text("utf-8")
    except OSError as e:
        raise unreadable(path, e) from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({first_line(e)}): {advice}") from e


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def unreadable(path: Path, e: OSError) -> UserError:
    """The error for a file that the system does not let us read; it may be whole."""
    if isinstance(e, FileNotFoundError):
        return UserError(f"{path} is missing: restore it from a copy")
    if is_bucket(path):
        return UserError(f"{path} cannot be read: {e.strerror or e}")
    return UserError(
        f"{path} cannot be read ({e.strerror or e}): see to its permissions and its "
        "file system"
    )
