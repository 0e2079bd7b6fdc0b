"""Golden cases: reference logits and gradients to compare a model with (see FLAME_GOLDEN_DIR in conftest.py)."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from flame.models import CausalLM, build_model


@dataclass
class GoldenCase:
    config: dict
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    loss: float


def load_case(folder: Path, name: str) -> GoldenCase:
    """The case NAME; a `*_varlen` case takes its weights from the plain one."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key[2:]: value.float() for key, value in tensors.items() if key.startswith("w.")}
    if not weights:
        weights = load_case(folder, name.removesuffix("_varlen")).weights
    gradients = {key[2:]: value.float() for key, value in tensors.items() if key.startswith("g.")}
    return GoldenCase(
        json.loads(metadata["full_config"]), weights, gradients, tensors, float(metadata.get("loss", "nan"))
    )


def golden_model(case: GoldenCase) -> CausalLM:
    model = build_model(case.config)
    missing, unexpected = model.load_state_dict(case.weights, strict=False)
    if model.config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    assert not missing and not unexpected, (missing, unexpected)
    return model


def run_case(model: CausalLM, case: GoldenCase) -> torch.Tensor:
    """Logits; leaves the gradients of the case's loss (plain next-token shift over the whole row) in the parameters."""
    ids = case.tensors["input_ids"]
    cu_seqlens = case.tensors.get("cu_seqlens")
    logits = model(ids, cu_seqlens=None if cu_seqlens is None else cu_seqlens.int()).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return logits


def assert_golden(folder: Path, name: str, logits_atol: float = 2e-4, gradient_rtol: float = 0.02) -> None:
    """Logits within `logits_atol`, every gradient within `gradient_rtol` of its norm."""
    case = load_case(folder, name)
    model = golden_model(case)
    logits = run_case(model, case)
    error = (logits - case.tensors["logits"]).abs().max().item()
    assert error < logits_atol, f"{name}: logits differ by {error:.2e}"
    got = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, expected in case.gradients.items():
        actual = got[key] if got.get(key) is not None else torch.zeros_like(expected)
        off = ((actual - expected).norm() / expected.norm().clamp_min(1e-8)).item()
        assert off < gradient_rtol, f"{name}: gradient of {key} is off by {off:.2%}"
