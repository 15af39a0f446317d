"""The head of a reward model, which reads a score at a text's last token: that of the family's class for sequence
classification, or ours on the causal model where the family has none that fits."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import SequenceClassifierOutput

from perlcli.errors import PerlError
from perlcli.model import sources, weights
from perlcli.model.sources import Source
from perlcli.model.target_modules import HEADS

SCORE = "score"  # what most classes, and ours, call the head
WEIGHTS = tuple(f"{head}.weight" for head in HEADS)
LAST_WEIGHTS = tuple(f"{head}.out_proj.weight" for head in HEADS)  # of a head of several layers, such as RoBERTa's
OF_ADAPTER = "base_model.model."  # how peft's names of an adapter's weights begin


class CausalHead:
    """Mixed into a causal model's class: the model gives scores of each row instead of logits. Its modules keep their
    names, so that an adapter that is trained here fits the causal model; the output layer is not used."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,  # noqa: ANN401 (what the decoder takes)
    ) -> SequenceClassifierOutput:
        """Scores as `logits`, (rows, labels), of `input_ids` and `attention_mask`, (rows, tokens). As the classes of
        transformers do, it reads them at the last token other than padding."""
        model: Any = self  # a PreTrainedModel, which this class is only ever mixed into
        options = {name: value for name, value in options.items() if value is not None and name != "return_dict"}
        outputs = decoder_of(model)(input_ids=input_ids, attention_mask=attention_mask, **options)
        scores = model.score(outputs.last_hidden_state)
        last = last_of(input_ids != model.config.get_text_config().pad_token_id)
        return SequenceClassifierOutput(logits=scores[torch.arange(len(last), device=last.device), last])


def last_of(mask: torch.Tensor) -> torch.Tensor:
    """The place of each row's last unmasked token, (rows,), from a mask (rows, tokens)."""
    return (mask.int() * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model whose `last_hidden_state` its output layer reads; of a multimodal model, the text decoder."""
    inner = _inside(model)
    return model if inner is model else decoder_of(inner)


def _inside(model: PreTrainedModel) -> PreTrainedModel:
    """The next model inside a model, towards its text decoder; the model itself if there is none."""
    base: Any = model.base_model
    if base is not model:
        return base
    if model.config.get_text_config() is not model.config:
        return model.get_decoder()
    if model.get_output_embeddings() is None:
        return model
    # the output layer lies next to it: llama4's causal class names a module as its base model that it doesn't have
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def put_on(
    model: PreTrainedModel, dtype: torch.dtype, weight: torch.Tensor | None = None, labels: int = 1
) -> PreTrainedModel:
    """Give a causal model a head with a score for each of `labels`, in this dtype: with the `weight`, (labels, hidden),
    or a fresh one."""
    text, kind = model.config.get_text_config(), type(model)
    embeddings: Any = model.get_input_embeddings()
    score = nn.Linear(text.hidden_size, labels, bias=False, device=embeddings.weight.device, dtype=dtype)
    if score.weight.device.type != "meta":
        deviation = float(getattr(text, "initializer_range", None) or 0.02)
        fresh = torch.empty(labels, text.hidden_size).normal_(std=deviation)
        score.weight.data.copy_(fresh if weight is None else weight)
    model.add_module(SCORE, score.requires_grad_(False))
    # In place, so that a model that was loaded quantised, or by another class, stays all else that it is. transformers
    # looks at the file of a model's module, and saves the name of its class as the architecture.
    names = {"__module__": kind.__module__, "__doc__": CausalHead.__doc__}
    model.__class__ = type(name_of(kind), (CausalHead, kind), names)
    model.config.num_labels = labels
    return model


def name_of(kind: type) -> str:
    """The name of a causal class with our head: GraniteForCausalLM becomes GraniteForSequenceClassification, as
    transformers would call it; programs that serve models know that this means `score.weight` at the last token."""
    return re.sub(r"(For[A-Z]\w*|LMHeadModel)?$", "ForSequenceClassification", kind.__name__, count=1)


def scored(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that decide a reward model's scores: all of a class for sequence classification; of a causal model
    with our head, not the output layer, and no tower for images or sound."""
    if not isinstance(model, CausalHead):
        return list(model.parameters())
    return [*decoder_of(model).parameters(), *model.get_submodule(SCORE).parameters()]


def described(model: nn.Module) -> dict[str, str] | None:
    """How plain transformers loads a causal model with our head: the `class`, and the name of its `decoder`; None for
    any other model."""
    if not isinstance(model, CausalHead) or not isinstance(model, PreTrainedModel):
        return None
    decoder, kind = decoder_of(model), type(model).__mro__[2]
    name = next(name for name, module in model.named_modules() if module is decoder)
    return {"class": kind.__name__ if hasattr(transformers, kind.__name__) else "AutoModelForCausalLM", "decoder": name}


# Which head


def is_on_causal(source: Source, *, full: bool = False, trust_remote_code: bool = False) -> bool:
    """Whether a reward model's head is ours on the causal model, and not that of the family's own class. `full` if all
    of the model is trained and saved, not only an adapter and the head. Raises PerlError if neither can be."""
    own, causal = classifier(source, trust_remote_code=trust_remote_code), _causal(source, trust_remote_code)
    outside = _outside(own) | _absent(own, source) if own is not None else set()
    kind, known = source.config.model_type, type(source.config)
    if own is None and causal is None:  # no class, or one that can't be built without weights: loading will say why
        if known in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(source.config, "auto_map", None):
            return known not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        problem = f"{source.base_name} ({kind}) can't be a reward model: transformers has no causal language model"
        raise PerlError(f"{problem} and no sequence classifier of this family", "name a causal language model")
    if own is None or causal is None:
        _check_saved(source, outside, is_needed=causal is None and not full)
        return own is None
    if source.config.get_text_config() is not source.config:  # the class would load, and adapt, its other towers too
        return True
    if source.is_classifier:
        return SCORE not in outside and f"{SCORE}.weight" in heads_in(source)
    return not outside <= set(HEADS)


def _check_saved(source: Source, outside: set[str], *, is_needed: bool) -> None:
    """Raises PerlError if a fresh reward model would have random layers that an adapter's folder does not contain."""
    unsaved = sorted(outside - set(HEADS))
    if is_needed and unsaved and not source.is_classifier:
        problem = f"{source.base_name} can't get a reward adapter: its class starts with a random {unsaved[0]}"
        raise PerlError(f"{problem}, which an adapter does not contain", "train all of it with --full")


def needs_causal(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> bool:
    """Whether a fresh reward model with this config has our head on the causal model. Never raises."""
    fresh = copy.deepcopy(config)
    fresh.architectures = None
    try:
        return is_on_causal(Source("", "", fresh), full=True, trust_remote_code=trust_remote_code)
    except PerlError:  # no model of this family can be made: building it will say so
        return False


def classifier(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """The family's own class for one score, without weights; None if transformers has none for this config."""
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except Exception:  # no such class, or modelling code that computes while it is built
        return None
    return model


def _causal(source: Source, trust_remote_code: bool) -> PreTrainedModel | None:
    model = sources.skeleton(source, trust_remote_code=trust_remote_code)
    return model if isinstance(model, PreTrainedModel) else None


def _outside(model: PreTrainedModel) -> set[str]:
    """The modules of a classifier that its base doesn't have: `score`, or `classifier` and a `pooler`."""
    inside = f"{model.base_model_prefix}."
    if model.base_model is model:  # code of its own, without a name for the base
        return set()
    return {name.partition(".")[0] for name, _ in model.named_parameters() if not name.startswith(inside)}


def _absent(model: PreTrainedModel, source: Source) -> set[str]:
    """The parts of a classifier's base that a language model's weights don't have, such as BERT's pooler: they would
    start at random, and an adapter does not contain them. Empty if the weights are not here."""
    names = weights.names(source.base) if source.base and not source.is_classifier else {}
    held = {part for name in names for part in name.split(".")}
    parts = model.base_model.named_children()
    return {name for name, part in parts if names and name not in held and any(True for _ in part.parameters())}


def heads_in(source: Source) -> set[str]:
    """The weights of the head that a saved reward model has: `score.weight`, or `classifier.weight` and so on; empty
    for any other model, and if its files are not here. Raises PerlError if they can't be read."""
    if not source.is_classifier:
        return set()
    prefix = OF_ADAPTER if source.adapter else ""
    names = {name.removeprefix(prefix) for name in weights.names(source.place)}
    return {name for name in names if name.partition(".")[0] in HEADS}


def why_alone(source: Source) -> str | None:
    """Why the head of a reward adapter can't be used on the policy's base; None if it can."""
    found = heads_in(source)
    if len(found) <= 1 and all(name.endswith(".weight") for name in found):
        return None
    return f"its head has more than one weight: {', '.join(sorted(found))}"


def saved(place: str) -> torch.Tensor | None:
    """The weight of the linear head that a reward model's folder has, (labels, hidden); None if there is none. Raises
    PerlError if the folder can't be read."""
    name = next((name for name in weights.names(place) if name.removeprefix(OF_ADAPTER) in WEIGHTS), None)
    return None if name is None else weights.tensor(place, name)


def labels_of(source: Source) -> int:
    """How many labels a reward model loads with: as many as are saved, or one for a fresh head."""
    if source.is_classifier and source.adapter is None:
        return source.config.num_labels or 1
    return (saved_labels(source) if source.is_classifier else None) or 1


def saved_labels(source: Source) -> int | None:
    """How many labels the saved head of a reward model has: a score for each. None if its weights are not here, or
    have no head that is known. Raises PerlError if they can't be read."""
    for name in weights.names(source.place):
        if name.removeprefix(OF_ADAPTER) in (*WEIGHTS, *LAST_WEIGHTS):
            head = weights.tensor(source.place, name)
            if not head.dim() or not len(head):
                raise PerlError(f"{source.name}: {name} must have a row for each label, not the shape {[*head.shape]}")
            return len(head)
    return None
