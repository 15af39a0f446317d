"""`--anchor`: what the KL penalty holds the policy to, and what later commands make of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer import rloo_trainer

from perlcli.run.record import read_record
from perlcli.training import guards, policies

Perl = Callable[..., Any]
SHORT = (
    "--max-steps",
    "1",
    "--per-device-train-batch-size",
    "4",
    "--gradient-accumulation-steps",
    "1",
    "--learning-rate",
    "1e-2",
    "--max-completion-length",
    "6",
    "--max-length",
    "128",
)
JUDGED = ("--max-completion-length", "6", "--max-length", "128", "--max-samples", "4")


@pytest.fixture
def rl(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> Callable[..., Any]:
    """Runs `perl rl` into `run`, or into the folder that is named."""

    def run(model: object, *words: object, output: str = "run", code: int = 0) -> Any:
        common = ("--reward", reward_run, "--data", rows["prompts"], *SHORT)
        return perl("rl", "--model", model, *common, *words, "--output", output, code=code)

    return run


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_base_as_anchor_of_a_tuned_policy(
    rl: Any, sft_run: Path, llama: Path, perl: Perl, rows: dict[str, Path]
) -> None:
    result = rl(sft_run, "--anchor", "base")
    assert f"anchor: the base {llama}\n" in result.stdout
    record = read_record(Path("run"))
    assert abs(record.guards["kl_at_start"]) > 1e-3  # an estimate on a few samples
    assert f"KL to the anchor at the start: {record.guards['kl_at_start']:.4g} per token" in record.notes
    assert not (Path("run") / "anchor").exists()
    result = perl("eval", "--model", "run", "--reward", *(record.settings["reward"]), "-d", rows["prompts"], *JUDGED)
    assert f"anchor: the base {llama}\n" in result.stdout


@pytest.mark.slow
def test_another_policy_as_anchor(
    rl: Any, rl_run: Path, sft_run: Path, reward_run: Path, perl: Perl, rows: dict[str, Path]
) -> None:
    result = rl(sft_run, "--anchor", rl_run)
    assert f"anchor: {rl_run}\n" in result.stdout
    assert same(Path("run") / "anchor", rl_run)
    assert read_record(Path("run")).guards["kl_at_start"] != 0
    result = perl("eval", "--model", "run", "--reward", reward_run, "--data", rows["prompts"], *JUDGED)
    assert f"anchor: {rl_run}, as the run kept it\n" in result.stdout


@pytest.mark.slow
def test_the_start_by_its_own_path_is_the_start(rl: Any, sft_run: Path) -> None:
    rl(sft_run, "--anchor", sft_run)
    assert read_record(Path("run")).guards["kl_at_start"] == 0
    assert same(Path("run") / "anchor", sft_run)


@pytest.mark.slow
def test_the_base_by_its_path_is_the_base(rl: Any, sft_run: Path, llama: Path) -> None:
    assert f"algorithm: rloo; anchor: {llama}\n" in rl(sft_run, "--anchor", llama, "--dry-run").stdout
    rl(sft_run, "--anchor", llama)
    record = read_record(Path("run"))
    assert (abs(record.guards["kl_at_start"]) > 1e-3, record.memory["mb"]["anchor"]) == (True, 0)


@pytest.mark.slow
def test_anchor_moves_no_gradient_and_is_checked(rl: Any, rl_run: Path, llama: Path) -> None:
    rl(llama, "--anchor", rl_run, "--lora-r", "8")  # of another rank than the policy
    assert same(Path("run") / "anchor", rl_run)
    assert read_record(Path("run")).guards["unchanged"] == ["anchor", "base", "reward"]


@pytest.mark.parametrize(
    ("anchor", "told"),
    [
        ("gpt2", "has another tokenizer"),
        ("reward_run", "is a reward model, not a policy"),
        ("nowhere/at/all", "does not exist"),
    ],
)
def test_what_cannot_be_the_anchor_is_refused(
    anchor: str, told: str, rl: Any, sft_run: Path, request: pytest.FixtureRequest
) -> None:
    name = anchor if "/" in anchor else request.getfixturevalue(anchor)
    result = rl(sft_run, "--anchor", name, code=2)
    assert told in result.stderr
    assert not Path("run").exists()


def test_anchor_without_a_penalty_is_refused(rl: Any, sft_run: Path) -> None:
    assert "--anchor has no effect with --beta 0" in rl(sft_run, "--anchor", "base", "--beta", "0", code=2).stderr


@pytest.mark.slow
def test_no_penalty_needs_no_anchor(rl: Any, sft_run: Path) -> None:
    assert "anchor: none in training, as --beta is 0" in rl(sft_run, "--beta", "0").stdout
    assert "kl_at_start" not in read_record(Path("run")).guards
    assert same(Path("run") / "anchor", sft_run)  # kept, so that an evaluation measures against the start


# Full tuning: the anchor is a whole model


@pytest.mark.slow
def test_full_tuning_has_its_start_or_the_base_as_anchor(rl: Any, llama: Path) -> None:
    # models that earlier tests of this process left in memory, such as in the traceback of an error
    left = guards.base_copies(AutoModelForCausalLM.from_pretrained(llama)) - 1
    rl(llama, "--full", "--learning-rate", "1e-3", output="first")
    record = read_record(Path("first"))
    assert (record.guards["kl_at_start"], record.memory["base_copies"]) == (0, 3 + left)  # policy, anchor, reward
    assert set(record.memory["mb"]) == {"policy", "anchor", "reward"}
    assert policies.start_of("first") == str(llama)
    before = AutoModelForCausalLM.from_pretrained("first").config._name_or_path
    rl("first", "--full", "--learning-rate", "1e-3", "--anchor", "base", output="second")
    assert read_record(Path("second")).guards["kl_at_start"] != 0
    assert policies.start_of("second") == str(llama)
    rl("first", "--full", "--learning-rate", "1e-3", "--anchor", llama, output="third")
    assert policies.start_of("third") == str(llama)
    assert before == "first"


def test_an_adapter_cannot_be_the_anchor_of_full_tuning(rl: Any, llama: Path, sft_run: Path) -> None:
    result = rl(llama, "--full", "--anchor", sft_run, code=2)
    assert "is an adapter, but --full needs a full model" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_tuning_begins_at_its_anchor_in_any_precision(dtype: str, rl: Any, llama: Path) -> None:
    rl(llama, "--full", "--dtype", dtype, "--learning-rate", "1e-3")
    assert read_record(Path("run")).guards["kl_at_start"] == 0


# Faults that are planted


def test_anchor_that_is_not_the_start_stops_the_run_before_its_first_step(
    rl: Any, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = policies.set_anchor

    def careless(trainer: Any, anchor: Any, prepared: Any) -> None:
        original(trainer, anchor, prepared)
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:
                parameter.data *= 1.1

    monkeypatch.setattr(policies, "set_anchor", careless)
    result = rl(sft_run, code=1)
    assert "Error: The policy differs from its anchor before the first step: KL " in result.stderr
    record = read_record(Path("run"))
    assert (record.status, record.steps) == ("failed", 0)


@pytest.mark.slow
def test_anchor_that_trl_takes_wrongly_stops_the_run(rl: Any, sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rloo_trainer.use_adapter
    # as if TRL took the bare base for the anchor
    monkeypatch.setattr(rloo_trainer, "use_adapter", lambda model, adapter_name: original(model, None))
    result = rl(sft_run, "--max-steps", "3", code=1)
    assert "Error: The policy differs from its anchor before the first step: KL " in result.stderr
    assert read_record(Path("run")).status == "failed"


@pytest.mark.slow
def test_full_anchor_goes_to_the_policys_device(rl: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own choice would spread it over all visible GPUs."""
    original, places = rloo_trainer.create_model_from_path, []

    def noted(name: str, **options: Any) -> Any:
        places.append(options["device_map"])
        return original(name, **options)

    monkeypatch.setattr(rloo_trainer, "create_model_from_path", noted)
    rl(llama, "--full", "--learning-rate", "1e-4")
    assert places == [{"": "cpu"}]
    record = read_record(Path("run"))
    assert record.guards["kl_at_start"] == 0
    assert record.trl_settings["model_init_kwargs"] is None


def test_anchor_on_another_base_is_refused(rl: Any, sft_run: Path, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.embed_tokens.weight.data *= 2
    shutil.copytree(llama, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    result = rl(sft_run, "--anchor", tmp_path / "other", code=2)
    assert f"is on the base {tmp_path / 'other'}, the policy on {llama}" in result.stderr
