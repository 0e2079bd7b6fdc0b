"""Single settings from a job file and from the command line, under the names that the sections have."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.config.lines import KeyLines, KeyPath, find_key_lines
from flame.config.old_names import CONVERTED, RENAMED, retired
from flame.config.sections import JobConfig
from flame.errors import ConfigError, nearest
from flame.schema import type_hints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Entry:
    """One setting.

    Attributes:
        path: section, (table,) key.
        value: as parsed from TOML; from the command line a string, or True for a bare flag.
        origin: ``file:line`` or `COMMAND_LINE`.
    """

    path: tuple[str, ...]
    value: Any
    origin: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def typed(self) -> bool:
        """Whether the value has a type already; one from the command line takes that of its key."""
        return self.origin != COMMAND_LINE


@dataclass
class Names:
    """What became of the entries.

    Attributes:
        known: entries under the names of `JobConfig`.
        notes: one line per old spelling met.
        problems: one line per entry that cannot be accepted.
    """

    known: list[Entry]
    notes: list[str]
    problems: list[str]


def read_file(path: Path) -> tuple[list[Entry], KeyLines]:
    """The settings of a TOML file and the lines they stand on.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the job file {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the job file {path} is not UTF-8 text: {error}.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    lines = find_key_lines(str(path), text)
    return list(_flatten(values, (), lines)), lines


def _flatten(values: Mapping[str, Any], prefix: tuple[str, ...], lines: KeyLines) -> Iterator[Entry]:
    """Leaves of nested tables. The tables inside [model] belong to the model and stay whole."""
    for name, value in values.items():
        path = (*prefix, name)
        if isinstance(value, Mapping) and (len(path) == 1 or path[0] != "model"):
            yield from _flatten(value, path, lines)
        else:
            where: KeyPath = path
            yield Entry(path, value, lines.where(where))


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Settings (``--section.key value``, ``--section.key=value``, ``--section.switch``) and all other arguments.

    A setting is returned in one piece, with its ``=``, or without one if it is a bare switch.
    """
    settings: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            others.append(argument)
        elif not equals and takes_value(setting_path(name), arguments[position : position + 1]):
            settings.append(f"{argument}={arguments[position]}")
            position += 1
        else:
            settings.append(argument)
    return settings, others


def command_entries(settings: list[str]) -> list[Entry]:
    """Entries of settings as `split_arguments` gives them."""
    parts = [setting.partition("=") for setting in settings]
    return [Entry(setting_path(name), value if equals else True, COMMAND_LINE) for name, equals, value in parts]


def setting_path(name: str) -> tuple[str, ...]:
    """``("training", "seq_len")`` for ``--training.seq-len``."""
    return tuple(name[2:].replace("-", "_").split("."))


def takes_value(path: tuple[str, ...], following: list[str]) -> bool:
    """Whether the argument after an option is its value. A switch takes one only if it reads true, false or auto."""
    if not following or following[0].startswith("--"):
        return False
    name = RENAMED.get(".".join(path), ".".join(path))
    hint = hint_of(tuple(name.split(".")))
    is_switch = hint is bool or bool in typing.get_args(hint) or negated(path) is not None
    return not is_switch or following[0].lower() in ("true", "false", "auto")


def negated(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """The switch that ``section.no_switch`` turns off, or None."""
    positive = (*path[:-1], path[-1][3:])
    name = tuple(RENAMED.get(".".join(positive), ".".join(positive)).split("."))
    return name if path[-1].startswith("no_") and hint_of(name) is bool else None


def hint_of(path: tuple[str, ...]) -> Any:
    """Annotation of a key of `JobConfig`; None for names that are no key."""
    hint: Any = JobConfig
    for part in path:
        if not dataclasses.is_dataclass(hint):
            return None
        hint = type_hints(typing.cast(type, hint)).get(part)
    return None if dataclasses.is_dataclass(hint) else hint


def is_model_key(path: tuple[str, ...]) -> bool:
    """Whether the key belongs to the model's own dictionary."""
    return path[0] == "model" and len(path) > 1 and (len(path) > 2 or hint_of(path) is None)


def canonical(entries: list[Entry]) -> Names:
    """Entries of one origin (a file or the command line) under today's names."""
    names = Names([], [], [])
    spelled: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        renamed = _rename(entry, names)
        if renamed is None:
            continue
        other = spelled.get(renamed.path)
        if other is not None and (other.key != entry.key or entry.typed):
            names.problems.append(
                f"{entry.origin}: {entry.key} means {renamed.key}, which {other.origin} sets as {other.key}. Keep one."
            )
            continue
        spelled[renamed.path] = entry
        names.known = [known for known in names.known if known.path != renamed.path] + [renamed]
    return names


def _rename(entry: Entry, names: Names) -> Entry | None:
    """The entry under its present name, or None after writing down why there is none."""
    if entry.key in RENAMED:
        new = RENAMED[entry.key]
        value = entry.value
        if entry.key in CONVERTED:
            value = CONVERTED[entry.key](value if entry.typed else parse_loosely(value))
        shown = f" = {value!r}" if entry.key in CONVERTED else ""
        names.notes.append(f"{entry.origin}: {entry.key} is now {new}{shown}.")
        return Entry(tuple(new.split(".")), value, entry.origin)
    if hint_of(entry.path) is not None and entry.path != ("model", "keys"):
        return entry
    positive = negated(entry.path)
    if positive is not None and entry.value is True:
        return Entry(positive, False, entry.origin)
    old = retired(entry.key)
    if old is not None:
        value = entry.value if entry.typed else parse_loosely(entry.value)
        if old.accepts(value):
            names.notes.append(f"{entry.origin}: {entry.key} is not used: {old.advice}.")
        else:
            names.problems.append(f"{entry.origin}: {entry.key} = {value!r} is not accepted: {old.advice}.")
        return None
    if entry.path[:2] == ("model", "keys"):
        names.problems.append(f"{entry.origin}: write the model's own keys directly under [model], without `keys`.")
        return None
    if is_model_key(entry.path):
        return entry
    names.problems.append(f"{entry.origin}: {describe_unknown(entry.path)}")
    return None


def _as_bool(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def parse_loosely(text: Any) -> Any:
    """A command-line value of unknown type: as TOML if it is that, else as the string it is."""
    if not isinstance(text, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return _as_bool(text)


def describe_unknown(path: tuple[str, ...]) -> str:
    """Message about a key that no section declares, with the nearest that one does."""
    sections = type_hints(JobConfig)
    if path[0] not in sections:
        guess = nearest(path[0], sections)
        hint = f"; did you mean [{guess}]?" if guess else "."
        return f"unknown section [{path[0]}]{hint} Sections: {', '.join(sections)}."
    if len(path) == 1:
        return f"{path[0]} is a section; write it as [{path[0]}]."
    section = sections[path[0]]
    for part in path[1:-1]:
        section = type_hints(section).get(part)
        if not dataclasses.is_dataclass(section):
            break
    if not dataclasses.is_dataclass(section):
        return f"unknown table [{'.'.join(path[:-1])}] in section [{path[0]}]. {describe_unknown(path[:2])}"
    keys = [item.name for item in dataclasses.fields(section)]
    guess = elsewhere(path[-1]) or nearest(path[-1], keys)
    hint = f"; did you mean {guess}?" if guess else "."
    return f"unknown key {path[-1]!r} in [{'.'.join(path[:-1])}]{hint} Keys: {', '.join(keys)}."


def elsewhere(key: str) -> str | None:
    """The key of that very name in another section."""
    for section, cls in type_hints(JobConfig).items():
        if key in type_hints(cls) and key not in ("keys", "enable", "freq", "folder"):
            return f"{section}.{key}"
    return None
