"""What both algorithms sample; REINFORCE with a value model: its returns, its gradients, and what it saves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from perlcli import settings
from perlcli.commands import rl
from perlcli.data import load
from perlcli.model import roles
from perlcli.rollouts import local
from perlcli.rollouts.how import FULL
from perlcli.run.record import read_record
from perlcli.settings.sampling import SamplingSettings
from perlcli.training import policies, rewards, sampling
from perlcli.training.algorithms import TIME, Reinforce, explained, returns, side_by_side, whiten
from perlcli.training.prepare import prepare

Perl = Callable[..., Any]
BATCH = "--per-device-train-batch-size 4 --gradient-accumulation-steps 2"
LENGTHS = "--max-completion-length 6 --max-length 128"
SHORT = tuple(f"--algorithm reinforce --max-steps 4 --learning-rate 1e-2 {BATCH} {LENGTHS}".split())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Arithmetic


def test_return_is_the_reward_minus_the_divergence_to_come() -> None:
    ratios = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.0, 0.0]])
    found = returns(torch.tensor([10.0, -2.0]), ratios, beta=0.1)
    assert torch.allclose(found, torch.tensor([[9 - 0.7, 9 - 0.6, 9 - 0.4], [-1.8 - 0.05, -1.8, -1.8]]))
    assert torch.equal(returns(torch.tensor([3.0]), torch.zeros(1, 2), beta=0.0), torch.full((1, 2), 3.0))


def test_whitened_advantages_only_count_written_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = whiten(torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), mask)
    kept = found[mask.bool()]
    assert (float(kept.mean()), float(kept.std())) == pytest.approx((0, 1), abs=1e-4)
    assert not found[~mask.bool()].any()


def test_explained_variance_is_1_for_the_returns_themselves_and_0_for_their_mean() -> None:
    wanted, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3)
    assert explained(wanted, wanted, mask) == 1
    assert explained(wanted, torch.full((1, 3), 3.0), mask) == pytest.approx(0)
    assert explained(torch.ones(1, 3), wanted, mask) == 0


def test_prompts_and_completions_are_padded_as_trl_pads_them() -> None:
    ids, mask, width = side_by_side([[1, 2], [3]], [[4], [5, 6]], 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 4, 0], [0, 3, 5, 6]]
    assert mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert width == 2


# Gradients


@pytest.fixture
def build(sft_run: Path, reward_run: Path, rows: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """The trainer of a `perl rl` run with these settings, before its first step."""

    def made(**given: Any) -> Any:
        values: dict[str, Any] = {
            "model": str(sft_run),
            "reward": str(reward_run),
            "data": str(rows["prompts"]),
            "algorithm": "reinforce",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 6,
            "max_length": 128,
            "learning_rate": 1e-2,
            "output": str(tmp_path / "run"),
            "beta": 0.1,
            **given,
        }
        prepared = prepare(settings.build(settings.Rl, values))
        config = rl.trainer_args(prepared.settings)
        found, anchor = rewards.find_all(prepared), policies.find_anchor(prepared)
        prompts = load(values["data"], "rl").rows
        return rl.build_trainer(prepared, config, found, anchor, prompts)[0]  # type: ignore[arg-type]

    return made


def batch_of(trainer: Any) -> dict[str, Any]:
    """What the trainer would learn from at its first step."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])


def scramble(trainer: Any, adapter: str) -> None:
    """Give an adapter weights as if it had learned."""
    torch.manual_seed(5)
    for name, parameter in trainer.model.named_parameters():
        if f".{adapter}." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if isinstance(trainer, Reinforce):
        torch.nn.init.normal_(trainer.value.head.weight, std=0.2)


# What TRL samples

NARROW = {"top_p": 0.8, "top_k": 60, "min_p": 0.02, "repetition_penalty": 1.3, "temperature": 1.5}
HABITS = {"suppress_tokens": list(range(40, 200)), "no_repeat_ngram_size": 1, "typical_p": 0.2, "min_new_tokens": 6}


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
@pytest.mark.parametrize("given", [{}, NARROW, {"stop": "e", "temperature": 1.5}], ids=["full", "narrow", "stop"])
def test_training_samples_what_the_probe_and_evaluation_sample(build: Any, algorithm: str, given: Any) -> None:
    """Whatever the model's own generation config adds."""
    trainer = build(algorithm=algorithm, **given, num_generations=1 if algorithm == "reinforce" else 2)
    own = trainer.model.get_base_model().generation_config
    for name, value in HABITS.items():
        setattr(own, name, value)
    scramble(trainer, roles.POLICY)
    prompts = [row["prompt"] for row in list(trainer.train_dataset)[:4]]
    trainer.model.eval()
    torch.manual_seed(5)
    drawn = trainer._generate(prompts)[1]
    values = settings.flat(settings.resolve(settings.build(settings.Rl, {"max_completion_length": 6, **given}), {}))
    kept = {name: values[name] for name in ("temperature", *FULL, "stop", "max_completion_length")}
    how = sampling.asked(SamplingSettings(**kept), 5)
    assert drawn == local.sample(trainer.model, trainer.ends.render, prompts, how)
    assert trainer.model.get_base_model().generation_config is own
    assert "generate" not in vars(trainer.model)


def test_completions_that_stop_are_learned_from_without_padding_and_count_as_ended(build: Any) -> None:
    trainer = build(stop="e", max_completion_length=12, temperature=1.5, algorithm="rloo", num_generations=4)
    read: list[list[int]] = []
    judge = trainer.reward_funcs[0]
    score = judge.score
    judge.score = lambda rows, written, calling: read.extend(written) or score(rows, written, calling)
    torch.manual_seed(0)
    batch = batch_of(trainer)
    written = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    tokenizer, ends = trainer.ends.render.tokenizer, trainer.ends
    stopped = [ids for ids in written if "e" in tokenizer.decode(ids)]
    assert stopped and all("e" in tokenizer.decode(ids[-1:]) for ids in stopped)
    assert not any(tokenizer.pad_token_id in ids for ids in written)
    assert read == [ends.answer(ids) for ids in written]
    assert not any("e" in tokenizer.decode(ids, skip_special_tokens=True) for ids in read)
    assert all(ids[-1] in ends.render.eos_ids for ids, own in zip(read, written, strict=True) if own in stopped)
    metrics = trainer._metrics["train"]
    cut_off = [len(ids) == 12 and not ends.ended(ids) for ids in written]
    assert metrics["completions/clipped_ratio"] == [sum(cut_off) / len(cut_off)]
    lengths = [len(ids) for ids in written if ends.ended(ids)]
    found = [metrics[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")]
    assert found == [[sum(lengths) / len(lengths)], [min(lengths)], [max(lengths)]]


def test_policy_gradient_is_that_of_reinforce(build: Any) -> None:
    trainer = build()
    scramble(trainer, roles.VALUE)
    batch = batch_of(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    logps = (logits / trainer.temperature).log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2))[:, :, 0]
    advantages = (batch["returns"] - trainer.value.predict(batch, trainer.accelerator.autocast())) * batch[
        "completion_mask"
    ]
    assert torch.allclose(batch["advantages"], advantages, atol=1e-5)
    (-(advantages * logps).sum(dim=1).mean()).backward()
    wanted = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(f".{roles.POLICY}." in name for name in found)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in found)


def test_returns_use_the_reward_and_the_divergence_of_the_batch(build: Any) -> None:
    trainer = build()
    scramble(trainer, roles.POLICY)  # away from its anchor
    batch = batch_of(trainer)
    anchor_gap = batch["old_token_logps"] - trainer_anchor_logps(trainer, batch)
    wanted = returns(trainer._rewards, anchor_gap * batch["completion_mask"], 0.1) * batch["completion_mask"]
    assert torch.allclose(batch["returns"], wanted, atol=1e-5)
    assert anchor_gap.abs().max() > 0.01


def trainer_anchor_logps(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad(), roles.switched(trainer.model, roles.ANCHOR):
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    scaled = (logits / trainer.temperature).log_softmax(-1)
    return scaled.gather(2, batch["completion_ids"].unsqueeze(2))[:, :, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_model_only_changes_its_own_gradients(checkpointing: bool, build: Any) -> None:
    trainer = build(gradient_checkpointing=str(checkpointing).lower())
    scramble(trainer, roles.VALUE)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batch = batch_of(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    before = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    error = trainer.value.learn([batch, batch], trainer.accelerator.autocast)
    after = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {
        name for name, _ in trainer.model.named_parameters() if f".{roles.VALUE}." in name
    }
    # by finite differences: the gradient of half the mean squared error
    parameter = trainer.value.parameters()[0]
    step, place = 1e-2, int(parameter.grad.abs().flatten().argmax())
    errors = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * step
            values = trainer.value.predict(batch, trainer.accelerator.autocast())
            parameter.view(-1)[place] -= sign * step
        mask = batch["completion_mask"]
        errors.append(float(((values - batch["returns"]).square() * mask).sum() / mask.sum()))
    slope = (errors[0] - errors[1]) / (2 * step) / 2
    assert float(parameter.grad.view(-1)[place]) == pytest.approx(slope, rel=0.05)
    assert error == pytest.approx(sum(errors) / 2, rel=0.05)


def test_a_first_guess_is_the_value_of_every_state(build: Any) -> None:
    trainer = build()
    trainer.value.guess(1.5)
    batch = batch_of(trainer)
    assert torch.equal(
        trainer.value.predict(batch, trainer.accelerator.autocast()), torch.full_like(batch["returns"], 1.5)
    )


# The run


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> Path:
    """The folder of `perl rl --algorithm reinforce`."""
    folder = tmp_path_factory.mktemp("runs") / "reinforce"
    words = ("--model", sft_run, "--reward", reward_run, "--data", rows["prompts"], "--save-steps", "2")
    perl("rl", *words, "--output", folder, *SHORT)
    return folder


@pytest.mark.slow
def test_record_describes_policy_and_value_model(run: Path) -> None:
    found = read_record(run)
    adapter = 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)
    assert found.trainable_parameters == 2 * adapter + 65  # two adapters, and the value model's head
    assert found.memory["base_copies"] == 1
    assert found.memory["mb"]["value"] == round(4 * (adapter + 65) / 1e6, 3)
    assert found.guards["unchanged"] == ["anchor", "base", "reward"]
    assert "value_explained" in found.metrics
    first = metrics(run)[0]
    assert {"value/loss", "value/mean", "value/explained", "entropy", "kl"} <= set(first)
    assert "frac_reward_zero_std" not in first
    assert (first["kl"], found.settings["num_generations"]) == (0, 1)


@pytest.mark.slow
def test_every_step_logs_where_its_time_went(run: Path) -> None:
    for row in metrics(run):
        parts = {key: value for key, value in row.items() if key.startswith(TIME) and "/step" not in key}
        assert set(parts) == {f"{TIME}{name}" for name in ("sampling", "scoring", "anchor", "learning")}
        assert all(value > 0 for value in parts.values())
        assert sum(parts.values()) >= row["step_time"]


def test_value_model_is_saved_next_to_the_policy(run: Path, files: Callable[[Path], set[str]]) -> None:
    assert {path for path in files(run) if path.startswith("value/")} == {
        "value/adapter_config.json",
        "value/adapter_model.safetensors",
        "value/value_head.safetensors",
    }
    head = load_file(run / "value" / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 64), "bias": (1,)}
    assert head["weight"].any()


def test_policy_of_reinforce_is_evaluated(
    run: Path, perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    words = ("--reward", reward_run, "--data", rows["prompts"], "--max-completion-length", "6", "--max-length", "128")
    result = perl("eval", "--model", run, *words, "--output", "eval")
    assert f"anchor: {sft_run}, where RL started" in result.stdout
    assert AutoTokenizer.from_pretrained(run).chat_template


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-generations", "4"], "--algorithm reinforce takes one completion per prompt, not --num-generations 4"),
        (["--full"], "--algorithm reinforce needs a frozen base for its value model"),
        (["--algorithm", "rloo", "--value-learning-rate", "1e-3"], "--value-learning-rate only applies with"),
        (["--algorithm", "rloo", "--num-generations", "1"], "--num-generations must be at least 2"),
        (
            ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1"],
            "--algorithm reinforce needs at least 2 completions per step",
        ),
    ],
)
def test_options_that_conflict_are_rejected(
    words: list[str], told: str, perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    common = ("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert told in perl(*common, *words, code=2).stderr
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--set", "steps_per_generation=2"]])
def test_one_step_is_enough_for_a_trial_run(
    words: list[str], perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    """At the first step only the head of the value model learns, as it starts at 0."""
    common = ("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    perl(*common, "--max-steps", "1", *words)
    assert read_record(Path("run")).guards["trained"] == ["policy", "value model"]


def test_scaling_the_loss_does_not_change_the_gradients(build: Any) -> None:
    trainer = build()
    scramble(trainer, roles.VALUE)
    batch = batch_of(trainer)
    grads = []
    for scale in (1.0, 2.0**14):
        trainer.value.learn([batch], trainer.accelerator.autocast, scale)
        grads.append([p.grad.clone() for p in trainer.value.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*grads, strict=True))


def test_advantages_are_0_if_every_completion_is_masked_out() -> None:
    assert torch.equal(whiten(torch.ones(2, 3), torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # LLM.int8 warns at each layer, as bitsandbytes documents
@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
@pytest.mark.parametrize("precision", [["--dtype", "bfloat16"], ["--load-in-4bit"], ["--load-in-8bit"]])
def test_skipping_the_input_cast_under_autocast_changes_no_bit(
    precision: list[str], algorithm: str, perl: Perl, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft_run, reward_run, rows = map(request.getfixturevalue, ("sft_run", "reward_run", "rows"))
    size = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--max-steps", "2")
    words = (*SHORT, *size, "--algorithm", algorithm, *precision)
    common = ("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], *words)
    perl(*common, "-o", "spared")
    original = roles.casting
    seen: set[bool] = set()

    def always(model: Any, *, on: bool) -> Any:
        seen.add(on)
        return original(model, on=True)

    monkeypatch.setattr(roles, "casting", always)
    perl(*common, "-o", "cast")
    one, other = (load_file(Path(name) / "adapter_model.safetensors") for name in ("spared", "cast"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["reward"] for row in metrics(Path("spared"))] == [row["reward"] for row in metrics(Path("cast"))]
    assert seen == {True, False}
