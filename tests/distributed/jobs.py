"""Whole training jobs on forked processes: start them, watch their logs, kill them."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

JOB = """
[job]
dump_folder = "{folder}/run"
print_config = false
[model]
model_type = "transformer"
hidden_size = 32
num_heads = 2
num_hidden_layers = 2
intermediate_size = 48
tokenizer_path = "bytes"
[training]
dataset = ["{folder}/corpus/*.txt"]
local_batch_size = 2
global_batch_size = 4
seq_len = 48
varlen = true
steps = 12
virtual_shards = 4
mixed_precision_param = "float32"
[training.dataloader]
num_workers = 0
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 3
[metrics]
log_freq = 1
[checkpoint]
enable = true
interval = 4
last_save_in_hf = true
[validation]
enable = true
steps = 1
freq = 6
holdout = 0.2
"""

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew", "tea"]


def write_job(folder, text=JOB):
    """A job file in `folder` and a small corpus for it: documents of uneven length."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for index in range(40):
        words = [WORDS[(index * 7 + place * (index % 5 + 1)) % len(WORDS)] for place in range(5 + index * 3)]
        (corpus / f"{index:03}.txt").write_text(" ".join(words))
    path = folder / "job.toml"
    path.write_text(text.format(folder=folder))
    return path


class Run:
    """Processes of one job, forked from the test, with the log of each in a file.

    `prepare(rank)` runs in each process before the job does, to plant a fault.
    """

    def __init__(self, folder, arguments, world_size=1, prepare=None):
        self.prepare = prepare
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [Path(folder) / f"log_{rank}_{time.monotonic_ns()}" for rank in range(world_size)]
        self.pids = [self._fork(rank, world_size, port, [str(a) for a in arguments]) for rank in range(world_size)]
        self.codes = {}

    def _fork(self, rank, world_size, port, arguments):
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            output = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # instead of pytest's
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if self.prepare is not None:
                self.prepare(rank)
            code = run_train(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, timeout=90):
        """Exit codes by rank; a negative one is the signal that ended the process."""
        deadline = time.monotonic() + timeout
        while len(self.codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the job did not end:\n{self.text()}")
            time.sleep(0.02)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def text(self, rank=0):
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def wait_for(self, text, timeout=60):
        """Until rank 0 has logged `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{text!r} was not logged:\n{self.text()}")
            time.sleep(0.01)

    def kill(self, ranks=None, number=signal.SIGKILL):
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                if rank not in self.codes:
                    os.kill(self.pids[rank], number)


def run_train(arguments):
    import argparse

    from flame import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.main(parser.parse_args(arguments))
