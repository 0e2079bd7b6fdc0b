"""Tensor parallelism on two GPUs against one: gradients, and tokens a second at 7B shapes cut in depth.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.tensor_parallel check
    torchrun --standalone --nproc_per_node 2 -m benchmarks.tensor_parallel speed --compile

Each rank also runs the model on its own GPU alone, in the same processes, with the same code and batch.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from flame.kernels.sequence import SequenceShard
from flame.models.decoder import CausalLM, build_model
from flame.models.initialize import initialize_weights, local_slice
from flame.optim.adamw import AdamW, AdamWOptions
from flame.optim.groups import parameter_groups
from flame.optim.optimizer import Optimizer
from flame.optim.schedules import LearningRate, Schedule
from flame.parallel.compile import compile_blocks
from flame.parallel.fsdp import ShardingOptions, apply_fsdp
from flame.parallel.mesh import Degrees, build_mesh
from flame.parallel.tensor import apply_tensor_parallel
from flame.step import FiniteGuard, StepOptions, TrainStep

SMALL: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 2, "vocab_size": 4096, "intermediate_size": 1024}
CHECKED: dict[str, dict[str, Any]] = {
    "gla": {**SMALL, "num_heads": 4},
    "transformer": {**SMALL, "num_heads": 8, "num_kv_heads": 4},
    "gated_deltanet": {**SMALL, "num_heads": 4, "head_dim": 64},
    "mamba2": {**SMALL, "head_dim": 64, "state_size": 64, "intermediate_size": None},
    "rwkv6": {**SMALL, "num_heads": 4},
}
WIDE: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 4, "vocab_size": 32000, "intermediate_size": 11008}
TIMED: dict[str, dict[str, Any]] = {"transformer": {**WIDE, "num_heads": 32}, "gla": {**WIDE, "num_heads": 16}}
TIMED_SHAPE = (4, 4096)
TOKENS, STARTS = 2048, (0, 700, 701, 1500, 2048)
WARM, STEPS = 3, 6


@dataclass
class Layouts:
    """The same two processes as one tensor-parallel pair, and as two GPUs that know nothing of each other."""

    device: torch.device
    split: DeviceMesh
    split_data: DeviceMesh
    alone: DeviceMesh

    def lay_out(self, values: dict[str, Any], split: bool, dtype: torch.dtype, compiled: bool = False) -> CausalLM:
        with torch.device("meta"):
            model = build_model(values)
        if split:
            apply_tensor_parallel(model, self.split)
        blocks = list(model.blocks)
        if compiled:
            compile_blocks(blocks)
        apply_fsdp(model, blocks, self.split_data if split else self.alone, ShardingOptions(param_dtype=dtype))
        model.to_empty(device=self.device)
        initialize_weights(model, seed=1)
        return model


def start() -> Layouts:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    mesh = build_mesh(Degrees(tp=2), "cuda", 2)
    alone = init_device_mesh("cuda", (2, 1), mesh_dim_names=("apart", "dp_shard"))["dp_shard"]
    return Layouts(device, mesh.axis("tp"), mesh.fsdp, alone)


def random_tokens(rows: int, length: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels [rows, length], the same on all ranks."""
    ids = torch.randint(0, words, (rows, length + 1), generator=torch.Generator().manual_seed(7)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def stir(model: CausalLM) -> None:
    """Weights away from the zeros and ones at which many start."""
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator(parameter.device).manual_seed(index)
        noise = 0.02 * torch.randn(parameter.shape, generator=generator, device=parameter.device)
        assert isinstance(parameter, DTensor)
        parameter.to_local().add_(local_slice(noise, parameter))


def gradients(
    layouts: Layouts, values: dict[str, Any], split: bool, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Loss a token and gradients of a plain row and a packed one."""
    model = layouts.lay_out(values, split, dtype)
    stir(model)
    ids, labels = random_tokens(1, TOKENS, values["vocab_size"], layouts.device)
    starts = torch.tensor(STARTS, dtype=torch.int32, device=layouts.device)
    total = 0.0
    for cu_seqlens in (None, starts):
        loss = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss_sum / (2 * TOKENS)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.full_tensor().float() for name, p in model.named_parameters() if p.grad is not None}


def check(layouts: Layouts) -> None:
    """Relative two-norm of what two GPUs' gradients differ by from one GPU's."""
    for backend, dtype in (("chunked", torch.float32), ("triton", torch.bfloat16)):
        os.environ["FLAME_BACKEND"] = backend
        for name, options in CHECKED.items():
            values = {"model_type": name, **options}
            one_loss, one = gradients(layouts, values, False, dtype)
            two_loss, two = gradients(layouts, values, True, dtype)
            errors = {key: ((two[key] - g).norm() / g.norm().clamp(min=1e-12)).item() for key, g in one.items()}
            worst = max(errors, key=lambda key: errors[key])
            if dist.get_rank() == 0:
                losses = f"loss {one_loss:.6f} and {two_loss:.6f}"
                print(f"{name:16}{backend:9}{losses}, worst gradient {errors[worst]:.1e} ({worst})", flush=True)


@dataclass
class Rows:
    """A batch as the training step reads it."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    shard: SequenceShard | None = None


def time_steps(layouts: Layouts, name: str, split: bool, compiled: bool) -> str:
    """A line of figures of whole optimizer steps; rank 0 speaks for a pair."""
    model = layouts.lay_out({"model_type": name, **TIMED[name]}, split, torch.bfloat16, compiled)
    rule = AdamW(parameter_groups(model, 0.1), AdamWOptions())
    optimizer = Optimizer({"adamw": rule}, LearningRate(Schedule(100, warmup_steps=2), 1e-4, layouts.device))
    group = (layouts.split_data if split else layouts.alone).get_group()
    step = TrainStep(model, optimizer, FiniteGuard("skip", layouts.device), group, StepOptions())
    batch = Rows(*random_tokens(*TIMED_SHAPE, WIDE["vocab_size"], layouts.device))
    for index in range(WARM):
        step([batch], index + 1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for index in range(STEPS):
        result = step([batch], WARM + index + 1)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    rate, peak = batch.input_ids.numel() / seconds, torch.cuda.max_memory_allocated() / 2**30
    kind = "two GPUs, tp=2" if split else "one GPU"
    return f"{name:13}{kind:16}{rate:10,.0f} tokens/s  loss {result.loss.item():.4f}  peak {peak:.1f} GiB"


def speed(layouts: Layouts, compiled: bool) -> None:
    for name in TIMED:
        for split in (False, True):
            line = time_steps(layouts, name, split, compiled)
            if dist.get_rank() == 0:
                print(line, flush=True)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "speed"))
    parser.add_argument("--compile", action="store_true", help="compile blocks, as training does")
    args = parser.parse_args()
    layouts = start()
    check(layouts) if args.what == "check" else speed(layouts, args.compile)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
