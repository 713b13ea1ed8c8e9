"""What processes that train together make of each other's errors."""

import jax
import pytest
from conftest import meta_of

from gamayun_jax.config import UserError
from gamayun_jax.training import checkpoint, cluster

GLOO = (
    "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
    "Read error [127.0.0.1]:56525: Connection reset by peer"
)
FILES = (
    'DATA_LOSS: Error reading "c/0" in zarr3 driver: cut off '
    "[source locations='tensorstore/kvstore/file/file_key_value_store.cc:307']"
)
Jax = jax.errors.JaxRuntimeError


def damage(cause):
    error = checkpoint.DamagedCheckpointError("run/checkpoints/1", "why", "Move it")
    error.__cause__ = cause
    return error


def of_orbax(cause):
    error = Exception("Encountered error. See full TensorStore details: zarr3")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        Jax(GLOO),
        ValueError(GLOO),  # a compiled function's fast path
        ValueError(f"FAILED_PRECONDITION: Buffer Definition Event: {GLOO}"),
        ValueError("INTERNAL: Core halted unexpectedly: on chip 3"),
        ValueError(
            "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader"
        ),
        Jax("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited"),
        Jax("DEADLINE_EXCEEDED: Barrier timed out. Id: 3"),
        RuntimeError("a thread failed: NCCL communicator was aborted"),
        damage(ValueError(GLOO)),
    ],
)
def test_a_broken_collective_is_a_loss(error):
    assert cluster.is_loss(error)


@pytest.mark.parametrize(
    "error",
    [
        Jax("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 GiB"),
        Jax("INVALID_ARGUMENT: Executable expected shape f32[2]"),
        ValueError(FILES),
        damage(ValueError(FILES)),
        of_orbax(ValueError("DATA_LOSS: Error reading 486 bytes: zstd failed")),
        ValueError(f"UNAVAILABLE: Connection reset by peer [{FILES}]"),  # a bucket
        ValueError("UNAVAILABLE: try again [http_response_code='503']"),
        ValueError("UNKNOWN: CURL error SSL peer certificate was not OK"),
        ValueError("could not broadcast input array from shape (3,) into shape (2,)"),
        UserError("/data/gloo/corpus: connection to its peer is no folder"),
        ConnectionResetError(104, "Connection reset by peer"),  # storage
        KeyError("UNKNOWN: x"),
    ],
)
def test_another_error_is_not(error):
    assert not cluster.is_loss(error)


def test_a_loss_while_a_checkpoint_is_read_is_not_damage(tmp_path, monkeypatch):
    """A good checkpoint must not be set aside since a process has died."""
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    store.save(checkpoint.TrainState(0, {"a": jax.numpy.ones(2)}, {}), meta_of(1))
    store.wait()

    def broken(*args, **kwargs):
        raise ValueError(GLOO)

    monkeypatch.setattr(store._handlers["meta"], "restore", broken)
    with pytest.raises(ValueError, match="Gloo"):
        store.meta(1)
    store.close()
