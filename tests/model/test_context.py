"""How many tokens a model can read, and what that means for --max-length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli.errors import PerlError
from perlcli.model import context
from perlcli.model.sources import locate
from perlcli.run.record import read_record

Perl = Callable[..., Any]


def test_learned_positions_end_where_the_config_says(gpt2: Path) -> None:
    assert context.check(locate(str(gpt2)), 256) is None
    with pytest.raises(PerlError, match=r"--max-length must be at most 256, for which .* has positions, not 257"):
        context.check(locate(str(gpt2)), 257)


def test_rotary_positions_only_warn(llama: Path) -> None:
    assert context.check(locate(str(llama)), 512) is None
    told = context.check(locate(str(llama)), 1000)
    assert told is not None and told.startswith("Warning: --max-length 1,000 is beyond the 512 tokens that ")


def test_a_short_context_is_the_default(perl: Perl, gpt2: Path, llama: Path, rows: dict[str, Path]) -> None:
    assert context.proposed(locate(str(gpt2))) == {"max_length": 256}
    words = ("-d", rows["pairs"], "--max-steps", "1", "--lora-r", "2", "--learning-rate", "1e-2")
    perl("reward", "-m", llama, "-o", "run", *words)
    assert read_record(Path("run")).settings["max_length"] == 512
    told = perl("reward", "-m", llama, "-o", "long", *words, "--max-length", "600", "--dry-run").stdout
    assert "Warning: --max-length 600 is beyond the 512 tokens" in told
