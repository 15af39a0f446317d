"""`perl reward`: the loss of pairs and of thumbs, the head, and a folder whose scores anyone can reproduce."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from perlcli import coffee, stats
from perlcli.commands import reward
from perlcli.errors import RunFailed
from perlcli.model import loading
from perlcli.run.record import read_record

Perl = Callable[..., Any]
RUN = {
    "record.json",
    "prompts.bin",
    "settings.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "plots/training.png",
    "plots/scores.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "proof.json",
}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
LORA = 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)  # layers x rank x widths in and out of q, k, v, o
ENDS = ("", "_low", "_high")  # of a figure with an interval
METRICS = {"reload_shift", "rows", "train_rows", "mean_margin"} | {
    f"{name}{end}" for name in ("accuracy", "auc", "length_correlation") for end in ENDS
}
PAIR_METRICS = (
    METRICS
    | {"longer_wins"}
    | {f"{name}{end}" for name in ("train_accuracy", "accuracy_if_longer", "accuracy_if_shorter") for end in ENDS}
)
THUMB_METRICS = (
    METRICS
    | {"pos_weight", "train_share_thumbs_up", "share_thumbs_up", "majority_accuracy", "longer_auc"}
    | {f"{name}{end}" for name in ("train_auc", "balanced_accuracy", "accuracy_over_majority") for end in ENDS}
)
HEAD = "base_model.model.score.weight"


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain(model_name: Path, folder: Path, **options: Any) -> Callable[[list[str]], list[float]]:
    """Scores a batch of texts with only transformers and peft, as in the README."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model: Any = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=1, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    loading._keep_autograd(model)  # the path that bitsandbytes takes on other machines
    model = PeftModel.from_pretrained(model, folder).eval()

    def score(texts: list[str]) -> list[float]:
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            return [float(value) for value in model(**batch).logits[:, 0]]

    return score


def said(folder: Path) -> tuple[list[str], list[float]]:
    """The texts and scores of a run's samples of pairs that were scored in the first batch: the longest."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [(row[name], row[f"{name}_score"]) for row in samples(folder) for name in ("chosen", "rejected")]
    pairs.sort(key=lambda pair: -len(tokenizer(pair[0], add_special_tokens=False)["input_ids"]))
    return [text for text, _ in pairs[:16]], [score for _, score in pairs[:16]]


def head(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")[HEAD]


# The folder


@pytest.mark.slow
def test_run_leaves_these_files_and_no_others(
    reward_run: Path, thumbs_run: Path, files: Callable[[Path], set[str]]
) -> None:
    assert files(reward_run) == files(thumbs_run) == RUN | ADAPTER


def test_record_describes_the_run(reward_run: Path, rows: dict[str, Path]) -> None:
    found = read_record(reward_run)
    assert (found.command, found.status, found.steps) == ("reward", "finished", 2)
    assert found.trainable_parameters == LORA + 64  # and the head
    assert set(found.metrics) == PAIR_METRICS
    assert (found.metrics["rows"], found.metrics["reload_shift"]) == (12, 0)
    assert {role: part["kept"] for role, part in found.data.items()} == {"train": 32, "eval": 12}
    assert "loss on pairs: -log sigmoid(score of chosen - score of rejected)" in found.notes
    assert found.tokens == metrics(reward_run)[-1]["num_tokens"] > 0


def test_record_has_the_balance_of_thumbs(thumbs_run: Path) -> None:
    labels = [row["label"] for row in coffee.thumbs("train", 32)]
    up, down = labels.count(True), labels.count(False)
    found = read_record(thumbs_run)
    assert found.metrics["pos_weight"] == down / up
    assert found.metrics["train_share_thumbs_up"] == up / 32
    assert set(found.metrics) == THUMB_METRICS
    said = f"loss on thumbs: binary cross-entropy; {up} up, {down} down ({up / 32:.1%} up); --pos-weight auto: "
    assert any(note.startswith(said) for note in found.notes)
    assert found.tokens == metrics(thumbs_run)[-1]["num_tokens"] > 0


def test_plain_transformers_and_peft_give_the_scores_of_pairs(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    """To the bit without shared prompts."""
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "separate", *SHORT, "--no-shared-prompts")
    for run in (reward_run, Path("separate")):
        found = samples(run)
        texts, scores = said(run)
        assert len(texts) == 16
        assert plain(llama, run)(texts) == (scores if run != reward_run else pytest.approx(scores, abs=1e-5))
    found = samples(reward_run)
    right = sum(row["chosen_score"] > row["rejected_score"] for row in found)
    assert read_record(reward_run).metrics["accuracy"] == right / 12


def test_plain_transformers_and_peft_give_the_scores_of_thumbs(llama: Path, thumbs_run: Path) -> None:
    found = samples(thumbs_run)
    scores = plain(llama, thumbs_run)([row["text"] for row in found])
    assert scores == pytest.approx([row["score"] for row in found], abs=1e-5)  # in another order within the batch
    assert [row["label"] for row in found] == [row["label"] for row in coffee.thumbs("test", 12)]


def test_samples_show_the_very_text_that_is_scored(reward_run: Path) -> None:
    raw = coffee.preferences("test", 1)[0]
    said, answer = raw["prompt"][0]["content"], raw["chosen"][0]["content"]
    turns = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert samples(reward_run)[0]["chosen"] == turns


def test_head_is_trained_and_saved(reward_run: Path, thumbs_run: Path) -> None:
    """Both started with the same head, so they differ by what they learned."""
    assert head(reward_run).shape == (1, 64)
    assert not torch.equal(head(reward_run), head(thumbs_run))
    assert torch.allclose(head(reward_run), head(thumbs_run), atol=0.05)


def test_settings_of_a_run_rerun_it(reward_run: Path, perl: Perl, tmp_path: Path) -> None:
    perl("reward", "--config", reward_run / "settings.yaml", "--output", tmp_path)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (reward_run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


# The weight of thumbs up


@pytest.mark.parametrize(("wanted", "weight"), [("auto", 3.0), ("none", 1.0), ("0.25", 0.25), ("3", 3.0)])
def test_pos_weight_corrects_the_balance(
    wanted: str, weight: float, perl: Perl, llama: Path, tmp_path: Path, write: Any
) -> None:
    thumbs = [{"prompt": "a", "completion": "b", "label": int(index == 0)} for index in range(4)]
    source = write(tmp_path / "rows.jsonl", thumbs)
    result = perl("reward", "-m", llama, "-d", source, "-o", "run", "--pos-weight", wanted, "--dry-run")
    assert f"1 up, 3 down (25.0% up); --pos-weight {wanted}: {weight:g}\n" in result.stdout


@pytest.mark.parametrize(("label", "word"), [(1, "up"), (0, "down")])
def test_thumbs_of_one_label_are_rejected(
    label: int, word: str, perl: Perl, llama: Path, tmp_path: Path, write: Any
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "label": label}] * 3)
    result = perl("reward", "-m", llama, "-d", source, "-o", "run", code=2)
    assert f"Error: All 3 rows are thumbs {word}: a reward model needs both labels" in result.stderr
    assert not Path("run").exists()


# Rows


def test_pairs_without_a_prompt_and_without_held_out_rows(
    perl: Perl, llama: Path, tmp_path: Path, write: Any, files: Callable[[Path], set[str]]
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"chosen": "a latte", "rejected": "a mocha"}] * 4)
    perl("reward", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT)
    assert files(tmp_path / "run") == (RUN | ADAPTER) - {"samples.jsonl", "plots/scores.png"}
    assert set(read_record(tmp_path / "run").metrics) == {"reload_shift"}


# Bases


def test_full_tuning_saves_a_plain_classifier(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, files: Callable[[Path], set[str]]
) -> None:
    folder = tmp_path / "run"
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", folder, "--full", "--max-steps", "2")
    assert files(folder) - {"generation_config.json"} == RUN | {"README.md", "config.json", "model.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    row = samples(folder)[0]
    with torch.no_grad():
        found = model(**tokenizer(row["chosen"], add_special_tokens=False, return_tensors="pt")).logits
    assert float(found[0, 0]) == pytest.approx(row["chosen_score"], abs=1e-5)
    found = read_record(folder)
    assert found.trainable_parameters == found.total_parameters == model.num_parameters()


def test_full_tuning_in_bfloat16_reloads_to_the_same_scores(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    words = ("--full", "--dtype", "bfloat16", "--max-steps", "2")
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "run", *words)
    assert read_record(Path("run")).metrics["reload_shift"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
@pytest.mark.parametrize("precision", ["4-bit", "8-bit", "bfloat16"])
def test_other_precisions_reload_to_the_same_scores(
    precision: str, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    words = {"4-bit": ["--load-in-4bit"], "8-bit": ["--load-in-8bit"], "bfloat16": ["--dtype", "bfloat16"]}[precision]
    # each row by itself, as the plain model reads them: 8 bits round a row by what else is in its batch
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "run", *SHORT, *words, "--no-shared-prompts")
    found = read_record(Path("run"))
    assert found.metrics["reload_shift"] == 0
    assert found.device["precision"] == precision
    assert head(Path("run")).dtype == torch.bfloat16
    quantised: dict[str, Any] = {
        "4-bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    }
    options = {"quantization_config": quantised[precision], "device_map": "cpu"} if precision in quantised else {}
    texts, scores = said(Path("run"))  # not rounded to bfloat16, as the plain model's are
    assert plain(llama, Path("run"), dtype=torch.bfloat16, **options)(texts) == pytest.approx(scores, rel=2**-7)


def test_gpt2_reads_pairs_of_text(perl: Perl, gpt2: Path, tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": "order:", "chosen": " latte", "rejected": " tea"}] * 4
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", rows)
    write(tmp_path / "rows" / "test.jsonl", rows)
    perl("reward", "-m", gpt2, "-d", tmp_path / "rows", "-o", tmp_path / "run", *SHORT)
    assert samples(tmp_path / "run")[0]["chosen"] == "order: latte<|endoftext|>"
    names = {".".join(name.split(".")[-4:-2]) for name in load_file(tmp_path / "run" / "adapter_model.safetensors")}
    assert names == {"attn.c_attn", "attn.c_proj", "base_model.model"}  # the last one is the head's
    texts, scores = said(tmp_path / "run")
    assert plain(gpt2, tmp_path / "run")(texts) == scores


def test_classifier_gets_an_adapter_and_keeps_its_head(
    perl: Perl, classifier: Path, tmp_path: Path, write: Any
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "order: ", "chosen": "latte", "rejected": "tea"}] * 4)
    common = ("reward", "-m", classifier, "-d", source, "--max-steps", "1", "--lora-r", "4")
    perl(*common, "-o", tmp_path / "run", "--learning-rate", "1e-9")
    before = load_file(classifier / "model.safetensors")["score.weight"]
    assert torch.allclose(head(tmp_path / "run"), before, atol=1e-7)


def test_reward_adapter_is_continued(perl: Perl, reward_run: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    source = rows["pairs"] / "train.jsonl"
    perl("reward", "-m", reward_run, "-d", source, "-o", tmp_path, "--max-steps", "1", "--learning-rate", "1e-9")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (reward_run, tmp_path))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-7) for name in first)


def test_reward_does_not_start_from_a_policy_s_adapter(
    perl: Perl, sft_run: Path, llama: Path, rows: dict[str, Path]
) -> None:
    result = perl("reward", "-m", sft_run, "-d", rows["pairs"], "-o", "run", code=2)
    told = f"Error: --model {sft_run} is a policy's adapter\nHint: train the reward on its base: --model {llama}"
    assert told in result.stderr
    assert not Path("run").exists()


@pytest.mark.slow
def test_dry_run_writes_nothing(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    result = perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "run", *SHORT, "--dry-run")
    assert "loss on pairs: " in result.stdout
    assert list(Path().iterdir()) == []


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

    spy(reward.ThumbsTrainer)
    spy(reward.RewardTrainer)
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


def test_margins_are_subtracted_in_the_loss_as_in_trl(
    perl: Perl, llama: Path, tmp_path: Path, write: Any, seen: Any
) -> None:
    pairs = coffee.preferences("train", 16)
    rows = [{**row, "margin": 3.0} if place else dict(row) for place, row in enumerate(pairs)]
    path = write(tmp_path / "rows.jsonl", rows)
    told = perl("reward", "-m", llama, "-d", path, "-o", tmp_path / "run", *SHORT).stdout
    assert "score of rejected - margin)" in told
    assert "1 pair without a margin, of 16: their margin is 0." in told
    for batch, loss, scores in seen:
        sides = zip(scores[:4], scores[4:], batch["margin"].tolist(), strict=True)
        losses = [-math.log(sigmoid(one - other - margin)) for one, other, margin in sides]
        assert loss == pytest.approx(sum(losses) / 4, abs=1e-5)
        assert max(batch["margin"]) == 3.0


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
        assert row["mean_reward"] == pytest.approx(sum(scores) / 4, abs=1e-5)


def test_thumbs_log_the_auc_of_the_latest_rows_and_no_accuracy_of_a_batch(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, seen: Any
) -> None:
    result = perl("reward", "-m", llama, "-d", rows["thumbs"] / "train.jsonl", "-o", tmp_path / "run", *SHORT)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for (batch, _, own), row in zip(seen, metrics(tmp_path / "run"), strict=True):
        for score, like in zip(own, batch["labels"].tolist(), strict=True):
            scores[bool(like)].append(score)
        known = stats.auc(scores[True], scores[False]) if all(scores.values()) else None
        assert (row.get("running_auc"), "accuracy" in row) == (known, False)
    last = result.stderr.splitlines()[-1]
    assert "loss " in last and "AUC of the last 256 rows " in last and "accuracy" not in last


@pytest.mark.slow
def test_a_resumed_run_on_thumbs_keeps_the_rows_of_its_running_auc(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("reward", "-m", llama, "-d", rows["thumbs"] / "train.jsonl", "--lora-r", "4", "--max-length", "128")
    words += ("--per-device-train-batch-size", "4", "--save-steps", "2", "--set", "lr_scheduler_type=constant")
    perl(*words, "-o", tmp_path / "long", "--max-steps", "4")
    perl(*words, "-o", tmp_path / "run", "--max-steps", "2")
    perl(*words, "-o", tmp_path / "run", "--max-steps", "4", "--resume")
    long, resumed = ([row.get("running_auc") for row in metrics(tmp_path / name)] for name in ("long", "run"))
    assert long == resumed


def test_without_held_out_rows_a_warning_says_that_nothing_is_known(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    result = perl("reward", "-m", llama, "-d", rows["pairs"] / "train.jsonl", "-o", tmp_path / "run", *SHORT)
    assert "Warning: no rows were held out, so nothing shows whether this reward model is better than" in result.stdout
    found = read_record(tmp_path / "run")
    assert (found.verdicts, "accuracy" in found.metrics) == ([], False)


def test_the_verdict_is_printed_and_in_the_record(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    result = perl("reward", "-m", llama, "-d", rows["thumbs"], "-o", tmp_path / "run", *SHORT)
    said = read_record(tmp_path / "run").verdicts
    assert said[0].startswith("Better than chance: ") and "AUC" in said[0]
    assert all(line in result.stdout for line in said)


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
    perl("reward", "-m", llama, "-d", source, "-o", tmp_path / "run", *words, "--no-chat")
    told = read_record(tmp_path / "run").data["train"]
    assert (told["kept"], told["dropped"]) == (3, {"longer than 16 tokens": {"count": 1, "first_rows": [4]}})
    assert len(seen[0][0]["input_ids"]) == 6


# The proof


def test_folder_with_other_scores_fails_the_run(
    perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reward.save

    def spoil(prepared: Any, model: Any, folder: Path) -> None:
        original(prepared, model, folder)
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), HEAD: load_file(path)[HEAD] * 1.01}, path, metadata={"format": "pt"})

    monkeypatch.setattr(reward, "save", spoil)
    result = perl("reward", "-m", llama, "-d", rows["pairs"], "-o", tmp_path / "run", *SHORT, code=1)
    assert "Error: The saved reward model doesn't give the trained one's scores: they differ by up to" in result.stderr
    assert read_record(tmp_path / "run").status == "failed"


def test_run_that_learned_nothing_fails(perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    words = (*SHORT, "--learning-rate", "1e-300")
    result = perl("reward", "-m", llama, "-d", rows["pairs"], "-o", tmp_path / "run", *words, code=1)
    assert "Error: The reward adapter did not change: nothing was learned" in result.stderr


def test_the_adapter_has_the_requested_dropout(
    llama: Path, rows: dict[str, Path], perl: Perl, monkeypatch: Any
) -> None:
    """TRL's reward trainer turns off all dropout of the model, including the adapter's."""
    chances: set[float] = set()

    def look(trainer: Any, *_: Any) -> None:
        modules = dict(trainer.model.named_modules())
        chances.update(module.p for name, module in modules.items() if name.endswith("lora_dropout.default"))
        raise RunFailed("enough")

    monkeypatch.setattr(reward, "train", look)
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "run", *SHORT, "--lora-dropout", "0.1", code=1)
    assert chances == {0.1}


def test_a_centred_loss_is_rejected_for_thumbs(llama: Path, rows: dict[str, Path], perl: Perl) -> None:
    words = ("-m", llama, "-d", rows["thumbs"], "-o", "run", "--set", "center_rewards_coefficient=0.1")
    assert "center_rewards_coefficient only applies to pairs" in perl("reward", *words, code=2).stderr
    assert not Path("run").exists()
