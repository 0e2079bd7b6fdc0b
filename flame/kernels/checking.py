"""Cases by which an op is checked and tuned on the machine it runs on; `flame doctor` and the benchmarks use them.

An op plugs in by a module ``flame/kernels/<op>/cases.py`` with a function ``cases() -> list[Case]``. Nothing registers at
import; `all_cases` finds the modules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

import flame.kernels
from flame.kernels.tiles import Tile, using

Tensors = dict[str, Tensor]
RAGGED = (0, 1, 64, 64, 127, 640, 1300)  # bounds of packed documents: one token, odd, none, a chunk, long
DTYPE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    """One configuration of an op, with random inputs and what they must give.

    op: table name, equal to the folder's. name: unique within the op.
    inputs: (device, seed) -> tensors in the dtypes the op is used with. Floating tensors get gradients unless named in
        `constant`; integer ones never do.
    run: (inputs, backend) -> named outputs. backend None is the op's own choice; "reference" must take fp64 inputs.
    tolerance: largest ||x - x_ref|| / ||x_ref|| over outputs and gradients; None takes the dtype's.
    keys: tile keys (see `flame.kernels.tiles`) that the case launches, each with the tiles worth trying.
    tune: a production shape, to be timed rather than checked.
    """

    op: str
    name: str
    inputs: Callable[[torch.device, int], Tensors]
    run: Callable[[Tensors, str | None], Tensors]
    tolerance: float | None = None
    constant: tuple[str, ...] = ()
    keys: Mapping[str, Sequence[Tile]] = field(default_factory=dict)
    tune: bool = False


@dataclass(frozen=True)
class Verdict:
    """Relative error of every output and gradient (named ``d<input>``) of a case."""

    errors: dict[str, float]
    tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        # max() passes NaN over; a NaN must be the worst.
        name = max(self.errors, key=lambda key: (self.errors[key] != self.errors[key], self.errors[key]))
        return name, self.errors[name]

    @property
    def ok(self) -> bool:
        return self.worst[1] <= self.tolerance


def all_cases(ops: Sequence[str] = ()) -> Iterator[Case]:
    """Cases of every op that has any, or of `ops` only."""
    for module in pkgutil.iter_modules(flame.kernels.__path__):
        name = f"flame.kernels.{module.name}.cases"
        if not module.ispkg or (ops and module.name not in ops):
            continue
        try:
            cases = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        yield from cases.cases()


def scan_shapes(widths: Sequence[int]) -> list[tuple[int, tuple[int, ...], int, torch.dtype, bool]]:
    """(batch, bounds of documents, channels, dtype, strong decay) by which every scan over time is checked."""
    bf16 = torch.bfloat16
    shapes: list[tuple[int, tuple[int, ...], int, torch.dtype, bool]]
    shapes = [(2, (0, tokens), widths[0], bf16, False) for tokens in (1, 63, 64, 65, 4096 + 7)]
    shapes += [(2, (0, 500), width, bf16, strong) for width in widths[1:] for strong in (False, True)]
    shapes += [(1, RAGGED, widths[1], bf16, False), (1, RAGGED, widths[1], torch.float32, False)]
    return [*shapes, (2, (0, 300), widths[1], torch.float32, True), (2, (0, 300), widths[1], torch.float16, False)]


def evaluate(case: Case, inputs: Tensors, backend: str | None, cotangents: Tensors | None = None) -> Tensors:
    """Outputs and gradients of a case; cotangents are drawn from a fixed seed when not given."""
    leaves = {name: x.detach().clone() for name, x in inputs.items()}
    wanted = [name for name, x in leaves.items() if x.is_floating_point() and name not in case.constant]
    for name in wanted:
        leaves[name].requires_grad_()
    outputs = case.run(leaves, backend)
    cotangents = draw_cotangents(outputs) if cotangents is None else cotangents
    pairs = [(outputs[name], cotangents[name].to(outputs[name])) for name in outputs if outputs[name].requires_grad]
    gradients: Sequence[Tensor] = ()
    if pairs and wanted:
        gradients = torch.autograd.grad([y for y, _ in pairs], [leaves[n] for n in wanted], [g for _, g in pairs])
    results = {name: y.detach() for name, y in outputs.items()}
    return results | {f"d{name}": g for name, g in zip(wanted, gradients)}


def draw_cotangents(outputs: Tensors) -> Tensors:
    """fp64 normal tensors shaped as the outputs, the same whenever they are drawn on one device."""
    device = next(iter(outputs.values())).device
    generator = torch.Generator(device).manual_seed(11)
    return {
        name: torch.randn(y.shape, generator=generator, dtype=torch.float64, device=device)
        for name, y in outputs.items()
    }


def relative_errors(got: Tensors, expected: Tensors) -> dict[str, float]:
    """||got - expected|| / ||expected|| by name; infinite where a value is not finite or missing."""
    errors = {}
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape or not bool(torch.isfinite(have).all()):
            errors[name] = float("inf")
            continue
        scale = want.double().norm().clamp(min=1e-12)
        errors[name] = float((have.double() - want.double()).norm() / scale)
    return errors


def check(case: Case, device: torch.device, *, seed: int = 0, backend: str | None = None) -> Verdict:
    """Compare a case with the fp64 reference. Rounds the cotangents to the output's dtype for both sides."""
    inputs = case.inputs(device, seed)
    floating = [x.dtype for x in inputs.values() if x.dtype in DTYPE_TOLERANCE]
    tolerance = case.tolerance or max((DTYPE_TOLERANCE[dtype] for dtype in floating), default=1e-4)
    with torch.no_grad():
        outputs = case.run(inputs, backend)
    cotangents = {name: g.to(outputs[name]).double() for name, g in draw_cotangents(outputs).items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with _poisoned(device):
        got = evaluate(case, inputs, backend, cotangents)
    return Verdict(relative_errors(got, evaluate(case, exact, "reference", cotangents)), tolerance)


@contextmanager
def _poisoned(device: torch.device) -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@lru_cache(maxsize=1)
def named_cases() -> dict[tuple[str, str], Case]:
    return {(case.op, case.name): case for case in all_cases()}


def check_by_name(op: str, name: str, device: str, forced: Mapping[str, Tile] | None = None) -> Verdict:
    """`check` for another process, which finds the case anew because its functions do not travel; `forced` tiles by key."""
    with using(op, forced or {}):
        return check(named_cases()[op, name], torch.device(device))
