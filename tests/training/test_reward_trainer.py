"""Training a reward model: the loss of pairs and of thumbs, and the proof that the saved folder scores as it should."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from perlcli.run.record import read_record
from perlcli.training import reward_trainer

Perl = Callable[..., Any]
HEAD = "base_model.model.score.weight"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], float, list[float]]]:
    """For each pass the batch, the loss, and the scores that it was computed from."""
    passes = []

    def spy(trainer: type) -> None:
        original = trainer.compute_loss

        def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            batch = dict(inputs)
            with torch.no_grad():
                scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            loss = original(self, model, inputs, *args, **kwargs)
            passes.append((batch, float(loss.detach()), scores.tolist()))
            return loss

        monkeypatch.setattr(trainer, "compute_loss", compute_loss)

    spy(reward_trainer.ThumbsTrainer)
    spy(reward_trainer.RewardTrainer)
    return passes


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# The loss


def test_loss_of_pairs_is_logistic_in_the_margin(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, seen: Any
) -> None:
    perl("reward", "-m", llama, "-d", rows["pairs"] / "train.jsonl", "-o", tmp_path / "run", *SHORT)
    for (batch, loss, scores), row in zip(seen, metrics(tmp_path / "run"), strict=True):
        assert len(batch["input_ids"]) == 8  # four chosen, then their four rejected
        margins = [a - b for a, b in zip(scores[:4], scores[4:], strict=True)]
        assert loss == pytest.approx(-sum(math.log(sigmoid(margin)) for margin in margins) / 4, abs=1e-5)
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = {
        tokenizer.decode(ids[mask == 1])
        for batch, _, _ in seen
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert all(text.endswith(")<|im_end|>\n") and text.count("<|im_end|>") == 2 for text in texts)


def test_loss_of_thumbs_is_weighted_binary_cross_entropy(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, seen: Any
) -> None:
    source = rows["thumbs"] / "train.jsonl"
    perl("reward", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT, "--pos-weight", "2.5")
    for (batch, loss, scores), row in zip(seen, metrics(tmp_path / "run"), strict=True):
        likes = batch["labels"].tolist()
        parts = [
            -2.5 * math.log(sigmoid(score)) if like else -math.log(1 - sigmoid(score))
            for score, like in zip(scores, likes, strict=True)
        ]
        assert loss == pytest.approx(sum(parts) / 4, abs=1e-5)
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        right = sum((score > 0) == bool(like) for score, like in zip(scores, likes, strict=True)) / 4
        assert (row["accuracy"], row["mean_reward"]) == (right, pytest.approx(sum(scores) / 4, abs=1e-5))


def test_accumulated_thumbs_equal_one_batch(perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    common = ("reward", "-m", llama, "-d", rows["thumbs"] / "train.jsonl", "--max-steps", "2", "--lora-r", "4")
    perl(*common, "-o", tmp_path / "whole", "--per-device-train-batch-size", "4")
    parts = ("--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2")
    perl(*common, "-o", tmp_path / "parts", *parts)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


def test_rows_that_are_too_long_are_left_out_and_counted(
    perl: Perl, llama: Path, tmp_path: Path, write: Any, seen: Any
) -> None:
    """TRL drops them without a count, so ours must be all that are missing."""
    good = [{"prompt": "order", "chosen": f"latte {index}", "rejected": "no"} for index in range(3)]
    source = write(tmp_path / "rows.jsonl", [*good, {"prompt": "order", "chosen": "no", "rejected": "latte " * 30}])
    words = ("--max-length", "16", "--per-device-train-batch-size", "4", "--max-steps", "1", "--lora-r", "4")
    perl("reward", "-m", llama, "-d", source, "-o", tmp_path / "run", *words)
    told = read_record(tmp_path / "run").data["train"]
    assert (told["kept"], told["dropped"]) == (3, {"longer than 16 tokens": {"count": 1, "first_rows": [4]}})
    assert len(seen[0][0]["input_ids"]) == 6


# The proof


def test_folder_with_other_scores_fails_the_run(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reward_trainer.save

    def spoil(prepared: Any, model: Any, folder: Path) -> None:
        original(prepared, model, folder)
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), HEAD: load_file(path)[HEAD] * 1.01}, path, metadata={"format": "pt"})

    monkeypatch.setattr(reward_trainer, "save", spoil)
    result = perl("reward", "-m", llama, "-d", rows["pairs"], "-o", tmp_path / "run", *SHORT, code=1)
    assert "Error: The saved reward model doesn't give the trained one's scores: they differ by up to" in result.stderr
    assert read_record(tmp_path / "run").status == "failed"


def test_run_that_learned_nothing_fails(perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    words = (*SHORT, "--learning-rate", "1e-300")
    result = perl("reward", "-m", llama, "-d", rows["pairs"], "-o", tmp_path / "run", *words, code=1)
    assert "Error: The reward adapter did not change: nothing was learned" in result.stderr
