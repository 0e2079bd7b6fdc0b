"""`flame evaluate`: loss and perplexity of a trained model on text."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flame.data.tokenizer import Tokenizer
from flame.errors import DataError
from flame.evaluation.generate import find_tokenizer, load_any
from flame.models.decoder import CausalLM


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
def evaluate_texts(model: CausalLM, tokenizer: Tokenizer, texts: Iterable[str], seq_len: int = 2048) -> TextLoss:
    """Loss of predicting each text, in windows of `seq_len` tokens that do not see one another.

    A text starts from the end-of-sequence token, which is what precedes every document in training, so that its first
    token is predicted too.

    Raises:
        DataError: there is no text.
    """
    device = next(model.parameters()).device
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.require_eos(), *tokenizer.encode(text)], device=device)
        size += len(text.encode())
        for start in range(0, len(ids) - 1, seq_len):
            window = ids[start : start + seq_len + 1]
            output = model(window[None, :-1], labels=window[None, 1:])
            assert output.loss_sum is not None
            nats += float(output.loss_sum)
            tokens += len(window) - 1
    if not tokens:
        raise DataError("there is no text to evaluate; the files are empty.")
    mean = nats / tokens
    return TextLoss(mean, nats / math.log(2) / max(size, 1), math.exp(mean), tokens, size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a checkpoint step folder")
    parser.add_argument("files", nargs="+", type=Path, help="text files, each a document")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the one beside the weights")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a window")


def main(args: argparse.Namespace) -> int:
    missing = [file for file in args.files if not file.is_file()]
    if missing:
        raise DataError(f"there is no file {missing[0]}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = find_tokenizer(args.model, args.tokenizer)
    model = load_any(args.model, device, torch.bfloat16 if device == "cuda" else None)
    texts = (file.read_text(errors="replace") for file in args.files)
    print(json.dumps(asdict(evaluate_texts(model, tokenizer, texts, args.seq_len)), indent=1))
    return 0
