"""Elementwise scan, selective scan and log gate: every backend computes the recurrence, forward and backward."""

from __future__ import annotations

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.elementwise_scan import elementwise_scan, elementwise_scan_step, triton_scan
from flame.kernels.log_gate import log_gate, log_gate_step, triton_gate
from flame.kernels.selective_scan import ScanInputs, selective_scan, selective_scan_step
from flame.kernels.selective_scan import triton_scan as selective_triton

E, S = 5, 3
PACKED = [0, 1, 1, 40, 40, 73, 73]  # a one-token document, empty ones inside and at the end
SHORT = [0, 1, 1, 10, 10, 21, 21]  # the same for the interpreter, which walks the selective scan token by token


def leaf(*shape, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_()


def boundaries(packed, length=73):
    if not packed:
        return None
    return torch.tensor({73: PACKED, 21: SHORT}[length], dtype=torch.int32)


def elementwise_case(length, packed, with_state, decay_scale=1.0, dtype=torch.float64):
    cu = boundaries(packed, length)
    batch, rows = (1, len(PACKED) - 1) if packed else (2, 2)
    x, a = leaf(batch, length, E, dtype=dtype), leaf(batch, length, E, scale=decay_scale, dtype=dtype)
    h0 = leaf(rows, E, dtype=dtype) if with_state else None

    def run(backend):
        out = elementwise_scan(x, -a.abs(), initial_state=h0, output_final_state=True, cu_seqlens=cu, backend=backend)
        return list(out)

    return run, [x, a] + ([h0] if with_state else [])


def log_gate_case(length, packed, with_state, decay_scale=1.0, dtype=torch.float64):
    cu = boundaries(packed, length)
    batch, rows = (1, len(PACKED) - 1) if packed else (2, 2)
    x = leaf(batch, length, 2, E, scale=3 * decay_scale, dtype=dtype)
    z0 = leaf(rows, 2, E, dtype=dtype) if with_state else None

    def run(backend):
        out = log_gate(x, initial_state=z0, output_final_state=True, cu_seqlens=cu, backend=backend)
        # The normaliser of an empty document without a state is -inf by definition: leave it out of the loss.
        return [out[0], out[1], out[2].masked_fill(out[2] == float("-inf"), 0.0)]

    return run, [x] + ([z0] if with_state else [])


def selective_case(length, packed, with_state, decay_scale=1.0, dtype=torch.float64):
    cu = boundaries(packed, length)
    batch, rows = (1, len(PACKED) - 1) if packed else (2, 2)
    x, dt, z = (leaf(batch, length, E, dtype=dtype) for _ in range(3))
    log_a = leaf(E, S, dtype=dtype)
    b, c = leaf(batch, length, S, dtype=dtype), leaf(batch, length, S, dtype=dtype)
    d, bias = leaf(E, dtype=dtype), leaf(E, dtype=dtype)
    h0 = leaf(rows, E, S, dtype=dtype) if with_state else None

    def run(backend):
        extra = {"D": d, "z": z, "dt_bias": bias} if with_state else {}
        a = -log_a.exp() * decay_scale
        out = selective_scan(
            x, dt, a, b, c, **extra, initial_state=h0, output_final_state=True, cu_seqlens=cu, backend=backend
        )
        return list(out)

    return run, [x, dt, log_a, b, c] + ([z, d, bias, h0] if with_state else [])


TRITON = ["elementwise", "log_gate", "selective"]
CASES = {"elementwise": elementwise_case, "log_gate": log_gate_case, "selective": selective_case}


def outputs_and_gradients(run, leaves, backend):
    outputs = run(backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    return [o.detach() for o in outputs], torch.autograd.grad(loss, leaves)


def assert_same(actual, expected, tolerance, names="output"):
    for i, (x, y) in enumerate(zip(actual, expected)):
        error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-6)
        assert torch.isfinite(x).all(), f"{names} {i} is not finite"
        assert error < tolerance, f"{names} {i}: relative error {error:.2e}"


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("length", [1, 32, 73])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_recurrent(op, length, with_state):
    torch.manual_seed(0)
    run, leaves = CASES[op](length, False, with_state)
    expected, expected_grads = outputs_and_gradients(run, leaves, "reference")
    actual, grads = outputs_and_gradients(run, leaves, "chunked")
    assert_same(actual, expected, 1e-12)
    assert_same(grads, expected_grads, 1e-11, "gradient")


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_chunked_equals_recurrent(op, with_state):
    torch.manual_seed(0)
    run, leaves = CASES[op](73, True, with_state)
    expected, expected_grads = outputs_and_gradients(run, leaves, "reference")
    actual, grads = outputs_and_gradients(run, leaves, "chunked")
    assert_same(actual, expected, 1e-12)
    assert_same(grads, expected_grads, 1e-11, "gradient")


@pytest.fixture
def short_stretches(monkeypatch):
    """Tiles and checkpoints so small that a short row has several."""
    monkeypatch.setattr(selective_triton, "CHECKPOINT", 8)
    monkeypatch.setattr(triton_scan, "BLOCK_T", 8)
    monkeypatch.setattr(triton_gate, "BLOCK_T", 8)


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_triton_equals_recurrent(op, packed, with_state, short_stretches):
    torch.manual_seed(0)
    run, leaves = CASES[op](21, packed, with_state, dtype=torch.float32)
    expected, expected_grads = outputs_and_gradients(run, leaves, "reference")
    actual, grads = outputs_and_gradients(run, leaves, "triton")
    assert_same(actual, expected, 1e-5)
    assert_same(grads, expected_grads, 1e-4, "gradient")


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("packed", [False, True])
def test_triton_segments_join(op, packed, monkeypatch, short_stretches):
    """A row cut into segments (small batches on a GPU) gives what one run over it gives."""
    monkeypatch.setattr(triton_scan, "SHORTEST_SEGMENT", 8)
    assert triton_scan.plan_segments(1, 21, 8).count == 3
    torch.manual_seed(0)
    run, leaves = CASES[op](21, packed, True, dtype=torch.float32)
    expected, expected_grads = outputs_and_gradients(run, leaves, "reference")
    actual, grads = outputs_and_gradients(run, leaves, "triton")
    assert_same(actual, expected, 1e-5)
    assert_same(grads, expected_grads, 1e-4, "gradient")


@pytest.mark.parametrize("op,backend", [(op, "chunked") for op in CASES] + [(op, "triton") for op in TRITON])
def test_strong_decay_stays_finite_and_right(op, backend):
    torch.manual_seed(0)
    length = 9 if (op, backend) == ("selective", "triton") else 40
    run, leaves = CASES[op](length, False, True, decay_scale=100.0, dtype=torch.float32)
    expected, expected_grads = outputs_and_gradients(run, leaves, "reference")
    actual, grads = outputs_and_gradients(run, leaves, backend)
    assert_same(actual, expected, 1e-4)
    assert_same(grads, expected_grads, 1e-3, "gradient")


def test_packed_equals_separate_rows():
    torch.manual_seed(0)
    x, a = torch.randn(1, 73, E), -torch.rand(1, 73, E)
    packed, _ = elementwise_scan(x, a, cu_seqlens=boundaries(True))
    logits = torch.randn(1, 73, 2, E)
    weight, decay, _ = log_gate(logits, cu_seqlens=boundaries(True))
    for begin, end in zip(PACKED, PACKED[1:]):
        if begin == end:
            continue
        alone, _ = elementwise_scan(x[:, begin:end], a[:, begin:end])
        torch.testing.assert_close(packed[:, begin:end], alone)
        alone_weight, alone_decay, _ = log_gate(logits[:, begin:end])
        torch.testing.assert_close(weight[:, begin:end], alone_weight)
        torch.testing.assert_close(decay[:, begin:end], alone_decay)


def test_steps_continue_a_prefix():
    torch.manual_seed(0)
    x, a = torch.randn(2, 9, E), -torch.rand(2, 9, E)
    whole, _ = elementwise_scan(x, a)
    _, state = elementwise_scan(x[:, :8], a[:, :8], output_final_state=True)
    step, _ = elementwise_scan_step(x[:, 8:], a[:, 8:], state)
    torch.testing.assert_close(step, whole[:, 8:])

    logits = torch.randn(2, 9, 2, E)
    weight, decay, _ = log_gate(logits)
    state = torch.full((2, 2, E), float("-inf"))
    for t in range(9):
        step_weight, step_decay, state = log_gate_step(logits[:, t : t + 1], state)
        torch.testing.assert_close(step_weight, weight[:, t : t + 1])
        torch.testing.assert_close(step_decay, decay[:, t : t + 1])

    dt, z, b, c = torch.randn(2, 9, E), torch.randn(2, 9, E), torch.randn(2, 9, S), torch.randn(2, 9, S)
    big_a, d = -torch.rand(E, S), torch.randn(E)
    whole, _ = selective_scan(x, dt, big_a, b, c, D=d, z=z)
    _, state = selective_scan(x[:, :8], dt[:, :8], big_a, b[:, :8], c[:, :8], output_final_state=True)
    last = ScanInputs(x[:, 8:], dt[:, 8:], big_a, b[:, 8:], c[:, 8:], d, z[:, 8:], None, state)
    torch.testing.assert_close(selective_scan_step(last)[0], whole[:, 8:])


def test_triton_ops_are_well_registered():
    """Fake tensors, autograd registration and schema agree with the kernels, so that torch.compile may see them."""
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, a, h0 = leaf(1, 9, E, dtype=torch.float32), leaf(1, 9, E, dtype=torch.float32), leaf(2, E, dtype=torch.float32)
    torch.library.opcheck(triton_scan._scan, (x, a, h0, cu), test_utils=checks)
    torch.library.opcheck(triton_gate._gate, (x, None, cu), test_utils=checks)
    a_log, state = -torch.rand(E, S), torch.zeros(2, E, S)
    b, d = torch.randn(1, 9, S), torch.randn(E)
    torch.library.opcheck(selective_triton._scan, (x, a, a_log, b, b, d, x, d, state, cu), test_utils=checks)


def test_wrong_shapes_are_refused():
    with pytest.raises(FlameError, match="log_decay"):
        elementwise_scan(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(FlameError, match="batch 1"):
        log_gate(torch.zeros(2, 2, 3, 4), cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(FlameError, match="dt_bias"):
        selective_scan(
            *(torch.zeros(1, 2, 3) for _ in range(2)),
            torch.zeros(3, 4),
            torch.zeros(1, 2, 4),
            torch.zeros(1, 2, 4),
            dt_bias=torch.zeros(2),
        )
