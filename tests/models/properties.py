"""Properties that every system must have; the systems' test files call these with small configs."""

import torch

from flame.models import build_model, initialize_weights


def small_model(config: dict, seed: int = 0):
    """A model in fp32 with weights large enough that the mixer matters."""
    model = build_model(
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1, **config}
    )
    initialize_weights(model, seed)
    return model.eval()


def tokens(*shape: int, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_decode_equals_prefill(model, length: int = 37, split: int = 21, atol: float = 2e-5) -> None:
    """One pass == a prefill of `split` tokens, then a short chunk, then single tokens."""
    ids = tokens(2, length)
    whole = model(ids).logits
    cache = model.new_cache()
    parts = [model(ids[:, :split], cache=cache).logits, model(ids[:, split : split + 3], cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(split + 3, length)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=atol, rtol=1e-4)
    assert cache.seen == length


def assert_packed_equals_separate(model, lengths=(5, 1, 70, 13), atol: float = 2e-5) -> None:
    """Documents in one packed row == each alone: logits, and gradients of a loss over all."""
    ids = tokens(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = model(ids, cu_seqlens=bounds).logits
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    packed_grads = torch.autograd.grad((packed * weight).sum(), list(model.parameters()), allow_unused=True)
    separate = torch.cat([model(part).logits for part in ids.split(list(lengths), dim=1)], 1)
    separate_grads = torch.autograd.grad((separate * weight).sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(packed, separate, atol=atol, rtol=1e-4)
    for (name, _), got, expected in zip(model.named_parameters(), packed_grads, separate_grads):
        if expected is None:
            assert got is None or not got.abs().max() > 0, name
            continue
        assert (got - expected).norm() <= 2e-4 * expected.norm().clamp_min(1e-6), name


def assert_loss_equals_logits(model, length: int = 41) -> None:
    """loss_sum == the fp32 cross-entropy of the logits, summed over the labels that are not -100."""
    ids, labels = tokens(2, length), tokens(2, length, seed=3)
    labels[0, :5] = -100
    loss = model(ids, labels=labels).loss_sum
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
