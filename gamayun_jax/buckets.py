"""Paths in buckets: epath's, which Orbax takes, with what it lacks of pathlib.

Imported by what has met an address (storage.as_path), so that nothing else waits for
it. Files are objects: each is written whole or not at all, none is appended to, and a
folder is there as long as an object's name begins with it.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils.epath import gpath
from etils.epath.backend import fsspec_backend

# Listings change under us: TensorStore and other processes write beside fsspec.
for _name in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_name, {}).setdefault("use_listings_cache", False)

# Whoever finds one of these takes the folder for complete.
COMPLETING = ("manifest.json", "config.json", "commit_success.txt")


def os_errors(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call to a bucket whose errors, of the kinds of several packages, are OSErrors,
    as those of files are."""

    @functools.wraps(call)
    def told(*args: Any, **words: Any) -> Any:
        try:
            return call(*args, **words)
        except (OSError, ImportError, TypeError, AttributeError, NotImplementedError):
            raise
        except Exception as e:
            raise OSError(" ".join(str(e).split()) or type(e).__name__) from e

    return told


class _Backend:
    """fsspec's, with OSErrors; never TensorFlow's, which epath prefers."""

    def __getattr__(self, name: str) -> Any:
        return os_errors(getattr(fsspec_backend, name))


class BucketPath(gpath.PosixGPath):
    """A path gs://BUCKET/... or s3://BUCKET/..."""

    _backend = _Backend()  # type: ignore[assignment]

    @property
    def fs(self) -> Any:
        """The file system of fsspec; ImportError where its package is missing."""
        return fsspec_backend.fs(self)

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def is_absolute(self) -> bool:
        return True

    def is_symlink(self) -> bool:
        return False

    def mkdir(
        self, mode: int | None = None, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Nothing: a folder is there with its first object; and no bucket is made."""
        if not exist_ok and self.exists():
            raise FileExistsError(str(self))

    @os_errors
    def is_file(self) -> bool:
        return self.fs.isfile(str(self))

    @os_errors
    def read_bytes(self) -> bytes:
        return self.fs.cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    @os_errors
    def write_bytes(self, data: bytes) -> int:
        self.fs.pipe_file(str(self), data)
        return len(data)

    def write_text(  # type: ignore[override]
        self, data: str, encoding: str | None = None, **_: Any
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    @os_errors
    def open(self, mode: str = "r", buffering: int = -1, **words: Any) -> Any:
        """To read, as pathlib's; what is written comes whole, by `write_bytes`."""
        if set(mode) - set("rbt"):
            raise ValueError(f"{self} is opened to read alone, not with mode {mode!r}")
        return self.fs.open(str(self), mode, **words)

    @os_errors
    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Files alone, of any depth, in order: a bucket has no folders of its own."""
        found = sorted(self.fs.find(str(self)))
        paths = (self._new(f"{self._uri_scheme}://{path}") for path in found)
        return (path for path in paths if path.match(pattern))

    @os_errors
    def size(self) -> int:
        """Bytes of the object; FileNotFoundError where there is none."""
        return self.fs.size(str(self))


@os_errors
def listed_sizes(folder: BucketPath) -> dict[str, int]:
    """Address -> bytes of all objects below a folder."""
    found = folder.fs.find(str(folder), detail=True)
    return {f"{folder._uri_scheme}://{k}": v["size"] for k, v in found.items()}


@os_errors
def move(old: BucketPath, new: BucketPath) -> None:
    """Copy all objects, then delete the old ones. A checkpoint's mark of completeness
    is the first to go: half of one must not look whole."""
    fs = old.fs
    found = sorted(fs.find(str(old))) or [fs._strip_protocol(str(old))]
    begin = len(fs._strip_protocol(str(old)))
    for path in found:
        fs.cp_file(path, f"{fs._strip_protocol(str(new))}{path[begin:]}")
    marks = [p for p in found if posixpath.basename(p) == "commit_success.txt"]
    for path in marks:
        fs.rm_file(path)
    if rest := [p for p in found if p not in marks]:
        fs.rm(rest)


@os_errors
def upload(local: Path, out: BucketPath) -> None:
    """Put the files of a local folder into a bucket; those that complete it last."""
    fs = out.fs
    found = [p for p in sorted(local.rglob("*")) if p.is_file()]
    for last in (False, True):
        part = [p for p in found if (p.name in COMPLETING) == last]
        names = [f"{out}/{p.relative_to(local).as_posix()}" for p in part]
        if part:
            fs.put([str(p) for p in part], names)


@os_errors
def download_file(path: BucketPath, local: Path) -> None:
    """Copy an object to a file on this machine."""
    path.fs.get_file(str(path), str(local))


@os_errors
def upload_file(local: Path, out: BucketPath) -> None:
    """Put a local file in the place of an object, whole or not at all."""
    out.fs.put_file(str(local), str(out))


def reason_of(error: BaseException, path: BucketPath) -> str:
    """What is wrong with a bucket, and what to do, as the end of a message."""
    text, scheme = " ".join(str(error).split()), path._uri_scheme
    bucket = path.parts[2]  # /, the scheme, the bucket, ...
    low = text.lower()
    if isinstance(error, FileNotFoundError) or "nosuchbucket" in low or "404" in low:
        return (
            f"there is no bucket {scheme}://{bucket} for these credentials: make "
            "it, or correct its name"
        )
    if any(word in low for word in ("credential", "401", "anonymous", "unauthorized")):
        how = {
            "gs": "`gcloud auth application-default login`, or name a key file in "
            "GOOGLE_APPLICATION_CREDENTIALS",
            "s3": "`aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        }[scheme or "gs"]
        return f"no valid credentials for {scheme}://{bucket} ({text[:200]}): {how}"
    if any(word in low for word in ("forbidden", "403", "accessdenied", "denied")):
        return (
            f"{scheme}://{bucket} may not be used so ({text[:200]}): ask for the right "
            "to read and to write objects there"
        )
    return f"{text[:300] or type(error).__name__}: see to the network and the bucket"
