"""Tensor parallelism: every layer's heads and channels split over the ranks of the tp axis, in place.

Parameters become DTensors over the tp mesh, so that FSDP shards them further, and checkpoints and exports see whole ones.
The computation is on plain tensors: a module that is asked for its weight hands out this rank's part of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor

from flame.models.decoder import CausalLM
from flame.models.sharding import Plan, Reader, TensorParallel, Use


def apply_tensor_parallel(model: CausalLM, mesh: DeviceMesh, deals_rows: bool = True) -> None:
    """Split a model on the meta device over the ranks of a 1-D mesh, following its modules' `tensor_parallel_plan`.

    Args:
        deals_rows: see `TensorParallel`; pipeline stages, which agree on shapes beforehand, need it off.

    Raises:
        ConfigError: heads, widths or vocabulary cannot be dealt to so many ranks.
    """
    ranks = TensorParallel(mesh.get_group(), mesh.get_local_rank(), mesh.size(), deals_rows)
    plans = layer_plans(model, ranks.size)
    uses = parameter_uses(plans)
    distribute_parameters(model, mesh, uses, ranks)
    for _, module, plan in plans:
        for name in plan.spanning if plan else ():
            module.get_submodule(name).spanned = ranks
        module.split(ranks, plan)


def layer_plans(model: CausalLM, ranks: int) -> list[tuple[str, Any, Plan | None]]:
    """(name, module, plan) of every module that has one, for so many ranks.

    Raises:
        ConfigError: heads, widths or vocabulary cannot be dealt to so many ranks.
    """
    layers: list[tuple[str, Any]] = [each for each in model.named_modules() if hasattr(each[1], "tensor_parallel_plan")]
    return [(name, layer, layer.tensor_parallel_plan(ranks)) for name, layer in layers]


def parameter_uses(plans: list[tuple[str, Any, Plan | None]]) -> dict[str, Use]:
    """What plans say about parameters, by full name; an inner module's plan goes before that of one around it."""
    found: dict[str, Use] = {}
    for prefix, _, plan in plans:
        found |= {f"{prefix}.{name}".lstrip("."): use for name, use in (plan.parameters if plan else {}).items()}
    return found


def distribute_parameters(model: nn.Module, mesh: DeviceMesh, uses: dict[str, Use], ranks: TensorParallel) -> None:
    """Make every parameter a DTensor placed by its use, read as plain tensors by its module; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        readers: dict[str, Reader] = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            reader = readers[name] = Reader(uses.get(f"{prefix}.{name}".lstrip(".")), ranks)
            if id(parameter) not in made:
                whole = distribute_tensor(parameter.detach(), mesh, [reader.placement], src_data_rank=None)
                made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        if readers:
            module.__dict__["readers"] = readers
            key = type(module), tuple(readers)
            if key not in _CLASSES:  # one for all modules of a kind, so that compiled code is shared
                _CLASSES[key] = reading_class(*key)
            module.__class__ = _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def reading_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `kind` whose attributes `names` are plain tensors, read from the parameters stored under them."""
    attributes: dict[str, Any] = {name: read_property(name) for name in names}
    return type(kind.__name__, (kind,), {**attributes, "__module__": kind.__module__})


def read_property(name: str) -> property:
    def read(module: Any) -> Any:
        return module.readers[name](module._parameters[name])

    return property(read)
