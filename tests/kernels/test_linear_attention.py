"""Every form of linear attention is the same function: recurrence, chunks, step by step, packed or apart."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.linear_attention import linear_attention, linear_attention_step

KINDS = ["none", "head", "scalar", "key", "value", "bonus"]
B, H, K, V = 2, 2, 5, 7


def inputs(kind, tokens, *, strong=False, batch=B, heads=(H, H, H), state=True, seed=0):
    """fp64 leaf tensors of one problem, as keyword arguments."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    most = max(heads)
    call = {
        "q": normal(batch, tokens, heads[0], K),
        "k": normal(batch, tokens, heads[1], K),
        "v": normal(batch, tokens, heads[2], V),
    }
    shape = {
        "head": (most,),
        "scalar": (batch, tokens, most),
        "key": (batch, tokens, most, K),
        "bonus": (batch, tokens, most, K),
        "value": (batch, tokens, most, V),
    }.get(kind)
    if shape is not None:
        decay = -normal(*shape).abs() * 0.1
        if strong:
            decay[torch.rand(shape, generator=g) < 0.3] = -50.0
        call["key_decay" if kind == "bonus" else f"{kind}_decay"] = decay
    if kind == "bonus":
        call["bonus"] = normal(most, K)
    if state:
        call["initial_state"] = normal(batch, most, K, V)
    return {name: x.requires_grad_() for name, x in call.items()}


def run(call, backend, **options):
    """Output, final state and the gradient of every input under fixed random cotangents."""
    o, final = linear_attention(**call, output_final_state=True, backend=backend, **options)
    g = torch.Generator().manual_seed(7)
    loss = sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in (o, final))
    gradients = torch.autograd.grad(loss, list(call.values()))
    return {"o": o, "final": final, **dict(zip(call, gradients))}


def check_same(left, right, tolerance=1e-9):
    for name, expected in right.items():
        assert torch.isfinite(left[name]).all(), name
        scale = expected.norm().clamp(min=1e-3)
        assert (left[name] - expected).norm() / scale < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_chunked_equals_recurrence(kind, tokens):
    call = inputs(kind, tokens, seed=tokens)
    check_same(run(call, "chunked"), run(call, "reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_without_initial_state_equals_recurrence(kind):
    call = inputs(kind, 40, state=False)
    check_same(run(call, "chunked"), run(call, "reference"))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_strong_decay_is_exact_and_finite(kind):
    call = inputs(kind, 130, strong=True)
    check_same(run(call, "chunked"), run(call, "reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 2, 2), (1, 1, 4), (4, 4, 1)])
def test_grouped_heads_equal_repeated_heads(kind, heads):
    call = inputs(kind, 70, heads=heads)
    check_same(run(call, "chunked"), run(call, "reference"))
    repeated = {name: x.repeat_interleave(4 // x.shape[2], 2) if name in "qkv" else x for name, x in call.items()}
    o, _ = linear_attention(**repeated, backend="reference")
    torch.testing.assert_close(linear_attention(**call, backend="chunked")[0], o)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_documents_equal_separate_ones(kind, backend):
    bounds = [0, 1, 1, 65, 129, 140]
    call = inputs(kind, bounds[-1], batch=1, state=False)
    n = len(bounds) - 1
    call["initial_state"] = torch.randn(n, H, K, V, dtype=torch.float64).requires_grad_()
    packed = run(call, backend, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    finals = []
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        piece = {
            name: x[:, start:stop] if x.dim() > 2 and x.shape[1] == bounds[-1] else x
            for name, x in call.items()
            if name != "initial_state"
        }
        state = call["initial_state"][i : i + 1]
        if start < stop:
            o, state = linear_attention(**piece, initial_state=state, output_final_state=True, backend="reference")
            torch.testing.assert_close(packed["o"][:, start:stop], o)
        finals.append(state)
    torch.testing.assert_close(packed["final"], torch.cat(finals))
    check_same(packed, run(call, "reference", cu_seqlens=torch.tensor(bounds, dtype=torch.int32)))


def test_packed_documents_leak_no_gradient():
    call = inputs("key", 100, batch=1, state=False)
    o, _ = linear_attention(**call, cu_seqlens=torch.tensor([0, 37, 100]), backend="chunked")
    (dk,) = torch.autograd.grad(o[:, 37:].sum(), call["k"])
    assert dk[:, :37].abs().max() == 0
    assert dk[:, 37:].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole_sequence(kind):
    call = {name: x.detach() for name, x in inputs(kind, 6).items()}
    o, final = linear_attention(**call, output_final_state=True, backend="reference")
    state = call.pop("initial_state")
    for t in range(6):
        token = {name: x[:, t] if x.dim() > 2 else x for name, x in call.items()}
        step, state = linear_attention_step(state=state, **token)
        torch.testing.assert_close(step, o[:, t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("kind", ["none", "bonus", "value"])
def test_reference_gradients_match_finite_differences(kind):
    call = inputs(kind, 3, batch=1)

    def function(*values):
        return linear_attention(**dict(zip(call, values)), output_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(function, tuple(call.values()))


def test_bf16_keeps_its_dtype_and_an_fp32_state():
    call = {name: x.detach() for name, x in inputs("scalar", 50).items()}
    state = call.pop("initial_state").float()
    exact, _ = linear_attention(**call, initial_state=state.double())
    rounded = {name: x.bfloat16() for name, x in call.items()}
    o, final = linear_attention(**rounded, initial_state=state, output_final_state=True)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (o.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 4, 2, 6)}, "last size"),
        ({"head_decay": torch.zeros(2), "scalar_decay": torch.zeros(2, 4, 2)}, "at most one"),
        ({"key_decay": torch.zeros(2, 4, 2, 7)}, "key_decay must be"),
        ({"bonus": torch.zeros(2, 5)}, "bonus needs key_decay"),
        ({"v": torch.zeros(2, 4, 3, 7)}, "head count"),
        ({"initial_state": torch.zeros(1, 2, 5, 7)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "B must be 1"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_errors_name_the_argument(change, message):
    call = {"q": torch.zeros(2, 4, 2, 5), "k": torch.zeros(2, 4, 2, 5), "v": torch.zeros(2, 4, 2, 7)}
    with pytest.raises(FlameError, match=message):
        linear_attention(**(call | change))
