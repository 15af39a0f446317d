"""How many tokens a model can read: by a table of positions, beyond which there is nothing, or as it was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from perlcli.errors import PerlError
from perlcli.model import sources
from perlcli.model.sources import Source
from perlcli.settings import GENERAL

# The names that configs have for the tokens of a row; transformers maps most others to the first.
FIELDS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "max_target_positions",
    "max_sequence_length",
    "n_ctx",
)
POSITIONS = re.compile(r"(^|[._])(wpe|\w*pos\w*)$")  # tables of positions: wpe, embed_positions, pos_encoding …


def context_of(source: Source) -> int | None:
    """The most tokens of a row by the model's config; None if that names none."""
    config = source.config.get_text_config()
    found = (getattr(config, name, None) for name in FIELDS)
    return next((tokens for tokens in found if isinstance(tokens, int) and tokens > 0), None)


def proposed(source: Source, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """--max-length for a model whose context is shorter than the default."""
    tokens, default = context_of(source), GENERAL["max_length"]
    if tokens is None or tokens >= default:
        return {}
    model = sources.skeleton(source, trust_remote_code=trust_remote_code)
    return {"max_length": min(filter(None, (tokens, positions_of(model))))}


def check(source: Source, max_length: int, model: nn.Module | None) -> str | None:
    """What to note about rows longer than a model was trained on; None if nothing. `model` has its modules, if they can
    be built without weights. Raises PerlError for rows longer than its table of positions."""
    tokens = context_of(source)
    most = positions_of(model)
    if most is None and tokens is not None and tokens < max_length and not _runs(model, max_length, tokens):
        most = tokens
    if most is not None and max_length > most:
        allowed = f"at most {most:,}, for which {source.base_name} has positions"
        raise PerlError(f"--max-length must be {allowed}, not {max_length:,}", f"--max-length {most}")
    if tokens is None or max_length <= tokens:
        return None
    return (
        f"Warning: --max-length {max_length:,} is beyond the {tokens:,} tokens that {source.base_name} was trained on "
        "(max_position_embeddings): it reads longer rows less well."
    )


def positions_of(model: nn.Module | None) -> int | None:
    """The tokens for which a model's tables of positions have rows; None if it has none, or makes them as needed."""
    return min(_tables(model), default=None) if model is not None else None


def _tables(model: nn.Module) -> Iterator[int]:
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model  # not of the tower of images
    for name, module in decoder.named_modules():
        if not POSITIONS.search(name):
            continue
        if isinstance(module, nn.Embedding):  # some leave rows out: for padding, or by an offset
            unused = (module.padding_idx + 1) if module.padding_idx is not None else getattr(module, "offset", 0)
            yield module.num_embeddings - int(unused)
    for name, table in decoder.named_buffers():
        if POSITIONS.search(name) and table.dim() == 2 and table.is_floating_point():
            yield int(table.shape[0])


def _runs(model: nn.Module | None, length: int, tokens: int) -> bool:
    """Whether the model's code runs on rows of `length` tokens: some make what they add to scores of attention for the
    `tokens` of their context only. True if it can't be tried without weights."""
    if model is None:
        return True

    def runs(count: int) -> bool:
        ids = torch.zeros(1, count, dtype=torch.long, device="meta")
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception:  # of any type: the model's own code
            return False
        return True

    return runs(length) or not runs(tokens)
