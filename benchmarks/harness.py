"""Measure several implementations of one op side by side, so that a ratio means what it says.

All run in one process on one machine, interleaved round by round, on fresh random inputs; a cell is timed only after its
output and gradients agree with the fp64 reference. Two clocks: replay of a captured graph (the GPU's time) and eager calls
(with what the host costs). The first call of each implementation is timed apart, since it compiles and tunes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Benchmark:
    """One cell: an op at one shape.

    inputs: (device, seed, small) -> tensors. `small` is the same problem with fewer tokens, few enough for the fp64 reference;
        heads stay, because peers compile and tune for each number of them.
    implementations: name -> a function that imports the peer and returns its call; ImportError means not installed.
    reference: takes the inputs in fp64.
    constant: floating inputs without gradient.
    bytes_moved: what forward and backward must read and write, for the roofline.
    flops: operations of forward and backward.
    """

    op: str
    name: str
    inputs: Callable[[torch.device, int, bool], Tensors]
    implementations: Mapping[str, Callable[[], Call]]
    reference: Call
    constant: tuple[str, ...] = ()
    bytes_moved: float = 0.0
    flops: float = 0.0


@dataclass
class Cell:
    """What one implementation did in one benchmark. Times in milliseconds, medians over rounds with their range."""

    op: str
    name: str
    implementation: str
    status: str = "ok"
    first_call_s: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    graph_forward_ms: list[float] = field(default_factory=list)
    graph_both_ms: list[float] = field(default_factory=list)
    eager_forward_ms: list[float] = field(default_factory=list)
    eager_both_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    terabytes_per_s: float = 0.0
    teraflops: float = 0.0
    kernels_us: dict[str, float] = field(default_factory=dict)

    def median(self, clock: str) -> float:
        times = getattr(self, clock)
        return statistics.median(times) if times else float("nan")

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def differentiate(benchmark: Benchmark, call: Call, inputs: Tensors, cotangent: Tensor | None) -> Tensors:
    """Output and gradients by name (``d<input>``)."""
    leaves = {name: x.detach().clone() for name, x in inputs.items()}
    wanted = [name for name, x in leaves.items() if x.is_floating_point() and name not in benchmark.constant]
    for name in wanted:
        leaves[name].requires_grad_()
    out = call(leaves)
    cotangent = torch.randn_like(out) if cotangent is None else cotangent.to(out)
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], cotangent)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(wanted, gradients)}}


def gradient_errors(benchmark: Benchmark, call: Call, device: torch.device) -> dict[str, float]:
    """Relative error of output and gradients against fp64, at the small size."""
    inputs = benchmark.inputs(device, 1, True)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        shape = benchmark.reference(exact)
    cotangent = torch.randn_like(shape).to(next(iter(inputs.values())).dtype)
    want = differentiate(benchmark, benchmark.reference, exact, cotangent.double())
    got = differentiate(benchmark, call, inputs, cotangent)
    errors = {}
    for name, x in want.items():
        error = (got[name].double() - x).norm() / x.norm().clamp(min=1e-12)
        errors[name] = float(error) if bool(torch.isfinite(error)) else float("inf")
    return errors


class Runner:
    """One implementation with static inputs: eager calls, and captured graphs of them."""

    def __init__(self, benchmark: Benchmark, call: Call, device: torch.device) -> None:
        self.benchmark, self.call, self.device = benchmark, call, device
        self.inputs = benchmark.inputs(device, 0, False)
        self.leaves = [
            x.requires_grad_()
            for name, x in self.inputs.items()
            if x.is_floating_point() and name not in benchmark.constant
        ]
        with torch.no_grad():
            self.cotangent = torch.randn_like(call(self.inputs))
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def forward(self) -> None:
        with torch.no_grad():
            self.call(self.inputs)

    def both(self) -> None:
        torch.autograd.grad(self.call(self.inputs), self.leaves, self.cotangent)

    def refill(self, seed: int) -> None:
        """Fresh random values in the same memory, which the graphs read."""
        with torch.no_grad():
            for name, x in self.benchmark.inputs(self.device, seed, False).items():
                self.inputs[name].copy_(x)

    def peak_mib(self) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.both()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kernels_us(self, repeats: int = 5) -> dict[str, float]:
        """GPU time of each kernel of forward and backward, by name, in microseconds."""
        from torch.profiler import ProfilerActivity, profile

        self.both()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(repeats):
                self.both()
            torch.cuda.synchronize()
        times = {event.key: event.device_time_total / repeats for event in record.key_averages()}
        return dict(sorted(((name, us) for name, us in times.items() if us > 0), key=lambda item: -item[1]))

    def capture(self, kind: str) -> None:
        """Graph of `forward` or `both`. Allocations inside are the graph's own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                getattr(self, kind)()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            getattr(self, kind)()
        self.graphs[kind] = graph


def milliseconds(function: Callable[[], object], repeat_ms: int) -> float:
    import triton

    return float(triton.testing.do_bench(function, warmup=20, rep=repeat_ms, return_mode="median"))


def tolerance(errors: Mapping[str, Mapping[str, float]], name: str, own: str) -> float:
    """5e-3, or one and a half times the best peer's error of the same tensor."""
    peers = [each[name] for peer, each in errors.items() if peer != own and name in each]
    return max([5e-3, *([1.5 * min(peers)] if peers else [])])


def prepare(
    benchmark: Benchmark, device: torch.device, report: Callable[[list[Cell]], None]
) -> tuple[list[Cell], dict[str, Runner]]:
    """First calls and gradient checks, each reported when done; runners of the implementations that may be timed."""
    cells, calls = {}, {}
    for name, load in benchmark.implementations.items():
        cell = cells[name] = Cell(benchmark.op, benchmark.name, name)
        try:
            calls[name] = load()
            start = time.perf_counter()
            differentiate(benchmark, calls[name], benchmark.inputs(device, 0, False), None)
            torch.cuda.synchronize()
            cell.first_call_s = time.perf_counter() - start
            cell.errors = gradient_errors(benchmark, calls[name], device)
        except ImportError as error:
            cell.status = f"not installed: {error}"
        except Exception as error:  # a peer may fail in any way; the others are still measured
            cell.status = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        worst = max(cell.errors.values(), default=float("nan"))
        print(f"{benchmark.name}, {name}: first call {cell.first_call_s:.1f} s, {cell.status}, {worst:.1e}", flush=True)
        report(list(cells.values()))
    errors = {name: cell.errors for name, cell in cells.items() if cell.errors}
    runners = {}
    for name, cell in cells.items():
        wrong = [f"{t} {e:.1e}" for t, e in cell.errors.items() if not e <= tolerance(errors, t, name)]
        if wrong:
            cell.status = "wrong: " + ", ".join(wrong)
        elif cell.status == "ok":
            runners[name] = Runner(benchmark, calls[name], device)
    return list(cells.values()), runners


def measure(
    benchmark: Benchmark,
    device: torch.device,
    rounds: int,
    repeat_ms: int,
    profiled: str = "",
    report: Callable[[list[Cell]], None] = lambda cells: None,
) -> list[Cell]:
    """All cells of one benchmark, implementations interleaved within each round; `profiled` names one to split in kernels.

    `report` is called with the cells as they stand after every first call and every round.
    """
    cells, runners = prepare(benchmark, device, report)
    by_name = {cell.implementation: cell for cell in cells}
    for name, runner in runners.items():
        by_name[name].peak_mib = runner.peak_mib()
        for kind in ("forward", "both"):
            try:
                runner.capture(kind)
            except Exception as error:  # an op that synchronises cannot be captured; eager still counts
                torch.cuda.synchronize()
                by_name[name].status = f"ok, no graph: {type(error).__name__}"
    for seed in range(2, 2 + rounds):
        for name, runner in runners.items():
            runner.refill(seed)
            cell = by_name[name]
            for kind in ("forward", "both"):
                getattr(cell, f"eager_{kind}_ms").append(milliseconds(getattr(runner, kind), repeat_ms))
                if kind in runner.graphs:
                    getattr(cell, f"graph_{kind}_ms").append(milliseconds(runner.graphs[kind].replay, repeat_ms))
        for cell in cells:
            summarize(benchmark, cell)
        report(cells)
    if profiled in runners:
        by_name[profiled].kernels_us = runners[profiled].kernels_us()
    return cells


def summarize(benchmark: Benchmark, cell: Cell) -> None:
    best = cell.median("graph_both_ms") if cell.graph_both_ms else cell.median("eager_both_ms")
    cell.terabytes_per_s = benchmark.bytes_moved / best / 1e9
    cell.teraflops = benchmark.flops / best / 1e9
