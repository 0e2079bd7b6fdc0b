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
    command = [sys.executable, "-m", "tests.compile.linear_attention", *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def check(kernels):
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
    sweeps = [kernel for kernel in kernels if kernel["name"].endswith("sweep")]
    assert sweeps and all(kernel["wgmma"] for kernel in sweeps)


def test_scalar_sweeps_compile_for_hopper():
    check(compile_cases("none:64:64:bfloat16", "scalar:128:128:bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scalar:128:128:bfloat16:1", "scalar:128:64:bfloat16:4", "head:256:256:bfloat16:1"])
def test_gradients_by_roles_compile_for_hopper(case):
    kernels = compile_cases(case)
    check(kernels)
    roles = [kernel for kernel in kernels if kernel["name"] in ("role_gradients", "group_gradients")]
    assert roles and all(kernel["wgmma"] for kernel in roles)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["head:256:512:bfloat16", "key:128:128:bfloat16", "bonus:64:64:bfloat16"])
def test_every_family_compiles_for_hopper(case):
    check(compile_cases(case))


@pytest.mark.slow
def test_fp32_sweeps_compile_for_hopper():
    check(compile_cases("scalar:64:64:float32", "value:64:64:float32"))
