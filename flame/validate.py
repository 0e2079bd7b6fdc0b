"""Loss on held-out data, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flame.data import Batch, Tokenizer
from flame.parallel.fsdp import reshard
from flame.parallel.pipeline import Pipeline
from flame.step import IGNORED


@dataclass(frozen=True)
class ValidationResult:
    """
    Attributes:
        loss: nats per token.
        bits_per_byte: the same loss per byte of text, which can be compared between tokenizers.
        tokens: targets that were counted.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte over {self.tokens:,} tokens"


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """[V] int64: bytes of text behind every token id; special tokens have none."""
    backend = tokenizer.backend
    special = {token_id for token_id, added in backend.get_added_tokens_decoder().items() if added.special}
    byte_level = "ByteLevel" in type(backend.decoder).__name__
    sizes = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id not in special:
            # A byte-level vocabulary writes every byte as one character; elsewhere the text itself tells.
            sizes[token_id] = len(token) if byte_level else len(backend.decode([token_id]).encode())
    return sizes


class Validator:
    """Evaluates a sharded model on the same batches every time.

    Args:
        batches: this rank's batches; every rank has the same number of them.
        sizes: `token_bytes` of the tokenizer.
        group: ranks that hold different tokens.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], sizes: Tensor, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self.model: Any = model
        self.batches = batches
        self.sizes = sizes
        self.device = device
        self.group = group

    @torch.no_grad()
    def __call__(self) -> ValidationResult:
        """One pass; waits for the device at its end."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # nats, tokens, bytes
        for batch in self.batches:
            targets = batch.labels[batch.labels != IGNORED]
            counts = torch.tensor([0, targets.numel(), int(self.sizes[targets].sum())], dtype=torch.float64)
            here = batch.to(self.device, non_blocking=True)
            output = self.model(
                here.input_ids,
                labels=here.labels,
                cu_seqlens=here.cu_seqlens,
                max_seqlen=here.max_seqlen,
                shard=here.shard,
            )
            sums += counts.to(self.device)
            sums[0] += output.loss_sum
        self.model.train()
        if isinstance(self.model, Pipeline):
            sums[0] = self.model.total(sums[0])  # only the last stage knows the loss
        reshard(self.model)  # a forward alone leaves the root gathered, which a loaded checkpoint would not reach
        dist.all_reduce(sums, group=self.group)
        nats, tokens, size = sums.tolist()
        return ValidationResult(nats / max(tokens, 1), nats / math.log(2) / max(size, 1), int(tokens))
