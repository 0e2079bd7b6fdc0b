"""Killed, stopped or poisoned, a job ends where an undisturbed one does, or says why not."""

import random
import signal

import pytest
import torch
from jobs import Run, write_job
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flame.data import Tokenizer

pytestmark = pytest.mark.distributed


def final_weights(folder):
    """Everything that the last checkpoint holds as tensors: weights, moments, counts."""
    dcp_to_torch_save(folder / "run/checkpoint/step-12", folder / "weights.pt")
    return torch.load(folder / "weights.pt")


def finished(folder, world_size, *overrides, prepare=None):
    """Final weights and log of a job run to its end."""
    run = Run(folder, [folder / "job.toml", *overrides], world_size, prepare)
    assert run.wait() == [0] * world_size, run.text()
    return final_weights(folder), run.text()


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Final weights by number of ranks."""
    folders = {world_size: tmp_path_factory.mktemp(f"undisturbed_{world_size}") for world_size in (1, 2)}
    for folder in folders.values():
        write_job(folder)
    return {world_size: finished(folder, world_size)[0] for world_size, folder in folders.items()}


@pytest.mark.parametrize("world_size, victims", [(1, [0]), (2, [1]), pytest.param(2, [0, 1], marks=pytest.mark.slow)])
def test_a_killed_job_continues_to_bitwise_the_same_weights(world_size, victims, undisturbed, tmp_path):
    job = write_job(tmp_path)
    step = random.Random(f"{world_size}{victims}").randrange(5, 12)
    run = Run(tmp_path, [job], world_size)
    run.wait_for(f"step: {step:5} ")
    run.kill(victims)
    codes = run.wait()
    assert all(codes[rank] == -signal.SIGKILL for rank in victims) and all(codes)
    weights, log = finished(tmp_path, world_size)
    assert "Resumed from step" in log and "step:     1  loss" not in log
    assert_bitwise(weights, undisturbed[world_size])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_and_exits_zero(number, undisturbed, tmp_path):
    job = write_job(tmp_path)
    run = Run(tmp_path, [job], 2)
    run.wait_for("step:     6 ")
    run.kill([1], number)
    assert run.wait() == [0, 0]
    assert "step:    12 " not in run.text()
    weights, log = finished(tmp_path, 2)
    assert "Resumed from step" in log and "step:     6  loss" not in log
    assert_bitwise(weights, undisturbed[2])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_job_killed_while_saving_in_the_background_continues_bitwise(mode, undisturbed, tmp_path):
    job = write_job(tmp_path)
    run = Run(tmp_path, [job, "--checkpoint.async_mode", mode, "--checkpoint.interval", "2"], 2)
    run.wait_for("step:     9 ")
    run.kill()
    run.wait()
    weights, log = finished(tmp_path, 2, "--checkpoint.async_mode", mode, "--checkpoint.interval", "2")
    assert "Resumed from step" in log
    assert_bitwise(weights, undisturbed[2])


def test_a_job_continues_on_another_number_of_ranks(undisturbed, tmp_path):
    write_job(tmp_path)
    run = Run(tmp_path, [tmp_path / "job.toml"], 1)
    run.wait_for("step:     6 ")
    run.kill([0], signal.SIGTERM)
    assert run.wait() == [0]
    weights, log = finished(tmp_path, 2)
    assert "Resumed from step" in log
    for name, expected in undisturbed[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_job_shorter_than_its_checkpoint_says_that_nothing_is_left(tmp_path):
    job = write_job(tmp_path)
    short = [job, "--validation.enable", "false", "--lr_scheduler.warmup_steps", "0", "--checkpoint.interval", "0"]
    for steps, warned in ((2, False), (2, False), (1, True)):
        run = Run(tmp_path, [*short, "--training.steps", steps])
        assert run.wait() == [0], run.text()
        assert ("beyond training.steps = 1: nothing is left to train" in run.text()) == warned


def test_a_run_is_not_continued_with_another_tokenizer_unless_told_to(tmp_path):
    job = write_job(tmp_path)
    Tokenizer.train(["abc"], 258).save(tmp_path / "other")
    short = [job, "--validation.enable", "false", "--lr_scheduler.warmup_steps", "0", "--checkpoint.interval", "1"]
    assert Run(tmp_path, [*short, "--training.steps", 2]).wait() == [0]
    other = [*short, "--training.steps", 3, "--model.tokenizer_path", tmp_path / "other"]
    refused = Run(tmp_path, other)
    assert refused.wait() == [1]
    assert "step-2 was trained with another tokenizer" in refused.text()
    meant = Run(tmp_path, [*other, "--checkpoint.exclude_from_loading", "dataloader"])
    assert meant.wait() == [0] and "Resumed from step 2" in meant.text()


def test_checkpoints_follow_the_clock(tmp_path):
    job = write_job(tmp_path)
    run = Run(tmp_path, [job, "--checkpoint.interval", "0", "--checkpoint.interval_minutes", "0.000001"], 2)
    assert run.wait() == [0, 0], run.text()
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoint").glob("step-*")}
    assert len(steps) > 5  # one nearly every step


@pytest.mark.slow
def test_a_seed_checkpoint_starts_another_run_with_its_weights(undisturbed, tmp_path):
    job = write_job(tmp_path)
    assert Run(tmp_path, [job, "--checkpoint.create_seed_checkpoint", "true", "--debug.seed", "7"]).wait() == [0]
    seed = tmp_path / "run/checkpoint/step-0"
    again = Run(tmp_path, [job, "--debug.seed", "7", "--job.dump_folder", str(tmp_path / "run")])
    assert again.wait() == [0] and "Resumed from step 0" in again.text()
    other = Run(
        tmp_path, [job, "--job.dump_folder", str(tmp_path / "other"), "--checkpoint.initial_load_path", str(seed)]
    )
    assert other.wait() == [0]
    assert "Resumed" not in other.text() and "Validation loss" in other.text()


def poison_step_7(rank):
    """In every attempt at step 7, the loss of rank 1 is NaN."""
    from flame.step import TrainStep

    step, forward_backward = TrainStep.__call__, TrainStep.forward_backward

    def call(self, batches, number):
        self.number = number
        return step(self, batches, number)

    def poisoned(self, batch, tokens):
        bad = rank == 1 and self.number == 7
        return forward_backward(self, batch, tokens * float("nan") if bad else tokens)

    TrainStep.__call__, TrainStep.forward_backward = call, poisoned


def test_stop_ends_the_run_with_a_clear_message_and_good_checkpoints(undisturbed, tmp_path):
    job = write_job(tmp_path)
    run = Run(tmp_path, [job], 2, poison_step_7)
    assert run.wait() == [1, 1]
    assert "error: step 7: the loss or a gradient is not finite" in run.text() and "Traceback" not in run.text()
    weights, log = finished(tmp_path, 2)  # without the fault, from the checkpoint of step 4
    assert "Resumed from step 4" in log
    assert_bitwise(weights, undisturbed[2])


@pytest.mark.slow
def test_rollback_returns_to_the_checkpoint_and_leaves_the_step_out(tmp_path):
    write_job(tmp_path)
    weights, log = finished(tmp_path, 2, "--training.nan_policy", "rollback", prepare=poison_step_7)
    assert "back at step 4" in log and log.count("step:     6  loss") == 2 and "step:    12  loss" in log
    assert weights["lr_scheduler.updates"] == 11
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.slow
def test_skip_drops_the_step_like_rollback_does(tmp_path):
    rolled, skipped = tmp_path / "rolled", tmp_path / "skipped"
    results = []
    for folder, policy in [(rolled, "rollback"), (skipped, "skip")]:
        folder.mkdir()
        write_job(folder)
        results.append(finished(folder, 2, "--training.nan_policy", policy, prepare=poison_step_7))
    assert_bitwise(results[0][0], results[1][0])
    assert "1 updates dropped so far" in results[1][1]


@pytest.mark.slow
def test_rollback_without_a_checkpoint_is_an_error(tmp_path):
    job = write_job(tmp_path)
    run = Run(tmp_path, [job, "--training.nan_policy", "rollback", "--checkpoint.interval", "0"], 2, poison_step_7)
    assert run.wait() == [1, 1]
    assert "There is no checkpoint to go back to" in run.text()
