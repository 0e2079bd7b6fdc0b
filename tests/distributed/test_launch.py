"""scripts/train.sh and torchrun around the trainer: restarts, signals, orphans."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import JOB, write_job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
LONG = JOB.replace("steps = 12", "steps = 400")


class Launched:
    """scripts/train.sh in a session of its own, with its output in a file."""

    def __init__(self, folder, *arguments, **environment):
        self.log = folder / "launch.log"
        environment = {**os.environ, "NGPU": "2", "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "scripts/train.sh"), str(folder / "job.toml"), *arguments],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def wait_for(self, text, timeout=120):
        deadline = time.monotonic() + timeout
        while text not in self.log.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def children(self, pid=None):
        """Processes below the script: torchrun, then the workers."""
        found = []
        for path in Path(f"/proc/{pid or self.process.pid}/task").glob("*/children"):
            found += [int(child) for child in path.read_text().split()]
        return found

    def launcher(self):
        return next(
            pid for pid in self.children() if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def workers(self):
        return self.children(self.launcher())

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def launch(tmp_path):
    write_job(tmp_path, LONG)
    started = []

    def start(*arguments, **environment):
        started.append(Launched(tmp_path, *arguments, **environment))
        return started[-1]

    yield start
    for run in started:
        run.end()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_to_the_script_saves_and_ends_with_zero(launch, processes):
    run = launch(NGPU=processes)
    run.wait_for("step:     6 ")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0, run.log.read_text()
    assert "Stopped after step" in run.log.read_text()


def test_a_killed_worker_is_restarted_and_continues(launch):
    run = launch("--training.steps", "40", MAX_RESTARTS="2")
    run.wait_for("step:     9 ")
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.process.wait(timeout=120) == 0, run.log.read_text()
    log = run.log.read_text()
    assert "Resumed from step" in log and "step:    40 " in log


def test_workers_do_not_outlive_torchrun(launch):
    run = launch()
    run.wait_for("step:     6 ")
    workers = run.workers()
    assert len(workers) == 2
    os.kill(run.launcher(), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_wrong_job_ends_with_its_message(launch):
    run = launch("--training.dataset", "/nowhere/*.txt")
    assert run.process.wait(timeout=60) != 0
    log = run.log.read_text()
    assert "/nowhere" in log and "in build_loader" not in log  # the summary without the way through the code
