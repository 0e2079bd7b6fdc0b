"""The training loop: build what a job names, resume, step, log, validate, save, finish."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flame.checkpoint import CheckpointManager, storage
from flame.checkpoint.convert import TOKENIZER_FILES, name_special_tokens
from flame.config import JobConfig, model_values, to_toml
from flame.data import Batch, Parts, Tokenizer, build_loader, build_validation_loader, load_tokenizer
from flame.data.build import global_batch_size, microbatch_rows
from flame.errors import CheckpointError
from flame.evaluation.generate import Sampling, generate_text
from flame.graphed import GraphedStep
from flame.metrics import MetricsLogger, Profiler, Throughput, source_figures
from flame.models.config import ModelConfig
from flame.models.hf import DTYPES, export_model
from flame.models.registry import resolve_config
from flame.optim.build import build_optimizer
from flame.optim.groups import describe_groups
from flame.parallel.agreement import Agreement, StopRequest
from flame.parallel.distributed import World, set_timeouts
from flame.parallel.fsdp import reshard
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.parallel.pipeline import build_pipeline
from flame.progress import Progress, RandomState
from flame.runtime import GarbageCollection, make_deterministic, seed_everything, writable_folder
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
        self.folder = writable_folder(Path(job.job.dump_folder))
        self.mesh = build_mesh(degrees_of(job), world.device.type, world.size)
        make_deterministic(job.debug.deterministic)
        seed_everything(job.debug.seed, world.rank)

        rank, size = self.mesh.data_rank, self.mesh.data_size
        self.rows_per_step = global_batch_size(job, size)
        self.tokens_per_step = self.rows_per_step * job.training.seq_len
        self.tokenizer = load_tokenizer(job)
        self.loader = build_loader(job, self.tokenizer, rank, size)
        self.batches = iter(self.loader)
        self.config = model_config(job, self.tokenizer)
        build = build_pipeline if self.mesh.degrees.pp > 1 else build_sharded_model
        self.model: Any = build(self.config, job, self.mesh, world.device)
        self.optimizer = build_optimizer(job, self.model)
        self.guard = FiniteGuard(job.training.nan_policy, world.device, job.training.max_skipped_steps)
        options = StepOptions(job.training.max_norm, job.parallelism.reduce_each_microbatch)
        step = TrainStep(self.model, self.optimizer, self.guard, self.mesh.loss_group, options)
        self.step = GraphedStep(step, world.device) if job.compile.cuda_graph else step
        self.validator = self.build_validator()

        self.progress = Progress()
        self.checkpoints = self.build_checkpoints()
        flops, dtype = self.model.flops_per_token(job.training.seq_len), DTYPES[job.training.mixed_precision_param]
        self.throughput = Throughput(flops, world.size, world.device, dtype)
        self.agreement = Agreement(world.control, 2)
        self.stop_request = StopRequest()
        self.stopped = False
        self.rollbacks = self.skipped = 0
        self.saved_at = time.monotonic()

    def build_validator(self) -> Validator | None:
        loader = build_validation_loader(self.job, self.tokenizer, self.mesh.data_rank, self.mesh.data_size)
        if loader is None:
            return None
        batches = loader if self.mesh.degrees.cp == 1 else Parts(loader, self.mesh.group("cp"))
        return Validator(self.model, batches, token_bytes(self.tokenizer), self.world.device, self.mesh.loss_group)

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
        files = {"config.json": json.dumps(self.config.to_dict(), indent=2), "job.toml": to_toml(self.job)}
        return CheckpointManager(self.job.checkpoint, self.folder, states, {**files, **self.tokenizer.files()})

    def train(self) -> None:
        """Run to the last step of the job, or until asked to stop; either way the state is saved."""
        self.announce()
        self.resume()
        if self.job.checkpoint.create_seed_checkpoint:
            self.save()
            self.stopped = True
        garbage = GarbageCollection(self.job.training.gc_freq)
        with Profiler(self.job.profiling, self.folder, self.world.rank, self.world.device) as profiler:
            while self.progress.step < self.job.training.steps and not self.stopped:
                try:
                    self.after_step(self.train_step())
                except NonFiniteStep as error:
                    self.roll_back(error)
                garbage.collect_if_due(self.progress.step)
                profiler.step()
        garbage.stop()
        self.finish()

    def train_step(self) -> StepResult | None:
        """One global step; None when its data is to be left out. Nothing in here waits for the device."""
        step = self.progress.step + 1
        self.agreement.begin([self.stop_request.received, self.save_is_due_by_time()])
        batches = self.next_batches()
        result = None
        if step not in self.progress.left_out:
            result = self.step(batches, step)
        self.progress.step = step
        self.progress.tokens += self.tokens_per_step
        self.metrics.step_done(step, self.tokens_per_step)
        return result

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of one step, on its device."""
        count = self.rows_per_step // (microbatch_rows(self.job) * self.mesh.data_size)
        with self.throughput.waiting_for_data():
            batches = [next(self.batches) for _ in range(count)]
        if self.mesh.degrees.cp > 1:
            batches = [batch.part(self.mesh.group("cp")) for batch in batches]
        return [batch.to(self.world.device, non_blocking=True) for batch in batches]

    def after_step(self, result: StepResult | None) -> None:
        """What happens between steps: log, validate, save, and learn whether to stop."""
        step, steps = self.progress.step, self.job.training.steps
        stop, by_time = self.agreement.result()
        if step == self.first_step:
            self.expect_speed(True)
        if result is not None and (step % self.job.metrics.log_freq == 0 or step in (self.first_step, steps)):
            self.log(result)
        if self.validator is not None and (step % self.job.validation.freq == 0 or step == steps):
            self.validate()
        self.stopped = stop and step < steps
        if self.job.generation.freq and step % self.job.generation.freq == 0 and step < steps:
            self.sample()
        if stop or by_time or step == steps or self.save_is_due(step):
            self.save()

    def resume(self) -> None:
        """Continue from a checkpoint of this run, else start from the weights that the job names, else from new ones."""
        loaded = self.checkpoints.load(self.job.checkpoint.load_step)
        if loaded is not None:
            self.refuse_other_tokenizer(loaded)
            logger.info("Resumed from step %d, after %s tokens.", loaded, f"{self.progress.tokens:,}")
            if loaded > self.job.training.steps:
                logger.warning(
                    "The checkpoint is beyond training.steps = %d: nothing is left to train. Raise training.steps to go on, "
                    "or name another job.dump_folder to start anew.",
                    self.job.training.steps,
                )
        self.first_step = self.progress.step + 1
        done, config = self.progress.step, asdict(self.job)
        self.metrics = MetricsLogger(self.job, self.folder, self.throughput, done, self.world.is_main, config)
        if self.validator is not None and not self.progress.first_validation:
            self.validate()

    def refuse_other_tokenizer(self, step: int) -> None:
        """Raise CheckpointError where the run that is continued gave its ids another meaning."""
        folder, section = storage.step_folder(self.checkpoints.root, step), self.job.checkpoint
        if step == 0 or "dataloader" in section.exclude_from_loading or not (folder / TOKENIZER_FILES[0]).is_file():
            return
        if Tokenizer.load(folder).fingerprint != self.tokenizer.fingerprint:
            raise CheckpointError(
                f"{folder} was trained with another tokenizer than model.tokenizer_path = "
                f"{self.job.model.tokenizer_path!r}. To continue it, name that folder, which has a copy, as "
                f'model.tokenizer_path; to change tokenizers on purpose, checkpoint.exclude_from_loading = ["dataloader"].'
            )

    def save_is_due(self, step: int) -> bool:
        """Whether the interval in steps asks for a checkpoint."""
        section = self.job.checkpoint
        first = section.enable_first_step_checkpoint and step == 1
        return first or (section.interval > 0 and step % section.interval == 0)

    def save_is_due_by_time(self) -> bool:
        """Whether this rank's clock asks for a checkpoint; all ranks follow the first one that does."""
        minutes = self.job.checkpoint.interval_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def save(self) -> None:
        """Save a checkpoint, if the job wants any, of weights that are known to be good.

        Raises:
            CheckpointError: the last checkpoint of the run, or of this process, could not be saved.
        """
        self.guard.check()
        if not self.job.checkpoint.enable:
            return
        saved = self.checkpoints.save(self.progress.step, last=self.progress.step == self.job.training.steps)
        self.saved_at = time.monotonic()
        self.throughput.restart()
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
        loaded = self.checkpoints.load()
        if loaded is None:
            raise NonFiniteStep(error.step, f"{error} There is no checkpoint to go back to.") from error
        self.metrics.rewind(loaded)
        self.guard.reset()
        self.optimizer.zero_grad()
        logger.warning("step %d was not finite: back at step %d, that step's data will be left out", error.step, loaded)

    def log(self, result: StepResult) -> None:
        """Read the figures of a step (this waits for the device) and write them down."""
        skipped = self.guard.check()
        figures = torch.stack([result.loss, result.grad_norm.to(result.loss), result.learning_rate.to(result.loss)])
        loss, norm, lr = figures.tolist()
        counts = {"tokens": self.progress.tokens, "skipped_steps": skipped}
        sources = source_figures(self.loader.progress(), self.world.device, self.mesh.data_group)
        self.metrics.log(self.progress.step, {"loss": loss, "grad_norm": norm, "lr": lr, **counts, **sources})
        if skipped > self.skipped and self.guard.policy == "skip":
            logger.warning("%d updates dropped so far: their loss or gradient was not finite.", skipped)
        self.skipped = skipped

    def validate(self) -> None:
        """Evaluate on held-out data and remember the first and the latest figures."""
        assert self.validator is not None
        self.expect_speed(False)  # the first one compiles the forward anew
        result = self.validator()
        self.expect_speed(self.progress.step >= self.first_step)
        figures = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        self.progress.first_validation = self.progress.first_validation or figures
        self.progress.last_validation = figures
        self.metrics.write(self.progress.step, {f"validation/{name}": value for name, value in figures.items()})
        logger.info("step: %5d  validation: %s", self.progress.step, result)
        self.throughput.restart()

    def expect_speed(self, running: bool) -> None:
        """Once compiled and running, a collective that does not come back soon is a lost rank; elsewhere it may be slow."""
        comm = self.job.comm
        seconds = comm.train_timeout_seconds if running else comm.init_timeout_seconds
        set_timeouts(seconds, self.mesh.groups())

    def finish(self) -> None:
        """Wait for the last checkpoint; at the end of the job, export the model, sample from it and say how it went."""
        self.checkpoints.close()
        self.loader.close()
        self.stop_request.restore()
        self.metrics.close()
        if self.stopped:
            logger.info("Stopped after step %d. The same command continues from there.", self.progress.step)
            return
        self.expect_speed(False)
        if self.job.checkpoint.last_save_in_hf:
            self.export()
        self.sample()
        if self.progress.first_validation:
            logger.info("Validation loss: %s", compare(self.progress.first_validation, self.progress.last_validation))

    def sample(self) -> None:
        """Continue the job's prompts with the weights as they are, on all ranks together."""
        section = self.job.generation
        sampling = Sampling(section.max_new_tokens, section.temperature, seed=self.job.debug.seed)
        for prompt in section.prompts:
            # Decoding compiles badly: every length would be a new shape.
            with torch.compiler.set_stance("force_eager"):
                text = generate_text(self.model, self.tokenizer, prompt, sampling)
            logger.info("Sample: %s", text)
        reshard(self.model)
        self.throughput.restart()

    def export(self) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
        folder = self.folder / "hf"
        export_model(self.model, folder, DTYPES[self.job.checkpoint.export_dtype])
        if self.world.is_main:
            self.tokenizer.save(folder)
            name_special_tokens(folder)
            logger.info("Exported to %s.", folder)

    def announce(self) -> None:
        """Say what is about to be trained: the resolved job, the mesh, the model, the parameter groups."""
        if self.job.job.print_config:
            logger.info("Resolved job:\n%s", to_toml(self.job))
        tokens, device = self.rows_per_step * self.job.training.seq_len, self.world.device
        logger.info("%d processes on %s: %s", self.world.size, device.type, self.mesh.degrees)
        size = f"{self.model.parameter_count:,}"
        logger.info("%s with %s parameters, %s tokens a step", self.config.model_type, size, f"{tokens:,}")
        groups = [group for rule in self.optimizer.rules.values() for group in rule.groups]
        logger.info("Parameter groups:\n%s", describe_groups(groups, self.job.optimizer.lr))


def compare(first: dict[str, float], last: dict[str, float]) -> str:
    """First and last validation figures in one line."""
    texts = [f"{each['loss']:.4f} nats/token, {each['bits_per_byte']:.4f} bits/byte" for each in (first, last)]
    return f"{texts[0]} at first, {texts[1]} at last"


def model_config(job: JobConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model of a job, which must have an embedding for every token.

    Raises:
        DataError: the tokenizer has more ids than the model.
    """
    config = resolve_config(model_values(job, tokenizer.vocab_size))
    tokenizer.check_fits(config.vocab_size)
    return config
