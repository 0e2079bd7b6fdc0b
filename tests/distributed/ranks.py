"""Run a function on several gloo ranks, forked from the test process."""

import datetime
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, world_size, *args):
    """Results of `function(rank, *args)` on every rank, in order; a failing rank fails the test with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run, (world_size, folder, function, args), nprocs=world_size, join=False, start_method="fork"
        )
        while not context.join(timeout=60):
            pass
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(world_size)]


def _run(rank, world_size, folder, function, args):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        result = function(rank, *args)
        torch.save(result, f"{folder}/result_{rank}")
    except BaseException:
        traceback.print_exc()
        raise
    dist.destroy_process_group()
