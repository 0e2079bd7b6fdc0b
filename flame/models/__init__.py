"""Language models: one decoder, one mixer file a system."""

from flame.models.context import Cache
from flame.models.decoder import CausalLM, CausalLMOutput, build_model
from flame.models.initialize import initialize_weights
from flame.models.registry import load_config, resolve_config, systems

__all__ = [
    "Cache",
    "CausalLM",
    "CausalLMOutput",
    "build_model",
    "initialize_weights",
    "load_config",
    "resolve_config",
    "systems",
]
