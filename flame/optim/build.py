"""The optimizer and schedule of a job."""

from __future__ import annotations

from flame.config.sections import JobConfig
from flame.models.decoder import CausalLM
from flame.optim.adamw import AdamW, AdamWOptions
from flame.optim.clipping import local
from flame.optim.groups import parameter_groups, split_matrices
from flame.optim.muon import Muon, MuonOptions
from flame.optim.optimizer import Optimizer, UpdateRule
from flame.optim.schedules import LearningRate, Schedule


def build_schedule(job: JobConfig) -> Schedule:
    """The schedule of `[lr_scheduler]`, over `total_steps` or else the steps of the job."""
    section = job.lr_scheduler
    return Schedule(
        total_steps=job.training.steps if section.total_steps is None else section.total_steps,
        warmup_steps=section.warmup_steps,
        decay_ratio=section.decay_ratio,
        decay_type=section.decay_type,
        min_lr_factor=section.min_lr_factor,
    )


def build_optimizer(job: JobConfig, model: CausalLM) -> Optimizer:
    """The optimizer of `[optimizer]` over the trainable parameters of `model`, already on their device."""
    section = job.optimizer
    groups = parameter_groups(model, section.weight_decay)
    rules: dict[str, UpdateRule] = {}
    if section.name == "Muon":
        matrices, groups = split_matrices(groups, [f"{model.backbone_name}.layers."])
        if matrices:
            rules["muon"] = Muon(matrices, MuonOptions(momentum=section.momentum))
    options = AdamWOptions(section.beta1, section.beta2, section.eps, section.implementation)
    rules["adamw"] = AdamW(groups, options)
    device = local(next(model.parameters())).device
    return Optimizer(rules, LearningRate(build_schedule(job), section.lr, device))
