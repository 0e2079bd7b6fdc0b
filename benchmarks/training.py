"""Tokens a second of whole optimizer steps: our trainer and peers' loops on one GPU, the same batch, interleaved.

    python -m benchmarks.training train_configs/gla_340M.toml train_configs/transformer_340M.toml \
        --loops flame fla torch --shape 8x4096 --shape packed:65536 --out outputs/training

writes training.json and training.md. `--profile` adds a profile of one step of each loop (where the GPU's time goes and
how much of the step it is busy); `--first-step` measures from the start of a fresh process to the end of its first step,
with empty compiler caches and again with warm ones.

Peers that autotune take minutes for it. `--compile-share I/N` takes one step of each loop and compiles one in N of their
configurations, for N processes at once; the measuring run with the same `--caches` then times what they compiled. With
`--precompiled`, the configurations come from `benchmarks.precompile`, made without a GPU: `--compile-share 0/1` then loads each
once, and the measuring run times them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import machine
from benchmarks.loops import PackedBatch, Step, build
from benchmarks.pretuned import compile_share, share_compiled, tune_recorded
from flame.config import JobConfig, load_job, model_values
from flame.metrics.throughput import peak_flops
from flame.models.decoder import build_model

STARTED = "FLAME_BENCHMARK_STARTED"  # wall-clock time at which the parent began a child
LONGEST = 4096  # of packed documents
STEADY = 4  # first steps compile, tune and settle the allocator


@dataclass
class Cell:
    """One loop on one job and shape. Tokens a second are medians over rounds; memory is the peak in GiB."""

    job: str
    shape: str
    loop: str
    status: str = "ok"
    loss: float = 0.0
    rates: list[float] = field(default_factory=list)
    memory_gib: float = 0.0
    first_step_s: float = 0.0
    mfu: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates) if self.rates else float("nan")


def make_batch(shape: str, vocabulary: int, seed: int, device: str = "cuda") -> PackedBatch:
    """Random tokens: ``8x4096`` is rows x length, ``packed:65536`` one row of documents of 16 to 4096 tokens."""
    generator = torch.Generator().manual_seed(seed)
    if shape.startswith("packed:"):
        total = int(shape.removeprefix("packed:"))
        starts, length = [0], (1, total)
        while starts[-1] < total:
            document = int(torch.randint(16, LONGEST + 1, (), generator=generator))
            starts.append(min(starts[-1] + document, total))
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    else:
        rows, columns = (int(part) for part in shape.split("x"))
        length, cu_seqlens = (rows, columns), None
    tokens = torch.randint(vocabulary, length, generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    if cu_seqlens is not None:
        labels[0, cu_seqlens[1:].long() - 1] = -100
    longest = length[1] if cu_seqlens is None else LONGEST
    starts_there = None if cu_seqlens is None else cu_seqlens.to(device)
    return PackedBatch(tokens.to(device), labels.to(device), starts_there, longest)


def load(path: str, overrides: list[str]) -> JobConfig:
    """The job without what only data needs."""
    return load_job(path, ["--training.global_batch_size", "-1", "--checkpoint.enable", "false", *overrides])


def flops_per_token(job: JobConfig, batch: PackedBatch) -> float:
    """Forward and backward operations a token, documents weighted by their tokens."""
    lengths = [batch.input_ids.shape[1]] if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    with torch.device("meta"):
        model = build_model(model_values(job))
    return sum(length * model.flops_per_token(length) for length in lengths) / sum(lengths)


class Entrant:
    """A loop that has taken its first step; `settle` takes the next ones, and learns the memory that it holds and reaches."""

    def __init__(self, cell: Cell, job: JobConfig, batch: PackedBatch) -> None:
        self.cell, self.job = cell, job
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        self.step, self.module = build(cell.loop, job)
        cell.loss = float(self.step(batch))
        torch.cuda.synchronize()
        cell.first_step_s = time.perf_counter() - start
        self.held = torch.cuda.memory_allocated() - before

    def settle(self, batch: PackedBatch) -> None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()  # a step that is recorded takes its memory now, a replay takes none
        for _ in range(STEADY):
            self.step(batch)
        torch.cuda.synchronize()
        self.cell.memory_gib = (self.held + torch.cuda.max_memory_allocated() - before) / 2**30

    def round(self, batch: PackedBatch, steps: int) -> None:
        free, total = torch.cuda.mem_get_info()
        if free < total / 3:  # what the other loop left in the allocator would be freed in the middle of a step
            torch.cuda.empty_cache()
            self.step(batch)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(batch)
        torch.cuda.synchronize()
        self.cell.rates.append(steps * batch.input_ids.numel() / (time.perf_counter() - start))


def compare(path: str, shape: str, args: argparse.Namespace) -> list[Cell]:
    """All loops on one job and shape, interleaved round by round."""
    job = load(path, args.override)
    vocabulary = model_values(job)["vocab_size"]
    batch = make_batch(shape, vocabulary, 0)
    cells = [Cell(Path(path).stem, shape, loop) for loop in args.loops]
    entrants: list[Entrant] = []
    with turn(args.turns):
        for cell in cells:
            with survived(cell):
                entrants.append(Entrant(cell, job, batch))
            release()
        interleave(entrants, shape, vocabulary, args)
        profiles = profiled(entrants, args.profile, batch)
        entrants.clear()  # what they hold is the next process's
        release()
    flops, peak = flops_per_token(job, batch), peak_flops(torch.device("cuda"))
    for cell in cells:
        cell.mfu = 0.0 if peak is None else cell.tokens_per_s * flops / peak
    for loop, profiler in profiles.items():
        (args.out / f"{cells[0].job}_{shape.replace(':', '')}_{loop}.txt").write_text(describe(profiler))
    return cells


def release() -> None:
    """Give the memory of models that are gone back to the GPU; they are full of cycles."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def survived(cell: Cell) -> Iterator[None]:
    """A loop may fail in any way, a peer's above all; the others are still measured."""
    try:
        yield
    except Exception as error:
        cell.status = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


@contextlib.contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """The GPU without the other processes that were given this file."""
    if file is None:
        yield
        return
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def import_early(loops: list[str]) -> None:
    """What is imported late and slowly, before this process has its turn on the GPU."""
    importlib.import_module("torch._inductor.compile_fx")
    if any(loop.startswith("fla-") or loop == "fla" for loop in loops):
        with contextlib.suppress(ImportError):
            importlib.import_module("fla.models")


def interleave(entrants: list[Entrant], shape: str, vocabulary: int, args: argparse.Namespace) -> None:
    """Time the entrants round by round."""
    batch = make_batch(shape, vocabulary, 0)
    for entrant in entrants:
        with survived(entrant.cell):
            entrant.settle(batch)
    for seed in range(1, args.rounds + 1):
        batch = make_batch(shape, vocabulary, 0 if "packed" in shape else seed)
        for entrant in entrants:
            if entrant.cell.status == "ok":
                with survived(entrant.cell):
                    entrant.round(batch, args.steps)


def profiled(entrants: list[Entrant], loops: list[str], batch: PackedBatch) -> dict[str, profile]:
    """One step of each of these loops."""
    profiles = {}
    for entrant in entrants:
        if entrant.cell.loop in loops:
            with survived(entrant.cell):
                profiles[entrant.cell.loop] = profile_step(entrant.step, batch)
    return profiles


def profile_step(step: Step, batch: PackedBatch) -> profile:
    step(batch)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    return profiler


def describe(profiler: profile) -> str:
    """Kernels of one step by their time, and the share of the step in which the GPU ran any."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = spans[-1][1] - spans[0][0]
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    host = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=90)
    return f"step {whole / 1000:.2f} ms, GPU busy {busy / whole:.1%}, {len(spans)} kernels\n\n{table}\n\n{host}\n"


def first_steps(path: str, shape: str, loop: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds from process start to the end of the first step, with empty caches and then with what that run left."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }
        command = [sys.executable, "-m", "benchmarks.training", path, "--shape", shape, "--loops", loop, "--child"]
        command += [f"--override={each}" for each in args.override]
        seconds: dict[str, object] = {"job": Path(path).stem, "shape": shape, "loop": loop}
        for kind in ("empty", "warm"):
            environment[STARTED] = str(time.time())
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            lines = [line for line in result.stdout.splitlines() if line.startswith("first step ")]
            seconds[kind] = float(lines[-1].split()[-1]) if lines else result.stderr[-400:]
        return seconds


def child(path: str, shape: str, loop: str, overrides: list[str]) -> None:
    """One step in this process, and how long it was since the parent began it."""
    job = load(path, overrides)
    step, _ = build(loop, job)
    float(step(make_batch(shape, model_values(job)["vocab_size"], 0)))
    print(f"first step {time.time() - float(os.environ[STARTED]):.1f}", flush=True)


def record_of(path: str, args: argparse.Namespace) -> Path:
    return (args.caches or Path("outputs")) / f"{Path(path).stem}.txt"


def use_caches(path: str, args: argparse.Namespace) -> None:
    """Point the compilers at the folders of this job."""
    if args.caches:
        folder = args.caches / Path(path).stem
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


def compile_once(path: str, args: argparse.Namespace) -> None:
    """One step of every loop at every shape, so that the caches hold what it needs."""
    use_caches(path, args)
    job = load(path, args.override)
    for shape in args.shape:
        for loop in args.loops:
            try:
                step: Step | None = build(loop, job)[0]
                assert step is not None
                loss = float(step(make_batch(shape, model_values(job)["vocab_size"], 0)))
                print(f"{Path(path).stem} {shape} {loop}: loss {loss:.3f}", flush=True)
            except Exception as error:  # a peer may fail in any way; the measuring run reports it
                print(f"{Path(path).stem} {shape} {loop}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            step = None
            release()


def table(cells: list[Cell], facts: dict[str, object]) -> str:
    """Markdown; the ratio is our best loop's rate over the loop's."""
    ours: dict[tuple[str, str], float] = {}
    for cell in cells:
        if cell.loop.startswith("flame") and cell.rates:
            ours[cell.job, cell.shape] = max(cell.tokens_per_s, ours.get((cell.job, cell.shape), 0.0))
    rows = [
        f"{facts}",
        "",
        "| job | shape | loop | tokens/s | flame over it | MFU | memory GiB | first step s | first loss | status |",
        "|" + "---|" * 10,
    ]
    for cell in cells:
        ratio = ours.get((cell.job, cell.shape), float("nan")) / cell.tokens_per_s
        rows.append(
            f"| {cell.job} | {cell.shape} | {cell.loop} | {cell.tokens_per_s:,.0f} | {ratio:.2f} | {cell.mfu:.1%} "
            f"| {cell.memory_gib:.1f} | {cell.first_step_s:.0f} | {cell.loss:.3f} | {cell.status} |"
        )
    return "\n".join(rows) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help="job files; their [model] and [optimizer] are used")
    parser.add_argument("--loops", nargs="+", default=["flame", "fla"])
    parser.add_argument("--shape", action="append", default=[], help="8x4096 or packed:65536, may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--out", type=Path, default=Path("outputs/training"))
    parser.add_argument("--override", action="append", default=[], help="--override=--section.key=value for our job")
    parser.add_argument("--profile", nargs="*", default=[], help="loops to profile")
    parser.add_argument("--caches", type=Path, help="keep each job's compiler caches in a folder of its own under this")
    parser.add_argument("--compile-share", metavar="I/N", help="only compile a share of what peers tune")
    parser.add_argument("--precompiled", action="store_true", help="use what benchmarks.precompile left in --caches")
    parser.add_argument("--turns", type=Path, help="file by which several of these take turns on the GPU")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or ["8x4096", "packed:65536"]
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # tuned on this GPU, alone
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.training needs a GPU.")
    torch.cuda.set_device(0)
    if args.precompiled:
        share_compiled()
    import_early(args.loops)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    if args.child:
        use_caches(args.jobs[0], args)
        child(args.jobs[0], args.shape[0], args.loops[0], args.override)
        return
    if args.compile_share:
        index, count = map(int, args.compile_share.split("/"))
        for path in args.jobs:
            if args.precompiled:
                tune_recorded(record_of(path, args), timed=False)
            else:
                compile_share(index, count, record_of(path, args))
            compile_once(path, args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    facts, cells, starts = machine(torch.device("cuda")), [], []
    for path in args.jobs:
        use_caches(path, args)
        if args.caches:
            tune_recorded(record_of(path, args))
        for shape in args.shape:
            cells += compare(path, shape, args)
            torch._dynamo.reset()
            release()
            if args.first_step:
                starts += [first_steps(path, shape, loop, args) for loop in args.loops]
            result = {"machine": facts, "cells": [asdict(cell) for cell in cells], "first_steps": starts}
            (args.out / "training.json").write_text(json.dumps(result, indent=1))
            (args.out / "training.md").write_text(table(cells, facts) + "\n" + json.dumps(starts, indent=1) + "\n")
            print(table(cells[-len(args.loops) :], {}), starts[-len(args.loops) :], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
