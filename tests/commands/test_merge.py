"""`perl merge`: the merged folder is the adapted model in plain transformers, and nothing that it reads is touched."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import SHORT
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from perlcli.commands import early
from perlcli.errors import PerlError
from perlcli.model import roles
from perlcli.model import weights as weights_module
from perlcli.model.tokenizers import padded
from perlcli.model.weights import fingerprint
from perlcli.run.record import read_record
from perlcli.training import merging

Perl = Callable[..., Any]
Files = Callable[[Path], set[str]]
PLAIN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RUN = {"README.md", "record.json", "settings.yaml", "prompts.bin"}
POLICY = {"adapter_effect", "logit_difference", "share_same_token"}
REWARD = {"score_difference", "score_range"}
ROWS = [[1, 40, 41, 42, 43], [1, 50, 60], [1, 70, 71, 72, 73, 74, 75, 76]]
PAD = 0
quiet_8bit = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def logits(model: Any) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0].float() for row in ROWS]


def plain_policy(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def plain_reward(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def close(some: list[torch.Tensor], others: list[torch.Tensor], limit: float = 1e-3) -> bool:
    """Whether logits are the same but for what rounding of float32 explains."""
    return merging.largest_difference(some, others) < limit


def marks(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def peft_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter that plain peft made on a base, with random weights; LoRA unless a config is given."""

    def write(base: Path, kind: Any = plain_policy, config: Any = None, name: str = "adapter", **options: Any) -> Path:
        torch.manual_seed(4)
        config = config or peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, on purpose
            model = get_peft_model(kind(base), config)
            for key, parameter in model.named_parameters():
                if "lora_" in key or "ia3" in key or "modules_to_save" in key:
                    torch.nn.init.normal_(parameter, mean=float("ia3" in key), std=0.2)
            model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def trained(perl: Perl, command: str, base: Path, data: Path, *words: object) -> Path:
    perl(command, "-m", base, "-d", data / "train.jsonl", "-o", "run", *SHORT, *words)
    return Path("run")


# What comes out


def test_merged_policy_is_the_adapted_one_in_plain_transformers(
    perl: Perl, sft_run: Path, llama: Path, files: Files
) -> None:
    before = marks(llama), marks(sft_run)
    result = perl("merge", sft_run, "--output", "out")
    assert files(Path("out")) == PLAIN | RUN | {"generation_config.json", "chat_template.jinja"}
    merged = plain_policy(Path("out"))
    wanted = logits(PeftModel.from_pretrained(plain_policy(llama), str(sft_run)))
    assert merged.dtype == torch.float32
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert close(logits(merged), wanted)
    assert not close(logits(plain_policy(llama)), wanted, 0.01)
    assert AutoTokenizer.from_pretrained("out").chat_template == AutoTokenizer.from_pretrained(sft_run).chat_template
    record = read_record(Path("out"))
    assert (record.command, record.status, record.device["precision"]) == ("merge", "finished", "float32")
    assert set(record.metrics) == POLICY
    assert record.metrics["logit_difference"] < 1e-4
    assert record.metrics["adapter_effect"] > 0.01
    assert record.metrics["share_same_token"] == 1
    assert record.model["adapter"] == str(sft_run)
    assert record.model["fingerprint"] == fingerprint(str(llama))
    assert record.total_parameters == merged.num_parameters()
    line, first, *_ = result.stdout.splitlines()
    assert line.startswith("device: ") and line.endswith(", float32")
    assert first == f"adapter: {sft_run}, a policy on the base {llama}; merging into float32 weights."
    assert "Merged in float32: the largest logit difference from the adapted model is" in result.stdout
    assert "on 5 prompts; the likeliest next token is the same at 100.0% of positions." in result.stdout
    assert "Loaded afresh from out in plain transformers: the same logits, bit for bit." in result.stdout
    assert "Saved in out" in result.stdout
    assert (marks(llama), marks(sft_run)) == before


@pytest.mark.parametrize("kind", ["reward_run", "thumbs_run"])
def test_merged_reward_model_is_an_ordinary_classifier(
    kind: str, perl: Perl, llama: Path, files: Files, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    result = perl("merge", run, "--output", "out")
    assert files(Path("out")) == PLAIN | RUN | {"chat_template.jinja"}
    merged, tokenizer = plain_reward(Path("out")), AutoTokenizer.from_pretrained("out")
    whole = plain_reward(llama, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    assert (merged.config.num_labels, merged.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert close(logits(merged), logits(PeftModel.from_pretrained(whole, str(run))))
    record = read_record(Path("out"))
    assert set(record.metrics) == REWARD
    assert record.metrics["score_difference"] < 1e-4 < record.metrics["score_range"]
    assert "Merged in float32: the largest score difference from the adapted model is" in result.stdout
    assert "on 8 texts." in result.stdout


def test_reward_is_measured_on_the_rows_that_its_run_scored(perl: Perl, reward_run: Path) -> None:
    perl("merge", reward_run, "--output", "out")
    lines = (reward_run / "samples.jsonl").read_text().splitlines()[: merging.SCORED // 2]
    scores = [json.loads(line)[f"{name}_score"] for line in lines for name in ("chosen", "rejected")]
    assert read_record(Path("out")).metrics["score_range"] == pytest.approx(max(scores) - min(scores), abs=1e-4)


def test_only_the_policy_of_rl_is_merged(perl: Perl, rl_run: Path, llama: Path, files: Files) -> None:
    perl("merge", rl_run, "--output", "out")
    assert not any("anchor" in name or "adapter" in name for name in files(Path("out")))
    merged = logits(plain_policy(Path("out")))
    assert close(merged, logits(PeftModel.from_pretrained(plain_policy(llama), str(rl_run))))
    assert not close(merged, logits(PeftModel.from_pretrained(plain_policy(llama), str(rl_run / "anchor"))))


@pytest.mark.slow
def test_card_says_what_it_is_and_the_settings_run_it_again(perl: Perl, sft_run: Path) -> None:
    perl("merge", sft_run, "--output", "out", "--dtype", "bfloat16")
    _, front, text = Path("out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert f"The adapter {sft_run.name} added to the weights of its base" in text and str(sft_run) not in text
    settings = {"adapter": str(sft_run), "dtype": "bfloat16", "trust_remote_code": False, "output": "out"}
    assert yaml.safe_load(Path("out/settings.yaml").read_text()) == settings
    perl("merge", "--config", "out/settings.yaml", "--output", "again")
    assert marks(Path("out"))["model.safetensors"] == marks(Path("again"))["model.safetensors"]


@pytest.mark.slow
def test_merged_models_go_into_every_other_command(
    perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    perl("merge", sft_run, "--output", "policy")
    perl("merge", reward_run, "--output", "reward")
    perl("eval", "-m", "reward", "-d", rows["pairs"], "-o", "judged")
    before, after = read_record(reward_run).metrics, read_record(Path("judged")).metrics
    assert after["mean_margin"] == pytest.approx(before["mean_margin"], abs=1e-4)
    brief = ("--max-completion-length", "6", "--max-length", "128")
    perl("eval", "-m", "policy", "--reward", "reward", "-d", rows["prompts"], "-o", "measured", *brief)
    perl("eval", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "adapted", *brief)
    measured, wanted = read_record(Path("measured")).metrics, read_record(Path("adapted")).metrics
    assert measured["mean_reward"] == pytest.approx(wanted["mean_reward"], abs=1e-3)
    few = ("--max-steps", "1", "--num-generations", "2", "--per-device-train-batch-size", "4", "--lora-r", "2")
    perl("rl", "-m", "policy", "--reward", "reward", "-d", rows["prompts"], "-o", "rl", *few, *brief)
    assert read_record(Path("rl")).model["fingerprint"] == fingerprint("policy")
    assert read_record(Path("rl")).status == "finished"


# Precision


@pytest.mark.slow
@quiet_8bit
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("command", ["sft", "reward"])
def test_quantised_run_is_merged_into_the_stored_weights_and_the_shift_is_noted(
    command: str, bits: str, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    plain_policy(llama, dtype=torch.bfloat16).save_pretrained("base")
    AutoTokenizer.from_pretrained(llama).save_pretrained("base")
    data = rows[{"sft": "demonstrations", "reward": "pairs"}[command]]
    run = trained(perl, command, Path("base"), data, f"--load-in-{bits}bit")
    result = perl("merge", run, "--output", "out")
    record, stored = read_record(Path("out")), load_file("out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert record.device["precision"] == "bfloat16"
    note = f"The adapter was trained on its base in {bits}-bit and is merged into bfloat16 weights"
    options = {"dtype": torch.bfloat16}
    if command == "sft":
        assert set(record.metrics) == POLICY | {"logit_difference_as_trained", "share_same_token_as_trained"}
        assert f"{note}: its answers shift, logits by up to" in result.stdout
        assert record.metrics["logit_difference"] < record.metrics["logit_difference_as_trained"]
        wanted = logits(PeftModel.from_pretrained(plain_policy(llama, **options), str(run)))
        merged = plain_policy(Path("out"))
    else:
        assert set(record.metrics) == REWARD | {"score_difference_as_trained", "share_same_order_as_trained"}
        assert f"{note}: rewards shift by up to" in result.stdout
        pad = AutoTokenizer.from_pretrained("out").pad_token_id
        whole = plain_reward(llama, num_labels=1, pad_token_id=pad, **options)
        wanted = logits(PeftModel.from_pretrained(whole, str(run)))
        merged = plain_reward(Path("out"))
    assert getattr(merged.config, "quantization_config", None) is None
    assert close(logits(merged), wanted, 0.05 * max(float(row.abs().max()) for row in wanted))


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "trained_in"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_merged_weights_keep_the_precision_that_the_base_is_stored_in(
    stored: str, trained_in: str, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    plain_policy(llama, dtype=getattr(torch, stored)).save_pretrained("base")
    AutoTokenizer.from_pretrained(llama).save_pretrained("base")
    run = trained(perl, "sft", Path("base"), rows["demonstrations"], "--dtype", trained_in)
    result = perl("merge", run, "--output", "out")
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {getattr(torch, stored)}
    assert f"trained on its base in {trained_in} and is merged into {stored} weights" in result.stdout
    perl("merge", run, "--output", "asked", "--dtype", trained_in)
    assert plain_policy(Path("asked")).dtype == getattr(torch, trained_in)


def test_a_base_whose_config_names_no_dtype_is_merged_as_it_is_stored(
    perl: Perl, llama: Path, peft_adapter: Any
) -> None:
    plain_policy(llama, dtype=torch.bfloat16).save_pretrained("base")
    AutoTokenizer.from_pretrained(llama).save_pretrained("base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({name: config[name] for name in config if name != "dtype"}))
    perl("merge", peft_adapter(Path("base").resolve(), target_modules=["q_proj"]), "--output", "out")
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}


def test_another_precision_than_the_runs_is_compared_with_it(perl: Perl, sft_run: Path) -> None:
    result = perl("merge", sft_run, "--output", "out", "--dtype", "bfloat16")
    assert "trained on its base in float32 and is merged into bfloat16 weights: its answers shift" in result.stdout
    assert read_record(Path("out")).metrics["logit_difference_as_trained"] > 0


def test_float16_is_merged_on_a_cpu_too(perl: Perl, sft_run: Path) -> None:
    perl("merge", sft_run, "--output", "out", "--dtype", "float16")
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.float16}


@pytest.mark.slow
def test_without_bitsandbytes_the_merge_goes_on_and_says_what_it_could_not_compare(
    perl: Perl, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(perl, "sft", llama, rows["demonstrations"], "--load-in-4bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = perl("merge", run, "--output", "out")
    assert "Not compared with the model as trained, in 4-bit: --load-in-4bit needs bitsandbytes" in result.stdout
    assert set(read_record(Path("out")).metrics) == POLICY


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_adapter_without_a_record_is_merged_as_its_base_is_stored(
    stored: str, dtype: torch.dtype, perl: Perl, llama: Path, peft_adapter: Any
) -> None:
    plain_policy(llama, dtype=dtype).save_pretrained("base")
    AutoTokenizer.from_pretrained(llama).save_pretrained("base")
    perl("merge", peft_adapter(Path("base").resolve(), target_modules=["q_proj"]), "--output", "out")
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {dtype}
    assert read_record(Path("out")).device["precision"] == stored


# Other adapters and bases


@pytest.mark.slow
def test_gpt2_without_a_chat_template_merges(perl: Perl, gpt2: Path, rows: dict[str, Path]) -> None:
    """Its projections are Conv1D, whose weights lie the other way round."""
    for command, kind, load in (("sft", "demonstrations", plain_policy), ("reward", "pairs", plain_reward)):
        source = Path(f"{kind}.jsonl")
        texts = [json.loads(line) for line in (rows[kind] / "train.jsonl").read_text().splitlines()]
        flat = [{key: row[key][0]["content"] for key in row if isinstance(row[key], list)} for row in texts]
        source.write_text("".join(json.dumps(row) + "\n" for row in flat))
        perl(command, "-m", gpt2, "-d", source, "-o", command, *SHORT)
        perl("merge", command, "-o", f"{command}-out")
        merged = load(Path(f"{command}-out"))
        pad = AutoTokenizer.from_pretrained(command).pad_token_id
        options = {} if command == "sft" else {"num_labels": 1, "pad_token_id": pad}
        assert close(logits(merged), logits(PeftModel.from_pretrained(load(gpt2, **options), command)), 5e-3)


@pytest.mark.slow
def test_reward_without_samples_is_measured_on_texts_of_ours(
    perl: Perl, llama: Path, gpt2: Path, peft_adapter: Any
) -> None:
    for base, modules in ((llama, ["q_proj"]), (gpt2, ["c_attn"])):
        options = {"task_type": "SEQ_CLS", "target_modules": modules, "fan_in_fan_out": base == gpt2}
        adapter = peft_adapter(
            base, lambda b: plain_reward(b, num_labels=1, pad_token_id=PAD), name=base.name, **options
        )
        assert "on 5 texts." in perl("merge", adapter, "--output", f"{base.name}-out").stdout
        whole = plain_reward(base, num_labels=1, pad_token_id=PAD)
        wanted = logits(PeftModel.from_pretrained(whole, str(adapter)))
        assert close(logits(plain_reward(Path(f"{base.name}-out"))), wanted, 5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_tied_embeddings_that_an_adapter_changes_become_two_matrices(
    options: dict[str, Any], perl: Perl, llama: Path, peft_adapter: Any
) -> None:
    adapter = peft_adapter(llama, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = logits(PeftModel.from_pretrained(plain_policy(llama), str(adapter)))
    perl("merge", adapter, "--output", "out")
    merged = plain_policy(Path("out"))
    assert not merged.config.tie_word_embeddings
    assert close(logits(merged), wanted, 5e-3)


@pytest.mark.slow
def test_other_additive_adapters_merge_as_peft_can(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    for config in (
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(target_modules=["q_proj"]),  # no task: peft knows none
    ):
        adapter = peft_adapter(llama, config=config, name="kind")
        perl("merge", adapter, "--output", "out", *(["--overwrite"] if Path("out").exists() else []))
        wanted = logits(PeftModel.from_pretrained(plain_policy(llama), str(adapter)))
        assert close(logits(plain_policy(Path("out"))), wanted)
        shutil.rmtree(adapter)


# What is refused, before anything is written


@pytest.fixture
def refused(perl: Perl) -> Callable[..., str]:
    """Runs a merge that must be refused in two lines, with nothing written."""

    def run(*words: object) -> str:
        here = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        error: str = perl("merge", *words, code=2).stderr
        assert error.startswith("Error: ")
        assert error.count("\n") <= 2
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == here
        return error

    return run


def test_nothing_to_merge_is_refused(refused: Any, llama: Path, sft_run: Path) -> None:
    assert (
        refused() == "Error: ADAPTER is missing: nothing to merge\nHint: perl merge FOLDER, of a run or of an adapter\n"
    )
    assert f"{llama} is a model, not an adapter: there is nothing to merge" in refused(llama, "-o", "out")
    assert "The adapter ./nowhere does not exist" in refused("./nowhere", "-o", "out")
    assert "is a file" in refused(sft_run / "record.json", "-o", "out")


@pytest.mark.slow
def test_full_models_of_ours_are_refused(
    refused: Any, perl: Perl, llama: Path, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    perl("sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "-o", "full", "--full", "--max-steps", "1")
    assert "full was trained with --full: it is already an ordinary model" in refused("full", "-o", "out")
    perl("merge", sft_run, "-o", "merged")
    assert "merged is already merged" in refused("merged", "-o", "out")
    perl("eval", "-m", reward_run, "-d", rows["pairs"], "-o", "measured")
    assert "measured is a run of `perl eval` (finished) and contains no adapter" in refused("measured", "-o", "out")


def test_adapters_that_add_nothing_to_weights_are_refused(refused: Any, llama: Path, peft_adapter: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    stderr = refused(peft_adapter(llama, config=config), "-o", "out")
    assert "is PROMPT_TUNING, which adds nothing to weights: it can't be merged" in stderr


def test_adapter_for_another_task_is_refused(refused: Any, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    assert "is for TOKEN_CLS\nHint: perl merge accepts policies (CAUSAL_LM)" in refused(adapter, "-o", "out")


def test_base_that_is_stored_quantised_is_refused(refused: Any, llama: Path, peft_adapter: Any) -> None:
    shutil.copytree(llama, "base")
    adapter = peft_adapter(Path("base").resolve(), target_modules=["q_proj"])
    config = json.loads(Path("base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    Path("base/config.json").write_text(json.dumps(config))
    assert "is stored quantised: it has no 16-bit weights to merge into" in refused(adapter, "-o", "out")


def test_base_with_other_weights_than_the_records_is_refused(refused: Any, perl: Perl, llama: Path, rows: Any) -> None:
    shutil.copytree(llama, "base")
    run = trained(perl, "sft", Path("base").resolve(), rows["demonstrations"])
    weights = load_file("base/model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, "base/model.safetensors", {"format": "pt"})
    assert "run was trained on other weights (" in refused(run, "-o", "out")


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--overwrite"]], ids=" ".join)
def test_base_and_adapter_are_never_overwritten(
    words: list[str], refused: Any, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    """Nor a folder that holds them or lies in them; a `--full` run is a base that check_output alone would give up."""
    Path("models").mkdir()
    data = rows["demonstrations"] / "train.jsonl"
    perl("sft", "-m", llama, "-d", data, "-o", "models/base", "--full", "--max-steps", "1")
    perl("sft", "-m", Path("models/base").resolve(), "-d", data, "-o", "runs/sft", *SHORT)
    Path("link").symlink_to(Path("models/base").resolve())
    for place in ("models/base", "models", "models/base/new", "link", "link/new"):
        stderr = refused("runs/sft", "-o", place, *words)
        assert f"--output {place} overlaps the base {Path('models/base').resolve()}" in stderr
    for place in ("runs/sft", "runs", "runs/sft/merged", "./runs/../runs/sft"):
        assert "overlaps the adapter" in refused("runs/sft", "-o", place, *words)


def test_folder_named_like_the_bases_hub_id_is_refused(tmp_path: Path) -> None:
    source = {"base": "org/base", "adapter": "me/adapter"}
    for place in ("org/base", "me/adapter", str(tmp_path / "org" / "base")):
        with pytest.raises(PerlError, match="overlaps"):
            early.check_apart(place, **source)
    for place in ("org", "org/base-merged", "runs/base"):
        early.check_apart(place, **source)


@pytest.mark.slow
def test_output_that_is_not_empty_is_left_alone_unless_it_is_a_run_to_overwrite(
    refused: Any, perl: Perl, sft_run: Path, files: Files
) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "--output mine is not empty" in refused(sft_run, "-o", "mine")
    assert "is not empty and not a run of perlcli" in refused(sft_run, "-o", "mine", "--overwrite")
    perl("merge", sft_run, "-o", "out")
    Path("out/old.txt").write_text("of the run before")
    assert "--output out is not empty\nHint: --overwrite to replace it" in refused(sft_run, "-o", "out")
    perl("merge", sft_run, "-o", "out", "--overwrite")
    assert "old.txt" not in files(Path("out"))


def test_dry_run_reports_and_writes_nothing(perl: Perl, sft_run: Path, reward_run: Path) -> None:
    printed = perl("merge", sft_run, "-o", "out", "--dry-run").stdout
    assert f"adapter: {sft_run}, a policy on the base " in printed
    assert "merged weights: float32\noutput: out\nDry run: nothing was loaded, merged or written." in printed
    assert "a reward model on the base" in perl("merge", reward_run, "-o", "out", "--dry-run").stdout
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["adapter", "./adapter", "adapter/"])
def test_output_is_next_to_the_adapter_by_default(name: str, llama: Path, peft_adapter: Any, perl: Perl) -> None:
    peft_adapter(llama, target_modules=["q_proj"])
    assert "output: adapter-merged\n" in perl("merge", name, "--dry-run").stdout


def test_output_of_the_folder_itself_or_of_a_hub_id_by_default(
    llama: Path, peft_adapter: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(peft_adapter(llama, target_modules=["q_proj"]))
    assert f"output: {Path.cwd()}-merged\n" in perl("merge", ".", "--dry-run").stdout
    assert early.merged_folder("me/adapter") == "runs/adapter-merged"


# What fails on the way


def failed(perl: Perl, *words: object, code: int) -> tuple[str, Any]:
    error: str = perl("merge", *words, "-o", "out", code=code).stderr
    record = read_record(Path("out"))
    assert record.status == "failed"
    assert f"Error: {record.failure}" in error
    return error, record


def test_adapter_that_does_not_fit_its_base_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(
        {name: tensor for name, tensor in weights.items() if name != first}, adapter / "adapter_model.safetensors"
    )
    assert (
        "does not fit its base: it lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A"
        in failed(perl, adapter, code=2)[0]
    )


def test_adapter_with_more_than_its_base_has_place_for_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    """As one of a deeper model, or a reward adapter that was saved without its task: peft would leave parts out."""
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.score.weight"] = torch.zeros(1, 64)
    save_file(weights, adapter / "adapter_model.safetensors")
    error, _ = failed(perl, adapter, code=2)
    assert "which has no place for base_model.model.score.weight (1 in total)" in error


def test_weights_under_another_name_are_not_left_out(llama: Path, peft_adapter: Any) -> None:
    model = PeftModel.from_pretrained(plain_policy(llama), str(peft_adapter(llama, target_modules=["q_proj"])))
    saved = set(load_file("adapter/adapter_model.safetensors"))
    assert roles.left_out(model, roles.POLICY, saved) == set()
    assert roles.left_out(model, roles.POLICY, {name.replace("layers", "blocks") for name in saved}) == set()
    assert roles.left_out(
        model, roles.POLICY, saved | {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"}
    )


def test_broken_adapter_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert "has weights that are NaN or infinite: base_model.model" in failed(perl, adapter, code=2)[0]


def test_an_adapter_of_huge_numbers_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 0 + 1e30 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert "NaNs detected in the merged weights" in failed(perl, adapter, code=1)[0]


def test_an_adapter_of_integers_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert "must have floating-point numbers, not I8" in failed(perl, adapter, code=2)[0]


def test_an_adapter_without_weights_fails(perl: Perl, llama: Path, peft_adapter: Any) -> None:
    adapter = peft_adapter(llama, target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors\n" in failed(perl, adapter, code=2)[0]


def test_merge_that_gives_another_model_fails(
    perl: Perl, llama: Path, peft_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What peft alone does with an adapter of a tied output."""
    monkeypatch.setattr(merging, "untie", lambda model: None)
    monkeypatch.setattr(merging.warnings, "warn", lambda *words, **options: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error, record = failed(perl, peft_adapter(llama, target_modules=["lm_head"]), code=1)
    assert "The merged model is not the adapted one: logits differ by up to" in error
    assert record.metrics["logit_difference"] > 1
    assert not Path("out/model.safetensors").exists()


def test_folder_that_gives_other_logits_fails(perl: Perl, sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[bool] = []

    def load(*words: Any, before: Any = merging.load) -> Any:
        model = before(*words)
        if gone:  # the third that is loaded is the saved one, for the run's own precision is that of the merge
            next(model.parameters()).data[0] += 1
        gone.append(True)
        return model

    monkeypatch.setattr(merging, "load", load)
    error, _ = failed(perl, sft_run, code=1)
    assert "The saved model is not the merged one: loaded afresh, its logits differ by up to" in error


def test_hub_base_is_compared_with_the_record_once_it_is_loaded(
    perl: Perl, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = chain(["", "", ""], repeat("other"))  # before: the base's, the adapter's, the base's
    monkeypatch.setattr(weights_module, "fingerprint", lambda where: next(fingerprints))
    assert "was trained on other weights" in failed(perl, sft_run, code=2)[0]


def test_run_that_did_not_finish_is_noted(perl: Perl, sft_run: Path) -> None:
    shutil.copytree(sft_run, "run")
    record = json.loads(Path("run/record.json").read_text())
    Path("run/record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    told = perl("merge", "run", "--dry-run").stdout
    assert "The run run did not finish (interrupted): merging the adapter that it saved." in told


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(perl: Perl, llama: Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    run = trained(perl, "sft", llama, rows["demonstrations"], "--load-in-4bit")
    alive: list[Any] = []

    def load(*words: Any, before: Any = merging.load) -> Any:
        assert not [model for model in alive if model() is not None]
        model = before(*words)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(merging, "load", load)
    perl("merge", run, "-o", "out")
    assert len(alive) == 3  # as trained, merged, loaded afresh


def test_roles_are_not_needed_to_load_what_was_merged(perl: Perl, reward_run: Path) -> None:
    """A batch that is padded is read at each row's last token, by the saved config alone."""
    perl("merge", reward_run, "--output", "out")
    model, tokenizer = plain_reward(Path("out")).eval(), AutoTokenizer.from_pretrained("out")
    ids, mask = padded(ROWS, tokenizer.pad_token_id)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert batch.tolist() == pytest.approx([float(row[0]) for row in logits(model)], abs=1e-5)


def test_merge_that_adds_nothing_fails(perl: Perl, sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every change of a 16-bit weight is below its rounding."""
    original = merging.untie

    def careless(model: Any) -> None:
        original(model)
        monkeypatch.setattr(merging, "note_difference", lambda *_: None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 1e-30

    monkeypatch.setattr(merging, "untie", careless)
    result = perl("merge", sft_run, "-o", "out", "--dtype", "bfloat16", code=1)
    assert "Error: Merging changed no weight: in bfloat16 the adapter is lost to rounding" in result.stderr


def test_value_model_of_a_run_is_not_a_policy(perl: Perl, sft_run: Path) -> None:
    shutil.copytree(sft_run, "run/value")
    Path("run/value/value_head.safetensors").touch()
    result = perl("merge", "run/value", code=2)
    assert "Error: run/value is the value model of a run, not a policy" in result.stderr
    assert "Hint: name the run: run" in result.stderr
