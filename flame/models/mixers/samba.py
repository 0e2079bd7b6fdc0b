"""Samba: Mamba layers alternating with sliding-window attention, each followed by an MLP (Ren et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from flame.models.config import AttentionLayers, ModelConfig
from flame.models.mixers.mamba import Mamba, MambaConfig, StateSpaceBackbone, check_state_space
from flame.models.registry import Names, System, register
from flame.schema import build

ODD_LAYERS = list(range(1, 18, 2))


def _default_attention() -> AttentionLayers:
    return AttentionLayers(list(ODD_LAYERS), num_heads=18, num_kv_heads=18, window_size=2048)


@dataclass(kw_only=True)
class SambaConfig(ModelConfig):
    """`attn` lists the attention layers; the others are Mamba layers of `intermediate_size` = expand * hidden_size
    channels. The MLPs follow `hidden_ratio`. `residual_in_fp32` and `use_conv_bias` are accepted and change nothing."""

    model_type: ClassVar[str] = "samba"

    hidden_size: int = 2304
    num_hidden_layers: int = 18
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    attn: AttentionLayers | list[AttentionLayers] | None = field(default_factory=_default_attention)
    state_size: int = 16
    conv_kernel: int = 4
    expand: int | float = 2
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_init_scheme: Literal["random", "constant"] = "random"
    time_step_floor: float = 1e-4
    residual_in_fp32: bool = False
    rescale_prenorm_residual: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.attn, AttentionLayers) and self.attn.layers == ODD_LAYERS:
            self.attn.layers = [index for index in ODD_LAYERS if index < self.num_hidden_layers]
        super().__post_init__()
        check_state_space(self)
        self.require(not self.rescale_prenorm_residual, "rescale_prenorm_residual", "is not an option of Samba")

    @property
    def inner_size(self) -> int:
        return int(self.expand * self.hidden_size)

    @property
    def mlp_size(self) -> int:
        """Two thirds of hidden_size * hidden_ratio rounded up to 256: intermediate_size is Mamba's."""
        width = int(self.hidden_size * (4 if self.hidden_ratio is None else self.hidden_ratio) * 2 / 3)
        return 256 * ((width + 255) // 256)

    def mamba(self) -> MambaConfig:
        """The Mamba layers' own config."""
        return MambaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            initializer_range=self.initializer_range,
            norm_eps=self.norm_eps,
            state_size=self.state_size,
            conv_kernel=self.conv_kernel,
            expand=self.expand,
            use_bias=self.use_bias,
            dt_rank=self.time_step_rank,
            dt_scale=self.time_step_scale,
            dt_min=self.time_step_min,
            dt_max=self.time_step_max,
            dt_init_scheme=self.time_step_init_scheme,
            dt_init_floor=self.time_step_floor,
        )


class SambaMixer(Mamba):
    """Mamba under Samba's config keys."""

    config_class: ClassVar[type[ModelConfig]] = SambaConfig

    def __init__(self, config: SambaConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        own = build(SambaConfig, options, "SambaMixer") if config is None else config
        super().__init__(own.mamba(), layer_idx)


register(
    System(
        SambaConfig,
        SambaMixer,
        backbone=StateSpaceBackbone,
        names=Names(backbone="backbone", final_norm="norm_f", mixer="mixer", mixer_norm="mixer_norm"),
    )
)
