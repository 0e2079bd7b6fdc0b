"""`flame evaluate`: loss and perplexity of a trained model on text, or its results on benchmark tasks."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flame.data.tokenizer import Tokenizer
from flame.errors import DataError
from flame.evaluation.generate import open_model
from flame.models.decoder import CausalLM

IGNORED = -100
JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class TextLoss:
    """
    Attributes:
        nats_per_token, bits_per_byte, perplexity: of all texts together.
        tokens: predicted tokens.
        bytes: of the texts in UTF-8.
    """

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate_texts(
    model: CausalLM, tokenizer: Tokenizer, texts: Iterable[str], seq_len: int = 2048, batch_size: int = 8
) -> TextLoss:
    """Loss of predicting each text, in windows of `seq_len` tokens that do not see one another.

    A text starts from the end-of-sequence token, which is what precedes every document in training, so that its first
    token is predicted too.

    Raises:
        DataError: there is no text.
    """
    device = next(model.parameters()).device
    nats, tokens, size, waiting = 0.0, 0, 0, []
    for text in texts:
        ids = torch.tensor([tokenizer.require_eos(), *tokenizer.encode(text)])
        size += len(text.encode())
        waiting += [ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)]
        while len(waiting) >= batch_size:
            rows, waiting = waiting[:batch_size], waiting[batch_size:]
            nats += nats_of(model, rows, device)
            tokens += sum(len(row) - 1 for row in rows)
    if waiting:
        nats += nats_of(model, waiting, device)
        tokens += sum(len(row) - 1 for row in waiting)
    if not tokens:
        raise DataError("there is no text to evaluate; the files are empty.")
    mean = nats / tokens
    return TextLoss(mean, nats / math.log(2) / max(size, 1), math.exp(mean), tokens, size)


def nats_of(model: CausalLM, rows: list[torch.Tensor], device: torch.device) -> float:
    """Summed loss of rows of tokens, each predicting its next; they are padded at the end, where nothing looks."""
    ids = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    output = model(ids.to(device), labels=labels.to(device))
    assert output.loss_sum is not None
    return float(output.loss_sum)


def read_texts(file: Path, key: str = "text") -> Iterator[str]:
    """The documents of a file: every line's `key` of a JSON-lines file, else the whole file.

    Raises:
        DataError: there is no such file, or a line has no such text.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}.")
    if file.suffix not in JSON_SUFFIXES:
        yield file.read_text(encoding="utf-8", errors="replace")
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)[key]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{file}, line {number}: there is no text under {key!r}. Name it with --key.") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a checkpoint step folder")
    parser.add_argument("files", nargs="*", type=Path, help="text files, each a document, or JSON lines")
    parser.add_argument("--key", default="text", help="where the text is in a JSON line")
    parser.add_argument("--tasks", help="benchmark tasks of lm-eval instead of files, separated by commas")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the one beside the weights")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows that are run together")


def main(args: argparse.Namespace) -> int:
    if bool(args.files) == bool(args.tasks):
        raise DataError("name text files, or --tasks, and not both.")
    if args.tasks:
        from flame.evaluation.harness import run_tasks

        options = {"tokenizer": args.tokenizer, "batch_size": args.batch_size, "max_length": args.seq_len}
        print(json.dumps(run_tasks(args.model, args.tasks.split(","), **options), indent=1, default=str))
        return 0
    model, tokenizer = open_model(args.model, args.tokenizer)
    texts = (text for file in args.files for text in read_texts(file, args.key))
    print(json.dumps(asdict(evaluate_texts(model, tokenizer, texts, args.seq_len, args.batch_size)), indent=1))
    return 0
