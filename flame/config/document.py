"""The job reference, from the strings under the keys: docs/config.md and the lists in ``--help``.

`python -m flame.config.document` writes docs/config.md of this checkout.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.config.old_names import RENAMED, RETIRED
from flame.config.sections import JobConfig
from flame.config.toml import value_text
from flame.errors import FlameError
from flame.schema import describe, type_hints

PAGE = Path(__file__).parents[2] / "docs" / "config.md"

INTRODUCTION = """\
# Job files

<!-- Written by `python -m flame.config.document` from flame/config; change the text there. -->

A job is a TOML file of the sections below. Every key has a default, except that a job needs a model. Every key can be
set on the command line after the file, where it wins:

```
flame train JOB.toml --training.steps 2000 --optimizer.lr=3e-4 --checkpoint.enable
```

A bare switch means true, `--section.no_switch` false; list entries are separated by commas, or given as a TOML list;
`none` takes a value away again. `flame plan JOB.toml` shows what a job amounts to, without a GPU. What a key may hold is
checked before anything starts, and the complete job is saved with the run, in this same form.
"""


@dataclass(frozen=True)
class Key:
    """One documented key.

    Attributes:
        name: dotted, from the section on.
        takes: accepted values, in words.
        default: as TOML; empty where there is none.
        text: the documentation.
    """

    name: str
    takes: str
    default: str
    text: str


@functools.cache
def texts_of(cls: type) -> dict[str, str]:
    """Field name -> the string literal below the field, on one line.

    Raises:
        FlameError: a field has none.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = typing.cast(ast.ClassDef, definition).body
    texts = {}
    for statement, following in zip(body, body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts[statement.target.id] = " ".join(value.value.split())
    bare = {item.name for item in dataclasses.fields(cls)} - set(texts)
    if bare:
        raise FlameError(f"{cls.__name__}: no documentation under {', '.join(sorted(bare))}.")
    return texts


def keys_of(cls: type, prefix: str) -> list[Key]:
    """The keys of one table, without those that are tables themselves."""
    hints, texts, keys = type_hints(cls), texts_of(cls), []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint) or (prefix, item.name) == ("model", "keys"):
            continue
        keys.append(Key(f"{prefix}.{item.name}", takes_text(hint), default_text(item), texts[item.name]))
    return keys


def takes_text(hint: Any) -> str:
    """What a key accepts; an absent value is said by the default."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if type(None) in typing.get_args(hint):
        return " or ".join(takes_text(option) for option in options)
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return "tables" if dataclasses.is_dataclass(item) else {str: "strings", float: "numbers"}[item]
    return describe(hint)


def default_text(item: dataclasses.Field) -> str:
    """A default as it would be written."""
    if item.default is dataclasses.MISSING:
        return "" if item.default_factory is dataclasses.MISSING else value_text(item.default_factory())
    return "" if item.default is None else value_text(item.default)


def tables() -> dict[str, type]:
    """Name of every table, inner ones included -> its dataclass."""
    found: dict[str, type] = {}
    for section, cls in type_hints(JobConfig).items():
        found[section] = cls
        for name, hint in type_hints(cls).items():
            inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
            if dataclasses.is_dataclass(inner):
                found[f"{section}.{name}"] = typing.cast(type, inner)
    return found


def page() -> str:
    """docs/config.md."""
    parts = [INTRODUCTION]
    for name, cls in tables().items():
        brackets = f"[[{name}]]" if name.endswith(".sources") else f"[{name}]"
        parts.append(f"## {brackets}\n\n{inspect.cleandoc(cls.__doc__ or '')}\n")
        if name == "validation.sources":
            parts.append("The keys are those of [[training.sources]].\n")
            continue
        rows = [f"| `{key.name.split('.')[-1]}` | {cell(key)} | {key.text} |" for key in keys_of(cls, name)]
        parts.append("\n".join(["| key | takes | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join([*parts, old_names()])


def cell(key: Key) -> str:
    return key.takes.replace("|", "\\|") + (f"; default `{key.default}`" if key.default else "")


def old_names() -> str:
    """The part of the page about names from other job files."""
    renamed = "\n".join(f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    gone = "\n".join(f"| `{key}` | {entry.advice} |" for key, entry in RETIRED.items())
    return f"""\
## Names of older job files

Job files of fla-org/flame and of torchtitan up to 0.2 open here. These keys are accepted with a warning; old and new name
at once are an error.

| old | now |
|---|---|
{renamed}

These have no counterpart. Where the value asks for nothing, the file opens with a warning; otherwise it is refused.

| key | instead |
|---|---|
{gone}
"""


def help_text(width: int = 110) -> str:
    """All keys with defaults, for the end of ``--help``."""
    lines = ["settings, each as --section.key value:"]
    for name, cls in tables().items():
        if name.endswith(".sources"):
            continue
        lines += ["", f"[{name}]"]
        for key in keys_of(cls, name):
            default = f" (default: {key.default})" if key.default else ""
            lines.append(f"  --{key.name}{default}")
            lines += textwrap.wrap(f"{key.takes}. {key.text}", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
