"""Compile a peer's autotuned kernels for an H200 on a machine without a GPU, into the caches that `benchmarks.training` times.

    TRITON_CACHE_DIR=$CACHES/gla_340M/triton python -m benchmarks.precompile train_configs/gla_340M.toml --caches $CACHES

runs one step of two layers of the peer's model on tensors without memory and compiles what would be launched: all
configurations of a kernel, or of one with very many those that differ in kind. The shapes are the real ones, so that Triton
specializes as it will on the GPU. Copy the folder to the same path of a machine with the same Triton, and give
`benchmarks.training --caches ... --precompiled`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what a peer compiles with inductor is compiled on the GPU

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from benchmarks.pretuned import name_of, share_compiled
from benchmarks.training import load, make_batch

H200 = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
MANY = 16  # configurations of a kernel with products; with more, some are left out
MANY_POINTWISE = 6


class Absent:
    """What Triton asks of a GPU's driver, answered for one that is not there."""

    utils = SimpleNamespace(get_device_properties=lambda index: H200)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def pretend() -> None:
    """Have torch and Triton describe an H200."""

    class NoDevice(contextlib.nullcontext[None]):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=H200["multiprocessor_count"],
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=H200["max_shared_mem"],
    )
    driver.set_active(Absent())
    for name, answer in {
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": NoDevice,
    }.items():
        setattr(torch.cuda, name, answer)


def compile_only(record: Path) -> None:
    """From now on a launch compiles, an autotuner compiles what `chosen` names, and `record` lists it."""
    launch = JITFunction.run
    seen: set[tuple[str, ...]] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    def tune(self: Any, *args: Any, **options: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        configurations = self.prune_configs(options)
        self.best_config = configurations[0]
        key = (self.base_fn.__name__, *(str(options.get(each, self.nargs.get(each))) for each in self.keys))
        if key not in seen:
            seen.add(key)
            picked = chosen(configurations, "tl.dot" in inspect.getsource(self.base_fn))
            print(f"{key[0]}: {len(picked)} of {len(configurations)} configurations", flush=True)
            for config in picked:
                if fits(self, args, options, config):
                    with record.open("a") as file:
                        file.write(name_of(self, config) + "\n")
        self.nargs = None

    JITFunction.run = run
    Autotuner.run = tune


def fits(tuner: Any, args: Any, options: Any, config: Any) -> bool:
    try:
        compiled = tuner.fn.run(*args, **options, **config.all_kwargs())
    except Exception as error:  # configurations that cannot be compiled are left out, as the autotuner would
        print(f"  {type(error).__name__}: {config}", flush=True)
        return False
    return bool(compiled.metadata.shared <= H200["max_shared_mem"])


def chosen(configurations: list[Any], products: bool) -> list[Any]:
    """All of few; of many, the largest tiles with a few numbers of warps and stages, or tiles of four sizes."""
    if len(configurations) <= (MANY if products else MANY_POINTWISE):
        return configurations
    tiles: dict[Any, list[Any]] = {}
    for config in configurations:
        tiles.setdefault(tuple(sorted(config.kwargs.items())), []).append(config)
    by_size = sorted(tiles.values(), key=lambda group: -size(group[0]))
    if products:
        wanted = [(group, *each) for group in by_size[:4] for each in ((4, 2), (4, 3), (4, 4), (8, 3), (2, 3))]
    else:
        some = by_size[:: max(1, len(by_size) // 4)]
        wanted = [(group, warps, 3) for group in some for warps in (4, 8 if size(group[0]) >= 64 else 2)]
    picked = {id(config): config for config in (nearest(*each) for each in wanted)}
    return list(picked.values())


def size(config: Any) -> int:
    """Elements of a configuration's tile."""
    count = 1
    for value in config.kwargs.values():
        if isinstance(value, int):
            count *= max(1, int(value))
    return count


def nearest(group: list[Any], warps: int, stages: int) -> Any:
    return min(group, key=lambda config: (abs(config.num_warps - warps), abs(config.num_stages - stages)))


def model_of(path: str) -> Any:
    """Two layers of the peer's model, without memory, and its vocabulary."""
    import fla.models  # noqa: F401
    from fla.ops.common import chunk_o
    from transformers import AutoConfig, AutoModelForCausalLM

    from flame.config import model_values
    from flame.models.registry import resolve_config

    chunk_o.TRITON_ABOVE_3_7_1 = True
    config = resolve_config(model_values(load(path, [])))
    known = AutoConfig.for_model(config.model_type).to_dict()
    values = {key: value for key, value in config.to_dict().items() if key in known and key != "model_type"}
    with torch.device("meta"):
        peer = AutoConfig.for_model(config.model_type, **{**values, "num_hidden_layers": 2})
        model = AutoModelForCausalLM.from_config(peer, dtype=torch.bfloat16).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    if config.model_type == "mamba2":  # as benchmarks.loops has it
        for layer in model.backbone.layers:
            layer.mixer.eval()
            layer.mixer.torch_forward = layer.mixer.cuda_kernels_forward
    return model


def accept_meta_tensors() -> None:
    """The peer's loss insists on a GPU's tensors."""
    from fla.modules.fused_cross_entropy import ops

    for kind in list(vars(ops).values()):
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and "forward" in vars(kind):
            accept_in(kind, vars(ops))


def accept_in(kind: Any, namespace: dict[str, Any]) -> None:
    source = textwrap.dedent(inspect.getsource(kind.forward)).replace("('cuda', 'npu', 'xpu')", "('meta',)")
    exec(source, namespace)
    kind.forward = namespace.pop("forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--shape", default="8x4096", help="as of benchmarks.training")
    parser.add_argument("--caches", type=Path, required=True)
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(args.caches / Path(args.job).stem / "triton")
    args.caches.mkdir(parents=True, exist_ok=True)
    pretend()
    share_compiled()
    compile_only(args.caches / f"{Path(args.job).stem}.txt")
    model = model_of(args.job)
    accept_meta_tensors()
    start = time.perf_counter()
    batch = make_batch(args.shape, model.config.vocab_size, 0, "cpu")
    tokens = batch.input_ids.to("meta")
    documents = {} if batch.cu_seqlens is None else {"cu_seqlens": batch.cu_seqlens}  # their number is read on the host
    model(tokens, labels=tokens, **documents).loss.backward()
    print(f"{args.job}: Triton {triton.__version__}, compiled in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
