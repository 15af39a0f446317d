"""`perl rl`: one base for policy, anchor and reward, exact rewards, and runs that can't learn are stopped."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.generation import GenerationMixin
from trl import RLOOTrainer

from perlcli.commands import rl
from perlcli.data import Prompt, Renderer
from perlcli.errors import RunFailed
from perlcli.model import roles, scorers
from perlcli.run.record import read_record
from perlcli.training import rewards

Perl = Callable[..., Any]
RUN = {
    "record.json",
    "prompts.bin",
    "settings.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "plots/training.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
ANCHOR = {"anchor/adapter_config.json", "anchor/adapter_model.safetensors"}
LORA = 2 * 4 * (4 * 64 + 2 * 64 + 2 * 32)  # layers x rank x widths in and out of q, k, v, o
BATCH = "--per-device-train-batch-size 4 --gradient-accumulation-steps 1"
LENGTHS = "--max-completion-length 6 --max-length 128"
SHORT = tuple(f"--max-steps 2 --learning-rate 1e-2 {BATCH} {LENGTHS}".split())
LENGTH = "def reward(completion_ids, **columns): return [float(ids[0]) for ids in completion_ids]\n"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a user's module into the working directory, and returns its function's name for `--reward`."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    sys.modules.pop("users_rewards", None)

    def write(text: str) -> str:
        Path("users_rewards.py").write_text(text)
        return "users_rewards:reward"

    yield write
    sys.modules.pop("users_rewards", None)


# The folder


@pytest.mark.slow
def test_run_leaves_these_files_and_no_others(rl_run: Path, files: Callable[[Path], set[str]]) -> None:
    assert files(rl_run) == RUN | ADAPTER | ANCHOR


def test_record_describes_the_run(rl_run: Path, sft_run: Path, reward_run: Path, llama: Path) -> None:
    found = read_record(rl_run)
    assert (found.command, found.status, found.steps) == ("rl", "finished", 2)
    assert found.model["base"] == str(llama)
    assert found.model["adapter"] == str(sft_run)
    assert found.settings["reward"] == [str(reward_run)]
    assert found.trainable_parameters == LORA
    alone = AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    assert found.total_parameters == alone + 3 * LORA  # policy, anchor and reward on one base
    assert {name for name in found.metrics if not name.startswith("eval_")} == {
        "first_reward",
        "reward",
        "kl_per_token",
        "completion_length",
        "share_truncated",
        "gold",
        "seconds_sampling",
        "seconds_scoring",
        "seconds_anchor",
        "seconds_learning",
    }
    assert f"reward: {reward_run}, an adapter on the policy's base (adds 14.6 kB)" in found.notes
    steps = metrics(rl_run)
    assert (found.metrics["first_reward"], found.tokens) == (steps[0]["reward"], steps[-1]["num_tokens"])
    assert found.metrics["reward"] == pytest.approx((steps[0]["reward"] + steps[1]["reward"]) / 2)


def test_held_out_prompts_are_measured_at_the_end(
    rl_run: Path, sft_run: Path, reward_run: Path, rows: dict[str, Path], perl: Perl
) -> None:
    """`perl eval` of the folder gives the same figures; it answers in batches of another size."""
    found = read_record(rl_run)
    assert found.metrics["eval_prompts"] == 12
    assert found.data["eval"]["kept"] == 12
    of_reward, rose, *compared = found.verdicts
    assert of_reward.startswith(f"The reward {reward_run}: ") and rose.startswith("Reward rose beyond noise: ")
    assert len(compared) == 2
    assert all(f"its anchor ({sft_run}, where RL starts)" in verdict for verdict in compared)
    lengths = ("--max-length", "128", "--max-completion-length", "12", "--per-device-eval-batch-size", "4")
    perl("eval", "-m", rl_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "eval", *lengths)
    again = read_record(Path("eval")).metrics
    own = {name.removeprefix("eval_"): value for name, value in found.metrics.items() if name.startswith("eval_")}
    assert {"net_win_rate_low", "mean_reward_difference_high", "kl_k3_per_token", "anchor_mean_length"} <= set(own)
    assert own == pytest.approx({name: again[name] for name in own}, abs=1e-3)


def test_anchor_is_the_adapter_that_the_policy_started_from(rl_run: Path, sft_run: Path) -> None:
    assert same(rl_run / "anchor", sft_run)
    assert not same(rl_run, sft_run)


def test_divergence_begins_at_zero(rl_run: Path) -> None:
    first, second = (row["kl"] for row in metrics(rl_run))
    assert first == 0
    assert second != 0


def test_divergence_begins_at_zero_if_the_base_has_dropout(
    perl: Perl, gpt2: Path, module: Callable[[str], str], write: Any
) -> None:
    source = write(Path("rows.jsonl"), [{"prompt": "a latte"}, {"prompt": "two mochas"}])
    perl("rl", "-m", gpt2, "--reward", module(LENGTH), "-d", source, "-o", "run", *SHORT)
    assert metrics(Path("run"))[0]["kl"] == 0


@pytest.mark.slow
def test_divergence_begins_at_zero_if_the_adapter_has_dropout(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = ("-m", llama, "-d", rows["demonstrations"], "-o", "sft", "--max-steps", "1", "--lora-dropout", "0.1")
    perl("sft", *sft, "--learning-rate", "1e-2")
    common = ("-m", "sft", "--reward", reward_run, "-d", rows["prompts"], *SHORT, "--max-steps", "1")
    perl("rl", *common, "-o", "run")
    perl("rl", "--config", "run/settings.yaml", "-o", "again")
    assert [metrics(Path(name))[0]["kl"] for name in ("run", "again")] == [0, 0]
    assert read_record(Path("run")).settings["lora_dropout"] == 0
    chances: set[float] = set()

    def look(trainer: Any, *_: Any) -> None:
        chances.update(m.p for name, m in trainer.model.named_modules() if name.endswith("lora_dropout.default"))

    monkeypatch.setattr(rl, "train", look)
    perl("rl", *common, "-o", "asked", "--lora-dropout", "0.1", code=1)
    assert chances == {0.1}
    assert "the adapter has 0.1" in perl("rl", *common, "-o", "other", "--lora-dropout", "0.3", code=2).stderr


@pytest.mark.slow
def test_settings_of_a_run_rerun_it(rl_run: Path, perl: Perl, tmp_path: Path) -> None:
    perl("rl", "--config", rl_run / "settings.yaml", "--output", tmp_path)
    assert same(tmp_path, rl_run)


def test_policy_loads_in_plain_peft(rl_run: Path, llama: Path) -> None:
    ids = torch.arange(3, 20).unsqueeze(0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), rl_run).eval()
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), rl_run / "anchor").eval()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, start(input_ids=ids).logits)


# What is scored


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--no-shared-prompts",)], ids=["shared", "separate"])
def test_rewards_are_those_of_the_reward_folder_in_plain_peft(
    words: tuple[str, ...],
    perl: Perl,
    llama: Path,
    reward_run: Path,
    rows: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit where each row is read by itself."""
    calls: list[tuple[list[Prompt], list[list[int]], list[float]]] = []
    original = rewards.TokenReward.__call__

    def spy(self: Any, prompts: list[Prompt], written: list[list[int]]) -> list[float]:
        found = original(self, prompts, written)
        calls.append((prompts, written, found))
        return found

    monkeypatch.setattr(rewards.TokenReward, "__call__", spy)
    perl("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, *words)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_run)
    model.config.pad_token_id = tokenizer.pad_token_id
    scorer = scorers.ClassifierScorer(PeftModel.from_pretrained(model, reward_run), tokenizer.pad_token_id)
    for prompts, written, found in calls:
        starts = [tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"] for row in prompts]
        tails = [[*tokenizer("\n")["input_ids"]] if ids[-1] == tokenizer.eos_token_id else [] for ids in written]
        ids = [a + b + c for a, b, c in zip(starts, written, tails, strict=True)]
        assert found == (scorer(ids, 4) if words else pytest.approx(scorer(ids, 4), abs=1e-5))
    assert [row["reward"] for row in metrics(Path("run"))] == [
        pytest.approx(sum(found) / 4, abs=1e-6)
        for _, _, found in calls[1:-2]  # the first call is the probe's, the last ones are of the held-out prompts
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The prompts, without padding, that models were asked to complete."""
    prompts: set[tuple[int, ...]] = set()
    original = GenerationMixin.generate

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        prompts.update(tuple(ids[mask == 1].tolist()) for ids, mask in pairs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return prompts


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_policy_is_given_the_renderers_prompts(
    model: str, perl: Perl, write: Any, asked: set[tuple[int, ...]], module: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    said = ["a latte", "two small mochas to go", " with oat  milk\n", "ünïcode ☕"]
    prompts = [[{"role": "user", "content": text}] if model == "llama" else text for text in said]
    source = write(Path("rows.jsonl"), [{"prompt": prompt} for prompt in prompts])
    words = (*SHORT, "--max-steps", "4")
    perl("rl", "-m", folder, "--reward", module(LENGTH), "-d", source, "-o", "run", *words)
    render = Renderer(AutoTokenizer.from_pretrained(folder))
    assert asked == {tuple(render.prompt_ids(prompt)) for prompt in prompts}


@pytest.mark.slow
def test_function_gets_the_columns_of_the_data(
    perl: Perl, llama: Path, rows: dict[str, Path], module: Callable[[str], str]
) -> None:
    name = module(
        "def reward(prompts, completions, completion_ids, order, **columns):\n"
        "    assert sorted(columns) == ['log_extra', 'log_metric', 'trainer_state'], columns\n"
        "    assert all(text.startswith('add_order_item(') for text in order)\n"
        "    assert all(prompt[0]['role'] == 'user' for prompt in prompts)\n"
        "    assert all(answer[0]['role'] == 'assistant' for answer in completions)\n"
        "    return [float(ids[0]) for ids in completion_ids]\n"
    )
    result = perl("rl", "-m", llama, "--reward", name, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert f"reward: the function {name}" in result.stdout
    assert read_record(Path("run")).metrics["gold"] == 0


@pytest.mark.slow
def test_classifier_on_another_base_is_loaded_and_noted(
    perl: Perl, llama: Path, classifier: Path, rows: dict[str, Path]
) -> None:
    result = perl("rl", "-m", llama, "--reward", classifier, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert f"reward: {classifier}, on its own base ({classifier}), loaded in addition to the policy's" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "thumbs", "demonstrations"])
def test_prompts_are_taken_from_any_kind_of_row(
    kind: str, perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    result = perl("rl", "-m", llama, "--reward", reward_run, "-d", rows[kind], "-o", "run", *SHORT, "--dry-run")
    assert "32 rows read, 32 kept" in result.stdout


@pytest.mark.slow
def test_missing_eos_penalty_applies_to_truncated_completions(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    common = ("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], *SHORT, "--max-steps", "1")
    perl(*common, "-o", "plain")
    perl(*common, "-o", "taxed", "--missing-eos-penalty", "5")
    (plain,), (taxed,) = metrics(Path("plain")), metrics(Path("taxed"))
    assert plain["completions/clipped_ratio"] > 0
    assert taxed["reward"] == pytest.approx(plain["reward"] - 5 * plain["completions/clipped_ratio"], abs=1e-5)


# Runs that can't learn


def test_run_without_a_reward_is_rejected(perl: Perl, sft_run: Path, rows: dict[str, Path]) -> None:
    result = perl("rl", "-m", sft_run, "-d", rows["prompts"], "-o", "run", *SHORT, code=2)
    assert "Error: --reward is missing: RL learns nothing without a reward" in result.stderr
    assert not Path("run").exists()


def test_reward_model_with_equal_rewards_stops_the_run(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    shutil.copytree(reward_run, "blank")
    head = {name: torch.zeros_like(w) if "score" in name else w for name, w in weights(reward_run).items()}
    save_file(head, Path("blank") / "adapter_model.safetensors", metadata={"format": "pt"})
    words = ("rl", "-m", sft_run, "--reward", "blank", "-d", rows["prompts"], "-o", "run", *SHORT)
    result = perl(*words, code=2)
    assert "Error: The reward blank scores its own proof rows differently than after its training" in result.stderr
    (Path("blank") / "proof.json").unlink()
    result = perl(*words, "--overwrite", code=1)
    assert "Error: The reward gives all 16 completions the same value (0): nothing to learn" in result.stderr
    found = read_record(Path("run"))
    assert (found.status, found.steps) == ("failed", 0)


@pytest.mark.slow
def test_function_with_equal_rewards_stops_the_run(perl: Perl, sft_run: Path, rows: dict[str, Path]) -> None:
    words = (*SHORT, "--max-steps", "9")
    name = "perlcli.coffee:reward"  # the exact check, which nothing that a random model writes passes
    result = perl("rl", "-m", sft_run, "--reward", name, "-d", rows["prompts"], "-o", "run", *words, code=1)
    assert "the same value (0): nothing to learn" in result.stderr
    assert read_record(Path("run")).steps == 0


@pytest.mark.slow
def test_policy_that_did_not_change_fails_the_run(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    words = (*SHORT, "--learning-rate", "1e-300")
    result = perl("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *words, code=1)
    assert "Error: The policy did not change: nothing was learned" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("embed_tokens.weight", "The base"),
        ("q_proj.base_layer.weight", "The base"),
        ("lora_A.ref.weight", "The anchor"),
        ("lora_B.reward.weight", "The reward adapter"),
    ],
)
def test_any_other_change_fails_the_run(
    tail: str, said: str, perl: Perl, rl_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RLOOTrainer.training_step

    def careless(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        parameter = next(p for name, p in model.named_parameters() if name.endswith(tail))
        parameter.data.view(-1)[0] += 1e-4
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(RLOOTrainer, "training_step", careless)
    result = perl("rl", "--config", rl_run / "settings.yaml", "-o", "run", "--max-steps", "1", code=1)
    assert f"Error: {said} changed during training although it is frozen" in result.stderr
    assert read_record(Path("run")).status == "failed"


def test_an_extra_parameter_in_the_optimiser_stops_the_run(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = roles.keep_only_policy_trainable

    def careless(model: Any) -> None:
        original(model)
        model.get_input_embeddings().weight.requires_grad_(True)

    monkeypatch.setattr(roles, "keep_only_policy_trainable", careless)
    words = ("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert (
        "Error: The optimiser would train 1 parameter that should stay frozen, such as " in perl(*words, code=1).stderr
    )
    assert read_record(Path("run")).steps == 0


@pytest.mark.slow
def test_changed_quantised_state_fails_the_run(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RLOOTrainer.training_step

    def careless(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
        weight.quant_state.absmax[0] += 1
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(RLOOTrainer, "training_step", careless)
    words = ("--load-in-4bit", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert "Error: The base changed during training" in perl("rl", *words, code=1).stderr


@pytest.mark.slow
def test_nan_reward_during_training_keeps_the_adapter_of_the_step_before(
    perl: Perl, sft_run: Path, rows: dict[str, Path], module: Callable[[str], str]
) -> None:
    text = (
        "calls = []\n"
        "def reward(completion_ids, **columns):\n"
        "    calls.append(1)\n"  # the probe, then one call per step
        "    return [float(ids[0]) if len(calls) < 4 else float('nan') for ids in completion_ids]\n"
    )
    common = ("rl", "-m", sft_run, "--reward", module(text), "-d", rows["prompts"], *SHORT)
    words = (*common, "--max-steps", "4", "--save-steps", "2", "-o", "run")
    assert "reward is nan: the completion" in perl(*words, code=1).stderr
    assert read_record(Path("run")).steps == 2
    assert same(Path("run"), Path("run/checkpoints/checkpoint-2"))
    assert not same(Path("run"), sft_run)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--algorithm", "reinforce"]])
def test_few_prompts_are_reused_to_fill_a_step(
    words: list[str], perl: Perl, sft_run: Path, reward_run: Path, write: Any
) -> None:
    source = write(Path("few.jsonl"), [{"prompt": [{"role": "user", "content": f"{n} lattes"}]} for n in range(3)])
    common = ("rl", "-m", sft_run, "--reward", reward_run, "-d", source, "-o", "run", *SHORT, "--max-steps", "1")
    perl(*common, "--gradient-accumulation-steps", "4", *words)
    found = read_record(Path("run"))
    assert f"A step needs {16 if words else 4} prompts but there are only 3; some are reused." in found.notes
    assert found.steps == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--load-in-4bit"], ["--load-in-4bit", "--dtype", "float32"], ["--load-in-8bit"]])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_policy_on_a_quantised_base_begins_as_it_was_saved(
    words: list[str],
    perl: Perl,
    sft_run: Path,
    reward_run: Path,
    rows: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: dict[str, torch.Tensor] = {}

    def look(trainer: Any, *_: Any) -> None:
        named = trainer.model.named_parameters()
        begun.update({name.replace(".default", ""): p.detach().clone() for name, p in named if ".default." in name})
        raise RunFailed("enough")

    monkeypatch.setattr(rl, "train", look)
    common = ("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    perl(*common, *words, code=1)
    saved = weights(sft_run)
    assert begun.keys() == saved.keys()
    assert all(torch.equal(begun[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_overwriting_a_base_in_use_is_rejected(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    perl("merge", sft_run, "-o", "merged")
    short = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--lora-r", "4", "--max-length", "128")
    perl("sft", "-m", "merged", "-d", rows["demonstrations"], "-o", "on-merged", *short)
    common = ("rl", "-m", "on-merged", "--reward", reward_run, "-d", rows["prompts"], *SHORT)
    result = perl(*common, "-o", "merged", "--overwrite", code=2)
    assert "--overwrite would delete" in result.stderr
    assert Path("merged/model.safetensors").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_moves_its_base_is_rejected(
    init: str, perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    shutil.copytree(sft_run, "moving", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads(Path("moving/adapter_config.json").read_text())
    Path("moving/adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    result = perl("rl", "-m", "moving", "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, code=2)
    assert f"(init_lora_weights={init}) changes its base, which other roles share" in result.stderr
    assert "Hint: perl merge moving" in result.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # warns about merging, which isn't done here
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # peft keeps the embeddings too
def test_adapter_of_embeddings_begins_at_its_anchor_and_trains(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    words = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--lora-r", "4", "--max-length", "128")
    targets = ("--lora-target-modules", "q_proj")
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "sft", "--learning-rate", "1e-2", *words, *targets)
    base = AutoModelForCausalLM.from_pretrained(llama)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    shutil.copytree("sft", "start", ignore=shutil.ignore_patterns("checkpoints", "record.json"))
    model.save_pretrained("start", save_embedding_layers=False)
    perl("rl", "-m", "start", "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT)
    assert metrics(Path("run"))[0]["kl"] == 0
    before, after = weights(Path("start")), weights(Path("run"))
    assert any("lora_embedding" in name and not torch.equal(before[name], after[name]) for name in before)


def test_reward_model_is_not_a_policy(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> None:
    result = perl("rl", "-m", reward_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", code=2)
    assert f"--model {reward_run} is a reward model, not a policy" in result.stderr
    assert not Path("run").exists()


# Bases


@pytest.mark.slow
def test_policy_from_a_base_is_anchored_to_the_base(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], files: Callable[[Path], set[str]]
) -> None:
    perl("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, "--lora-r", "4")
    assert files(Path("run")) == RUN | ADAPTER  # no adapter for an anchor that is the bare base
    assert metrics(Path("run"))[0]["kl"] == 0
    assert read_record(Path("run")).memory["mb"]["anchor"] == 0


@pytest.mark.slow
def test_full_tuning_saves_a_plain_model_and_loads_the_reward_separately(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], files: Callable[[Path], set[str]]
) -> None:
    words = (*SHORT, "--full", "--learning-rate", "1e-4")
    result = perl("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *words)
    assert "on its own base" in result.stdout
    assert files(Path("run")) == RUN | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert metrics(Path("run"))[0]["kl"] == 0
    tuned, before = AutoModelForCausalLM.from_pretrained("run"), AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.equal(tuned.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert read_record(Path("run")).trainable_parameters == before.num_parameters()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
@pytest.mark.parametrize("words", [["--load-in-4bit"], ["--load-in-8bit"], ["--dtype", "bfloat16"]])
def test_other_precisions_begin_at_their_anchor(
    words: list[str], perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    perl("rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, *words)
    assert metrics(Path("run"))[0]["kl"] == 0
    assert {tensor.dtype for tensor in weights(Path("run")).values()} == {torch.float32}
    assert same(Path("run") / "anchor", sft_run)
    found = read_record(Path("run"))
    shift = found.guards[f"shift of {reward_run}"]
    assert any(f"its scores shift by up to {shift:.2g}" in note for note in found.notes)
    assert (shift > 0, found.guards["kl_at_start"], found.memory["base_copies"]) == (True, 0, 1)


@pytest.mark.slow
def test_prompts_that_leave_no_room_are_left_out(perl: Perl, llama: Path, tmp_path: Path, write: Any) -> None:
    prompts = [{"prompt": "latte"}, {"prompt": "latte " * 30}]
    source = write(tmp_path / "rows.jsonl", prompts)
    words = ("--max-length", "20", "--max-completion-length", "8", "--dry-run", "--no-chat")
    result = perl("rl", "-m", llama, "--reward", "perlcli.coffee:reward", "-d", source, "-o", "run", *words)
    too_long = "longer than 12 tokens (--max-length 20 less 8 for the completion) (row 2)"
    assert f"prompts, 2 rows read, 1 kept; dropped 1 {too_long}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flag"), [("cuda", "--load-in-8bit"), ("cuda", "--load-in-4bit"), ("cpu", "--load-in-8bit")]
)
def test_slow_sampling_from_8_bits_is_noted_on_a_gpu(
    kind: str, flag: str, perl: Perl, request: pytest.FixtureRequest
) -> None:
    llama, rows, reward_run = map(request.getfixturevalue, ("llama", "rows", "reward_run"))
    if kind == "cuda":
        request.getfixturevalue("like_stubbed_cuda")
    common = ("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, "--dry-run")
    is_noted = "sampling from a base in 8 bits is slow" in perl(*common, flag).output
    assert is_noted is ((kind, flag) == ("cuda", "--load-in-8bit"))


@pytest.mark.slow
def test_dry_run_writes_nothing(perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]) -> None:
    perl("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", *SHORT, "--dry-run")
    assert list(Path().iterdir()) == []
