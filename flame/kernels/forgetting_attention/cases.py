"""Cases by which `flame doctor` proves forgetting attention on a machine. The tiles are softmax attention's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels.checking import Case, Tensors
from flame.kernels.forgetting_attention import forgetting_attention

BOUNDS = (0, 1, 64, 64, 127, 640, 1300)


@dataclass(frozen=True)
class Shape:
    """shift: added to the gates' logits; at 4 distant keys count, at -3 most tiles are left out."""

    heads: tuple[int, int]
    D: int
    queries: int = 1300
    keys: int = BOUNDS[-1]
    dtype: torch.dtype = torch.bfloat16
    shift: float = 4.0
    packed: bool = False


def cases() -> list[Case]:
    fp16, fp32 = torch.float16, torch.float32
    shapes = [Shape((2, 2), D) for D in (32, 64, 96, 128, 256)]
    shapes += [Shape((4, 2), D, packed=True) for D in (64, 128)]
    shapes += [Shape((4, 1), 64, shift=-3.0), Shape((2, 2), 128, shift=0.0, packed=True)]
    shapes += [Shape((2, 2), 64, dtype=fp16), Shape((2, 2), 64, dtype=fp32), Shape((4, 2), 128, queries=7)]
    shapes += [Shape((2, 2), 128, tokens, keys=tokens) for tokens in (3, 63, 65, 4103)]
    return [make_case(shape) for shape in shapes]


def make_case(s: Shape) -> Case:
    tokens, batch = s.keys, 1 if s.packed else 2

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g, device=device)

        H, Hk = s.heads
        queries = tokens if s.packed else s.queries
        call = {
            "q": normal(batch, queries, H, s.D).to(s.dtype),
            "k": normal(batch, tokens, Hk, s.D).to(s.dtype),
            "v": normal(batch, tokens, Hk, s.D).to(s.dtype),
            "log_forget": F.logsigmoid(normal(batch, tokens, H) + s.shift),
        }
        if s.packed:
            call["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        return call

    def run(call: Tensors, backend: str | None) -> Tensors:
        return {"o": forgetting_attention(**call, backend=backend)}

    dtype = str(s.dtype).removeprefix("torch.")
    name = f"Tq={s.queries} H={s.heads[0]}/{s.heads[1]} D={s.D} {dtype} shift={s.shift}{' packed' if s.packed else ''}"
    return Case("forgetting_attention", name, inputs, run, tolerance=1e-4 if s.dtype == torch.float32 else 1e-2)
