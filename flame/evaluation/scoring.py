"""How likely a model finds given tokens: the base of perplexity and of multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flame.models.decoder import CausalLM


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after others.

    Attributes:
        context: at least one token.
        target: the tokens whose probability is wanted, at least one.
    """

    context: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        logprob: log probability of the target, in nats.
        is_greedy: greedy decoding would produce the target.
    """

    logprob: float
    is_greedy: bool


@torch.no_grad()
def score(model: CausalLM, items: Sequence[Continuation], max_length: int = 2048, batch_size: int = 8) -> list[Score]:
    """Scores in the order of `items`.

    Rows of a batch are padded at the end, which a causal model does not see. Long contexts lose their beginning.

    Args:
        max_length: longest input, in tokens.
    """
    device = next(model.parameters()).device
    scores: dict[int, Score] = {}
    # Longest first: rows of a batch are alike, and a batch that does not fit in memory shows at once.
    order = sorted(range(len(items)), key=lambda index: -len(items[index].context) - len(items[index].target))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [[*items[index].context, *items[index].target][-max_length - 1 :] for index in chosen]
        longest = max(len(row) for row in rows) - 1
        inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, tokens in zip(inputs, rows):
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        logits = model(inputs.to(device)).logits
        for index, row, of_row in zip(chosen, rows, logits):
            count = min(len(items[index].target), len(row) - 1)
            target = torch.tensor(row[-count:], device=device)
            found = torch.log_softmax(of_row[len(row) - 1 - count : len(row) - 1].float(), -1)  # [count, V]
            likely = bool((found.argmax(-1) == target).all())
            scores[index] = Score(float(found.gather(-1, target[:, None]).sum()), likely)
    return [scores[index] for index in range(len(items))]


def windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Continuation]:
    """A text cut so that every token is scored once, each after up to `max_length` tokens.

    Windows do not overlap, but the last one, which may be short, sees as much before it as fits.

    Args:
        prefix: token before the first one.
    """
    whole = [prefix, *tokens]
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        yield Continuation(whole[max(0, end - max_length) : start + 1], tokens[start:end])
