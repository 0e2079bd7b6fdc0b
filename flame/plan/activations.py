"""What the blocks of a stage keep for the backward, and what they exchange, from forwards on the meta device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flame.kernels.sequence import SequenceShard
from flame.models.context import Context, make_context
from flame.parallel.pipeline_stage import StageModel
from flame.plan.parameters import numel

Counted = TypeVar("Counted")
PROBE_LENGTH = 64  # tokens, times the tensor-parallel ranks; what is counted grows linearly from there


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token that a block's forward leaves behind, by what is done about them.

    Attributes:
        stream: the block's input, all that `full` checkpointing keeps.
        kept: without checkpointing.
        kept_by_op: with selective checkpointing by operation.
        gradients: of the three widest tensors, in a gated MLP those around its product, which its backward holds at once.
    """

    stream: float
    kept: float
    kept_by_op: float
    gradients: float


class Exchanges(TorchDispatchMode):
    """Bytes that a rank sends in functional collectives, and their number, by the name of the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and isinstance(args[-1], str):  # not a wait
            group = args[-1]
            ranks = torch.distributed.get_world_size(torch.distributed.distributed_c10d._resolve_process_group(group))
            self.sent[group] += sent_bytes(func._opname, args[0].numel() * args[0].element_size(), ranks)
            self.count[group] += 1
        return func(*args, **(kwargs or {}))


def sent_bytes(operation: str, size: int, ranks: int) -> float:
    """What a rank sends in a collective on its input of `size` bytes, in rings."""
    if operation.startswith("all_gather"):
        return size * (ranks - 1)
    passes = 2 if operation.startswith("all_reduce") else 1
    return passes * size * (ranks - 1) / ranks


def block_activations(block: nn.Module, x: Tensor, ctx: Context, tokens: int | None = None) -> BlockActivations:
    """Count what autograd keeps of a block.

    That is, nearly: every tensor that enters or leaves one of its leaf modules (projections, norms, convolutions), once.
    The outputs of projections and convolutions are what the kernel between them keeps, the kernel's output is what the
    norm or projection after it keeps, and the products of elementwise operations enter the next projection. Left out
    are what lies between two elementwise operations and the chunk states of a kernel. Selective checkpointing keeps what
    projections and kernels make: outputs of nn.Linear, and inputs of nn.Linear that no leaf module made.

    Args:
        block: on the meta device, in the compute dtype.
        x: [1, T, D] the residual stream, or a tensor-parallel rank's tokens of it.
        tokens: T, if x has fewer.
    """
    seen: dict[int, Tensor] = {}
    made, by_op = set(), {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in tensors_in(inputs):
            seen[tensor.untyped_storage()._cdata] = tensor
            if isinstance(module, nn.Linear) and tensor.untyped_storage()._cdata not in made:
                by_op[tensor.untyped_storage()._cdata] = tensor
        for tensor in tensors_in((output,)):
            seen[tensor.untyped_storage()._cdata] = tensor
            made.add(tensor.untyped_storage()._cdata)
            if isinstance(module, nn.Linear):
                by_op[tensor.untyped_storage()._cdata] = tensor

    leaves = [module for module in block.modules() if not list(module.children())]
    handles = [module.register_forward_hook(note) for module in leaves]
    block(x, ctx)
    for handle in handles:
        handle.remove()
    count = x.shape[0] * (x.shape[1] if tokens is None else tokens)

    def size(tensors: Iterable[Tensor]) -> float:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / count

    stream = size([x])
    widest = sorted(seen.values(), key=lambda tensor: tensor.untyped_storage().nbytes())[-3:]
    return BlockActivations(stream, size(seen.values()), stream + size(by_op.values()), size(widest))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and the tuples and lists in them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found


@torch.no_grad()
def count_blocks(part: StageModel, tp: int) -> list[BlockActivations]:
    """Activations of every block of a whole model on the meta device, as one of `tp` ranks has them."""
    tokens = PROBE_LENGTH * tp
    return over_blocks(part, 1, tokens, None, lambda block, x, ctx: block_activations(block, x, ctx, tokens))


@torch.no_grad()
def count_exchanges(part: StageModel, tp: int, rows: int, tokens: int, shard: SequenceShard | None) -> list[Exchanges]:
    """What the forward of every block of a whole model on the meta device exchanges, on `rows` x `tokens`.

    Without context parallelism (no shard) that grows with the tokens, and a few are enough to count it.
    """
    probe = (rows, tokens) if shard is not None else (1, PROBE_LENGTH * tp)
    scale = rows * tokens / (probe[0] * probe[1])

    def count(block: nn.Module, x: Tensor, ctx: Context) -> Exchanges:
        with Exchanges() as exchanges:
            block(x, ctx)
        for group in exchanges.sent:
            exchanges.sent[group] *= scale
        return exchanges

    return over_blocks(part, *probe, shard, count)


def over_blocks(
    part: StageModel,
    rows: int,
    tokens: int,
    shard: SequenceShard | None,
    count: Callable[[nn.Module, Tensor, Context], Counted],
) -> list[Counted]:
    """`count` of every block and of what it gets in a forward on `rows` x `tokens` meta tokens.

    The first two blocks of a kind are run (the first of all may do more than later ones), the rest count like the second.
    """
    known: dict[tuple[str, int], list[Counted]] = {}
    counts = []
    with torch.device("meta"):
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        ctx, carried = make_context(tokens, ids.device, shard=shard), part.decoder.initial_carried()
        x = part.decoder.embeddings(ids)
        for block in part.blocks:
            same = known.setdefault((type(block.token_mixer).__name__, numel(block.parameters())), [])
            if len(same) < 2:
                inner = ctx.at_layer(None, carried)
                same.append(count(block, x, inner))
                x, carried = block(x, inner)
            counts.append(same[-1])
    return counts
