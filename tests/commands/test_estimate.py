"""`perl estimate` held against real models: what lies there to the byte, training steps by live tensors."""

import gc
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perlcli import arms, settings
from perlcli.arms import Arm
from perlcli.commands import reward, rl, sft
from perlcli.data import Prompt
from perlcli.errors import PerlError
from perlcli.memory import plans, skeletons, trace, tracking
from perlcli.memory.prediction import (
    Plan,
    held,
    largest_batch,
    predict,
    settled,
    shape_of,
    takes,
    weight_bytes,
    workspace,
)
from perlcli.memory.skeletons import Step
from perlcli.memory.tracking import Live
from perlcli.model import loading, roles, sources, target_modules
from perlcli.settings import ModelSettings
from perlcli.training import policies, prepare, rewards

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LENGTH, COMPLETION, BATCH = 48, 16, 4
FULL, LORA = Arm("full"), Arm("lora", 4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A random Llama of five layers, more than are run to predict it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "deep"
    config = LlamaConfig.from_pretrained(llama, num_hidden_layers=5)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep_gpt2(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """A random GPT-2 of four layers, whose projections are Conv1D."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "deep-gpt2"
    GPT2LMHeadModel(GPT2Config.from_pretrained(gpt2, n_layer=4)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder)
    return folder


def plan_for(stage: Any, arm: Arm, targets: tuple[str, ...] = TARGETS, **more: Any) -> Plan:
    return Plan(stage, arm, targets, batch=BATCH, length=LENGTH, completion=COMPLETION, **more)


def targets_of(model: Path) -> tuple[str, ...]:
    """What `--lora-target-modules attention` names."""
    skeleton = sources.skeleton(sources.locate(str(model)))
    assert skeleton is not None
    return tuple(target_modules.target_modules(skeleton, "attention"))


def given_for(kind: Any, model: Path, arm: Arm) -> Any:
    values: dict[str, Any] = {"model": str(model), "data": "coffee", "max_length": LENGTH}
    values |= arm.options
    return settings.build(kind, {**values, "per_device_train_batch_size": BATCH, "output": "run", "dtype": "float32"})


@pytest.mark.parametrize("kind", ["lora", "lora-4bit", "lora-8bit"])
def test_weights_and_adapters_to_the_byte(llama: Path, kind: str) -> None:
    arm = Arm(kind, 4)
    prepared = prepare.prepare(given_for(settings.Sft, llama, arm))
    model = policies.start(prepared)
    found = predict(shape_of(prepared.source.config), plan_for("sft", arm))
    assert found.weights["base"] == roles.bytes_of(p for n, p in model.named_parameters() if roles.is_base(n))
    assert found.adapters["policy"] == roles.adapter_bytes(model, roles.POLICY)


def test_a_reward_on_the_causal_model_keeps_its_output_head() -> None:
    """Of a family without a sequence classifier; that of others leaves it out."""
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    for family, left_out in (("granite", 0), ("llama", 96 * 16)):
        config = AutoConfig.for_model(family, **sizes, **heads)
        assert shape_of(config).head == left_out
        assert shape_of(config).parameters == AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("arm", [FULL, LORA], ids=["full", "lora"])
def test_gradients_and_moments_to_the_byte(llama: Path, arm: Arm) -> None:
    model = reward_trainer(llama, arm).model
    model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    moments = [t for state in optimiser.state.values() for name, t in state.items() if name != "step"]
    found = predict(shape_of(sources.locate(str(llama)).config), plan_for("reward", arm))
    assert found.gradients == roles.bytes_of(p.grad for p in trained if p.grad is not None)
    assert found.optimiser == roles.bytes_of(moments)
    assert sum(found.weights.values()) + sum(found.adapters.values()) == roles.bytes_of(model.parameters())


def reward_trainer(model: Path, arm: Arm) -> Any:
    prepared = prepare.prepare(given_for(settings.Reward, model, arm))
    rows = reward.Dataset.from_list(
        [{"chosen_ids": [3] * LENGTH, "rejected_ids": [4] * (LENGTH - 1 - n)} for n in range(BATCH)]
    )
    return reward.build_trainer(prepared, reward.trainer_args(prepared.settings), rows, None)


def sft_trainer(model: Path, arm: Arm) -> Any:
    prepared = prepare.prepare(given_for(settings.Sft, model, arm))
    rows = [{"input_ids": [3] * (LENGTH - n), "labels": [3] * (LENGTH - n)} for n in range(BATCH)]
    config = sft.trainer_args(prepared.settings)
    policy = policies.start(prepared)
    with roles.unrounded(policy):
        trainer = sft.TokenMeanTrainer(
            policy, config, train_dataset=sft.Dataset.from_list(rows), processing_class=prepared.tokenizer
        )
    roles.as_float32(trainer.model)
    return trainer


def rl_trainer(model: Path, arm: Arm, score: Path, algorithm: str = "rloo") -> Any:
    given = given_for(settings.Rl, model, arm)
    more = settings.flat(given) | {
        "reward": (str(score),),
        "algorithm": algorithm,
        "max_completion_length": COMPLETION,
        "num_generations": 1 if algorithm == "reinforce" else BATCH,
        "gradient_accumulation_steps": 1,
        "chat": False,
        "min_completion_length": COMPLETION,
    }
    prepared = prepare.prepare(settings.build(settings.Rl, more))
    config = rl.trainer_args(prepared.settings)
    found, anchor = rewards.find_all(prepared), policies.find_anchor(prepared)
    # bytes that no merge takes: a token each
    ends = "~" * BATCH if algorithm == "rloo" else "{}|^`\x7f\x01\x02"[:BATCH]
    prompts = [Prompt("~" * (LENGTH - COMPLETION - 1) + end) for end in ends]
    return rl.build_trainer(prepared, config, found, anchor, prompts)[0]


def measured(trainer: Any) -> int:
    """The most bytes of tensors that live at once in TRL's own training step, beside what lay there before it."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.accelerator.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = 1
    live = Live()
    models = [module for module in gc.get_objects() if isinstance(module, torch.nn.Module)]  # also anchor and reward
    live.ignore(tensor for model in models for tensor in (*model.parameters(False), *model.buffers(False)))
    with live:
        trainer.training_step(trainer.model, batch, None)
        if hasattr(trainer, "learn_values"):
            trainer.learn_values()
    return max(itertools.accumulate(size for _, size, _ in live.events))


def held_in_steps(model: Path, plan: Plan) -> int:
    """The most that was predicted beside weights, adapters and moments."""
    found = predict(shape_of(sources.locate(str(model)).config), plan)
    return max(sum(phase.parts.get(tag, 0) for tag in trace.TAGS) for phase in found.phases)


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("arm", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["deep", "deep_gpt2"])
def test_a_step_holds_what_was_predicted(request: pytest.FixtureRequest, kind: str, stage: Any, arm: Arm) -> None:
    model: Path = request.getfixturevalue(kind)
    trainer = (sft_trainer if stage == "sft" else reward_trainer)(model, arm)
    predicted = held_in_steps(model, plan_for(stage, arm, targets_of(model)))
    assert predicted == pytest.approx(measured(trainer), rel=0.05)


@pytest.fixture(scope="module")
def score_of(tmp_path_factory: pytest.TempPathFactory, perl: Any, write: Any) -> Any:
    """The folder of a reward model on a base, made once for each."""
    pairs = [{"prompt": "a", "chosen": f" b{number}", "rejected": " c"} for number in range(8)]
    data = write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs)
    made: dict[tuple[Path, bool], Path] = {}

    def folder(model: Path, *, full: bool) -> Path:
        if (model, full) not in made:
            made[model, full] = tmp_path_factory.mktemp("runs") / "reward"
            perl(
                "reward",
                "--model",
                model,
                "--data",
                data,
                "--output",
                made[model, full],
                "--max-steps",
                "1",
                "--per-device-train-batch-size",
                "4",
                "--max-length",
                "64",
                "--learning-rate",
                "1e-2",
                "--no-chat",
                *(["--full"] if full else ["--lora-r", "4"]),
            )
        return made[model, full]

    return folder


@pytest.mark.parametrize(
    ("kind", "arm", "algorithm"),
    [
        ("deep", LORA, "rloo"),
        ("deep", LORA, "reinforce"),
        ("deep", FULL, "rloo"),
        ("deep_gpt2", LORA, "rloo"),
        pytest.param("deep_gpt2", LORA, "reinforce", marks=pytest.mark.slow),
        pytest.param("deep_gpt2", FULL, "rloo", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_step_of_rl_holds_what_was_predicted(
    request: pytest.FixtureRequest, score_of: Any, kind: str, arm: Arm, algorithm: str
) -> None:
    model: Path = request.getfixturevalue(kind)
    trainer = rl_trainer(model, arm, score_of(model, full=arm.is_full), algorithm)
    is_reinforce = algorithm == "reinforce"  # which shares no prompt
    plan = plan_for("rl", arm, targets_of(model), reinforce=is_reinforce, group=1 if is_reinforce else BATCH)
    found = predict(shape_of(sources.locate(str(model)).config), plan)
    lies = memory_of(trainer)
    assert sum(found.weights.values()) + sum(found.adapters.values()) == lies
    assert found.optimiser == 8 * sum(p.numel() for group in groups_of(trainer) for p in group["params"])
    assert held_in_steps(model, plan) == pytest.approx(measured(trainer), rel=0.05)


def groups_of(trainer: Any) -> list[dict[str, Any]]:
    """What the optimiser has moments of."""
    return list(trainer.create_optimizer().param_groups)


def memory_of(trainer: Any) -> int:
    """The bytes of every role's parameters: of the model, an anchor and a reward beside it, and of heads."""
    found = roles.bytes_of(trainer.model.parameters()) + sum(trainer.reward_funcs[0].score.bytes().values())
    if trainer.ref_model is not None:
        return found + roles.bytes_of(trainer.ref_model.parameters())
    found -= roles.adapter_bytes(trainer.model, roles.REWARD)  # among the model's own already
    return found + (roles.bytes_of(trainer.value.head.parameters()) if hasattr(trainer, "value") else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward", "rl", "value", "prefill", "decode"])
def test_three_layers_tell_of_all(deep: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    config = sources.locate(str(deep)).config
    for rank, bits in ((0, 0), (4, 0), (4, 8)):
        step = Step(
            kind,
            LENGTH,
            16,
            autocast="bfloat16",
            bits=bits,
            rank=rank,
            targets=TARGETS,
            cuda=True,
            checkpointing=True,
            reentrant=bits == 8,
        )
        short = trace.trace(config, step).at_peak(5)
        with monkeypatch.context() as patch:
            patch.setattr(skeletons, "shortened", lambda config: config)
            trace._trace.cache_clear()
            whole = trace.trace(config, step).at_peak(5)
        trace._trace.cache_clear()
        assert sum(short.values()) == pytest.approx(sum(whole.values()), rel=0.01)


def test_the_cache_is_keys_and_values_of_every_token(deep: Path) -> None:
    config = sources.locate(str(deep)).config
    found = trace.trace(config, Step("decode", LENGTH, rank=4, targets=TARGETS)).at_peak(BATCH)
    keys = config.num_key_value_heads * config.head_dim * 4 * BATCH  # a layer's, of a token
    whole = 2 * config.num_hidden_layers * keys * LENGTH
    # A layer's keys are copied to make room for a token's, and the old ones go when the new ones are there.
    assert whole <= found["cache"] <= whole + keys * LENGTH


@pytest.mark.slow
def test_checkpointing_takes_less_and_dora_more(deep: Path) -> None:
    shape = shape_of(sources.locate(str(deep)).config)
    plan = plan_for("reward", Arm("lora", 4))
    lora = predict(shape, plan).peak
    assert predict(shape, replace(plan, checkpointing=True)).peak < lora
    dora = predict(shape, replace(plan, arm=Arm("dora", 4)))
    assert dora.peak > lora
    assert dora.adapters["policy"] > predict(shape, plan).adapters["policy"]


@pytest.mark.slow
def test_8_bit_layers_keep_their_input_unless_checkpointing_is_reentrant(deep: Path) -> None:
    shape = shape_of(sources.locate(str(deep)).config)
    plan = plan_for("reward", Arm("lora-8bit", 4), dtype="bfloat16", cuda=True)

    def held(**more: Any) -> int:
        found = predict(shape, replace(plan, **more)).phases[1].parts
        return found["activations"]

    of_4bit = held(arm=Arm("lora-4bit", 4), checkpointing=True)
    kept = 5 * 4 * 2 * BATCH * LENGTH * 64 * 2  # five layers of four inputs, pairs, hidden size 64 in bfloat16
    assert held(checkpointing=True) > 0.5 * kept + held(checkpointing=True, reentrant=True)
    assert held(checkpointing=True, reentrant=True) == pytest.approx(of_4bit, rel=0.35)


def test_the_optimiser_s_share(deep: Path) -> None:
    shape = shape_of(sources.locate(str(deep)).config)
    plan = plan_for("sft", FULL, cuda=True, optim="adamw_torch_fused")
    full = predict(shape, plan)
    assert (full.optimiser, full.paged) == (8 * shape.parameters, 0)
    assert predict(shape, replace(plan, optim="sgd")).optimiser == 0
    eight = predict(shape, replace(plan, optim="adamw_8bit"))
    embeddings = shape.config.vocab_size * shape.hidden  # in 32 bits; so are norms, which are small
    assert 8 * embeddings + 2 * (shape.parameters - embeddings) < eight.optimiser < full.optimiser
    updates = [phase for phase in predict(shape, replace(plan, optim="adamw_torch")).phases if phase.name == "update"]
    assert updates[0].parts["activations"] == 4 * shape.parameters


def test_loading_and_training_are_apart(deep: Path) -> None:
    shape = replace(shape_of(sources.locate(str(deep)).config), stored="bfloat16")
    plan = plan_for("sft", LORA, TARGETS, dtype="bfloat16", cuda=True)
    found = predict(shape, plan)
    at_rest = sum(found.weights.values()) + sum(found.adapters.values())
    assert found.loading == at_rest  # into place
    assert found.training == max(phase.total for phase in found.phases if phase.name != "loading")
    assert found.peak == max(found.loading, found.training)
    quantised = predict(shape, replace(plan, arm=Arm("lora-4bit", 4)))
    lies = sum(quantised.weights.values()) + sum(quantised.adapters.values())
    assert quantised.loading == lies + 2 * shape.largest


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 17), ((9, 0), 67), ((12, 0), 67)])
def test_the_workspace_of_cublas(
    like_stubbed_cuda: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert round(workspace() / 1e6) == expected


@pytest.mark.slow
def test_auto_is_off_where_it_fits(deep: Path) -> None:
    shape = shape_of(sources.locate(str(deep)).config)
    plan = plan_for("reward", LORA, TARGETS, cuda=True, checkpointing=None)
    without, with_it = (replace(plan, checkpointing=chosen) for chosen in (False, True))
    enough = takes(predict(shape, without), without)
    assert settled(shape, plan, enough) == without
    assert settled(shape, plan, enough - 1) == with_it
    assert settled(shape, replace(plan, cuda=False), None).checkpointing is False
    limit = takes(predict(shape, replace(with_it, batch=9)), with_it)
    assert largest_batch(shape, plan, limit) == largest_batch(shape, with_it, limit) == 9


@pytest.mark.slow
def test_a_smaller_optimiser_is_advised(perl: Any, deep: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(deep, hidden_size=1024, intermediate_size=4096, head_dim=256).save_pretrained(tmp_path)
    size = ("--max-length", "16", "--per-device-train-batch-size", "1")
    words = ("estimate", "sft", "--model", tmp_path, "--arms", "full,lora", *size)
    out = perl(*words, "--gpu", "1.6GB").output
    assert re.search(r"\nfull: --optim paged_adamw_8bit takes 0\.\d+ GB instead of 1\.\d+ GB, and fits\n", out)
    assert "lora r=16: --optim" not in out
    assert "full: --optim adamw_8bit takes" in perl(*words).output
    assert "full: --optim" not in perl(*words, "--optim", "paged_adamw_8bit", "--gpu", "24GB").output


def test_one_base_saves_a_copy_for_each_reward(llama: Path) -> None:
    shape = shape_of(sources.locate(str(llama)).config)
    plan = plan_for("rl", Arm("lora", 4), rewards=3, cuda=True)
    saved = predict(shape, replace(plan, one_base=False)).peak - predict(shape, plan).peak
    assert saved == 3 * weight_bytes(shape, 0, "float32", head=False)


def test_the_largest_batch_fits_and_the_next_does_not(llama: Path) -> None:
    shape = shape_of(sources.locate(str(llama)).config)
    plan = plan_for("reward", Arm("lora", 4))
    limit = takes(predict(shape, replace(plan, batch=11)), plan)
    assert largest_batch(shape, plan, limit) == 11
    assert largest_batch(shape, plan, limit - 1) == 10
    assert largest_batch(shape, plan, 1000) == 0


@pytest.mark.slow
def test_one_run_tells_of_every_batch(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sources.locate(str(deep)).config
    steps = [
        Step(kind, LENGTH, COMPLETION, rank=rank, targets=TARGETS) for kind in ("reward", "decode") for rank in (0, 4)
    ]
    told = [trace.trace(config, step).at_peak(7) for step in steps]
    monkeypatch.setattr(tracking, "ROWS", 7)
    monkeypatch.setattr(tracking, "split", lambda size: (size, 0))
    trace._trace.cache_clear()
    assert [trace.trace(config, step).at_peak(7) for step in steps] == told
    trace._trace.cache_clear()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A random mixture of experts of five layers."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("models") / "mixture"
    like = MixtralConfig.from_pretrained(llama, num_hidden_layers=5, num_local_experts=4, intermediate_size=96)
    like.architectures = None
    MixtralForCausalLM(like).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("arm", [FULL, LORA], ids=["full", "lora"])
def test_a_step_of_a_mixture_holds_what_was_predicted(mixture: Path, arm: Arm) -> None:
    predicted = held_in_steps(mixture, plan_for("reward", arm))
    assert predicted == pytest.approx(measured(reward_trainer(mixture, arm)), rel=0.05)


@pytest.mark.slow
def test_a_mixture_is_predicted_with_what_bits_leave_out(perl: Any, mixture: Path) -> None:
    words = ("estimate", "sft", "--model", mixture, "--max-length", "32", "--arms", "lora,lora-4bit")
    out = perl(*words).output
    assert "the expected and the worst case are the same" in out
    assert re.search(r"Of the base, .* are in 4 bits and .* stay in bfloat16, as bitsandbytes leaves out experts", out)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GQA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16, "pad_token_id": 0}
MOE = {**GQA, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "gemma2": GQA,
    "mixtral": {**GQA, "num_local_experts": 4},
    "qwen3_moe": {**MOE, "num_experts": 4},
    "gpt_oss": {**GQA, "num_local_experts": 4},
    "lfm2": {**GQA, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    "nemotron_h": {**GQA, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16},
    "recurrent_gemma": {**GQA, "lru_width": 64, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_bytes_of_weights_are_those_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind])).save_pretrained(tmp_path)
    source = sources.locate(str(tmp_path))
    shape = shape_of(source.config)
    for bits, given in {0: ModelSettings(dtype="bfloat16"), 4: ModelSettings(load_in_4bit=True)}.items():
        model = loading.load_causal(source, given)
        assert weight_bytes(shape, bits, "bfloat16") == roles.bytes_of(model.parameters())
        quantised = roles.bytes_of(p for p in model.parameters() if p.dtype == torch.uint8)
        assert bits == 0 or held(shape, bits, "bfloat16") == (quantised, weight_bytes(shape, 4, "bfloat16") - quantised)


def test_estimate_refuses_what_the_run_would(perl: Any, gpt2: Path) -> None:
    words = ("estimate", "sft", "--model", gpt2, "--arms", "lora", "--max-length")
    assert "--max-length must be at most 256, for which" in perl(*words, "300", code=2).output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["granite", "mamba2"])
def test_families_without_a_classifier_or_keys_and_values_are_predicted(kind: str) -> None:
    from transformers import AutoConfig

    given = GQA if kind == "granite" else {**SIZES, "num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 8}
    config = AutoConfig.for_model(kind, **given)
    targets = ("q_proj", "v_proj") if kind == "granite" else ("in_proj",)
    of_reward = predict(shape_of(config), plan_for("reward", LORA, targets))
    assert of_reward.adapters["policy"] > predict(shape_of(config), plan_for("sft", LORA, targets)).adapters["policy"]
    assert max(phase.parts.get("cache", 0) for phase in predict(shape_of(config), plan_for("rl", LORA, targets)).phases)


def test_code_that_asks_for_data_is_refused(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden if hidden.sum() > 0 else -hidden)
    trace._trace.cache_clear()
    with pytest.raises(PerlError, match="doesn't run without data"):
        trace.trace(sources.locate(str(deep)).config, Step("reward", LENGTH))
    trace._trace.cache_clear()


@pytest.mark.slow
def test_a_run_asks_for_what_its_options_say(deep: Path, reward_run: Path) -> None:
    values = {
        "model": str(deep),
        "reward": str(reward_run),
        "data": "coffee",
        "algorithm": "reinforce",
        "dtype": "float32",
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_length": 64,
        "max_completion_length": 8,
        "gradient_checkpointing": "true",
        "optim": "adamw_8bit",
        "output": "run",
    }
    model = plans.Model(str(deep))
    given = settings.resolve(settings.build(settings.Rl, values), {})
    plan = model.plan(given, model.arm_of(given))
    assert plan == Plan(
        "rl",
        Arm("lora", 4),
        targets_of(deep),
        batch=2,
        length=64,
        completion=8,
        accumulation=3,
        checkpointing=True,
        optim="adamw_8bit",
        reinforce=True,
    )
    full = settings.resolve(settings.build(settings.Reward, {"model": str(deep), "full": True, "output": "run"}), {})
    assert model.arm_of(full) == Arm("full")


def test_an_adapter_goes_on_with_its_own_rank(sft_run: Path, tmp_path: Path) -> None:
    values = {"model": str(sft_run), "reward": "r", "data": "coffee", "output": "run", "dtype": "float32"}
    model = plans.Model(str(sft_run))
    given = settings.resolve(settings.build(settings.Rl, values), {})
    assert model.arm_of(given).rank == 4
    assert model.plan(given, model.arm_of(given)).anchor
    with pytest.raises(PerlError, match="only predicted for LoRA and DoRA"):
        model.arm_of(settings.resolve(settings.build(settings.Rl, {**values, "peft": "loha.json"}), {}))


@pytest.mark.slow
def test_a_row_tells_its_peak_and_what_fits(deep: Path) -> None:
    model = plans.Model(str(deep))
    values = {"per_device_train_batch_size": 2, "max_length": 32, **Arm("lora-4bit", 8).options}
    given = settings.resolve(settings.build(settings.Reward, values), {})
    row = model.row(given, 24 * 2**30, on_gpu=True)
    assert row.fits
    assert row.peak == row.prediction.peak
    assert row.name == "lora-4bit r=8"
    assert row.plan.dtype == "bfloat16"
    with pytest.raises(PerlError, match="unknown arm qlora"):
        arms.parse_kinds("qlora")


@pytest.mark.slow
def test_command(perl: Any, llama: Path) -> None:
    out = perl(
        "estimate",
        "rl",
        "--model",
        llama,
        "--arms",
        "full,lora",
        "--lora-r",
        "4",
        "--gpu",
        "1GB",
        "--max-length",
        "64",
        "--max-completion-length",
        "16",
    ).output
    sampled = "(16 of them sampled, 4 passes per step, each prompt computed once for 4 completions)"
    assert f"perl rl: bfloat16, batch 8 x 64 tokens {sampled}" in out
    assert "fits 1 GiB" in out
    assert "lora r=4, stock copies" in out


@pytest.mark.slow
def test_command_for_reinforce(perl: Any, llama: Path) -> None:
    words = (
        "estimate",
        "rl",
        "--model",
        llama,
        "--arms",
        "lora",
        "--max-length",
        "32",
        "--max-completion-length",
        "8",
        "--algorithm",
        "reinforce",
        "--json",
    )
    row = json.loads(perl(*words).output)["stages"]["rl"][0]
    assert "value" in row["adapters"]
    assert "value" in {phase["name"] for phase in row["phases"]}


def test_command_for_programs(perl: Any, llama: Path) -> None:
    words = ("estimate", "reward", "--model", llama, "--arms", "lora", "--max-length", "32", "--json")
    found = json.loads(perl(*words).output)
    (row,) = found["stages"]["reward"]
    assert row["peak"] == max(phase["total"] for phase in row["phases"])
    assert row["fits"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rm",), "STAGE must be one of sft, reward, rl, all, not 'rm'"),
        (("--arms", "lora,qlora"), "--arms: unknown arm qlora"),
        (("--lora-r", "0"), "--lora-r must be whole numbers above 0"),
        (("--gpu", "big"), "--gpu must be a size of memory, not big"),
        (("--max-length", "64"), "leaves no room for a prompt"),
    ],
)
def test_faults_are_told(perl: Any, llama: Path, words: tuple[str, ...], said: str) -> None:
    assert said in perl("estimate", *words, "--model", llama, code=2).output


def test_sizes_of_gpus() -> None:
    assert {plans.parse_gpu(words) for words in ("24", "24GB", "24GiB", " 24 gb")} == {24 * 2**30}
    with pytest.raises(PerlError):
        plans.parse_gpu("0GB")


@pytest.mark.parametrize("words", ["--lora-r=1,²", "--lora-r=0", "--gpu=0", "--gpu=" + "9" * 400])
def test_a_size_or_rank_that_is_none_is_told(words: str, perl: Any) -> None:
    assert f"Error: {words.partition('=')[0]}" in perl("estimate", "sft", words, code=2).stderr


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_model_that_cannot_share_prompts_is_predicted_without(name: str) -> None:
    (family,) = (family for family in families.FAMILIES if family.name == name)
    config = families.config_of(family)
    assert not trace.shares(config)
    assert trace.shares(AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
