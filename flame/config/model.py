"""The model's flat dictionary, from the [model] section and the file that it may name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.config.check import trained_vocabulary
from flame.config.sections import JobConfig
from flame.errors import ConfigError

if TYPE_CHECKING:
    from flame.models.config import ModelConfig

BYTES_VOCABULARY = 258  # 256 bytes, bos, eos


def model_values(job: JobConfig, tokenizer_size: int | None = None) -> dict[str, Any]:
    """What `flame.models.build_model` takes: the file in model.config, overridden by the keys of [model].

    Args:
        tokenizer_size: number of token ids, where known; by default it follows from model.tokenizer_path if that is
            `bytes` or `train:N`. A model without a `vocab_size` of its own takes it, rounded up to a multiple of 64.

    Raises:
        ConfigError: there is no model, or its file is missing or not JSON.
    """
    values = read_model_file(job.model.config) if job.model.config is not None else {}
    if not values and not job.model.keys:
        raise ConfigError(
            "[model] names no model. Give model.config (a JSON file or a Hugging Face folder), or the keys themselves: "
            'model_type = "gla", hidden_size = 1024, ...'
        )
    values = merge(values, job.model.keys)
    if tokenizer_size is None:
        tokenizer = job.model.tokenizer_path
        tokenizer_size = BYTES_VOCABULARY if tokenizer == "bytes" else trained_vocabulary(tokenizer)
    if tokenizer_size is not None:
        values.setdefault("vocab_size", -(-tokenizer_size // 64) * 64)
    return values


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys of `over`, tables merged key by key."""
    merged = dict(values)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_model_file(name: str) -> dict[str, Any]:
    """The JSON of a file, of a folder's config.json, or of a Hugging Face model."""
    file = Path(name).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        file = download_config(name)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config = {name!r}: {file} is not readable JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.config = {name!r}: {file} holds no table of keys.")
    return values


def download_config(name: str) -> Path:
    """config.json of the Hugging Face model `owner/name`, through the hub's cache."""
    missing = ConfigError(
        f"model.config = {name!r}: there is no such file and no folder with a config.json. Paths start at the current "
        f"folder or at the job file's."
    )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".json"):
        raise missing
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub's own errors, and those of every layer of the network below it
        raise ConfigError(f"{missing} Nor could it be had from the Hugging Face hub: {error}") from None


def resolve_model(job: JobConfig) -> ModelConfig:
    """The checked model configuration.

    Raises:
        ConfigError: a key is unknown to the model, of the wrong type, or impossible.
    """
    from flame.models.registry import resolve_config

    return resolve_config(model_values(job))
