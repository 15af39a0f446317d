"""Each guard detects the fault that it exists for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perlcli.errors import RunFailed
from perlcli.model import loading, roles
from perlcli.model.sources import locate
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import guards

LORA = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules="attention")


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
