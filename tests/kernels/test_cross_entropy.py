"""Cross-entropy: plain and fused with the projection agree with torch and with each other, gradients included."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flame.errors import FlameError
from flame.kernels.cross_entropy import (
    Terms,
    VocabularyShard,
    cross_entropy,
    linear_cross_entropy,
    linear_kl_divergence,
    ops,
    triton_rows,
    vocabulary_parallel_cross_entropy,
)
from flame.kernels.cross_entropy.linear import Chunking

OPTIONS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"soft_cap": 2.0},
    {"l2_warp": 0.05},
    {"z_loss": 1e-2, "label_smoothing": 0.2, "soft_cap": 3.0, "l2_warp": 0.05},
]


def make(N: int = 13, D: int = 8, V: int = 37, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    labels[[2, 5, N - 1]] = -100
    return hidden, weight, labels


def test_sum_over_valid_tokens_equals_torch():
    hidden, weight, labels = make()
    logits = hidden @ weight.t()
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="sum"))
    smooth = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=0.1), smooth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_linear_in_chunks_equals_definition(options, backend, monkeypatch):
    small = Chunking(bytes=1, multiple=5)  # three chunks, the last one short
    monkeypatch.setattr(ops, "default_chunking", lambda hidden: small)
    monkeypatch.setattr(triton_rows, "default_tile", lambda vocabulary: {"BLOCK": 16, "num_warps": 4, "UNROLL": 1})
    hidden, weight, labels = make(dtype=torch.float64 if backend == "chunked" else torch.float32)
    want = linear_cross_entropy(hidden, weight, labels, backend="reference", **options)
    got = linear_cross_entropy(hidden, weight, labels, backend=backend, **options)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want * 0.37, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got * 0.37, (hidden, weight)), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, backend=backend, **options), want.detach()
        )


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_kl_in_chunks_equals_definition(backend, monkeypatch):
    monkeypatch.setattr(ops, "default_chunking", lambda hidden: Chunking(bytes=1, multiple=5))
    hidden, weight, labels = make(dtype=torch.float32)
    teacher = torch.randn(13, 6), torch.randn(37, 6)
    want, got = (
        linear_kl_divergence(hidden, weight, *teacher, labels=labels, temperature=2.0, backend=b)
        for b in ("reference", backend)
    )
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want * 0.37, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got * 0.37, (hidden, weight)), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_kl_of_equals_is_zero():
    hidden, weight, _ = make()
    assert abs(linear_kl_divergence(hidden, weight, hidden, weight).item()) < 1e-12


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_kernel_equals_definition(options, block, monkeypatch):
    monkeypatch.setattr(triton_rows, "default_tile", lambda vocabulary: {"BLOCK": block, "num_warps": 4, "UNROLL": 1})
    hidden, weight, labels = make(dtype=torch.float32)
    logits = (hidden @ weight.t()).detach()
    padded = torch.full((len(logits), 48), float("nan"))
    padded[:, :37] = logits
    results = []
    for x, backend in ((padded[:, :37], "triton"), (logits, "reference")):
        leaf = x.requires_grad_()
        loss = cross_entropy(leaf, labels, backend=backend, **options)
        results.append((loss, torch.autograd.grad(loss * 0.37, leaf)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_label_outside_the_vocabulary_makes_the_loss_nan():
    hidden, weight, labels = make(dtype=torch.float32)
    labels[0] = 37
    assert linear_cross_entropy(hidden, weight, labels, backend="triton").isnan()


def test_chunks_are_few_even_and_whole_tiles():
    assert Chunking().size(32768, 64000) == 8192
    assert Chunking().size(16384, 256512) == 4096
    assert Chunking().size(12300, 64000) == 6272
    assert Chunking().size(5, 64000) == 5
    assert Chunking().size(0, 64000) == 1


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_row_in_one_pass_equals_statistics_then_gradient(backend):
    """What vocabulary parallelism relies on: shards' statistics merge to those of the row."""
    hidden, weight, labels = make(dtype=torch.float32)
    logits = (hidden @ weight.t()).detach()
    terms = ops.Terms(1e-2, 0.2, 3.0, 0.05)
    form = ops.row_functions(backend)
    together = logits.clone()
    loss = form.cross_entropy_rows(together, labels, terms, True)
    shards = [logits[:, :20].clone(), logits[:, 20:].clone()]
    parts = [form.statistics(x, labels, terms, first) for x, first in zip(shards, (0, 20))]
    largest, owner = torch.stack([p.largest for p in parts]).max(0)
    lse = torch.stack([p.lse for p in parts]).logsumexp(0)
    for rank, (x, first, part) in enumerate(zip(shards, (0, 20), parts)):
        at = torch.where(owner == rank, part.largest_at, -1)
        summed, target = (sum(getattr(p, name) for p in parts) for name in ("summed", "target"))
        whole = ops.Statistics(lse, target, summed, largest, at)
        torch.testing.assert_close(whole.loss(labels, terms, 37), loss)
        grad = form.gradient(x, labels, whole, terms, 37, first)
        torch.testing.assert_close(grad, together[:, first : first + x.shape[1]], rtol=1e-5, atol=1e-6)


def test_l2_warp_changes_the_gradient_alone():
    hidden, weight, labels = make()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    plain, warped = cross_entropy(logits, labels), cross_entropy(logits, labels, l2_warp=0.05)
    torch.testing.assert_close(plain, warped, rtol=0, atol=0)
    difference = torch.autograd.grad(warped, logits)[0] - torch.autograd.grad(plain, logits)[0]
    want = torch.zeros_like(logits)
    largest, where = logits.max(-1, keepdim=True)
    want.scatter_(1, where, torch.where((labels != -100)[:, None], 0.05 * largest.detach(), 0.0))
    torch.testing.assert_close(difference, want)


def test_all_ignored_is_zero_with_zero_gradient():
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_upstream_gradient_is_not_rounded_to_bf16():
    hidden, weight, labels = make(dtype=torch.bfloat16)
    factor = torch.tensor(1.0 / 1003)  # bf16 would make this 0.3 % larger or smaller
    grad = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)[0].double()
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * factor, weight)[0].double()
    assert abs((scaled.norm() / grad.norm() * 1003).item() - 1) < 5e-4


def test_linear_needs_no_gradient_in_evaluation():
    hidden, weight, labels = make()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_custom_op_is_sound():
    hidden, weight, labels = make(dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.flame.linear_cross_entropy,
        (hidden, weight, labels, [0.0, 0.0, 0.0, 0.0], [True, True], "chunked"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_flops_are_three_products():
    hidden, weight, labels = make(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert counter.get_total_flops() == 6 * 13 * 8 * 37


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_compiles_without_graph_breaks(backend):
    hidden, weight, labels = make(dtype=torch.float32)

    def loss(h, w):
        return linear_cross_entropy(h * 1.5, w, labels, backend=backend)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected):
        torch.testing.assert_close(a, b)


def _split_vocabulary(rank: int, ranks: int, address: str, expected) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    hidden, weight, labels = make(dtype=torch.float32)
    first = rank * 20
    mine = weight.detach()[first : first + 20].clone().requires_grad_()  # 20 and 17 rows
    shard = VocabularyShard(dist.group.WORLD, first, 37)
    terms = Terms(1e-2, 0.2, 3.0, 0.05)
    loss = vocabulary_parallel_cross_entropy(hidden, mine, labels, shard, terms=terms, backend="chunked")
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(hidden.grad, expected[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(mine.grad, expected[2][first : first + 20], rtol=1e-5, atol=2e-6)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_split_vocabulary_equals_whole(tmp_path):
    hidden, weight, labels = make(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels, z_loss=1e-2, label_smoothing=0.2, soft_cap=3.0, l2_warp=0.05)
    (loss * 0.37).backward()
    expected = loss.detach(), hidden.grad, weight.grad
    address = f"file://{tmp_path}/rendezvous"
    mp.start_processes(_split_vocabulary, (2, address, expected), nprocs=2, start_method="spawn")


def test_misfit_is_named():
    hidden, weight, labels = make()
    with pytest.raises(FlameError, match="labels"):
        cross_entropy(hidden, labels[:-1])
    with pytest.raises(FlameError, match="one dtype"):
        linear_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(FlameError, match="label_smoothing"):
        cross_entropy(hidden, labels, label_smoothing=1.5)


def test_the_backward_makes_no_gradients_of_the_gradients_kept_for_it():
    hidden = torch.randn(16, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.randint(0, 20, (16,)), backend="chunked")
    with Created() as created:
        loss.backward()
    assert created.zeros == 0


class Created(TorchDispatchMode):
    """Counts tensors filled with zeros."""

    zeros = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.zeros += func in (torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default)
        return func(*args, **(kwargs or {}))
