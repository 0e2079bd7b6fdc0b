import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from saved_runs import flip_byte, load_newest, make_run, save_two_checkpoints, single, train, truncate
from tiny import CONFIG

from flame.checkpoint import storage
from flame.errors import CheckpointError
from flame.parallel.mesh import Degrees


def save_at_two(rank, folder, world_size, degrees, mode="disabled"):
    step, cursor, manager = make_run(folder, degrees, world_size, async_mode=mode)
    train(step, cursor, 0, 2, rank, world_size)
    assert manager.save(2)
    losses = train(step, cursor, 2, 4, rank, world_size)  # while an asynchronous save may still be writing
    manager.close()
    return losses


def continue_from_latest(rank, folder, world_size, degrees):
    step, cursor, manager = make_run(folder, degrees, world_size)
    assert manager.load() == 2
    assert all(entry["at"] == 2 for entry in cursor.entries.values())
    return train(step, cursor, 2, 4, rank, world_size)


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_continues_bit_for_bit_on_its_layout(tmp_path, mode):
    expected = run_ranks(save_at_two, 2, tmp_path, 2, Degrees(dp_shard=2), mode)
    assert run_ranks(continue_from_latest, 2, tmp_path, 2, Degrees(dp_shard=2)) == expected


@pytest.mark.distributed
def test_a_checkpoint_of_two_ranks_continues_on_one_and_on_four(tmp_path):
    expected = run_ranks(save_at_two, 2, tmp_path, 2, Degrees(dp_shard=2))[0]
    for degrees in (Degrees(), Degrees(dp_replicate=2, dp_shard=2)):
        losses = run_ranks(continue_from_latest, degrees.data, tmp_path, degrees.data, degrees)[0]
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "spoil",
    [
        flip_byte,
        truncate,
        lambda folder: (folder / ".metadata").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
    ids=["flipped byte", "truncated", "no metadata", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, spoil):
    single(save_two_checkpoints, tmp_path)
    spoil(tmp_path / "checkpoint" / "step-2")
    assert storage.damage(tmp_path / "checkpoint" / "step-2")
    assert single(load_newest, tmp_path) == 1


def die_while_writing(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1)
    train(step, cursor, 0, 1, 0, 1)
    manager.save(1)
    storage.publish = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # killed after writing, before publishing
    with pytest.raises(KeyboardInterrupt):
        manager.save(2)


@pytest.mark.distributed
def test_a_save_cut_short_leaves_the_previous_checkpoint_the_newest(tmp_path):
    single(die_while_writing, tmp_path)
    assert (tmp_path / "checkpoint" / "step-2.tmp").is_dir()
    assert single(load_newest, tmp_path) == 1


def save_onto_a_full_disk(rank, folder, mode):
    step, cursor, manager = make_run(folder, Degrees(), 1, async_mode=mode)
    train(step, cursor, 0, 1, 0, 1)
    manager.save(1)
    manager.finish_pending()
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    os.fsync = full
    before = [p.detach().clone() for p in step.model.parameters()]
    first = manager.save(2)
    second = manager.finish_pending(raise_failure=False)
    kept = all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))
    with pytest.raises(CheckpointError, match="No space left"):
        manager.save(2, last=True)
    os.fsync = real
    return first and second, kept, manager.load()


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_keeps_the_training_state_and_the_previous_checkpoint(tmp_path, mode):
    saved, kept, loaded = single(save_onto_a_full_disk, tmp_path, mode)
    assert (saved, kept, loaded) == (False, True, 1)
    assert not list((tmp_path / "checkpoint").glob("*.tmp"))


def save_with_no_room_for_tensors(rank, folder):
    manager = make_run(folder, Degrees(), 1)[2]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # the small files fit
    with pytest.raises(CheckpointError, match=r"rank 0: .*GB are free there\. Free space"):
        manager.save(1, last=True)


@pytest.mark.distributed
def test_a_failure_to_write_tensors_tells_how_much_is_free(tmp_path):
    single(save_with_no_room_for_tensors, tmp_path)


def save_where_nothing_can_be_made(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1)
    Path(folder, "checkpoint").write_text("a file where the folder should be")
    return manager.save(1)


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written_is_reported_and_training_goes_on(tmp_path):
    assert single(save_where_nothing_can_be_made, tmp_path) is False


def keep_two(rank, folder):
    step, cursor, manager = make_run(folder, Degrees(), 1, keep_latest_k=2)
    for number in range(1, 5):
        manager.save(number)
    return storage.steps_in(manager.root), (manager.root / "latest").read_text().strip()


@pytest.mark.distributed
def test_only_the_newest_checkpoints_are_kept(tmp_path):
    assert single(keep_two, tmp_path) == ([3, 4], "step-4")


def load_into_another_model(rank, folder):
    files = {"config.json": '{"hidden_size": 32}'}
    make_run(folder, Degrees(), 1, files=files)[2].save(1)
    wider = {**CONFIG, "intermediate_size": 64, "num_hidden_layers": 3}
    manager = make_run(folder, Degrees(), 1, config=wider, files={"config.json": '{"hidden_size": 48}'})[2]
    with pytest.raises(CheckpointError) as caught:
        manager.load()
    return str(caught.value)


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_named_with_the_difference(tmp_path):
    text = single(load_into_another_model, tmp_path)
    assert "model.model.layers.0.mlp.gate_proj.weight is [48, 32] there and [64, 32] here" in text
    assert "not in the checkpoint" in text and "layers.2" in text
    assert "hidden_size = 32 (here 48)" in text


def load_missing_step(rank, folder):
    save_two_checkpoints(rank, folder)
    with pytest.raises(CheckpointError) as caught:
        make_run(folder, Degrees(), 1)[2].load(7)
    return str(caught.value)


@pytest.mark.distributed
def test_a_missing_step_is_refused_with_the_steps_there_are(tmp_path):
    assert "Steps there: 1, 2" in single(load_missing_step, tmp_path)


def start_from_weights(rank, folder):
    other = Path(folder) / "other"
    save_two_checkpoints(rank, other)
    first = make_run(other, Degrees(), 1)
    first[2].load(2)
    step, cursor, manager = make_run(folder, Degrees(), 1, initial_load_path=str(other / "checkpoint" / "step-2"))
    begun = manager.load()
    same = all(torch.equal(a, b) for a, b in zip(first[0].model.parameters(), step.model.parameters()))
    return same, cursor.entries["shard_0"]["at"], begun


@pytest.mark.distributed
def test_a_new_run_can_start_from_the_weights_of_another(tmp_path):
    assert single(start_from_weights, tmp_path) == (True, 0, None)
    shutil.rmtree(tmp_path)
