"""Each guard detects the fault that it exists for."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import TWO_STEPS

from perlcli.errors import RunFailed
from perlcli.model import loading, roles, scorers
from perlcli.model.sources import locate
from perlcli.run.record import read_record
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import guards

LORA = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules="attention")
PRECISIONS = {
    "float32": ModelSettings(),
    "bfloat16": ModelSettings(dtype="bfloat16"),
    "4-bit": ModelSettings(load_in_4bit=True),
    "8-bit": ModelSettings(load_in_8bit=True),
}
WIDTHS = (4 * 64 + 2 * 64 + 2 * 32) * 2 * 4  # parameters of an adapter of rank 4 on the tiny Llama's two layers


def load(llama: Path, **precision: Any) -> Any:
    return roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings(**precision)), LORA, "CAUSAL_LM")


# Checksums


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 8, 4001])
def test_total_depends_on_every_byte_but_not_on_alignment(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    plain = torch.randint(0, 100, (size,)).to(dtype)
    room = torch.zeros(size + 1, dtype=dtype)
    room[1:] = plain  # no longer aligned to 8 bytes
    assert guards._total(plain) == guards._total(room[1:])
    for place in (0, size // 2, size - 1):
        changed = plain.clone()
        changed[place] += 1
        assert guards._total(changed) != guards._total(plain)


def test_checksum_takes_little_memory(llama: Path) -> None:
    model = torch.nn.Linear(2048, 4096, bias=False)  # 32 MB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        guards.checksum(model, "")
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 2e6


@pytest.mark.parametrize("part", ["absmax", "code", "offset", "state2.absmax"])
def test_checksum_sees_a_change_of_the_4_bit_state(part: str, llama: Path) -> None:
    model = load(llama, load_in_4bit=True)
    before = guards.checksum(model, "")
    weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    holder = weight.quant_state
    for name in part.split(".")[:-1]:
        holder = getattr(holder, name)
    getattr(holder, part.rsplit(".", 1)[-1]).view(-1)[0] += 1
    assert guards.checksum(model, "") != before


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # LLM.int8 warns at each layer, as bitsandbytes documents
def test_8_bit_checksum_survives_a_forward_pass_and_sees_a_changed_scale(llama: Path) -> None:
    model = load(llama, load_in_8bit=True)
    before = guards.checksum(model, "")
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert guards.checksum(model, "") == before
    layer = next(module for module in model.modules() if guards.int8_scale(module) is not None)
    guards.int8_scale(layer)[0] += 1
    assert guards.checksum(model, "") != before


def test_only_policy_and_value_model_may_change() -> None:
    before = {"": "a", roles.POLICY: "b", roles.ANCHOR: "c", "reward2": "d", roles.VALUE: "e"}
    after = {**before, roles.POLICY: "B", roles.VALUE: "E"}
    guards.compare(before, after)
    told = {
        "": "The base changed",
        roles.ANCHOR: "The anchor changed",
        "reward2": "The reward2 adapter changed",
        roles.POLICY: "The policy did not change",
        roles.VALUE: "The value model did not change",
    }
    for name, words in told.items():
        mark = before[name] if name in (roles.POLICY, roles.VALUE) else "other"
        with pytest.raises(RunFailed, match=words):
            guards.compare(before, {**after, name: mark})


# What trains


def optimizer_of(*parameters: torch.Tensor) -> Any:
    return SimpleNamespace(param_groups=[{"params": list(parameters)}])


def test_an_optimiser_with_other_parameters_is_rejected(llama: Path) -> None:
    model = load(llama)
    named = dict(model.named_parameters())
    policy = [p for name, p in named.items() if ".default." in name]
    guard = guards.TrainsExactly(model)
    guard.on_train_begin(None, None, None, optimizer=optimizer_of(*policy))
    embedding = named["base_model.model.model.embed_tokens.weight"]
    with pytest.raises(
        RunFailed, match=r"^The optimiser would train 1 parameter that should stay frozen, .*\.embed_tokens"
    ):
        guard.on_train_begin(None, None, None, optimizer=optimizer_of(*policy, embedding))
    with pytest.raises(
        RunFailed, match=r"^The optimiser leaves out 1 parameter that should train, .*lora_A.default.weight$"
    ):
        guard.on_train_begin(None, None, None, optimizer=optimizer_of(*policy[1:]))
    extra = torch.nn.Parameter(torch.zeros(1))
    guards.TrainsExactly(model, [extra]).on_train_begin(None, None, None, optimizer=optimizer_of(*policy, extra))
    with pytest.raises(RunFailed, match="such as one outside the model"):
        guard.on_train_begin(None, None, None, optimizer=optimizer_of(*policy, extra))


def test_a_model_without_trainable_parameters_is_rejected() -> None:
    guard = guards.TrainsExactly(torch.nn.Identity())
    with pytest.raises(RunFailed, match=r"^No parameter is trainable"):
        guard.on_train_begin(None, None, None, optimizer=optimizer_of())


def test_everything_trains_under_full_tuning(llama: Path) -> None:
    model = loading.load_causal(locate(str(llama)), ModelSettings())
    guards.TrainsExactly(model).on_train_begin(None, None, None, optimizer=optimizer_of(*model.parameters()))


# The anchor


@pytest.mark.parametrize(
    ("kl", "dtype"), [(0.0, torch.float32), (1e-6, torch.float32), (-5e-4, torch.bfloat16), (5e-5, torch.float16)]
)
def test_a_kl_that_rounding_explains_passes(kl: float, dtype: torch.dtype) -> None:
    guards.assert_at_anchor(kl, dtype)


@pytest.mark.parametrize(
    ("kl", "dtype"),
    [
        (1e-3, torch.float32),
        (-1e-3, torch.float32),
        (float("nan"), torch.float32),
        (0.0015, torch.bfloat16),  # an anchor in float32 and a policy in bfloat16, on a 4-bit base
    ],
)
def test_a_larger_kl_stops_the_run(kl: float, dtype: torch.dtype) -> None:
    with pytest.raises(RunFailed, match=r"^The policy differs from its anchor before the first step"):
        guards.assert_at_anchor(kl, dtype)


def test_only_the_first_logged_kl_is_checked() -> None:
    guard = guards.StartsAtAnchor(torch.float32)
    state = SimpleNamespace(global_step=1)
    guard.on_log(None, state, None, logs={"kl": 0.0})
    guard.on_log(None, state, None, logs={"loss": 1.0})
    with pytest.raises(RunFailed, match="differs from its anchor"):
        guard.on_log(None, state, None, logs={"kl": 0.1})
    guard.on_log(None, SimpleNamespace(global_step=2), None, logs={"kl": 0.1})


# What is in memory


@pytest.fixture
def copies(llama: Path) -> Iterator[Any]:
    """Loads a model and counts its copies, without those that other tests left in memory."""

    def load(settings: ModelSettings = PRECISIONS["float32"]) -> Any:
        return roles.new_adapter(loading.load_causal(locate(str(llama)), settings), LORA, "CAUSAL_LM")

    gc.collect()
    model = load()
    before = guards.base_copies(model) - 1
    del model
    yield load, lambda model: guards.base_copies(model) - before


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_base_with_its_roles_is_one_copy(precision: str, copies: Any, reward_run: Path) -> None:
    load, count = copies
    model = load(PRECISIONS[precision])
    assert count(model) == 1
    scorers.attach_reward(model, str(reward_run))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    assert count(model) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_second_base_counts_in_any_precision(precision: str, copies: Any) -> None:
    load, count = copies
    model, other = load(), load(PRECISIONS[precision])
    assert count(model) == count(other) == 2


@pytest.mark.slow
def test_weights_outside_any_module_count(copies: Any) -> None:
    load, count = copies
    model = load()
    kept = [parameter.detach().clone() for name, parameter in model.named_parameters() if "base_layer" in name]
    assert 1 < count(model) < 2
    assert len(kept) == 8


@pytest.mark.slow
def test_gradients_and_optimiser_states_of_full_tuning_do_not_count(copies: Any, llama: Path) -> None:
    _, count = copies
    model = loading.load_causal(locate(str(llama)), ModelSettings()).requires_grad_(True)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    assert count(model) == 1
    assert optimizer.state


def test_adapters_shaped_like_a_base_matrix_are_not_a_copy(llama: Path, copies: Any) -> None:
    lora = LoraSettings(lora_r=32, lora_alpha=8, lora_dropout=0.0, lora_target_modules="attention")  # k_proj: (32, 64)
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), lora, "CAUSAL_LM")
    assert copies[1](model) == 1


def test_roles_are_reported_in_megabytes(copies: Any, reward_run: Path) -> None:
    model = copies[0]()
    head = scorers.attach_reward(model, str(reward_run))
    size = scorers.SharedScorer(model, head, 0).bytes
    assert size == 4 * (WIDTHS + 64)
    parts = guards.sizes_of_roles(model, None, {"reward": size, "function": 0}, value=0)
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name) * 4
    wanted = {"base": own, "policy": 4 * WIDTHS, "anchor": 0, "reward reward": size}
    assert parts == {name: round(size / 1e6, 3) for name, size in wanted.items()}


@pytest.mark.slow
def test_four_rewards_cost_three_adapters_more_than_one(copies: Any, reward_run: Path) -> None:
    model = copies[0]()
    before = roles.bytes_of(model.parameters())
    for index in range(4):
        scorers.attach_reward(model, str(reward_run), f"reward{index}")
    assert roles.bytes_of(model.parameters()) == before + 4 * 4 * WIDTHS
    assert copies[1](model) == 1


def test_roles_of_full_tuning_are_models(copies: Any, llama: Path) -> None:
    models = [loading.load_causal(locate(str(llama)), ModelSettings()) for _ in range(2)]
    whole = round(roles.bytes_of(models[0].parameters()) / 1e6, 3)
    assert guards.sizes_of_roles(models[0], models[1], {}, value=0) == {"policy": whole, "anchor": whole}


def test_quantised_state_counts_as_bytes(copies: Any) -> None:
    model = copies[0](PRECISIONS["4-bit"])
    weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    assert roles.bytes_of([weight]) > weight.numel() * weight.element_size()


def test_the_line_shows_small_and_large_sizes() -> None:
    parts = {"base": 271.4, "policy": 3.7, "anchor": 0.0, "reward": 0.05}
    assert (
        guards.memory_line(1.0, parts) == "base copies resident: 1 (271 MB); policy 3.70 MB, anchor 0 B, reward 50.0 kB"
    )
    assert guards.memory_line(2.5, {"policy": 0.5}) == "base copies resident: 2.5; policy 500 kB"


# Steps that float16 skips


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the gradient scaler skip the first steps, as it does in float16 while a gradient overflows."""
    original, done = AcceleratedOptimizer.step, iter(range(1_000))

    def first(count: int) -> None:
        def step(optimizer: Any, closure: Any = None) -> None:
            optimizer._is_overflow = next(done) < count
            if not optimizer.step_was_skipped:
                original(optimizer, closure)

        monkeypatch.setattr(AcceleratedOptimizer, "step", step)

    return first


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_skipped_steps_are_counted_and_a_run_of_nothing_else_fails(
    stage: str, skip: Any, perl: Any, llama: Path, rows: dict[str, Path]
) -> None:
    data = rows["demonstrations" if stage == "sft" else "pairs"]
    words = (stage, "--model", llama, "--data", data, "--max-length", "128", *TWO_STEPS)
    skip(1)
    assert "skipped 1 of 2 steps, in which a gradient overflowed" in perl(*words, "--output", "some").stdout
    assert read_record(Path("some")).guards["skipped_steps"] == 1
    skip(1_000)
    error = perl(*words, "--output", "all", code=1).stderr
    assert (
        "Error: float16's gradient scaler skipped all 2 steps: nothing was learned\nHint: it halves its scale" in error
    )
    record = read_record(Path("all"))
    assert (record.status, record.guards["skipped_steps"]) == ("failed", 2)
