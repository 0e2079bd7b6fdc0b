"""token_shift: difference to the previous token of the same document, with a carried state."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.token_shift import token_mix, token_shift

BACKENDS = ["chunked", "triton"]
PACKED = torch.tensor([0, 1, 3, 3, 10], dtype=torch.int32)


def by_hand(x, state):
    """One sequence [T, C]."""
    previous = torch.cat([state[None], x[:-1]])
    return previous - x, (x[-1] if len(x) else state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("carried", [False, True])
def test_packed_equals_separate(backend, carried):
    x = torch.randn(1, 10, 5, requires_grad=True)
    state = torch.randn(4, 5, requires_grad=True)
    got, final = token_shift(
        x, state=state if carried else None, output_final_state=True, cu_seqlens=PACKED, backend=backend
    )
    start = state if carried else torch.zeros(4, 5)
    pieces = [by_hand(p, s) for p, s in zip(x[0].split(PACKED.diff().tolist()), start)]
    want = torch.cat([p for p, _ in pieces])[None]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(final, torch.stack([s for _, s in pieces]))
    leaves = [x, state] if carried else [x]
    w, wf = torch.randn_like(got), torch.randn_like(final)
    want_final = torch.stack([s for _, s in pieces])
    expected = torch.autograd.grad((want * w).sum() + (want_final * wf).sum(), leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad((got * w).sum() + (final * wf).sum(), leaves), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_whole(backend):
    x, state = torch.randn(2, 7, 3), torch.randn(2, 3)
    whole, last = token_shift(x, state=state, output_final_state=True, backend=backend)
    parts = []
    for t in range(7):
        part, state = token_shift(x[:, t : t + 1], state=state, output_final_state=True, backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_misfit_is_named():
    with pytest.raises(FlameError, match="state"):
        token_shift(torch.randn(2, 3, 4), state=torch.zeros(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixes", [1, 6])
@pytest.mark.parametrize("bounds", [None, PACKED])
@pytest.mark.parametrize("carried", [False, True])
def test_mixes_equal_the_shift_in_double(backend, mixes, bounds, carried):
    batch, sequences = (3, 3) if bounds is None else (1, 4)
    x, weight = torch.randn(batch, 10, 70), torch.rand(mixes, 70)
    state = torch.randn(sequences, 70) if carried else None
    leaves = [t.requires_grad_() for t in (x, weight, state) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    shifted, _ = token_shift(exact[0], state=exact[2] if carried else None, cu_seqlens=bounds, backend="reference")
    want = [exact[0] + shifted * row for row in exact[1]]
    got, final = token_mix(x, weight, state=state, output_final_state=True, cu_seqlens=bounds, backend=backend)
    w = torch.randn(mixes, batch, 10, 70)
    expected = torch.autograd.grad((torch.stack(want) * w).sum(), exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float())
    for a, b in zip(torch.autograd.grad((torch.stack(got) * w).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
    assert final is not None and final.shape == (sequences, 70)


def test_an_unused_mix_has_no_part_in_the_gradients():
    x, weight = torch.randn(2, 9, 8, requires_grad=True), torch.rand(3, 8, requires_grad=True)
    grads = []
    for backend in BACKENDS:
        ys, _ = token_mix(x, weight, backend=backend)
        grads.append(torch.autograd.grad(ys[2].square().sum(), (x, weight)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_mixes_cross_the_tiles_of_a_program():
    x, weight = torch.randn(1, 300, 40, requires_grad=True), torch.rand(2, 40, requires_grad=True)
    bounds = torch.tensor([0, 63, 64, 65, 192, 300], dtype=torch.int32)
    w = torch.randn(2, 1, 300, 40)
    of = []
    for backend in BACKENDS:
        ys, _ = token_mix(x, weight, cu_seqlens=bounds, backend=backend)
        of.append([*ys, *torch.autograd.grad((torch.stack(ys) * w).sum(), (x, weight))])
    for a, b in zip(*of, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_more_mixes_than_six_are_refused():
    with pytest.raises(FlameError, match="weight"):
        token_mix(torch.randn(2, 3, 4), torch.rand(7, 4))


def test_the_registered_mix_is_sound():
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    from flame.kernels.token_shift import triton_mix

    torch.library.opcheck(triton_mix._mix, (x, weight, None, None))
