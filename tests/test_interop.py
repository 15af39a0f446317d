"""Interoperability with the `trl` command, peft and transformers: their adapters work here, and ours work there.

A run of `trl` takes about 20 seconds, so each is made once and shared by many tests.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import create_model_from_path

from perlcli.data.chat import Style
from perlcli.model import scorers, tokenizers
from perlcli.model.sources import locate
from perlcli.model.tokenizers import padded
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings
from perlcli.training import reward_model

Perl = Callable[..., Any]
Trl = Callable[..., Path]
ON_CPU = ("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none")
STEPS = ("--max_steps", "2", "--save_steps", "1", "--logging_steps", "1")
TRL = (*ON_CPU, *STEPS, "--per_device_train_batch_size", "4", "--learning_rate", "1e-2")
LORA = ("--use_peft", "--lora_r", "4")
BATCH = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
SHORT = ("--max-steps", "2", *BATCH, "--learning-rate", "1e-2", "--max-length", "128")
RL = (*SHORT, "--max-completion-length", "6")
# A reward function for trl that writes down what the reward model next to it scores
KEEP = """import json
def keep(prompts, completions, **columns):
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps([prompts, completions]) + "\\n")
    return [0.0] * len(prompts)
"""
IDS = torch.arange(3, 40).unsqueeze(0)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def text(content: Any) -> str:
    return str(content[-1]["content"])


# Adapters trained by trl


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Trl:
    """Runs `trl` as its users do and returns the run's folder, which is inside the working folder."""

    def run(command: str, *words: object, code: int = 0) -> Path:
        place = tmp_path_factory.mktemp(f"trl-{command}")
        (place / "seen.py").write_text(KEEP)
        line = [Path(sys.executable).with_name("trl"), command, *TRL, "--output_dir", "run", *words]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(place / "cache")}
        result = subprocess.run(
            [str(word) for word in line], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == code, result.stderr[-3000:]
        (place / "stderr").write_text(result.stderr)
        return place / "run"

    return run


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Path], write: Any) -> dict[str, Path]:
    """The chats as plain text."""
    folders = {}
    for kind in ("pairs", "demonstrations", "prompts"):
        folders[kind] = tmp_path_factory.mktemp("plain") / kind
        folders[kind].mkdir()
        for file in ("train.jsonl", "test.jsonl"):
            chats = [json.loads(line) for line in (rows[kind] / file).read_text().splitlines()]
            plain = [
                {key: " " * (key != "prompt") + text(row[key]) for key in row if isinstance(row[key], list)}
                for row in chats
            ]
            write(folders[kind] / file, plain)
    return folders


@pytest.fixture(scope="module")
def trl_reward(trl: Trl, llama: Path, rows: dict[str, Path]) -> Path:
    words = ("--model_name_or_path", llama, "--dataset_name", rows["pairs"])
    return trl("reward", *words, *LORA, "--lora_task_type", "SEQ_CLS")


@pytest.fixture(scope="module")
def trl_sft(trl: Trl, llama: Path, rows: dict[str, Path]) -> Path:
    return trl("sft", "--model_name_or_path", llama, "--dataset_name", rows["demonstrations"], *LORA)


@pytest.fixture(scope="module")
def trl_plain_reward(trl: Trl, gpt2: Path, plain_rows: dict[str, Path]) -> Path:
    words = ("--model_name_or_path", gpt2, "--dataset_name", plain_rows["pairs"])
    return trl("reward", *words, *LORA, "--lora_task_type", "SEQ_CLS")


@pytest.fixture(scope="module")
def trl_plain_sft(trl: Trl, gpt2: Path, plain_rows: dict[str, Path]) -> Path:
    return trl("sft", "--model_name_or_path", gpt2, "--dataset_name", plain_rows["demonstrations"], *LORA)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], list[float]]]:
    """The batches of token ids that `perl rl` scores on the shared base, and their rewards."""
    calls: list[tuple[list[list[int]], list[float]]] = []
    original = scorers.SharedScorer.__call__

    def spy(self: Any, ids: list[list[int]], *values: Any, **options: Any) -> list[float]:
        scores = original(self, ids, *values, **options)
        calls.append((list(ids), scores))
        return scores

    monkeypatch.setattr(scorers.SharedScorer, "__call__", spy)
    return calls


def plain_scores(model: Path, folder: Path, ids: list[list[int]]) -> list[float]:
    """A reward adapter's scores by transformers and peft without perlcli, padded by the tokenizer in its folder."""
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    start = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=pad)
    scorer: Any = PeftModel.from_pretrained(start, folder).eval()
    tokens, mask = padded(ids, pad)
    with torch.no_grad():
        return [float(score) for score in scorer(input_ids=tokens, attention_mask=mask).logits[:, 0]]


# Reward adapters of `trl reward`


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [".", "checkpoint-1"])
def test_a_reward_adapter_of_trl_scores_in_rl_as_in_peft(
    checkpoint: str, perl: Perl, llama: Path, trl_reward: Path, rows: dict[str, Path], scored: Any
) -> None:
    folder = trl_reward / checkpoint
    result = perl("rl", "-m", llama, "--reward", folder, "-d", rows["prompts"], "-o", "run", *RL)
    assert f"reward: {folder}, an adapter on the policy's base (adds" in result.stdout
    assert len(scored) == 5  # the probe, one per step, and the evaluation of policy and anchor
    for ids, scores in scored:
        assert scores == pytest.approx(plain_scores(llama, folder, ids), abs=1e-5)  # in other batches
    assert [row["kl"] == 0 for row in metrics(Path("run"))] == [True, False]


@pytest.mark.slow
def test_a_plain_text_reward_adapter_of_trl_scores_in_rl_as_in_peft(
    perl: Perl, gpt2: Path, trl_plain_reward: Path, trl_plain_sft: Path, plain_rows: dict[str, Path], scored: Any
) -> None:
    """trl pads GPT-2 with EOS, so the score is read at the token before EOS."""
    perl("rl", "-m", trl_plain_sft, "--reward", trl_plain_reward, "-d", plain_rows["prompts"], "-o", "run", *RL)
    assert len(scored) == 5  # the probe, one per step, and the evaluation of policy and anchor
    for ids, scores in scored:
        assert scores == pytest.approx(plain_scores(gpt2, trl_plain_reward, ids), abs=1e-5)
    assert [row["kl"] == 0 for row in metrics(Path("run"))] == [True, False]
    assert same(Path("run/anchor"), trl_plain_sft)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_reward_adapter_of_trl_is_evaluated_as_in_peft(kind: str, perl: Perl, request: pytest.FixtureRequest) -> None:
    names = ("llama", "trl_reward", "rows") if kind == "chat" else ("gpt2", "trl_plain_reward", "plain_rows")
    model, folder, pairs = (request.getfixturevalue(name) for name in names)
    perl("eval", "-m", folder, "-d", pairs["pairs"], "-o", "eval")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [json.loads(line) for line in Path("eval/samples.jsonl").read_text().splitlines()]
    for sample in samples[:4]:
        ids = [tokenizer(sample[name])["input_ids"] for name in ("chosen", "rejected")]
        wanted = plain_scores(model, folder, ids)
        assert [sample["chosen_score"], sample["rejected_score"]] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_a_reward_adapter_of_trl_can_be_trained_further(perl: Perl, trl_reward: Path, rows: dict[str, Path]) -> None:
    perl("reward", "-m", trl_reward, "-d", rows["pairs"], "-o", "run", *SHORT)
    assert read_record(Path("run")).status == "finished"
    assert not same(Path("run"), trl_reward)


@pytest.mark.slow
def test_trl_needs_a_task_type_to_train_a_reward_adapter(trl: Trl, llama: Path, rows: dict[str, Path]) -> None:
    """`trl reward --use_peft` without it crashes in peft; docs/evaluate.md names the option."""
    run = trl("reward", "--model_name_or_path", llama, "--dataset_name", rows["pairs"], *LORA, code=1)
    assert "has no attribute 'prepare_inputs_for_generation'" in (run.parent / "stderr").read_text()
    assert not run.exists()


# The tokens that trl's reward trainer trains on, compared with those that we score


def trained_on(folder: Path, pairs: list[dict[str, Any]], template: str | None = None) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = RewardConfig("trained", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    return [ids for row in trainer.train_dataset for ids in (row["chosen_ids"], row["rejected_ids"])]


def ours(folder: Path, pairs: list[dict[str, Any]], template: str | None = None) -> list[list[int]]:
    """The ids that we score when a policy writes these answers and ends them."""
    source = locate(str(folder))
    tokenizer = tokenizers.load_tokenizer(source)
    tokenizer.chat_template = template or tokenizer.chat_template
    render = tokenizers.renderer(source, tokenizer, Style(chat=False))  # trl joins text rows
    scored_ids = []
    for row in pairs:
        for answer in (row["chosen"], row["rejected"]):
            ids = render.completion_ids(row["prompt"], answer)
            written = ids[: next(index for index, token in enumerate(ids) if token in render.eos_ids) + 1]
            assert render.scored_ids(row["prompt"], written) == render.prompt_ids(row["prompt"]) + ids
            scored_ids.append(render.scored_ids(row["prompt"], written))
    return scored_ids


def read_pairs(folders: dict[str, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folders["pairs"] / "train.jsonl").read_text().splitlines()]


def test_chats_are_scored_with_the_tokens_that_trl_trains_on(llama: Path, rows: dict[str, Path]) -> None:
    pairs = read_pairs(rows)
    assert ours(llama, pairs) == trained_on(llama, pairs)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_plain_text_is_scored_with_the_tokens_that_trl_trains_on(
    model: str, plain_rows: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    folder, pairs = request.getfixturevalue(model), read_pairs(plain_rows)
    assert ours(folder, pairs) == trained_on(folder, pairs)


def test_plain_text_differs_from_trl_in_tokens_that_span_prompt_and_answer(
    gpt2: Path, plain_rows: dict[str, Path]
) -> None:
    """With a prompt that ends in a space, trl encodes prompt and answer together, as no policy could write them."""
    pairs = [{**row, "prompt": row["prompt"] + " "} for row in read_pairs(plain_rows)]
    pairs = [{key: value.strip() if key != "prompt" else value for key, value in row.items()} for row in pairs]
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    mine, theirs = ours(gpt2, pairs), trained_on(gpt2, pairs)
    assert mine != theirs
    assert list(map(tokenizer.decode, mine)) == list(map(tokenizer.decode, theirs))


def test_chats_differ_from_trl_if_the_template_writes_no_eos(llama: Path, rows: dict[str, Path]) -> None:
    """trl's reward model then never sees an EOS, but the policy that it scores ends with one."""
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    pairs = read_pairs(rows)
    eos = AutoTokenizer.from_pretrained(llama).eos_token_id
    assert ours(llama, pairs, template) == [[*ids, eos] for ids in trained_on(llama, pairs, template)]


# Policy adapters of `trl sft`


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [".", "checkpoint-1"])
def test_rl_starts_from_a_policy_of_trl_and_is_anchored_to_it(
    checkpoint: str, perl: Perl, trl_sft: Path, trl_reward: Path, rows: dict[str, Path]
) -> None:
    """trl's adapters have dropout, with which policy and anchor would differ at step 0."""
    folder = trl_sft / checkpoint
    perl("rl", "-m", folder, "--reward", trl_reward, "-d", rows["prompts"], "-o", "run", *RL)
    assert [row["kl"] == 0 for row in metrics(Path("run"))] == [True, False]
    assert same(Path("run/anchor"), folder)
    assert not same(Path("run"), folder)
    assert read_record(Path("run")).settings["lora_target_modules"] == "q_proj,v_proj"


@pytest.mark.slow
def test_a_policy_of_trl_can_be_trained_further_in_sft(perl: Perl, trl_sft: Path, rows: dict[str, Path]) -> None:
    perl("sft", "-m", trl_sft, "-d", rows["demonstrations"], "-o", "run", *SHORT)
    assert read_record(Path("run")).status == "finished"
    assert not same(Path("run"), trl_sft)


@pytest.mark.slow
def test_a_policy_of_trl_can_be_evaluated(perl: Perl, trl_sft: Path, trl_reward: Path, rows: dict[str, Path]) -> None:
    words = ("--reward", trl_reward, "-d", rows["prompts"], "-o", "eval", "--max-completion-length", "6")
    perl("eval", "-m", trl_sft, *words)
    record = read_record(Path("eval"))
    assert (record.status, record.model["adapter"]) == ("finished", str(trl_sft))


@pytest.mark.slow
def test_adapters_of_trl_work_without_a_tokenizer(
    perl: Perl, llama: Path, trl_sft: Path, trl_reward: Path, rows: dict[str, Path], scored: Any
) -> None:
    for name, folder in (("sft", trl_sft), ("reward", trl_reward)):
        Path(name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / file, name)
    perl("rl", "-m", "sft", "--reward", "reward", "-d", rows["prompts"], "-o", "run", *RL)
    for ids, scores in scored:
        assert scores == pytest.approx(plain_scores(llama, trl_reward, ids), abs=1e-5)


# Our adapters in trl


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, perl: Perl, sft_run: Path) -> Path:
    """The policy merged into a full model, as in docs/evaluate.md."""
    folder = tmp_path_factory.mktemp("merged") / "policy"
    perl("merge", sft_run, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def trl_rloo(trl: Trl, merged: Path, reward_run: Path, rows: dict[str, Path]) -> Path:
    """RL by trl from our merged policy, with our reward adapter unchanged."""
    models = ("--model_name_or_path", merged, "--reward_model_name_or_path", reward_run, "--reward_funcs", "seen.keep")
    samples = ("--dataset_name", rows["prompts"], "--max_completion_length", "8", "--num_generations", "4")
    return trl("rloo", *models, *samples, *LORA)


@pytest.mark.slow
def test_our_reward_adapter_scores_in_trl_as_here(trl_rloo: Path, reward_run: Path) -> None:
    """For the text that trl scores: the template with the decoded answer, as if the answer had ended."""
    state = json.loads((trl_rloo / "checkpoint-2" / "trainer_state.json").read_text())
    rewards = [row["rewards/llama/mean"] for row in state["log_history"] if "reward" in row]
    source = locate(str(reward_run))
    render = tokenizers.renderer(source, tokenizers.load_tokenizer(source))
    scorer = reward_model.load(source, ModelSettings())
    seen = [json.loads(line) for line in (trl_rloo.parent / "seen.jsonl").read_text().splitlines()]
    ids = [
        [render.whole_ids(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for prompts, answers in seen
    ]
    wanted = [sum(scorer(batch)) / len(batch) for batch in ids]
    assert rewards == pytest.approx(wanted, abs=1e-5)
    assert len(set(rewards)) == 2


@pytest.mark.slow
def test_our_policy_can_be_trained_in_trl_and_evaluated_here(
    trl_rloo: Path, merged: Path, perl: Perl, reward_run: Path, rows: dict[str, Path]
) -> None:
    state = json.loads((trl_rloo / "checkpoint-2" / "trainer_state.json").read_text())
    assert [row["kl"] == 0 for row in state["log_history"] if "kl" in row] == [True, False]
    assert not same(trl_rloo, trl_rloo / "checkpoint-1")
    words = ("--reward", reward_run, "-d", rows["prompts"], "-o", "eval", "--max-completion-length", "6")
    perl("eval", "-m", trl_rloo, *words)
    assert read_record(Path("eval")).model["base"] == str(merged)


def test_trl_pads_our_reward_adapter_like_its_base_unless_merged(perl: Perl, llama: Path, reward_run: Path) -> None:
    """If the base pads with EOS, trl reads the score before EOS, which matters for chats that end with EOS."""
    perl("merge", reward_run, "--output", "merged")
    config = RLOOConfig("run", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "a latte"}]}] * 8)
    trainer = RLOOTrainer(str(llama), [str(reward_run), "merged"], config, train_dataset=data)
    pad, eos = AutoTokenizer.from_pretrained(reward_run).pad_token_id, AutoTokenizer.from_pretrained(llama).eos_token_id
    assert [model.config.pad_token_id for model in trainer.reward_funcs] == [eos, pad]
    assert pad != eos


def test_trl_does_not_accept_an_adapter_as_its_model(sft_run: Path) -> None:
    """Neither ours nor its own: it needs a config.json. When this fails, docs/evaluate.md no longer needs to merge."""
    with pytest.raises(ValueError, match=r"^Unrecognized model in .*Should have a `model_type` key"):
        create_model_from_path(str(sft_run))


# Our adapters in peft and transformers, by the folder's name


def test_our_policy_loads_from_its_folder(llama: Path, sft_run: Path) -> None:
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), sft_run).eval()
    with torch.no_grad():
        logits = wanted(input_ids=IDS).logits
        for kind in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            assert torch.equal(kind.from_pretrained(sft_run).eval()(input_ids=IDS).logits, logits)
        merged = AutoPeftModelForCausalLM.from_pretrained(sft_run).merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, logits, atol=1e-4)


def test_our_reward_adapter_loads_from_its_folder_with_its_head(reward_run: Path) -> None:
    source = locate(str(reward_run))
    wanted = reward_model.load(source, ModelSettings())([IDS[0].tolist()])
    with torch.no_grad():
        for kind in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
            logits = kind.from_pretrained(reward_run, num_labels=1).eval()(input_ids=IDS).logits
            assert logits[:, 0].tolist() == wanted
