"""`perl estimate` held against real models: what lies there to the byte, training steps by live tensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli import base, estimate, memory_trace, policies, prepare, reward, roles, settings, sft
from perlcli.errors import PerlError
from perlcli.estimate_memory import Arm, Plan, largest_batch, predict, shape_of, takes, weight_bytes
from perlcli.memory_trace import Live, Step

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LENGTH, BATCH = 48, 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A random Llama of five layers, more than are run to predict it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "deep"
    config = LlamaConfig.from_pretrained(llama, num_hidden_layers=5)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def plan_for(stage: Any, arm: Arm, **more: Any) -> Plan:
    return Plan(stage, arm, TARGETS, batch=BATCH, length=LENGTH, completion=16, **more)


def given_for(kind: Any, model: Path, arm: Arm) -> Any:
    values: dict[str, Any] = {"model": str(model), "data": "coffee", "max_length": LENGTH}
    values |= (
        {"full": True}
        if not arm.rank
        else {"lora_r": arm.rank, "load_in_4bit": arm.bits == 4, "load_in_8bit": arm.bits == 8}
    )
    return settings.build(kind, {**values, "per_device_train_batch_size": BATCH, "output": "run", "dtype": "float32"})


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_weights_and_adapters_to_the_byte(llama: Path, bits: int) -> None:
    arm = Arm("lora", 4, bits)
    prepared = prepare.prepare(given_for(settings.Sft, llama, arm))
    model = policies.start(prepared)
    found = predict(shape_of(prepared.source.config), plan_for("sft", arm))
    assert found.weights["base"] == roles.bytes_of(p for n, p in model.named_parameters() if roles.is_base(n))
    assert found.adapters["policy"] == roles.adapter_bytes(model, roles.POLICY)


@pytest.mark.parametrize("arm", [Arm("full"), Arm("lora", 4)])
def test_gradients_and_moments_to_the_byte(llama: Path, arm: Arm) -> None:
    model = reward_trainer(llama, arm).model
    model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    moments = [t for state in optimiser.state.values() for name, t in state.items() if name != "step"]
    found = predict(shape_of(base.locate(str(llama)).config), plan_for("reward", arm))
    assert found.gradients == roles.bytes_of(p.grad for p in trained if p.grad is not None)
    assert found.optimiser == roles.bytes_of(moments)
    assert sum(found.weights.values()) + sum(found.adapters.values()) == roles.bytes_of(model.parameters())


def reward_trainer(model: Path, arm: Arm) -> Any:
    prepared = prepare.prepare(given_for(settings.Reward, model, arm))
    rows = reward.Dataset.from_list([
        {"chosen_ids": [3] * LENGTH, "rejected_ids": [4] * (LENGTH - 1 - n)} for n in range(BATCH)
    ])  # fmt: skip
    return reward.build_trainer(prepared, reward.trainer_args(prepared.settings), rows, None)


def sft_trainer(model: Path, arm: Arm) -> Any:
    prepared = prepare.prepare(given_for(settings.Sft, model, arm))
    rows = [{"input_ids": [3] * (LENGTH - n), "labels": [3] * (LENGTH - n)} for n in range(BATCH)]
    config = sft.trainer_args(prepared.settings)
    policy = policies.start(prepared)
    with roles.unrounded(policy):
        trainer = sft.SFTTrainer(
            policy, config, train_dataset=sft.Dataset.from_list(rows), processing_class=prepared.tokenizer
        )
    roles.as_float32(trainer.model)
    return trainer


def measured(trainer: Any) -> int:
    """The most bytes of tensors that live at once in TRL's own training step, beside what lay there before it."""
    batch = next(iter(trainer.get_train_dataloader()))
    live = Live()
    live.ignore([*trainer.model.parameters(), *trainer.model.buffers()])
    with live:
        trainer.training_step(trainer.model, batch)
    return live.peak()


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("arm", [Arm("full"), Arm("lora", 4)])
def test_a_step_holds_what_was_predicted(deep: Path, stage: Any, arm: Arm) -> None:
    trainer = (sft_trainer if stage == "sft" else reward_trainer)(deep, arm)
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.current_gradient_accumulation_steps = 1
    found = predict(shape_of(base.locate(str(deep)).config), plan_for(stage, arm))
    learning = next(phase for phase in found.phases if phase.name == "learning").parts
    predicted = sum(learning[tag] for tag in memory_trace.TAGS)
    assert predicted == pytest.approx(measured(trainer), rel=0.05)


@pytest.mark.parametrize("kind", ["sft", "reward", "rl", "prefill", "decode", "scoring"])
def test_three_layers_tell_of_all(deep: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    config = base.locate(str(deep)).config
    for rank in (0, 4):
        step = Step(kind, LENGTH, 16, autocast="bfloat16", rank=rank, targets=TARGETS, cuda=True, checkpointing=True)
        short = memory_trace.trace(config, step).at_peak(5)
        with monkeypatch.context() as patch:
            patch.setattr(memory_trace, "shortened", lambda config: config)
            memory_trace._trace.cache_clear()
            whole = memory_trace.trace(config, step).at_peak(5)
        memory_trace._trace.cache_clear()
        assert sum(short.values()) == pytest.approx(sum(whole.values()), rel=0.01)


def test_the_cache_is_keys_and_values_of_every_token(deep: Path) -> None:
    config = base.locate(str(deep)).config
    found = memory_trace.trace(config, Step("decode", LENGTH, rank=4, targets=TARGETS)).at_peak(BATCH)
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert a_token * (LENGTH - 1) * BATCH <= found["cache"] <= a_token * LENGTH * BATCH


def test_checkpointing_takes_less_and_dora_more(deep: Path) -> None:
    shape = shape_of(base.locate(str(deep)).config)
    plan = plan_for("reward", Arm("lora", 4))
    lora = predict(shape, plan).peak
    assert predict(shape, replace(plan, checkpointing=True)).peak < lora
    dora = predict(shape, replace(plan, arm=Arm("dora", 4, dora=True)))
    assert dora.peak > lora
    assert dora.adapters["policy"] > predict(shape, plan).adapters["policy"]


def test_one_base_saves_a_copy_for_each_reward(llama: Path) -> None:
    shape = shape_of(base.locate(str(llama)).config)
    plan = plan_for("rl", Arm("lora", 4), rewards=3)
    saved = predict(shape, replace(plan, one_base=False)).peak - predict(shape, plan).peak
    assert saved == 3 * weight_bytes(shape, 0, "float32", head=False)


def test_the_largest_batch_fits_and_the_next_does_not(llama: Path) -> None:
    shape = shape_of(base.locate(str(llama)).config)
    plan = plan_for("reward", Arm("lora", 4))
    limit = takes(predict(shape, replace(plan, batch=11)), plan)
    assert largest_batch(shape, plan, limit) == 11
    assert largest_batch(shape, plan, limit - 1) == 10
    assert largest_batch(shape, plan, 1000) == 0


def test_another_architecture(gpt2: Path) -> None:
    shape = shape_of(base.locate(str(gpt2)).config)
    plan = replace(plan_for("reward", Arm("lora", 4)), targets=("c_attn",))
    assert predict(shape, plan).peak > predict(shape, replace(plan, batch=1)).peak


def test_command(perl: Any, llama: Path) -> None:
    out = perl("estimate", "rl", "--model", llama, "--arms", "full,lora", "--lora-r", "4", "--gpu", "1GB",
               "--max-length", "64", "--max-completion-length", "16").output  # fmt: skip
    assert "perl rl: bfloat16, batch 8 x 64 tokens (16 of them written, 4 passes a step)" in out
    assert "fits 1 GiB" in out
    assert "lora r4, stock copies" in out


def test_command_for_programs(perl: Any, llama: Path) -> None:
    words = ("estimate", "reward", "--model", llama, "--arms", "lora", "--max-length", "32", "--json")
    found = json.loads(perl(*words).output)
    (row,) = found["stages"]["reward"]
    assert row["peak"] == max(phase["total"] for phase in row["phases"])
    assert row["fits"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rm",), "There is no stage rm"),
        (("--arms", "lora,qlora"), "--arms: there is no arm qlora"),
        (("--lora-r", "0"), "--lora-r must be whole numbers above 0"),
        (("--gpu", "big"), "--gpu big is no size of memory"),
        (("--max-length", "64"), "leaves no room for a prompt"),
    ],
)
def test_faults_are_told(perl: Any, llama: Path, words: tuple[str, ...], said: str) -> None:
    assert said in perl("estimate", *words, "--model", llama, code=2).output


def test_sizes_of_gpus() -> None:
    assert {estimate.parse_gpu(words) for words in ("24", "24GB", "24GiB", " 24 gb")} == {24 * 2**30}
    with pytest.raises(PerlError):
        estimate.parse_gpu("0GB")
