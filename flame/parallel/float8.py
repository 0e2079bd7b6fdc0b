"""Linear layers of decoder blocks computed in float8 by torchao; weights stay what they are."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from flame.config.sections import Float8
from flame.errors import ConfigError
from flame.models.decoder import CausalLM

logger = logging.getLogger(__name__)

MULTIPLE = 16
"""Both widths of a float8 matrix product must be multiples of this."""
NARROWEST = 256
"""Casting the operands of a narrower layer, such as a gate's projection, costs more than its product gains."""


def apply_float8(model: CausalLM, options: Float8, device: torch.device) -> None:
    """Have the wide linear layers of all blocks multiply in float8, in place: both products of the backward too.

    Parameters, their names, dtypes and initial values are unchanged, so checkpoints and exports are the same with and
    without. Layers with a computation of their own, the embeddings and the head keep their dtype.

    Args:
        model: on the meta device, before anything is sharded.
        options: the job's section `float8`.

    Raises:
        ConfigError: torchao is missing, the device has no float8 products, or no layer qualifies.
    """
    check_available(options, device)
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = recipe(Float8LinearConfig, options)
    inside = f"{model.backbone_name}.layers."
    layers: list[Any] = [
        part for name, part in model.named_modules() if name.startswith(inside) and qualifies(name, part, options)
    ]
    if not layers:
        raise ConfigError(
            f"float8.enable: no linear layer of this model's blocks has both widths at least {NARROWEST} and divisible by "
            f"{MULTIPLE}, or float8.filter_fqns leaves all of them out. Remove the section, or widen the model."
        )
    for layer in layers:
        converted = Float8Linear.from_float(layer, config)
        layer.__dict__.update({name: value for name, value in vars(converted).items() if name not in vars(layer)})
        layer.__class__ = float8_class(Float8Linear, layer.__class__)
    logger.info("float8 (%s): %d linear layers", options.recipe_name, len(layers))


def check_available(options: Float8, device: torch.device) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("float8.enable needs torchao. Run: pip install torchao")
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not native and not options.emulate:
        raise ConfigError(
            "float8.enable needs a GPU of compute capability 8.9 or newer. To try it without one, set float8.emulate = true: "
            "values are rounded to float8 and multiplied in the usual dtype, which is slow."
        )


def recipe(config: Any, options: Float8) -> Any:
    """torchao's configuration of a recipe."""
    if options.recipe_name == "tensorwise":
        return config(emulate=options.emulate)
    chosen = config.from_recipe_name(options.recipe_name)
    object.__setattr__(chosen, "emulate", options.emulate)  # torchao's recipes cannot be asked to emulate
    return chosen


def qualifies(name: str, module: nn.Module, options: Float8) -> bool:
    """Whether a module is a plain matrix product, wide enough, and not filtered out by its name."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    widths = (module.in_features, module.out_features)
    fits = min(widths) >= NARROWEST and all(width % MULTIPLE == 0 for width in widths)
    return fits and not any(part in name for part in options.filter_fqns)


@functools.cache  # one class for all layers of a kind, so that compiled blocks share their code
def float8_class(float8: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, with its initialization and everything else of its own, but the forward of `float8`."""
    return type(f"Float8{kind.__name__}", (kind,), {"forward": float8.forward})
