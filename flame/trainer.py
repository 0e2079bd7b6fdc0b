"""The training loop: build what a job names, resume, step, log, validate, save, finish."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from flame.checkpoint import CheckpointManager
from flame.config.sections import JobConfig
from flame.data import Batch, Tokenizer, build_loader, build_validation_loader, load_tokenizer
from flame.data.build import global_batch_size
from flame.errors import CheckpointError
from flame.models.config import ModelConfig
from flame.models.registry import resolve_config
from flame.optim.build import build_optimizer
from flame.parallel.agreement import Agreement, StopRequest
from flame.parallel.distributed import World, set_timeouts
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.progress import Progress, RandomState
from flame.runtime import GarbageCollection, make_deterministic, seed_everything
from flame.step import FiniteGuard, NonFiniteStep, StepOptions, StepResult, TrainStep
from flame.validate import Validator, token_bytes

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 10  # of one process; if that many do not help, the trouble is not a few bad batches


class Trainer:
    """One job on this rank, from its start or its latest checkpoint to its last step.

    Args:
        job: the resolved configuration.
        world: this process among the others (`flame.parallel.distributed.initialize`).
    """

    def __init__(self, job: JobConfig, world: World) -> None:
        self.job, self.world = job, world
        self.folder = Path(job.job.dump_folder)
        self.mesh = build_mesh(degrees_of(job), world.device.type, world.size)
        make_deterministic(job.debug.deterministic)
        seed_everything(job.debug.seed, world.rank)

        rank, size = self.mesh.data_rank, self.mesh.data_size
        self.rows_per_step = global_batch_size(job, size)
        self.tokenizer = load_tokenizer(job)
        self.loader = build_loader(job, self.tokenizer, rank, size)
        self.batches = iter(self.loader)
        self.config = model_config(job, self.tokenizer)
        self.model = build_sharded_model(self.config, job, self.mesh, world.device)
        self.optimizer = build_optimizer(job, self.model)
        self.guard = FiniteGuard(job.training.nan_policy, world.device, job.training.max_skipped_steps)
        options = StepOptions(job.training.max_norm, job.parallelism.reduce_each_microbatch)
        self.step = TrainStep(self.model, self.optimizer, self.guard, self.mesh.data_group, options)
        self.validator = self.build_validator()

        self.progress = Progress()
        self.checkpoints = self.build_checkpoints() if job.checkpoint.enable else None
        self.agreement = Agreement(world.control, 2)
        self.stop_request = StopRequest()
        self.stopped = False
        self.rollbacks = 0

    def build_validator(self) -> Validator | None:
        batches = build_validation_loader(self.job, self.tokenizer, self.mesh.data_rank, self.mesh.data_size)
        if batches is None:
            return None
        return Validator(self.model, batches, token_bytes(self.tokenizer), self.world.device, self.mesh.data_group)

    def build_checkpoints(self) -> CheckpointManager:
        """Everything that resuming exactly takes, under the names that checkpoint.exclude_from_loading knows."""
        states = {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.optimizer.rate,
            "dataloader": self.loader,
            "train_state": self.progress,
            "random": RandomState(self.world.rank),
        }
        files = {"config.json": json.dumps(self.config.to_dict(), indent=2)}
        return CheckpointManager(self.job.checkpoint, self.folder, states, files)

    def train(self) -> None:
        """Run to the last step of the job, or until asked to stop; either way the state is saved."""
        self.resume()
        garbage = GarbageCollection(self.job.training.gc_freq)
        while self.progress.step < self.job.training.steps and not self.stopped:
            try:
                self.after_step(self.train_step())
            except NonFiniteStep as error:
                self.roll_back(error)
            garbage.collect_if_due(self.progress.step)
        garbage.stop()
        self.finish()

    def train_step(self) -> StepResult | None:
        """One global step; None when its data is to be left out. Nothing in here waits for the device."""
        step = self.progress.step + 1
        save_by_time = self.checkpoints is not None and self.checkpoints.is_due_by_time()
        self.agreement.begin([self.stop_request.received, save_by_time])
        batches = self.next_batches()
        result = None
        if step not in self.progress.left_out:
            result = self.step(batches, step)
        self.progress.step = step
        self.progress.tokens += self.rows_per_step * self.job.training.seq_len
        return result

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of one step, on its device."""
        count = self.rows_per_step // (self.job.training.local_batch_size * self.mesh.data_size)
        batches = [next(self.batches) for _ in range(count)]
        return [batch.to(self.world.device, non_blocking=True) for batch in batches]

    def after_step(self, result: StepResult | None) -> None:
        """What happens between steps: log, validate, save, and learn whether to stop."""
        step, steps = self.progress.step, self.job.training.steps
        stop, by_time = self.agreement.result()
        if step == self.first_step:
            self.set_running_timeouts()
        if result is not None and (step % self.job.metrics.log_freq == 0 or step in (self.first_step, steps)):
            self.log(result)
        if self.validator is not None and (step % self.job.validation.freq == 0 or step == steps):
            self.validate()
        self.stopped = stop and step < steps
        if self.checkpoints is not None and (stop or by_time or step == steps or self.checkpoints.is_due(step)):
            self.save(self.checkpoints)

    def resume(self) -> None:
        """Continue from a checkpoint if there is one, else from the initial weights."""
        section = self.job.checkpoint
        loaded = self.checkpoints.load(section.load_step) if self.checkpoints is not None else None
        if loaded is not None:
            logger.info("resumed from step %d, %s tokens", loaded, f"{self.progress.tokens:,}")
        self.first_step = self.progress.step + 1
        if self.validator is not None and not self.progress.first_validation:
            self.validate()

    def save(self, checkpoints: CheckpointManager) -> None:
        """Save a checkpoint of weights that are known to be good.

        Raises:
            CheckpointError: the last checkpoint of the run, or of this process, could not be saved.
        """
        self.guard.check()
        saved = checkpoints.save(self.progress.step, last=self.progress.step == self.job.training.steps)
        if self.stopped and not saved:
            raise CheckpointError("asked to stop, and the state could not be saved; see the messages above.")

    def roll_back(self, error: NonFiniteStep) -> None:
        """Return to the latest checkpoint and mark the bad step to be left out; other policies end the run.

        Raises:
            NonFiniteStep: under another policy, without a checkpoint, or when going back did not help often enough.
        """
        if self.guard.policy != "rollback":
            raise error
        self.rollbacks += 1
        self.progress.left_out.append(error.step)
        if self.rollbacks > MAX_ROLLBACKS:
            raise NonFiniteStep(error.step, f"{error} Going back {MAX_ROLLBACKS} times did not help.") from error
        loaded = self.checkpoints.load() if self.checkpoints is not None else None
        if loaded is None:
            raise NonFiniteStep(error.step, f"{error} There is no checkpoint to go back to.") from error
        self.guard.reset()
        self.optimizer.zero_grad()
        logger.warning("step %d was not finite: back at step %d, that step's data will be left out", error.step, loaded)

    def log(self, result: StepResult) -> None:
        """Read the figures of a step (this waits for the device) and write them down."""
        self.guard.check()
        figures = torch.stack([result.loss, result.grad_norm.to(result.loss), result.learning_rate.to(result.loss)])
        loss, norm, lr = figures.tolist()
        logger.info("step %d loss %.4f grad_norm %.3f lr %.3g", self.progress.step, loss, norm, lr)

    def validate(self) -> None:
        """Evaluate on held-out data and remember the first and the latest figures."""
        assert self.validator is not None
        result = self.validator()
        figures = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        self.progress.first_validation = self.progress.first_validation or figures
        self.progress.last_validation = figures
        logger.info("step %d validation: %s", self.progress.step, result)

    def set_running_timeouts(self) -> None:
        """Once compiled and running, a collective that does not come back is a lost rank."""
        set_timeouts(self.job.comm.train_timeout_seconds, [self.mesh.data_group])

    def finish(self) -> None:
        """Wait for the last checkpoint and stop the data workers."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self.loader.close()
        self.stop_request.restore()


def model_config(job: JobConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model of a job; without a vocab_size of its own it takes the tokenizer's, rounded up to 64.

    Raises:
        DataError: the tokenizer has ids that the model has no embedding for.
    """
    values = dict(job.model.keys)
    values.setdefault("vocab_size", -(-tokenizer.vocab_size // 64) * 64)
    values.setdefault("bos_token_id", tokenizer.bos_id)
    values.setdefault("eos_token_id", tokenizer.eos_id)
    config = resolve_config(values)
    tokenizer.check_fits(config.vocab_size)
    return config
