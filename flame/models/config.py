"""Model configuration: the flat dictionary that Hugging Face keeps in config.json, as a checked dataclass per system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from flame.errors import ConfigError
from flame.schema import build

# Keys that Hugging Face writes into config.json and that do not change what the model computes.
BOOKKEEPING = frozenset(
    """
    _name_or_path add_cross_attention architectures auto_map chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id dtype finetuning_task id2label is_decoder is_encoder_decoder label2id output_attentions
    output_hidden_states problem_type return_dict rope_parameters task_specific_params tie_encoder_decoder tokenizer_class
    torch_dtype torchscript transformers_version use_bfloat16
    """.split()  # noqa: SIM905
)


@dataclass
class AttentionLayers:
    """Layers of a hybrid that use softmax attention instead of the native mixer (config key `attn`)."""

    layers: list[int]
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0

    def mixer_options(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "layers"}


@dataclass(kw_only=True)
class ModelConfig:
    """Keys that all systems share. A system adds its own in a subclass, in the file of its mixer.

    Hybrids: `attn` puts softmax attention in the listed layers, as the reference does. `layer_types` names the system of
    every layer and `layer_options` gives the keys of the systems other than `model_type`:
    ``layer_types = ["gla", "gla", "transformer"]``, ``layer_options = {transformer = {num_heads = 8}}``.
    """

    model_type: ClassVar[str]

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: Literal["swish", "silu", "powlu"] = "swish"
    norm_eps: float = 1e-6
    elementwise_affine: bool | None = True
    max_position_embeddings: int | None = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attn: AttentionLayers | list[AttentionLayers] | None = None
    attnres_block_size: int | None = None
    layer_types: list[str] | None = None
    layer_options: dict[str, Any] = field(default_factory=dict)
    use_l2warp: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    # Kernel choices of the reference. flame picks its kernels by device, so these change nothing.
    use_cache: bool = True
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible combinations; subclasses extend this."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            self.require(getattr(self, name) > 0, name, "must be positive")
        block = self.attnres_block_size
        self.require(
            block is None or block == 1 or (block > 0 and block % 2 == 0), "attnres_block_size", "is 1 or even"
        )
        if self.layer_types is not None:
            self.require(self.attn is None, "layer_types", "and attn both choose layers; give one")
            self.require(
                len(self.layer_types) == self.num_hidden_layers,
                "layer_types",
                f"names {len(self.layer_types)} layers and num_hidden_layers is {self.num_hidden_layers}",
            )
        self._check_attention_layers()

    def _check_attention_layers(self) -> None:
        seen: set[int] = set()
        for spec in self.attention_layers():
            for index in spec.layers:
                self.require(0 <= index < self.num_hidden_layers, "attn.layers", f"has {index}, which is no layer")
                self.require(index not in seen, "attn.layers", f"has layer {index} twice")
                seen.add(index)

    def require(self, condition: bool, key: str, problem: str) -> None:
        """Raise ConfigError about `key` unless `condition` holds."""
        if not condition:
            raise ConfigError(
                f"model.{key} = {getattr(self, key.split('.')[0])!r} {problem} (model_type {self.model_type!r})."
            )

    def require_divisible(self, key: str, by: str) -> None:
        """Refuse a `key` that is not a multiple of the value of key `by`."""
        value, divisor = getattr(self, key), getattr(self, by)
        self.require(divisor > 0 and value % divisor == 0, key, f"must be a multiple of {by} = {divisor}")

    def attention_layers(self) -> list[AttentionLayers]:
        if self.attn is None:
            return []
        return self.attn if isinstance(self.attn, list) else [self.attn]

    def attention_at(self, layer_idx: int) -> AttentionLayers | None:
        """The `attn` entry that claims layer `layer_idx`, if any."""
        return next((spec for spec in self.attention_layers() if layer_idx in spec.layers), None)

    def scaled_dim(self, expand: float, key: str) -> int:
        """hidden_size * expand, which must be a whole number."""
        dim = round(self.hidden_size * expand)
        self.require(
            abs(dim - self.hidden_size * expand) < 1e-5 * max(dim, 1),
            key,
            f"times hidden_size {self.hidden_size} is not whole",
        )
        return dim

    @property
    def mlp_size(self) -> int:
        """Width of the gated MLP: `intermediate_size`, or two thirds of hidden_size * hidden_ratio rounded up to 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (4 if self.hidden_ratio is None else self.hidden_ratio) * 2 / 3)
        return 256 * ((width + 255) // 256)

    def to_dict(self) -> dict[str, Any]:
        """The flat dictionary that `build_model` and config.json take; keys at None are kept."""
        values = {"model_type": self.model_type, **dataclasses.asdict(self)}
        for key in ("layer_types", "layer_options"):
            if not values[key]:
                del values[key]
        return values

    def derive(self, cls: type[ModelConfig], options: Mapping[str, Any]) -> ModelConfig:
        """A config of another system for one layer of this model: shared keys from here, its own from `options`."""
        skip = {"attn", "layer_types", "layer_options"}
        shared = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(ModelConfig) if item.name not in skip
        }
        return build(cls, {**shared, **options}, f"model.layer_options.{cls.model_type}")
