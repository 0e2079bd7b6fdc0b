"""The delta rule: chunked form against the recurrence in fp64, gradients, states, packing, hard inputs."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.delta_rule import delta_rule, dplr_delta_rule

VARIANTS = ["plain", "scalar", "key", "comba", "erase", "grouped", "product", "no_beta", "untied"]
NAMES = ("q", "k", "v", "beta", "scalar_decay", "key_decay", "erase_key", "a", "b", "initial_state")


def make_inputs(variant, B=2, T=75, H=2, K=8, V=12, seed=0, dtype=torch.float64, states=None):
    """Keyword arguments of one call; tensors are leaves that want gradients."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    group, n = (2 if variant == "grouped" else 1), (3 if variant == "product" else 1)
    x = {"q": draw(B, T, H, K), "k": draw(B, T * n, H, K), "v": draw(B, T * n, H * group, V)}
    x["initial_state"] = draw(B if states is None else states, H * group, K, V)
    if variant == "untied":
        kappa = F.normalize(draw(B, T, H, K), dim=-1)
        x["a"], x["b"] = -kappa, kappa * draw(B, T, H, K).sigmoid()
        x["key_decay"] = -0.6 * draw(B, T, H, K).sigmoid()
    elif variant != "no_beta":
        x["beta"] = 2 * draw(B, T * n, H * group).sigmoid()
    if variant in ("scalar", "comba", "grouped", "product"):
        x["scalar_decay"] = -draw(B, T, H * group).exp()
    if variant == "key":
        x["key_decay"] = -draw(B, T, H * group, K).exp()
    if variant in ("comba", "erase"):
        x["erase_key"] = draw(B, T, H, K)
    return {name: value.to(dtype).requires_grad_() for name, value in x.items()}


def call(variant, inputs, **options):
    if variant == "untied":
        return dplr_delta_rule(**inputs, output_final_state=True, **options)
    return delta_rule(**inputs, exclusive=variant == "comba", normalize=True, output_final_state=True, **options)


def gradients(variant, inputs, **options):
    """o, final state, and gradients of a fixed random functional of both."""
    o, final = call(variant, inputs, **options)
    rng = torch.Generator().manual_seed(9)
    loss = (o * torch.randn(o.shape, generator=rng, dtype=torch.float64)).sum()
    loss = loss + (final * torch.randn(final.shape, generator=rng, dtype=torch.float64)).sum()
    return [o, final, *torch.autograd.grad(loss, list(inputs.values()))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_equals_recurrent_with_gradients(variant):
    inputs = make_inputs(variant)
    expected = gradients(variant, inputs, backend="reference")
    for got, want in zip(gradients(variant, inputs, backend="chunked"), expected):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(5, 0, 70, 1, 64), (3, 3)])
def test_packed_documents_equal_separate_ones(variant, lengths):
    total = sum(lengths)
    inputs = make_inputs(variant, B=1, T=total, states=len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = gradients(variant, inputs, backend="chunked", cu_seqlens=bounds)
    expected = gradients(variant, inputs, backend="reference", cu_seqlens=bounds)
    for got, want in zip(packed, expected):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
    outputs, steps = [], 3 if variant == "product" else 1
    for n, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        if stop == start:
            torch.testing.assert_close(packed[1][n], inputs["initial_state"][n])
            continue
        part = {}
        for name, x in inputs.items():
            width = steps if name in ("k", "v", "beta") else 1
            part[name] = x[n : n + 1] if name == "initial_state" else x[:, start * width : stop * width]
        o, final = call(variant, part, backend="chunked")
        outputs.append(o)
        torch.testing.assert_close(packed[1][n : n + 1], final)
    torch.testing.assert_close(packed[0], torch.cat(outputs, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_carries_over_a_split_and_single_tokens(variant):
    inputs = {name: x.detach() for name, x in make_inputs(variant, T=20).items()}
    whole, final = call(variant, inputs)
    state, pieces = inputs.pop("initial_state"), []
    steps = 3 if variant == "product" else 1
    for start, stop in [(0, 13), *((t, t + 1) for t in range(13, 20))]:
        part = {
            name: x[:, start * steps : stop * steps] if name in ("k", "v", "beta") else x[:, start:stop]
            for name, x in inputs.items()
        }
        o, state = call(variant, {**part, "initial_state": state})
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("variant", ["plain", "scalar", "key", "untied"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_inputs_stay_near_the_fp64_result(variant, dtype, tolerance):
    inputs = {name: x.detach().to(dtype) for name, x in make_inputs(variant, T=130, K=16).items()}
    inputs["initial_state"] = inputs["initial_state"].float()
    o, final = call(variant, inputs, backend="chunked")
    want, want_final = call(variant, {name: x.double() for name, x in inputs.items()}, backend="reference")
    assert o.dtype == dtype and final.dtype == torch.float32
    assert (o - want).norm() < tolerance * want.norm()
    assert (final - want_final).norm() < 2e-5 * want_final.norm()


@pytest.mark.parametrize("variant", ["plain", "scalar", "key"])
def test_equal_keys_with_beta_near_two_stay_exact_in_fp32(variant):
    """Powers of the system matrix reach 2^64 here; only substitution keeps fp32 accurate."""
    inputs = make_inputs(variant, B=1, T=256, K=16)
    base = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs["k"] = (base + 0.01 * inputs["k"]).detach().requires_grad_()
    inputs["beta"] = torch.full_like(inputs["beta"], 1.99).requires_grad_()
    for name in ("scalar_decay", "key_decay"):
        if name in inputs:
            inputs[name] = (inputs[name] * 1e-3).detach().requires_grad_()
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    for got, want in zip(gradients(variant, single), gradients(variant, inputs, backend="reference")):
        assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("variant", ["scalar", "key", "comba", "untied"])
def test_strong_decay_neither_overflows_nor_loses_gradients(variant):
    inputs = make_inputs(variant, B=1, T=130, K=16)
    name = "key_decay" if variant in ("key", "untied") else "scalar_decay"
    strong = torch.where(torch.arange(130) % 3 == 0, -80.0, -1e-3).double()
    inputs[name] = (
        inputs[name].detach() * 0 + strong.view(1, -1, 1, *(1,) * (inputs[name].dim() - 3))
    ).requires_grad_()
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    for got, want in zip(gradients(variant, single), gradients(variant, inputs, backend="reference")):
        assert got.isfinite().all()
        assert (got - want).norm() < 1e-4 * want.norm().clamp_min(1e-6)


def test_untied_form_contains_the_tied_one():
    inputs = {name: x.detach() for name, x in make_inputs("key").items()}
    k, decay, beta = F.normalize(inputs["k"], dim=-1), inputs["key_decay"], inputs["beta"].unsqueeze(-1)
    want, _ = delta_rule(inputs["q"], k, inputs["v"], inputs["beta"], key_decay=decay)
    got, _ = dplr_delta_rule(inputs["q"], beta * k, inputs["v"], decay.exp() * k, -beta * k, decay)
    torch.testing.assert_close(got, want)


def test_steps_of_a_token_are_tokens_without_a_read():
    inputs = {name: x.detach() for name, x in make_inputs("product", T=9).items()}
    o, _ = call("product", inputs)
    state, rows = inputs["initial_state"], []
    k = F.normalize(inputs["k"], dim=-1).unflatten(1, (9, 3))
    v, beta = inputs["v"].unflatten(1, (9, 3)), inputs["beta"].unflatten(1, (9, 3))
    q = F.normalize(inputs["q"], dim=-1) * 8**-0.5
    for t in range(9):
        state = state * inputs["scalar_decay"][:, t].exp()[..., None, None]
        for j in range(3):
            error = v[:, t, j] - torch.einsum("bhk,bhkv->bhv", k[:, t, j], state)
            state = state + torch.einsum("bhk,bhv,bh->bhkv", k[:, t, j], error, beta[:, t, j])
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    torch.testing.assert_close(o, torch.stack(rows, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"beta": torch.zeros(2, 75, 3)}, "beta"),
        ({"k": torch.zeros(2, 76, 2, 8)}, "rows"),
        ({"v": torch.zeros(2, 75, 3, 8)}, "head"),
        ({"initial_state": torch.zeros(2, 2, 8, 8)}, "initial_state"),
        ({"scalar_decay": torch.zeros(2, 75, 2, 8)}, "scalar_decay"),
        ({"scalar_decay": torch.zeros(2, 75, 2), "key_decay": torch.zeros(2, 75, 2, 8)}, "one key_decay"),
        ({"cu_seqlens": torch.tensor([0, 75])}, "B must be 1"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {name: x.detach() for name, x in make_inputs("plain").items()}
    with pytest.raises(FlameError, match=message):
        delta_rule(**{**inputs, **change})
