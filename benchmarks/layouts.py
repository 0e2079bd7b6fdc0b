"""Layouts of a job on real GPUs: tokens a second and peak memory, link speeds, and equality of gradients.

    python -m benchmarks.layouts steps train_configs/gla_1.3B.toml --shape 1x131072 --layout one
    torchrun --standalone --nproc_per_node 2 -m benchmarks.layouts steps train_configs/gla_1.3B.toml \
        --shape 1x131072 --layout dp cp tp pp
    torchrun --standalone --nproc_per_node 2 -m benchmarks.layouts check
    torchrun --standalone --nproc_per_node 2 -m benchmarks.layouts links

`steps --plan` prints what `flame plan` expects of the same jobs, without a GPU. `--rehearse RANK` compiles all that a rank
of two would, alone on one GPU, with exchanges that move nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.training import describe, load, profile_step
from flame.config import JobConfig, model_values
from flame.data.batch import Batch
from flame.data.build import microbatch_rows
from flame.models.registry import resolve_config
from flame.optim.build import build_optimizer
from flame.parallel.distributed import choose_device
from flame.parallel.mesh import CONFIG_KEYS, Mesh, build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.parallel.pipeline import build_pipeline
from flame.plan import make_plan
from flame.plan.activations import Exchanges
from flame.step import FiniteGuard, StepOptions, StepResult, TrainStep

LAYOUTS = ("one", "dp", "tp", "cp", "pp")
PIPELINED = 8  # micro-batches of a pipeline
WARM = 2


@dataclass
class Figures:
    """Of one layout on one job; memory in GiB above what the process held before."""

    job: str
    shape: str
    layout: str
    seconds: float
    tokens_per_s: float
    allocated_gib: float
    reserved_gib: float
    loss: float


def job_of(path: str, shape: str, layout: str, ranks: int, overrides: list[str]) -> JobConfig:
    """The job with a step of `shape` (rows x length) spread over `ranks`."""
    rows, length = (int(part) for part in shape.split("x"))
    values = {"training.seq_len": length, "training.varlen": False, "training.local_batch_size": rows}
    if layout == "dp":
        values["training.local_batch_size"] = rows // ranks
    elif layout != "one":
        values[f"parallelism.{CONFIG_KEYS[layout]}"] = ranks
    if layout == "pp":
        values["parallelism.pipeline_parallel_microbatch_size"] = max(1, rows // PIPELINED)
    flags = [f"--{name}={str(value).lower()}" for name, value in values.items()]
    return load(path, [*flags, *overrides])


class Run:
    """A job's model on the ranks that there are, its step, and a batch of random tokens."""

    def __init__(self, job: JobConfig, values: dict[str, Any] | None = None) -> None:
        self.device = device_of_rank()
        self.job, self.mesh = job, build_mesh(degrees_of(job), self.device.type, dist.get_world_size())
        build: Callable[..., Any] = build_pipeline if self.mesh.degrees.pp > 1 else build_sharded_model
        self.config = resolve_config(model_values(job) if values is None else values)
        self.model = build(self.config, job, self.mesh, self.device)
        options = StepOptions(job.training.max_norm)
        guard = FiniteGuard("skip", self.device)
        self.step = TrainStep(self.model, build_optimizer(job, self.model), guard, self.mesh.loss_group, options)
        self.count = 0

    def __call__(self, batches: list[Batch]) -> StepResult:
        self.count += 1
        return self.step(batches, self.count)

    def batches(self, rows: int) -> list[Batch]:
        """This rank's micro-batches of a step of `rows` random rows, the same for every layout."""
        length, each = self.job.training.seq_len, microbatch_rows(self.job)
        tokens = torch.randint(
            self.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(length)
        )
        own = tokens.chunk(self.mesh.data_size)[self.mesh.data_rank]
        found = [
            Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), max_seqlen=length) for part in own.split(each)
        ]
        return place(found, self.mesh, self.device)


def place(batches: list[Batch], mesh: Mesh, device: torch.device) -> list[Batch]:
    """Batches on the device, each cut into context-parallel parts if there are such."""
    if mesh.degrees.cp > 1:
        batches = [batch.part(mesh.group("cp")) for batch in batches]
    return [batch.to(device) for batch in batches]


def measure(path: str, shape: str, layout: str, overrides: list[str], steps: int, profiled: str | None) -> Figures:
    """Seconds of whole optimizer steps, and their peak memory on the rank that needs most."""
    clean()
    before = torch.cuda.memory_allocated()
    rows, length = (int(part) for part in shape.split("x"))
    run = Run(job_of(path, shape, layout, dist.get_world_size(), overrides))
    batches = run.batches(rows)
    for _ in range(WARM):
        run(batches)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        result = run(batches)
    torch.cuda.synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - began) / steps
    peaks = torch.tensor(
        [torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()],
        device=run.device,
        dtype=torch.float64,
    )
    peaks /= 2**30
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    if profiled:
        text = describe(profile_step(lambda _: run(batches).loss, None))  # type: ignore[arg-type]
        with open(f"{profiled}_{os.path.basename(path)}_{layout}_{dist.get_rank()}.txt", "w") as file:
            file.write(text)
    name = os.path.basename(path).removesuffix(".toml")
    allocated, reserved = peaks.tolist()
    return Figures(name, shape, layout, seconds, rows * length / seconds, allocated, reserved, result.loss.item())


def rehearse(path: str, shape: str, layout: str, overrides: list[str]) -> None:
    """Compile the forward and the backward of one layer as this rank would."""
    clean()
    run = Run(job_of(path, shape, layout, dist.get_world_size(), [*overrides, "--model.num_hidden_layers=1"]))
    batches = run.batches(int(shape.split("x")[0]))
    run.step.accumulate(batches, run.step.count_tokens(batches))
    torch.cuda.synchronize()


def clean() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def planned(path: str, shape: str, layout: str, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Peak memory in GiB and seconds that `flame plan` expects."""
    ranks = 1 if layout == "one" else ranks
    plan = make_plan(job_of(path, shape, layout, ranks, overrides), ranks)
    traffic = {f"{entry.axis}: {entry.what}": [entry.exchanges, entry.sent] for entry in plan.traffic}
    name = os.path.basename(path).removesuffix(".toml")
    return {"job": name, "shape": shape, "layout": layout, "gib": max(plan.memory_by_rank) / 2**30, "traffic": traffic}


def exchanged(path: str, lengths: list[int], overrides: list[str]) -> dict[int, tuple[float, int]]:
    """Bytes that a rank of a context-parallel pair sends for a layer in a step, and in how many exchanges, by length.

    The step is not compiled, has one layer, and recomputes nothing.
    """
    found = {}
    eager = ["--compile.enable=false", "--activation_checkpoint.mode=none", "--model.num_hidden_layers=1"]
    for length in lengths:
        clean()
        run = Run(job_of(path, f"1x{length}", "cp", dist.get_world_size(), [*overrides, *eager]))
        batches = run.batches(1)
        with Exchanges() as exchanges:
            run.step.accumulate(batches, run.step.count_tokens(batches))
        found[length] = (sum(exchanges.sent.values()), sum(exchanges.count.values()))
    return found


SMALL: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 4096, "intermediate_size": 1024}
CHECKED: dict[str, dict[str, Any]] = {
    "gla": {**SMALL, "num_heads": 4},
    "transformer": {**SMALL, "num_heads": 8, "num_kv_heads": 4},
    "gated_deltanet": {**SMALL, "num_heads": 4, "head_dim": 64},
    "mamba2": {**SMALL, "head_dim": 64, "state_size": 64, "intermediate_size": None},
    "rwkv7": {**SMALL, "head_dim": 64},
}
TOKENS, STARTS = 1024, ((0, 300, 301, 900), (0, 450, 512))


def packed_rows(mesh: Mesh, device: torch.device) -> list[Batch]:
    """Two packed rows, this rank's of them."""
    rows = []
    for seed, starts in enumerate(STARTS):
        tokens = torch.randint(SMALL["vocab_size"], (1, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
        bounds = torch.tensor([*starts, TOKENS], dtype=torch.int32)
        rows.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), bounds, TOKENS))
    return place(rows[mesh.data_rank :: mesh.data_size], mesh, device)


def small_job(layout: str, ranks: int, dtype: str) -> JobConfig:
    job = JobConfig()
    job.training.seq_len, job.training.global_batch_size, job.training.local_batch_size = TOKENS, len(STARTS), 1
    job.compile.enable = False
    job.training.mixed_precision_param = dtype  # type: ignore[assignment]
    if layout not in ("one", "dp"):
        setattr(job.parallelism, CONFIG_KEYS[layout], ranks)
    return job


def gradients(name: str, layout: str, dtype: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step on two packed rows; of this rank's layers in a pipeline."""
    run = Run(small_job(layout, dist.get_world_size(), dtype), {"model_type": name, **CHECKED[name]})
    found: dict[str, Tensor] = {}
    update = run.step.optimizer.step

    def capture(apply: Tensor) -> Tensor:
        for key, parameter in run.model.named_parameters():
            if isinstance(parameter.grad, DTensor):
                found[key] = parameter.grad.full_tensor().float()
        return update(apply)

    run.step.optimizer.step = capture  # type: ignore[method-assign]
    result = run(packed_rows(run.mesh, run.device))
    return result.loss.item(), found


def check(names: list[str], dtypes: list[str], layouts: list[str]) -> None:
    """How far gradients of layouts are from those of data-parallel ranks, and in bf16 those from fp32's."""
    for name in names:
        exact: dict[str, Tensor] = {}
        for dtype in dtypes:
            os.environ["FLAME_BACKEND"] = "chunked" if dtype == "float32" else "auto"
            clean()
            expected_loss, expected = gradients(name, "dp", dtype)
            exact = exact or expected
            if exact is not expected:
                say(f"check {name:16}{dtype:10}dp against float32: {distances(expected, exact)}")
            for layout in layouts:
                loss, found = gradients(name, layout, dtype)
                losses = f"loss {loss:.6f}, of dp {expected_loss:.6f}"
                say(f"check {name:16}{dtype:10}{layout:4}{losses}, {distances(found, expected)}")


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Two-norms of differences relative to a parameter's gradient, of the rank that differs most."""
    pairs = {key: (gradient, expected[key]) for key, gradient in found.items()}
    errors = {key: ((own - other).norm() / other.norm().clamp(min=1e-12)) for key, (own, other) in pairs.items()}
    worst = max(errors, key=lambda key: errors[key].item())
    figures = torch.stack([errors[worst], torch.stack([*errors.values()]).mean()])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return f"worst gradient {figures[0].item():.1e} mean {figures[1].item():.1e} ({worst})"


COLLECTIVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_gather": lambda whole, part: dist.all_gather_into_tensor(whole, part),
    "reduce_scatter": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
    "all_to_all": lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole),
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
}


def links(mebibytes: tuple[int, ...] = (1, 8, 32, 128, 512), repeats: int = 10) -> None:
    """Bytes a second that a rank sends in collectives on `mebibytes` of all ranks together."""
    ranks = dist.get_world_size()
    for name, collective in COLLECTIVES.items():
        for size in mebibytes:
            whole = torch.zeros(size << 19, dtype=torch.bfloat16, device="cuda")
            part = whole.chunk(ranks)[0].clone()
            for _ in range(3):
                collective(whole, part)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            start.record()
            for _ in range(repeats):
                collective(whole, part)
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) / 1e3 / repeats
            sent = (size << 20) * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
            say(f"links {name:16}{size:5} MiB {seconds * 1e6:9.1f} us {sent / seconds / 1e9:8.1f} GB/s sent by a rank")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def device_of_rank() -> torch.device:
    """A GPU, except for `check`, which runs on CPUs too."""
    return choose_device(int(os.environ.get("LOCAL_RANK", 0)))


def start(rehearsed: int | None) -> None:
    device = device_of_rank()
    if rehearsed is not None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rehearsed, world_size=2)
    elif device.type == "cpu":
        dist.init_process_group("gloo")
    elif "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "check", "links", "bytes"))
    parser.add_argument(
        "jobs", nargs="*", help="job files; their [model], [optimizer] and [activation_checkpoint] count"
    )
    parser.add_argument("--shape", default="16x2048", help="rows x length of a step")
    parser.add_argument("--layout", nargs="+", default=["dp"], choices=LAYOUTS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--override", action="append", default=[], help="--override=--section.key=value")
    parser.add_argument("--profile", metavar="PREFIX", help="write a profile of a step of every rank")
    parser.add_argument("--plan", action="store_true", help="only say what `flame plan` expects on two ranks")
    parser.add_argument("--rehearse", type=int, metavar="RANK", help="only compile what this rank of two would")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.plan:
        for path in args.jobs:
            for layout in args.layout:
                print(json.dumps(planned(path, args.shape, layout, 2, args.override)))
        return
    start(args.rehearse)
    if args.what == "links":
        links()
    elif args.what == "check":
        check([*CHECKED], ["float32", "bfloat16"], ["dp", "tp", "cp", "pp"])
    for path in args.jobs:
        if args.what == "bytes":
            for length, (sent, count) in exchanged(path, [1 << 14, 1 << 17], args.override).items():
                say(f"{path} {length} tokens: {sent / 2**20:.3f} MiB sent for a layer in {count} exchanges")
            continue
        for layout in args.layout:
            if args.rehearse is not None:
                rehearse(path, args.shape, layout, args.override)
            else:
                say(json.dumps(asdict(measure(path, args.shape, layout, args.override, args.steps, args.profile))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
