"""Spellings of flame (fla-org) and torchtitan job files that have another name here, or none any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RENAMED = {
    "job.print_args": "job.print_config",
    "debug.print_config": "job.print_config",
    "model.hf_assets_path": "model.tokenizer_path",
    "training.batch_size": "training.local_batch_size",
    "training.dataset_path": "training.dataset",
    "training.skip_nan_inf": "training.nan_policy",
    "training.num_workers": "training.dataloader.num_workers",
    "training.prefetch_factor": "training.dataloader.prefetch_factor",
    "training.pin_memory": "training.dataloader.pin_memory",
    "training.persistent_workers": "training.dataloader.persistent_workers",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.compile": "compile.enable",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.fsdp_reshard_after_forward": "parallelism.fsdp_reshard_after_forward",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "model.converters": "float8.enable",
    "quantize.linear.float8.recipe_name": "float8.recipe_name",
    "quantize.linear.float8.filter_fqns": "float8.filter_fqns",
    "quantize.linear.float8.emulate": "float8.emulate",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "validation.dataset_path": "validation.dataset",
}

FLOAT8_CONVERTERS = {"": False, "float8": True, "quantize.linear.float8": True}

# Old keys whose value is written differently too.
CONVERTED: dict[str, Callable[[Any], Any]] = {
    "model.converters": lambda names: FLOAT8_CONVERTERS.get(str(names).strip("[]'"), names),
    "training.skip_nan_inf": lambda value: {True: "skip", False: "stop"}[value] if isinstance(value, bool) else value,
}

ANYTHING = object()
"""Stands for every value."""


@dataclass(frozen=True)
class Retired:
    """An old key without a counterpart.

    Attributes:
        harmless: values that ask for nothing; `ANYTHING` if no value changes what is computed. A file with such a value
            opens, with a warning.
        advice: what to do instead.
    """

    harmless: tuple[Any, ...]
    advice: str

    def accepts(self, value: Any) -> bool:
        return any(option is ANYTHING or (type(option) is type(value) and option == value) for option in self.harmless)


_OFF: tuple[Any, ...] = (False, "", "none", "None", 0)
_EMPTY: tuple[Any, ...] = (*_OFF, [])
_REMOVE = "it does nothing; remove the line"
_GATHERED = "weights are gathered in bfloat16; remove the line"
_NO_FT = "use torchrun's restarts; a restarted run resumes from its newest checkpoint"

# A key, or `section.*` for what is left of a section.
RETIRED = {
    "job.config_file": Retired((ANYTHING,), "the job file is given on the command line; remove the line"),
    "job.use_for_integration_test": Retired((ANYTHING,), _REMOVE),
    "job.save_config_file": Retired((ANYTHING,), "the resolved config is always saved with the run; remove the line"),
    "job.custom_config_module": Retired(_OFF, "sections are fixed; remove the line"),
    "model.name": Retired((ANYTHING,), "the architecture is model.model_type; remove the line"),
    "model.flavor": Retired((), "give the shape as model.config or as keys of [model]"),
    "model.print_after_conversion": Retired((ANYTHING,), _REMOVE),
    "optimizer.early_step_in_backward": Retired(_OFF, "it cannot be combined with clipping; remove the line"),
    "training.dtype": Retired(("float32",), "sharded parameters are float32; see training.mixed_precision_param"),
    "training.gc_debug": Retired(_OFF, _REMOVE),
    "training.num_tokens_per_train_step": Retired((-1,), "use training.global_batch_size, in sequences"),
    "training.disable_loss_parallel": Retired((ANYTHING,), "the loss is always computed on vocabulary shards"),
    "parallelism.disable_loss_parallel": Retired((ANYTHING,), "the loss is always computed on vocabulary shards"),
    "parallelism.enable_async_tensor_parallel": Retired(_OFF, "it is not available; remove the line"),
    "parallelism.enable_sequence_parallel": Retired((True,), "norms are always sequence parallel under TP"),
    "parallelism.pipeline_parallel_schedule_csv": Retired(
        _OFF, "name a schedule: parallelism.pipeline_parallel_schedule"
    ),
    "parallelism.pipeline_parallel_layers_per_stage": Retired(_OFF, "stages are split by the cost of their layers"),
    "parallelism.pipeline_parallel_first_stage_less_layers": Retired((ANYTHING,), "stages are split by cost"),
    "parallelism.pipeline_parallel_last_stage_less_layers": Retired((ANYTHING,), "stages are split by cost"),
    "parallelism.module_fqns_per_model_part": Retired(_EMPTY, "stages are split by the cost of their layers"),
    "parallelism.context_parallel_load_balancer": Retired((ANYTHING,), _REMOVE),
    "parallelism.context_parallel_rotate_method": Retired((ANYTHING,), _REMOVE),
    "parallelism.expert_parallel_degree": Retired((1,), "there is no expert parallelism"),
    "parallelism.expert_tensor_parallel_degree": Retired((1,), "there is no expert parallelism"),
    "parallelism.expert_parallel_comm_backend": Retired((ANYTHING,), _REMOVE),
    "checkpoint.interval_type": Retired(
        (), "no flame ever read it. Remove the line: checkpoint.interval counts steps, interval_minutes minutes"
    ),
    "checkpoint.model_weights_only": Retired(
        (), "no flame ever read it. Remove the line, or say checkpoint.last_save_model_only for the last checkpoint"
    ),
    "checkpoint.initial_load_in_hf_quantized": Retired(_OFF, "quantized weights cannot be loaded"),
    "checkpoint.load_only": Retired(_OFF, "to load without saving, use checkpoint.initial_load_path"),
    "checkpoint.enable_ft_dataloader_checkpoints": Retired((ANYTHING,), _REMOVE),
    "activation_offload.*": Retired(_OFF, "activations cannot be offloaded; use activation_checkpoint.mode"),
    "compile.components": Retired((ANYTHING,), "blocks are compiled and the loss has its own kernel; remove the line"),
    "float8.enable_fsdp_float8_all_gather": Retired((ANYTHING,), _GATHERED),
    "float8.precompute_float8_dynamic_scale_for_fsdp": Retired((ANYTHING,), _GATHERED),
    "float8.force_recompute_fp8_weight_in_bwd": Retired((ANYTHING,), _REMOVE),
    "quantize.linear.float8.enable_fsdp_float8_all_gather": Retired((ANYTHING,), _GATHERED),
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": Retired((ANYTHING,), _GATHERED),
    "quantize.*": Retired(_EMPTY, "float8 for linear layers is the section [float8]; there is no other"),
    "memory_estimation.enabled": Retired(_OFF, "run `flame plan JOB.toml`"),
    "memory_estimation.*": Retired((ANYTHING,), "run `flame plan JOB.toml`"),
    "fault_tolerance.enable": Retired(_OFF, _NO_FT),
    "fault_tolerance.*": Retired((ANYTHING,), _NO_FT),
    "comm.mode": Retired(("default",), "to see a job without its ranks, run `flame plan JOB.toml --world-size N`"),
    "comm.save_traces_folder": Retired((ANYTHING,), _REMOVE),
    "comm.save_traces_file_prefix": Retired((ANYTHING,), _REMOVE),
    "validation.dataloader.*": Retired((ANYTHING,), _REMOVE),
    "debug.deterministic_warn_only": Retired(_OFF, _REMOVE),
    "debug.moe_force_load_balance": Retired(_OFF, _REMOVE),
    "experimental.enable_async_tensor_parallel": Retired(_OFF, "it is not available; remove the line"),
    "experimental.pipeline_parallel_split_points": Retired(_EMPTY, "stages are split by the cost of their layers"),
    "experimental.pipeline_parallel_schedule_csv": Retired(
        _OFF, "name a schedule: parallelism.pipeline_parallel_schedule"
    ),
    "experimental.pipeline_parallel_microbatches": Retired(_OFF, "use parallelism.pipeline_parallel_microbatch_size"),
    "experimental.enable_compiled_autograd": Retired(_OFF, "it is not available; remove the line"),
    "experimental.context_parallel_rotate_method": Retired((ANYTHING,), _REMOVE),
    "experimental.custom_model_path": Retired(_OFF, "add a mixer file to flame/models/mixers instead"),
    "experimental.custom_import": Retired(_OFF, "add a mixer file to flame/models/mixers instead"),
    "experimental.custom_args_module": Retired(_OFF, "sections are fixed; remove the line"),
}

for _key in (
    "per_op_sac_force_recompute_mm_shapes_by_fqns",
    "early_stop",
    "memory_budget",
    "visualize_memory_budget_pareto",
    "preserve_rng_state",
    "determinism_check",
    "debug",
):
    RETIRED[f"activation_checkpoint.{_key}"] = Retired((ANYTHING,), _REMOVE)


def retired(key: str) -> Retired | None:
    """The entry for a dotted key, or for the rest of its section."""
    if key in RETIRED:
        return RETIRED[key]
    parts = key.split(".")
    patterns = (".".join([*parts[:length], "*"]) for length in range(len(parts) - 1, 0, -1))
    return next((RETIRED[pattern] for pattern in patterns if pattern in RETIRED), None)
