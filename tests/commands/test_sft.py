"""`perl sft`: what is learned from each kind of row, and the folder that a run leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import SFTTrainer

from perlcli import coffee, data
from perlcli.data.render import IGNORED, of_demonstration
from perlcli.model import loading, roles, tokenizers
from perlcli.model.sources import locate
from perlcli.model.weights import fingerprint
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]
RUN = {"record.json", "prompts.bin", "settings.yaml", "metrics.jsonl", "samples.jsonl", "plots/training.png"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
LORA = 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)  # layers x rank x widths in and out of q, k, v, o
SAID = [{"role": "user", "content": "a tall latte"}]
CALL = [{"role": "assistant", "content": "add_order_item(latte, size=large)"}]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The batches that the loss is computed on."""
    batches: list[dict[str, torch.Tensor]] = []
    original = SFTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    return batches


def learned(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Each row's ids and those of them that the loss counts, without padding."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert (labels[mask == 0] == -100).all()
        assert ((labels == ids) | (labels == -100)).all()
        found.append((ids[mask == 1].tolist(), labels[labels != -100].tolist()))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path, tolerance: float = 0.0) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


# The folder


def test_run_leaves_these_files_and_no_others(sft_run: Path, files: Callable[[Path], set[str]]) -> None:
    assert files(sft_run) == RUN | TOKENIZER | ADAPTER
    assert (sft_run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_record_describes_the_run(sft_run: Path, llama: Path, rows: dict[str, Path]) -> None:
    found = read_record(sft_run)
    assert (found.command, found.status, found.failure, found.steps, found.seed) == ("sft", "finished", None, 2, 0)
    total = AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    assert (found.trainable_parameters, found.total_parameters) == (LORA, total + LORA)
    assert found.model == {
        "name": str(llama),
        "base": str(llama),
        "adapter": None,
        "architecture": "LlamaForCausalLM",
        "auto_class": "AutoModelForCausalLM",
        "fingerprint": fingerprint(str(llama)),
        "adapter_fingerprint": None,
        "tokenizer": tokenizers.tokenizer_fingerprint(AutoTokenizer.from_pretrained(llama)),
        "rendering": {"chat": True, "chat_template_kwargs": {}, "loss_on": "assistant"},
    }
    counts = {role: (part["source"], part["read"], part["kept"]) for role, part in found.data.items()}
    source = str(rows["demonstrations"])
    assert counts == {"train": (source, 32, 32), "eval": (source, 12, 12)}
    assert set(found.metrics) == {"train_loss", "eval_loss", "eval_token_accuracy"}
    assert found.settings["lora_target_modules"] == "attention"
    assert (found.trl_settings["max_steps"], found.trl_settings["learning_rate"]) == (2, 0.01)
    assert found.peak_memory_mb > 0
    assert found.elapsed_seconds > 0


def test_metrics_and_samples_are_lines_of_json(sft_run: Path) -> None:
    metrics = [json.loads(line) for line in (sft_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert metrics[-1]["num_tokens"] == read_record(sft_run).tokens
    samples = [json.loads(line) for line in (sft_run / "samples.jsonl").read_text().splitlines()]
    wanted = coffee.demonstrations("test", 4)
    assert [(row["prompt"], row["demonstration"]) for row in samples] == [
        (row["prompt"][0]["content"], row["completion"][0]["content"]) for row in wanted
    ]
    assert all(row["policy"] for row in samples)


def test_samples_plots_and_card_that_fail_leave_a_run_that_trained(
    perl: Perl, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails(torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr("perlcli.run.plots.curves", fails(ValueError("no font")))
    monkeypatch.setattr("perlcli.run.card.text", fails(KeyError("loss")))
    result = perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "run", *SHORT)
    found = read_record(Path("run"))
    assert (found.status, found.failure) == ("finished", None)
    assert found.notes[-3:] == [
        "The samples could not be made: The GPU's memory is too small (out of memory while sampling).",
        "The plots could not be made: ValueError: no font.",
        "The model card could not be made: KeyError: 'loss'.",
    ]
    assert all(note in result.stdout for note in found.notes)
    assert "eval_loss" in found.metrics
    assert (Path("run") / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_settings_of_a_run_rerun_it(sft_run: Path, perl: Perl, tmp_path: Path) -> None:
    perl("sft", "--config", sft_run / "settings.yaml", "--output", tmp_path / "again")
    assert same(tmp_path / "again", sft_run)
    perl("sft", "--config", sft_run / "settings.yaml", "--output", tmp_path / "other", "--seed", "1")
    assert not same(tmp_path / "other", sft_run)


def test_adapter_has_the_measured_loss_in_plain_peft(sft_run: Path, llama: Path, rows: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), sft_run).eval()
    ours = roles.load_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), str(sft_run), trainable=False)
    render = tokenizers.renderer(locate(str(llama)), AutoTokenizer.from_pretrained(sft_run))
    losses = []
    for row in data.load(str(rows["demonstrations"]), "sft", split="test").rows:
        tokens = of_demonstration(render, row)
        ids, labels = torch.tensor([tokens["input_ids"]]), torch.tensor(tokens["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
            assert torch.equal(ours(input_ids=ids).logits[0], logits)
        kept = labels[1:] != IGNORED
        losses.append(torch.nn.functional.cross_entropy(logits[:-1][kept], labels[1:][kept], reduction="none"))
    assert read_record(sft_run).metrics["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_adapter_has_changed(sft_run: Path) -> None:
    assert all(tensor.abs().sum() > 0 for name, tensor in weights(sft_run).items() if "lora_B" in name)


# What is learned


def test_completions_are_learned_and_prompts_are_not(
    perl: Perl, llama: Path, seen: Any, tmp_path: Path, write: Any
) -> None:
    text = {"prompt": "order: ", "completion": "latte"}
    source = write(tmp_path / "rows.jsonl", [{"prompt": SAID, "completion": CALL}, text])
    result = perl("sft", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT, "--no-chat")
    assert "train: rendered as text: prompt and completion joined (--chat makes them turns of a chat)" in result.stdout
    tokenizer = AutoTokenizer.from_pretrained(llama)
    end = tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(SAID, add_generation_prompt=True)["input_ids"]
    answer = tokenizer("add_order_item(latte, size=large)<|im_end|>")["input_ids"]
    tail = tokenizer("\n")["input_ids"]
    plain = [tokenizer("order: ")["input_ids"], [*tokenizer("latte")["input_ids"], end]]
    found = sorted(learned(seen[0]), key=lambda row: -len(row[0]))
    assert found == [(prompt + answer + tail, answer), (plain[0] + plain[1], plain[1])]


@pytest.mark.slow
def test_text_rows_become_chats_and_the_report_says_so(
    perl: Perl, llama: Path, seen: Any, tmp_path: Path, write: Any
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": SAID[0]["content"], "completion": CALL[0]["content"]}] * 2)
    result = perl("sft", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT)
    chats = write(tmp_path / "chats.jsonl", [{"prompt": SAID, "completion": CALL}] * 2)
    perl("sft", "-m", llama, "-d", chats, "-o", tmp_path / "other", *SHORT)
    assert learned(seen[0]) == learned(seen[1])
    how = "rendered as chats: prompt = user turn, completion = assistant turn (--no-chat joins the text)"
    assert f"train: {how}" in result.stdout
    assert read_record(tmp_path / "run").data["train"]["rendered"] == [how]


def test_all_tokens_can_be_learned(perl: Perl, llama: Path, seen: Any, tmp_path: Path, rows: dict[str, Path]) -> None:
    words = ("--loss-on", "all")
    perl("sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "-o", tmp_path / "run", *SHORT, *words)
    assert all(ids == counted for ids, counted in learned(seen[0]))


@pytest.mark.parametrize("name", ["assistant_only_loss", "completion_only_loss"])
def test_what_is_learned_has_one_option(name: str, perl: Perl, llama: Path, tmp_path: Path) -> None:
    words = ("-d", "coffee", "-o", tmp_path / "run", *SHORT, "--set", f"{name}=true")
    assert f"--set {name}: use the option --loss-on" in perl("sft", "-m", llama, *words, code=2).stderr


@pytest.mark.parametrize("column", ["messages", "text"])
def test_of_a_row_without_a_prompt_answers_are_learned_or_all_text(
    column: str, perl: Perl, llama: Path, seen: Any, tmp_path: Path, write: Any
) -> None:
    row = {"messages": SAID + CALL + SAID + CALL, "text": "a tall latte"}[column]
    source = write(tmp_path / "rows.jsonl", [{column: row}] * 2)
    perl("sft", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = "<|im_start|>user\na tall latte<|im_end|>\n<|im_start|>assistant\n" + CALL[0]["content"] + "<|im_end|>\n"
    answer = tokenizer(CALL[0]["content"] + "<|im_end|>")["input_ids"] * 2
    ids = tokenizer(text * 2 if column == "messages" else "a tall latte<|im_end|>")["input_ids"]
    assert learned(seen[0]) == [(ids, answer if column == "messages" else ids)] * 2
    assert not (tmp_path / "run" / "samples.jsonl").exists()  # nothing to answer


def test_thumbs_up_are_learned_and_thumbs_down_left_out(
    perl: Perl, llama: Path, seen: Any, tmp_path: Path, write: Any
) -> None:
    liked = [True, False, True, False]
    answers = [[{"role": "assistant", "content": str(index)}] for index in range(4)]
    rows = [{"prompt": SAID, "completion": a, "label": b} for a, b in zip(answers, liked, strict=True)]
    result = perl("sft", "-m", llama, "-d", write(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "run", *SHORT)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert sorted(tokenizer.decode(counted) for _, counted in learned(seen[0])) == ["0<|im_end|>", "2<|im_end|>"]
    assert "thumbs, 4 rows read, 2 kept; dropped 2 with a thumbs down (rows 2, 4)" in result.stdout


def test_rows_that_are_too_long_are_left_out_and_never_cut(
    perl: Perl, llama: Path, seen: Any, tmp_path: Path, write: Any
) -> None:
    rows = [{"text": "latte"}, {"text": "latte " * 40}, {"text": "mocha"}]
    words = ("--max-length", "16")
    perl("sft", "-m", llama, "-d", write(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "run", *SHORT, *words)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert {tokenizer.decode(ids) for ids, _ in learned(seen[0])} == {"latte<|im_end|>", "mocha<|im_end|>"}
    told = read_record(tmp_path / "run").data["train"]
    assert (told["read"], told["kept"]) == (3, 2)
    assert told["dropped"] == {"longer than 16 tokens": {"count": 1, "first_rows": [2]}}


@pytest.mark.slow
def test_accumulated_batches_equal_one_batch(perl: Perl, llama: Path, tmp_path: Path, rows: dict[str, Path]) -> None:
    common = ("sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "--max-steps", "2", "--lora-r", "4")
    perl(*common, "-o", tmp_path / "whole", "--per-device-train-batch-size", "4")
    perl(*common, "-o", tmp_path / "parts", "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2")
    assert same(tmp_path / "whole", tmp_path / "parts", 1e-6)


# Where it starts


@pytest.mark.slow
def test_adapter_is_continued(perl: Perl, sft_run: Path, tmp_path: Path, rows: dict[str, Path]) -> None:
    common = ("sft", "-m", sft_run, "-d", rows["demonstrations"] / "train.jsonl", "--max-steps", "1")
    perl(*common, "-o", tmp_path / "still", "--learning-rate", "1e-12")
    perl(*common, "-o", tmp_path / "moved", "--learning-rate", "1e-2")
    assert same(tmp_path / "still", sft_run, 1e-9)
    assert not same(tmp_path / "moved", sft_run, 1e-3)
    found = read_record(tmp_path / "moved")
    assert (found.settings["lora_r"], found.settings["lora_alpha"]) == (4, 8)
    assert found.settings["lora_target_modules"] == "k_proj,o_proj,q_proj,v_proj"
    assert found.trainable_parameters == LORA


def test_adapter_keeps_its_own_lora_settings(perl: Perl, sft_run: Path, rows: dict[str, Path]) -> None:
    common = ("sft", "-m", sft_run, "-d", rows["demonstrations"], "-o", "run")
    result = perl(*common, "--lora-r", "32", "--lora-dropout", "0.5", code=2)
    told = f"{sft_run} is already an adapter: --lora-r 32, but the adapter has 4; --lora-dropout 0.5, but the adapter"
    assert told in result.stderr
    assert "Hint: leave the option out" in result.stderr
    assert not Path("run").exists()
    assert "--full can't start from the adapter" in perl(*common, "--full", code=2).stderr


def test_reward_model_is_not_a_policy(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> None:
    result = perl("sft", "-m", reward_run, "-d", rows["demonstrations"], "-o", "run", code=2)
    assert f"--model {reward_run} is a reward model, not a policy" in result.stderr
    assert not Path("run").exists()


def test_full_tuning_saves_a_plain_model(
    perl: Perl, llama: Path, tmp_path: Path, rows: dict[str, Path], files: Callable[[Path], set[str]]
) -> None:
    folder = tmp_path / "run"
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", folder, "--full", "--max-steps", "2")
    assert files(folder) == RUN | TOKENIZER | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    tuned, before = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(llama)
    assert type(tuned).__name__ == "LlamaForCausalLM"
    found = read_record(folder)
    assert found.trainable_parameters == found.total_parameters == before.num_parameters()
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, tuned.get_parameter(name))}
    assert moved == {name for name, _ in before.named_parameters()}
    assert found.settings["lora_r"] is None


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
def test_quantised_base_trains_an_adapter_in_float32(
    bits: str, perl: Perl, llama: Path, tmp_path: Path, rows: dict[str, Path]
) -> None:
    source = rows["demonstrations"] / "train.jsonl"
    perl("sft", "-m", llama, "-d", source, "-o", tmp_path / "run", *SHORT, f"--load-in-{bits}bit")
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    found = read_record(tmp_path / "run")
    assert found.device["precision"] == f"{bits}-bit"
    assert found.trl_settings["bf16"] is True
    assert found.trainable_parameters == LORA


def test_gpt2_trains_on_text_and_rejects_conversations(
    perl: Perl, gpt2: Path, tmp_path: Path, write: Any, rows: dict[str, Path]
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "order: ", "completion": "latte"}] * 4)
    perl("sft", "-m", gpt2, "-d", source, "-o", tmp_path / "run", *SHORT)
    names = {".".join(name.split(".")[-4:-2]) for name in weights(tmp_path / "run")}
    assert names == {"attn.c_attn", "attn.c_proj"}
    result = perl("sft", "-m", gpt2, "-d", rows["demonstrations"], "-o", tmp_path / "other", *SHORT, code=2)
    assert "has no chat template, but the data contains conversations" in result.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_dry_run_prints_and_writes_nothing(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    result = perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "run", *SHORT, "--dry-run")
    assert "adapter: LoRA r=4, alpha=8 on k_proj, o_proj, q_proj, v_proj; " in result.stdout
    assert "training: 2 steps of 4 rows, learning rate 0.01 (linear)" in result.stdout
    assert result.stdout.endswith("Dry run: nothing was loaded, trained or written.\n")
    assert list(Path().iterdir()) == []


def test_a_model_needs_data(perl: Perl, llama: Path) -> None:
    result = perl("sft", "-m", llama, "-o", "run", code=2)
    assert f"Error: --data is missing for the model {llama}" in result.stderr
    assert not Path("run").exists()
