"""The scripts prepare an environment on a bare machine; pip and Python are stand-ins that write down what they were asked."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/bash
echo "$@" >> "$STAND_IN_LOG"
[ "$1" = - ] && exit 1  # asked whether the packages are there
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$0" "$3/bin/python3"
fi
exit 0
"""


def commands(tmp_path, *arguments, **variables):
    """What a script asks of Python in a checkout without an environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout" / "scripts")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "STAND_IN_LOG": str(log), **variables}
    result = subprocess.run(
        ["bash", *arguments], cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    "script, extra", [(["scripts/train.sh", "train_configs/quickstart.toml"], ""), (["scripts/test.sh", "-x"], "[dev]")]
)
def test_a_bare_machine_installs_the_project_and_its_extra_whatever_the_arguments(tmp_path, script, extra):
    asked = commands(tmp_path, *script)
    installs = [line for line in asked if " pip install " in f" {line} "]
    assert len(installs) == 2 and installs[0].endswith(" torch")
    assert installs[1].endswith(f" -e {tmp_path / 'checkout'}{extra}")


def test_training_passes_all_arguments_to_the_job(tmp_path):
    asked = commands(tmp_path, "scripts/train.sh", "JOB.toml", "--training.steps", "3")
    assert asked[-1].endswith("-m flame.train JOB.toml --training.steps 3")


@pytest.mark.parametrize(
    "variables, launched", [({"NGPU": "1"}, False), ({"NGPU": "1", "MAX_RESTARTS": "2"}, True), ({"NGPU": "2"}, True)]
)
def test_only_several_processes_or_restarts_take_torchrun(tmp_path, variables, launched):
    asked = commands(tmp_path, "scripts/train.sh", "JOB.toml", **variables)
    assert ("torch.distributed.run" in asked[-1]) == launched and "-m flame.train JOB.toml" in asked[-1]
