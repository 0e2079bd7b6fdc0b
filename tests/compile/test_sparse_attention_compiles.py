"""The kernels of sparse attention compile for Hopper, fit its shared memory and use its tensor cores; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 232448
PRODUCTS = {"_part_kernel", "_key_kernel", "_query_kernel", "_forward_kernel", "_mean_kernel", "_score_kernel"}


def compile_cases(*cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile.sparse_attention", *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def check(kernels):
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
    # The gated sum has kernels of the same names, without products.
    assert {kernel["name"] for kernel in kernels if kernel["wgmma"]} >= PRODUCTS & {
        kernel["name"] for kernel in kernels
    }


def test_nsa_compiles_for_hopper():
    check(compile_cases("nsa:32:2:64:bfloat16"))


def test_moba_compiles_for_hopper():
    check(compile_cases("chunks:4:4:64:bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nsa:64:4:128:bfloat16", "nsa:4:4:256:bfloat16", "chunks:8:4:128:bfloat16"])
def test_wide_heads_compile_for_hopper(case):
    check(compile_cases(case))


@pytest.mark.slow
def test_fp32_compiles_for_hopper():
    kernels = compile_cases("nsa:4:2:64:float32")
    assert kernels and all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
