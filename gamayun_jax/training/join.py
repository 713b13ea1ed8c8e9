"""How a process becomes one of several that train together."""

from __future__ import annotations

import socket
import sys
import time

import jax

from gamayun_jax.config import UserError

LOOKUP_SECONDS = 60  # a cluster may make its hosts' names known after it starts them


def join_cluster(
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Make this process one of several, as `gamayun train` was told; or leave it alone.

    Must come before anything touches a device.

    Args:
      distributed: find the processes from the environment (TPU pods, Slurm).
      coordinator: HOST:PORT of the first process.
      num_processes: how many there are.
      process_id: number of this one, from 0.

    Raises:
      UserError: arguments that do not fit together, no cluster, an address that
        cannot be reached.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if distributed:
        if any(given):
            raise UserError(
                "--distributed finds the processes by itself: leave out --coordinator, "
                "--num-processes and --process-id, or --distributed"
            )
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as e:
            raise UserError(
                f"--distributed finds no cluster in the environment ({e}): leave it "
                "out on one host, or give --coordinator, --num-processes, --process-id"
            ) from e
    elif any(given):
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give "
                "all three, or --distributed where the cluster tells them (TPU, Slurm)"
            )
        check_cluster(coordinator, num_processes, process_id)
        jax.distributed.initialize(coordinator, num_processes, process_id)


def check_cluster(coordinator: str, processes: int, process: int) -> None:
    """Raise UserError for an address or number by which JAX ends in its native code."""
    if processes < 1:
        raise UserError(f"--num-processes {processes}: there is at least 1")
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id {process}: the {processes} processes are numbered from 0 to "
            f"{processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator {coordinator}: give HOST:PORT, such as 10.0.0.1:8476, of "
            "the first process, with a port up to 65535"
        )
    look_up(host.strip("[]"), f"--coordinator {coordinator}: host {host} is not known")
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as e:
            raise UserError(
                f"--coordinator {coordinator}: the first process cannot listen at port "
                f"{port} ({e.strerror}): choose another"
            ) from e


def look_up(host: str, unknown: str) -> None:
    """Wait until a host's name is known; else raise UserError, begun with `unknown`."""
    for second in range(LOOKUP_SECONDS + 1):
        try:
            socket.getaddrinfo(host, None)
            return
        except UnicodeError as e:
            raise UserError(f"{unknown} (it is no name of a host)") from e
        except OSError as e:
            unknown_yet = f"{unknown} ({e.strerror})"
            if second == LOOKUP_SECONDS:
                raise UserError(unknown_yet) from e
            if not second:
                print(
                    f"{unknown_yet}: trying again for {LOOKUP_SECONDS} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(1)
