"""What the blocks of a stage keep for the backward, and what they exchange, from forwards on the meta device."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flame.kernels.sequence import SequenceShard
from flame.models.context import Context, make_context
from flame.parallel.activation_checkpoint import KERNEL_NAMESPACE, is_expensive
from flame.parallel.pipeline_stage import StageModel
from flame.plan.parameters import numel

Counted = TypeVar("Counted")
KEPT_SHAPE = (64, 2048)  # rows that fill a GPU, and tokens, times the tensor-parallel ranks: few states for them
LINEAR_KERNELS = ("rotary", "token_shift")
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
    """Count what the compiled block keeps for its backward.

    That is, nearly: every tensor that enters or leaves one of its leaf modules (projections, norms, convolutions) or one of
    our kernels, once; what else elementwise operations make is made again. The last projection's output only goes into
    the residual stream, which no backward needs. Selective checkpointing keeps the stream and what projections and kernels
    make, as far as `is_expensive` says so. Kernels that do not run by Triton (`kernels_by_shape`) count as projections do.

    Args:
        block: on the meta device, in the compute dtype.
        x: [B, T, D] the residual stream, or a tensor-parallel rank's tokens of it.
        tokens: T, if x has fewer.
    """
    kept = _Kept(block)
    leaves = [module for module in block.modules() if not list(module.children())]
    handles = [module.register_forward_hook(kept.note_module) for module in leaves]
    with kept:
        block(x, ctx)
    for handle in handles:
        handle.remove()
    count = x.shape[0] * (x.shape[1] if tokens is None else tokens)
    kept.drop()
    stream, by_op = size_of([x]), size_of(kept.by_op.values())
    widest = sorted(map(size_of, ([tensor] for tensor in kept.all.values())))[-3:]
    return BlockActivations(
        stream / count, size_of(kept.all.values()) / count, (stream + by_op) / count, sum(widest) / count
    )


class _Kept(TorchDispatchMode):
    """Tensors of a forward by their storages: all that are kept, those kept by operation, those that something reads.

    Tensors are held, so that no storage's address is used twice.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.weights = {key_of(parameter) for parameter in block.parameters()}
        self.all: dict[int, Tensor] = {}
        self.by_op: dict[int, Tensor] = {}
        self.read: set[int] = set()
        self.doubtful: set[int] = set()  # kept only if something reads it
        self.last_made = 0  # by a projection

    def drop(self) -> None:
        """Forget what no backward reads."""
        for key in self.doubtful - self.read:
            self.all.pop(key, None)
        if self.last_made not in self.read:
            self.all.pop(self.last_made, None)
            self.by_op.pop(self.last_made, None)

    def note(self, inputs: tuple[Any, ...], outputs: Any, expensive: bool) -> list[Tensor]:
        into, out = ({key_of(t): t for t in tensors_in(each)} for each in (inputs, (outputs,)))
        into = {key: tensor for key, tensor in into.items() if key not in self.weights}
        self.read |= into.keys()
        self.all |= into | out
        if expensive:
            self.by_op |= out
        return list(out.values())

    def note_module(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        projection = isinstance(module, nn.Linear)
        for made in self.note(inputs, output, projection):
            if projection:
                self.last_made = key_of(made)
            elif made.dtype == torch.float32:  # goes on as a copy in the compute dtype
                self.doubtful.add(key_of(made))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == KERNEL_NAMESPACE and func._opname in LINEAR_KERNELS:
            self.doubtful |= {key_of(tensor) for tensor in tensors_in(args)}
            self.all |= {key_of(tensor): tensor for tensor in tensors_in((output,))}
        elif func.namespace == KERNEL_NAMESPACE and is_expensive(func):
            result, *_ = self.note(args, output, True)
            self.doubtful.add(key_of(result))  # elementwise operations may turn it into what is kept
        return output


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def size_of(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.untyped_storage().nbytes() for tensor in tensors))


@contextmanager
def kernels_by_shape() -> Iterator[None]:
    """Triton's kernels on meta tensors, where only the shapes of what they make are known; without Triton the torch forms."""
    before = os.environ.get("FLAME_BACKEND")
    if importlib.util.find_spec("triton"):
        os.environ["FLAME_BACKEND"] = "triton"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("FLAME_BACKEND", None)
        else:
            os.environ["FLAME_BACKEND"] = before


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
    rows, tokens = KEPT_SHAPE[0], KEPT_SHAPE[1] * tp
    with kernels_by_shape():
        return over_blocks(part, rows, tokens, None, lambda block, x, ctx: block_activations(block, x, ctx, tokens))


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
