"""The one family of errors that a user can meet. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlameError(Exception):
    """Something a user can put right; the message says how. Shown without a traceback by the command line."""


class ConfigError(FlameError):
    """A configuration names something unknown, of the wrong type, or impossible together."""


class DataError(FlameError):
    """A data source is missing, empty, malformed, or does not fit the model."""


class CheckpointError(FlameError):
    """A checkpoint is missing, damaged, of another model, or could not be written."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown <kind> 'nmae'; did you mean 'name'? Known: ...` for error texts."""
    known = sorted(known)
    guess = nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}."
