"""A model's tokenizer, its padding, and the tokens that end a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from perlcli.data import Renderer
from perlcli.data.cache import TokenCache
from perlcli.data.chat import Style
from perlcli.errors import PerlError, line
from perlcli.model import weights
from perlcli.model.auto_classes import architectures, causal_class
from perlcli.model.sources import NEEDS_TRUST, TRUST, Source
from perlcli.model.time_limit import TooLong, limited
from perlcli.settings.types import fits
from perlcli.settings.yaml import read_text
from perlcli.text import shorten

TOKENIZER_CONFIG = "tokenizer_config.json"
SECONDS = 5.0  # processor time in which a template must render a message with one letter; it takes milliseconds
LONGEST = 1_000_000  # characters that it may make of it


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the adapter's folder if it has one, else the base's; it pads with a token other than EOS. Raises
    PerlError if there is no usable tokenizer."""
    tokenizer = _saved_tokenizer(source, trust_remote_code)
    choose_pad(tokenizer, embedded(source))
    return tokenizer


def embedded(source: Source) -> int | None:
    """How many tokens the base has embeddings for, by its config; None if that doesn't say."""
    count = getattr(source.config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) and count > 0 else None


def score_pad(source: Source, *, trust_remote_code: bool = False) -> int:
    """The padding token that a saved reward model was trained with; its score is read at the last other token. trl and
    others pad with EOS if the tokenizer names EOS as padding or has none: their models are read before EOS."""
    own = getattr(source.config.get_text_config(), "pad_token_id", None)
    if source.adapter is None and own is not None:
        return int(own)
    tokenizer = _saved_tokenizer(source, trust_remote_code)
    if source.adapter is not None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        return int(tokenizer.eos_token_id)
    choose_pad(tokenizer, embedded(source))
    return int(tokenizer.pad_token_id)


def _saved_tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    place = source.adapter if has_tokenizer(source) else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some values in its files are first used here
    except Exception as error:  # many parsers read tokenizers, each with its own errors
        if NEEDS_TRUST in str(error):
            raise PerlError(f"{source.name} comes with its own tokenizer code, which was not run", TRUST) from error
        raise PerlError(f"{source.name} has no readable tokenizer: {line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one if files are missing
        raise PerlError(f"{source.name} has no readable tokenizer: its vocabulary is empty")
    return tokenizer


def has_tokenizer(source: Source) -> bool:
    """Whether the source is an adapter that comes with its own tokenizer."""
    return source.adapter is not None and weights.file_of(source.adapter, TOKENIZER_CONFIG) is not None


def choose_pad(tokenizer: PreTrainedTokenizerBase, embedded: int | None = None) -> None:
    """Give the tokenizer a padding token other than EOS, at which rewards are read: its own, else its unk or another
    special token that the chat template doesn't use, else a NUL byte; one of the `embedded` tokens for which the model
    has embeddings. Raises PerlError if there is none."""
    own, known = tokenizer.pad_token_id, tokenizer.get_vocab()
    limit = len(known) + 1 if embedded is None else embedded
    if own not in (None, tokenizer.eos_token_id) and own < limit:
        return
    template = str(tokenizer.chat_template or "")
    special = map(str, [*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values()])
    candidates = [tokenizer.unk_token, *(token for token in special if token not in template), "<0x00>", "Ā"]
    usable = {token for token, number in known.items() if number < limit}
    usable -= {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, ""}
    pad = next((token for token in candidates if token in usable), None)
    if pad is None:
        raise PerlError(f"The tokenizer of {tokenizer.name_or_path} has no token besides EOS to pad with")
    tokenizer.pad_token = pad


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides a text's tokens: the vocabulary, the chat template, BOS and EOS."""
    parts = (sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Give the tokenizer the chat template in a file, if one is named; it is saved with the adapter. Raises PerlError
    if it can't be read, or isn't a template."""
    if path is None:
        return
    text = read_text(Path(path), "--chat-template")
    tokenizer.chat_template = text
    try:
        with limited(SECONDS):
            rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    except TooLong as error:
        raise PerlError(f"--chat-template {path} takes longer than {SECONDS:g} s to render one message") from error
    except TemplateSyntaxError as error:
        raise PerlError(f"--chat-template {path} is not a chat template in Jinja: {line(error)}") from error
    except Exception:  # a template may ask for other messages, and a row that it can't render is an error
        rendered = ""
    if len(rendered) > LONGEST:
        raise PerlError(f"--chat-template {path} makes {len(rendered):,} characters of a message with one")
    if not text.strip():
        raise PerlError(f"--chat-template {path} is empty")


def renderer(source: Source, tokenizer: PreTrainedTokenizerBase, style: Style | None = None) -> Renderer:
    """The renderer for this model, which knows every token that ends what the model writes."""
    return Renderer(tokenizer, eos_ids(source), style, embedded=embedded(source))


def token_cache(tokenizer: PreTrainedTokenizerBase) -> TokenCache | None:
    """The cache of this tokenizer's tokens between runs; None for a slow tokenizer, which can't be identified."""
    return TokenCache(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None


def eos_ids(source: Source) -> list[int]:
    """Every token that ends what this model writes. Raises PerlError if its configs name none that can be used."""
    eos: Any = getattr(source.config.get_text_config(), "eos_token_id", None)
    try:
        eos = GenerationConfig.from_pretrained(source.base).eos_token_id or eos
    except OSError:
        pass  # no generation config: the model's config names the tokens that end a text
    except Exception as error:  # transformers checks some values and raises errors of many types
        raise PerlError(f"{source.base}: generation_config.json can't be read: {line(error)}") from error
    eos = eos or []
    ids: list[int] = eos if isinstance(eos, list) else [eos]
    if not fits(ids, list[int]):
        raise PerlError(f"{source.name}: eos_token_id must be a number or a list of numbers, not {shorten(eos)}")
    return ids


def padded(
    rows: Sequence[list[int]], pad: int, device: torch.device | str = "cpu", *, on_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one tensor and its attention mask, both (rows, longest row). Padding is on the right, for
    scoring and training, or on the left, for generation."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding, ones, zeros = [pad] * (longest - len(row)), [1] * len(row), [0] * (longest - len(row))
        ids.append(padding + row if on_left else row + padding)
        mask.append(zeros + ones if on_left else ones + zeros)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batches_by_length(
    rows: Sequence[Sequence[int]], size: int | None, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """The places of the rows in batches of `size`: rows of similar length are together, which saves padding, and the
    longest come first, so that too little memory shows at once. Without a size, one batch in the order given. With
    `groups`, a number for each row, rows of one group are together and count as long as their longest."""
    places = list(range(len(rows)))
    if size is None:
        return [places]
    if groups is None:
        places.sort(key=lambda place: -len(rows[place]))
    else:
        longest: dict[int, int] = {}
        for group, row in zip(groups, rows, strict=True):
            longest[group] = max(longest.get(group, 0), len(row))
        places.sort(key=lambda place: (-longest[groups[place]], groups[place], -len(rows[place])))
    return [places[start : start + size] for start in range(0, len(rows), size)]


def describe(source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """The model as a run's record keeps it."""
    return {
        "name": source.name,
        "base": source.base_name,
        "adapter": source.adapter,
        "architecture": [*architectures(source.config), source.config.model_type][0],
        "auto_class": causal_class(source.config).__name__,
        "fingerprint": source.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "adapter_fingerprint": source.adapter_fingerprint,
    }
