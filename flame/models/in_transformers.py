"""Exported folders in transformers: registered by a call, or through trust_remote_code. Imports transformers when used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flame.errors import FlameError
from flame.models.config import ModelConfig
from flame.models.context import Cache
from flame.models.hf import HEAD, add_remote_code, class_name
from flame.models.registry import get_system, resolve_config, systems

# Arguments of other models' forwards that would change what is computed.
NOT_TAKEN = ("inputs_embeds", "position_ids", "output_hidden_states", "output_attentions")


def register_with_transformers() -> None:
    """Make `AutoModelForCausalLM.from_pretrained` load folders of every system of flame. Imports transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type in systems():
        config_class, model_class = transformers_classes(model_type)
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


class DecodeState:
    """A decode cache in the shape that generation in transformers passes from step to step."""

    is_croppable = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.cache.seen

    def reorder_cache(self, beams: Tensor) -> None:
        """Continue row i from what row `beams[i]` has seen. States are [B, ...], of several memories [M B, ...]."""
        for layer in self.cache.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.unflatten(0, (-1, len(beams)))[:, beams.to(tensor.device)].flatten(0, 1)


@cache
def transformers_classes(model_type: str) -> tuple[Any, Any]:
    """A config and a model class of transformers around one system."""
    return config_class_of(model_type), model_class_of(model_type)


@cache
def config_class_of(model_type: str) -> Any:
    from transformers import PretrainedConfig

    known = set(get_system(model_type).config.__dataclass_fields__)

    class Config(PretrainedConfig):
        def __init__(self, **values: Any) -> None:
            """Keys that are not given take the system's defaults, not those of transformers."""
            own = {key: value for key, value in values.items() if key in known}
            own = resolve_config({**own, "model_type": model_type}).to_dict()
            super().__init__(**{**values, **{key: value for key, value in own.items() if key != "model_type"}})

        def flame_config(self) -> ModelConfig:
            values = {key: getattr(self, key) for key in known if hasattr(self, key)}
            return resolve_config({**values, "model_type": model_type})

    Config.model_type = model_type
    Config.__name__ = Config.__qualname__ = f"{class_name(model_type)}Config"
    return Config


def model_class_of(model_type: str) -> Any:
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from flame.models.decoder import CausalLM

    class Model(PreTrainedModel, GenerationMixin):
        config_class = config_class_of(model_type)
        base_model_prefix = ""
        _tied_weights_keys = {HEAD: f"{get_system(model_type).names.backbone}.embeddings.weight"}  # if config ties them

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            inner = CausalLM(config.flame_config())
            for name, child in inner.named_children():
                self.add_module(name, child)
            self.__dict__["inner"] = inner  # not a second registration of the same parameters
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Modules initialise themselves."""

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False  # the first forward makes a `DecodeState`

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.decoder.embeddings

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.lm_head

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            past_key_values: DecodeState | None = None,
            use_cache: bool | None = None,
            cu_seqlens: Tensor | None = None,
            **options: Any,
        ) -> Any:
            """As models of transformers do it, which look up these names.

            Args:
                input_ids: [B, T].
                attention_mask: [B, T], 0 for padding, on either side.
                labels: [B, T], not shifted; -100 is ignored.
                past_key_values: of the forward before.
                use_cache: start a cache for the forward after; rows with padding have none.
                cu_seqlens: [N + 1], of one packed row.
                options: `num_items_in_batch`, to divide the summed loss by; `return_dict`.
            """
            refuse_what_would_change_the_result(type(self).__name__, options)
            if attention_mask is not None and not attention_mask.all():
                logits, past = without_padding(self.inner, input_ids, attention_mask), None
            else:
                starts = past_key_values is None and use_cache and cu_seqlens is None
                past = DecodeState(self.inner.new_cache()) if starts else past_key_values
                logits = self.inner(input_ids, cu_seqlens=cu_seqlens, cache=past and past.cache).logits
            loss = None if labels is None else shifted_loss(logits, labels, options.get("num_items_in_batch"))
            output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
            return output if options.get("return_dict") is not False else output.to_tuple()

        def prepare_inputs_for_generation(
            self,
            input_ids: Tensor,
            past_key_values: DecodeState | None = None,
            attention_mask: Tensor | None = None,
            use_cache: bool | None = None,
            **unused: Any,
        ) -> dict[str, Any]:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            given = {"attention_mask": attention_mask, "use_cache": use_cache, "past_key_values": past_key_values}
            return {"input_ids": input_ids[:, seen:], **given}

        def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
            super().save_pretrained(save_directory, *arguments, **options)
            add_remote_code(Path(save_directory))

    Model.__name__ = Model.__qualname__ = f"{class_name(model_type)}ForCausalLM"
    return Model


def refuse_what_would_change_the_result(model: str, options: Mapping[str, Any]) -> None:
    """Raise FlameError for arguments that other models take and that would be ignored here."""
    wrong = [name for name in NOT_TAKEN if options.get(name) is not None and options[name] is not False]
    if wrong:
        raise FlameError(
            f"{model}: {wrong[0]} is not taken. Give input_ids with attention_mask, or one packed row with cu_seqlens."
        )


def without_padding(inner: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, T, V] with the tokens that `mask` [B, T] keeps as packed documents; 0 at the others."""
    if mask.shape != input_ids.shape:
        raise FlameError(
            f"attention_mask is {list(mask.shape)} and input_ids {list(input_ids.shape)}; give whole rows."
        )
    kept = mask.bool()
    lengths = kept.sum(1)
    cu_seqlens = nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
    found = inner(input_ids[kept][None], cu_seqlens=cu_seqlens).logits[0]
    return found.new_zeros(*input_ids.shape, found.shape[-1]).index_put((kept,), found)


def shifted_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross-entropy of each position with the next label; a mean, or the sum over `count` as gradient accumulation needs."""
    reduction = "mean" if count is None else "sum"
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction
    )
    return loss if count is None else loss / torch.as_tensor(count, device=loss.device)
