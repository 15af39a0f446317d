"""Held-out loss over tokens, whatever the batch, and packing where rows stay apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from perlcli.errors import PerlError
from perlcli.run.record import read_record
from perlcli.training.sft_trainer import LEAKING, ROUNDING, check_packing, leak

PACKED = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
PADDED = DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.mark.slow
def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batch(
    perl: Any, llama: Path, tmp_path: Path, write: Any
) -> None:
    rows = [{"prompt": f"order {n}", "completion": "latte " * (1 + 9 * (n % 3 == 0))} for n in range(9)]
    source, found = write(tmp_path / "rows.jsonl", rows), []
    for size in (8, 4, 1):
        words = ("--set", f"per_device_eval_batch_size={size}", "--max-steps", "1", "--lora-r", "4")
        perl("sft", "-m", llama, "-d", source, "--eval-data", source, "-o", tmp_path / str(size), *words)
        metrics = read_record(tmp_path / str(size)).metrics
        found.append((metrics["eval_loss"], metrics["eval_token_accuracy"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("family", LEAKING)
def test_packing_is_refused_where_rows_would_see_each_other(family: str, tmp_path: Path) -> None:
    config = SFTConfig(output_dir=str(tmp_path), packing=True, use_cpu=True, bf16=False)
    with pytest.raises(PerlError, match=f"with {family}, the rows that are packed into one sequence would see each"):
        check_packing(config, family)
    check_packing(config, "llama")
    config.packing_strategy = "wrapped"
    with pytest.raises(PerlError, match="packing_strategy=wrapped cuts rows"):
        check_packing(config, "llama")


def test_a_leak_between_packed_rows_is_measured(llama: Path, gpt2: Path) -> None:
    for folder in (llama, gpt2):
        assert leak(AutoModelForCausalLM.from_pretrained(folder), PACKED) <= ROUNDING
    torch.manual_seed(1)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert leak(FalconForCausalLM(FalconConfig(**size)), PACKED) > ROUNDING
    assert leak(OPTForCausalLM(OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=32)), PACKED) > ROUNDING


def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(llama: Path) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [40, 41], [11, 12, 13, 14]]
    found = []
    for collate in (PADDED, PACKED):
        model = AutoModelForCausalLM.from_pretrained(llama)
        batch = collate([{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in rows])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
