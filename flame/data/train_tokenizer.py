"""`flame train-tokenizer`: train a byte-level BPE on a data source."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from flame.data.permutation import Permutation
from flame.data.sources import Source
from flame.data.tokenize import add_source_arguments, source_of
from flame.data.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flame train-tokenizer`."""
    add_source_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, special tokens included")
    parser.add_argument("--output", required=True, help="folder for tokenizer.json and its configuration")
    parser.add_argument("--min-frequency", type=int, default=2, help="least count of a pair that is merged")
    parser.add_argument(
        "--max-characters", type=int, default=200_000_000, help="train on a sample of documents of about this size"
    )


def main(args: argparse.Namespace) -> int:
    """Run `flame train-tokenizer`."""
    started = time.perf_counter()
    texts = sample_texts(source_of(args), args.max_characters)
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.min_frequency)
    tokenizer.save(Path(args.output))
    print(
        f"{args.output}: {tokenizer.vocab_size} ids, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, fingerprint "
        f"{tokenizer.fingerprint}, in {time.perf_counter() - started:.1f} s"
    )
    return 0


def sample_texts(source: Source, max_characters: int) -> Iterator[str]:
    """Texts of units in a fixed random order until they hold `max_characters`; malformed documents are left out."""
    order = Permutation(source.units, 0)
    size = 0
    for index in range(source.units):
        for document in source.read(order(index), 0, None):
            if isinstance(document, str):
                yield document
                size += len(document)
            if size >= max_characters:
                return
