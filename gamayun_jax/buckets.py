"""Paths in buckets: epath's, which Orbax takes, with what it lacks of pathlib.

Imported by what has met an address (storage.as_path), so that nothing else waits for
it. Files are objects: each is written whole or not at all, none is appended to, and a
folder is there as long as an object's name begins with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from etils import epath
from etils.epath import gpath
from etils.epath.backend import fsspec_backend

from gamayun_jax.fields import UserError, causes_of

# Seconds without an answer to a connection, or without a byte of an answer, after which
# a request is made again. None for the whole of a request: a slow one makes progress.
CONNECT_SECONDS, SILENT_SECONDS = 10, 30
ATTEMPTS = 6  # of a request; gcsfs has as many, in half a minute where all are refused
PIECE = 2**24  # bytes of an object that one request reads

# Listings change under us: TensorStore and other processes write beside fsspec.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {  # by both of a scheme's names
    ("gs", "gcs"): {
        "use_listings_cache": False,
        "requests_timeout": aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
        ),
    },
    ("s3", "s3a"): {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS},
        },
    },
}
S3_ROUNDS = 2  # s3fs asks botocore again, whose attempts they multiply


def _configure() -> None:
    """Give fsspec our options below the user's own, which may be under either name of a
    scheme: fsspec takes the second name's over the first's."""
    conf = fsspec.config.conf
    for names, ours in OPTIONS.items():
        merged = dict(ours)
        for name in names:
            for key, value in conf.get(name, {}).items():
                both = isinstance(value, dict) and isinstance(merged.get(key), dict)
                merged[key] = merged[key] | value if both else value
        conf[names[-1]] = merged


_configure()
# TensorStore, by which Orbax writes, waits for ever otherwise.
os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(CONNECT_SECONDS))
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(SILENT_SECONDS))
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

# What they give up they raise, too.
for _name in ("gcsfs", "google.auth"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

# Whoever finds one of these takes the folder for complete.
COMPLETING = ("manifest.json", "config.json", "commit_success.txt")


# By these, Python makes OSErrors of their own kinds.
NUMBERS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT}


def os_errors(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call to a bucket whose errors, of the kinds of several packages, are OSErrors,
    as those of files are: `strerror` is one line, `filename` the address."""

    @functools.wraps(call)
    def told(*args: Any, **words: Any) -> Any:
        try:
            return call(*args, **words)
        except (ImportError, TypeError, AttributeError, NotImplementedError):
            raise
        except Exception as e:
            given = (*args, *words.values())
            named = (str(a) for a in given if not isinstance(a, bytes))
            address = next((a for a in named if "://" in a), "")
            if not address:
                raise  # an error in the call, which has no path
            if isinstance(e, FileExistsError) or getattr(e, "filename", None):
                raise  # ours already, or of a file of this machine
            number = NUMBERS.get(status_of(e) or 0, errno.EIO)
            raise OSError(number, reason_of(e, BucketPath(address)), address) from e

    return told


class _Backend:
    """fsspec's, with OSErrors; never TensorFlow's, which epath prefers."""

    def __getattr__(self, name: str) -> Any:
        return os_errors(getattr(fsspec_backend, name))


@epath.register_path_cls(("gs://", "s3://"))  # JAX's cache reads by it, too
class BucketPath(gpath.PosixGPath):
    """A path gs://BUCKET/... or s3://BUCKET/..."""

    _backend = _Backend()  # type: ignore[assignment]

    @property
    def fs(self) -> Any:
        """The file system of fsspec; ImportError where its package is missing."""
        fs = fsspec_backend.fs(self)
        if self._uri_scheme == "s3":
            fs.retries = S3_ROUNDS
        return fs

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
    def _kind(self) -> str:
        """file, directory, or "" where there is nothing. fsspec's own questions have no
        error: to them, what a bucket refuses or cannot tell is not there."""
        fs = self.fs
        try:
            if _listed and f"{self.parent}/".startswith(f"{_listed}/"):
                fs.ls(str(self.parent))  # tells of what lies beside it, too
            return fs.info(str(self))["type"]
        except FileNotFoundError:
            return ""

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return bool(self._kind())

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

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

    def open(self, mode: str = "r", buffering: int = -1, **words: Any) -> Any:
        """To read, as pathlib's; what is written comes whole, by `write_bytes`."""
        if set(mode) - set("rbt"):
            raise ValueError(f"{self} is opened to read alone, not with mode {mode!r}")
        file = io.BufferedReader(Pieces(self), PIECE)
        return file if "b" in mode else io.TextIOWrapper(file, **words)

    @os_errors
    def iterdir(self) -> Iterator[BucketPath]:
        """Without the object of no bytes by which the console keeps an empty folder."""
        own = self.fs._strip_protocol(str(self)).rstrip("/")
        names = [name.rstrip("/") for name in self.fs.ls(str(self), detail=False)]
        found = [f"{self._uri_scheme}://{name}" for name in names if name != own]
        return map(self._new, found)

    @os_errors
    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Files alone, of any depth, in order: a bucket has no folders of its own."""
        found = sorted(p for p in self.fs.find(str(self)) if not p.endswith("/"))
        paths = (self._new(f"{self._uri_scheme}://{path}") for path in found)
        return (path for path in paths if path.match(pattern))

    def check_bucket(self, where: str = "") -> None:
        """Raise UserError, which begins with `where`, if there is no such bucket."""
        if not has_bucket(self):
            error = FileNotFoundError()
            raise UserError(f"{where}{self}: {reason_of(error, self)}")

    @os_errors
    def size(self) -> int:
        """Bytes of the object; FileNotFoundError where there is none."""
        return self.fs.size(str(self))


_listed = ""  # the folder of the block of `listed_once` that runs


@contextlib.contextmanager
def listed_once(folder: BucketPath) -> Iterator[None]:
    """Within the block each folder that is asked for is listed once, and what is there
    is known by that, until this process changes it. For blocks that ask much of what
    nobody else changes meanwhile."""
    global _listed
    if _listed:  # by a block around this one
        yield
        return
    cache = folder.fs.dircache
    before, cache.use_listings_cache = cache.use_listings_cache, True
    _listed = str(folder)
    try:
        yield
    finally:
        _listed = ""
        cache.use_listings_cache = before
        cache.clear()


class Pieces(io.RawIOBase):
    """An object that is read by requests for its parts, each of which is made again
    where it fails. Errors are those of `os_errors`."""

    def __init__(self, path: BucketPath):
        self.path, self._at, self._size = path, 0, path.size()

    def __str__(self) -> str:
        return str(self.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    @os_errors
    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self.path.fs.cat_file(str(self.path), start=self._at, end=end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@os_errors
def listed_sizes(folder: BucketPath) -> dict[str, int]:
    """Address -> bytes of all objects below a folder."""
    found = folder.fs.find(str(folder), detail=True)
    files = {k: v["size"] for k, v in found.items() if not k.endswith("/")}
    return {f"{folder._uri_scheme}://{k}": size for k, size in files.items()}


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


def download_file(path: BucketPath, local: Path) -> None:
    """Copy an object to a file on this machine."""
    with path.open("rb") as remote, local.open("wb") as file:
        shutil.copyfileobj(remote, file, PIECE)


@os_errors
def upload_file(local: Path, out: BucketPath) -> None:
    """Put a local file in the place of an object, whole or not at all."""
    out.fs.put_file(str(local), str(out))


def status_of(error: BaseException) -> int | None:
    """The status of HTTP that an error of a bucket's package tells; None where nobody
    answered."""
    for e in causes_of(error, contexts=False):
        answer = getattr(e, "response", None)  # botocore's; code: gcsfs's and Google's
        meta = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
        told = (meta.get("HTTPStatusCode"), getattr(e, "code", None))
        for found in (*told, getattr(e, "status", None)):
            if isinstance(found, int) and 400 <= found < 600:
                return int(found)
        if isinstance(e, FileNotFoundError):
            return 404
        # gcsfs has no other sign of it.
        if isinstance(e, PermissionError) or str(e).startswith("Forbidden: "):
            return 403
    return None


# Answers by which there is no such object, or not so much of it.
ABSENT = (404, 410, 412, 416)


def refuses(error: OSError) -> bool:
    """Whether an error of `os_errors` says nothing of the object itself, which may be
    whole."""
    if isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    # gcsfs's, after as many tries as it makes: an object is not what its header says.
    if isinstance(cause, IsADirectoryError) or type(cause).__name__ == "ChecksumError":
        return False
    return cause is None or status_of(cause) not in ABSENT


def amazon_code(error: BaseException) -> str:
    """Amazon's own name of what is wrong; "" where there is none."""
    answers = [getattr(e, "response", None) for e in causes_of(error, contexts=False)]
    codes = [a.get("Error", {}).get("Code") for a in answers if isinstance(a, dict)]
    return str(next(filter(None, codes), ""))


# Of Amazon's codes, those that are answered with 400 or 403 and are of credentials.
KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
# Of Google's and botocore's errors, the part of a name by which it is of credentials.
CREDENTIALS = (
    "google.auth.", "Credential", "SSO", ".Login", "AuthToken", "TokenRetrieval",
    "TokenProvider", "ProfileNotFound",
)  # fmt: skip
LOGIN = {
    "gs": "`gcloud auth application-default login`, or name a key file in "
    "GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def reason_of(error: BaseException, path: BucketPath) -> str:
    """What is wrong with a bucket, and what to do, as the end of a message."""
    if getattr(error, "filename", None) and error.__cause__:
        error = error.__cause__  # which `os_errors` has told
    text, scheme = " ".join(str(error).split())[:200], path._uri_scheme or "gs"
    bucket = f"{scheme}://{path.parts[2]}"  # /, the scheme, the bucket, ...
    status, code = status_of(error), amazon_code(error)
    # Google's package of credentials has one error that is of the network.
    kinds = {
        f"{type(e).__module__}.{type(e).__name__}"
        for e in causes_of(error, contexts=False)
    }
    kinds.discard("google.auth.exceptions.TransportError")
    lacking = any(part in kind for kind in kinds for part in CREDENTIALS)
    if status == 404 and has_bucket(path):
        return "there is no such object"
    if status == 404:
        return (
            f"there is no bucket {bucket} for these credentials: make it, or correct "
            "its name"
        )
    if code == "RequestTimeTooSkewed":
        return f"{bucket} refuses this machine's clock ({text}): set it right"
    if status == 401 or code in KEYS or lacking:
        return f"no valid credentials for {bucket} ({text}): {LOGIN[scheme]}"
    if status == 403:
        return (
            f"{bucket} may not be used so ({text}): ask for the right to read and to "
            "write objects there"
        )
    return f"{text or type(error).__name__}: see to the network and the bucket"


def has_bucket(path: BucketPath) -> bool:
    """Whether there is the bucket of a path, asked by listing it, since who may write
    objects need not see what the bucket is. True where that is refused."""
    bucket = path.parts[2]
    try:
        if path._uri_scheme == "s3":
            path.fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        else:
            path.fs.call("GET", "b/{}/o", bucket, maxResults=1)
    except Exception as e:
        return status_of(e) != 404
    return True
