"""`flame doctor`: prove the kernels on this machine, and with --tune find faster tiles for it.

Every case of every op (see `flame.kernels.checking`) runs forward and backward with the tiles this machine would use and
is compared with the fp64 reference. With a GPU these are the Triton kernels, without one the torch forms.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flame.kernels import tiles
from flame.kernels.checking import Case, Verdict, all_cases, check, check_by_name
from flame.kernels.isolation import run_isolated
from flame.kernels.tuning import tune_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    parser.add_argument("--case", default="", help="only cases whose name matches this pattern")
    parser.add_argument("--tune", action="store_true", help="time tiles for this GPU and write the fastest right ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="print the error of every output and gradient")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile and check at once (default 1)")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")


def main(args: argparse.Namespace) -> int:
    """0 when every case is right, 1 otherwise."""
    device = torch.device(args.device)
    print(describe(device))
    every = list(all_cases(args.op))
    cases = [case for case in every if re.search(args.case, case.name)]
    if not cases:
        print("No case matches. Ops with cases:", ", ".join(sorted({case.op for case in all_cases()})))
        return 1
    if args.tune:
        tune_all([case for case in every if not case.tune or case in cases], device, args.jobs)
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
    """Check the cases, each in a process that it cannot harm if `jobs` > 1, and print a line for each."""
    if jobs > 1:
        # Compiling is what takes the time, and it holds one core; the GPU is shared.
        calls = [(case.op, case.name, str(device)) for case in cases]
        for case, (done, value) in zip(cases, run_isolated(check_by_name, calls, jobs)):
            finding = Finding(case.op, case.name, value) if done else Finding(case.op, case.name, failure=value)
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
