"""What the delta rule is for, learnt from scratch: parity, permutations of three things, recall of many pairs.

Negative eigenvalues of the transition make state tracking possible (2411.12537); products of several Householder steps a
token make permutations possible (2502.10297); overwriting one key's value makes recall exact (2406.06484).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from flame.models import build_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2, "fuse_norm": False}


def parity(rows, tokens, rng):
    """Bits, and the parity of those so far."""
    bits = torch.randint(2, (rows, tokens), generator=rng)
    return bits, bits.cumsum(1) % 2


def permutations(rows, tokens, rng):
    """Elements of S3, and the product of those so far."""
    elements = list(itertools.permutations(range(3)))
    table = torch.tensor([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])
    ids = torch.randint(6, (rows, tokens), generator=rng)
    products = [ids[:, 0]]
    for t in range(1, tokens):
        products.append(table[products[-1], ids[:, t]])
    return ids, torch.stack(products, 1)


def recall(rows, tokens, rng):
    """Pairs of a key (token < 32) and a value (32 to 63), then the keys again in another order; values are the labels."""
    pairs = tokens // 3
    keys = torch.stack([torch.randperm(32, generator=rng)[:pairs] for _ in range(rows)])
    values = torch.randint(32, 64, (rows, pairs), generator=rng)
    order = torch.stack([torch.randperm(pairs, generator=rng) for _ in range(rows)])
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2 * pairs :] = values.gather(1, order)
    return ids, labels


def train(task, config, tokens, steps, lr=3e-3, rows=64):
    """A model of `config` after `steps` steps on fresh batches of a task."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    model = build_model(SHAPE | config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids, labels = (x.to(DEVICE) for x in task(rows, tokens, rng))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            logits = model(ids).logits  # the model's own loss takes hidden states and weights of one dtype
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, task, tokens):
    ids, labels = (x.to(DEVICE) for x in task(128, tokens, torch.Generator().manual_seed(2)))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        guesses = model(ids).logits.argmax(-1)
    wanted = labels >= 0
    return (guesses == labels)[wanted].float().mean().item()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    yield
    torch.set_num_threads(before)


PLAIN = {"use_short_conv": False}


@pytest.mark.slow
def test_negative_eigenvalues_learn_parity_and_extend_it():
    config = {"model_type": "delta_net", "vocab_size": 2, **PLAIN}
    model = train(parity, {**config, "allow_neg_eigval": True}, tokens=24, steps=200)
    assert accuracy(model, parity, 48) > 0.99
    model = train(parity, {**config, "allow_neg_eigval": False}, tokens=24, steps=200)
    assert accuracy(model, parity, 48) < 0.7


@pytest.mark.slow
def test_two_householder_steps_learn_permutations_and_one_does_not():
    config = {"model_type": "gated_deltaproduct", "vocab_size": 6, "num_heads": 4, "head_dim": 32, **PLAIN}
    config |= {"num_householder": 2, "allow_neg_eigval": True, "use_forget_gate": False, "use_output_gate": False}
    model = train(permutations, config, tokens=8, steps=600)
    assert accuracy(model, permutations, 16) > 0.99
    model = train(permutations, config | {"num_householder": 1}, tokens=8, steps=600)
    assert accuracy(model, permutations, 16) < 0.9


@pytest.mark.slow
def test_many_pairs_are_recalled_and_plain_linear_attention_recalls_few():
    config = {"vocab_size": 64, "num_hidden_layers": 2}
    model = train(recall, {"model_type": "delta_net", **config}, 24, 250, lr=1e-2)
    assert accuracy(model, recall, 24) > 0.98
    model = train(recall, {"model_type": "linear_attn", **config}, 24, 250, lr=1e-2)
    assert accuracy(model, recall, 24) < 0.5
