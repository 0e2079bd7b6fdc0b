"""token_shift: difference to the previous token of the same document, with a carried state."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.token_shift import token_shift

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
