"""Each op on a sequence cut over ranks equals the op on the whole sequence, forward and backward."""

import pytest
import torch
from ranks import run_ranks

from flame.kernels.delta_rule import delta_rule, dplr_delta_rule
from flame.kernels.elementwise_scan import elementwise_scan
from flame.kernels.forgetting_attention import forgetting_attention
from flame.kernels.linear_attention import linear_attention
from flame.kernels.log_gate import log_gate
from flame.kernels.log_linear_attention import log_linear_attention, log_linear_delta_rule
from flame.kernels.mesa import mesa
from flame.kernels.moba import moba
from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention
from flame.kernels.path_attention import path_attention
from flame.kernels.polynomial_attention import polynomial_attention
from flame.kernels.selective_scan import selective_scan
from flame.kernels.sequence import cut_sequence
from flame.kernels.short_convolution import short_convolution
from flame.kernels.softmax_attention import softmax_attention
from flame.kernels.token_shift import token_shift

pytestmark = pytest.mark.distributed
T, H, K, V = 48, 2, 6, 5
DOCUMENTS = {  # bounds of packed documents; None for plain rows
    "plain": None,
    "long": (0, 48),  # one document over all ranks
    "crossing": (0, 5, 29, 31, 48),
    "aligned": (0, 12, 24, 40, 48),
    "short": (0, 3, 9, 14, 15, 20, 26, 31, 37, 44, 48),
}
SHARED = "shared_"  # inputs of this name are parameters: their gradients are sums over ranks


def decay(*shape):
    return -torch.rand(*shape) * 0.3


def linear(B, **decays):
    return {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V), **decays}


def run_linear(x, **options):
    return linear_attention(**{name.removeprefix(SHARED): value for name, value in x.items()}, **options)[0]


def grouped(B):
    q, k, v = torch.randn(B, T, 2, K), torch.randn(B, T, 1, K), torch.randn(B, T, 4, V)
    return {"q": q, "k": k, "v": v, "key_decay": decay(B, T, 2, K)}


def run_convolution(x, **options):
    return short_convolution(x["x"], x[SHARED + "weight"], x[SHARED + "bias"], activation="silu", **options)[0]


def attention_inputs(B):
    return {"q": torch.randn(B, T, 4, K), "k": torch.randn(B, T, 2, K), "v": torch.randn(B, T, 1, V)}


def run_attention(window):
    return lambda x, **options: softmax_attention(**x, window=window, **options)


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def delta(B, steps=1, heads=H, **more):
    keys, values = (B, T * steps, heads, K), (B, T * steps, H, V)
    q, k = torch.randn(B, T, heads, K), unit(torch.randn(keys))
    return {"q": q, "k": k, "v": torch.randn(values), "beta": torch.rand(values[:-1]) * 1.5, **more}


def run_delta(**fixed):
    return lambda x, **options: delta_rule(**x, **fixed, **options)[0]


def dplr(B):
    kappa = unit(torch.randn(B, T, H, K))
    a, b = -kappa, kappa * torch.rand(B, T, H, K)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    return {"q": q, "k": k, "v": v, "a": a, "b": b, "key_decay": decay(B, T, H, K)}


def selective(B):
    x, dt, z = torch.randn(B, T, 5), torch.randn(B, T, 5), torch.randn(B, T, 5)
    tokens = {"x": x, "dt": dt, "z": z, "B": torch.randn(B, T, 3), "C": torch.randn(B, T, 3)}
    return {**tokens, "shared_A": -torch.rand(5, 3), "shared_D": torch.randn(5), "shared_dt_bias": torch.randn(5)}


def run_shared(op, **fixed):
    return lambda x, **options: op(**{n.removeprefix(SHARED): t for n, t in x.items()}, **fixed, **options)[0]


def levels(B, key, **more):
    q, k, v = torch.randn(B, T, key, K), torch.randn(B, T, key, K), torch.randn(B, T, 4, V)
    return {"q": q, "k": k, "v": v, "level_weights": torch.rand(B, T, 4, 7), **more}


def mesa_inputs(B):
    q, k, v = unit(torch.randn(B, T, H, K)), unit(torch.randn(B, T, H, K)), torch.randn(B, T, H, V)
    scalars = {"log_decay": decay(B, T, H), "beta": torch.rand(B, T, H)}
    return {"q": q, "k": k, "v": v, **scalars, "shared_regularizer": 0.5 + torch.rand(H, K)}


def forgetting(B):
    return {
        "q": torch.randn(B, T, 4, K),
        "k": torch.randn(B, T, 2, K),
        "v": torch.randn(B, T, 2, V),
        "log_forget": decay(B, T, 4),
    }


def run_gate(x, **options):
    weight, log_decay, _ = log_gate(x["x"], **options)
    return torch.cat([weight, log_decay], -1)


def polynomial(B):
    return {"q": torch.randn(B, T, H, 3), "k": torch.randn(B, T, H, 3), "v": torch.randn(B, T, H, V)}


def heads_of(B, query, key):
    return {"q": torch.randn(B, T, query, K), "k": torch.randn(B, T, key, K), "v": torch.randn(B, T, key, V)}


def path(B):
    w, beta, gates = unit(torch.randn(B, T, 2, K)), 2 * torch.rand(B, T, 2), decay(B, T, 4)
    return {**heads_of(B, 4, 2), "w": w, "beta": beta, "log_forget": gates}


def sparse(B, key):
    return {**heads_of(B, 4, key), "gates": torch.rand(B, T, 4, 3)}


def run_sparse(x, **options):
    return native_sparse_attention(**x, pattern=SparsePattern(4, 3, 5), **options)


CASES = {
    "linear_none": (lambda B: linear(B), run_linear),
    "linear_head": (lambda B: linear(B, shared_head_decay=decay(H)), run_linear),
    "linear_scalar": (lambda B: linear(B, scalar_decay=decay(B, T, H)), run_linear),
    "linear_key": (lambda B: linear(B, key_decay=decay(B, T, H, K)), run_linear),
    "linear_value": (lambda B: linear(B, value_decay=decay(B, T, H, V)), run_linear),
    "linear_bonus": (lambda B: linear(B, key_decay=decay(B, T, H, K), shared_bonus=torch.randn(H, K)), run_linear),
    "linear_grouped": (grouped, run_linear),
    "convolution": (
        lambda B: {"x": torch.randn(B, T, 5), "shared_weight": torch.randn(5, 4), "shared_bias": torch.randn(5)},
        run_convolution,
    ),
    "token_shift": (lambda B: {"x": torch.randn(B, T, 5)}, lambda x, **options: token_shift(x["x"], **options)[0]),
    "delta": (delta, run_delta()),
    "delta_steps": (lambda B: delta(B, 2, scalar_decay=decay(B, T, H)), run_delta()),
    "delta_grouped": (lambda B: delta(B, heads=1, scalar_decay=decay(B, T, H)), run_delta(normalize=True)),
    "delta_key": (lambda B: delta(B, key_decay=decay(B, T, H, K)), run_delta()),
    "delta_erase": (
        lambda B: delta(B, scalar_decay=decay(B, T, H), erase_key=0.5 * unit(torch.randn(B, T, H, K))),
        run_delta(exclusive=True),
    ),
    "dplr": (dplr, run_shared(dplr_delta_rule)),
    "elementwise": (
        lambda B: {"x": torch.randn(B, T, 5), "log_decay": decay(B, T, 5)},
        run_shared(elementwise_scan),
    ),
    "selective": (selective, run_shared(selective_scan)),
    "log_gate": (lambda B: {"x": torch.randn(B, T, H, K)}, run_gate),
    "log_linear": (lambda B: levels(B, 1, scalar_decay=decay(B, T, 4)), run_shared(log_linear_attention)),
    "log_linear_delta": (
        lambda B: levels(B, 2, beta=torch.rand(B, T, 4), scalar_decay=decay(B, T, 4)),
        run_shared(log_linear_delta_rule, normalize=True),
    ),
    "mesa": (mesa_inputs, run_shared(mesa)),
    "polynomial": (polynomial, run_shared(polynomial_attention)),
    "forgetting": (forgetting, lambda x, **options: forgetting_attention(**x, **options)),
    "attention": (attention_inputs, run_attention(None)),
    "attention_uneven_heads": (lambda B: heads_of(B, 3, 1), run_attention(None)),
    "path": (path, lambda x, **options: path_attention(**x, **options)),
    "sparse": (lambda B: sparse(B, 4), run_sparse),
    "sparse_one_key_head": (lambda B: sparse(B, 1), run_sparse),
    "moba": (lambda B: heads_of(B, 4, 2), lambda x, **options: moba(**x, chunk_size=5, topk=2, **options)),
    "attention_window": (attention_inputs, run_attention(7)),
    "attention_wide_window": (attention_inputs, run_attention(17)),
}


def compute(name, inputs, weights, **options):
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    o = CASES[name][1](leaves, **options)
    (o * weights).sum().backward()
    return o.detach(), {key: x.grad for key, x in leaves.items()}


def whole(name, documents):
    torch.manual_seed(1)
    inputs = CASES[name][0](2 if documents is None else 1)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    weights = torch.randn(CASES[name][1](inputs, cu_seqlens=cu_seqlens).shape)
    return inputs, cu_seqlens, weights


def differences(rank, names, exchange):
    """Largest error of outputs and of each gradient, by case and documents, of this rank's part against the whole."""
    found = {}
    group = torch.distributed.group.WORLD
    size = torch.distributed.get_world_size()
    for name in names:
        for kind, documents in DOCUMENTS.items():
            inputs, cu_seqlens, weights = whole(name, documents)
            o, gradients = compute(name, inputs, weights, cu_seqlens=cu_seqlens)
            shard, local = cut_sequence(group, T, cu_seqlens, exchange=exchange)
            part = {key: x if key.startswith(SHARED) else x.chunk(size, 1)[rank] for key, x in inputs.items()}
            own, own_gradients = compute(name, part, weights.chunk(size, 1)[rank], cu_seqlens=local, shard=shard)
            errors = {"o": (own - o.chunk(size, 1)[rank]).abs().max()}
            for key, x in own_gradients.items():
                if key.startswith(SHARED):
                    torch.distributed.all_reduce(x)
                expected = gradients[key] if key.startswith(SHARED) else gradients[key].chunk(size, 1)[rank]
                errors[key] = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
            found[name, kind] = {key: float(error) for key, error in errors.items()}
    return found


@pytest.mark.parametrize(
    "ranks, exchange",
    [
        (2, None),
        (4, "scan"),
        pytest.param(4, None, marks=pytest.mark.slow),
        pytest.param(2, "gather", marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_sequence_equal_the_whole(ranks, exchange):
    for found in run_ranks(differences, ranks, list(CASES), exchange):
        wrong = {key: errors for key, errors in found.items() if max(errors.values()) > 2e-5}
        assert not wrong
