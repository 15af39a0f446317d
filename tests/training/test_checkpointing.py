"""Gradient checkpointing: the same gradients, less memory in 8 bits too, and how `auto` decides."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perlcli import settings
from perlcli.memory import plans
from perlcli.model import loading, roles, sources
from perlcli.run.record import read_record
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import checkpointing

LENGTH, ROWS = 64, 4
STEPS = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--max-length", "96")
SAMPLED = ("--max-completion-length", "8", "--gradient-accumulation-steps", "1")


@pytest.fixture(scope="module")
def eight_bit_score(tmp_path_factory: pytest.TempPathFactory, perl: Any, llama: Path, rows: dict[str, Path]) -> Path:
    """A reward model on the Llama in 8 bits."""
    folder = tmp_path_factory.mktemp("runs") / "score"
    perl("reward", "--model", llama, "--load-in-8bit", "--data", rows["pairs"], "--output", folder, *STEPS)
    return folder


@pytest.fixture
def words_of(llama: Path, rows: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    """A stage's command line on the Llama in 8 bits."""

    def words(stage: str, *more: str) -> tuple[Any, ...]:
        kinds = {"sft": "demonstrations", "reward": "pairs", "rl": "prompts"}
        given = (stage, "--model", llama, "--load-in-8bit", "--data", rows[kinds[stage]], *STEPS, *more)
        return (*given, *SAMPLED, "--reward", request.getfixturevalue("eight_bit_score")) if stage == "rl" else given

    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        pytest.param("sft", (), id="sft"),
        pytest.param("reward", (), id="reward"),
        pytest.param("rl", ("--num-generations", "4"), id="rloo", marks=pytest.mark.slow),
        pytest.param("rl", ("--algorithm", "reinforce"), id="reinforce"),
    ],
)
def test_an_8_bit_base_learns_the_same_with_and_without(
    perl: Any, words_of: Any, stage: str, more: tuple[str, ...]
) -> None:
    for chosen in ("true", "false"):
        perl(*words_of(stage, *more), "--gradient-checkpointing", chosen, "--output", chosen)
    found = read_record(Path("true")).trl_settings
    assert (found["gradient_checkpointing"], found["gradient_checkpointing_kwargs"]) == (True, {"use_reentrant": True})
    assert not read_record(Path("false")).trl_settings["gradient_checkpointing"]
    for path in Path("true").rglob("*.safetensors"):
        with_it, without = load_file(path), load_file(Path("false") / path.relative_to("true"))
        for name, tensor in with_it.items():
            torch.testing.assert_close(tensor, without[name], rtol=1e-4, atol=1e-5)


def held_after_forward(model: Any, *, reentrant: bool) -> int:
    """The bytes of activations that live after a forward pass through an 8-bit model with checkpointing."""
    from perlcli.memory.tracking import Live

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    live = Live()
    live.ignore([*model.parameters(), *model.buffers()])
    with live:
        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
        held = sum(size for _, size, _ in live.events)
    hidden.sum().backward()
    return held


@pytest.mark.parametrize("imitated", ["like_int8_activations", ""])
def test_only_reentrant_checkpointing_drops_the_input_of_8_bit_layers(
    imitated: str, llama: Path, request: pytest.FixtureRequest
) -> None:
    if imitated:
        request.getfixturevalue(imitated)
    model = loading.load_causal(sources.locate(str(llama)), ModelSettings(load_in_8bit=True))
    adapted = roles.new_adapter(
        model, LoraSettings(lora_r=4, lora_dropout=0.0, lora_target_modules="attention"), "CAUSAL_LM"
    )
    adapted.train()
    kept, dropped = (held_after_forward(adapted, reentrant=reentrant) for reentrant in (False, True))
    layer_input = ROWS * LENGTH * 64 * 2  # of hidden size 64 in bfloat16
    assert dropped < 6 * layer_input < kept  # two layers of seven projections


# How `auto` decides


def decided(perl: Any, llama: Path, rows: dict[str, Path], *more: str) -> tuple[bool, list[str]]:
    """What a run of one step on a stubbed GPU chose, and its notes about it."""
    words = ("--model", llama, "--data", rows["pairs"], "--output", "run", "--max-length", "96", "--dtype", "float32")
    perl("reward", *words, "--max-steps", "1", *more)
    found = read_record(Path("run"))
    notes = [note for note in found.notes if note.startswith("Gradient checkpointing")]
    return found.trl_settings["gradient_checkpointing"], notes


@pytest.mark.slow
def test_a_cpu_keeps_activations_without_a_word(perl: Any, llama: Path, rows: dict[str, Path]) -> None:
    assert decided(perl, llama, rows) == (False, [])
    assert read_record(Path("run")).settings["gradient_checkpointing"] == "auto"


@pytest.fixture
def gpu_of(like_stubbed_cuda: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the stubbed GPU have so many bytes free."""
    return lambda free: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))


def choice_for(llama: Path, free: int, **more: Any) -> tuple[bool, str]:
    values = {"model": str(llama), "max_length": 96, "dtype": "float32", "output": "run", **more}
    given = settings.resolve(settings.build(settings.Rl if "reward" in more else settings.Reward, values), {})
    return checkpointing._for(given, free)


def test_a_gpu_keeps_activations_where_they_fit(llama: Path) -> None:
    is_on, why = choice_for(llama, 20 * 10**9)
    assert not is_on
    assert re.fullmatch(r"\d+ MB predicted, 20\.0 GB free", why)


def test_a_gpu_computes_them_again_where_they_do_not_fit(llama: Path) -> None:
    is_on, why = choice_for(llama, 700_000_000)
    assert is_on
    assert why.startswith("without it, ") and why.endswith(" predicted, 700 MB free")


def test_what_cannot_be_predicted_is_computed_again(llama: Path, classifier: Path) -> None:
    other = choice_for(llama, 20 * 10**9, reward=(str(classifier),), data="coffee")
    assert other == (True, "a reward with a base of its own isn't predicted")
    is_on, why = choice_for(llama, 20 * 10**9, optim="lion_8bit")
    assert is_on and why.startswith("memory can't be predicted (--optim lion_8bit: memory is only predicted for")


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_had(
    perl: Any, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decided(perl, llama, rows, "--gradient-checkpointing", "true") == (True, [])
    record = json.loads(Path("run/record.json").read_text())
    record["settings"]["gradient_checkpointing"] = "auto"
    Path("run/record.json").write_text(json.dumps(record))
    assert decided(perl, llama, rows, "--resume", "--max-steps", "2") == (True, [])


@pytest.mark.slow
def test_a_run_on_a_gpu_says_what_it_chose(
    gpu_of: Any, perl: Any, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_of(20 * 10**9)
    words = ("--model", llama, "--data", rows["pairs"], "--output", "run", "--dry-run", "--dtype", "float32")
    out = perl("reward", *words).output
    assert "Gradient checkpointing is off: " in out and "20.0 GB free." in out
    gpu_of(700_000_000)
    assert "Gradient checkpointing is on: without it, " in perl("reward", *words).output


@pytest.mark.parametrize("value", ["yes", "2"])
def test_another_value_is_refused(perl: Any, value: str) -> None:
    assert "must be one of auto, true, false" in perl("sft", "--gradient-checkpointing", value, code=2).stderr


@pytest.mark.slow
def test_yaml_may_have_it_unquoted(perl: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("gradient_checkpointing: true\nmax_steps: 1\n")
    assert "Dry run" in perl("sft", "--config", tmp_path / "run.yaml", "--dry-run").output


def test_set_names_the_option(perl: Any) -> None:
    words = ("sft", "--set", "gradient_checkpointing=true", "--dry-run")
    assert "--set gradient_checkpointing: use the option --gradient-checkpointing" in perl(*words, code=2).stderr
    renamed = ("sft", "--set", "activation_checkpointing=true", "--dry-run")
    assert "--set activation_checkpointing: use the option --gradient-checkpointing" in perl(*renamed, code=2).stderr


def test_kwargs_of_the_user_stay(llama: Path) -> None:
    values = {"model": str(llama), "load_in_8bit": True, "output": "run"}
    own = "gradient_checkpointing_kwargs={use_reentrant: false}"
    given = [settings.resolve(settings.build(settings.Sft, {**values, "set": each}), {}) for each in ((), (own,))]
    assert [plans.is_reentrant(each) for each in given] == [True, False]
