"""What is traced: a step of training or sampling, and its model without weights, shortened to a few layers."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from perlcli.model import heads, roles
from perlcli.model.adapters import reach_experts
from perlcli.model.auto_classes import causal_class
from perlcli.model.target_modules import ALL_LINEAR, without_text

RUN_LAYERS = 3  # the middle one represents all but the first and the last
Kind = Literal["sft", "reward", "rl", "value", "prefill", "decode"]
LEARNING = ("sft", "reward", "rl", "value")


@dataclass(frozen=True)
class Step:
    """One step of a run, in all that its memory depends on but the batch."""

    kind: Kind
    length: int  # tokens per row; decode: those in the cache
    completion: int = 0  # rl: tokens whose log-probabilities are taken; value: tokens whose returns are predicted
    group: int = 1  # rl: completions of one prompt, which is computed once for them
    dtype: str = "float32"  # of the weights; for a quantised base, what it computes in
    autocast: str = ""  # dtype of mixed precision, if it is on
    bits: int = 0  # 4 or 8 if the base is quantised
    rank: int = 0  # of the adapter; 0: every parameter trains
    targets: tuple[str, ...] | str = ()
    dora: bool = False
    checkpointing: bool = False
    reentrant: bool = False  # checkpointing as torch did it first: a layer's first pass keeps no graph
    accumulated: bool = False  # gradients of an earlier pass exist already
    cuda: bool = False

    @property
    def computes_in(self) -> torch.dtype | None:
        """The dtype of mixed precision; None if it is off."""
        return torch_dtype(self.autocast) if self.autocast else None


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


class HashedConfig:
    """A config that can be a key of a cache; equal ones share an entry."""

    def __init__(self, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
        self.key = json.dumps(config.to_dict(), sort_keys=True, default=str)
        self.config, self.trust_remote_code = config, trust_remote_code

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashedConfig) and self.key == other.key


def shortened(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with three layers if all layers are alike; else the same."""
    return _shortened(HashedConfig(config))


@functools.cache
def _shortened(hashed: HashedConfig) -> PreTrainedConfig:
    config = hashed.config
    text = config.get_text_config()
    layer_types = list(getattr(text, "layer_types", None) or [])
    is_short = text.num_hidden_layers <= RUN_LAYERS
    if text is not config or is_short or len(set(layer_types)) > 1 or _layers_differ(config):
        return config
    short = copy.deepcopy(config)
    short.num_hidden_layers = RUN_LAYERS
    if layer_types:
        short.layer_types = layer_types[:RUN_LAYERS]
    return short


def _layers_differ(config: PreTrainedConfig) -> bool:
    with torch.device("meta"), no_init_weights():
        model = causal_class(config).from_config(config)
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers_of(model)]
    return any(shape != shapes[0] for shape in shapes)


def is_quantisable(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether bitsandbytes quantises modules of this class: not of one derived from nn.Linear."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, in order."""
    wanted = int(model.config.get_text_config().num_hidden_layers)
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return next((list(layers) for layers in lists if len(layers) == wanted), [])


def bare(config: PreTrainedConfig, step: Step, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of this step without an adapter, on the meta device, with gradients only for full tuning."""
    on_causal = step.kind == "reward" and heads.needs_causal(config, trust_remote_code=trust_remote_code)
    is_classifier = step.kind == "reward" and not on_causal
    kind = AutoModelForSequenceClassification if is_classifier else causal_class(config)
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = 0
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = kind.from_config(
            config, dtype=torch_dtype(step.dtype), trust_remote_code=trust_remote_code
        )
        model.tie_weights()  # which initialising would do
        if on_causal:
            heads.put_on(model, model.dtype)
    model.requires_grad_(False)
    for parameter in heads.scored(model) if step.rank == 0 else ():
        parameter.requires_grad_(True)
    return model


def with_adapter(model: PreTrainedModel, step: Step) -> nn.Module:
    """The model with the step's adapter in float32, on the meta device; the model itself for full tuning."""
    if step.rank == 0:
        return model
    lora = LoraConfig(
        r=step.rank,
        lora_alpha=step.rank,
        use_dora=step.dora,
        target_modules=step.targets if isinstance(step.targets, str) else list(step.targets),
        exclude_modules=without_text(model),
        task_type=TaskType.SEQ_CLS if step.kind == "reward" else TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    if step.targets == ALL_LINEAR:
        reach_experts(lora, model)
    with torch.device("meta"), no_init_weights():
        return roles.as_float32(get_peft_model(model, lora))
