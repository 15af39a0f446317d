"""The frozen base: where a model name leads, its weights in 16, 8 or 4 bits, its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perlcli import coffee, device, expressions, weights
from perlcli.data import Renderer
from perlcli.data.cache import TokenCache
from perlcli.errors import PerlError, line, shorten
from perlcli.settings import ModelSettings, misfit
from perlcli.values import describe as in_words
from perlcli.values import fits
from perlcli.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS

TOKENIZER_CONFIG = "tokenizer_config.json"
# Of peft's types: the field that names further weights, which peft reads whatever kind of file they are.
ELSEWHERE = {
    "XLORA": "adapters", "SHADOW": "shadow_model", "MULTITASK_PROMPT_TUNING": "prompt_tuning_init_state_dict_path",
}  # fmt: skip
TRUST = "--trust-remote-code runs it; read it first"
NEEDS_TRUST = "trust_remote_code=True"  # in transformers' error where a model's own code would have to run
# What is read of an adapter's config, which peft takes as it comes.
ADAPTER_FIELDS: dict[str, Any] = {
    "base_model_name_or_path": str | None, "target_modules": str | list[str] | None, "r": int | dict | None,
    "lora_alpha": float | None, "lora_dropout": float | None, "use_dora": bool | None, "bias": str | None,
    "exclude_modules": str | list[str] | None, "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, Any] | None, "alpha_pattern": dict[str, Any] | None,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model name leads: a base, or an adapter and the base that its config names."""

    name: str
    base: str
    config: Any  # transformers' config of the base
    adapter: str | None = None
    adapter_config: Any = None  # peft's config

    @property
    def is_classifier(self) -> bool:
        """Whether this is a reward model: an adapter with a head, or a whole sequence classifier."""
        if self.adapter_config is not None:
            return str(getattr(self.adapter_config.task_type, "value", self.adapter_config.task_type)) == "SEQ_CLS"
        return any("ForSequenceClassification" in name for name in architectures(self.config))

    @property
    def is_embedded(self) -> bool:
        """Whether the base is the one that perlcli brings."""
        place = Path(self.base)
        if not place.is_dir() or place.parts[-3:] != coffee.BASE.parts[-3:]:
            return False
        if place.resolve() == coffee.BASE.resolve():
            return True
        return weights.fingerprint(self.base) == weights.fingerprint(str(coffee.BASE))

    @property
    def base_name(self) -> str:
        """The base for a person to read."""
        return coffee.NAME if self.is_embedded else self.base


def locate(name: str | None, *, option: str = "--model", trust_remote_code: bool = False) -> Source:
    """Find a base or adapter by hub id or folder, None being the embedded base. Reads configs alone.

    Raises PerlError.
    """
    if name is None:
        return Source(coffee.NAME, str(coffee.BASE), _config(str(coffee.BASE), option, trust_remote_code))
    path = Path(name).expanduser()
    if path.is_file():
        raise PerlError(f"{option} {name} is a file", "name the folder that holds it")
    looks_local = path.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise PerlError(f"{option} {name} does not exist")
    where = str(path.resolve()) if path.is_dir() else name  # absolute, so that adapters find their base from anywhere
    if path.is_dir():
        weights.check(where, option)
    adapter_config = _adapter_config(where, is_folder=path.is_dir(), option=option)
    if adapter_config is None:
        return Source(name, where, _config(where, option, trust_remote_code))
    base = adapter_config.base_model_name_or_path
    if not base:
        raise PerlError(f"The adapter {name} does not say which base it belongs to")
    if unusable := misfit("model", base):
        raise PerlError(f"{option} {name}: the base that {ADAPTER_CONFIG} names {unusable}")
    if not Path(base).exists() and Path(base).parts[-3:] == coffee.BASE.parts[-3:]:
        base = str(coffee.BASE)  # trained on the embedded base of another environment
    if Path(base).is_dir() and not Path(base).is_absolute():
        base = str(Path(base).resolve())  # as trl writes it for a base that was named so
    config = _base_config_of(name, base, trust_remote_code)
    _check_base(name, base)
    source = Source(name, base, config, where, adapter_config)
    if wrong := expressions_fault(adapter_config, lambda: skeleton(source, trust_remote_code=trust_remote_code)):
        raise PerlError(f"{option} {name}: {ADAPTER_CONFIG}: {wrong}")
    return source


def check_adapter_weights(folder: str) -> None:
    """Raise PerlError where an adapter's weights are not safetensors: peft takes a pickle for want of them, on the hub
    too."""
    if Path(folder).is_dir():
        _adapter_config(folder, is_folder=True, option="The adapter")
        weights.check(folder, "The adapter")
    elif weights.of_hub(folder, ADAPTER_WEIGHTS) is None:
        raise PerlError(f"The adapter {folder} has no {ADAPTER_WEIGHTS} that can be had from the hub", weights.CONVERT)


def _check_base(adapter: str, base: str) -> None:
    """Raise PerlError where an adapter's base is an adapter itself, or holds no safetensors."""
    if (Path(base) / ADAPTER_CONFIG).exists():  # transformers would put that one on, too, be it a pickle
        hint = f"perl merge {base} --output DIR, then DIR as base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}"
        raise PerlError(f"The base {base} of the adapter {adapter} is an adapter itself", hint)
    if Path(base).is_dir():
        weights.check(base, "The base")


def architectures(config: Any) -> list[str]:
    """The classes that a model's config names; none where it names none in words."""
    found = config.architectures
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _adapter_config(where: str, *, is_folder: bool, option: str) -> Any:
    from peft import PeftConfig

    if not (Path(where) / ADAPTER_CONFIG).exists() if is_folder else not _hub_has_adapter(where, option):
        return None
    try:
        found = PeftConfig.from_pretrained(where)
    except Exception as error:  # peft takes what it finds for the arguments of a class
        raise PerlError(f"{option} {where}: {ADAPTER_CONFIG} can't be read: {line(error)}") from error
    for name, kind in ADAPTER_FIELDS.items():
        value = getattr(found, name, None)
        if not fits(sorted(value, key=str) if isinstance(value, set) else value, kind):
            told = f"{name} must be {in_words(kind)}, not {shorten(value)}"
            raise PerlError(f"{option} {where}: {ADAPTER_CONFIG} can't be used: {told}")
    kind = str(getattr(found.peft_type, "value", found.peft_type))
    if getattr(found, ELSEWHERE.get(kind, ""), None):
        problem = f"{option} {where} is {kind}, whose {ELSEWHERE[kind]} names other files to load"
        raise PerlError(problem, "an adapter is taken whose weights lie in its own folder")
    return found


def expressions_fault(config: Any, model: Callable[[], nn.Module | None]) -> str | None:
    """What is wrong with the regular expressions that choose an adapter's modules; `model` is built if it has any."""
    wanted = [getattr(config, name, None) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    found = [text for text in wanted if isinstance(text, str) and text not in ("", "all-linear")]
    patterns = [getattr(config, name, None) or {} for name in ("rank_pattern", "alpha_pattern")]
    found += [rf"(.*\.)?({key})$" for pattern in patterns for key in pattern]  # as peft uses them
    built = model() if found else None
    names = [name for name, _ in built.named_modules()] if built is not None else []
    told = expressions.fault(found, names)
    return None if told is None else f"what chooses the modules {told}"


def _hub_has_adapter(name: str, option: str) -> bool:
    """Whether a hub repository holds an adapter; raises PerlError where it isn't there or can't be reached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, ADAPTER_CONFIG)
    except LocalEntryNotFoundError as error:  # no network: a base may lie in the cache all the same
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        problem = f"{option} {name} is not a local folder, and the hub can't be reached"
        raise PerlError(problem, "check the name and the network") from error
    except EntryNotFoundError:
        return False
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise PerlError(f"{option} {name} is neither a local folder nor a model on the hub: {line(error)}") from error
    return True


def _base_config_of(adapter: str, base: str, trust_remote_code: bool) -> Any:
    try:
        return _config(base, "--model", trust_remote_code)
    except PerlError as error:
        if error.hint == TRUST:
            raise
        raise PerlError(
            f"The adapter {adapter} belongs to the base {base}, which isn't there",
            f"put it back, or correct base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}",
        ) from error


def _config(where: str, option: str, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's client and remote code raise types of their own
        if NEEDS_TRUST in str(error):
            raise PerlError(
                f"{option} {where} brings modelling code of its own, which is not run unasked", TRUST
            ) from error
        inside = sorted(str(path.parent) for path in Path(where).glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"it holds adapters, name one: {', '.join(inside)}" if inside else "check the name and the network"
        raise PerlError(f"{option} {where} can't be read as a model: {line(error)}", hint) from error
    attention = str(getattr(config.get_text_config(), "_attn_implementation", None) or "")
    if "/" in attention and not trust_remote_code:
        raise PerlError(f"{option} {where} asks for the attention {attention}, which is code from the hub", TRUST)
    return config


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the adapter's folder where it has one, else of the base; padded with a token other than EOS."""
    tokenizer = _saved_tokenizer(source, trust_remote_code)
    choose_pad(tokenizer)
    return tokenizer


def score_pad(source: Source, *, trust_remote_code: bool = False) -> int:
    """The token that a saved reward model was padded with: it is read at the last token that is another.

    Others pad with EOS where a tokenizer has no padding (trl) or names EOS: such a model is read before its EOS.
    """
    own = getattr(source.config.get_text_config(), "pad_token_id", None)
    if source.adapter is None and own is not None:
        return int(own)
    tokenizer = _saved_tokenizer(source, trust_remote_code)
    if source.adapter is not None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        return int(tokenizer.eos_token_id)
    choose_pad(tokenizer)
    return int(tokenizer.pad_token_id)


def _saved_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The tokenizer as its files have it."""
    place = source.adapter if has_tokenizer(source) else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some of what its files hold is first looked at here
    except Exception as error:  # tokenizers are read by many parsers
        if NEEDS_TRUST in str(error):
            problem = f"{source.name} brings code of its own for its tokenizer, which is not run unasked"
            raise PerlError(problem, TRUST) from error
        raise PerlError(f"{source.name} has no tokenizer that can be read: {line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made for GPT-2 where the files are missing
        raise PerlError(f"{source.name} has no tokenizer that can be read: it holds no words")
    return tokenizer


def has_tokenizer(source: Source) -> bool:
    """Whether an adapter comes with a tokenizer of its own."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if source.adapter is None or Path(source.adapter).is_dir():
        return source.adapter is not None and (Path(source.adapter) / TOKENIZER_CONFIG).exists()
    try:
        hf_hub_download(source.adapter, TOKENIZER_CONFIG)
    except EntryNotFoundError:
        return False
    return True


def choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a token that is not EOS: reward models are read at the last token that isn't padding, and that is EOS.

    Takes the tokenizer's own pad, else its unk or another special token that no chat template uses, else a NUL byte.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    template = str(tokenizer.chat_template or "")
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for token in tokenizer.all_special_tokens if str(token) not in template]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) not in template]
    vocabulary = tokenizer.get_vocab()
    candidates = [tokenizer.unk_token, *special, *added, "<0x00>", "Ā"]
    pad = next((token for token in candidates if token and token not in taken and token in vocabulary), None)
    if pad is None:
        raise PerlError(f"The tokenizer of {tokenizer.name_or_path} has no token besides EOS to pad with")
    tokenizer.pad_token = pad


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides a text's tokens: the vocabulary, the chat template, BOS and EOS."""
    parts = (sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def renderer(source: Source, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer for this model, with every token that its generation config ends at."""
    return Renderer(tokenizer, eos_ids(source))


def token_cache(tokenizer: Any) -> TokenCache | None:
    """Where this tokenizer's tokens are kept between runs; None for one that can't say all that it is."""
    return TokenCache(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None


def eos_ids(source: Source) -> list[int]:
    """Every token that ends what this model writes."""
    found = _generation_eos(source.base) or getattr(source.config.get_text_config(), "eos_token_id", None) or []
    listed = found if isinstance(found, list) else [found]
    if not fits(listed, list[int]):
        raise PerlError(f"{source.name}: eos_token_id must be a number or a list of them, not {shorten(found)}")
    return listed


def _generation_eos(base: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:
        return None  # a base without a generation config: the model's config says what ends a text
    except Exception as error:  # transformers checks some of its values
        raise PerlError(f"{base}: generation_config.json can't be read: {line(error)}") from error


def load_causal(source: Source, settings: ModelSettings) -> PreTrainedModel:
    """The base as a causal language model, on the device, ready for adapters."""
    return _load(AutoModelForCausalLM, source.base, settings)


def load_classifier(source: Source, settings: ModelSettings, pad_token_id: int) -> PreTrainedModel:
    """The base with a head of one score; a fresh head unless the folder is a sequence classifier."""
    model = _load(AutoModelForSequenceClassification, source.base, settings, num_labels=1)
    config = model.config.get_text_config()
    config.pad_token_id = pad_token_id
    config.use_cache = False  # a score needs no cache of keys and values, which can outweigh the model
    return model


def _load(kind: Any, where: str, settings: ModelSettings, **options: Any) -> PreTrainedModel:
    quantisation = _quantisation(settings)
    if quantisation is not None:
        options["quantization_config"] = quantisation
    if device.kind() == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}  # straight there, not by way of the host's memory
    elif quantisation is not None:
        options["device_map"] = "cpu"
    weights.check(where)
    try:
        model: Any = kind.from_pretrained(
            where, dtype=getattr(torch, device.dtype_name(settings)),
            trust_remote_code=settings.trust_remote_code, use_safetensors=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise PerlError(f"The model {where} can't be loaded: {line(error)}") from error
    _keep_autograd(model)
    model.requires_grad_(False)
    return model


def _quantisation(settings: ModelSettings) -> BitsAndBytesConfig | None:
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    compute = getattr(torch, device.dtype_name(settings))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _keep_autograd(model: nn.Module) -> None:
    """Keep 4-bit layers on the path that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a Linear4bit in place at the first forward in eval mode
    without grad, and has no autograd from then on: LoRA gradients are wrong without an error. To be removed when
    bitsandbytes keeps autograd there; tests/test_base.py fails without this line for as long as it is needed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (torch types attributes as modules)


def skeleton(source: Source, *, trust_remote_code: bool = False) -> nn.Module | None:
    """The base's modules without their weights, to look at names and shapes; None where they can't be had so."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(source.config, trust_remote_code=trust_remote_code)
    except Exception:  # no causal LM, or modelling code that computes as it is built: loading it will tell
        return None


def describe(source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The model as a run's record keeps it."""
    return {
        "name": source.name, "base": source.base_name, "adapter": source.adapter,
        "architecture": [*architectures(source.config), source.config.model_type][0],
        "fingerprint": weights.fingerprint(source.base), "tokenizer": tokenizer_fingerprint(tokenizer),
        "adapter_fingerprint": weights.fingerprint(source.adapter) if source.adapter else None,
    }  # fmt: skip


def same_base(one: Source, other: Source) -> bool:
    """Whether two sources stand on the same weights: the same place, or equal fingerprints."""
    if one.base == other.base:
        return True
    mark = weights.fingerprint(one.base)
    return bool(mark) and mark == weights.fingerprint(other.base)
