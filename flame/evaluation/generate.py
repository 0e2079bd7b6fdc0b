"""`flame generate`: continue prompts with a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flame.checkpoint import storage
from flame.checkpoint.convert import stored_weights, tokenizer_beside
from flame.data.tokenizer import Tokenizer
from flame.errors import CheckpointError, ConfigError
from flame.models.decoder import CausalLM
from flame.models.hf import load_model, load_tensors
from flame.models.registry import load_config


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens to add; generation of a prompt ends earlier at its end-of-sequence token.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from so many likeliest tokens; 0 from all.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens > 0,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
        }
        wrong = [name for name, holds in checks.items() if not holds]
        if wrong:
            raise ConfigError(f"{wrong[0]} = {getattr(self, wrong[0])} is out of range; see `flame generate --help`.")


def generate(model: CausalLM, prompt: Sequence[int], sampling: Sampling, stop: int | None = None) -> list[int]:
    """Tokens that follow `prompt`; see `generate_batch`."""
    return generate_batch(model, [prompt], sampling, stop)[0]


@torch.no_grad()
def generate_batch(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: int | None = None,
    is_done: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Tokens that follow each prompt, decoded together one by one from the model's cache.

    All rows stand at the same position: the prompts are read together up to the end of the shortest, and from there on a
    row takes the next token of its prompt while it has one, and its own afterwards. Nothing is padded, so that every
    system decodes exactly. Under FSDP all ranks must call it together; they draw the same tokens.

    Args:
        prompts: token ids, at least one each.
        stop: token that ends a text; it is the last one returned.
        is_done: whether row `i` is finished, given the tokens added to it so far.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    rows, lengths = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    position, cache, open_rows = min(lengths), model.new_cache(), set(range(len(rows)))
    given = torch.tensor([row[:position] for row in rows], device=device)
    while True:
        drawn = choose(model(given, cache=cache).logits[:, -1], sampling, generator).tolist()
        for index in sorted(open_rows):
            row, length = rows[index], lengths[index]
            if len(row) > position:  # still in its prompt
                continue
            row.append(drawn[index])
            full = len(row) - length == sampling.max_new_tokens
            if full or drawn[index] == stop or (is_done is not None and is_done(index, row[length:])):
                open_rows.discard(index)
        if not open_rows:
            return [row[length:] for row, length in zip(rows, lengths)]
        # Finished rows go on with any token; nothing is taken from them.
        given = torch.tensor([row[min(position, len(row) - 1)] for row in rows], device=device)[:, None]
        position += 1


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next tokens [...] from logits [..., V]."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        # The token that crosses the threshold is kept.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate_text(model: CausalLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """`prompt` and its continuation."""
    ids = list(tokenizer.encode(prompt)) or [tokenizer.require_eos()]
    was_training = model.training
    model.eval()
    added = generate(model, ids, sampling, tokenizer.eos_id)
    model.train(was_training)
    return prompt + tokenizer.decode(added, skip_special_tokens=True)


def load_any(folder: Path, device: torch.device | str, dtype: torch.dtype | None = None) -> CausalLM:
    """The model in a Hugging Face folder or in a checkpoint step folder."""
    if not (folder / storage.MANIFEST).is_file():
        return load_model(folder, device, dtype)
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    model.to_empty(device=device)
    model.tie_weights()
    load_tensors(model, stored_weights(folder), folder)
    return model.to(dtype).eval() if dtype is not None else model.eval()


def find_tokenizer(folder: Path, given: str | None) -> Tokenizer:
    """The tokenizer named by the user, else the one beside the weights, else the one of the run."""
    if given:
        return Tokenizer.load(given)
    place = tokenizer_beside(folder)
    if (place / "tokenizer.json").is_file():
        return Tokenizer.load(place)
    raise CheckpointError(f"there is no tokenizer.json beside the weights in {folder}; name one with --tokenizer.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a checkpoint step folder")
    parser.add_argument("prompts", nargs="+", help="texts to continue")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the one beside the weights")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k)
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, default=Sampling.seed)


def open_model(folder: Path, tokenizer: str | None) -> tuple[CausalLM, Tokenizer]:
    """Model and tokenizer of a command line, on the GPU in bfloat16 if there is one."""
    found = find_tokenizer(folder, tokenizer)
    if torch.cuda.is_available():
        return load_any(folder, "cuda", torch.bfloat16), found
    return load_any(folder, "cpu"), found


def main(args: argparse.Namespace) -> int:
    model, tokenizer = open_model(args.model, args.tokenizer)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompts = [list(tokenizer.encode(prompt)) or [tokenizer.require_eos()] for prompt in args.prompts]
    added = generate_batch(model, prompts, sampling, tokenizer.eos_id)
    for prompt, tokens in zip(args.prompts, added):
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))
    return 0
