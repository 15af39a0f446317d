"""`perl reward` on a family without a class for it: the folder, the code in its model card, merging, resuming, RL."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, tokenizer_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from unbroken import differences, killed_after

from perlcli.run.record import read_record

Perl = Callable[..., Any]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="session")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Granite of two layers, with an output layer of its own; transformers has no classifier for Granite."""
    folder = tmp_path_factory.mktemp("models") / "granite"
    tokenizer = tokenizer_of(folder, chat=True)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model("granite", vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **heads)
    config.update(tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def granite_run(tmp_path_factory: pytest.TempPathFactory, perl: Perl, granite: Path, rows: dict[str, Path]) -> Path:
    """The folder of `perl reward` on it."""
    folder = tmp_path_factory.mktemp("runs") / "granite"
    perl("reward", "--model", granite, "--data", rows["pairs"], "--output", folder, *SHORT)
    return folder


def by_the_card(folder: Path, texts: list[str]) -> list[float]:
    """The scores of texts by the code in a folder's model card."""
    found = CODE.search((folder / "README.md").read_text())
    assert found is not None
    code = (
        found[1].replace('texts = ["..."]', f"texts = {texts!r}").replace('folder, base = ".",', "folder, base = HERE,")
    )
    code = code.replace('folder = "."', "folder = HERE")
    assert "perlcli" not in code
    names: dict[str, Any] = {"HERE": str(folder)}
    exec(code, names)
    scores: list[float] = names["scores"].tolist()
    return scores


def said(folder: Path) -> tuple[list[str], list[float]]:
    """The texts and scores of a run's samples."""
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if "text" in samples[0]:
        return [row["text"] for row in samples], [row["score"] for row in samples]
    pairs = [(row[name], row[f"{name}_score"]) for row in samples for name in ("chosen", "rejected")]
    return [text for text, _ in pairs], [score for _, score in pairs]


@pytest.mark.slow
def test_the_run_trains_and_saves_an_adapter_with_a_head(granite_run: Path) -> None:
    found = read_record(granite_run)
    assert found.metrics["reload_shift"] == 0
    assert found.model["causal_head"] == {"class": "GraniteForCausalLM", "decoder": "model"}
    assert "The score's head is on the causal model; the model card shows how to load it." in found.notes
    weights = load_file(granite_run / "adapter_model.safetensors")
    assert weights["base_model.model.score.weight"].shape == (1, 32)
    assert found.trainable_parameters == sum(tensor.numel() for tensor in weights.values())
    assert json.loads((granite_run / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


@pytest.mark.slow
def test_the_code_in_the_model_card_gives_the_same_scores(granite_run: Path) -> None:
    texts, scores = said(granite_run)
    assert by_the_card(granite_run, texts) == pytest.approx(scores, abs=1e-6)
    assert len(set(scores)) > len(scores) / 2


def test_a_merged_reward_loads_by_the_code_in_its_card(granite_run: Path, perl: Perl, tmp_path: Path) -> None:
    told = perl("merge", granite_run, "--output", tmp_path / "merged").stdout
    assert "as a causal model with a head, by the code in its README.md: the same scores, bit for bit." in told
    texts, scores = said(granite_run)
    assert by_the_card(tmp_path / "merged", texts) == pytest.approx(scores, abs=1e-5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "an ordinary model" not in card
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["GraniteForSequenceClassification"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # which ignores the head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_tuning_trains_what_scores_and_leaves_the_output_layer(
    dtype: str, granite: Path, perl: Perl, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--full", "--max-steps", "2", "--learning-rate", "1e-2", "--dtype", dtype)
    perl("reward", "-m", granite, "-d", rows["thumbs"], "-o", tmp_path / "run", *words)
    found = read_record(tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (granite, tmp_path / "run"))
    output = before.pop("lm_head.weight")
    assert torch.equal(after["lm_head.weight"], output.to(after["lm_head.weight"].dtype))
    assert not any(torch.equal(after[name], value.to(after[name].dtype)) for name, value in before.items())
    assert found.metrics["reload_shift"] == 0
    assert found.total_parameters - found.trainable_parameters == output.numel()
    texts, scores = said(tmp_path / "run")
    close = 1e-5 if dtype == "float32" else 0.05
    assert by_the_card(tmp_path / "run", texts) == pytest.approx(scores, abs=close, rel=close)


@pytest.mark.parametrize("options", [["--load-in-4bit"], ["--use-dora", "--dtype", "bfloat16"]], ids=["4-bit", "DoRA"])
def test_other_precisions_and_adapters_reload_to_the_same_scores(
    options: list[str], granite: Path, perl: Perl, rows: dict[str, Path]
) -> None:
    perl("reward", "-m", granite, "-d", rows["pairs"], "-o", "run", *SHORT, *options)
    assert read_record(Path("run")).metrics["reload_shift"] == 0
    card = Path("run/README.md").read_text()
    assert ("pass the same `quantization_config`" in card) == (options == ["--load-in-4bit"])


def test_a_reward_adapter_is_continued(granite_run: Path, perl: Perl, rows: dict[str, Path], tmp_path: Path) -> None:
    source = rows["pairs"] / "train.jsonl"
    perl("reward", "-m", granite_run, "-d", source, "-o", tmp_path, "--max-steps", "1", "--learning-rate", "1e-9")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (granite_run, tmp_path))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-7) for name in first)


@pytest.mark.slow
def test_the_head_is_there_before_weights_are_loaded_or_the_run_refused(
    perl: Perl, granite: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("-d", rows["pairs"], "-o", "run", "--dry-run")
    assert "The score's head is on the causal model" in perl("reward", "-m", granite, *words).stdout
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")
    AutoTokenizer.from_pretrained(granite).save_pretrained(tmp_path / "vit")
    told = perl("reward", "-m", tmp_path / "vit", *words, code=2).stderr
    assert "(vit) can't be a reward model: transformers has no causal language model and no sequence classifier" in told


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    granite: Path, perl: Perl, rows: dict[str, Path], tmp_path: Path
) -> None:
    source = rows["pairs"] / "train.jsonl"
    for way in ((), ("--full",)):
        lora = () if way else ("--lora-r", "4")
        words = ("reward", "-m", granite, "-d", source, "--max-steps", "3", "--save-steps", "1", *way, *lora)
        perl(*words, "-o", "run")
        whole = tmp_path / f"unbroken {len(way)}"
        Path("run").rename(whole)
        killed_after(whole, 2, tmp_path / "run")
        assert "Resuming from step 2" in perl(*words, "-o", "run", "--resume").stdout
        assert differences(whole, tmp_path / "run") == []
        Path("run").rename(tmp_path / f"resumed {len(way)}")


@pytest.mark.slow
def test_rl_and_eval_use_it_on_the_policys_base_and_merged_on_its_own(
    granite: Path, granite_run: Path, perl: Perl, rows: dict[str, Path], tmp_path: Path
) -> None:
    lengths = ("--max-length", "128", "--max-completion-length", "8")
    batch = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--num-generations", "4")
    words = ("rl", "-m", granite, "-d", rows["prompts"], *lengths, *batch, "--learning-rate", "1e-2")
    told = perl(*words, "--reward", granite_run, "-o", tmp_path / "rl").stdout
    assert f"reward: {granite_run}, an adapter on the policy's base" in told
    guards = read_record(tmp_path / "rl").guards
    assert guards[f"shift of {granite_run}"] < 1e-6
    held_out = ("-d", rows["prompts"] / "test.jsonl", *lengths)
    perl("eval", "-m", tmp_path / "rl", "--reward", granite_run, *held_out, "-o", tmp_path / "shared")
    perl("merge", granite_run, "-o", tmp_path / "merged")
    perl("eval", "-m", tmp_path / "rl", "--reward", tmp_path / "merged", *held_out, "-o", tmp_path / "apart")
    shared, apart = (read_record(tmp_path / name).metrics["mean_reward"] for name in ("shared", "apart"))
    assert shared == pytest.approx(apart, abs=1e-5)
    pairs = ("-d", rows["pairs"] / "test.jsonl", "--max-length", "128")
    perl("eval", "-m", granite_run, *pairs, "-o", tmp_path / "one")
    perl("eval", "-m", tmp_path / "merged", *pairs, "-o", tmp_path / "other")
    one, other = (read_record(tmp_path / name).metrics["mean_margin"] for name in ("one", "other"))
    assert one == pytest.approx(other, abs=1e-5)
