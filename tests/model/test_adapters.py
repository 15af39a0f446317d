"""Adapters by option and by file: what shares a base does so exactly, what can't is refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PAD, PRECISIONS, ROWS
from imitations import cuda_autocast, int8_activations
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import adapters, loading, roles, scorers, sources
from perlcli.model.sources import locate
from perlcli.run.record import read_record
from perlcli.settings import Eval, LoraSettings, ModelSettings
from perlcli.training import guards, rewards

Perl = Callable[..., Any]
FILES: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 2, "use_rslora": True, "init_lora_weights": "gaussian"},
    "DoRA": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "LoHa": {"peft_type": "LOHA", "r": 2},
    "LoKr": {"peft_type": "LOKR", "r": 2},
    "IA3": {"peft_type": "IA3"},
    "VeRA": {"peft_type": "VERA", "r": 8},
    "OFT": {"peft_type": "OFT", "oft_block_size": 8},
    "MiSS": {"peft_type": "MISS", "r": 2},
    "HiRA": {"peft_type": "HIRA", "r": 2},
    "DeLoRA": {"peft_type": "DELORA", "r": 2},
    "RandLoRA": {"peft_type": "RANDLORA", "r": 8},
}
LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_target_modules="attention", use_dora=True)
KINDS = {adapters.DORA.name: adapters.DORA, **{kind.name: kind for kind in adapters.KINDS.values()}}
ABLE = [
    (name, precision)
    for name, kind in KINDS.items()
    for precision in PRECISIONS
    if precision not in ("4-bit", "8-bit") or int(precision[0]) in kind.bits
]
SHORT = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--max-length", "128", "--learning-rate", "1e-2")
RL = (*SHORT, "--gradient-accumulation-steps", "1", "--max-completion-length", "6")
# What LLM.int8 says at each layer, documented by bitsandbytes; the command line silences it (upstream.py)
quiet_8bit = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def written(content: Any, name: str = "adapter.json") -> str:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def fresh(kind: str, model: Any, task: str = "CAUSAL_LM") -> Any:
    """A new adapter of a kind."""
    torch.manual_seed(3)
    return roles.new_adapter(model, LoraSettings(peft=written(FILES[kind])), task)


def scramble(model: nn.Module) -> None:
    """Move what trains of an adapter, as if it had learned."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)


def saved_reward(kind: str, llama: Path, settings: ModelSettings) -> str:
    model: Any = fresh(kind, loading.load_classifier(locate(str(llama)), settings, PAD), "SEQ_CLS")
    scramble(model)
    roles.round_head(model, model.dtype)
    roles.save_adapter(model, Path("reward"))
    return "reward"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([ROWS[2]])).logits


def learn(model: Any) -> None:
    """Take a step of the policy's adapter."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):  # some kinds begin with a product of zeros, of which one factor has a gradient first
        model(input_ids=torch.tensor([ROWS[2]]), labels=torch.tensor([ROWS[2]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# What shares a base


def test_every_kind_that_is_taken_has_its_test() -> None:
    assert set(FILES) == set(KINDS)
    assert len(ABLE) == 2 * len(KINDS) + sum((4 in kind.bits) + (8 in kind.bits) for kind in KINDS.values())


@quiet_8bit
@pytest.mark.parametrize(("kind", "precision"), ABLE)
def test_roles_of_a_kind_share_a_base(kind: str, precision: str, llama: Path) -> None:
    """The policy begins at its base, the reward scores as it does alone, and the policy alone learns."""
    settings = PRECISIONS[precision]
    reward = saved_reward(kind, llama, settings)
    alone = PeftModel.from_pretrained(loading.load_classifier(locate(str(llama)), settings, PAD), reward)
    wanted = scorers.ClassifierScorer(alone, PAD)(ROWS)
    policy = fresh(kind, loading.load_causal(locate(str(llama)), settings)).eval()
    head = scorers.attach_reward(policy, reward)
    with policy.disable_adapter():
        bare = logits(policy)
    assert torch.equal(logits(policy), bare)
    with torch.autocast("cpu", torch.bfloat16), roles.casting(policy, on=False):  # as under a trainer in bf16
        mine = logits(policy)
        with roles.switched(policy, None):
            assert torch.equal(mine, logits(policy))
    before = guards.checksums(policy)
    learn(policy)
    shared = scorers.SharedScorer(policy, head, PAD)
    assert shared(ROWS) == wanted
    assert len(set(wanted)) == len(ROWS)
    after = guards.checksums(policy)
    assert {name for name in before if before[name] != after[name]} == {roles.POLICY}
    own = [p for name, p in policy.named_parameters() if not roles.is_base(name) and "modules_to_save" not in name]
    assert {p.dtype for p in own} == {torch.float32}
    mine = logits(policy)
    assert not torch.equal(mine, bare)
    roles.save_adapter(policy, Path("policy"))
    again = roles.load_adapter(loading.load_causal(locate(str(llama)), settings), "policy", trainable=True).eval()
    assert torch.equal(logits(again), mine)


@quiet_8bit
@pytest.mark.parametrize(("kind", "precision"), ABLE)
def test_a_kind_starts_at_its_anchor_and_learns_on_cuda_as_on_a_cpu(
    kind: str, precision: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's branches of peft and bitsandbytes change neither the start nor, but for rounding, the gradients."""
    settings = PRECISIONS[precision]
    model = fresh(kind, loading.load_causal(locate(str(llama)), settings))
    roles.save_adapter(model, Path("start"))
    scramble(model)
    wanted = gradients(model)
    cuda_autocast(monkeypatch)
    int8_activations(monkeypatch)
    assert torch.cosine_similarity(gradients(model), wanted, dim=0) > (0.98 if precision == "8-bit" else 0.999)
    policy = roles.load_adapter(loading.load_causal(locate(str(llama)), settings), "start", trainable=True)
    roles.add_adapter(policy, "start", roles.ANCHOR)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), roles.casting(policy, on=False):
        mine = logits(policy.eval())
        for anchor in (roles.ANCHOR, None):
            with roles.switched(policy, anchor):
                assert torch.equal(mine, logits(policy))


def gradients(model: Any) -> torch.Tensor:
    """The gradients of all that trains, under autocast and without conversions, in one vector."""
    with torch.autocast("cpu", torch.bfloat16), roles.casting(model, on=False):
        loss = model(input_ids=torch.tensor([ROWS[2]]), labels=torch.tensor([ROWS[2]])).loss
        loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_dora_on_a_4_bit_base_trains_under_cudas_autocast(
    algorithm: str, like_cuda_autocast: None, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    """Policy, anchor, reward and value model: new, loaded, and copied by TRL."""
    made = ("--use-dora", "--lora-r", "2", "--load-in-4bit", *SHORT)
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "reward", *made)
    assert read_record(Path("reward")).metrics["reload_shift"] == 0
    how = ("-d", rows["prompts"], "--reward", "reward", "--load-in-4bit", "--algorithm", algorithm, *RL)
    perl("rl", "-m", llama, "-o", "first", "--use-dora", "--lora-r", "2", *how)
    perl("rl", "-m", "first", "-o", "second", *how)
    for name in ("first", "second"):
        record = read_record(Path(name))
        assert record.guards["kl_at_start"] == record.guards["shift of reward"] == 0


def test_a_fresh_dora_needs_its_magnitudes_in_float32(llama: Path) -> None:
    """For as long as this holds, `begin_at_base` is needed."""
    inner: Any = loading.load_causal(locate(str(llama)), PRECISIONS["bfloat16"]).eval()
    bare = logits(inner)
    config = LoraConfig(use_dora=True, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    assert not torch.equal(logits(PeftModel(inner, config).eval()), bare)


def test_lora_and_dora_stand_on_one_base(llama: Path) -> None:
    reward = saved_reward("DoRA", llama, ModelSettings())
    alone = PeftModel.from_pretrained(loading.load_classifier(locate(str(llama)), ModelSettings(), PAD), reward)
    policy = fresh("LoRA", loading.load_causal(locate(str(llama)), ModelSettings()))
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    assert shared(ROWS) == scorers.ClassifierScorer(alone, PAD)(ROWS)
    assert shared.bytes > roles.adapter_bytes(policy, roles.POLICY)


@pytest.mark.parametrize("kind", ["DoRA", "VeRA", "OFT"])
def test_bytes_and_copies_are_counted_whatever_the_adapter_is(kind: str, llama: Path) -> None:
    policy = fresh(kind, loading.load_causal(locate(str(llama)), ModelSettings()))
    trained, total = roles.count_parameters(policy)
    assert roles.adapter_bytes(policy, roles.POLICY) == 4 * trained
    assert guards.sizes_of_roles(policy, None, {}, 0)["base"] == round(4 * (total - trained) / 1e6, 3)
    assert guards.base_copies(policy) == 1


def test_attention_is_adapted_where_the_file_names_no_modules(llama: Path, gpt2: Path) -> None:
    for place, names in ((llama, {"q_proj", "k_proj", "v_proj", "o_proj"}), (gpt2, {"c_attn", "attn.c_proj"})):
        model = sources.skeleton(locate(str(place)))
        assert model is not None
        for lora in (LoraSettings(peft=written(FILES["IA3"])), LoraSettings(peft=written(FILES["DoRA"]))):
            config = adapters.on_model(lora, model, "CAUSAL_LM")
            assert set(config.target_modules) == names
            assert config.fan_in_fan_out is (place == gpt2)


# What is refused

REFUSED = {
    "unknown type": ({"peft_type": "LORRA"}, "peft_type 'LORRA', which peft does not know\nHint: Did you mean LORA?"),
    "no type": ({"r": 8}, "has no peft_type\nHint: one of LORA, LOHA"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, f"PROMPT_TUNING can't be trained here: {adapters.ON_THE_TEXT}"),
    "prefixes": ({"peft_type": "PREFIX_TUNING"}, f"PREFIX_TUNING can't be trained here: {adapters.ON_THE_TEXT}"),
    "one at a time": ({"peft_type": "ADALORA"}, "ADALORA can't be trained here: peft allows only one trainable"),
    "norms": ({"peft_type": "LN_TUNING"}, "it replaces norms of the base instead of adding"),
    "begins elsewhere": ({"peft_type": "FOURIERFT"}, f"FOURIERFT can't be trained here: {adapters.NOT_AT_THE_BASE}"),
    "unproven": ({"peft_type": "XLORA"}, f"XLORA can't be trained here: {adapters.UNPROVEN}"),
    "unknown field": ({"peft_type": "LOHA", "alhpa": 8}, "LoHaConfig has no field alhpa. Did you mean alpha?"),
    "wrong value": ({"peft_type": "LOHA", "r": "8"}, "r must be a whole number, not '8'"),
    "wrong list": ({"peft_type": "LORA", "target_modules": 3}, "target_modules must be"),
    "biases": ({"peft_type": "LORA", "bias": "all"}, "bias='all': it trains the biases of the base, which other"),
    "modules": ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: it trains mod"),
    "tokens": ({"peft_type": "LORA", "trainable_token_indices": [3]}, "trainable_token_indices=[3]: it trains emb"),
    "parameters": (
        {"peft_type": "LORA", "target_parameters": ["a"]},
        "target_parameters=['a'] were set but no parameter was matched",
    ),
    "layers": ({"peft_type": "LORA", "layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]]: it changes the lay"),
    "activation": ({"peft_type": "LORA", "alora_invocation_tokens": [3]}, "it only acts after certain tokens"),
    "qalora": ({"peft_type": "LORA", "use_qalora": True}, f"use_qalora=True: {adapters.UNPROVEN}"),
    "pissa": ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, f"=pissa_niter_4: {adapters.MOVED}"),
    "olora": ({"peft_type": "LORA", "init_lora_weights": "olora"}, f"init_lora_weights=olora: {adapters.MOVED}"),
    "corda": ({"peft_type": "LORA", "init_lora_weights": "corda"}, f"init_lora_weights=corda: {adapters.MOVED}"),
    "loftq": ({"peft_type": "LORA", "init_lora_weights": "loftq"}, f"init_lora_weights=loftq: {adapters.MOVED}"),
    "random": ({"peft_type": "LOHA", "init_weights": False}, f"init_weights=false: {adapters.NOT_AT_THE_BASE}"),
    "odd start": ({"peft_type": "LORA", "init_lora_weights": 3}, "init_lora_weights must be true or gaussian, not 3"),
    "dropout": ({"peft_type": "LORA", "lora_dropout": 1.5}, "lora_dropout must be at least 0 and below 1, not 1.5"),
    "its dropout": ({"peft_type": "LOHA", "rank_dropout": 0.1}, "rank_dropout=0.1: TRL turns dropout off"),
    "task": ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "task_type SEQ_CLS, but this stage trains CAUSAL_LM"),
    "no such module": ({"peft_type": "LOHA", "target_modules": ["qq"]}, "target_modules: the model has no module 'qq'"),
    "no match": ({"peft_type": "LOHA", "target_modules": ".*qq"}, "peft can't put it on this model: Target modules"),
    "rank": ({"peft_type": "LORA", "r": 0}, "r must be above 0, not 0"),
    "huge rank": ({"peft_type": "LORA", "r": 10**6}, "parameters, more than 4 times the model's"),
    "alpha": ({"peft_type": "LORA", "lora_alpha": 0}, "lora_alpha must be above 0, not 0"),
    "its alpha": ({"peft_type": "LOHA", "alpha": -1}, "alpha must be above 0, not -1"),
    "a rank": (
        {"peft_type": "LORA", "rank_pattern": {"q_proj": "x"}},
        "rank_pattern: q_proj must be a whole number above 0, not 'x'",
    ),
    "an alpha": (
        {"peft_type": "LORA", "alpha_pattern": {"q_proj": 0}},
        "alpha_pattern: q_proj must be a number above 0, not 0",
    ),
    "no modules": ({"peft_type": "LORA", "target_modules": []}, "target_modules must not be empty"),
    "blocks": ({"peft_type": "OFT", "oft_block_size": 0}, "peft rejects it: Either `r` or `oft_block_size` must be"),
    "a list": ([1], "is not a JSON object"),
    "no JSON": ("{", "can't be read as JSON: Expecting property name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_share_a_base_is_refused(name: str, perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    held, said = REFUSED[name]
    file = written(held)
    result = perl("sft", "-m", llama, "-d", rows["demonstrations"], "--peft", file, "-o", "run", code=2)
    assert result.stderr.startswith(f"Error: --peft {file}")
    assert said in result.stderr
    assert not Path("run").exists()


def test_all_faults_of_a_file_are_reported_at_once() -> None:
    file = written({"peft_type": "LORA", "bias": "all", "rr": 1, "lora_alpha": "8"})
    with pytest.raises(PerlError) as caught:
        adapters.read(file, "CAUSAL_LM")
    assert len(caught.value.problem.splitlines()) == 3
    assert all(line.startswith(f"--peft {file}: ") for line in caught.value.problem.splitlines())


@pytest.mark.parametrize(("place", "said"), [("none.json", "does not exist"), (".", "is a folder")])
def test_a_file_that_is_not_there_is_an_error(place: str, said: str) -> None:
    with pytest.raises(PerlError, match=said):
        adapters.read(place, "CAUSAL_LM")


def test_what_peft_saved_can_be_read_again(llama: Path) -> None:
    """A reward's config too: its head needs no word."""
    saved_reward("LoHa", llama, ModelSettings())
    config = adapters.read("reward/adapter_config.json", "SEQ_CLS")
    assert (config.r, config.modules_to_save, config.base_model_name_or_path) == (2, None, None)
    assert config.inference_mode is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora-r", "4"), "describes the adapter completely, so --lora-r can't be given too"),
        (("--use-dora",), "describes the adapter completely, so --use-dora can't be given too"),
        (("--full",), "--full uses no adapter, so the --lora options, --use-dora and --peft can't be given"),
    ],
)
def test_a_file_says_all_of_an_adapter(words: tuple[str, ...], said: str, perl: Perl) -> None:
    assert said in perl("sft", "--peft", written(FILES["LoHa"]), *words, "-o", "run", code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--use-dora",), "is already an adapter: --use-dora True, but the adapter is LoRA r=4, alpha=8"),
        (("--peft", "adapter.json"), "--peft adapter.json describes a new adapter, but"),
    ],
)
def test_an_adapter_is_what_it_is(words: tuple[str, ...], said: str, perl: Perl, sft_run: Path) -> None:
    written(FILES["LoHa"])
    assert said in perl("sft", "-m", sft_run, "-d", "coffee", *words, "-o", "run", code=2).stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alora_invocation_tokens": [3]}, "can't share its base: alora_invocation_tokens=[3]: it only acts after"),
        ({"peft_type": "PROMPT_TUNING"}, "is PROMPT_TUNING, which can't be trained here: it changes the model's input"),
        ({"peft_type": "LOHA", "module_dropout": 0.1}, "can't share its base: module_dropout=0.1: TRL turns dropout"),
    ],
)
def test_rl_cannot_start_from_an_adapter_that_cannot_share_its_base(
    more: dict[str, Any], said: str, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    Path("mine").mkdir()
    written(
        {**FILES["LoRA"], "task_type": "CAUSAL_LM", "base_model_name_or_path": str(llama), **more},
        "mine/adapter_config.json",
    )
    if more.get("peft_type"):
        written({"task_type": "CAUSAL_LM", "base_model_name_or_path": str(llama), **more}, "mine/adapter_config.json")
    assert said in perl("rl", "-m", "mine", "--reward", "m:f", "-d", rows["prompts"], code=2).stderr


def test_a_reward_that_changes_its_base_cannot_share_the_policys(llama: Path, reward_run: Path) -> None:
    shutil.copytree(reward_run, "moving", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads(Path("moving/adapter_config.json").read_text())
    written({**config, "init_lora_weights": "pissa"}, "moving/adapter_config.json")
    prepared: Any = SimpleNamespace(source=locate(str(llama)), settings=Eval(), adapter=None)
    assert rewards._apart(locate("moving"), prepared) == (
        f"on a copy of {llama} (init_lora_weights=pissa: {adapters.MOVED})"
    )
    assert rewards._apart(locate(str(reward_run)), prepared) is None


@pytest.mark.parametrize(("kind", "flag"), [("IA3", "4"), ("LoHa", "4"), ("DoRA", "8"), ("DeLoRA", "8")])
def test_a_base_that_an_adapter_does_not_work_on_is_an_error_before_it_is_loaded(
    kind: str, flag: str, perl: Perl
) -> None:
    stderr = perl("reward", "--peft", written(FILES[kind]), f"--load-in-{flag}bit", "-o", "run", code=2).stderr
    assert f"Error: The adapter is {kind}, which does not work on a base in {flag} bits" in stderr
    assert "Hint: use a base in 16 bits, or another adapter: LoRA, " in stderr


# The stages


@pytest.mark.slow
def test_dry_run_counts_what_trains(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    common = ("-m", llama, "-d", rows["demonstrations"], "-o", "run")
    for words, line in (
        (("--use-dora", "--lora-r", "4"), "adapter: DoRA r=4, alpha=8 on k_proj, o_proj, q_proj, v_proj; 3,968 param"),
        (("--peft", written(FILES["LoHa"])), "adapter: LoHa r=2, alpha=8 on k_proj, o_proj, q_proj, v_proj; 3,584 par"),
    ):
        assert line in perl("sft", *common, *words, "--overwrite", "--dry-run").output
        perl("sft", *common, *words, "--overwrite", *SHORT)
        count = f"{read_record(Path('run')).trainable_parameters:,} parameters train"
        assert count in perl("sft", *common, *words, "--overwrite", "--dry-run").output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "algorithm", "how"),
    [("DoRA", "reinforce", ("--load-in-4bit",)), ("VeRA", "rloo", ("--load-in-4bit",)), ("LoHa", "reinforce", ())],
)
def test_another_kind_goes_through_every_stage(
    kind: str, algorithm: str, how: tuple[str, ...], perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    """What was trained is saved in float32, and a policy begins at the adapter that it starts from."""
    file = written(FILES[kind])
    made = ("--peft", file, *SHORT, *how)
    perl("reward", "-m", llama, "-d", rows["thumbs"], "-o", "reward", *made)
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "sft", *made)
    assert read_record(Path("reward")).metrics["reload_shift"] == 0
    record = read_record(Path("sft"))
    assert record.model["peft"] == FILES[kind]
    assert record.settings["lora_r"] is None
    assert "lora" not in Path("sft/settings.yaml").read_text()
    common = ("--reward", "reward", "-d", rows["prompts"])
    perl("rl", "-m", "sft", "-o", "rl", "--algorithm", algorithm, *common, *RL, *how)
    record = read_record(Path("rl"))
    assert record.guards["kl_at_start"] == record.guards["shift of reward"] == 0
    assert record.guards["trained"] == ["policy", "value model"][: 2 if algorithm == "reinforce" else 1]
    assert record.guards["unchanged"] == ["anchor", "base", "reward"]
    assert record.memory["base_copies"] == 1
    start, end = (load_file(f"{name}/adapter_model.safetensors") for name in ("sft", "rl"))
    assert {tensor.dtype for tensor in end.values()} == {torch.float32}
    assert any(not torch.equal(start[name], end[name]) for name in start)
    if not how:
        perl("eval", "-m", "rl", *common, "--max-samples", "4")
        perl("merge", "rl", "-o", "merged")
        again = ("sft", "-m", "sft", "-d", rows["demonstrations"])
        assert "--lora-r 4, but the adapter is LoHa r=2, alpha=8" in perl(*again, "--lora-r", "4", code=2).stderr
        assert "adapter: LoHa r=2, alpha=8" in perl(*again, "--dry-run").output


@pytest.mark.slow
def test_dora_begins_at_the_base_and_its_magnitudes_train(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    dora = ("--use-dora", "--lora-r", "2")
    perl("reward", "-m", llama, "-d", rows["pairs"], "-o", "reward", *dora, *SHORT)
    perl("rl", "-m", llama, "-d", rows["prompts"], "-o", "rl", "--reward", "reward", *dora, *RL, "--dtype", "bfloat16")
    record = read_record(Path("rl"))
    assert record.guards["kl_at_start"] == 0
    assert record.memory["mb"]["anchor"] == 0
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), PRECISIONS["bfloat16"]), LORA, "CAUSAL_LM")
    fresh_ones = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    trained = load_file("rl/adapter_model.safetensors")
    assert not any(
        torch.equal(trained[name.replace(".default.weight", "")], parameter) for name, parameter in fresh_ones.items()
    )
    started = ("sft", "-m", "rl", "-d", rows["demonstrations"], "-o", "on", *SHORT)
    perl(*started)  # an adapter says itself that it is DoRA
    assert read_record(Path("on")).settings["use_dora"] is True
    perl("merge", "on", "-o", "merged")


@pytest.mark.slow
def test_a_reward_of_another_kind_is_loaded_in_addition(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    """peft puts one kind on a base: the note says so, and what memory that takes."""
    file = written(FILES["LoKr"])
    result = perl("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "rl", "--peft", file, *RL)
    assert "it is LoRA, the policy's adapter is LoKr, and peft allows one type per base, loaded in" in result.output
    record = read_record(Path("rl"))
    assert record.guards["shift of " + str(reward_run)] == record.guards["kl_at_start"] == 0
    assert record.memory["base_copies"] == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_adapter_that_it_began_with(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    common = ("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "run", "--peft", "adapter.json")
    written(FILES["MiSS"])
    perl(*common, *SHORT, "--save-steps", "1")
    longer = (*common, *SHORT[2:], "--save-steps", "1", "--max-steps", "3", "--resume")
    written({**FILES["MiSS"], "r": 4})
    assert "--resume: adapter.json describes another adapter than the run in run trains" in perl(*longer, code=2).stderr
    written(FILES["MiSS"])
    assert "Resuming from step 2" in perl(*longer).output
    inside = ("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "run", "--peft", "run/adapter_config.json")
    assert "--overwrite would delete run/adapter_config.json" in perl(*inside, "--overwrite", code=2).stderr


def test_dropout_is_the_files_or_the_options() -> None:
    """Both trainers are given it back, as TRL's reward trainer turns all dropout off."""
    lora = LoraSettings(peft=written({**FILES["LoRA"], "lora_dropout": 0.25}))
    assert adapters.dropout_of(lora, "SEQ_CLS") == 0.25
    assert adapters.dropout_of(LoraSettings(lora_dropout=0.5), "SEQ_CLS") == 0.5
    assert adapters.dropout_of(LoraSettings(), "SEQ_CLS") == 0.0


def test_a_file_takes_the_place_of_a_recipes_lora_options() -> None:
    values = settings.layered({"peft": "adapter.json"}, {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3})
    assert values == {"peft": "adapter.json", "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target_modules": "(.*)*x"}, "the regular expression '(.*)*x' takes longer than 2 s to match module names"),
        ({"target_modules": "("}, "'(' is not a valid regular expression"),
        ({"modules_to_save": [{}]}, "modules_to_save=[{}]: it trains modules of the base"),
        ({"alpha": 10**400}, "has a number beyond 64 bits, or text that is not valid Unicode"),
        ({"rank_pattern": {"\ud800": 1}}, "has a number beyond 64 bits, or text that is not valid Unicode"),
    ],
)
def test_a_file_that_does_harm_is_refused(more: dict[str, Any], said: str) -> None:
    file = written({"peft_type": "LOHA", "r": 4, **more})
    model = sources.skeleton(sources.locate(None))
    assert model is not None
    with pytest.raises(PerlError) as caught:
        adapters.try_on(LoraSettings(peft=file), model, "SEQ_CLS")
    assert said in caught.value.problem


def test_a_file_nested_too_deeply_is_not_json() -> None:
    Path("adapter.json").write_text("[" * 100_000)
    with pytest.raises(PerlError, match=r"--peft adapter\.json can't be read as JSON"):
        adapters.content("adapter.json")
