"""The kernels compile for Hopper, fit its shared memory and use its tensor cores; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 232448


def compile_cases(*cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile.polynomial_attention", *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", ["16:64:bfloat16", pytest.param("16:64:float32", marks=pytest.mark.slow)])
def test_blocks_compile_for_hopper(case):
    kernels = compile_cases(case)
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
    blocks = [kernel for kernel in kernels if kernel["name"].startswith("block")]
    assert len({kernel["name"] for kernel in blocks}) == 4 and all(kernel["wgmma"] for kernel in blocks)
