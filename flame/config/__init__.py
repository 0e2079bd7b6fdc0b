"""Job files: typed sections, TOML and command line, strict checking, generated documentation."""

from flame.config.check import Layout, check_parallelism
from flame.config.load import load_job
from flame.config.model import model_values, resolve_model
from flame.config.sections import JobConfig
from flame.config.toml import to_toml

__all__ = ["JobConfig", "Layout", "check_parallelism", "load_job", "model_values", "resolve_model", "to_toml"]
