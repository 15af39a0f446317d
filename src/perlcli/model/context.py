"""How many tokens a model can read: by learned positions, beyond which there is nothing, or as it was trained."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from perlcli.errors import PerlError
from perlcli.model import sources
from perlcli.model.sources import Source
from perlcli.settings import GENERAL

POSITIONS = re.compile(r"(^|[._])(wpe|\w*pos\w*)$")  # modules of learned positions: wpe, embed_positions, pos_embed …


def context_of(source: Source) -> int | None:
    """The most tokens of a row by the model's config; None if that names none."""
    tokens = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def proposed(source: Source) -> dict[str, Any]:
    """--max-length for a model whose context is shorter than the default."""
    tokens = context_of(source)
    default: Any = GENERAL["max_length"]
    return {} if tokens is None or tokens >= default else {"max_length": tokens}


def check(source: Source, max_length: int, *, trust_remote_code: bool = False) -> str | None:
    """What to note about rows longer than a model was trained on; None if nothing. Raises PerlError for rows longer
    than a model's learned positions."""
    tokens = context_of(source)
    if tokens is None or max_length <= tokens:
        return None
    model = sources.skeleton(source, trust_remote_code=trust_remote_code)
    named = model.named_modules() if model is not None else ()
    if any(isinstance(module, nn.Embedding) and POSITIONS.search(name) for name, module in named):
        most = f"at most {tokens:,}, for which {source.base_name} has positions"
        raise PerlError(f"--max-length must be {most}, not {max_length:,}", f"--max-length {tokens}")
    return (
        f"Warning: --max-length {max_length:,} is beyond the {tokens:,} tokens that {source.base_name} was trained on "
        "(max_position_embeddings): it reads longer rows less well."
    )
