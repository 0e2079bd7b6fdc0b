"""Every key of a job file: its section, name, type, default and meaning.

The string under a key is its documentation, the only one there is: ``--help`` and docs/config.md are made from it.
Names are those of torchtitan 0.2 where it has the key. A key that may be absent is `| None` and then defaults to None,
because TOML cannot write a null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flame.config.data import Dataloader, Source, Training, Validation


@dataclass
class Job:
    """The run as a whole."""

    dump_folder: str = "exp"
    """Folder of this run. Checkpoints, logs, traces, the resolved config and exports go below it."""

    description: str = ""
    """Free text, written to the log and kept with the run."""

    print_config: bool = True
    """Print the resolved config at the start."""


@dataclass
class Model:
    """The architecture, inline or in a file, and the tokenizer.

    Besides the keys below, this section takes the model's own keys: `model_type`, `hidden_size`, `num_hidden_layers`
    and so on, as they stand in a Hugging Face config.json. With `config` given too, they override single keys of that file.
    A model without a `vocab_size` takes the tokenizer's, rounded up to a multiple of 64.
    """

    config: str | None = None
    """JSON file with the model's keys, or a Hugging Face folder that holds config.json. A relative path is looked up
    from the current folder, then from the job file's."""

    tokenizer_path: str = "bytes"
    """Folder of a tokenizer, a tokenizer.json, a Hugging Face name, `bytes` (one token a byte, no file needed), or
    `train:8192` to train a byte-level BPE of that many tokens on the job's own data once; it is kept in the run's
    folder."""

    keys: dict[str, Any] = field(default_factory=dict)
    """The model's own keys. They are written directly under [model], never as `keys`."""


@dataclass
class Parallelism:
    """How the ranks share the work: pipeline x replicate x shard x context x tensor = number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the model (HSDP, or DDP with a shard degree of 1). They read different data."""

    data_parallel_shard_degree: int = -1
    """Ranks over which FSDP shards parameters, gradients and optimizer state. They read different data. -1: all that
    the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """`default` frees a block's gathered parameters after its forward and keeps the root's; `always` frees those too;
    `never` keeps all until the backward (more memory, less communication)."""

    reduce_each_microbatch: bool = False
    """Reduce gradients after every micro-batch: more communication, and memory for sharded gradients only. Otherwise
    once a step."""

    tensor_parallel_degree: int = 1
    """Ranks over which the heads and widths of every layer are split."""

    pipeline_parallel_degree: int = 1
    """Ranks over which the layers are split into stages."""

    pipeline_parallel_schedule: str = "1F1B"
    """Order of forwards and backwards over the stages, by its name in torch.distributed.pipelining."""

    pipeline_parallel_microbatch_size: int = 1
    """Sequences that travel through the pipeline together; divides local_batch_size."""

    pipeline_parallel_stages_per_rank: int | None = None
    """Runs of layers on each rank, for schedules that take several; absent, 2 for those and 1 for the others."""

    context_parallel_degree: int = 1
    """Ranks over which each sequence is split."""


@dataclass
class Optimizer:
    """The update rule. Norms, biases and what the model's layers name take no weight decay."""

    name: Literal["AdamW", "Muon"] = "AdamW"
    """`AdamW`, or `Muon` for hidden matrices with AdamW for the rest."""

    lr: float = 8e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """How AdamW runs: one kernel for many tensors, one kernel per operation, or tensor by tensor."""

    momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""


@dataclass
class LRScheduler:
    """Learning rate over the run: linear warm-up, a flat part, decay."""

    warmup_steps: int = 200
    """Steps of linear warm-up."""

    total_steps: int | None = None
    """Length of the schedule; absent, it is training.steps."""

    decay_ratio: float | None = None
    """Part of the run, at its end, in which the rate decays; before it the rate stays at its peak (warm-up, stable,
    decay). Absent, it decays from the end of the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = 0.0
    """Rate at the end of the decay, as a fraction of the peak."""


@dataclass
class Checkpoint:
    """Saving, resuming, importing and exporting."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one in the folder when the run starts."""

    folder: str = "checkpoint"
    """Where checkpoints go, below job.dump_folder unless absolute."""

    interval: int = 500
    """Steps between checkpoints; 0 leaves it to interval_minutes and the end of the run."""

    interval_minutes: float | None = None
    """Also save when this many minutes have passed since the last checkpoint."""

    keep_latest_k: int = 10
    """Number of checkpoints to keep; 0 keeps all."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write while training goes on, from a copy in ordinary or in pinned host memory."""

    load_step: int = -1
    """Step to resume from; -1 is the newest complete one."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts of a checkpoint not to load: optimizer, lr_scheduler, dataloader, train_state."""

    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to find out early whether saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0 and end."""

    initial_load_path: str | None = None
    """Checkpoint to start from when the run's own folder has none."""

    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path; otherwise optimizer, schedule and data position too."""

    initial_load_in_hf: bool = False
    """initial_load_path is a Hugging Face folder with safetensors."""

    last_save_model_only: bool = False
    """Save only the weights at the end of the run. Such a checkpoint cannot be resumed."""

    last_save_in_hf: bool = False
    """At the end of the run, write a Hugging Face folder too: safetensors, config.json, tokenizer."""

    export_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """Dtype of weights saved without optimizer state and of the Hugging Face folder."""


@dataclass
class ActivationCheckpoint:
    """Computing activations again in the backward instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """`none` keeps all, `full` keeps block inputs only, `selective` follows selective_ac_option."""

    selective_ac_option: str = "op"
    """`op` keeps the results of matrix products and kernels and recomputes the rest; a number n recomputes every n-th
    block."""


@dataclass
class Compile:
    """torch.compile, by decoder block."""

    enable: bool | Literal["auto"] = "auto"
    """`auto` compiles on a GPU and not on a CPU."""

    backend: str = "inductor"
    """Compiler backend of torch.compile."""

    cuda_graph: bool = False
    """Replay whole training steps from a CUDA graph, so that the host costs nothing: for small models and batches. Needs a
    GPU and rows of one shape (training.varlen = false); the graph keeps the memory of a step for itself."""


@dataclass
class Float8:
    """Matrix products of decoder blocks in float8, by torchao (pip install torchao)."""

    enable: bool = False
    """Multiply in float8 wherever a block's linear layer is wide enough to gain. Weights, gradients and checkpoints keep
    their dtypes."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """Scales by tensor, the fastest; by row, more exact; by row with the weight's gradient in bfloat16, the most exact."""

    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose name contains one of these keep their dtype."""

    emulate: bool = False
    """Round to float8 but multiply in the usual dtype: for machines without float8, slow."""


@dataclass
class Metrics:
    """Logging."""

    log_freq: int = 10
    """Steps between log lines. Only at these does the host wait for the device."""

    enable_tensorboard: bool = False
    """Write TensorBoard files."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, below job.dump_folder."""

    save_for_all_ranks: bool = False
    """Every rank writes its own metrics, not only the first."""

    enable_wandb: bool = False
    """Log to Weights & Biases; needs the wandb package."""

    disable_color_printing: bool = False
    """Plain log lines."""


@dataclass
class Profiling:
    """Traces and memory snapshots."""

    enable_profiling: bool = False
    """Write torch.profiler traces."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, below job.dump_folder."""

    profile_freq: int = 100
    """Steps between traces."""

    profiler_active: int = 1
    """Steps in a trace."""

    profiler_warmup: int = 3
    """Steps run under the profiler before a trace, and thrown away."""

    enable_memory_snapshot: bool = False
    """Write snapshots of the CUDA allocator, at the same steps as traces and when memory runs out."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the snapshots, below job.dump_folder."""


@dataclass
class Generation:
    """Sample text while training, from the weights as they are."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue; none, and nothing is generated."""

    freq: int = 0
    """Steps between samples; 0 samples at the end of the run only."""

    max_new_tokens: int = 64
    """Tokens to generate per prompt."""

    temperature: float = 0.8
    """Divides the logits before sampling; 0 takes the most likely token."""


@dataclass
class Debug:
    """Repeatability."""

    seed: int = 42
    """Seed of initial weights, data order and sampling."""

    deterministic: bool = False
    """Use deterministic algorithms only; slower."""


@dataclass
class Comm:
    """Process groups."""

    init_timeout_seconds: int = 300
    """Timeout of collectives until the first step is done, compilation included."""

    train_timeout_seconds: int = 100
    """Timeout of collectives after the first step."""

    trace_buf_size: int = 20000
    """Collectives that NCCL's flight recorder remembers, to be dumped when one times out; 0 turns it off."""


@dataclass
class JobConfig:
    """A whole job: what a job file and the command line say, defaults filled in."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Float8 = field(default_factory=Float8)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    validation: Validation = field(default_factory=Validation)
    generation: Generation = field(default_factory=Generation)
    debug: Debug = field(default_factory=Debug)
    comm: Comm = field(default_factory=Comm)


__all__ = [
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "Compile",
    "Dataloader",
    "Debug",
    "Float8",
    "Generation",
    "Job",
    "JobConfig",
    "LRScheduler",
    "Metrics",
    "Model",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "Source",
    "Training",
    "Validation",
]
