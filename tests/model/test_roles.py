"""Roles on one base: switched without a trace, attached, counted and checked."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD, PRECISIONS, ROWS
from imitations import CHOSEN
from models import LORA, load_policy, saved_reward, scramble
from peft import PeftModel
from safetensors.torch import load_file, save_file

from perlcli.errors import PerlError, RunFailed
from perlcli.model import loading, roles, scorers
from perlcli.model.sources import locate
from perlcli.settings import ModelSettings
from perlcli.training import guards

# What LLM.int8 says at each layer, documented by bitsandbytes; the command line silences it (upstream.py)
quiet_8bit = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture
def reward(llama: Path, tmp_path: Path) -> str:
    return saved_reward(tmp_path / "reward", llama, ModelSettings())


@pytest.fixture
def policy(llama: Path) -> Any:
    """A policy whose adapter has random weights."""
    model = load_policy(llama)
    scramble(model, 2)
    return model


def state(model: Any) -> tuple[Any, ...]:
    """All that a switch could leave behind."""
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    disabled = {name: module.disable_adapters for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return model.active_adapter, grads, modes, disabled


# Switching


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("adapter", [roles.REWARD, None])
def test_switch_puts_back_exactly_what_was_there(adapter: str | None, learns: bool, policy: Any, reward: str) -> None:
    scorers.attach_reward(policy, reward)
    policy.train()
    policy.base_model.model.model.layers[1].eval()  # a mode of its own
    for name, parameter in policy.named_parameters():  # grads of their own: part of both adapters
        parameter.requires_grad_("layers.0" in name and "lora_A" in name)
    before = state(policy)
    with torch.set_grad_enabled(learns):
        with roles.switched(policy, adapter):
            assert not any(module.training for module in policy.modules())
            assert state(policy) != before
        assert state(policy) == before
        with pytest.raises(RuntimeError, match="inside"), roles.switched(policy, adapter):
            raise RuntimeError("inside")
        assert state(policy) == before


def test_switch_touches_no_gradient_where_none_is_wanted(policy: Any, reward: str) -> None:
    """It takes a while on a large model; and only what a switch to train needs is worth it."""
    scorers.attach_reward(policy, reward)
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    with torch.no_grad(), roles.switched(policy, roles.REWARD):
        assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == flags
    with roles.switched(policy, roles.REWARD, train=True):
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert trained == {name for name in flags if roles.is_of(roles.REWARD, name)}
        assert all(module.training for module in policy.modules())


def test_switch_to_an_adapter_that_is_not_there_is_an_error(policy: Any) -> None:
    before = state(policy)
    with pytest.raises(ValueError, match="no adapter reward among default"), roles.switched(policy, roles.REWARD):
        pass
    assert state(policy) == before


def test_switch_changes_what_the_model_says_and_back(llama: Path, policy: Any, reward: str) -> None:
    def says() -> torch.Tensor:
        with torch.no_grad():
            return policy(input_ids=torch.tensor([ROWS[0]])).logits

    scorers.attach_reward(policy, reward)
    policy.eval()
    mine = says()
    with roles.switched(policy, roles.REWARD):
        judge = says()
    with roles.switched(policy, None):
        bare = says()
    assert torch.equal(says(), mine)
    assert not torch.equal(mine, judge)
    base_alone = loading.load_causal(locate(str(llama)), ModelSettings())
    assert torch.equal(bare, base_alone.eval()(input_ids=torch.tensor([ROWS[0]])).logits)
    assert not torch.equal(mine, bare)


def test_reward_is_the_same_from_inside_another_switch(policy: Any, reward: str) -> None:
    """An anchor's completions are scored while the anchor is switched in; peft keeps adapters off under the base."""
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    wanted = shared(ROWS)
    for adapter in (None, roles.POLICY, roles.REWARD):
        with roles.switched(policy, adapter):
            inside = state(policy)
            assert shared(ROWS) == wanted
            assert state(policy) == inside
    with roles.switched(policy, roles.REWARD), roles.switched(policy, None):
        assert shared(ROWS) == wanted
    assert shared(ROWS) == wanted


# Converting


def held_and_gradients(model: Any) -> tuple[int, float, list[torch.Tensor]]:
    """The bytes that a forward pass under autocast keeps for the backward pass, the loss, and the gradients."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 390, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return sum(held.values()), float(loss.detach()), gradients


@quiet_8bit
@pytest.mark.parametrize("precision", ["bfloat16", "4-bit", "8-bit"])
def test_without_conversions_less_is_held_and_no_gradient_changes(precision: str, llama: Path) -> None:
    model = load_policy(llama, PRECISIONS[precision])
    roles.set_adapter_dropout(model, 0)
    scramble(model, 2)
    wanted_bytes, wanted_loss, wanted = held_and_gradients(model.train())
    with roles.casting(model, on=False):
        held, loss, gradients = held_and_gradients(model)
    # under CUDA's autocast, peft's quantised layers don't convert by themselves: there is nothing left to spare
    is_spared = precision != "bfloat16" and "cuda_autocast" in os.environ.get(CHOSEN, "")
    assert held == wanted_bytes if is_spared else held < 0.95 * wanted_bytes
    assert loss == wanted_loss
    assert all(map(torch.equal, gradients, wanted))


# Attaching and reading


@pytest.fixture
def ready(policy: Any, reward: str) -> Iterator[tuple[Any, str]]:
    """A policy and a reward, made before the random stream is watched."""
    return policy, reward


def test_attached_reward_does_not_shift_the_stream_that_samples(ready: tuple[Any, str], still_random: None) -> None:
    scorers.attach_reward(*ready)


@pytest.mark.parametrize("training", [True, False])
def test_attached_reward_leaves_the_policy_as_it_was(training: bool, policy: Any, reward: str) -> None:
    policy.train(training)
    before = policy.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    scorers.attach_reward(policy, reward)
    assert policy.training is training
    assert policy.active_adapter == roles.POLICY
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in before.items())


def test_head_is_read_as_saved(llama: Path, reward: str) -> None:
    alone = PeftModel.from_pretrained(loading.load_classifier(locate(str(llama)), ModelSettings(), PAD), reward)
    assert torch.equal(scorers.read_head(reward), alone.base_model.model.score.modules_to_save[roles.POLICY].weight)


def test_adapter_without_a_head_is_an_error(policy: Any, tmp_path: Path) -> None:
    roles.save_adapter(policy, tmp_path)
    with pytest.raises(PerlError, match=r"has no reward head\nHint: train it with `perl reward`"):
        scorers.read_head(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_adapter_that_cannot_be_read_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(PerlError, match=f"The reward adapter {tmp_path} can't be read"):
        scorers.read_head(str(tmp_path))


def test_adapter_of_another_base_is_an_error(policy: Any, gpt2: Path, tmp_path: Path) -> None:
    roles.save_adapter(policy, tmp_path)
    with pytest.raises(PerlError, match=f"The adapter {tmp_path} does not fit its base"):
        roles.load_adapter(loading.load_causal(locate(str(gpt2)), ModelSettings()), str(tmp_path), trainable=True)


def test_only_the_one_adapter_is_saved(policy: Any, reward: str, tmp_path: Path) -> None:
    scorers.attach_reward(policy, reward)
    roles.save_adapter(policy, tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


# Precision, counts and guards


def test_an_adapters_parameters_are_known_from_modules_that_bear_its_name() -> None:
    names = {
        "model.layers.0.q_proj.lora_A.value.weight": True,
        "model.embed.lora_embedding_A.value": True,
        "score.modules_to_save.value.weight": True,
        "model.q_proj.lora_magnitude_vector.value.weight": True,
        "attention.self.value.base_layer.weight": False,
        "attention.self.value.lora_A.default.weight": False,
        "model.layers.0.q_proj.lora_A.value2.weight": False,
    }
    assert {name: roles.is_of("value", name) for name in names} == names


@pytest.mark.parametrize("precision", ["bfloat16", "4-bit"])
def test_adapters_are_float32_on_any_base_and_not_rounded(precision: str, llama: Path, tmp_path: Path) -> None:
    model = load_policy(llama, PRECISIONS[precision])
    scorers.attach_reward(model, saved_reward(tmp_path / "reward", llama, PRECISIONS[precision]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with roles.unrounded(model):
        for parameter in model.parameters():
            if parameter.requires_grad:  # as TRL does on a quantised base
                parameter.data = parameter.data.bfloat16()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    roles.keep_only_policy_trainable(model)
    lora = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert {parameter.dtype for parameter in lora.values()} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in lora if ".default." in n}


def test_head_trains_in_float32_and_is_rounded_for_its_base(llama: Path) -> None:
    classifier = loading.load_classifier(locate(str(llama)), PRECISIONS["bfloat16"], PAD)
    model: Any = roles.new_adapter(classifier, LORA, "SEQ_CLS")
    head = next(p for name, p in model.named_parameters() if "modules_to_save.default" in name)
    assert head.dtype == torch.float32
    assert head.requires_grad
    head.data.fill_(1 / 3)
    roles.round_head(model, torch.bfloat16)
    assert head.dtype == torch.bfloat16
    assert float(head.data[0, 0]) == float(torch.tensor(1 / 3).bfloat16())


def test_weights_are_rounded_and_rotary_frequencies_are_not(llama: Path) -> None:
    model = loading.load_causal(locate(str(llama)), ModelSettings())
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    roles.round_weights(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert kept and all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


def test_checksum_notices_the_role_that_changed(policy: Any, reward: str) -> None:
    scorers.attach_reward(policy, reward)
    names = ("", roles.POLICY, roles.REWARD)
    marks = {name: guards.checksum(policy, name) for name in names}
    assert len(set(marks.values())) == 3
    parameters = {
        "": "embed_tokens.weight",
        roles.POLICY: "lora_A.default.weight",
        roles.REWARD: "lora_B.reward.weight",
    }
    for role, tail in parameters.items():
        changed = next(p for name, p in policy.named_parameters() if name.endswith(tail))
        before = changed.data.clone()
        changed.data.view(-1)[5] += 1e-3  # one value
        assert {name for name in names if guards.checksum(policy, name) != marks[name]} == {role}
        changed.data.copy_(before)
    assert {name: guards.checksum(policy, name) for name in names} == marks


def test_guards_report_what_stood_still_and_what_moved() -> None:
    before = {roles.POLICY: "a", "": "a"}
    guards.compare(before, {roles.POLICY: "b", "": "a"})
    with pytest.raises(RunFailed, match="The policy did not change: nothing was learned"):
        guards.compare(before, {roles.POLICY: "a", "": "a"})
    with pytest.raises(RunFailed, match="The base changed during training although it is frozen"):
        guards.compare(before, {roles.POLICY: "b", "": "b"})


@quiet_8bit
def test_parameters_are_counted_alike_in_every_precision(llama: Path) -> None:
    counts = {name: roles.count_parameters(load_policy(llama, settings)) for name, settings in PRECISIONS.items()}
    plain = loading.load_causal(locate(str(llama)), ModelSettings())
    lora = 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)  # layers x rank x widths in and out of q, k, v, o
    assert roles.count_parameters(plain) == (0, plain.num_parameters())
    assert set(counts.values()) == {(lora, plain.num_parameters() + lora)}


def test_adapter_bytes_are_of_that_adapter(policy: Any, reward: str) -> None:
    own = roles.adapter_bytes(policy, roles.POLICY)
    assert own == 4 * roles.count_parameters(policy)[0]
    assert roles.adapter_bytes(policy, roles.REWARD) == 0
    scorers.attach_reward(policy, reward)
    assert roles.adapter_bytes(policy, roles.REWARD) == own


def test_an_adapter_whose_config_has_another_rank_is_refused(llama: Path, sft_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sft_run, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": config["r"] + 1}))
    problem = (
        r"does not fit its base: base_model\S+ has the shape \[4, 64\], but its config and its base need \[5, 64\]"
    )
    with pytest.raises(PerlError, match=problem + r" \(\d+ in total\)$"):
        roles.load_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), str(folder), trainable=False)


def test_an_adapter_of_other_modules_is_refused(llama: Path, sft_run: Path, reward_run: Path, tmp_path: Path) -> None:
    """peft would warn, and go on with fresh weights: the policy would be the base."""
    for run in (sft_run, reward_run):
        shutil.copytree(run, tmp_path / run.name)
        weights = load_file(run / "adapter_model.safetensors")
        renamed = {name.replace(".layers.1.", ".layers.7."): tensor for name, tensor in weights.items()}
        save_file(renamed, tmp_path / run.name / "adapter_model.safetensors")
    model = loading.load_causal(locate(str(llama)), ModelSettings())
    with pytest.raises(PerlError, match=r"does not fit its base: it lacks base_model\S+ \(\d+ in total\)$"):
        roles.load_adapter(model, str(tmp_path / sft_run.name), trainable=False)
    policy = roles.load_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), str(sft_run), trainable=True)
    with pytest.raises(PerlError, match="does not fit its base: it lacks"):
        scorers.attach_reward(policy, str(tmp_path / reward_run.name))
