"""Systems by `model_type`. A mixer file registers its own; nothing else lists them."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import ConfigError, unknown_name
from flame.models.config import BOOKKEEPING, ModelConfig
from flame.schema import build

if TYPE_CHECKING:
    from flame.models.block import Block
    from flame.models.decoder import Backbone
    from flame.models.mixers.base import Mixer


@dataclass(frozen=True)
class Names:
    """Attribute names in the module tree, which are the reference's state_dict names."""

    backbone: str = "model"
    final_norm: str = "norm"
    mixer: str = "attn"
    mixer_norm: str = "attn_norm"
    mlp_norm: str = "mlp_norm"
    mlp: str = "mlp"


@dataclass(frozen=True)
class System:
    """One row of the model table: what `model_type` stands for.

    `block` and `backbone` are None for the plain pre-norm block and decoder; a system with another block order or with
    parameters of its own beside the layers names its subclass here.
    """

    config: type[ModelConfig]
    mixer: type[Mixer]
    block: type[Block] | None = None
    backbone: type[Backbone] | None = None
    names: Names = Names()


_SYSTEMS: dict[str, System] = {}


def register(system: System) -> System:
    """Add a system under its config's `model_type`."""
    _SYSTEMS[system.config.model_type] = system
    return system


def systems() -> dict[str, System]:
    """All registered systems by model_type."""
    from flame.models import mixers

    for module in pkgutil.iter_modules(mixers.__path__, mixers.__name__ + "."):
        importlib.import_module(module.name)
    return _SYSTEMS


def get_system(model_type: str) -> System:
    known = systems()
    if model_type not in known:
        raise ConfigError("model.model_type: " + unknown_name("system", model_type, known))
    return known[model_type]


def resolve_config(values: Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """The checked config for a flat dictionary with `model_type`, as found in config.json or a job's [model] table.

    Raises:
        ConfigError: model_type missing or unknown, or a key unknown, of the wrong type or impossible for the system.
    """
    if isinstance(values, ModelConfig):
        return values
    if "model_type" not in values:
        raise ConfigError(f"model.model_type is required; it is one of {', '.join(sorted(systems()))}.")
    options = {key: value for key, value in values.items() if key != "model_type" and key not in BOOKKEEPING}
    return build(get_system(values["model_type"]).config, options, "model")


def load_config(path: str | Path) -> ModelConfig:
    """The config in a JSON file, or in the config.json of a Hugging Face folder."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"model.config: there is no file {file}. Give a JSON file or a folder that holds config.json."
        )
    try:
        values = json.loads(file.read_text(), object_hook=decode_infinity)
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.config: {file} is not valid JSON: {error}.") from error
    return resolve_config(values)


def decode_infinity(table: dict[str, Any]) -> Any:
    """transformers writes an infinite float, which JSON has not, as {"__float__": "Infinity"}."""
    return float(table["__float__"]) if table.keys() == {"__float__"} else table


def block_owner(config: ModelConfig, layer_idx: int) -> tuple[System, ModelConfig]:
    """The system whose kind of block a layer has, and its config; layers in `attn` keep the model's own block."""
    model_type = config.layer_types[layer_idx] if config.layer_types else config.model_type
    system = get_system(model_type)
    if model_type == config.model_type:
        return system, config
    return system, config.derive(system.config, config.layer_options.get(model_type, {}))


def layer_system(config: ModelConfig, layer_idx: int) -> tuple[System, ModelConfig]:
    """The system that mixes the tokens of a layer, and its config, following `attn` or `layer_types`."""
    attention = config.attention_at(layer_idx)
    if attention is None:
        return block_owner(config, layer_idx)
    system = get_system("transformer")
    return system, config.derive(system.config, attention.mixer_options())
