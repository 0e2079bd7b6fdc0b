"""Cases by which `flame doctor` proves MoBA's choice of chunks; its attention is proved by block_attention's cases."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.backend import select_backend
from flame.kernels.block_attention import cases as block_cases
from flame.kernels.block_attention.chunked import block_means
from flame.kernels.checking import Case, Tensors
from flame.kernels.moba import chunked, moba


def cases() -> list[Case]:
    return [
        make_choice((4, 4), 64, 128, 3),
        make_choice((8, 2), 128, 256, 4),
        make_whole((4, 2), 64, 128, 3),
        make_whole((4, 4), 128, 256, 4),
    ]


def make_choice(heads: tuple[int, int], D: int, chunk: int, topk: int) -> Case:
    """The scores of the chunks chosen, exactly computed; near ties change the choice but not their sum."""
    shape = block_cases.Shape((heads[0], heads[0], heads[1]), D, D, chunk, topk, tokens=2000)

    def inputs(device: torch.device, seed: int) -> Tensors:
        tensors = block_cases.inputs(shape, device, seed)
        return {name: tensors[name] for name in ("q", "k")}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"score": chosen_score(tensors["q"], tensors["k"], chunk, topk, backend)}

    name = f"choice B=2 T=2000 H={heads[0]}/{heads[1]} D={D} chunk={chunk} topk={topk} bfloat16"
    return Case("moba", name, inputs, run, constant=("q", "k"))


def chosen_score(q: Tensor, k: Tensor, chunk: int, topk: int, backend: str | None) -> Tensor:
    """`[B, T, H]` fp64: sum of the scores of the earlier chunks chosen."""
    means = block_means(k.double(), chunk).repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bthd,bchd->bthc", q.double(), means)
    if select_backend(q, backend) == "triton":
        from flame.kernels.moba.triton_op import route

        indices = route(q, k, None, chunk, None, topk)
    else:
        indices = chunked.route(q, block_means(k, chunk), 0, chunk, topk)
    own = (torch.arange(q.shape[1], device=q.device) // chunk)[:, None, None]
    scores = torch.nn.functional.pad(scores, (0, 2))
    picked = torch.where((indices < 0) | (indices >= own), scores.shape[-1] - 1, indices).long()
    return scores.gather(-1, picked).sum(-1)


def make_whole(heads: tuple[int, int], D: int, chunk: int, topk: int) -> Case:
    """All of it, on keys whose chunks differ so much that rounding cannot change the choice."""
    tokens = 1000

    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*dims: int) -> Tensor:
            return torch.randn(*dims, generator=generator, device=device)

        H, Hk = heads
        # A query's product with channel 0 of a chunk's keys orders the chunks: level of the chunk times a fixed sign.
        level = torch.randperm(-(-tokens // chunk), generator=generator, device=device).float()
        q, k = draw(2, tokens, H, D), draw(2, tokens, Hk, D)
        q[..., 0] = 4.0
        k[..., 0] = 2 * level.repeat_interleave(chunk)[:tokens, None]
        tensors = {"q": q, "k": k, "v": draw(2, tokens, Hk, D)}
        return {name: x.bfloat16() for name, x in tensors.items()}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"o": moba(**tensors, chunk_size=chunk, topk=topk, backend=backend)}

    return Case("moba", f"B=2 T={tokens} H={heads[0]}/{heads[1]} D={D} chunk={chunk} topk={topk} bfloat16", inputs, run)
