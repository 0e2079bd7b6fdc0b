"""Copies in host memory, from which a save in the background writes while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Staged:
    """
    Attributes:
        tensors: the live ones; of them only names, shapes and placements are looked at.
        copies: this rank's part of each, in host memory.
        copied: done when the copies are complete; None when they are.
    """

    tensors: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]
    copied: torch.cuda.Event | None


class HostCopies:
    """Host memory for one rank's tensors, kept from save to save.

    Args:
        pinned: page-locked memory (up to twice the tensors' size), to which a GPU copies by itself. The copies stand in
            the same stream as training, so an update that follows cannot overtake them, and the host waits for neither.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.memory: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Copy `tensors`; the copies before are overwritten.

        Raises:
            RuntimeError: there is not enough memory, or not enough that can be page-locked.
        """
        copies = {name: self.copy(name, tensor) for name, tensor in tensors.items()}
        if not self.pinned:
            return Staged(tensors, copies, None)
        copied = torch.cuda.Event()
        copied.record()
        return Staged(tensors, copies, copied)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        held = self.memory.get(name)
        if held is None or held.shape != local.shape or held.dtype != local.dtype:
            held = torch.empty(local.shape, dtype=local.dtype, pin_memory=self.pinned)
            self.memory[name] = held
        return held.copy_(local, non_blocking=self.pinned)


class FromHost(dcp.DefaultSavePlanner):
    """Plans with the live tensors and writes their copies."""

    def __init__(self, staged: Staged) -> None:
        super().__init__()
        self.copies = staged.copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]
