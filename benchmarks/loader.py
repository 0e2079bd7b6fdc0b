"""Tokens a second of the data loader: tokenizing online and pre-tokenized, by number of worker processes.

    python benchmarks/loader.py --workers 1 2 8 --output loader.json

The corpus is the Python standard library's source repeated into JSONL, the tokenizer a byte-level BPE trained on it.
The consumer takes batches as fast as they come, so a figure is what the loader can give, not what a job uses. Prints a
table and writes JSON with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

from flame.data import (
    DataSettings,
    Loader,
    PackingSettings,
    RankSettings,
    SourceSettings,
    Tokenizer,
    WorkerSettings,
    open_recipe,
)
from flame.data.sources import open_source
from flame.data.sources.text import open_standard_library
from flame.data.tokenize import tokenize
from flame.data.train_tokenizer import sample_texts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--varlen", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="time of each measurement, after a warm-up of a third"
    )
    parser.add_argument("--output", default=None, help="JSON file")
    return parser.parse_args()


def prepare(folder: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, SourceSettings]]:
    """The tokenizer, and the same documents as text, JSONL, Parquet and ids."""
    library = open_standard_library("stdlib")
    tokenizer = Tokenizer.train(sample_texts(library, 10**9), vocab_size)
    texts = list(sample_texts(library, 10**9))
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    jsonl = SourceSettings(str(folder / "corpus.jsonl"))
    tokenize(open_source(jsonl, "jsonl", 1), tokenizer, folder / "ids")
    sources = {"text": SourceSettings("stdlib"), "jsonl": jsonl, "pretokenized": SourceSettings(str(folder / "ids"))}
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "corpus.parquet", row_group_size=256)
        sources["parquet"] = SourceSettings(str(folder / "corpus.parquet"))
    except ImportError:
        print("no pyarrow: Parquet is left out")
    return tokenizer, sources


def measure(loader: Loader, tokens_per_batch: int, seconds: float) -> dict[str, float]:
    """Time to the first batch, tokens a second after the warm-up, and tokens a second of processor time over all.

    The last is of this process and its workers together and hardly changes when other programs run beside.
    """
    started, processor = time.perf_counter(), _processor_seconds()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter() - started
    count, begin, total = 0, None, 1
    while begin is None or time.perf_counter() - begin < seconds:
        if begin is None and time.perf_counter() - started > seconds / 3:
            begin, count = time.perf_counter(), 0
        next(iterator)
        count, total = count + 1, total + 1
    rate = count * tokens_per_batch / (time.perf_counter() - begin)
    loader.close()
    spent = _processor_seconds() - processor
    return {
        "tokens_per_second": rate,
        "tokens_per_processor_second": total * tokens_per_batch / spent,
        "first_batch_seconds": first,
    }


def _processor_seconds() -> float:
    """Processor time of this process and of its workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    args = arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, sources = prepare(Path(folder), args.vocab_size)
        print(f"{'source':14} {'workers':>7} {'tokens/s':>12} {'tokens/cpu-s':>13} {'first batch s':>14}")
        for name, source in sources.items():
            packing = PackingSettings(args.seq_len, args.varlen)
            recipe = open_recipe(DataSettings((source,), packing), tokenizer)
            for workers in args.workers:
                rank = RankSettings(local_batch_size=args.batch, workers=WorkerSettings(workers, 2, False))
                result = measure(Loader(recipe, rank), args.batch * args.seq_len, args.seconds)
                rows.append({"source": name, "workers": workers, **result})
                rate, cpu, first = result.values()
                print(f"{name:14} {workers:7} {rate:12,.0f} {cpu:13,.0f} {first:14.2f}")
    report = {
        "settings": vars(args),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "results": rows,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
