"""Initial weights that do not depend on how the model is sharded.

The weights of a unit (a block, or one module outside the blocks) are drawn full-size from a generator keyed by the seed
and the unit's name; a sharded parameter then keeps its own slice. Memory is filled with NaN first, so that a parameter
that no `reset_parameters` writes is found here and not as a diverging loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.errors import FlameError
from flame.models.decoder import CausalLM


@torch.no_grad()
def initialize_weights(model: CausalLM, seed: int) -> None:
    """Fill every parameter and buffer of a materialised model, sharded or not.

    Args:
        model: after `to_empty`, on its device; parameters may be DTensors on any mesh.
        seed: with the same seed and kind of device, the weights are the same for every layout.

    Raises:
        FlameError: a parameter was left unwritten by its module's `reset_parameters`.
    """
    model.tie_weights()
    for name, unit in units(model):
        device = next(unit.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
            initialize_unit(name, unit, device)


def units(model: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what is drawn at a time: every block, and every module outside them that holds parameters."""
    prefix = model.backbone_name
    for name, module in model.decoder.named_children():
        if module is not model.blocks and any(True for _ in module.parameters()):
            yield f"{prefix}.{name}", module
    for name, block in model.blocks.named_children():
        yield f"{prefix}.layers.{name}", block
    if model.lm_head is not None and not model.config.tie_word_embeddings:
        yield "lm_head", model.lm_head
    if model.decoder._parameters:
        yield prefix, OwnParameters(model.decoder)


class OwnParameters(nn.Module):
    """View of a module's direct parameters alone, so that resetting them leaves its children as they are."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._parameters, self.reset_parameters = owner._parameters, owner.reset_parameters


def initialize_unit(name: str, unit: nn.Module, device: torch.device) -> None:
    """Draw one unit full-size, children before the modules that hold them, then keep the local slices."""
    sharded: list[tuple[nn.Module, str, DTensor]] = []
    for module in unit.modules():
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                sharded.append((module, key, parameter))
                module._parameters[key] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                )
            if parameter is not None:
                poison(module._parameters[key])
        for buffer in module._buffers.values():
            poison(buffer)
    reset_children_first(unit)
    check_written(name, unit)
    for module, key, parameter in sharded:
        full = module._parameters[key]
        assert full is not None
        parameter.to_local().copy_(local_slice(full.detach(), parameter))
        module._parameters[key] = parameter


def poison(tensor: Tensor | None) -> None:
    if tensor is not None and tensor.is_floating_point():
        tensor.fill_(float("nan"))


def reset_children_first(module: nn.Module) -> None:
    for child in module.children():
        reset_children_first(child)
    reset = getattr(module, "reset_parameters", None)  # torch's convention: modules without parameters lack it
    if reset is not None:
        reset()


def check_written(name: str, unit: nn.Module) -> None:
    tensors = [*unit.named_parameters(), *unit.named_buffers()]
    unwritten = [key for key, tensor in tensors if tensor.is_floating_point() and bool(tensor.isnan().any())]
    if unwritten:
        raise FlameError(
            f"{name}: reset_parameters left {', '.join(unwritten)} unwritten; on a meta-device start they would hold garbage. "
            f"Write every parameter and buffer there."
        )


def local_slice(full: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a full tensor that every rank holds, placed like `like`; no communication.

    Inner mesh axes cut first: tensor-parallel ranks take their parts, which data-parallel ranks divide further.
    """
    mesh, part = like.device_mesh, full
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if placement.is_replicate():
            continue
        pieces = part.split(-(-part.shape[placement.dim] // mesh.size(axis)) or 1, placement.dim)
        rank = mesh.get_local_rank(axis)
        part = pieces[rank] if rank < len(pieces) else part.narrow(placement.dim, 0, 0)
    return part
