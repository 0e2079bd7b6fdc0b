"""Pipeline parallelism: this rank's stages, run by the schedules of torch.distributed.pipelining.

Every rank of a pipeline reads the same micro-batches, so documents and labels are known everywhere and only the residual
stream travels, with what blocks carry beside it. Gradients are reduced over data-parallel ranks once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor

from flame.config.sections import JobConfig
from flame.data.build import global_batch_size, microbatch_rows
from flame.kernels.sequence import SequenceShard
from flame.models.config import ModelConfig
from flame.models.context import Cache
from flame.models.decoder import CausalLM, CausalLMOutput, build_model
from flame.models.hf import named_weights
from flame.optim.clipping import global_grad_norm, local
from flame.parallel.fsdp import parse_dtype
from flame.parallel.mesh import Mesh
from flame.parallel.parallelize import materialize, parallelize
from flame.parallel.pipeline_split import Stage, schedule_kind, stages_of_job
from flame.parallel.pipeline_stage import Boundary, StageModel, Work, find_boundaries
from flame.parallel.tensor import apply_tensor_parallel

if TYPE_CHECKING:
    from flame.step import MicroBatch


class Pipeline(nn.Module):
    """The stages of this rank. To the optimizer, the checkpoint and the sampler it is a model that lacks some layers.

    Args:
        whole: the whole model on the meta device, for its counts.
        stages: all stages of the model, in order.
        parts: those of this rank, sharded and initialised.
        group: ranks of the pipeline.
        schedule: name of the schedule.
    """

    def __init__(
        self,
        whole: CausalLM,
        stages: list[Stage],
        parts: list[StageModel],
        group: dist.ProcessGroup,
        schedule: str,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config, self.backbone_name = whole.config, whole.backbone_name
        self.stages, self.group, self.schedule_name = stages, group, schedule
        self.parts = nn.ModuleList(parts)
        self.parameter_count = sum(parameter.numel() for parameter in whole.parameters())
        self.flops_per_token = whole.flops_per_token
        self.device = device
        self.schedules: dict[tuple[int, int, int], Any] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []

    @property
    def own(self) -> list[StageModel]:
        """This rank's stages."""
        return [part for part in self.parts if isinstance(part, StageModel)]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Modules of all stages under the names that they have in the whole model; parameters and buffers follow."""
        memo = set() if memo is None else memo
        for part in self.parts:
            yield from part.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.state_dict(*args, **kwargs).items()}

    def no_weight_decay(self) -> set[str]:
        return set().union(*(part.no_weight_decay() for part in self.own))

    def new_cache(self) -> Cache:
        return Cache.empty(self.config.num_hidden_layers)

    def accumulate(self, batches: Sequence[MicroBatch], tokens: Tensor) -> Tensor:
        """Gradients of all micro-batches of a step, reduced over data-parallel ranks.

        Args:
            batches: of equal shape.
            tokens: 0-d, divides the loss.

        Returns:
            The loss of the micro-batches, the same on all ranks of the pipeline.
        """
        schedule = self.schedule(len(batches), *batches[0].input_ids.shape)
        for part in self.own:
            part.work = (
                Work(b.input_ids, b.labels, b.cu_seqlens, b.max_seqlen, tokens, shard=b.shard) for b in batches
            )
        losses: list[Tensor] = []
        # What the schedule cuts into micro-batches is of no meaning: stages take their work themselves.
        tickets = torch.zeros(len(batches), device=self.device)
        schedule.step(tickets, target=tickets, losses=losses, return_outputs=False)
        loss = torch.stack(losses).sum().detach() if losses else tickets.new_zeros(())
        dist.all_reduce(loss, group=self.group)
        self.sum_tied_gradients()
        return loss

    def schedule(self, count: int, rows: int, tokens: int) -> Any:
        """The schedule for `count` micro-batches of `rows` x `tokens`."""
        key = (count, rows, tokens)
        if key not in self.schedules:
            stages = [self.torch_stage(part, rows, tokens) for part in self.own]
            kind = get_schedule_class(self.schedule_name)
            single = stages if schedule_kind(self.schedule_name)[1].several else stages[0]
            self.schedules[key] = kind(single, count, loss_fn=lambda loss, _: loss.clone(), scale_grads=False)
        return self.schedules[key]

    def torch_stage(self, part: StageModel, rows: int, tokens: int) -> PipelineStage:
        def room(boundary: Boundary) -> tuple[Tensor, ...]:
            return tuple(tensor.requires_grad_() for tensor in boundary.room(rows, tokens, "meta"))

        ticket = torch.zeros(1, device="meta")
        return PipelineStage(
            part,
            part.stage.index,
            part.stage.count,
            self.device,
            input_args=ticket if part.stage.is_first else room(part.received),
            output_args=ticket.sum().requires_grad_() if part.stage.is_last else room(part.sent),
            group=self.group,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        max_seqlen: int | None = None,
        shard: SequenceShard | None = None,
    ) -> CausalLMOutput:
        """One micro-batch through all stages, without gradients; all ranks of the pipeline call it together.

        Arguments and result are those of `CausalLM`, except that `loss_sum` is zero where the last stage is not: the next
        micro-batch can start before this one is through.
        """
        work = Work(input_ids, labels, cu_seqlens, max_seqlen, cache=cache, shard=shard)
        outputs: Any = ()
        for part in self.own:
            received = outputs if self.is_here(part.stage.index - 1) else self.receive(part, input_ids)
            part.work = iter([work])
            outputs = part(*received)
            if not part.stage.is_last and not self.is_here(part.stage.index + 1):
                self.send(part, outputs)
        if cache is not None:
            cache.seen += input_ids.shape[1]
        is_end = self.own[-1].stage.is_last
        if labels is not None:
            loss_sum = outputs if is_end else torch.zeros((), device=input_ids.device)
            return CausalLMOutput(loss_sum=loss_sum, cache=cache)
        if not is_end:
            dtype = outputs[0].dtype
            outputs = torch.empty(*input_ids.shape, self.config.vocab_size, dtype=dtype, device=input_ids.device)
        dist.broadcast(outputs, self.global_rank(len(self.stages) - 1), group=self.group)
        return CausalLMOutput(logits=outputs, cache=cache)

    def is_here(self, index: int) -> bool:
        return any(part.stage.index == index for part in self.own)

    def global_rank(self, index: int) -> int:
        """The rank, in the world, of stage `index`."""
        return dist.get_global_rank(self.group, self.stages[index].rank)

    def receive(self, part: StageModel, ids: Tensor) -> tuple[Tensor, ...]:
        room = part.received.room(ids.shape[0], ids.shape[1], ids.device)
        for tensor in room:
            dist.recv(tensor, self.global_rank(part.stage.index - 1), group=self.group)
        return room

    def send(self, part: StageModel, outputs: Sequence[Tensor]) -> None:
        for work, _ in self.sending:
            work.wait()
        peer = self.global_rank(part.stage.index + 1)
        works = [(dist.isend(tensor, peer, group=self.group), tensor) for tensor in outputs]
        self.sending = [(work, tensor) for work, tensor in works if work is not None]

    def copies(self) -> dict[str, nn.Parameter]:
        """Parameters of this rank that an earlier rank has too: a tied embedding, at the last stage."""
        last = self.own[-1]
        if not (self.config.tie_word_embeddings and last.stage.is_last):
            return {}
        return {f"{self.backbone_name}.embeddings.weight": stored_embedding(last)}

    def sum_tied_gradients(self) -> None:
        """Give both copies of a tied embedding the sum of their gradients; they then stay equal."""
        last = len(self.stages) - 1
        if not self.config.tie_word_embeddings or last == 0:
            return
        for part in self.own:
            if part.stage.is_first or part.stage.is_last:
                gradient = local(stored_embedding(part).grad)
                other, peer = torch.empty_like(gradient), self.global_rank(last - part.stage.index)
                operations = [(dist.isend, gradient), (dist.irecv, other)]
                exchange = [dist.P2POp(operation, tensor, peer, self.group) for operation, tensor in operations]
                for work in dist.batch_isend_irecv(exchange):
                    work.wait()
                gradient.add_(other)

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Two-norm over the gradients of all stages, the same on all ranks."""
        counted_elsewhere = {id(parameter.grad) for parameter in self.copies().values()}
        norm = global_grad_norm(gradient for gradient in gradients if id(gradient) not in counted_elsewhere)
        return self.total(norm.square()).sqrt()

    def total(self, value: Tensor) -> Tensor:
        """Sum over the stages."""
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the whole model on rank 0 of the world, of its own stages elsewhere.

        All ranks must go through it together.
        """
        copies, rank = self.copies(), dist.get_rank(self.group)
        own = {name: weight for name, weight in named_weights(self).items() if name not in copies}
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, [(name, w.shape, w.dtype) for name, w in own.items()], group=self.group)
        first, is_collected = dist.get_global_rank(self.group, 0), dist.get_global_rank(self.group, 0) == 0
        for owner, entries in enumerate(everyone):
            for name, shape, dtype in entries:
                if owner == rank:
                    weight = own[name]
                    full = weight.full_tensor() if isinstance(weight, DTensor) else weight
                    if rank and is_collected:
                        dist.send(full.contiguous(), first, group=self.group)
                    yield name, full
                elif rank == 0 and is_collected:
                    full = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(full, dist.get_global_rank(self.group, owner), group=self.group)
                    yield name, full


def stored_embedding(part: StageModel) -> Any:
    """The parameter itself; tensor-parallel modules hand out their rank's part of it under its name."""
    return part.decoder.embeddings._parameters["weight"]


def boundaries_of_job(config: ModelConfig, job: JobConfig, mesh: Mesh, starts: list[int]) -> list[Boundary]:
    """What travels into the layers `starts`, on a tensor-parallel rank where the job has such."""
    with torch.device("meta"):
        model = build_model(config)
    model.to(parse_dtype(job.training.mixed_precision_param, "training.mixed_precision_param"))
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model, mesh.axis("tp"), deals_rows=False)
    return find_boundaries(model, starts, 64 * mesh.degrees.tp)


def build_pipeline(config: ModelConfig, job: JobConfig, mesh: Mesh, device: torch.device) -> Pipeline:
    """This rank's stages of the model, laid out over the mesh, with their initial weights.

    Raises:
        ConfigError: the model, the schedule and the number of ranks do not fit together; nothing is allocated then.
    """
    name, _ = schedule_kind(job.parallelism.pipeline_parallel_schedule)
    with torch.device("meta"):
        whole = build_model(config)
    count = global_batch_size(job, mesh.data_size) // (microbatch_rows(job) * mesh.data_size)
    stages = stages_of_job(whole, job, mesh.degrees.pp, count)
    starts = [stage.first for stage in stages[1:]]
    boundaries = [Boundary(), *boundaries_of_job(config, job, mesh, starts), Boundary()]
    parts = []
    for stage in stages:
        if stage.rank == mesh.rank("pp"):
            with torch.device("meta"):
                part = StageModel(config, stage, boundaries[stage.index], boundaries[stage.index + 1])
            parallelize(part, job, mesh, device)
            materialize(part, job, device)
            parts.append(part)
    return Pipeline(whole, stages, parts, mesh.group("pp"), name, device)
