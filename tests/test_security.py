"""Attacks and accidents: pickles, code in folders, malicious names, secrets, and text that could act as markup."""

import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from perlcli import redaction, settings, terminal
from perlcli import text as markdown
from perlcli.comparison import contrasts, jobs, processes, results
from perlcli.comparison.render import files as render_files
from perlcli.comparison.results import ArmResult, Report, RunFigures
from perlcli.errors import PerlError
from perlcli.model import loading, sources, weights
from perlcli.redaction import hidden, hidden_in
from perlcli.run import card, checkpoints, files, lifecycle, record
from perlcli.run.files import RECORD, SETTINGS
from perlcli.run.lifecycle import Run
from perlcli.run.record import RunRecord
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]
SHORT = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--max-length", "128", "--lora-r", "4")
SAMPLED = ("--max-completion-length", "8")
SECRETS = {
    "HF_TOKEN": "hf_plantedPLANTEDplanted01",
    "WANDB_API_KEY": "0123456789abcdefplanted",
    "AWS_SECRET_ACCESS_KEY": "aws+planted/secret",
    "OPENAI_API_KEY": "sk-plantedplantedplanted99",
    "DB_PASSWORD": "correct horse",
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that planted code creates; the tests check that it does not exist."""
    return tmp_path / "planted-code-ran"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The files that torch.load was called for, and whether with weights_only."""
    calls: list[tuple[str, bool]] = []
    load = torch.load

    def watched(file: Any, *args: Any, weights_only: bool | None = None, **options: Any) -> Any:
        calls.append((str(file), bool(weights_only)))
        return load(file, *args, weights_only=weights_only, **options)

    monkeypatch.setattr(torch, "load", watched)
    return calls


@pytest.fixture
def harmless(marker: Path, loaded: list[tuple[str, bool]]) -> Iterator[Path]:
    """The file that planted code would create; the test fails if it exists at the end, or if a pickle was read."""
    yield marker
    assert not marker.exists() and not loaded


def planted(path: Path, marker: Path) -> Path:
    """A pickle that runs code when it is loaded."""

    class Code:
        def __reduce__(self) -> Any:
            return open, (str(marker), "w")

    path.write_bytes(pickle.dumps(Code()))
    return path


def without_weights(model: Path, folder: Path) -> Path:
    """A copy of a model or adapter without its safetensors."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints")))


# pickles


def test_the_planted_pickle_runs_code_when_loaded(tmp_path: Path, marker: Path) -> None:
    with planted(tmp_path / "a.bin", marker).open("rb") as file:
        pickle.load(file).close()
    assert marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_model_as_a_pickle_is_rejected(
    name: str, llama: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    model = without_weights(llama, Path("model"))
    planted(model / name, harmless)
    output = perl("sft", "--model", model, "--data", rows["demonstrations"], *SHORT, code=2).output
    assert f"the weights are a pickle, {name}" in output and "save_pretrained" in output
    with pytest.raises(PerlError, match="pickle"):  # also without `locate`
        loading.load_causal(sources.Source("m", str(model), AutoConfig.from_pretrained(model)), ModelSettings())


def test_a_safetensors_index_that_names_a_pickle_is_rejected(
    llama: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    model = without_weights(llama, Path("model"))
    for name in ("weights.bin", "../weights.safetensors", "/weights.safetensors"):
        planted(model / "weights.bin", harmless)
        (model / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
        output = perl("sft", "--model", model, "--data", rows["demonstrations"], *SHORT, code=2).output
        assert name in output and "not a safetensors file" in output
    (model / weights.INDEX).write_text('{"weight_map": 3}')
    assert "can't be read" in perl("estimate", "rl", "--model", model, code=2).output


@pytest.mark.parametrize("option", ["--model", "--anchor", "--reward"])
def test_an_adapter_as_a_pickle_is_rejected(
    option: str, sft_run: Path, reward_run: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    folder = without_weights(reward_run if option == "--reward" else sft_run, Path("adapter"))
    planted(folder / "adapter_model.bin", harmless)
    given = {"--model": sft_run, "--reward": reward_run, "--anchor": "sft"} | {option: folder}
    words = [word for pair in given.items() for word in pair]
    output = perl("rl", *words, "--data", rows["prompts"], "--output", "out", *SAMPLED, code=2).output
    assert "the weights are a pickle, adapter_model.bin" in output
    if option != "--anchor":
        assert "adapter_model.bin" in perl("merge", folder, code=2).output
    assert not Path("out").exists()


def test_an_anchor_as_a_pickle_in_a_policys_folder_is_rejected(
    rl_run: Path, reward_run: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    folder = Path(shutil.copytree(rl_run, "policy", ignore=shutil.ignore_patterns("checkpoints")))
    (folder / "anchor" / weights.ADAPTER_WEIGHTS).unlink()
    planted(folder / "anchor" / "adapter_model.bin", harmless)
    output = perl("eval", "--model", folder, "--reward", reward_run, "--data", rows["prompts"], *SAMPLED, code=2).output
    assert "adapter_model.bin" in output


def test_an_adapter_whose_base_is_a_pickle_or_an_adapter_is_rejected(
    sft_run: Path, llama: Path, perl: Perl, harmless: Path
) -> None:
    folder = Path(shutil.copytree(sft_run, "adapter", ignore=shutil.ignore_patterns("checkpoints")))
    bad = without_weights(llama, Path("bad"))
    planted(bad / "pytorch_model.bin", harmless)
    config = json.loads((folder / weights.ADAPTER_CONFIG).read_text())
    (folder / weights.ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(bad.resolve())}))
    assert "The base " in (output := perl("merge", folder, code=2).output) and "pytorch_model.bin" in output
    (bad / "pytorch_model.bin").unlink()
    shutil.copy(llama / "model.safetensors", bad)
    (bad / weights.ADAPTER_CONFIG).write_text(json.dumps(config))
    planted(bad / "adapter_model.bin", harmless)  # transformers would apply it to the base by itself
    assert "is itself an adapter" in perl("merge", folder, code=2).output


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "XLORA", "hidden_size": 64, "adapters": {"a": "elsewhere"}},
        {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "prompt_tuning_init_state_dict_path": "elsewhere/adapter_model.bin",
            "prompt_tuning_init": "EXACT_SOURCE_TASK",
            "num_virtual_tokens": 4,
        },
    ],
)
def test_an_adapter_that_names_other_files_is_rejected(
    config: dict[str, Any], llama: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    for place in (Path("adapter"), Path("elsewhere")):
        place.mkdir()
        planted(place / "adapter_model.bin", harmless)
    (Path("adapter") / weights.ADAPTER_WEIGHTS).write_bytes(b"")
    values = {"base_model_name_or_path": str(llama), "task_type": "CAUSAL_LM"} | config
    (Path("adapter") / weights.ADAPTER_CONFIG).write_text(json.dumps(values))
    for words in (("eval", "--model", "adapter", "--data", rows["prompts"]), ("merge", "adapter")):
        assert "names other files to load" in perl(*words, code=2).output
    with pytest.raises(PerlError, match="names other files"):
        sources.check_adapter_weights("adapter")


def test_a_classifier_as_a_pickle_is_rejected(
    classifier: Path, sft_run: Path, rows: dict[str, Path], perl: Perl, harmless: Path
) -> None:
    model = without_weights(classifier, Path("classifier"))
    planted(model / "pytorch_model.bin", harmless)
    for words in (
        ("rl", "--model", sft_run, "--reward", model, "--data", rows["prompts"], "--output", "out"),
        ("eval", "--model", model, "--data", rows["pairs"]),
    ):
        assert "the weights are a pickle, pytorch_model.bin" in perl(*words, code=2).output


def test_an_adapter_on_the_hub_without_safetensors_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "file_of", lambda name, file: None)
    with pytest.raises(PerlError, match=weights.ADAPTER_WEIGHTS):
        sources.check_adapter_weights("someone/adapter")
    monkeypatch.setattr(weights, "file_of", lambda name, file: tmp_path)
    sources.check_adapter_weights("someone/adapter")
    index = tmp_path / weights.INDEX
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    monkeypatch.setattr(weights, "file_of", lambda name, file: index)
    with pytest.raises(PerlError, match="not a safetensors file"):
        weights.check("someone/model")


@pytest.mark.slow
def test_only_files_in_the_checkpoints_manifest_are_loaded(
    perl: Perl, llama: Path, rows: dict[str, Path], loaded: list[tuple[str, bool]]
) -> None:
    words = ("sft", "--model", llama, "--data", rows["demonstrations"], "--output", "run", *SHORT[2:])
    perl(*words, "--max-steps", 1)
    place = Path("run/checkpoints/checkpoint-1")
    sums = json.loads((place / checkpoints.MANIFEST).read_text())["files"]
    assert {path.name for path in place.iterdir()} == {*sums, checkpoints.MANIFEST}
    assert not {"training_args.bin", "README.md"} & set(sums)  # nothing reads them, and they describe the machine
    assert not loaded
    perl(*words, "--max-steps", 2, "--resume")
    assert {Path(file).name for file, _ in loaded} >= {"optimizer.pt", "scheduler.pt"}
    for file, weights_only in loaded:
        assert Path(file).resolve().parent == place.resolve() and Path(file).name in sums and weights_only


@pytest.mark.slow
def test_pickles_that_differ_from_the_checkpoints_manifest_are_not_loaded(
    perl: Perl, llama: Path, rows: dict[str, Path], loaded: list[tuple[str, bool]], marker: Path
) -> None:
    words = ("sft", "--model", llama, "--data", rows["demonstrations"], "--output", "run", *SHORT[2:])
    perl(*words, "--max-steps", 1)
    place = Path("run/checkpoints/checkpoint-1")
    planted(place / "optimizer.pt", marker)
    named = perl(*words, "--max-steps", 2, "--resume", place, code=2).output
    assert "is damaged: optimizer.pt has changed since it was written" in named and not loaded
    assert (
        "No complete checkpoint found; starting from the beginning."
        in perl(*words, "--max-steps", 2, "--resume").output
    )
    assert not marker.exists() and not [file for file, _ in loaded if "checkpoint-1" in file]


def sealed(folder: Path) -> Path:
    """A checkpoint of two files."""
    folder.mkdir()
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(b"x")
    checkpoints.seal(folder)
    return folder


def test_pickled_weights_in_a_checkpoint_are_rejected_even_with_a_valid_checksum(tmp_path: Path) -> None:
    place = sealed(tmp_path / "checkpoint-1")
    assert checkpoints.fault(place) is None
    for name in ("pytorch_model.bin", "ref/adapter_model.bin"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"x")
        checkpoints.seal(place)
        assert f"contains {name}, a pickle" in str(checkpoints.fault(place))
        (place / name).unlink()


def test_links_are_not_part_of_a_checkpoint(tmp_path: Path) -> None:
    place, outside = sealed(tmp_path / "checkpoint-1"), tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_model.bin").write_bytes(b"x")
    (place / "ref").symlink_to(outside)  # peft would read an adapter there
    assert checkpoints.fault(place) == "is damaged: it contains ref, which its run did not write"
    elsewhere = sealed(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-2").symlink_to(elsewhere)
    checkpoints.side(tmp_path).symlink_to(elsewhere)
    last = checkpoints.last_complete(tmp_path, lambda path: None, lambda text: None)  # also deletes the faulty one
    assert last is None
    checkpoints.begin(tmp_path)
    assert checkpoints.fault(elsewhere) is None and not checkpoints.side(tmp_path).exists()


def test_a_manifest_cannot_name_files_outside_its_checkpoint(tmp_path: Path) -> None:
    place = sealed(tmp_path / "checkpoint-1")
    (tmp_path / "x").write_bytes(b"x")
    content = json.loads((place / checkpoints.MANIFEST).read_text())
    content["files"]["../x"] = content["files"]["optimizer.pt"]
    (place / checkpoints.MANIFEST).write_text(json.dumps(content))
    assert "../x is missing" in str(checkpoints.fault(place))


@pytest.mark.parametrize("name", ["rows.pt", "rows.pkl", "rows.pickle", "rows.npy", "rows.joblib", "rows.py"])
def test_data_is_never_a_pickle_or_a_script(name: str, perl: Perl, marker: Path) -> None:
    planted(Path(name), marker)
    assert "unknown file type" in perl("data", "check", name, code=2).output
    folder = Path("set")
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(marker)!r}, 'w')")
    planted(folder / f"train{Path(name).suffix}", marker)
    assert "contains no train.*" in perl("data", "check", folder, code=2).output
    assert not marker.exists()


# code in model folders


@pytest.fixture
def evil(marker: Path, llama: Path) -> Path:
    """A model that comes with its own modelling code."""
    folder = Path(shutil.copytree(llama, "evil"))
    names = {"AutoConfig": "modelling.Config", "AutoModelForCausalLM": "modelling.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM\n"
    (folder / "modelling.py").write_text(code + "class Config(Config):\n    model_type = 'evil'\n")
    return folder.resolve()


def adapter_on(run: Path, model: Path, folder: str) -> Path:
    """A copy of a run with another base, whose record says that its code is trusted."""
    place = Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints")))
    config = json.loads((place / weights.ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": str(model)}
    (place / weights.ADAPTER_CONFIG).write_text(json.dumps(config))
    changed = json.loads((place / RECORD).read_text())
    changed["settings"]["trust_remote_code"] = changed["trl_settings"]["trust_remote_code"] = True
    (place / RECORD).write_text(json.dumps(changed))
    (place / SETTINGS).write_text((place / SETTINGS).read_text().replace("_code: false", "_code: true"))
    return place


@pytest.mark.slow
def test_modelling_code_does_not_run_by_default(
    evil: Path, sft_run: Path, reward_run: Path, rows: dict[str, Path], perl: Perl, marker: Path
) -> None:
    policy, judge = adapter_on(sft_run, evil, "policy"), adapter_on(reward_run, evil, "judge")
    prompts = ("--data", rows["prompts"])
    for words in (
        ("sft", "--model", evil, "--data", rows["demonstrations"]),
        ("reward", "--model", evil, "--data", rows["pairs"]),
        ("rl", "--model", evil, "--reward", reward_run, *prompts),
        ("rl", "--model", sft_run, "--reward", judge, *prompts),
        ("rl", "--model", sft_run, "--reward", reward_run, "--anchor", evil, *prompts),
        ("rl", "--model", policy, "--reward", reward_run, *prompts),
        ("eval", "--model", evil, *prompts),
        ("eval", "--model", policy, *prompts),
        ("eval", "--model", judge, "--data", rows["pairs"]),
        ("merge", policy),
        ("sft", "--model", policy, "--data", rows["demonstrations"]),
        ("estimate", "rl", "--model", evil),
        ("estimate", "rl", "--model", policy),
        ("data", "check", rows["pairs"], "--model", evil),
        ("data", "show", rows["pairs"], "--model", policy),
        ("compare-full", "sft", "--model", evil, "--data", rows["demonstrations"], "--estimate"),
    ):
        output = perl(*words, code=2).output
        assert "was not run" in output and "--trust-remote-code" in output, words
    assert not marker.exists() and not Path("runs").exists()


@pytest.mark.slow
def test_modelling_code_runs_with_trust_remote_code(evil: Path, perl: Perl, marker: Path) -> None:
    perl("data", "show", "coffee", "--model", evil, "--trust-remote-code")
    assert marker.exists()


def test_code_next_to_a_known_model_is_ignored(llama: Path, perl: Perl, marker: Path) -> None:
    folder = Path(shutil.copytree(llama, "evil"))
    names = {"AutoConfig": "modelling.Config", "AutoModelForCausalLM": "modelling.Model"}
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"auto_map": names})
    )
    (folder / "modelling.py").write_text(f"open({str(marker)!r}, 'w').close()")
    source = sources.locate(str(folder))
    assert type(loading.load_causal(source, ModelSettings())).__name__ == "LlamaForCausalLM"
    perl("data", "show", "coffee", "--model", folder)
    assert not marker.exists()


def test_a_tokenizers_code_does_not_run_by_default(llama: Path, perl: Perl, marker: Path) -> None:
    folder = Path(shutil.copytree(llama, "evil"))
    (folder / "tokenizer.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenizer.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    perl("data", "show", "coffee", "--model", folder, code=2)
    assert not marker.exists()


def test_an_attention_kernel_from_the_hub_counts_as_code(llama: Path, perl: Perl) -> None:
    folder = Path(shutil.copytree(llama, "evil"))
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    output = perl("data", "show", "coffee", "--model", folder, code=2).output
    assert "someone/kernel, which is code" in output and "--trust-remote-code" in output


@pytest.fixture
def module(marker: Path) -> Iterator[str]:
    """A module in the working folder that an attacker's record names as the reward."""
    Path("evil_reward.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef score(prompts, **k):\n    return []\n")
    yield "evil_reward:score"
    sys.modules.pop("evil_reward", None)


@pytest.mark.slow
def test_a_record_cannot_name_a_reward_function(
    module: str, rl_run: Path, reward_run: Path, rows: dict[str, Path], perl: Perl, marker: Path
) -> None:
    folder = Path(shutil.copytree(rl_run, "run"))
    changed = json.loads((folder / RECORD).read_text())
    changed["settings"] |= {"reward": [module], "recipe": "evil.yaml", "anchor": module}
    changed["model"]["name"] = module
    (folder / RECORD).write_text(json.dumps(changed))
    (folder / SETTINGS).write_text(f"reward: [{module}]\nmodel: {module}\n")
    config = json.loads((folder / weights.ADAPTER_CONFIG).read_text()) | {
        "auto_mapping": {"base_model_class": "score", "parent_library": "evil_reward"}
    }
    (folder / weights.ADAPTER_CONFIG).write_text(json.dumps(config))
    words = ("--data", rows["prompts"], *SAMPLED)
    perl("eval", "--model", folder, *words, "--output", "eval")
    perl("merge", folder, "--output", "merged", "--dry-run")
    perl("report", folder)
    perl("runs", ".")
    perl("rl", "--model", folder, *words, code=2)  # says that --reward is missing
    perl("rl", "--model", folder, "--reward", reward_run, *words, "--dry-run")
    assert not marker.exists() and "evil_reward" not in sys.modules
    perl("rl", "--model", rl_run, "--reward", module, *words, "--dry-run")
    assert marker.exists()  # on the command line it is the user's own choice


def test_a_folder_named_like_a_function_is_read_as_a_folder(
    module: str, sft_run: Path, rows: dict[str, Path], perl: Perl, marker: Path
) -> None:
    Path(module).mkdir()
    output = perl("rl", "--model", sft_run, "--reward", module, "--data", rows["prompts"], code=2).output
    assert "can't be read as a model" in output and not marker.exists()


def test_subprocesses_do_not_import_modules_from_the_working_folder(marker: Path) -> None:
    for name in ("typer", "yaml", "perlcli", "json"):
        Path(f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()")
    assert processes.run(["recipes"], Path("log")) == 0, Path("log").read_text()
    assert not marker.exists()


# secrets


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder whose name must not be in any text, and tokens in the environment."""
    place = tmp_path / "home" / "planted-user"
    place.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return place


def leaks(*folders: Path) -> list[str]:
    """The files that contain the home folder or a secret; peft needs the base's actual path in its config."""
    words = ["planted-user", *SECRETS.values()]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    read = {path: path.read_bytes() for path in paths if path.name != weights.ADAPTER_CONFIG}
    return [str(path) for path, content in read.items() if any(word.encode() in content for word in words)]


@pytest.mark.slow
def test_files_and_output_of_a_run_contain_neither_the_home_folder_nor_secrets(
    home: Path, llama: Path, rows: dict[str, Path], perl: Perl, tmp_path: Path
) -> None:
    model, runs = Path(shutil.copytree(llama, home / "model")), home / "runs"
    data = {name: Path(shutil.copytree(folder, home / name)) for name, folder in rows.items()}
    inputs = ("--reward", runs / "reward", "--data", data["prompts"], *SAMPLED)
    outcomes = [
        perl("sft", "--model", model, "--data", data["demonstrations"], "--output", runs / "sft", *SHORT),
        perl("reward", "--model", model, "--data", data["pairs"], "--output", runs / "reward", *SHORT),
        perl("rl", "--model", runs / "sft", *inputs, "--output", runs / "rl", "--algorithm", "reinforce", *SHORT[:6]),
        perl("eval", "--model", runs / "rl", *inputs, "--output", runs / "eval"),
        perl("merge", runs / "rl", "--output", runs / "merged"),
        perl("report", runs / "reward", runs / "rl", "--output", runs / "report"),
        perl("report", runs / "reward", runs / "rl", "--output", tmp_path / "home" / "outside"),
        perl("runs", runs),
        perl("estimate", "rl", "--model", model),
        perl("data", "check", data["pairs"] / "train.jsonl"),
        perl("sft", "--model", home / "none", "--data", data["pairs"], code=2),
        perl("sft", "--model", model, "--data", home / "none", code=2),
    ]
    assert leaks(runs, tmp_path / "home" / "outside") == []
    for outcome in outcomes:
        assert not [word for word in ("planted-user", *SECRETS.values()) if word in outcome.output], outcome.output
    kept = record.read_record(runs / "rl")
    assert kept.settings["model"] == "~/runs/sft" and kept.settings["reward"] == ["~/runs/reward"]
    assert kept.model["base"] == "~/model" and kept.data["train"]["source"] == "~/prompts"


@pytest.mark.slow  # four processes
def test_files_of_a_comparison_contain_neither_the_home_folder_nor_secrets(home: Path, llama: Path, perl: Perl) -> None:
    model = shutil.copytree(llama, home / "model")
    words = ("compare-full", "sft", "--model", model, "--data", "coffee", "--output", home / "comparison", *SHORT)
    output = perl(*words).output
    assert leaks(home / "comparison") == [] and "planted-user" not in output
    resumed = perl("compare-full", "--config", "~/comparison/settings.yaml", "--resume").output
    assert "Report: ~/comparison/report.html" in resumed
    perl("report", "~/comparison", "--output", "~/other")
    assert leaks(home / "other") == []


@pytest.mark.slow
def test_a_run_in_the_home_folder_can_be_resumed_and_repeated(
    home: Path, llama: Path, rows: dict[str, Path], perl: Perl
) -> None:
    model, data = shutil.copytree(llama, home / "model"), shutil.copytree(rows["pairs"], home / "pairs")
    (home / "adapter.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "base_model_name_or_path": str(model)}))
    files_given = ("--peft", home / "adapter.json")
    words = ("reward", "--model", model, "--data", data, "--output", home / "run", *files_given, "--max-steps", 1)
    words += SHORT[2:6]
    perl(*words)
    assert "is complete" in perl(*words, "--resume", code=2).output
    assert "Resuming from step 1" in perl(*words, "--max-steps", 2, "--resume").output
    again = perl("reward", "--config", "~/run/settings.yaml", "--output", "~/again", "--dry-run").output
    assert "model: ~/model" in again and "output: ~/again" in again
    perl("report", "~/run", "--output", "~/report")
    assert leaks(home / "run", home / "report") == []
    other = shutil.copytree(rows["pairs"], home / "other")
    assert "data was ~/pairs, now ~/other" in perl(*words, "--data", other, "--resume", code=2).output


def test_the_recorded_reason_for_a_failure_contains_no_secrets(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(settings.build(settings.Sft, {"output": "run"}))
    run.folder = home / "run"
    with pytest.raises(ValueError), lifecycle.recording(run):
        run.note(f"read {home}/x with {SECRETS['HF_TOKEN']}")
        run.append(files.METRICS, {f"rewards/{home}/a": 1.0, "step": 1})
        raise ValueError(
            f"no login at https://me:{SECRETS['DB_PASSWORD']}@host by {SECRETS['OPENAI_API_KEY']} in {home}"
        )
    assert leaks(home / "run") == []
    kept = record.read_record(home / "run")
    assert kept.notes == ["read ~/x with ***"]
    assert kept.failure == "ValueError: no login at https://***@host by *** in ~"
    assert capsys.readouterr().out == "read ~/x with ***\n"


def test_tokens_and_logins_are_recognised(perl: Perl, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_0123456789abcdefghij"
    output = perl("sft", "--set", f"hub_token={token}", "--set", "push_to_hub=true", code=2).output
    assert token not in output and "--set hub_token can't be used: perlcli publishes nothing" in output
    address = "https://user:passwd@host.org/data/x"
    for words in (("--data", address), ("--model", address, "--data", "coffee")):
        output = perl("sft", *words, code=2).output
        assert "passwd" not in output and "https://***@host.org/data/x does not exist" in output
    for text in (token, "sk-" + "a1" * 12, "sk-proj-" + "a1" * 12, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8):
        assert hidden(f"by {text}, so") == "by ***, so"
    assert hidden("https://h/x?access_token=abc&page=2") == "https://h/x?access_token=***&page=2"
    for plain in ("hf_model", "sk-learn", "task-specific-fine-tuning-of-models", "mail me@host.org", "a:b@c", "KIA"):
        assert hidden(plain) == plain


def test_only_the_home_folder_itself_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    for path in ("link", "real"):
        there = f"{tmp_path}/{path}"
        assert hidden(f"{there}/a {there}, '{there}' file://{there}/a {there}.") == "~/a ~, '~' file://~/a ~."
        for other in (f"{there}2/a", f"{there}-old", f"{there}.bak", f"/data{there}/a", f"a{there}"):
            assert hidden(other) == other
    assert hidden(f"../..{tmp_path}/link/a") == "~/a"
    monkeypatch.setenv("HOME", "/data")  # as in a container: ../data is another folder, and would be read from there
    assert hidden("/data/a ../data/a ../../data") == "~/a ../data/a ../../data"
    monkeypatch.setenv("HOME", "/")
    assert hidden("/a/b") == "/a/b"


def test_values_of_secret_environment_variables_are_hidden_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "a-long-secret")
    monkeypatch.setenv("OTHER_KEY", "short")
    monkeypatch.setenv("SSH_KEY_FILE", "/etc/a-key-file")
    monkeypatch.setenv("TOKENIZER", "org/a-model")  # if hidden, it would be missing from settings.yaml
    assert hidden("org/a-model") == "org/a-model"
    text = "a-long-secret short /etc/a-key-file"
    assert hidden(text) == "*** short /etc/a-key-file"
    run = RunFigures(folder=text, command="c", status="finished", metrics={text: [text, 1, None, (Path(text),)]})
    safe = hidden_in(run)
    assert (safe.folder, safe.metrics) == (hidden(text), {hidden(text): [hidden(text), 1, None, (hidden(text),)]})
    assert redaction.STARS in repr(safe) and "a-long-secret" not in repr(safe)


def test_messages_of_libraries_do_not_contain_the_home_folder(home: Path) -> None:
    code = "from perlcli import upstream; upstream.hush(); import logging, os, warnings; "
    code += "warnings.warn(os.environ['HOME'] + '/x\\ny'); logging.error('in %s', os.environ['HOME'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "UserWarning: ~/x y\nERROR:root:in ~\n"


# names


PATHS = ("../../x", "..", "/", "a/../..", "/etc/passwd", "a/b\\..\\c", "~", "x" * 79 + "/..", "org/name@main")
STRANGE = ("a\nb", "a\0b", "x" * 300, "é" * 200, "-rf", "con", "", "…", "$(touch x)", "\x1b[31m", "\u202eabc")


@pytest.mark.parametrize("name", [*PATHS, *STRANGE])
def test_a_models_name_cannot_lead_outside_a_comparisons_folder(name: str) -> None:
    made = jobs.slug(name)
    assert made and len(os.fsencode(made)) <= jobs.LONGEST and not made.startswith((".", "-"))
    assert Path(made).name == made and made.isascii() and made.isprintable()
    place = jobs.place([name, "other"], name) / jobs.slug("lora r=4")
    assert not place.is_absolute() and ".." not in place.parts and len(place.parts) == 2


def test_a_reports_stage_cannot_lead_outside_its_folder(perl: Perl, arm_of: Any) -> None:
    folder = Path("theirs/inside")
    render_files.write_all(
        Report(title="t", command="perl compare-full", comparisons=[contrasts.compare("reward", [arm_of()])]), folder
    )
    content = json.loads((folder / results.REPORT).read_text())
    for stage in ("../../../x", "/tmp/x", "a/b", ""):
        content["comparisons"][0]["stage"] = stage
        (folder / results.REPORT).write_text(json.dumps(content))
        assert "is not a report of perlcli: unknown stage" in perl("report", folder, code=2).output
    assert sorted(path.name for path in Path().iterdir()) == ["theirs"]


# what is printed


def test_printed_text_has_no_control_characters(perl: Perl, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202eabc\u2066"
    terminal.say(f"{bad}\n\tb")
    shown = "\\x1b]0;title\\x07\\x1b[2J\\r\\x9b31m\\u202eabc\\u2066"
    assert capsys.readouterr().out == f"{shown}\n\tb\n"
    assert f"--data {shown} does not exist" in perl("sft", "--data", f"./{bad}", code=2).output.replace("./", "")
    run = Run(settings.build(settings.Sft, {"output": "run"}))
    run.note(bad)
    assert capsys.readouterr().out == f"{shown}\n"


def test_control_characters_in_a_record_are_printed_as_text(perl: Perl) -> None:
    bad = "\x1b[2J\r\u202e"
    made = RunRecord(
        command="sft",
        status="finished",
        started="2026-01-02T03:04:05+00:00",
        model={"base": bad},
        notes=[bad],
        settings={"output": bad},
        metrics={f"a{bad}": 1.0},
        device={"precision": bad},
        failure=bad,
    )
    Path("run").mkdir()
    record.write_record(Path("run"), made)
    for words in (("report", "run"), ("runs", ".")):
        assert not [letter for letter in perl(*words).output if not letter.isprintable() and letter != "\n"]


def test_control_characters_in_rows_are_shown_as_text(perl: Perl, write: Any, llama: Path) -> None:
    pair = {"prompt": "a\x1b[2J", "chosen": "\x9b31m\u202eyes", "rejected": "no\r"}
    path = write(Path("pairs.jsonl"), [pair, {"prompt": "a", "chosen": "\x1b[2J", "rejected": 3}])
    for words in (("data", "show"), ("data", "check"), ("data", "convert")):
        result = perl(*words, path, *(() if "convert" in words else ("--model", llama)), code=2)
        assert not [letter for letter in result.output if not letter.isprintable() and letter != "\n"]
    write(path, [pair])
    shown = perl("data", "show", path, "--model", llama).output
    assert "a\\x1b[2J" in shown and not [letter for letter in shown if not letter.isprintable() and letter != "\n"]


# what is written

PLANTED = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "javascript:alert(1)",
    "</title></style></pre><iframe>",
    "{{7*7}}",
    "\\[a](javascript:alert(1))",
    "![a](http://x/y.png)",
    "=cmd()",
    "a\n\n# b | c",
    "```\n<b>",
    "<!-- x",
    "&lt;script&gt;",
)
PAGE_TAGS = ("html", "head", "meta", "title", "style", "body", "main", "section", "div", "footer", "h1", "h2", "h3")
TEXT_TAGS = ("p", "a", "strong", "sup", "small", "pre", "code", "ol", "ul", "li", "dl", "dt", "dd")
TABLE_TAGS = ("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img")
TAGS = {*PAGE_TAGS, *TEXT_TAGS, *TABLE_TAGS}
ATTRIBUTES = {"lang", "charset", "name", "content", "class", "scope", "colspan", "style", "alt", "src", "href"}


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def filled(value: Any, text: str) -> Any:
    """A value with every text in it replaced, except for the stage and the status, which have fixed values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {"stage", "kind", "status"} if not isinstance(value, Report) else {"status"}
        items = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: filled(v, text) for k, v in items.items() if k not in kept})
    if isinstance(value, str) or value is None:
        return text
    if isinstance(value, dict):
        return value if all(isinstance(item, float | results.Spread) for item in value.values()) else {text: text}
    return [filled(item, text) for item in value] if isinstance(value, list) else value


@pytest.fixture
def report_of(arm_of: Any) -> Callable[[str], Report]:
    """A report with the given text in every text field."""

    def made(text: str) -> Report:
        metrics = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "rows": 10}
        two = [
            arm_of("full", metrics=metrics),
            arm_of("lora", metrics=metrics),
            arm_of("b", status="failed", failure="x"),
        ]
        done = contrasts.compare("reward", two, [text])
        numbers = {"rank": 4, "learning_rate": 0.1, "predicted_mb": 1.0, "memory_mb": None, "reserved_mb": None}
        for place, arm in enumerate(done.arms):
            sizes = {"memory_mb": 5.0, "reserved_mb": None, "weights_bytes": 1, "optimizer_bytes": 1, "eval_rows": 10}
            told: dict[str, Any] = {"setup": {text: text}, "verdicts": [text]}
            told["samples"] = [{"prompt": text, "policy": text, "policy_reward": 0.5, text: text}]
            own = {"metrics": metrics, **sizes, **told}
            runs = [dataclasses.replace(filled(run, f"{text}{place}"), **own) for run in arm.runs]
            strange = filled(dataclasses.replace(arm, runs=[]), f"{text}{place}")
            spreads = {
                item.name: getattr(arm, item.name)
                for item in dataclasses.fields(ArmResult)
                if "per_second" in item.name
            }
            measured = {"runs": runs, "quality": arm.quality, "ratios": arm.ratios, **numbers, **spreads}
            failure = arm.failure and text
            done.arms[place] = dataclasses.replace(strange, failure=failure, remarks=[text], **measured)
        values = {"device": {text: text, "name": text}, "versions": {text: text}, "git_commit": text, "started": text}
        policies = [results.PolicyFigures(text, text, 5, {"gold": 0.5}, 0.1, text)]
        return Report(title=text, command=text, status="finished", comparisons=[done], pipeline=policies, **values)

    return made


@pytest.mark.parametrize("text", PLANTED)
def test_fields_of_a_report_never_become_markup(text: str, report_of: Any, tmp_path: Path) -> None:
    render_files.write_all(report_of(text), tmp_path)
    page = Tags((tmp_path / render_files.PAGE).read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.seen} <= TAGS
    for tag, given in page.seen:
        assert set(given) <= ATTRIBUTES
        assert given.get("href", "https://arxiv.org/") is not None and "javascript" not in str(given.get("href"))
        assert tag != "img" or str(given["src"]).startswith("data:image/png;base64,")
    outside = (tmp_path / render_files.MARKDOWN).read_text(encoding="utf-8").partition("```console\n")
    assert "<" not in outside[0] and "](javascript" not in outside[0].replace("\\\\\\[a](", "")
    assert outside[2].count("```") == 1 and outside[2].endswith("```\n")


def test_escaping_cannot_turn_text_back_into_a_link() -> None:
    # An escaped backslash, then an escaped bracket
    assert markdown.inline("\\[a](javascript:x)") == "\\\\\\[a](javascript:x)"
    assert markdown.inline("a\\|b\n<c>") == "a\\\\\\|b &lt;c&gt;"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "=a\r=1"])
def test_cells_of_a_report_are_never_formulas(text: str, report_of: Any, tmp_path: Path) -> None:
    render_files.write_all(report_of(text), tmp_path)
    for name in (render_files.ARMS, render_files.RUNS):
        written = io.StringIO((tmp_path / name).read_bytes().decode(), newline="")
        cells = [cell for row in csv.DictReader(written) for cell in row.values()]
        risky = [cell for cell in cells if cell and cell.lstrip("'").startswith(text.strip()[:1])]
        risky = [cell for cell in risky if not is_number(cell)]
        assert risky and all(cell.startswith("'") for cell in risky)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("text", PLANTED)
def test_values_in_a_model_card_stay_text(text: str) -> None:
    data = {"train": {"source": text, "kept": 1}}
    page = card.text(RunRecord(command="sft", model={"base": text, "name": text}, data=data, metrics={text: 1.0}))
    front, rest = page.split("---\n")[1], page.split("---\n", 2)[2]
    assert "base_model" not in front and "<" not in rest.partition("```")[0] and rest.count("\n# ") == 1
    assert "](javascript" not in rest.replace("\\\\\\[a](", "")


def test_a_hub_name_is_in_the_model_card() -> None:
    assert "base_model: org/a-b.c" in card.text(RunRecord(command="sft", model={"base": "org/a-b.c"}))
    for name in ("org/a\nlicense: mit", "~/model", "/a/b", "../a", "a: b"):
        assert "base_model" not in card.text(RunRecord(command="sft", model={"base": name}))
