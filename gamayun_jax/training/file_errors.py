"""Errors of a checkpoint's files: of Orbax, TensorStore and a bucket's package."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from gamayun_jax.config import UserError
from gamayun_jax.fields import causes_of
from gamayun_jax.training import cluster

# TensorStore's: nobody answers, too many ask, or not for these credentials.
REFUSED = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|PERMISSION_DENIED"
    r"|UNAUTHENTICATED): "
)


def is_refused(error: BaseException) -> bool:
    """Whether files may be whole, and were not given: by a bucket, or for want of the
    right to read them."""
    for found in causes_of(error, contexts=True):
        if isinstance(found, PermissionError) or REFUSED.match(str(found)):
            return True
        if isinstance(found, OSError) and "://" in str(found.filename):
            return not isinstance(found, FileNotFoundError)
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
