"""Strict dataclasses: build one from a plain mapping, refusing what it does not declare.

The annotations are the schema. Supported: bool, int, float, str, Literal, Optional/unions, list[...], dict, nested
dataclasses and lists of them. An int is accepted where a float is declared (TOML and JSON write 1 for 1.0).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from flame.errors import ConfigError, unknown_name

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of dataclass `cls` with `values`.

    Args:
        values: field name -> value; missing fields take their default.
        where: put before key names in messages, e.g. ``"model"``.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or a field without default is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = type_hints(cls)  # type: ignore[arg-type]
    converted = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{where or cls.__name__}: {unknown_name('key', name, fields)}")
        converted[name] = convert(value, hints[name], f"{where}.{name}" if where else name)
    missing = [name for name, field in fields.items() if name not in converted and not has_default(field)]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: required and not given: {', '.join(missing)}.")
    return cls(**converted)


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Resolved annotations of a dataclass, inherited fields included."""
    return typing.get_type_hints(cls)


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against the annotation `hint`; raises ConfigError saying what `where` accepts."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
    elif origin in (Union, types.UnionType):
        return _convert_union(value, hint, where)
    elif origin is list:
        if isinstance(value, (list, tuple)):
            (item,) = typing.get_args(hint)
            return [convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value)]
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return build(hint, value, where)  # type: ignore[arg-type]
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} = {value!r} is not accepted; it takes {describe(hint)}.")


def _convert_union(value: Any, hint: Any, where: str) -> Any:
    # Exact types first, so that 4 stays an int under `int | float`.
    options = sorted(typing.get_args(hint), key=lambda option: option is not type(value))
    for option in options:
        try:
            return convert(value, option, where)
        except ConfigError:
            continue
    structured = [option for option in options if dataclasses.is_dataclass(option)]
    if structured and isinstance(value, Mapping):
        return convert(value, structured[0], where)  # its message names the inner key
    raise ConfigError(f"{where} = {value!r} is not accepted; it takes {describe(hint)}.")


def describe(hint: Any) -> str:
    """What an annotation accepts, in words, for messages and generated docs."""
    origin = typing.get_origin(hint)
    if hint is type(None):
        return "nothing"
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if origin is list:
        return f"a list of {describe(typing.get_args(hint)[0])}"
    if origin is dict:
        return "a table"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Any: "anything"}
    return names.get(hint, f"a table ({getattr(hint, '__name__', hint)})")
