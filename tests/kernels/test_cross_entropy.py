"""Cross-entropy: plain and fused with the projection agree with torch and with each other, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.cross_entropy import chunked, cross_entropy, linear_cross_entropy, triton_linear
from flame.kernels.cross_entropy.options import Terms
from flame.kernels.cross_entropy.triton_linear import Chunking, chunk_rows
from flame.kernels.cross_entropy.triton_rows import Tile

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
def test_linear_in_chunks_equals_definition(options, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 37 * 5)  # several uneven chunks
    hidden, weight, labels = make()
    want = linear_cross_entropy(hidden, weight, labels, backend="reference", **options)
    got = linear_cross_entropy(hidden, weight, labels, backend="chunked", **options)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want * 0.37, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got * 0.37, (hidden, weight)), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_linear_kernel_equals_definition(options, block):
    hidden, weight, labels = (t.detach() for t in make(N=141, dtype=torch.float32))
    terms = Terms(**options)
    chunking = Chunking(bytes=1, step_rows=96, tile=Tile(block, 4))  # two chunks, uneven steps; a row in tiles or in one
    got = triton_linear.linear_cross_entropy(hidden, weight, labels, terms, True, True, chunking)
    want = chunked.linear_cross_entropy(hidden, weight, labels, terms, True, True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_kernel_equals_definition(options):
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


def test_kernel_through_the_public_op():
    hidden, weight, labels = make(dtype=torch.float32)
    got, want = (linear_cross_entropy(hidden, weight, labels, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want * 0.37, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got * 0.37, (hidden, weight)), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, backend="triton"), want.detach())


def test_a_label_outside_the_vocabulary_makes_the_loss_nan():
    hidden, weight, labels = make(dtype=torch.float32)
    labels[0] = 37
    assert linear_cross_entropy(hidden, weight, labels, backend="triton").isnan()


def test_chunks_are_few_even_and_whole_tiles():
    assert chunk_rows(32768, 32000, 2, Chunking()) == (16384, 16384)
    assert chunk_rows(16384, 128256, 2, Chunking(step_rows=512)) == (4096, 512)
    assert chunk_rows(5, 32000, 2, Chunking()) == (5, 5)


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
        (hidden, weight, labels, [0.0, 0.0, 0.0, 0.0], True, True, "chunked"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_misfit_is_named():
    hidden, weight, labels = make()
    with pytest.raises(FlameError, match="labels"):
        cross_entropy(hidden, labels[:-1])
    with pytest.raises(FlameError, match="one dtype"):
        linear_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(FlameError, match="label_smoothing"):
        cross_entropy(hidden, labels, label_smoothing=1.5)
