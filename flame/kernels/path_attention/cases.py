"""Cases by which `flame doctor` proves PaTH attention on a machine. The tiles are softmax attention's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels.checking import Case, Tensors
from flame.kernels.path_attention import path_attention

BOUNDS = (0, 1, 64, 64, 127, 640, 1300)


@dataclass(frozen=True)
class Shape:
    heads: tuple[int, int]
    D: int
    tokens: int = 1300
    dtype: torch.dtype = torch.bfloat16
    gate: bool = True
    packed: bool = False
    slow: bool = False  # reflections so weak that keys of thousands of tokens ago count


def cases() -> list[Case]:
    shapes = [Shape((2, 2), D, gate=False) for D in (32, 64, 128)] + [Shape((2, 2), D) for D in (64, 128)]
    shapes += [Shape((4, 2), D, packed=True) for D in (64, 128)] + [Shape((2, 2), 64, gate=False, packed=True)]
    shapes += [Shape((2, 2), 64, tokens=4500), Shape((2, 2), 64, dtype=torch.float32)]
    shapes += [Shape((2, 2), 64, tokens=tokens, gate=False, slow=True) for tokens in (4500, 9000)]
    shapes += [Shape((2, 2), 64, tokens=3, gate=False), Shape((2, 2), 64, dtype=torch.float16)]
    return [make_case(shape) for shape in shapes]


def make_case(s: Shape) -> Case:
    tokens = BOUNDS[-1] if s.packed else s.tokens

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(1, tokens, *size, generator=g, device=device)

        H, Hk = s.heads
        call = {"q": normal(H, s.D), "k": normal(Hk, s.D), "v": normal(Hk, s.D)}
        call = {name: x.to(s.dtype) for name, x in call.items()}
        call["w"], call["beta"] = F.normalize(normal(Hk, s.D), dim=-1), 2 * (normal(Hk) - 5 * s.slow).sigmoid()
        if s.gate:
            call["log_forget"] = F.logsigmoid(normal(H) + 4)
        if s.packed:
            call["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        return call

    def run(call: Tensors, backend: str | None) -> Tensors:
        # Key by key this length takes minutes; in fp64 the chunked form equals it to 1e-10 (tests prove it).
        return {"o": path_attention(**call, backend="chunked" if backend == "reference" else backend)}

    dtype = str(s.dtype).removeprefix("torch.")
    flags = [flag for flag in ("gate", "packed", "slow") if getattr(s, flag)]
    name = " ".join([f"T={tokens} H={s.heads[0]}/{s.heads[1]} D={s.D} {dtype}", *flags])
    # Queries and keys are rounded to bf16 once a part on their way, beside the rounding of plain attention.
    return Case("path_attention", name, inputs, run, tolerance=1e-4 if s.dtype == torch.float32 else 1.5e-2)
