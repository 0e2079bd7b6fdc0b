"""`flame doctor`: prove the kernels on this machine, and with --tune find faster tiles for it.

Every case of every op (see `flame.kernels.checking`) runs forward and backward with the tiles this machine would use and
is compared with the fp64 reference. With a GPU these are the Triton kernels, without one the torch forms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from flame.kernels import tiles
from flame.kernels.checking import Case, Verdict, all_cases, check, evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    parser.add_argument("--case", default="", help="only cases whose name contains this text")
    parser.add_argument("--tune", action="store_true", help="time tiles for this GPU and write the fastest right ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="print the error of every output and gradient")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile and check at once (default 1)")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")


def main(args: argparse.Namespace) -> int:
    """0 when every case is right, 1 otherwise."""
    device = torch.device(args.device)
    print(describe(device))
    cases = [case for case in all_cases(args.op) if args.case in case.name]
    if not cases:
        print("No case matches. Ops with cases:", ", ".join(sorted({case.op for case in all_cases()})))
        return 1
    if args.tune:
        tune_all(cases, device)
    findings = list(check_all([case for case in cases if not case.tune], device, args.jobs, args.verbose))
    wrong = summarize(findings)
    report_unchecked(cases, device)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"machine": describe(device), "cases": [f.as_dict() for f in findings]}, indent=1)
        )
    return 1 if wrong else 0


@dataclass(frozen=True)
class Finding:
    """What came of one case: a verdict, or the error that kept it from one."""

    op: str
    name: str
    verdict: Verdict | None = None
    failure: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict is not None and self.verdict.ok

    def as_dict(self) -> dict[str, object]:
        verdict = {} if self.verdict is None else {"errors": self.verdict.errors, "tolerance": self.verdict.tolerance}
        return {"op": self.op, "name": self.name, "ok": self.ok, "failure": self.failure, **verdict}


def describe(device: torch.device) -> str:
    """One line on what is being trusted."""
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    if device.type != "cuda":
        return f"{device}, {versions}: no GPU, so this checks the torch forms of the kernels."
    import triton

    gpu = f"{tiles.device_name(device)}, compute capability {tiles.capability(device)}"
    return f"{gpu}, {versions}, triton {triton.__version__}"


def check_all(cases: Sequence[Case], device: torch.device, jobs: int, verbose: bool) -> Iterator[Finding]:
    """Check the cases, in `jobs` processes if more than one, and print a line for each."""
    if jobs > 1:
        # Compiling is what takes the time, and it holds one core; the GPU is shared.
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        with pool:
            names = [(case.op, case.name, str(device)) for case in cases]
            for finding in pool.map(examine_by_name, names):
                print(line(finding, verbose), flush=True)
                yield finding
        return
    for case in cases:
        finding = examine(case, device)
        print(line(finding, verbose), flush=True)
        yield finding


def examine(case: Case, device: torch.device) -> Finding:
    try:
        return Finding(case.op, case.name, check(case, device))
    except Exception as error:  # a kernel may fail in many ways; the doctor reports and goes on
        message = (str(error).splitlines() or [""])[0][:200]
        return Finding(case.op, case.name, failure=f"{type(error).__name__}: {message}")


def examine_by_name(named: tuple[str, str, str]) -> Finding:
    """In another process, which finds the case anew because its functions do not travel."""
    op, name, device = named
    return examine(_named_cases()[op, name], torch.device(device))


@lru_cache(maxsize=1)
def _named_cases() -> dict[tuple[str, str], Case]:
    return {(case.op, case.name): case for case in all_cases()}


def summarize(findings: Sequence[Finding]) -> list[Finding]:
    """Print the count and the names of the cases that are wrong, and return these."""
    wrong = [finding for finding in findings if not finding.ok]
    print(f"{len(findings) - len(wrong)} of {len(findings)} cases are right.")
    if wrong:
        print("Until they are, FLAME_BACKEND=chunked runs the plain torch form of every op. Wrong or failing:")
        print("\n".join(f"  {each.op}: {each.name}" for each in wrong))
    return wrong


def line(finding: Finding, verbose: bool) -> str:
    title = f"{finding.op}: {finding.name}"
    verdict = finding.verdict
    if verdict is None:
        return f"FAILED  {title}: {finding.failure}"
    name, error = verdict.worst
    mark = "right " if verdict.ok else "WRONG "
    text = f"{mark}  {title}: largest relative error {error:.1e} ({name}; allowed {verdict.tolerance:.0e})"
    if verbose:
        text += "".join(f"\n          {name:20s} {value:.2e}" for name, value in verdict.errors.items())
    return text


def report_unchecked(cases: Iterable[Case], device: torch.device) -> None:
    """Name shipped entries that no checked case launches: a table must not hold what nothing proves."""
    cases = list(cases)
    proven = {(case.op, key) for case in cases if not case.tune for key in case.keys}
    for op in sorted({case.op for case in cases}):
        for key in tiles.shipped_tiles(op, tiles.device_name(device)):
            if (op, key) not in proven:
                print(f"UNCHECKED {op}: the table has {key!r}, but no case runs it.")


def tune_all(cases: Iterable[Case], device: torch.device) -> None:
    """For each production case, one key at a time: time the right tiles and write the fastest into the op's table."""
    cases = list(cases)
    provers = {(case.op, key): case for case in cases if not case.tune for key in case.keys}
    for case in (case for case in cases if case.tune):
        best: dict[str, tiles.Tile] = {}
        for key, candidates in case.keys.items():
            prover = provers.get((case.op, key))
            if prover is None:
                print(f"SKIPPED {case.op}: no case proves {key!r}, so none of its tiles can be trusted.")
                continue
            found = best_tile(case, prover, key, candidates, best, device)
            if found is not None:
                best[key] = found
        if best:
            path = tiles.write_tiles(case.op, tiles.device_name(device), best)
            print(f"Wrote {len(best)} entries to {path}")


def best_tile(
    case: Case,
    prover: Case,
    key: str,
    candidates: Iterable[tiles.Tile],
    chosen: dict[str, tiles.Tile],
    device: torch.device,
) -> tiles.Tile | None:
    """The fastest of the tiles that compile, are not denied, and pass the gradient check."""
    best, best_ms = None, float("inf")
    for tile in candidates:
        if tiles.denied(case.op, key, tile, tiles.capability(device)):
            continue
        with tiles.using(case.op, {**chosen, key: tile}):
            try:
                verdict = check(prover, device)
                if not verdict.ok:
                    print(f"  {key} {dict(tile)}: wrong, {verdict.worst[0]} off by {verdict.worst[1]:.1e}")
                    continue
                ms = milliseconds(case, device)
            except Exception as error:  # out of shared memory, compiler refusal: not a usable tile
                print(f"  {key} {dict(tile)}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                continue
        print(f"  {key} {dict(tile)}: {ms:.3f} ms", flush=True)
        if ms < best_ms:
            best, best_ms = tile, ms
    return best


def milliseconds(case: Case, device: torch.device) -> float:
    """Median time of forward and backward together."""
    import triton

    inputs = case.inputs(device, 0)
    with torch.no_grad():
        outputs = case.run(inputs, None)
    cotangents = {name: torch.randn_like(y) for name, y in outputs.items()}
    return triton.testing.do_bench(lambda: evaluate(case, inputs, None, cotangents), return_mode="median")
