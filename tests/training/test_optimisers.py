"""`--optim`: what is accepted, what its state takes, and that a run with 8-bit states resumes exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.memory import optimisers
from perlcli.memory.optimisers import OPTIMISERS, Tensors, states
from perlcli.model import roles
from perlcli.run.record import read_record
from perlcli.training.trl_config import trl_config

STEPS = ("--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--max-length", "96", "--lora-r", "64")


def config(**values: Any) -> Any:
    given = settings.resolve(settings.build(settings.Sft, {"output": "run", **values}), {})
    return trl_config(SFTConfig, given, {})


def test_the_default_is_that_of_transformers() -> None:
    assert config().optim == SFTConfig(output_dir="run", use_cpu=True, bf16=False).optim == optimisers.DEFAULT


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamw8bit", "--optim must be the name of an optimiser in transformers, not 'adamw8bit'\nHint: Did"),
        (
            "paged_adamw_8bit",
            "--optim paged_adamw_8bit needs a GPU: there is nothing to page on a CPU\nHint: --optim a",
        ),
        ("lomo", "--optim lomo changes weights during the backward pass, before their gradients are checked"),
        ("galore_adamw_layerwise", "--optim galore_adamw_layerwise changes weights during the backward pass"),
        ("grokadamw", "--optim grokadamw can't be used: "),
    ],
)
def test_what_cannot_train_is_refused(name: str, said: str) -> None:
    with pytest.raises(PerlError) as caught:
        config(optim=name)
    assert str(caught.value).startswith(said)


def test_an_8_bit_one_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(PerlError, match=r"^--optim adamw_8bit can't be used: .*install `bitsandbytes`"):
        config(optim="adamw_8bit")


def test_set_names_the_option() -> None:
    with pytest.raises(PerlError, match="--set optim: use the option --optim"):
        config(set=("optim=sgd",))


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if not name.startswith("paged")])
def test_states_to_the_byte(name: str) -> None:
    """Against the states that the optimiser itself makes, on a CPU."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(40, 128), "wide": nn.Linear(128, 300), "narrow": nn.Linear(8, 8)})
    trainer = Trainer(model, config(optim=name))
    optimiser = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    shared = {"qmap1", "qmap2"}  # one for all tensors
    held = [
        value
        for state in optimiser.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in shared and value.dim()
    ]
    shapes = [(300, 128), (300,), (8, 8), (8,)]
    trained = [Tensors((40, 128), is_embedding=True), *map(Tensors, shapes)]
    assert states(name, trained, cuda=False).resident == roles.bytes_of(held)


def test_what_is_paged_is_not_in_the_gpu_s_memory() -> None:
    large, small = Tensors((1000, 1000), 3), Tensors((64, 64), 5)
    on_gpu = states("paged_adamw_8bit", [large, small], cuda=True)
    assert on_gpu.paged == 2 * 3 * 10**6
    assert on_gpu.resident + on_gpu.paged == states("adamw_8bit", [large, small], cuda=True).resident


def test_others_are_not_predicted() -> None:
    with pytest.raises(PerlError, match="--optim lion_8bit: memory is only predicted for adamw_torch, "):
        states("lion_8bit", [], cuda=True)
    assert set(OPTIMISERS) <= {member.value for member in OptimizerNames}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", pytest.param("rl", marks=pytest.mark.slow)])
def test_a_run_with_8_bit_states_resumes_exactly(
    perl: Any, llama: Path, rows: dict[str, Path], stage: str, request: pytest.FixtureRequest
) -> None:
    words = [stage, "--model", llama, *STEPS, "--optim", "adamw_8bit", "--save-steps", "2", "--num-train-epochs", "9"]
    if stage == "sft":
        words += ["--data", rows["demonstrations"]]
    else:
        words += ["--data", rows["prompts"], "--reward", request.getfixturevalue("reward_run")]
        words += ["--algorithm", "reinforce", "--max-completion-length", "8", "--gradient-accumulation-steps", "1"]
    perl(*words, "--max-steps", "4", "--output", "at-once", "--set", "lr_scheduler_type=constant")
    perl(*words, "--max-steps", "2", "--output", "halved", "--set", "lr_scheduler_type=constant")
    perl(*words, "--max-steps", "4", "--output", "halved", "--set", "lr_scheduler_type=constant", "--resume")
    at_once, halved = (load_file(Path(folder) / "adapter_model.safetensors") for folder in ("at-once", "halved"))
    assert all(torch.equal(tensor, halved[name]) for name, tensor in at_once.items())
    assert read_record(Path("halved")).trl_settings["optim"] == "adamw_8bit"


@pytest.mark.slow
def test_another_optimiser_is_another_run(perl: Any, llama: Path, rows: dict[str, Path]) -> None:
    words = ("sft", "--model", llama, "--data", rows["demonstrations"], *STEPS, "--output", "run")
    perl(*words, "--max-steps", "1")
    again = perl(*words, "--max-steps", "2", "--resume", "--optim", "adamw_8bit", code=2).stderr
    assert "--optim was adamw_torch_fused, now adamw_8bit" in again
