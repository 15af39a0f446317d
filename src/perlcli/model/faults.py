"""Faults in transformers' modelling code that are worked around on the loaded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

SMALL = 1e-2  # its square is more than 0 in float16 too


def mend(model: PreTrainedModel) -> None:
    """Work around the faults that this model has.

    Gemma 3n (transformers 5.23, models/gemma3n/modeling_gemma3n.py; not reported upstream), known by its AltUp:
    - It takes the root of the hidden states' mean square, whose gradient is NaN where they are all 0: at padding on the
      left, if the padding's embedding is 0. Such an embedding becomes a small number; no other token sees it.
    - In training it clips the weight of `prediction_coefs` in place, which fails on bytes packed in 4 or 8 bits. A
      quantised base doesn't train, so that there is nothing to clip.
    Remove this when gemma3n takes the root of a clamped square, and clips no frozen weight; tests/model/test_faults.py
    fails without it as long as it is needed.
    """
    config: Any = model.config.get_text_config()
    if not hasattr(config, "altup_num_inputs"):
        return
    embedding: Any = model.get_input_embeddings()
    embedding.register_forward_hook(_not_zero)
    if getattr(model, "is_quantized", False):
        vars(config)["altup_coef_clip"] = None  # past the config's own check of types


def _not_zero(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.masked_fill((output == 0).all(dim=-1, keepdim=True), SMALL)
