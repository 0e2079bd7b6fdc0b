"""One stage of a pipeline: a run of the model's layers, and the tensors that reach it from the stage before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from flame.kernels.sequence import SequenceShard
from flame.models.config import ModelConfig
from flame.models.context import Cache, make_context
from flame.models.decoder import CausalLM
from flame.parallel.pipeline_split import Stage


@dataclass(frozen=True)
class Traveller:
    """A tensor that goes from stage to stage.

    Attributes:
        name: its key in `ctx.carried`; empty for the residual stream.
        sizes: (size for one row of one token, grows with rows, grows with tokens) of each dimension.
    """

    name: str
    sizes: tuple[tuple[Fraction, bool, bool], ...]
    dtype: torch.dtype

    def shape(self, rows: int, tokens: int) -> list[int]:
        """For a micro-batch of `rows` x `tokens`."""
        grown = (size * (rows if by_row else 1) * (tokens if by_token else 1) for size, by_row, by_token in self.sizes)
        return [math.ceil(size) for size in grown]

    def bytes(self, rows: int, tokens: int) -> int:
        """Size of the tensor of a micro-batch of `rows` x `tokens`."""
        return math.prod(self.shape(rows, tokens)) * self.dtype.itemsize

    def empty(self, rows: int, tokens: int, device: torch.device | str) -> Tensor:
        """Room for the tensor of a micro-batch of `rows` x `tokens`."""
        return torch.empty(self.shape(rows, tokens), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Boundary:
    """What travels from one stage to the next: the residual stream, and what is carried beside it."""

    entries: tuple[Traveller, ...] = ()

    @property
    def carried(self) -> list[str]:
        """Names of the tensors beside the residual stream, which comes first."""
        return [entry.name for entry in self.entries[1:]]

    def room(self, rows: int, tokens: int, device: torch.device | str) -> tuple[Tensor, ...]:
        """Room for the tensors of a micro-batch of `rows` x `tokens`."""
        return tuple(entry.empty(rows, tokens, device) for entry in self.entries)

    def bytes(self, rows: int, tokens: int) -> int:
        return sum(entry.bytes(rows, tokens) for entry in self.entries)


@torch.no_grad()
def find_boundaries(model: CausalLM, starts: Sequence[int], tokens: int = 64) -> list[Boundary]:
    """What travels into the layers `starts`, from forwards of three shapes on the meta device.

    Args:
        model: the whole model, on the meta device, in the dtype of the computation; split if it is tensor parallel, by
            tokens of the stream and not by rows.
        tokens: length of the forwards, a multiple of the tensor-parallel ranks.
    """
    rows = 2
    base, taller, longer = (
        streams(model, *shape) for shape in ((rows, tokens), (2 * rows, tokens), (rows, 2 * tokens))
    )
    return [
        Boundary(
            tuple(
                Traveller(name, growth(tensor, taller[at][name], longer[at][name], rows, tokens), tensor.dtype)
                for name, tensor in base[at].items()
            )
        )
        for at in starts
    ]


def streams(model: CausalLM, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """What every layer of a meta model finds: the residual stream under the empty name, and what is carried beside it."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    ctx = make_context(tokens, ids.device)
    x, carried = model.decoder.embeddings(ids), model.decoder.initial_carried()
    found = []
    for block in model.blocks:
        found.append({"": x, **carried})
        x, carried = block(x, ctx.at_layer(None, carried))
    return found


def growth(
    base: Tensor, taller: Tensor, longer: Tensor, rows: int, tokens: int
) -> tuple[tuple[Fraction, bool, bool], ...]:
    """Sizes for one row of one token, from a tensor's shape at rows x tokens, at twice the rows and at twice the tokens."""
    sizes = []
    for size, with_rows, with_tokens in zip(base.shape, taller.shape, longer.shape):
        by_row, by_token = with_rows != size, with_tokens != size
        unit = Fraction(size, (rows if by_row else 1) * (tokens if by_token else 1))
        sizes.append((unit, by_row, by_token))
    return tuple(sizes)


class Together(torch.autograd.Function):
    """Identity on several tensors, which makes all of them differentiable if one is, and gives each a gradient.

    Stages exchange the gradient of every tensor they exchange, also where one does not lead to the loss.

    Args:
        copy: return tensors of their own, as FSDP wants the outputs of a module to be.
    """

    @staticmethod
    def forward(ctx: Any, copy: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        if copy:
            return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient.contiguous() for gradient in gradients)


@dataclass
class Work:
    """A micro-batch on its way through a stage.

    Attributes:
        labels: None asks for logits instead of the loss.
        scale: 0-d, divides the loss; None leaves it a sum.
        cache: decode state.
        shard: which part of the rows this is under context parallelism.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    scale: Tensor | None = None
    cache: Cache | None = None
    shard: SequenceShard | None = None


class StageModel(CausalLM):
    """A causal language model without the layers of other stages; names of parameters stay those of the whole model.

    The first stage has the embedding and what the backbone holds itself, the last one has final norm and head. A tied
    embedding is in both. Build it on the meta device.

    Args:
        received, sent: what comes from the stage before and goes to the one after.
    """

    def __init__(self, config: ModelConfig, stage: Stage, received: Boundary, sent: Boundary) -> None:
        super().__init__(config)
        self.stage, self.received, self.sent = stage, received, sent
        self.work: Iterator[Work] = iter(())
        self.leave_out()

    def leave_out(self) -> None:
        """Drop the modules of other stages."""
        backbone, stage = self.decoder, self.stage
        for name in list(backbone.layers._modules):
            if not stage.first <= int(name) < stage.last:
                del backbone.layers._modules[name]
        if not stage.is_first:
            backbone._parameters.clear()
            if not (stage.is_last and self.config.tie_word_embeddings):
                backbone._modules["embeddings"] = None
        if not stage.is_last:
            self._modules["lm_head"] = None
            for name in list(backbone._modules):
                if name not in ("embeddings", "layers"):
                    backbone._modules[name] = None

    def forward(self, *received: Tensor) -> tuple[Tensor, ...] | Tensor:  # type: ignore[override]
        """The next piece of `work`: what the stage after needs, or the loss (0-d) or the logits.

        Stages see their micro-batches in the same order, so that only activations have to be passed.

        Args:
            received: tensors of `self.received`; of no meaning in the first stage.
        """
        work, backbone = next(self.work), self.decoder
        ids, cache = work.input_ids, work.cache
        ctx = make_context(ids.shape[1], ids.device, work.cu_seqlens, cache, work.max_seqlen, work.shard)
        if self.stage.is_first:
            x, carried = backbone.embeddings(ids), backbone.initial_carried()
        else:
            x, *rest = Together.apply(False, *received)
            carried = dict(zip(self.received.carried, rest))
        x, carried = backbone.run_blocks(x, carried, ctx, cache)
        if not self.stage.is_last:
            return Together.apply(True, x, *(carried[name] for name in self.sent.carried))
        hidden = backbone.finish(x, carried)
        if work.labels is None:
            return self.logits(hidden, ids.shape[1])
        loss = self.loss_sum(hidden, work.labels, carried)
        return loss if work.scale is None else loss / work.scale
