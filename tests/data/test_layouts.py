"""The content of every step does not depend on ranks, workers, stops or resumes."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from corpus import SHARDS, Run, loader_of, mixture, recipe_of, take

from flame.data import Loader, RankSettings, WorkerSettings
from flame.errors import CheckpointError, ConfigError

STEPS = 14  # 24 rows of 32 tokens a step: the 23 documents of the first source are read several times over


@pytest.fixture(params=["fixed", "varlen"])
def recipe(request, tmp_path):
    return recipe_of(mixture(tmp_path), varlen=request.param == "varlen", context_len=20)


@pytest.fixture
def expected(recipe):
    return Run(recipe, 1, 0, 1, 24).steps(STEPS)


@pytest.mark.parametrize("world,workers,batch", [(1, 2, 3), (1, 3, 1), (2, 0, 4), (2, 3, 1), (4, 0, 2), (4, 2, 1)])
def test_every_layout_trains_the_same_rows_in_every_step(recipe, expected, world, workers, batch):
    run = Run(recipe, world, workers, batch, 24)
    try:
        assert run.steps(4 if workers else STEPS) == expected[: 4 if workers else STEPS]
    finally:
        run.close()


@pytest.mark.parametrize("stop", range(0, STEPS - 1))
def test_resume_on_any_layout_continues_the_rows(recipe, expected, stop):
    worlds = (1, 2, 4, 3, 6, 12)
    before, after = worlds[stop % 6], worlds[(stop + 1 + stop // 6) % 6]
    first = Run(recipe, before, 0, 1, 24)
    assert first.steps(stop) == expected[:stop]
    assert Run(recipe, after, 0, 2, 24, first.state()).steps(STEPS - stop) == expected[stop:]


def test_resume_with_other_numbers_of_workers_continues_the_rows(recipe, expected):
    state, done = None, 0
    for world, workers in ((1, 2), (2, 3), (1, 0), (4, 2)):
        run = Run(recipe, world, workers, 1, 24, state)
        try:
            assert run.steps(2) == expected[done : done + 2]
            state, done = run.state(), done + 2
        finally:
            run.close()


def test_the_corpus_wraps_and_rows_cut_documents(recipe, expected):
    run = Run(recipe, 1, 0, 1, 24)
    run.steps(STEPS)
    assert run.loaders[0].progress()["a.jsonl"]["epoch"] > 2.5
    offsets = [entry["open"]["offset"] for entry in run.state().values() if entry["open"]]
    assert sum(offset > 0 for offset in offsets) > SHARDS // 2


def test_batches_are_bit_equal_on_the_same_layout_after_resume(recipe):
    whole = take(loader_of(recipe, batch=4), 20)
    loader = loader_of(recipe, batch=4)
    take(loader, 7)
    resumed = loader_of(recipe, batch=4)
    resumed.load_state_dict(loader.state_dict())
    for one, other in zip(whole[7:], take(resumed, 13)):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert (one.cu_seqlens is None and other.cu_seqlens is None) or torch.equal(one.cu_seqlens, other.cu_seqlens)
        assert one.source_tokens == other.source_tokens


def test_state_is_of_the_rows_handed_out_not_of_those_prepared(recipe):
    inline, ahead = loader_of(recipe), loader_of(recipe, workers=2)
    try:
        take(inline, 5), take(ahead, 5)
        assert inline.state_dict() == ahead.state_dict()
    finally:
        ahead.close()


def test_state_is_small_however_long_the_documents(tmp_path):
    sources = mixture(tmp_path)
    (tmp_path / "long.txt").write_text("long line " * 10_000)
    from flame.data import SourceSettings

    recipe = recipe_of([*sources, SourceSettings(str(tmp_path / "long.txt"), weight=9)])
    loader = loader_of(recipe)
    take(loader, 100)
    assert max(len(json.dumps(entry)) for entry in loader.state_dict().values()) < 800


def test_a_loader_iterated_again_goes_on(recipe, expected):
    loader = loader_of(recipe)
    together = [batch.row_numbers[0] for _ in range(3) for batch in take(loader, 5)]
    assert together == list(range(15))


def test_workers_are_stopped_after_an_iteration_unless_persistent(recipe):
    for persistent in (False, True):
        workers = WorkerSettings(num_workers=1, persistent_workers=persistent)
        loader = Loader(recipe, RankSettings(workers=workers))
        numbers = []
        for _ in range(2):
            iterator = iter(loader)
            numbers += [next(iterator).row_numbers[0] for _ in range(3)]
            iterator.close()
            assert (loader._prepared is not None) == persistent
        assert numbers == list(range(6))
        loader.close()


def test_a_number_of_ranks_that_does_not_divide_the_shards_is_refused_with_those_that_do(recipe):
    with pytest.raises(
        ConfigError, match="can use 1, 2, 3, 4, 6, 12 ranks; a new run on 5 can set virtual_shards = 15"
    ):
        loader_of(recipe, 0, 5)


def test_states_that_do_not_fit_are_refused(recipe, tmp_path):
    run = Run(recipe, 2, 0, 1, 24)
    run.steps(1)
    with pytest.raises(CheckpointError, match="6 of 12 virtual shards are missing"):
        loader_of(recipe).load_state_dict(run.loaders[0].state_dict())
    with pytest.raises(CheckpointError, match="set training.virtual_shards = 12"):
        loader_of(recipe_of(mixture(tmp_path), virtual_shards=24)).load_state_dict(run.state())
    mixed = run.state()
    take(run.loaders[0], 1)
    mixed.update(run.loaders[0].state_dict())
    mixed["shard_00004"]["rows"] += 1
    with pytest.raises(CheckpointError, match="different moments"):
        loader_of(recipe).load_state_dict(mixed)
    with pytest.raises(CheckpointError, match="no data state"):
        loader_of(recipe).load_state_dict({})


def test_rows_do_not_draw_from_the_global_random_state(recipe):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader = loader_of(recipe, workers=1)
    take(loader, 2)
    loader.close()
    assert torch.equal(before, torch.get_rng_state())


SIGNALLED = """
import os, signal, subprocess, sys
from pathlib import Path
from corpus import *
import multiprocessing
loader = loader_of(recipe_of(mixture(Path(sys.argv[1]))), workers=2)
take(loader, 1)  # the other worker may still be at its very start
workers = [worker.pid for worker in multiprocessing.active_children()]
for name in ("TERM", "INT", "USR1"):
    subprocess.run(["kill", "-" + name, *map(str, workers)], check=True)
assert [batch.row_numbers[0] for batch in take(loader, 40)] == list(range(1, 41))
assert len(multiprocessing.active_children()) == len(workers) == 2
print("served", *workers)
if sys.argv[2] == "close":
    loader.close()
    assert not multiprocessing.active_children()
elif sys.argv[2] == "fail":
    raise SystemExit(3)
elif sys.argv[2] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "end,code", [("close", 0), ("fail", 3), pytest.param("leave", 0, marks=SLOW), pytest.param("die", -9, marks=SLOW)]
)
def test_workers_serve_through_a_schedulers_signals_and_end_with_their_job(tmp_path, end, code):
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(tmp_path), end], stdout=subprocess.PIPE, text=True, timeout=60,
        cwd=os.path.dirname(__file__), env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == code
    word, *workers = done.stdout.split()
    assert word == "served"
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_alive, workers))


def is_alive(pid: str) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
