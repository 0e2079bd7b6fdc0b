"""Where in a TOML file each key stands. The standard parser gives values without positions; messages need them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]

_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")


@dataclass
class KeyLines:
    """Line numbers (from 1) of the tables and keys of one TOML file.

    Attributes:
        file: the name to show.
        lines: path of a key, indices of [[tables]] included, to its line. Keys inside inline tables are not listed.
    """

    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """``file:line`` of the key, of the nearest table around it, or just the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.file}:{self.lines[path[:length]]}"
        return self.file


def find_key_lines(file: str, text: str) -> KeyLines:
    """Scan `text`, which the TOML parser has accepted already."""
    found = KeyLines(file)
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        line, start = lines[number].strip(), number + 1
        number += 1
        if not line or line.startswith("#"):
            continue
        if line.startswith("[["):
            name = resolve_path(split_key(line[2:])[0], counts)
            counts[name] = counts.get(name, -1) + 1
            table = (*name, counts[name])
            found.lines.setdefault(name, start)
            found.lines[table] = start
        elif line.startswith("["):
            table = resolve_path(split_key(line[1:])[0], counts)
            found.lines.setdefault(table, start)
        else:
            key, value = split_key(line)
            found.lines.setdefault((*table, *key), start)
            scan = ValueScan()
            scan.feed(value)
            while scan.open and number < len(lines):
                scan.feed(lines[number])
                number += 1
    return found


def resolve_path(name: KeyPath, counts: dict[KeyPath, int]) -> KeyPath:
    """Path of a table header, with the index of the current entry put after each array of tables on the way."""
    path: KeyPath = ()
    for index, part in enumerate(name):
        path = (*path, part)
        if path in counts and index < len(name) - 1:
            path = (*path, counts[path])
    return path


def split_key(text: str) -> tuple[KeyPath, str]:
    """A dotted key at the start of `text`, and what follows its ``=`` or ``]``."""
    parts: list[str] = []
    position = 0
    while match := _KEY_PART.match(text, position):
        parts.append(next(group for group in match.groups() if group is not None))
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    return tuple(parts), text[position + 1 :]


@dataclass
class ValueScan:
    """Follows a value over lines, to know when it ends: strings, comments and brackets nest.

    Attributes:
        depth: open brackets and braces.
        quote: the triple quote that a multi-line string waits for, or empty.
    """

    depth: int = 0
    quote: str = ""

    @property
    def open(self) -> bool:
        return self.depth > 0 or bool(self.quote)

    def feed(self, line: str) -> None:
        position = 0
        while position < len(line):
            if self.quote:
                position = self._inside_multiline(line, position)
            elif line[position : position + 3] in ('"""', "'''"):
                self.quote = line[position : position + 3]
                position += 3
            elif line[position] in "\"'":
                position = skip_string(line, position)
            elif line[position] == "#":
                return
            else:
                self.depth += (line[position] in "[{") - (line[position] in "]}")
                position += 1

    def _inside_multiline(self, line: str, position: int) -> int:
        if line[position] == "\\" and self.quote == '"""':
            return position + 2
        if line.startswith(self.quote, position):
            position += 3
            while line[position : position + 1] == self.quote[0]:  # up to two quotes may end the content
                position += 1
            self.quote = ""
            return position
        return position + 1


def skip_string(line: str, position: int) -> int:
    """Position after the one-line string that starts at `position`."""
    quote = line[position]
    position += 1
    while position < len(line) and line[position] != quote:
        position += 2 if line[position] == "\\" and quote == '"' else 1
    return position + 1
