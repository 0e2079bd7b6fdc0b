"""The training step replayed from a CUDA graph: the host launches one graph where it launched thousands of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flame.errors import ConfigError, FlameError
from flame.step import MicroBatch, StepResult, TrainStep

WARM_UP = 3  # steps run plainly first: they compile, tune, and give FSDP and NCCL their buffers


@dataclass
class StaticBatch:
    """The memory that a captured step reads its rows from."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: None = None
    max_seqlen: int | None = None
    shard: None = None


class GraphedStep:
    """`TrainStep` with the same results, captured after a few plain steps and replayed from then on.

    A step never waits for the host, so what was recorded once holds for every later one: weights, moments, the schedule
    and the verdict on non-finite gradients all live on the device, and rows are copied into the memory that was read while
    recording. The graph keeps the memory of one step for itself; validation and sampling take theirs beside it.

    Args:
        step: on a GPU, with rows of one shape (no packed documents).

    Raises:
        ConfigError: the device cannot capture graphs.
    """

    def __init__(self, step: TrainStep, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"compile.cuda_graph needs a GPU and this run uses {device.type}; set it to false.")
        self.step = step
        self.stream = torch.cuda.Stream(device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batches: Sequence[MicroBatch], step: int) -> StepResult:
        """Forward, backward and update, as `TrainStep` does it.

        Raises:
            FlameError: packed documents, or rows of another shape than the recorded ones.
        """
        if any(batch.cu_seqlens is not None for batch in batches):
            raise FlameError("a step with packed documents cannot be replayed; set compile.cuda_graph = false.")
        self.number.fill_(step)
        self.steps += 1
        if self.steps <= WARM_UP:
            return self.run_aside(batches)
        if self.graph is None:
            self.record(batches)
        self.refill(batches)
        assert self.graph is not None
        self.graph.replay()
        result = self.result  # lives in the graph's memory, where the next replay writes
        return StepResult(*(x.clone() for x in (result.loss, result.grad_norm, result.learning_rate, result.tokens)))

    def run_aside(self, batches: Sequence[MicroBatch]) -> StepResult:
        """A plain step on the stream that will record, so that autograd's own state belongs to that stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.step(batches, self.number)
        current.wait_stream(self.stream)
        return result

    def record(self, batches: Sequence[MicroBatch]) -> None:
        """Capture one step; nothing of it runs yet."""
        self.rows = [StaticBatch(batch.input_ids.clone(), batch.labels.clone()) for batch in batches]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph allocates the step's memory anew
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.step(self.rows, self.number)

    def refill(self, batches: Sequence[MicroBatch]) -> None:
        shapes, recorded = [batch.input_ids.shape for batch in batches], [row.input_ids.shape for row in self.rows]
        if shapes != recorded:
            raise FlameError(f"rows of shapes {shapes} in a step that was recorded with {recorded}.")
        for row, batch in zip(self.rows, batches):
            row.input_ids.copy_(batch.input_ids)
            row.labels.copy_(batch.labels)
