"""Short training runs of every linear-attention system on real text, to see that losses fall: curves as CSV and a plot.

    python -m benchmarks.curves --tokenizer tok --steps 100 --layers 4 --jobs 3 --out docs/results/curves

Each run is a shipped 340M job cut to a few layers, on the source text of Python's standard library.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SYSTEMS = ("retnet", "linear_attn", "based", "rebased", "gla", "hgrn", "hgrn2", "rwkv6")
SYSTEMS += ("lightnet", "mamba", "samba", "mamba2", "gsa", "abc", "rodimus", "rodimus_plus")
CONFIGS = Path(__file__).parents[1] / "train_configs"


def command(system: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """`python -m flame.train` of the system's 340M job, cut and on the embedded text."""
    job = CONFIGS / f"{'rodimus' if system.startswith('rodimus') else system}_340M.toml"
    settings = {
        "job.dump_folder": folder,
        "job.print_config": "false",
        "model.tokenizer_path": args.tokenizer,
        "model.num_hidden_layers": args.layers,
        "training.dataset": "stdlib",
        "training.varlen": "false",
        "training.local_batch_size": args.rows,
        "training.global_batch_size": "-1",
        "training.seq_len": args.seq_len,
        "training.steps": args.steps,
        "training.dataloader.num_workers": 2,
        "optimizer.lr": args.lr,
        "lr_scheduler.warmup_steps": max(1, args.steps // 10),
        "compile.enable": "false",
        "checkpoint.enable": "false",
        "validation.enable": "false",
        "metrics.log_freq": 1,
        "metrics.enable_tensorboard": "false",
        "debug.seed": 0,
    }
    if system == "samba":
        softmax = [index for index in range(args.layers) if index % 2]
        settings["model.attn"] = f"{{ layers = {softmax}, num_heads = 8, window_size = {args.seq_len} }}"
    if system == "rodimus":
        settings["model.block_type"] = "rodimus"
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "flame.train", str(job), *words, *args.extra]


def train(system: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of every step, and how the run ended."""
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        done = subprocess.run(command(system, Path(place), args), capture_output=True, text=True)
        seconds = time.perf_counter() - start
        records = [
            json.loads(line) for path in Path(place).rglob("metrics.jsonl") for line in path.read_text().splitlines()
        ]
    losses = [record["loss"] for record in records if "loss" in record]
    ok = done.returncode == 0 and len(losses) == args.steps and all(math.isfinite(x) for x in losses)
    last = records[-1] if records else {}
    print(
        f"{system:14s} {'ok' if ok else 'FAILED'} {seconds:5.1f} s, {len(losses)} steps, loss "
        + (f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "-"),
        flush=True,
    )
    if not ok:
        print("\n".join((done.stdout + done.stderr).splitlines()[-12:]), flush=True)
    return {"system": system, "ok": ok, "seconds": seconds, "losses": losses, "last": last}


def write(results: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "curves.json").write_text(json.dumps(results, indent=1))
    steps = max(len(result["losses"]) for result in results)
    with (out / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *(result["system"] for result in results)])
        for step in range(steps):
            losses = [result["losses"][step : step + 1] for result in results]
            rows.writerow([step + 1, *(f"{loss[0]:.4f}" if loss else "" for loss in losses)])
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for index, result in enumerate(results):
        axes.plot(
            range(1, len(result["losses"]) + 1),
            result["losses"],
            label=result["system"],
            color=plt.get_cmap("tab20")(index),
            linewidth=1,
        )
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(ncols=2, fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", action="append", default=[], help="only this one (may be repeated)")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("outputs/curves"))
    args, extra = parser.parse_known_args()
    args.extra = extra
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda system: train(system, args), args.system or SYSTEMS):
            results.append(result)
            write(results, args.out)


if __name__ == "__main__":
    main()
