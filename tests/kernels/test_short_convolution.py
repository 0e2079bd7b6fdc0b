"""short_convolution: every backend computes the recurrence, packed or not, with states and their gradients."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.short_convolution import short_convolution, triton_ops  # noqa: F401 - registers the kernels' op

BACKENDS = ["chunked", "triton"]
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor")
PACKED = torch.tensor([0, 1, 3, 3, 10, 23], dtype=torch.int32)


def make(packed: bool, W: int = 4, C: int = 6, dtype=torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    B, T = (1, 23) if packed else (2, 11)
    N = len(PACKED) - 1 if packed else B
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "initial_state": (N, C, W)}
    return {name: torch.randn(s, generator=g, dtype=dtype).requires_grad_() for name, s in shapes.items()}


def run(inputs: dict, backend: str, packed: bool, activation: str | None, state: bool = True):
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    y, final = short_convolution(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        activation=activation,
        initial_state=leaves["initial_state"] if state else None,
        output_final_state=True,
        cu_seqlens=PACKED if packed else None,
        backend=backend,
    )
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).cos().view_as(t) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    grads = [x.grad for n, x in leaves.items() if state or n != "initial_state"]
    return [y.detach(), final.detach(), *grads]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_recurrent(packed, state, activation):
    inputs = make(packed)
    expected = run(inputs, "reference", packed, activation, state)
    for got, want in zip(run(inputs, "chunked", packed, activation, state), expected):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_kernel_equals_recurrent(packed, state, W):
    inputs = make(packed, W=W, dtype=torch.float32)
    activation = "silu" if W != 3 else None
    expected = run(inputs, "reference", packed, activation, state)
    for got, want in zip(run(inputs, "triton", packed, activation, state), expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_kernel_takes_fp16():
    inputs = make(True, dtype=torch.float16)
    expected = run({name: x.float() for name, x in inputs.items()}, "reference", True, "silu")
    for got, want in zip(run(inputs, "triton", True, "silu"), expected):
        torch.testing.assert_close(got.float(), want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_then_steps_equals_whole(backend):
    inputs = make(False, dtype=torch.float32)
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    whole, last = short_convolution(x, weight, activation="silu", output_final_state=True, backend=backend)
    y, state = short_convolution(x[:, :2], weight, activation="silu", output_final_state=True, backend=backend)
    parts = [y]
    for t in range(2, x.shape[1]):
        y, state = short_convolution(
            x[:, t : t + 1], weight, activation="silu", initial_state=state, output_final_state=True, backend=backend
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("packed", [False, True])
def test_kernel_is_a_sound_op_and_compiles(packed):
    inputs = make(packed, dtype=torch.float32)
    cu = PACKED if packed else None
    arguments = (inputs["x"], inputs["weight"], None, inputs["initial_state"], cu, True)
    torch.library.opcheck(torch.ops.flame.short_convolution, arguments, test_utils=OPCHECK)

    def call(x, weight):
        return short_convolution(x * 2, weight, activation="silu", cu_seqlens=cu, backend="triton")[0].square().sum()

    leaves = inputs["x"], inputs["weight"]
    expected = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b)


def test_misfit_is_named():
    x = torch.randn(2, 3, 4)
    with pytest.raises(FlameError, match="weight"):
        short_convolution(x, torch.randn(5, 4))
    with pytest.raises(FlameError, match="B = 1"):
        short_convolution(x, torch.randn(4, 4), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(FlameError, match="initial_state"):
        short_convolution(x, torch.randn(4, 4), initial_state=torch.zeros(2, 4, 3))
    with pytest.raises(FlameError, match="activation"):
        short_convolution(x, torch.randn(4, 4), activation="gelu")
