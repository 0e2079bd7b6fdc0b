"""Starting and stopping the process group, for torchrun, plain launchers and single processes alike."""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from flame.config.sections import Comm
from flame.errors import FlameError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        control: gloo group on which ranks agree about stopping and saving, whatever the training backend.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment_number(name: str, default: int) -> int:
    """An integer from the environment variable `name`."""
    value = os.environ.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise FlameError(f"the environment variable {name} is {value!r}; it must be a whole number.") from None


def choose_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU of a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise FlameError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. "
            f"Start at most that many processes on it (NGPU)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def make_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The key-value store through which ranks find each other.

    torchrun keeps one store over all restarts of a job, so a restarted rank could read the address that a dead one left
    there; a prefix per attempt keeps attempts apart. A single process needs no network at all.
    """
    if size == 1:
        return dist.HashStore()
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = environment_number("MASTER_PORT", 29500)
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, size, is_master=rank == 0 and not agent_has_it, timeout=timeout)
    return dist.PrefixStore(f"flame/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def initialize(options: Comm) -> World:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Without those variables this is the only process.

    Args:
        options: the [comm] section. Its `init_timeout_seconds` holds until `set_timeouts`, and has to be long enough for
            compilation in the first step.
    """
    rank, size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    local_rank = environment_number("LOCAL_RANK", 0)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    device = choose_device(local_rank)
    record_flight(options.trace_buf_size)
    timeout = timedelta(seconds=options.init_timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=make_store(rank, size, timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, local_rank, size, device, control)


def record_flight(collectives: int) -> None:
    """Have NCCL remember its last collectives and write them down when one times out; 0 leaves it off.

    NCCL's process group reads these when it is made.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(collectives))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1" if collectives else "0")


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies, so that killing torchrun leaves no orphans.

    SIGTERM rather than SIGKILL: workers that lose their launcher can still save a checkpoint.
    """
    launcher = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != launcher:  # it died before the request was in place
        raise FlameError("the launcher of this worker has already exited.")


def set_timeouts(seconds: float, groups: list[dist.ProcessGroup]) -> None:
    """Change the timeout of running process groups.

    The first step waits for compilation and for the slowest storage, later ones should not: a shorter timeout turns a
    lost rank into an error within minutes.
    """
    # torch has no public call for this; torchtitan and others use the same one.
    setter = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if setter is None:
        return
    for group in groups:
        setter(timedelta(seconds=seconds), group)


def shut_down() -> None:
    """Leave the process group, if any. After an error, peers may be gone: nothing here waits for them."""
    if dist.is_initialized():
        dist.destroy_process_group()
