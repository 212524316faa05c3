"""The vision tower of a plain LLaVA, for methods that look into it; the other towers differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tprl_env.lvlm.loading.signals import TowerSignals
from tprl_env.lvlm.loading.supported import CLS_TOWERS
from tprl_env.lvlm.loading.vision import DEFAULT_CLS_LAYER


def tower_signals(model: Any, inputs: Mapping[str, Any], picture: int) -> TowerSignals:
    """Tower and projector on one picture of a batch, on request.

    Args:
        model: A ``LlavaForConditionalGeneration``.
        inputs: What its processor made.
        picture: Number of the picture in the batch.

    Raises:
        ValueError: The model is of another family.
    """
    kind = model.config.model_type
    if kind != "llava":
        raise ValueError(
            f"methods that look into the vision tower need a model of model_type 'llava'; this one "
            f"is {kind!r}. Take a method on tokens, such as divprune"
        )
    layers = model.config.vision_feature_layer
    return TowerSignals(
        model.base_model.vision_tower,
        model.base_model.multi_modal_projector,
        inputs["pixel_values"][picture : picture + 1].to(model.device, model.dtype),
        [layers] if isinstance(layers, int) else list(layers),
        model.config.vision_config.model_type in CLS_TOWERS,
        int(getattr(model.config, "cls_attention_layer", DEFAULT_CLS_LAYER)),
    )
