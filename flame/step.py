"""One optimizer step: micro-batches in, one update out, and nothing read back from the device on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flame.errors import ConfigError, FlameError, unknown_name
from flame.kernels.sequence import SequenceShard
from flame.optim.clipping import clip_gradients, global_grad_norm
from flame.optim.optimizer import Optimizer
from flame.parallel.fsdp import set_accumulation
from flame.parallel.pipeline import Pipeline

NAN_POLICIES = ("skip", "rollback", "stop")
IGNORED = -100  # label of a position without target


class MicroBatch(Protocol):
    """What the model reads: tokens [B, T], labels [B, T] already shifted, document starts [N + 1] and a bound on their
    lengths, or None."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    @property
    def shard(self) -> SequenceShard | None: ...

    @property
    def max_seqlen(self) -> int | None: ...


@dataclass
class StepResult:
    """Figures of one step, all 0-d tensors on the device and the same on every rank.

    Attributes:
        loss: nats per token, over all tokens of the step on all ranks.
        grad_norm: global two-norm before clipping.
        learning_rate: what the update was applied with.
        tokens: positions with a target.
    """

    loss: Tensor
    grad_norm: Tensor
    learning_rate: Tensor
    tokens: Tensor


class NonFiniteStep(FlameError):
    """A loss or gradient was not finite and the policy does not allow to go on as if nothing had happened."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class FiniteGuard:
    """Keeps non-finite losses and gradients away from the weights, deciding on the device.

    Under `skip` the one update is dropped. Under `stop` and `rollback` that update and all later ones are, until the
    host looks (`check`, where it synchronises anyway, at logging or saving): the weights are then still those from
    before the bad step.

    Args:
        max_consecutive: under `skip`, this many dropped updates in a row are an error; 0 allows any number.
    """

    def __init__(self, policy: str, device: torch.device, max_consecutive: int = 0) -> None:
        if policy not in NAN_POLICIES:
            raise ConfigError(f"training.nan_policy: {unknown_name('policy', policy, NAN_POLICIES)}")
        self.policy = policy
        self.max_consecutive = max_consecutive
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._consecutive = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def allow(self, loss: Tensor, grad_norm: Tensor, step: int | Tensor) -> Tensor:
        """0-d bool on the device: whether the update of `step` may be applied."""
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self._first_bad = torch.where(~finite & (self._first_bad < 0), step, self._first_bad)
        allowed = finite if self.policy == "skip" else self._first_bad < 0
        self.skipped += ~allowed
        self._consecutive = torch.where(allowed, 0, self._consecutive + 1)
        return allowed

    def check(self) -> int:
        """Read the verdict; synchronises with the device.

        Returns:
            How many updates were dropped since the process began.

        Raises:
            NonFiniteStep: under `stop` and `rollback` after any bad step, under `skip` after too many in a row.
        """
        first_bad, consecutive, skipped = torch.stack([self._first_bad, self._consecutive, self.skipped]).tolist()
        if first_bad >= 0 and self.policy != "skip":
            raise NonFiniteStep(
                first_bad,
                f"step {first_bad}: the loss or a gradient is not finite. No update was applied from that step on, and "
                f"checkpoints before it are good. Lower optimizer.lr or training.max_norm, look at the data of that "
                f'step, or set training.nan_policy to "skip" or "rollback" to leave the step out.',
            )
        if self.max_consecutive and consecutive >= self.max_consecutive:
            raise NonFiniteStep(
                first_bad,
                f"the loss or a gradient was not finite in {consecutive} consecutive steps, the last of them included; "
                f"skipping does not help any more. Resume from an earlier checkpoint (checkpoint.load_step) with a "
                f"lower optimizer.lr.",
            )
        return skipped

    def reset(self) -> None:
        """Forget what was seen, after going back to a checkpoint."""
        self._consecutive.zero_()
        self._first_bad.fill_(-1)


@dataclass(frozen=True)
class StepOptions:
    """
    Attributes:
        max_norm: gradients are scaled down to this global norm; 0 or less leaves them.
        reduce_every: reduce gradients after every micro-batch instead of once a step (slower, less memory).
    """

    max_norm: float = 1.0
    reduce_every: bool = False


class TrainStep:
    """Turns the micro-batches of one global step into one update of the weights.

    Args:
        model: sharded by `flame.parallel.fsdp.apply_fsdp`, with the forward of `CausalLM`; or the stages of a pipeline.
        group: ranks that hold different tokens.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, guard: FiniteGuard, group: dist.ProcessGroup, options: StepOptions
    ) -> None:
        self.model: Any = model
        self.pipeline = model if isinstance(model, Pipeline) else None
        self.optimizer = optimizer
        self.guard = guard
        self.group = group
        self.options = options

    def __call__(self, batches: Sequence[MicroBatch], step: int | Tensor) -> StepResult:
        """Forward, backward and update.

        Args:
            batches: this rank's micro-batches, on its device.
            step: number of this step, for messages; a 0-d tensor on the device when it is being recorded.
        """
        tokens = self.count_tokens(batches)
        loss = self.accumulate(batches, tokens)
        dist.all_reduce(loss, group=self.group)

        gradients = self.optimizer.gradients()
        grad_norm = self.pipeline.grad_norm(gradients) if self.pipeline else global_grad_norm(gradients)
        clip_gradients(gradients, grad_norm, self.options.max_norm)
        learning_rate = self.optimizer.step(self.guard.allow(loss, grad_norm.to(loss.device), step))
        self.optimizer.zero_grad()
        return StepResult(loss, grad_norm, learning_rate, tokens)

    def count_tokens(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Positions with a target in the whole step, on all ranks: the divisor that makes the loss exact."""
        count = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        dist.all_reduce(count, group=self.group)
        return count.clamp(min=1)

    def accumulate(self, batches: Sequence[MicroBatch], tokens: Tensor) -> Tensor:
        """Gradients of all micro-batches, reduced over ranks; this rank's share of the loss."""
        if self.pipeline:
            return self.pipeline.accumulate(batches, tokens)
        loss = torch.zeros((), dtype=torch.float32, device=tokens.device)
        for index, batch in enumerate(batches):
            set_accumulation(self.model, index == len(batches) - 1, self.options.reduce_every)
            loss += self.forward_backward(batch, tokens)
        return loss

    def forward_backward(self, batch: MicroBatch, tokens: Tensor) -> Tensor:
        """Gradients of this micro-batch's share of the loss, which is returned."""
        output = self.model(
            batch.input_ids,
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            shard=batch.shard,
        )
        loss = output.loss_sum / tokens
        loss.backward()
        return loss.detach()
