"""The loss is right on models that TRL's fused output layer doesn't know."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import add_fused_lm_head
from trl.trainer import utils as trl_utils

from perlcli.run.record import read_record
from perlcli.training import logits
from perlcli.training.logits import OnlyCompletions, OwnLogits

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
RECURRENT = {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAULTY: dict[str, dict[str, Any]] = {
    "llama4_text": {**SIZE, **EXPERTS, "intermediate_size_mlp": 32, "attention_chunk_size": 16},
    "phimoe": {**SIZE, **EXPERTS},
    "granitemoe": {**SIZE, **EXPERTS},
    "recurrent_gemma": {**SIZE, **RECURRENT, "logits_soft_cap": 1.0, "w_init_variance_scale": 5.0},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9, 10], [-100, 12, 13, 14, -100, -100]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "use_cache": False}


def tiny(kind: str, vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(FAULTY.get(kind) or SIZE), vocab_size=vocabulary, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config).eval()


class Notes(list[str]):
    note = list.append


def trainer_of(model: Any, *, temperature: float = 1.0) -> Any:
    """What the check needs of a TRL trainer that was just built on a model."""
    config = model.config.get_text_config()
    has_aux = bool(getattr(config, "router_aux_loss_coef", 0.0)) and hasattr(config, "output_router_logits")
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    return SimpleNamespace(model=model, aux_loss_enabled=has_aux, own_logits=False, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_own_logits_score_as_the_fused_layer_does(temperature: float) -> None:
    model = tiny("llama")
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    fused = model(**INPUTS, labels=LABELS, fused_lm_head=True)
    own = OwnLogits(model, temperature)(**INPUTS, labels=LABELS, fused_lm_head=True)
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        assert torch.allclose(getattr(own, name).float(), getattr(fused, name).float(), atol=1e-5), name
    gradients = [torch.autograd.grad(found.log_probs.sum(), model.lm_head.weight)[0] for found in (fused, own)]
    assert torch.allclose(*gradients, atol=1e-5)
    assert torch.equal(OwnLogits(model)(**INPUTS).logits, model(**INPUTS).logits)


def test_rows_without_labels_have_a_loss_of_zero_and_gradients() -> None:
    model = tiny("llama")
    scores = OwnLogits(model)(**INPUTS, labels=torch.full_like(LABELS, -100), fused_lm_head=True)
    scores.log_probs.sum().backward()
    assert scores.log_probs.abs().sum() == 0 == model.lm_head.weight.grad.abs().sum()


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_only_completions_are_multiplied_by_the_output_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once TRL itself leaves out the others on a CPU, the two counts are equal, and `OnlyCompletions` can go."""
    model, read = tiny(kind), []
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    fused = trl_utils._ChunkedLogProbFunction
    count = SimpleNamespace(apply=lambda hidden, *args: (read.append(len(hidden)), fused.apply(hidden, *args))[1])
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", count)
    labels = LABELS.clone()
    labels[:, :-3] = -100
    every, last = (called(**INPUTS, labels=labels, fused_lm_head=True) for called in (model, OnlyCompletions(model, 3)))
    assert read == [2 * 5, 2 * 3]
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        wanted, found = getattr(every, name)[:, -3:].float(), getattr(last, name).float()
        assert torch.allclose(wanted, found, atol=1e-5), name
    assert torch.equal(OnlyCompletions(model, 3)(**INPUTS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize("kind", FAULTY)
def test_own_logits_replace_a_fused_layer_that_fails_or_is_wrong(kind: str) -> None:
    model, run = tiny(kind), Notes()
    wanted = model(**INPUTS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:].unsqueeze(2))[..., 0]
    trainer = trainer_of(model)
    logits.check(trainer, run)  # type: ignore[arg-type]
    assert trainer.own_logits
    assert "TRL's chunked loss" in run[0]
    found = logits.wrapped(trainer, model)(**INPUTS, labels=LABELS, fused_lm_head=True)
    assert torch.allclose(found.log_probs, wanted * (LABELS[:, 1:] != -100), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "qwen3_moe", "mixtral"])
def test_a_fused_layer_that_is_right_stays(kind: str, temperature: float) -> None:
    model, run = tiny(kind), Notes()
    trainer = trainer_of(model, temperature=temperature)
    logits.check(trainer, run)  # type: ignore[arg-type]
    assert (trainer.own_logits, run) == (False, [])
    assert logits.wrapped(trainer, model) is model


def test_memory_that_runs_out_is_not_a_fault_of_the_layer() -> None:
    trainer = trainer_of(tiny("llama"))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    trainer.model.forward = fail
    with pytest.raises(torch.OutOfMemoryError):
        logits.check(trainer, Notes())  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_such_models_train(kind: str, perl: Callable[..., Any], rows: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / kind, chat=True)
    model = tiny(kind, len(tokenizer))
    model.save_pretrained(tmp_path / kind)
    common = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--max-length", "128", "--lora-r", "4")
    perl("sft", "-m", tmp_path / kind, "-d", rows["demonstrations"], "-o", tmp_path / "run", *common)
    found = read_record(tmp_path / "run")
    assert any("the loss is computed from all logits" in note.lower() for note in found.notes)
    assert {"eval_loss", "eval_token_accuracy"} < set(found.metrics)
