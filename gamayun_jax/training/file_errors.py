"""Errors of a checkpoint's files: of Orbax, TensorStore and a bucket's package."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

import jax

from gamayun_jax.config import UserError
from gamayun_jax.fields import causes_of
from gamayun_jax.storage import bucket_refuses
from gamayun_jax.training import cluster

# TensorStore's errors of disks tell the system's number.
NUMBER = re.compile(r"os_error_code='(\d+)'")
# TensorStore's, as the beginning of a text: what it read is not what was written.
DAMAGED = re.compile("(DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION|NOT_FOUND): ")
# Nobody answers, too many ask, or not for these credentials.
REFUSED = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|PERMISSION_DENIED"
    "|UNAUTHENTICATED): "
)
# The same by what carries its requests, anywhere in a text; statuses but those by which
# a bucket says that there is no such object, or not so much of it.
NOT_GIVEN = re.compile(r"CURL error|http_response_code='(4(?!04|10|12|16)\d\d|5\d\d)'")
# What a disk says of files that are lost. Its other errors pass: too many open files, a
# server of files that is silent, no memory.
LOST = (
    errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODATA,
    errno.EINVAL, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO),
)  # fmt: skip


def is_refused(error: BaseException) -> bool:
    """Whether files may be whole, and were not given: by a bucket, or by this machine
    for want of a right or of what it is short of. What comes first of an error and its
    causes decides."""
    for found in causes_of(error, contexts=True):
        text = str(found)
        if number := NUMBER.search(text):
            return int(number[1]) not in LOST
        if REFUSED.match(text) or NOT_GIVEN.search(text):
            return True
        if DAMAGED.match(text):
            return False
        if isinstance(found, (PermissionError, ConnectionError, TimeoutError)):
            return True
        if isinstance(found, OSError) and "://" in str(found.filename):
            return bucket_refuses(found)
        if isinstance(found, OSError) and found.errno:
            return found.errno not in LOST
    return False


@contextlib.contextmanager
def of_files(
    error: Callable[[str], UserError], refused: Callable[[str], UserError] | None = None
) -> Iterator[None]:
    """What Orbax or TensorStore raise inside, of many kinds, as the error that `error`
    makes of the reason, or `refused` where `is_refused`; not what has nothing to do
    with the files."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as e:
        if cluster.is_loss(e):
            raise
        text = " ".join(str(e).split())
        if len(text) > 300:  # the beginning and, for the cause, the end
            text = f"{text[:150]} ... {text[-150:]}"
        kind = refused if refused and is_refused(e) else error
        raise kind(f"{type(e).__name__}: {text}") from e
