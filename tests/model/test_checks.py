"""What a base can't do is said before its weights load, by every command in the same words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from perlcli.errors import PerlError
from perlcli.model import checks, tokenizers
from perlcli.model.sources import Source, locate
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]


def test_a_family_without_a_causal_class_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("vit")
    with pytest.raises(
        PerlError, match=r"--model x is vit, for which transformers .* no class of causal language models"
    ):
        checks.check(Source("x", "x", config), ModelSettings())


def test_a_config_that_no_model_can_be_built_from_is_refused() -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, pad_token_id=900, vocab_size=10)
    with pytest.raises(PerlError, match="--model x can't be built as a causal language model: "):
        checks.check(Source("x", "x", config), ModelSettings())


@pytest.fixture
def short(tmp_path: Path, llama: Path) -> Path:
    """A Llama with fewer embeddings than its tokenizer has tokens."""
    folder = tmp_path / "short"
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama, vocab_size=300)).save_pretrained(folder)
    return folder


def test_tokens_beyond_the_embeddings_are_refused_before_weights_load(
    perl: Perl, short: Path, rows: dict[str, Path]
) -> None:
    train, said = rows["pairs"] / "train.jsonl", "The model has embeddings for 300 tokens only, and none for "
    words = ("--model", short, "--data", train, "--output", "run", "--max-length", "128")
    assert said in perl("reward", *words, "--dry-run", code=2).output
    found = perl("data", "check", train, "--model", short, code=2).output
    assert found.count(said) == 1  # one fault, however many rows have it


def test_a_pad_token_without_an_embedding_is_replaced(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 400
    tokenizers.choose_pad(tokenizer, 400)
    assert tokenizer.pad_token_id < 400
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_data_check_finds_positions(perl: Perl, gpt2: Path, rows: dict[str, Path]) -> None:
    words = ("data", "check", rows["pairs"] / "train.jsonl", "--model", gpt2, "--max-length", "300")
    assert "--max-length must be at most 256" in perl(*words, code=2).output


def test_modules_that_peft_refuses_are_refused_before_weights_load(perl: Perl, llama: Path) -> None:
    words = ("--model", llama, "--data", "coffee", "--output", "run", "--dry-run", "--lora-target-modules", "lm_head")
    assert "lm_head is the output head" in perl("sft", *words, code=2).output
    assert locate(str(llama)).base == str(llama)
