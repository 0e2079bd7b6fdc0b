"""A tiny run with everything that a checkpoint holds, and ways to spoil its checkpoints."""

from pathlib import Path

import torch.distributed as dist
from ranks import run_ranks
from tiny import make_step, micro_batches

from flame.checkpoint import CheckpointManager
from flame.config.sections import Checkpoint
from flame.parallel.mesh import Degrees

GLOBAL_BATCH = 4


class Cursor:
    """Data state with one entry a shard this rank owns, like the loader's."""

    def __init__(self, rank, world_size):
        self.entries = {f"shard_{number}": {"at": 0, "owner": rank} for number in range(rank, 8, world_size)}

    def state_dict(self):
        return self.entries

    def load_state_dict(self, state):
        assert set(state) == {f"shard_{number}" for number in range(8)}
        self.entries = {name: state[name] for name in self.entries}


def make_run(folder, degrees, world_size, config=None, files=None, **options):
    step, _ = make_step(degrees, world_size, config=config)
    cursor = Cursor(dist.get_rank(), world_size)
    states = {
        "model": step.model,
        "optimizer": step.optimizer,
        "lr_scheduler": step.optimizer.rate,
        "dataloader": cursor,
    }
    return step, cursor, CheckpointManager(Checkpoint(enable=True, **options), Path(folder), states, files)


def train(step, cursor, first, last, rank, world_size):
    losses = []
    for number in range(first, last):
        result = step(micro_batches(number, rank, world_size, GLOBAL_BATCH), number + 1)
        losses.append(result.loss.item())
        for entry in cursor.entries.values():
            entry["at"] = number + 1
    return losses


def single(function, *arguments):
    return run_ranks(function, 1, *arguments)[0]


def save_two_checkpoints(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1)
    train(step, cursor, 0, 1, 0, 1)
    manager.save(1)
    train(step, cursor, 1, 2, 0, 1)
    manager.save(2)


def load_newest(rank, folder):
    return make_run(folder, Degrees(), 1)[2].load()


def flip_byte(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])
