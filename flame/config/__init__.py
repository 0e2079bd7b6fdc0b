"""Job files: typed sections, TOML and command line, strict checking, generated documentation."""

from flame.config.sections import JobConfig

__all__ = ["JobConfig"]
