"""The tokenizer of a model, its padding, and the tokens that end a text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from perlcli.data import Renderer
from perlcli.data.cache import TokenCache
from perlcli.errors import PerlError, line
from perlcli.model import weights
from perlcli.model.sources import NEEDS_TRUST, TRUST, Source, architectures
from perlcli.settings.types import fits
from perlcli.text import shorten

TOKENIZER_CONFIG = "tokenizer_config.json"


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


def describe(source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The model as a run's record keeps it."""
    return {
        "name": source.name, "base": source.base_name, "adapter": source.adapter,
        "architecture": [*architectures(source.config), source.config.model_type][0],
        "fingerprint": weights.fingerprint(source.base), "tokenizer": tokenizer_fingerprint(tokenizer),
        "adapter_fingerprint": weights.fingerprint(source.adapter) if source.adapter else None,
    }  # fmt: skip
