"""What can go wrong around a checkpoint: death while writing, damage, one failing rank, abandoned branches, bare weights."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from saved_runs import flip_byte, load_newest, make_run, save_two_checkpoints, single, train, truncate
from tiny import CONFIG, make_step

from flame.checkpoint import storage
from flame.checkpoint.convert import to_hf
from flame.errors import CheckpointError
from flame.models.decoder import build_model
from flame.models.hf import export_model, read_weights
from flame.models.initialize import initialize_weights
from flame.parallel.mesh import Degrees

pytestmark = pytest.mark.distributed


def save_for_ever(folder):
    """Steps 1, 2, 3, 1, 2, 3, ...: new folders and ones that replace others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    step, cursor, manager = make_run(folder, Degrees(), 1, keep_latest_k=2)
    while True:
        for number in (1, 2, 3):
            manager.save(number)


def test_a_process_killed_at_any_moment_leaves_a_checkpoint_to_load(tmp_path):
    root = tmp_path / "checkpoint"
    for milliseconds in (5, 41):
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        child.start()
        started = time.time()
        while not ((root / "latest").exists() and (root / "latest").stat().st_mtime > started):
            assert child.is_alive() and time.time() < started + 30
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        storage.tidy(root)
        newest = storage.published(root)[-1]
        assert storage.damage(storage.step_folder(root, newest.step)) is None
    assert single(load_newest, tmp_path) == newest.step


def test_a_replaced_checkpoint_comes_back_when_its_successor_was_not_published(tmp_path):
    single(save_two_checkpoints, tmp_path)
    folder = tmp_path / "checkpoint" / "step-2"
    folder.rename(folder.with_suffix(".old"))  # killed between the two renames
    assert single(load_newest, tmp_path) == 2


def save_once_more(rank, folder):
    make_run(folder, Degrees(), 1)[2].save(3)


def test_what_a_killed_process_left_unfinished_is_removed_by_the_next_save(tmp_path):
    single(save_two_checkpoints, tmp_path)
    shutil.copytree(tmp_path / "checkpoint" / "step-2", tmp_path / "checkpoint" / "step-9.tmp")
    single(save_once_more, tmp_path)
    assert storage.steps_in(tmp_path / "checkpoint") == [1, 2, 3]
    assert not list((tmp_path / "checkpoint").glob("*.tmp"))


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_anew(tmp_path):
    single(save_two_checkpoints, tmp_path)
    flip_byte(tmp_path / "checkpoint" / "step-1")
    truncate(tmp_path / "checkpoint" / "step-2")
    assert "every checkpoint" in single(error_of_loading, tmp_path)


def error_of_loading(rank, folder, step=-1, **options):
    manager = make_run(folder, Degrees(), 1, **options)[2]
    with pytest.raises(CheckpointError) as caught:
        manager.load(step)
    return str(caught.value)


def save_on_two(rank, folder):
    make_run(folder, Degrees(dp_shard=2), 2)[2].save(1)
    make_run(folder, Degrees(dp_shard=2), 2)[2].save(2)


def load_on_two(rank, folder):
    return make_run(folder, Degrees(dp_shard=2), 2)[2].load()


def test_ranks_share_the_checking_and_all_learn_of_the_damage(tmp_path):
    run_ranks(save_on_two, 2, tmp_path)
    folder = tmp_path / "checkpoint" / "step-2"
    file = folder / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = [storage.damage(folder, rank, 2) for rank in range(2)]
    assert [problem is not None for problem in found].count(True) == 1, found
    assert run_ranks(load_on_two, 2, tmp_path) == [1, 1]


def fail_on_one_rank(rank, folder, mode):
    step, cursor, manager = make_run(folder, Degrees(dp_shard=2), 2, async_mode=mode)
    train(step, cursor, 0, 1, rank, 2)
    manager.save(1)
    manager.finish_pending()
    before = [parameter.to_local().clone() for parameter in step.model.parameters()]
    real = os.fsync
    if rank == 1:
        os.fsync = lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    saved = manager.save(2) and manager.finish_pending(raise_failure=False)
    os.fsync = real
    kept = all(torch.equal(a, b.to_local()) for a, b in zip(before, step.model.parameters()))
    after_failure = storage.steps_in(manager.root)
    dist.barrier()
    again = manager.save(2) and manager.finish_pending()
    return saved, kept, after_failure, again, manager.load()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_works(tmp_path, mode):
    assert run_ranks(fail_on_one_rank, 2, tmp_path, mode) == [(False, True, [1], True, 2)] * 2


def go_back_and_branch(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1, keep_latest_k=2)
    for number in (2, 4):
        manager.save(number)
    manager = make_run(folder, Degrees(), 1, keep_latest_k=2)[2]
    manager.load(2)
    manager.save(3)
    return storage.steps_in(manager.root), manager.load()


def test_a_run_that_went_back_continues_on_its_new_branch(tmp_path):
    assert single(go_back_and_branch, tmp_path) == ([3, 4], 3)


def save_after_damage(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1, keep_latest_k=1)
    assert manager.load() == 1
    manager.save(1)
    return storage.steps_in(manager.root), manager.load()


def test_a_damaged_later_step_does_not_push_out_the_good_one(tmp_path):
    single(save_two_checkpoints, tmp_path)
    flip_byte(tmp_path / "checkpoint" / "step-2")
    assert single(save_after_damage, tmp_path) == ([1], 1)


def finish_with_weights_only(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1, last_save_model_only=True, export_dtype="bfloat16")
    train(step, cursor, 0, 1, 0, 1)
    manager.save(1)
    train(step, cursor, 1, 2, 0, 1)
    manager.save(2, last=True)
    return [parameter.detach().full_tensor() for parameter in step.model.parameters()]


def start_from(rank, folder, path, **options):
    step, cursor, manager = make_run(folder, Degrees(), 1, initial_load_path=str(path), **options)
    begun = manager.load()
    return begun, [parameter.detach().full_tensor() for parameter in step.model.parameters()]


def test_bare_weights_are_not_resumed_by_mistake_but_start_another_run(tmp_path):
    trained = single(finish_with_weights_only, tmp_path / "first")
    text = single(error_of_loading, tmp_path / "first")
    assert "holds weights only" in text and "checkpoint.load_step = 1" in text
    begun, weights = single(start_from, tmp_path / "second", tmp_path / "first" / "checkpoint" / "step-2")
    assert begun is None
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(trained, weights))


def test_initial_weights_that_are_not_there_are_an_error_that_says_so(tmp_path):
    text = single(partial(error_of_loading, initial_load_path=str(tmp_path / "nowhere")), tmp_path / "run")
    assert "checkpoint.initial_load_path = " in text and "nowhere cannot be used: there is no such folder" in text


def full_weights(rank, folder, path, degrees):
    step, cursor, manager = make_run(folder, degrees, degrees.data, initial_load_path=str(path))
    assert manager.load() is None
    return {name: parameter.detach().full_tensor() for name, parameter in step.model.named_parameters()}


def test_a_hugging_face_folder_is_recognised_and_starts_a_sharded_run(tmp_path):
    model = build_model(CONFIG)
    initialize_weights(model, 5)
    export_model(model, tmp_path / "hf")
    degrees = Degrees(dp_shard=2)
    for weights in run_ranks(full_weights, 2, tmp_path / "run", tmp_path / "hf", degrees):
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_weights_that_another_trainer_saved_with_torch_start_a_sharded_run(tmp_path):
    model = build_model(CONFIG)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    for weights in run_ranks(full_weights, 2, tmp_path / "run", tmp_path / "theirs", Degrees(dp_shard=2)):
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def train_and_export(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(dp_shard=2), 2, files={"config.json": config_file()})
    train(step, cursor, 0, 2, rank, 2)
    manager.save(2)
    export_model(step.model, Path(folder) / "live")
    return {name: parameter.detach().full_tensor() for name, parameter in step.model.named_parameters()}


def config_file():
    return json.dumps(build_model(CONFIG).config.to_dict())


def test_exported_weights_are_the_trained_ones_live_and_from_the_checkpoint(tmp_path):
    trained = run_ranks(train_and_export, 2, tmp_path)[0]
    to_hf(tmp_path / "checkpoint" / "step-2", tmp_path / "converted")
    for folder in ("live", "converted"):
        exported = dict(read_weights(tmp_path / folder))
        assert exported.keys() == trained.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())
    assert (tmp_path / "live" / "config.json").read_text() == (tmp_path / "converted" / "config.json").read_text()


def change_optimizer(rank, folder):
    make_run(folder, Degrees(), 1)[2].save(1)
    step, cursor, manager = make_run(folder, Degrees(), 1)
    step.optimizer.rules["muon"] = step.optimizer.rules.pop("adamw")
    with pytest.raises(CheckpointError) as caught:
        manager.load()
    manager.options.exclude_from_loading = ["optimizer"]
    return str(caught.value), manager.load()


def test_another_optimizer_is_named_and_can_be_left_out(tmp_path):
    text, loaded = single(change_optimizer, tmp_path)
    assert "of another optimizer" in text and "optimizer.muon.exp_avg" in text
    assert "checkpoint.exclude_from_loading = ['optimizer']" in text
    assert loaded == 1


def seed_with_another_optimizer(rank, folder):
    manager = make_run(folder, Degrees(), 1)[2]
    manager.save(0)
    step, cursor, manager = make_run(folder, Degrees(), 1)
    step.optimizer.rules["muon"] = step.optimizer.rules.pop("adamw")
    return manager.load()


def test_of_step_zero_only_the_weights_count(tmp_path):
    assert single(seed_with_another_optimizer, tmp_path) == 0


def load_layers_split_over_ranks(rank, folder):
    """Each rank holds some layers only, as pipeline stages do."""
    step, _ = make_step(Degrees(dp_shard=2), 2)
    from flame.checkpoint import state

    held = {name: t for name, t in state.tensors_of("model", step.model).items() if (".0." in name) == (rank == 0)}
    group = dist.new_group(backend="gloo")
    return sorted(state.shapes_on_all_ranks(held, group)) == sorted(state.tensors_of("model", step.model))


def test_what_is_compared_is_what_all_ranks_hold_together(tmp_path):
    assert all(run_ranks(load_layers_split_over_ranks, 2, tmp_path))
