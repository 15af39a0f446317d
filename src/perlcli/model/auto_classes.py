"""Which of transformers' Auto classes loads a checkpoint as a language model."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

# Each with the classes that it chooses from. The last adds the families that hear but don't see.
CLASSES: dict[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}


def architectures(config: PreTrainedConfig) -> list[str]:
    """The model classes that a config names; empty if it names none."""
    names = config.architectures
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def causal_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads all of a checkpoint as a language model: the one whose class the config names, else the
    first that knows the config; AutoModelForCausalLM if none does.

    A multimodal checkpoint may also have a class for only its language model (Qwen3.5, Llama 4). It names modules
    differently from the checkpoint and from its sequence classifier, and leaves the towers out of a merge.
    """
    known = {kind: names for kind, names in CLASSES.items() if type(config) in names and _continues(config, kind)}
    named = [kind for kind, names in known.items() if _names(names[type(config)]) & set(architectures(config))]
    own = getattr(config, "auto_map", None)  # of a model with its own code
    coded = [kind for kind in CLASSES if isinstance(own, dict) and kind.__name__ in own]
    return [*named, *coded, *known, AutoModelForCausalLM][0]


def _continues(config: PreTrainedConfig, kind: Any) -> bool:
    """Whether the class continues a text; an encoder-decoder does so only where it has a class of its decoder."""
    return kind is AutoModelForCausalLM or not config.is_encoder_decoder


def _names(classes: Any) -> set[str]:
    return {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))}
