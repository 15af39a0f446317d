"""The model card: what it says, that it names no private folder, and that its code loads what the run saved."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from perlcli.run import card
from perlcli.run.files import write_json
from perlcli.run.record import RunRecord, read_record

Perl = Callable[..., Any]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAIRS = {"source": "org/pairs", "kept": 7000, "format": "pairs", "rendered": ["rendered by the model's chat template"]}


def record(**values: Any) -> RunRecord:
    return RunRecord(
        **{
            "command": "reward",
            "model": {"base": "org/base-1B", "name": "org/base-1B", "auto_class": "AutoModelForCausalLM"},
            "settings": {"lora_r": 8, "lora_alpha": 16, "data": "org/pairs", "learning_rate": 1e-4},
            "data": {"train": PAIRS},
            "device": {"precision": "bfloat16", "name": "a GPU", "type": "cuda"},
            "steps": 60,
            "versions": {"perlcli": "1.2", "torch": "2.13"},
            **values,
        }
    )


def front(text: str) -> dict[str, Any]:
    """The metadata of a card, as the Hub's own client reads it."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def executed(folder: Path, **given: str) -> dict[str, Any]:
    """The variables after running the code of a folder's card there, with its placeholders filled in."""
    found = CODE.search((folder / "README.md").read_text())
    assert found is not None
    code = found[1].replace('folder = "."', f"folder = {str(folder)!r}")
    for old, new in given.items():
        code = code.replace({"texts": '["..."]', "prompt": '"..."'}[old], new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_metadata_is_what_the_hub_reads() -> None:
    assert front(card.text(record())) == {
        "library_name": "peft",
        "base_model": "org/base-1B",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "datasets": ["org/pairs"],
        "tags": ["perl", "lora", "trl", "reward-model"],
    }
    full = front(card.text(record(command="sft", settings={"full": True, "data": "pairs.jsonl"})))
    assert (full["library_name"], full["base_model_relation"]) == ("transformers", "finetune")
    assert full["pipeline_tag"] == "text-generation" and "datasets" not in full and "lora" not in full["tags"]


@pytest.mark.parametrize("name", ["data/pairs.jsonl", "rows.CSV", "/data/org/pairs", "~/pairs", "a/b/c", "-", "coffee"])
def test_only_data_of_the_hub_is_in_the_metadata(name: str) -> None:
    assert "datasets" not in front(card.text(record(settings={"data": name})))


def test_a_local_folder_that_looks_like_a_hub_name_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "pairs").mkdir()
    assert "datasets" not in front(card.text(record()))


@pytest.mark.parametrize("base", ["1e5", "true", "null", "007"])
def test_a_name_that_yaml_could_take_for_a_number_stays_a_name(base: str) -> None:
    assert yaml.safe_load(card.text(record(model={"base": base})).split("---")[1])["base_model"] == base


def test_it_says_data_training_results_and_limits() -> None:
    held_out = {**PAIRS, "kept": 500, "dropped": {"tied scores": {"count": 3, "first_rows": [1]}}}
    metrics = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "rows": 500, "seconds_learning": 1.0}
    text = card.text(
        record(data={"train": PAIRS, "eval": held_out}, metrics=metrics, verdicts=["better than chance: yes"])
    )
    for line in (
        "# Reward model on base-1B",
        "- training data: org/pairs, 7,000 rows (pairs)",
        "- held-out data: org/pairs, 500 rows (pairs)",
        "- eval: 3 rows left out: tied scores",
        "- rendering: rendered by the model's chat template",
        "| adapter | LoRA, r=8, alpha=16 |",
        "| precision of the base | bfloat16 |",
        "| steps | 60 |",
        "| learning rate | 0.0001 |",
        "- better than chance: yes",
        "| accuracy | 90.0% (95 % interval 85.0% to 94.0%) |",
        "| rows | 500 |",
        "$ perl reward --config settings.yaml --output DIR",
        "Versions: perlcli 1.2, torch 2.13.",
    ):
        assert line in text.splitlines(), line
    assert "seconds" not in text and "held-out rows were measured" not in text and "2403.10704" in text


def test_without_held_out_rows_it_says_so() -> None:
    assert "- No held-out rows were measured in training" in card.text(record())


def test_thumbs_have_a_zero_and_pairs_have_none() -> None:
    thumbs = record(data={"train": {**PAIRS, "labels": {"up": 1200, "down": 30}}})
    text = card.text(thumbs)
    assert "A score above 0 means a thumbs up" in text and "- labels, train: 1,200 up, 30 down" in text
    assert "no zero" in card.text(record())


def test_rl_repeats_what_its_reward_was_worth(tmp_path: Path) -> None:
    import dataclasses

    judge = record(verdicts=["better than chance: can't be told with 20 rows"])
    (tmp_path / "judge").mkdir()
    write_json(tmp_path / "judge" / "record.json", dataclasses.asdict(judge))
    settings = {"reward": [str(tmp_path / "judge")], "model": "org/base-1B", "beta": 0.05}
    text = card.text(record(command="rl", settings=settings, metrics={"reward": 1.0}))
    assert "- The reward judge: better than chance: can't be told with 20 rows" in text
    assert "means over the last ten steps" in text


def test_no_folder_of_the_user_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    settings = {
        "data": "/srv/clients/acme plc/pairs.jsonl",
        "eval_data": "clients/acme/dev/rows.jsonl",
        "reward": ["/home/anna/secret/judge", "../outside/judge2"],
        "anchor": "~/policies/start",
        "output": "/mnt/x/run",
    }
    data = {"train": {**PAIRS, "source": settings["data"]}, "eval": {**PAIRS, "source": settings["eval_data"]}}
    model = {"base": "/models/private/llama", "name": "/models/private/llama", "auto_class": "AutoModelForCausalLM"}
    verdicts = ["better than its anchor (/home/anna/policies/start): no", "see /opt/hidden/notes.txt and 1/2"]
    metrics = {"rewards//home/anna/secret/judge/mean": 1.0}
    for command in ("sft", "reward", "rl"):
        text = card.text(
            record(command=command, settings=settings, data=data, model=model, verdicts=verdicts, metrics=metrics)
        )
        for private in ("anna", "srv", "acme", "clients", "outside", "/models", "private", "hidden", "mnt", "policies"):
            assert private not in text, private
        assert "pairs.jsonl" in text and "llama" in text and "1/2" in text and "(start)" in text


@pytest.mark.parametrize("run", ["sft_run", "rl_run"])
def test_the_code_for_a_policy_writes_an_answer(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run)
    names = executed(folder, prompt='"a small latte please"')
    assert names["written"].shape[1] > names["batch"]["input_ids"].shape[1]
    assert str(names["model"].dtype) == f"torch.{read_record(folder).device['precision']}"
    assert list(names["model"].peft_config) == ["default"]


@pytest.mark.parametrize("run", ["reward_run", "thumbs_run"])
def test_the_code_for_a_reward_gives_the_scores_of_the_run(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run)
    texts, scores = scored(folder)
    assert executed(folder, texts=repr(texts))["scores"].tolist() == pytest.approx(scores, abs=1e-5)


def scored(folder: Path) -> tuple[list[str], list[float]]:
    """The texts of a reward run's samples, with their scores."""
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if "text" in samples[0]:
        return [row["text"] for row in samples], [row["score"] for row in samples]
    pairs = [(row[side], row[f"{side}_score"]) for row in samples for side in ("chosen", "rejected")]
    return [text for text, _ in pairs], [score for _, score in pairs]


@pytest.mark.slow
def test_the_code_loads_merged_models(perl: Perl, sft_run: Path, reward_run: Path, tmp_path: Path) -> None:
    perl("merge", reward_run, "--output", tmp_path / "judge")
    texts, scores = scored(reward_run)
    assert executed(tmp_path / "judge", texts=repr(texts))["scores"].tolist() == pytest.approx(scores, abs=1e-4)
    perl("merge", sft_run, "--output", tmp_path / "policy", "--dtype", "bfloat16")
    names = executed(tmp_path / "policy", prompt='"tea"')
    assert str(names["model"].dtype) == "torch.bfloat16" and not hasattr(names["model"], "peft_config")
    text = (tmp_path / "policy" / "README.md").read_text()
    assert "Of the adapter that was merged:" in text and "added to the weights of its base" in text
    assert front(text)["tags"] == ["perl", "trl", "sft"]


@pytest.mark.slow
def test_the_code_quantises_the_base_as_in_training(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    words = ("--max-steps", "1", "--load-in-4bit", "--max-length", "128", "--learning-rate", "1e-2")
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "judge", *words)
    names = executed(Path("judge").resolve(), texts='["a", "b c"]')
    assert names["quantization"].load_in_4bit and names["quantization"].bnb_4bit_use_double_quant
    assert any(type(module).__name__ == "Linear4bit" for module in names["model"].modules())
    assert "pass the same `quantization_config`, or its outputs shift" in Path("judge/README.md").read_text()


@pytest.mark.slow
def test_full_tuning_leaves_a_card_too(perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    words = ("--full", "--max-steps", "1", "--max-length", "128")
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", tmp_path / "full", *words)
    assert "full tuning" in (tmp_path / "full" / "README.md").read_text()
    assert executed(tmp_path / "full", prompt='"tea"')["written"].shape[0] == 1
