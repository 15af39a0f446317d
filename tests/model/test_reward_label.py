"""Which label of a classifier is the reward: chosen by name or index, and only that label's logit is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from perlcli.errors import PerlError
from perlcli.model import heads, loading, scorers
from perlcli.model.labels import Label, choose, choose_all, names_of
from perlcli.model.roles import new_adapter
from perlcli.model.sources import locate
from perlcli.run import output_folder
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import reward_model

NAMES = ["NEGATIVE", "NEUTRAL", "POSITIVE"]
ROWS = [[5, 6, 7], [8, 9, 10, 11]]
FLOAT32 = ModelSettings(dtype="float32")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A classifier of three labels with names."""
    folder, options = tmp_path_factory.mktemp("three"), {"num_labels": 3, "id2label": dict(enumerate(NAMES))}
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(llama, **options)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """An adapter of two labels on the tiny Llama, as peft saves it: without names."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def plain(folder: Path, llama: Path | None = None) -> torch.Tensor:
    """All logits of the rows by plain transformers and peft, (rows, labels)."""
    if llama is None:
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
        model = PeftModel.from_pretrained(base, folder)
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])


# Chosen


@pytest.mark.parametrize(("asked", "index"), [("POSITIVE", 2), ("1", 1), ("0", 0)])
def test_label_is_chosen_by_name_or_index(three: Path, asked: str, index: int) -> None:
    label = choose(asked, locate(str(three)), "--model three")
    assert label == Label(NAMES[index], index, 3)
    assert label.words == f"the logit of its label {NAMES[index]} (index {index} of 3 labels)"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            None,
            "with 3 labels, and a reward is a single score: its labels are NEGATIVE, NEUTRAL, POSITIVE\nHint: --rewa",
        ),
        ("none", "with 3 labels, and a reward is a single score"),
        ("positive", "one of NEGATIVE, NEUTRAL, POSITIVE for --model x, not 'positive'\nHint: Did you mean POSITIVE?"),
        ("3", "one of NEGATIVE, NEUTRAL, POSITIVE for --model x, not '3'\nHint: --reward-label NAME, or an index"),
        ("-1", "one of NEGATIVE, NEUTRAL, POSITIVE for --model x, not '-1'"),
        ("", "one of NEGATIVE, NEUTRAL, POSITIVE for --model x, not ''"),
    ],
)
def test_other_labels_are_refused(three: Path, asked: str | None, message: str) -> None:
    with pytest.raises(PerlError) as error:
        choose(asked, locate(str(three)), "--model x")
    assert message in str(error.value)


def test_only_label_can_be_named_and_no_other(classifier: Path) -> None:
    source = locate(str(classifier))
    for asked in (None, "none", "0", "LABEL_0"):
        assert choose(asked, source, "--model x").words == ""
    with pytest.raises(
        PerlError, match=r"^--reward-label 1: --model x has only one label, LABEL_0\nHint: leave the op"
    ):
        choose("1", source, "--model x")


def test_names_that_are_numbers_come_before_indices(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "1", "1": "2", "2": "3"}}))
    source = locate(str(tmp_path))
    assert choose("1", source, "--model x").index == 0
    assert choose("0", source, "--model x").index == 0


def test_labels_of_the_same_name_need_an_index(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "a", "2": "b"}}))
    with pytest.raises(PerlError, match="has several labels of that name\nHint: give an index from 0"):
        choose("a", locate(str(tmp_path)), "--model x")


def test_adapter_without_names_has_those_of_transformers(pair: Path) -> None:
    assert names_of(locate(str(pair))) == ["LABEL_0", "LABEL_1"]


def test_config_and_weights_must_agree(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "score"}, "label2id": {"score": 0}}))
    with pytest.raises(PerlError, match=r"has 1 labels in its config\.json, but 3 in its weights"):
        names_of(locate(str(tmp_path)))


def test_head_of_several_layers_is_counted_at_its_last(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("score.weight"))
    deep = name.replace("score.weight", "classifier")
    head = {f"{deep}.dense.weight": torch.ones(8, 64), f"{deep}.out_proj.weight": torch.ones(4, 8)}
    save_file({key: value for key, value in tensors.items() if key != name} | head, path, {"format": "pt"})
    assert len(names_of(locate(str(tmp_path)))) == 4


# Of several rewards


def test_several_rewards_have_a_label_each_in_order(three: Path, pair: Path) -> None:
    rewards = [("three", locate(str(three))), ("f:f", None), ("pair", locate(str(pair)))]
    chosen = choose_all(["NEUTRAL", "none", "1"], rewards)
    assert [label and label.index for label in chosen] == [1, None, 1]


def test_single_label_goes_to_the_only_classifier_of_several(three: Path, classifier: Path) -> None:
    rewards = [("f:f", None), ("one", locate(str(classifier))), ("three", locate(str(three)))]
    chosen = choose_all(["POSITIVE"], rewards)
    assert [label and label.index for label in chosen] == [None, 0, 2]


def test_too_few_labels_and_labels_of_functions_are_refused(three: Path, pair: Path) -> None:
    rewards = [("three", locate(str(three))), ("pair", locate(str(pair)))]
    with pytest.raises(
        PerlError, match=r"must be given once for each --reward: 2 times, not 1\nHint: --reward-label no"
    ):
        choose_all(["1"], rewards)
    with pytest.raises(
        PerlError, match=r"^--reward-label 1: --reward f:f is a function or server, which has no labels"
    ):
        choose_all(["1"], [("f:f", None)])


# Read


@pytest.mark.parametrize("index", [0, 2])
def test_classifier_scores_are_the_logits_of_the_label(three: Path, index: int) -> None:
    scorer = reward_model.load(locate(str(three)), FLOAT32, index)
    torch.testing.assert_close(torch.tensor(scorer(ROWS, 1)), plain(three)[:, index])


def test_adapter_scores_are_those_of_its_label_on_either_base(pair: Path, llama: Path) -> None:
    wanted = plain(pair, llama)[:, 1]
    apart = reward_model.load(locate(str(pair)), FLOAT32, 1)
    torch.testing.assert_close(torch.tensor(apart(ROWS, 1)), wanted)
    policy = new_adapter(
        AutoModelForCausalLM.from_pretrained(llama),
        LoraSettings(lora_r=1, lora_alpha=1, lora_dropout=0.0, lora_target_modules="attention"),
        "CAUSAL_LM",
    )
    head = scorers.attach_reward(policy, str(pair), label=1)
    assert head.shape == (1, 64)
    torch.testing.assert_close(torch.tensor(scorers.SharedScorer(policy, head, 0)(ROWS, 1)), wanted)


def test_head_on_a_causal_model_has_a_row_for_each_label(llama: Path) -> None:
    model = loading.load_causal(locate(str(llama)), FLOAT32)
    weight = torch.arange(128.0).reshape(2, 64)
    assert heads.put_on(model, torch.float32, weight, 2)(torch.tensor([ROWS[0]])).logits.shape == (1, 2)
    assert torch.equal(model.get_submodule("score").weight, weight) and model.config.num_labels == 2


# From the shell


@pytest.mark.parametrize("command", ["eval", "rl", "reward", "rl-policy"])
def test_classifier_of_several_labels_needs_the_option(
    command: str, perl: Callable[..., Any], three: Path, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = {
        "eval": ("eval", "--model", three, "--data", rows["pairs"]),
        "reward": ("reward", "--model", three, "--data", rows["pairs"]),
        "rl": ("rl", "--model", llama, "--reward", three, "--data", rows["prompts"]),
        "rl-policy": ("eval", "--model", llama, "--reward", three, "--data", rows["prompts"]),
    }[command]
    result = perl(*words, "--output", tmp_path / "run", code=2)
    assert "is a classifier with 3 labels, and a reward is a single score" in result.stderr
    assert not (tmp_path / "run").exists()


def test_evaluation_keeps_the_label_in_its_record(
    perl: Callable[..., Any], three: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--data", rows["pairs"], "--output", tmp_path / "run", "--max-samples", "2", "--reward-label", "POSITIVE")
    assert "is the logit of its label POSITIVE (index 2 of 3 labels)" in perl("eval", "--model", three, *words).output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["reward_label"] == ["POSITIVE"]
    assert any("label POSITIVE" in note for note in record["notes"])


def test_option_that_nothing_would_read_is_refused(
    perl: Callable[..., Any], three: Path, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--data", rows["pairs"], "--output", tmp_path / "run", "--reward-label", "0", "--reward-label", "1")
    assert (
        "--reward-label must be given once for --model, not 2 times"
        in perl("eval", "--model", three, *words, code=2).stderr
    )
    words = ("--model", llama, "--data", rows["prompts"], "--output", tmp_path / "run")
    for option, value in (("--reward-label", "POSITIVE"), ("--reward-kwargs", "{}")):
        problem = f"Error: {option} '{value}' is for a --reward, and none is given"
        assert problem in perl("eval", *words, option, value, code=2).stderr


def test_resumed_run_has_the_same_label_or_none_if_it_is_older(tmp_path: Path) -> None:
    output_folder._check_same_settings(tmp_path, {}, {"reward_label": ()}, set())  # from before there was the option
    with pytest.raises(PerlError, match="--reward-label was NEUTRAL, now POSITIVE"):
        output_folder._check_same_settings(
            tmp_path, {"reward_label": ("NEUTRAL",)}, {"reward_label": ("POSITIVE",)}, set()
        )


def test_merged_adapter_keeps_all_of_its_labels(
    perl: Callable[..., Any], pair: Path, llama: Path, tmp_path: Path
) -> None:
    perl("merge", pair, "--dtype", "float32", "--output", tmp_path / "merged")
    torch.testing.assert_close(plain(tmp_path / "merged"), plain(pair, llama), atol=1e-4, rtol=1e-4)
