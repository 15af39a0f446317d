"""How many tokens a model can read, and what that means for --max-length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from perlcli.errors import PerlError
from perlcli.model import context
from perlcli.model.sources import Source, locate, skeleton
from perlcli.run.record import read_record

Perl = Callable[..., Any]


def check(folder: Path, length: int) -> str | None:
    return context.check(locate(str(folder)), length, skeleton(locate(str(folder))))


def test_learned_positions_end_where_the_config_says(gpt2: Path) -> None:
    assert check(gpt2, 256) is None
    with pytest.raises(PerlError, match=r"--max-length must be at most 256, for which .* has positions, not 257"):
        check(gpt2, 257)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
TABLES: dict[str, dict[str, Any]] = {  # each ends somewhere else: an offset, padding, a buffer, scores of attention
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "roberta": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 1, "is_decoder": True},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 64, "n_positions": 64},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "vocab_size": 64, "n_positions": 64},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_positions_ends_where_the_model_stops(kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **TABLES[kind])
    source = Source(kind, kind, config)
    assert context.check(source, 64, skeleton(source)) is None
    with pytest.raises(PerlError, match=r"must be at most 64, for which .* has positions, not 65"):
        context.check(source, 65, skeleton(source))
    assert context.proposed(source) == {"max_length": 64}
    model = AutoModelForCausalLM.from_config(config).eval()
    model(input_ids=torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 65), 5))


def test_rotary_positions_only_warn(llama: Path) -> None:
    assert check(llama, 512) is None
    told = check(llama, 1000)
    assert told is not None and told.startswith("Warning: --max-length 1,000 is beyond the 512 tokens that ")


@pytest.mark.slow
def test_a_short_context_is_the_default(perl: Perl, gpt2: Path, llama: Path, rows: dict[str, Path]) -> None:
    assert context.proposed(locate(str(gpt2))) == {"max_length": 256}
    words = ("-d", rows["pairs"], "--max-steps", "1", "--lora-r", "2", "--learning-rate", "1e-2")
    perl("reward", "-m", llama, "-o", "run", *words)
    assert read_record(Path("run")).settings["max_length"] == 512
    told = perl("reward", "-m", llama, "-o", "long", *words, "--max-length", "600", "--dry-run").stdout
    assert "Warning: --max-length 600 is beyond the 512 tokens" in told
