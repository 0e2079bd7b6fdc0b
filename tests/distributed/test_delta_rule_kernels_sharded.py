"""The delta rule's kernels on a sequence cut over ranks equal the op on the whole sequence, forward and backward."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from torch.nn.functional import normalize

from flame.kernels.delta_rule import delta_rule, plan
from flame.kernels.sequence import cut_sequence

pytestmark = pytest.mark.distributed
H, K, V = 2, 16, 24
CASES = ["plain", "scalar", "key", "erase", "steps"]
# Bounds of packed documents; None for plain rows, which "streams" lays one after another.
DOCUMENTS = {"plain": None, "streams": None, "long": (0, 272), "crossing": (0, 20, 130, 210, 272)}
T = 272


def inputs_of(case, batch):
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    steps = 2 if case == "steps" else 1
    x = {"q": normal(batch, T, 1, K), "k": normalize(normal(batch, T * steps, 1, K), dim=-1)}
    x |= {"v": normal(batch, T * steps, H, V), "beta": uniform(batch, T * steps, H)}
    if case in ("scalar", "erase", "steps"):
        x["scalar_decay"] = -0.1 * uniform(batch, T, H)
    if case == "key":
        x["key_decay"] = -0.1 * uniform(batch, T, H, K)
    if case == "erase":
        x["erase_key"] = 0.5 * normalize(normal(batch, T, 1, K), dim=-1)
    return x, normal(batch, T, H, V)


def compute(x, weights, **options):
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    o, _ = delta_rule(**leaves, **options)
    (o * weights).sum().backward()
    return {"o": o.detach(), **{name: value.grad for name, value in leaves.items()}}


def differences(rank, cases, segment, exchange):
    plan.SHORTEST_SEGMENT = segment  # 1 cuts even these short rows, as long ones are on a GPU
    found = {}
    size = torch.distributed.get_world_size()
    for case in cases:
        for kind, documents in DOCUMENTS.items():
            x, weights = inputs_of(case, 2 if documents is None else 1)
            bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32)
            expected = compute(x, weights, cu_seqlens=bounds, backend="chunked")
            shard, local = cut_sequence(torch.distributed.group.WORLD, T, bounds, exchange=exchange)
            part = {name: value.chunk(size, 1)[rank] for name, value in x.items()}
            weights = weights.chunk(size, 1)[rank]
            if kind == "streams":
                part = {name: value.flatten(0, 1)[None] for name, value in part.items()}
                weights, shard = weights.flatten(0, 1)[None], replace(shard, streams=2)
                local = torch.tensor([0, T // size, 2 * T // size], dtype=torch.int32)
            own = compute(part, weights, cu_seqlens=local, shard=shard, backend="triton")
            for name, value in own.items():
                right = expected[name].chunk(size, 1)[rank].reshape(value.shape)
                found[case, kind, name] = float((value - right).abs().max() / expected[name].abs().max().clamp(min=1))
    return found


@pytest.mark.parametrize(
    "ranks, cases, segment, exchange",
    [
        (2, ["scalar"], 1, None),
        (2, ["steps"], 8, "scan"),
        pytest.param(4, CASES, 1, None, marks=pytest.mark.slow),
        pytest.param(4, CASES, 8, "scan", marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_sequence_equal_the_whole(ranks, cases, segment, exchange):
    for found in run_ranks(differences, ranks, cases, segment, exchange):
        assert len(found) >= 4 * 5 * len(cases)
        assert {key: error for key, error in found.items() if not error < 2e-5} == {}
