"""Log-linear attention equals the dense matrix of its definition, in every form: outputs, gradients, states, documents."""

import importlib

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.log_linear_attention import LevelStates, log_linear_attention, log_linear_delta_rule, problem
from flame.kernels.log_linear_attention.levels import by_levels

H, K, V, LEVELS = 2, 5, 3, 12
PARALLEL = importlib.import_module(
    "flame.kernels.log_linear_attention.chunked"
)  # the package has a function of this name


def inputs(tokens, batch=2, heads=H, levels=LEVELS, dtype=torch.float64, delta=False, strength=0.3):
    rng = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    call = {
        "q": draw(batch, tokens, heads, K),
        "k": draw(batch, tokens, heads, K),
        "v": draw(batch, tokens, H, V),
        "level_weights": draw(batch, tokens, H, levels),
        "scalar_decay": -strength * draw(batch, tokens, H).abs(),
    }
    if delta:
        call["k"] = torch.nn.functional.normalize(call["k"], dim=-1)
        call["beta"] = 2 * draw(batch, tokens, H).sigmoid()
    return {name: x.requires_grad_() for name, x in call.items()}


def op(call, **options):
    return (log_linear_delta_rule if "beta" in call else log_linear_attention)(**call, **options)


def level(t, u, levels):
    """The paper's rule: walk down from t, taking off the lowest set bit, until the block holds u."""
    if t == u:
        return 0
    end = t
    while True:
        size = end & -end
        if end - size <= u:
            return min(size.bit_length(), levels - 1)
        end -= size


def dense(q, k, v, level_weights, scalar_decay, beta=None):
    """The [T, T] matrix of every head, entry by entry from the definition."""
    tokens, levels = q.shape[1], level_weights.shape[-1]
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k))
    table = torch.tensor([[level(t, min(u, t), levels) for u in range(tokens)] for t in range(tokens)])
    weights = level_weights.transpose(1, 2).gather(-1, table.expand(*q.shape[:2], tokens, tokens))
    decay = scalar_decay.transpose(1, 2)
    rows = []
    for t in range(tokens):
        read, row = q[:, :, t] * K**-0.5, []
        for u in range(t, -1, -1):
            strength = 1 if beta is None else beta[:, u, :, None]
            row.append((read * k[:, :, u] * strength).sum(-1))
            if beta is not None:
                read = read - (read * k[:, :, u]).sum(-1, keepdim=True) * strength * k[:, :, u]
            read = read * decay[:, :, u, None].exp()
        rows.append(torch.nn.functional.pad(torch.stack(row[::-1], -1), (0, tokens - t - 1)))
    return ((torch.stack(rows, 2) * weights) @ v.transpose(1, 2)).transpose(1, 2)


def assert_same(got, wanted, call, atol=1e-10):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-7)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    pairs = zip(*(torch.autograd.grad((x * cotangent).sum(), list(call.values()), **options) for x in (got, wanted)))
    for name, (actual, expected) in zip(call, pairs):
        torch.testing.assert_close(
            actual, expected, atol=atol, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("tokens", [1, 2, 13, 70])
def test_every_form_equals_the_dense_matrix(tokens, backend, delta, monkeypatch):
    monkeypatch.setattr(PARALLEL, "CHUNK", 8)
    call = inputs(tokens, batch=1, delta=delta)
    assert_same(op(call, backend=backend)[0], dense(**call), call)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("tokens", [63, 64, 65, 300])
def test_chunked_equals_recurrent_with_its_final_states(tokens, delta):
    call = inputs(tokens, delta=delta)
    (o, state), (expected, reference) = (
        op(call, backend=name, output_final_state=True) for name in ("chunked", "reference")
    )
    assert torch.equal(state.count, reference.count)
    torch.testing.assert_close(state.states, reference.states)
    assert_same(o, expected, call)
    assert_same(
        state.states, reference.states, {name: x for name, x in call.items() if name not in ("q", "level_weights")}
    )


@pytest.mark.parametrize("delta", [False, True])
def test_few_levels_share_the_last_one(delta):
    call = inputs(200, levels=3, delta=delta)
    o, state = op(call, output_final_state=True)
    expected, reference = op(call, output_final_state=True, backend="reference")
    assert_same(o, expected, call)
    torch.testing.assert_close(state.states, reference.states)
    assert state.states.shape[1] == 2


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("split", [1, 21, 64, 99])
def test_continuing_from_a_state_equals_one_pass(split, delta):
    call = inputs(105, delta=delta)
    first, second = ({name: x[:, part] for name, x in call.items()} for part in (slice(split), slice(split, None)))
    whole, end = op(call, output_final_state=True)
    before, state = op(first, output_final_state=True)
    after, final = op(second, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([before, after], 1), whole)
    torch.testing.assert_close(final.states, end.states)
    assert torch.equal(final.count, end.count)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("final", [False, True])
def test_packed_documents_never_meet(delta, backend, final):
    lengths = [5, 0, 1, 64, 133, 16]
    call = inputs(sum(lengths), batch=1, delta=delta)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    o, states = op(call, cu_seqlens=bounds, backend=backend, output_final_state=final)
    parts = zip(*(x.split(lengths, 1) for x in call.values()))
    alone = [op(dict(zip(call, part)), output_final_state=True, backend="reference") for part in parts]
    assert_same(o, torch.cat([x for x, _ in alone], 1), call)
    if final:
        assert states.count.tolist() == lengths
        torch.testing.assert_close(states.states, torch.cat([state.states for _, state in alone]))


def test_state_holds_one_block_for_every_set_bit():
    call = inputs(45)  # 32 + 8 + 4 + 1
    _, state = log_linear_attention(**call, output_final_state=True)
    full = state.states.abs().sum((0, 2, 3, 4)) > 0
    assert full.nonzero()[:, 0].tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("delta", [False, True])
def test_equal_weights_give_the_plain_recurrence(delta):
    from flame.kernels.delta_rule import delta_rule
    from flame.kernels.linear_attention import linear_attention

    call = inputs(100, delta=delta)
    call["level_weights"] = torch.ones_like(call["level_weights"])
    plain = {name: x for name, x in call.items() if name != "level_weights"}
    torch.testing.assert_close(op(call)[0], (delta_rule if delta else linear_attention)(**plain)[0])


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("strength", [0.0, 30.0])
def test_fp32_keeps_its_accuracy_at_any_decay(delta, strength):
    exact = inputs(200, delta=delta, strength=strength)
    call = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in call.items()}
    got, wanted = op(call)[0], op(exact, backend="reference")[0]
    pairs = [(got, wanted)]
    pairs += zip(*(torch.autograd.grad(x.square().sum(), list(c.values())) for x, c in ((got, call), (wanted, exact))))
    for actual, expected in pairs:
        assert (actual.double() - expected).norm() <= 1e-5 * expected.norm().clamp_min(1e-3)


def test_grouped_queries_and_keys_are_shared():
    call = inputs(70, heads=1)
    assert_same(log_linear_attention(**call)[0], dense(**call), call)


def test_arguments_that_do_not_fit_are_refused():
    call = inputs(8)
    for name, wrong in (
        ("level_weights", call["level_weights"][..., :1]),
        ("scalar_decay", call["scalar_decay"][:, :4]),
    ):
        with pytest.raises(FlameError, match=name):
            log_linear_attention(**{**call, name: wrong})
    state = LevelStates(torch.zeros(2, 3, H, K, V), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(FlameError, match="initial_state"):
        log_linear_attention(**call, initial_state=state)
    with pytest.raises(FlameError, match="B must be 1"):
        log_linear_attention(**call, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))


def test_level_table_is_the_papers():
    table = problem.level_table(64, LEVELS, torch.device("cpu"))
    assert all(table[t, u] == level(t, u, LEVELS) for t in range(64) for u in range(t + 1))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("levels", [4, LEVELS])
def test_a_plain_pass_for_every_level_equals_the_recurrence(delta, packed, levels, monkeypatch):
    monkeypatch.setattr(importlib.import_module("flame.kernels.log_linear_attention.levels"), "CHUNK", 8)
    lengths = [5, 0, 1, 8, 70, 16] if packed else [75]
    call = inputs(sum(lengths), batch=1 if packed else 2, levels=levels, delta=delta)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() if packed else None
    p = problem.Problem(
        "test", call["q"], call["k"], call["v"], call["level_weights"], call["scalar_decay"], call.get("beta"),
        K**-0.5, None, bounds,
    )  # fmt: skip
    assert_same(by_levels(p), op(call, cu_seqlens=bounds, backend="reference")[0], call)
