"""The kernels of the delta rule compile for Hopper, fit its shared memory and use its tensor cores; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 232448


def check(*cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile.delta_rule", *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
    sweeps = [kernel for kernel in kernels if kernel["name"].endswith("sweep")]
    assert len(sweeps) >= 3 * len(cases) and all(kernel["wgmma"] for kernel in sweeps)


def test_kernels_of_a_scalar_decay_compile_for_hopper():
    check("scalar:64:64:100")


def test_an_erase_direction_of_its_own_fits_shared_memory():
    check("comba:128:128:100")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["plain:128:128:100", "scalar:128:128:4103", "scalar:256:512:100", "key:128:128:4103"],
)
def test_every_family_compiles_for_hopper(case):
    check(case)
