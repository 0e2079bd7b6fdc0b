"""Writing a job as TOML, such that reading it gives the same job."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from flame.config.sections import JobConfig
from flame.errors import ConfigError


def to_toml(job: JobConfig) -> str:
    """All keys of `job`, defaults too. Keys that are None are left out, which is what None means."""
    lines: list[str] = []
    for section in dataclasses.fields(job):
        lines += table_lines(section.name, getattr(job, section.name))
    return "\n".join(lines).lstrip("\n") + "\n"


def table_lines(name: str, section: Any) -> list[str]:
    """Lines of one table, its tables after its keys."""
    plain, nested = [], []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if value is None:
            continue
        if name == "model" and item.name == "keys":
            plain += [f"{key_text(key)} = {value_text(inner)}" for key, inner in value.items()]
        elif dataclasses.is_dataclass(value):
            nested += table_lines(f"{name}.{item.name}", value)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for entry in value:
                nested += ["", f"[[{name}.{item.name}]]", *table_lines("", entry)[2:]]
        else:
            plain.append(f"{item.name} = {value_text(value)}")
    return ["", f"[{name}]", *plain, *nested]


def key_text(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else string_text(key)


def string_text(text: str) -> str:
    # A JSON string is a TOML basic string, except that TOML wants DEL escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_text(value: Any) -> str:
    """One TOML value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return string_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_text(key)} = {value_text(item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"a job cannot hold {value!r}: TOML has no {type(value).__name__}.")
