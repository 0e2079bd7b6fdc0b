"""flame models in EleutherAI's lm-eval: ``lm_eval --model flame`` after importing this, or `flame evaluate --tasks`.

Needs the package lm_eval, which nothing else of flame does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flame.errors import FlameError
from flame.evaluation.generate import Sampling, generate_batch, open_model
from flame.evaluation.scoring import Continuation, score, windows

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise FlameError(f"benchmark tasks need the package lm_eval (pip install lm_eval): {error}.") from error

DEFAULT_NEW_TOKENS = 256


@register_model("flame")
class FlameLM(TemplateLM):
    """A model of flame as lm-eval wants it.

    Args:
        pretrained: a Hugging Face folder, or a checkpoint step folder.
        tokenizer: folder of the tokenizer; by default the one beside the weights.
        batch_size: rows that are run together.
        max_length: longest input in tokens.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path,
        tokenizer: str | None = None,
        batch_size: int | str = 8,
        max_length: int = 2048,
        **unused: Any,  # lm-eval also passes what its own models take, such as the device
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = open_model(Path(pretrained), tokenizer)
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 8
        self.max_length = int(max_length)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.require_eos()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        items = [Continuation(context or [self.eot_token_id], target) for _, context, target in requests]
        scores = score(self.model, items, self.max_length, self.batch_size)
        return [(result.logprob, result.is_greedy) for result in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            items = list(windows(self.tok_encode(request.args[0]), self.eot_token_id, self.max_length))
            totals.append(sum(result.logprob for result in score(self.model, items, self.max_length, self.batch_size)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        # Rows decoded together should have prompts of about the same length.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].args[0]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, text in zip(chosen, self.generate_together([requests[index].args for index in chosen])):
                texts[index] = text
        return [texts[index] for index in range(len(requests))]

    def generate_together(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """Continuations of (context, options); the batch is as long and as random as its first request says."""
        options = requests[0][1]
        count = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        prompts = [self.tok_encode(context)[-self.max_length :] or [self.eot_token_id] for context, _ in requests]
        stops = [stop_texts(asked) for _, asked in requests]

        def is_done(row: int, added: list[int]) -> bool:
            text = self.tokenizer.decode(added)
            return any(stop in text for stop in stops[row])

        added = generate_batch(
            self.model, prompts, Sampling(count, temperature, top_k=0), self.tokenizer.eos_id, is_done
        )
        plain = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in added]
        return [cut(text, stop) for text, stop in zip(plain, stops)]


def stop_texts(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def run_tasks(folder: Path, tasks: list[str], **options: Any) -> dict[str, Any]:
    """Results of lm-eval by task.

    Args:
        options: of `FlameLM`.
    """
    import lm_eval

    found = lm_eval.simple_evaluate(model=FlameLM(folder, **options), tasks=tasks)
    return found["results"]
