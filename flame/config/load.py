"""From a job file and command-line settings to a checked `JobConfig`."""

from __future__ import annotations

import logging
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flame.config.check import find_notes, find_problems
from flame.config.entries import (
    Entry,
    canonical,
    command_entries,
    hint_of,
    is_model_key,
    parse_loosely,
    read_file,
    split_arguments,
)
from flame.config.lines import KeyLines
from flame.config.model import resolve_model
from flame.config.sections import JobConfig
from flame.errors import ConfigError
from flame.schema import convert, describe

logger = logging.getLogger("flame.config")

# List keys that old job files write as one string with commas.
COMMA_KEYS = frozenset(
    [f"training.{key}" for key in ("dataset", "dataset_name", "dataset_split", "data_dir", "data_files", "data_probs")]
    + [f"validation.{key}" for key in ("dataset", "dataset_name", "dataset_split")]
)

# What the sections say about the very data that they name.
ABOUT_DATA = ("dataset", "dataset_name", "dataset_split", "data_dir", "data_files", "data_probs", "sources")


def load_job(path: str | Path | None, overrides: list[str] | None = None) -> JobConfig:
    """The job in a TOML file, with command-line settings over it.

    Args:
        path: the file; None for defaults and `overrides` alone.
        overrides: ``["--training.steps", "20", "--compile.enable=false"]``; lists are separated by commas, a bare
            ``--section.key`` switches on, and keys of the model go below ``--model.``.

    Raises:
        ConfigError: names file and line, what is wrong and what is accepted; all wrong keys at once.
    """
    file_entries, lines = read_file(Path(path)) if path is not None else ([], KeyLines("defaults"))
    settings, others = split_arguments(overrides or [])
    if others:
        raise ConfigError(f"{others[0]!r} is no setting; write --section.key value, for example --training.steps 100.")
    job, problems, notes = JobConfig(), [], []
    origins: dict[str, str] = {}
    for entries in (file_entries, command_entries(settings)):
        names = canonical(entries)
        notes += names.notes
        problems += names.problems
        if entries is not file_entries:
            notes += list(_forget_replaced_data(job, {entry.path for entry in names.known}))
        for entry in names.known:
            try:
                _set(job, entry, lines)
            except ConfigError as error:
                problems.append(str(error))
            origins[entry.key] = entry.origin
    if not problems:
        _locate_model_file(job, path)
        found = [*find_problems(job), *_model_problems(job)]
        problems = [f"{_origin(key, origins, lines)}: {text}" for key, text in found]
    if problems:
        raise ConfigError("\n".join(problems))
    notes += [f"{_origin(key, origins, lines)}: {text}" for key, text in find_notes(job)]
    _log_notes(notes)
    return job


def _forget_replaced_data(job: JobConfig, given: set[tuple[str, ...]]) -> Iterator[str]:
    """Drop what the file says about its data where the command line (`given`) names other data; what was dropped."""
    for section, settings in (("training", job.training), ("validation", job.validation)):
        if not given & {(section, "dataset"), (section, "sources")}:
            continue
        about = [key for key in ABOUT_DATA if hasattr(settings, key) and (section, key) not in given]
        dropped = [f"{section}.{key}" for key in about if getattr(settings, key)]
        for key in about:
            setattr(settings, key, [] if key == "sources" else None)
        if dropped:
            yield f"command line: other data for [{section}]; of the file's, {', '.join(dropped)} no longer apply."


def _origin(key: str, origins: dict[str, str], lines: KeyLines) -> str:
    """Where a key was set; for a default, the nearest table around it in the file."""
    return origins.get(key) or lines.where(tuple(key.split(".")))


def _model_problems(job: JobConfig) -> Iterator[tuple[str, str]]:
    """What the model itself says about its keys, with the key that it names. A job without a model has none."""
    if job.model.config is None and not job.model.keys:
        return
    try:
        resolve_model(job)
    except ConfigError as error:
        named = re.search(r"unknown (?:key|system) '([^']+)'|model\.([a-z_0-9]+)", str(error))
        key = (named[1] or named[2]) if named else "config"
        yield f"model.{key}" if key in job.model.keys else "model.config", str(error)


def _log_notes(notes: list[str]) -> None:
    if os.environ.get("RANK", "0") == "0":  # one process of a run is enough
        for note in notes:
            logger.warning("%s", note)


def _set(job: JobConfig, entry: Entry, lines: KeyLines) -> None:
    """Put one entry into `job`, converted to the type of its key."""
    if is_model_key(entry.path):
        _set_model_key(job, entry)
        return
    target: Any = job
    for part in entry.path[:-1]:
        target = getattr(target, part)
    hint = hint_of(entry.path)
    if entry.path[-1] == "sources" and entry.typed:
        value = _convert_sources(entry, hint, lines)
    else:
        value = convert(_typed_value(entry, hint), hint, f"{entry.origin}: {entry.key}")
    setattr(target, entry.path[-1], value)


def _convert_sources(entry: Entry, hint: Any, lines: KeyLines) -> Any:
    """[[...sources]] tables one by one, so that a message names the line of the right one."""
    if not isinstance(entry.value, list):
        return convert(entry.value, hint, f"{entry.origin}: {entry.key}")
    (source,) = typing.get_args(hint)
    return [
        convert(item, source, f"{lines.where((*entry.path, index))}: {entry.key}[{index}]")
        for index, item in enumerate(entry.value)
    ]


def _set_model_key(job: JobConfig, entry: Entry) -> None:
    """One key of the model's own dictionary, which may be nested: ``--model.attn.num_heads 4``."""
    table = job.model.keys
    for part in entry.path[1:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{entry.origin}: {entry.key}: {part!r} is not a table.")
    if not entry.typed and entry.value == "none":
        if table.pop(entry.path[-1], None) is None:
            raise ConfigError(f"{entry.origin}: {entry.key} = none takes a key of the job file away, which has none.")
        return
    table[entry.path[-1]] = entry.value if entry.typed else parse_loosely(entry.value)


def _typed_value(entry: Entry, hint: Any) -> Any:
    """The entry's value in the type of its key, as far as its spelling tells; `convert` checks the rest."""
    value = entry.value
    if entry.key == "activation_checkpoint.selective_ac_option" and isinstance(value, int):
        return str(value)
    if not entry.typed and value == "none" and type(None) in typing.get_args(hint):
        return None
    if entry.key in COMMA_KEYS and isinstance(value, str) and not value.lstrip().startswith("["):
        return [_scalar(part.strip(), _item(hint), entry) for part in value.split(",")]
    if entry.typed or not isinstance(value, str):
        return value
    if typing.get_origin(_without_none(hint)) is list:
        if value.lstrip().startswith("["):
            return parse_loosely(value)
        return [_scalar(part.strip(), _item(hint), entry) for part in value.split(",") if part.strip()]
    return _scalar(value, hint, entry)


def _without_none(hint: Any) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if type(None) in typing.get_args(hint) and len(options) == 1 else hint


def _item(hint: Any) -> Any:
    """Element type of a list annotation, optional or not."""
    (item,) = typing.get_args(_without_none(hint))
    return item


def _scalar(text: str, hint: Any, entry: Entry) -> Any:
    """A number, truth value or string from `text`, whichever of them `hint` takes."""
    kinds = set(typing.get_args(hint)) | {hint}
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if kinds & {int, float, bool} and str not in kinds and not any(typing.get_origin(kind) for kind in kinds):
        raise ConfigError(f"{entry.origin}: {entry.key} = {text!r} is not accepted; it takes {describe(hint)}.")
    return text


def _locate_model_file(job: JobConfig, path: str | Path | None) -> None:
    """Let model.config be relative to the job file where the current folder does not have it."""
    config = job.model.config
    if config is None or path is None or Path(config).is_absolute() or Path(config).exists():
        return
    beside = Path(path).parent / config
    if beside.exists():
        job.model.config = str(beside)
