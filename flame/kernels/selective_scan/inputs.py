"""The arguments of the selective scan, carried together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flame.errors import FlameError


@dataclass
class ScanInputs:
    """`x`, `dt`, `z` `[B, T, E]`; `A` `[E, S]` negative; `B`, `C` `[B, T, S]`; `D`, `dt_bias` `[E]`; state `[N, E, S]`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def check(self) -> None:
        """Shapes that belong together, else a FlameError naming the tensor."""
        x, state_size = self.x, self.A.shape[-1]
        rows = x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        batch, length, channels = x.shape
        expected = {
            "dt": (batch, length, channels),
            "A": (channels, state_size),
            "B": (batch, length, state_size),
            "C": (batch, length, state_size),
            "D": (channels,),
            "z": (batch, length, channels),
            "dt_bias": (channels,),
            "initial_state": (rows, channels, state_size),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise FlameError(
                    f"selective_scan: {name} has shape {tuple(tensor.shape)}, but x {tuple(x.shape)} asks for {shape}."
                )
        if self.cu_seqlens is not None and batch != 1:
            raise FlameError(f"selective_scan: packed documents (cu_seqlens) need batch 1, got {batch}.")
