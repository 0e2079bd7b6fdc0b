"""Mesa: chunked against the recurrence, the implicit gradient against that of an exact solve, states, packing."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.mesa import mesa
from flame.kernels.mesa.solver import conjugate_gradients, solve


def make_inputs(B=2, T=75, H=2, K=8, V=6, seed=0, states=None):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    root = draw(B if states is None else states, H, K, K)
    inputs = {
        "q": F.normalize(draw(B, T, H, K), dim=-1),
        "k": F.normalize(draw(B, T, H, K), dim=-1),
        "v": draw(B, T, H, V),
        "log_decay": F.logsigmoid(draw(B, T, H) + 2),
        "beta": draw(B, T, H).sigmoid(),
        "regularizer": draw(H, K).sigmoid() + 0.25,
        "key_state": root @ root.mT / K,
        "value_state": draw(B if states is None else states, H, K, V),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def gradients(inputs, **options):
    o, final = mesa(**inputs, output_final_state=True, **options)
    rng = torch.Generator().manual_seed(9)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)).sum() for x in (o, *final))
    return [o, *final, *torch.autograd.grad(loss, list(inputs.values()))]


def test_chunked_equals_recurrent_with_gradients():
    inputs = make_inputs()
    for got, want in zip(gradients(inputs, backend="chunked"), gradients(inputs, backend="reference")):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("lengths", [(5, 0, 70, 1, 64), (3, 3)])
def test_packed_documents_equal_separate_ones(lengths):
    inputs = make_inputs(B=1, T=sum(lengths), states=len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = gradients(inputs, backend="chunked", cu_seqlens=bounds)
    for got, want in zip(packed, gradients(inputs, backend="reference", cu_seqlens=bounds)):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-7)


def test_state_carries_over_a_split_and_single_tokens():
    inputs = {name: x.detach() for name, x in make_inputs(T=20).items()}
    whole, final = mesa(**inputs, output_final_state=True)
    states, pieces = (inputs.pop("key_state"), inputs.pop("value_state")), []
    for start, stop in [(0, 13), *((t, t + 1) for t in range(13, 20))]:
        part = {name: x if name == "regularizer" else x[:, start:stop] for name, x in inputs.items()}
        o, states = mesa(**part, key_state=states[0], value_state=states[1], output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    for got, want in zip(states, final):
        torch.testing.assert_close(got, want)


def test_converged_solve_has_the_value_and_gradient_of_the_exact_one():
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, right)
    want = torch.autograd.grad((exact * weight).sum(), [root, right], retain_graph=True)
    found = solve(lambda x: torch.einsum("nij,nj->ni", matrix, x), right, steps=40, eps=1e-30)
    torch.testing.assert_close(found, exact)
    for got, expected in zip(torch.autograd.grad((found * weight).sum(), [root, right]), want):
        torch.testing.assert_close(got, expected)


def test_gradients_are_linear_in_the_loss_however_small():
    inputs = make_inputs(T=20)
    whole = torch.autograd.grad(mesa(**inputs)[0].square().sum(), list(inputs.values()))
    small = torch.autograd.grad(mesa(**inputs)[0].square().sum() * 1e-7, list(inputs.values()))
    for name, expected, found in zip(inputs, whole, small):
        torch.testing.assert_close(found * 1e7, expected, rtol=1e-8, atol=1e-10, msg=name)


def test_one_step_moves_along_the_right_side():
    right = torch.tensor([[1.0, 2.0]])
    x = conjugate_gradients(lambda x: x * torch.tensor([2.0, 4.0]), right, steps=1)
    torch.testing.assert_close(x, right * (5 / (2 + 16 + 1e-5)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": torch.zeros(2, 75, 2, 9)}, "do not fit"),
        ({"beta": torch.zeros(2, 75, 3)}, "beta"),
        ({"regularizer": torch.zeros(8)}, "regularizer"),
        ({"key_state": torch.zeros(1, 2, 8, 8)}, "key_state"),
        ({"steps": 0}, "steps"),
        ({"cu_seqlens": torch.tensor([0, 75])}, "B must be 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(FlameError, match=message):
        mesa(**{**make_inputs(), **change})
