"""What `--reward` names: found or refused before weights load, and given exactly what the policy wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perlcli import data, settings
from perlcli.data import Prompt, Renderer
from perlcli.errors import PerlError
from perlcli.model import tokenizers, weights
from perlcli.model.sources import locate
from perlcli.training import policies, reward_model, rewards
from perlcli.training.prepare import Prepared, prepare
from perlcli.training.rewards import TextReward, TokenReward, find

CHAT = [{"role": "user", "content": "a large latte"}]
Ids = list[int]


def planned(folder: Path, rows: dict[str, Path], **given: Any) -> Prepared:
    """A checked `perl rl` on these settings."""
    values = {"model": str(folder), "data": str(rows["prompts"]), "lora_r": 4, **given}
    return prepare(settings.build(settings.Rl, values))


@pytest.fixture
def prepared(llama: Path, rows: dict[str, Path]) -> Prepared:
    return planned(llama, rows)


class Spy:
    """A scorer that keeps what it was given, and scores by length."""

    def __init__(self) -> None:
        self.seen: list[Ids] = []

    def __call__(self, rows: list[Ids], size: int | None = None, done: Any = None, groups: Any = None) -> list[float]:
        self.seen += rows
        return [float(len(row)) for row in rows]


# Found


def test_missing_reward_is_refused(prepared: Prepared) -> None:
    with pytest.raises(PerlError, match=r"^--reward is missing: .*\nHint: train one with `perl reward`"):
        rewards.find_all(prepared)


def test_function_is_found_in_the_working_directory(prepared: Prepared, module: Callable[[str], str]) -> None:
    name = module("def short(completions, **columns): return [1.0 for _ in completions]")
    assert find(f"{name}:short", prepared).function(completions=["a", "b"]) == [1.0, 1.0]


def test_module_that_is_missing_is_an_error(prepared: Prepared) -> None:
    with pytest.raises(PerlError, match=r"^--reward no\.such:f: can't import no\.such: ModuleNotFoundError"):
        find("no.such:f", prepared)


def test_module_that_fails_is_an_error(prepared: Prepared, module: Callable[[str], str]) -> None:
    name = module("1 / 0")
    with pytest.raises(PerlError, match=f"can't import {name}: ZeroDivisionError: division by zero"):
        find(f"{name}:f", prepared)


def test_error_for_a_missing_function_suggests_the_nearest(prepared: Prepared, module: Callable[[str], str]) -> None:
    name = module("def reward(completions): ...\nreword = 3")
    with pytest.raises(PerlError, match=f"{name} has reword = 3\nHint: Did you mean reward\\?"):
        find(f"{name}:reword", prepared)


def test_language_model_is_not_a_reward(prepared: Prepared, llama: Path) -> None:
    with pytest.raises(PerlError, match=f"^--reward {llama} is a language model, not a reward model\nHint: .*perl rew"):
        find(str(llama), prepared)


def test_adapter_without_a_head_is_not_a_reward(prepared: Prepared, sft_run: Path) -> None:
    with pytest.raises(PerlError, match=f"^--reward {sft_run} is an adapter without a reward head, not a reward"):
        find(str(sft_run), prepared)


def test_folder_that_is_missing_is_an_error(prepared: Prepared) -> None:
    with pytest.raises(PerlError, match=r"^--reward runs/no/reward does not exist"):
        find("runs/no/reward", prepared)


def test_adapter_with_a_head_of_several_layers_is_found(prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    """RoBERTa's, for example, which scores on a base of its own."""
    shutil.copytree(reward_run, tmp_path / "deep")
    path = tmp_path / "deep" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("score.weight"))
    deep = name.replace("score.weight", "classifier")
    head = {f"{deep}.dense.weight": torch.ones(8, 64), f"{deep}.out_proj.weight": torch.ones(1, 8)}
    save_file({key: value for key, value in tensors.items() if key != name} | head, path, {"format": "pt"})
    found = find(str(tmp_path / "deep"), prepared)
    assert found.apart is not None and "its head has more than one weight" in found.apart


# Shared or separate


def test_reward_adapter_of_the_same_base_shares_it(prepared: Prepared, reward_run: Path) -> None:
    assert find(str(reward_run), prepared).is_shared


def test_equal_weights_elsewhere_are_the_same_base(
    llama: Path, rows: dict[str, Path], reward_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "moved")
    assert find(str(reward_run), planned(tmp_path / "moved", rows)).is_shared


def test_base_that_trains_cannot_be_shared(llama: Path, rows: dict[str, Path], reward_run: Path) -> None:
    full = prepare(settings.build(settings.Rl, {"model": str(llama), "data": str(rows["prompts"]), "full": True}))
    assert not find(str(reward_run), full).is_shared


def test_adapter_with_biases_of_the_base_is_not_shared(prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    """peft would write them into the policy's base."""
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    (tmp_path / "reward" / "adapter_config.json").write_text(json.dumps(config | {"bias": "lora_only"}))
    assert not find(folder, prepared).is_shared


def test_full_classifier_is_not_shared(prepared: Prepared, classifier: Path) -> None:
    reward = find(str(classifier), prepared)
    assert not reward.is_shared
    assert reward.source is not None


def copy_with(reward_run: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy of a reward run whose record was changed."""
    shutil.copytree(reward_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


def test_reward_of_another_chat_template_is_refused(
    llama: Path, rows: dict[str, Path], reward_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(PerlError, match="was trained with another tokenizer or chat template"):
        find(str(reward_run), planned(tmp_path / "other", rows))


def test_reward_without_a_record_is_compared_with_the_tokenizer_in_its_folder(
    llama: Path, rows: dict[str, Path], reward_run: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"  # as trl and peft leave it
    shutil.copytree(reward_run, foreign, ignore=shutil.ignore_patterns("checkpoints", "record.json"))
    assert find(str(foreign), planned(llama, rows)).is_shared
    template = foreign / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(PerlError, match="was trained with another tokenizer or chat template"):
        find(str(foreign), planned(llama, rows))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (foreign / name).unlink()
    assert find(str(foreign), planned(llama, rows)).is_shared  # it doesn't tell: the base's tokenizer then


def test_reward_of_other_weights_under_the_same_name_is_refused(
    prepared: Prepared, reward_run: Path, tmp_path: Path
) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: record["model"].update(fingerprint="old"))
    mark = weights.fingerprint(prepared.source.base)
    with pytest.raises(PerlError, match=rf"was trained on other weights \(old\) than those of .*llama \({mark}\)"):
        find(folder, prepared)


def test_reward_of_another_precision_without_a_proof_is_noted(
    llama: Path, rows: dict[str, Path], reward_run: Path, tmp_path: Path
) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    (tmp_path / "reward" / "proof.json").unlink()
    prepared = planned(llama, rows, load_in_4bit=True)
    find(folder, prepared)
    note = prepared.run.record.notes[-1]
    assert all(part in note for part in (folder, "float32", "4-bit", "shift slightly"))


def test_reward_of_another_precision_is_refused_under_strict(
    llama: Path, rows: dict[str, Path], reward_run: Path
) -> None:
    prepared = planned(llama, rows, load_in_4bit=True, strict=True)
    with pytest.raises(PerlError, match=r"^--strict: .* in float32 but is used in 4-bit\nHint: load the base"):
        find(str(reward_run), prepared)


def test_reward_of_the_same_precision_is_not_noted(prepared: Prepared, reward_run: Path) -> None:
    find(str(reward_run), prepared)
    assert prepared.run.record.notes == []


def test_reward_of_a_run_that_failed_is_noted(prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    find(copy_with(reward_run, tmp_path / "reward", lambda record: record.update(status="failed")), prepared)
    assert prepared.run.record.notes[-1].endswith("comes from a run that did not finish (failed).")


def test_reward_without_a_record_is_taken(prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(reward_run / name, tmp_path)
    assert find(str(tmp_path), prepared).is_shared


# Given what was written


def ended(render: Renderer, text: str) -> Ids:
    return [*render.tokenizer(text, add_special_tokens=False)["input_ids"], render.tokenizer.eos_token_id]


def odd(render: Renderer, text: str) -> Ids:
    """A tokenization that encoding would never give: a token a byte."""
    return [token for letter in text for token in render.tokenizer(letter)["input_ids"]]


def test_reward_reads_the_very_tokens_that_were_written(render: Renderer) -> None:
    spy, strange = Spy(), odd(render, "latte")
    assert render.tokenizer(render.text(strange))["input_ids"] != strange
    rows = [Prompt(CHAT), Prompt(CHAT), Prompt("a large latte")]
    written = [[*strange, render.tokenizer.eos_token_id], strange, ended(render, "latte")]
    scores = TokenReward(spy, render, 2)(rows, written)
    (newline,) = render.tokenizer("\n")["input_ids"]
    start, plain = (render.prompt_ids(prompt) for prompt in (CHAT, [{"role": "user", "content": "a large latte"}]))
    assert spy.seen == [[*start, *written[0], newline], [*start, *strange], [*plain, *written[2], newline]]
    assert scores == [len(row) for row in spy.seen]


@pytest.mark.parametrize("prompt", [CHAT, "order: "])
def test_reward_scores_what_it_would_have_been_trained_on(
    prompt: Any, llama: Path, rows: dict[str, Path], render: Renderer, tmp_path: Path, write: Any
) -> None:
    """Completions as the policy writes them give the ids of the same completions in training rows."""
    says = {"chosen": "latte, size large", "rejected": "mocha"}
    chat = not isinstance(prompt, str)
    row = {k: [{"role": "assistant", "content": v}] if chat else v for k, v in says.items()}
    source = write(tmp_path / "pairs.jsonl", [{"prompt": prompt, **row}])
    prepared = prepare(settings.build(settings.Reward, {"model": str(llama), "data": str(source)}))
    (trained,) = reward_model.tokens(data.load(str(source), "reward"), prepared, "train")
    spy = Spy()
    TokenReward(spy, render, 8)([Prompt(prompt)] * 2, [ended(render, says["chosen"]), ended(render, says["rejected"])])
    assert spy.seen == [trained["chosen_ids"], trained["rejected_ids"]]


def test_text_reward_reads_its_own_tokens(render: Renderer, gpt2: Path) -> None:
    tokenizer = tokenizers.load_tokenizer(locate(str(gpt2)))
    spy = Spy()
    cut = render.tokenizer(" tall")["input_ids"]
    prompts = [Prompt("a latte"), Prompt("a latte"), Prompt(CHAT)]
    TextReward(spy, tokenizer, render, 8)(prompts, [ended(render, " tall"), cut, ended(render, "tall")])
    own = tokenizer("a latte tall")["input_ids"]
    assert spy.seen == [
        [*own, tokenizer.eos_token_id],
        own,  # cut off: no end
        tokenizer("a large latte\ntall")["input_ids"],  # no chat template: as classifiers of a pair of texts read it
    ]


def test_text_reward_uses_its_own_chat_template(render: Renderer, gpt2: Path) -> None:
    tokenizer = tokenizers.load_tokenizer(locate(str(gpt2)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    spy = Spy()
    cut = render.tokenizer("tall")["input_ids"]
    TextReward(spy, tokenizer, render, 8)([Prompt(CHAT)] * 2, [ended(render, "tall"), cut])
    texts = [tokenizer.decode(ids) for ids in spy.seen]
    assert texts == [f"[user]a large latte{tokenizer.eos_token}[assistant]tall{end}" for end in ("<|endoftext|>", "")]


# Attached


def attached(name: Path | str, prepared: Prepared) -> Any:
    model = policies.start(prepared)
    return model, rewards.attach(find(str(name), prepared), model, prepared, 4)


def test_shared_reward_adds_an_adapter_and_says_so(prepared: Prepared, reward_run: Path) -> None:
    model, score = attached(reward_run, prepared)
    assert set(model.peft_config) == {"default", "reward"}
    assert isinstance(score, TokenReward)
    assert "an adapter on the policy's base" in prepared.run.record.notes[-1]


def test_classifier_is_loaded_in_addition_and_noted(prepared: Prepared, classifier: Path) -> None:
    model, score = attached(classifier, prepared)
    assert set(model.peft_config) == {"default"}
    assert isinstance(score, TextReward)
    assert f"{classifier}, on its own base ({classifier}), loaded in addition" in prepared.run.record.notes[-1]
    row = Prompt("a latte ")
    assert score([row], [prepared.renderer.tokenizer("tall")["input_ids"]])[0] != 0


def test_separate_adapter_with_the_same_tokenizer_reads_tokens(
    llama: Path, rows: dict[str, Path], reward_run: Path
) -> None:
    full = prepare(settings.build(settings.Rl, {"model": str(llama), "data": str(rows["prompts"]), "full": True}))
    _, score = attached(reward_run, full)
    _, shared = attached(reward_run, planned(llama, rows))
    assert isinstance(score, TokenReward)
    prompts, written = [Prompt(CHAT), Prompt(CHAT)], [[5, 6, 2], [7, 8, 9]]
    assert score(prompts, written) == shared(prompts, written)


def test_classifier_without_a_tokenizer_is_an_error(prepared: Prepared, classifier: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(classifier / name, tmp_path)
    with pytest.raises(PerlError, match="has no readable tokenizer"):
        attached(tmp_path, prepared)


# Several


def test_several_rewards_are_weighted_and_reported_by_name(prepared: Prepared, render: Renderer) -> None:
    parts = {"long": lambda rows, ids: [1.0, 2.0], "short": lambda rows, ids: [10.0, 0.0]}
    rows, written = [Prompt("a", {}), Prompt("b", {})], [[1, 2], [1]]
    scored = rewards.Weighted(parts, (1.0, -0.5))(rows, written)
    assert scored.total == [-4.0, 2.0]
    assert scored.parts == {"long": [1.0, 2.0], "short": [10.0, 0.0]}
    taxed = rewards.Weighted(parts, (1.0, -0.5), penalty=3.0, ended=lambda ids: ids[-1] == 2)(rows, written)
    assert taxed.total == [-4.0, -1.0]


def test_rewards_share_one_base_each_with_its_own_adapter(
    llama: Path, rows: dict[str, Path], reward_run: Path, thumbs_run: Path
) -> None:
    names = (str(reward_run), str(thumbs_run))
    prepared = planned(llama, rows, reward=names, reward_weights=(1.0, 2.0))
    model: Any = policies.start(prepared)
    written = [[40, 41], [50]]
    prompts = [Prompt("a latte", {}), Prompt("a mocha", {})]
    both = rewards.attach_all(rewards.find_all(prepared), model, prepared, 8)(prompts, written)
    for name, part in zip(names, both.parts.values(), strict=True):
        alone: Any = policies.start(prepared)
        assert rewards.attach(find(name, prepared), alone, prepared, 8)(prompts, written) == part
    first, second = both.parts.values()
    assert both.total == [a + 2 * b for a, b in zip(first, second, strict=True)]
    assert list(both.parts) == ["reward", "thumbs"]


def test_rewards_of_equal_folder_names_keep_their_full_names() -> None:
    assert rewards._short_names(["a/reward", "b/other/"]) == ["reward", "other"]
    assert rewards._short_names(["a/reward", "b/reward"]) == ["a/reward", "b/reward"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--reward-weights", "1,2"], "--reward-weights has 2 weights for 1 --reward"),
        (["--reward-weights", "0"], "--reward-weights are all 0"),
        (["--reward-weights", "nan"], "--reward-weights must be a finite number of at most"),
        (["--reward-weights", "one"], "--reward-weights must be numbers, comma-separated, not one"),
        (["--reward", "SAME"], "is given twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    words: list[str], told: str, perl: Any, llama: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    given = [str(reward_run) if word == "SAME" else word for word in words]
    common = ("rl", "-m", llama, "--reward", reward_run, "-d", rows["prompts"], "-o", "run")
    assert told in perl(*common, *given, code=2).stderr


@pytest.mark.slow
def test_run_with_two_rewards_reports_each(
    perl: Any, sft_run: Path, reward_run: Path, thumbs_run: Path, rows: dict[str, Path]
) -> None:
    words = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
    more = ("--learning-rate", "1e-2", "--max-completion-length", "6", "--max-length", "128")
    both = ("--reward", reward_run, "--reward", thumbs_run, "--reward-weights", "1,-1")
    perl("rl", "-m", sft_run, *both, "-d", rows["prompts"], "-o", "run", *words, *more)
    record = json.loads(Path("run/record.json").read_text())
    metrics = record["metrics"]
    assert metrics["reward"] == pytest.approx(metrics["rewards/reward/mean"] - metrics["rewards/thumbs/mean"], abs=1e-5)
    assert record["memory"]["base_copies"] == 1
    assert {"reward reward", "reward thumbs"} < set(record["memory"]["mb"])
    assert record["guards"]["unchanged"] == ["anchor", "base", "reward", "reward2"]


# The proof


def test_reward_that_scores_as_trained_passes_its_proof(prepared: Prepared, reward_run: Path) -> None:
    model: Any = policies.start(prepared)
    rewards.attach(find(str(reward_run), prepared), model, prepared, 8)
    assert prepared.run.record.guards == {f"shift of {reward_run}": 0}


def test_reward_whose_weights_changed_fails_its_proof(prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    path = tmp_path / "reward" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(PerlError, match=r"proof rows differently than after its training: rewards moved"):
        rewards.attach(find(folder, prepared), policies.start(prepared), prepared, 8)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [[1]], "scores": [1, 2]}', '{"rows": [["a"]], "scores": [1]}'])
def test_proof_that_cannot_be_read_is_an_error(text: str, prepared: Prepared, reward_run: Path, tmp_path: Path) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    (tmp_path / "reward" / "proof.json").write_text(text)
    with pytest.raises(PerlError, match=r"proof\.json can't be read"):
        rewards.attach(find(folder, prepared), policies.start(prepared), prepared, 8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record["device"].update(name="a GPU"), "was trained on another device: on"),
        (lambda record: record["versions"].update(torch="2.0", peft="0.1"), "was trained with another torch and peft"),
    ],
)
def test_shift_elsewhere_is_noted_however_large(
    change: Any, told: str, prepared: Prepared, reward_run: Path, tmp_path: Path
) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", change)
    path = tmp_path / "reward" / "proof.json"
    proof = json.loads(path.read_text())
    path.write_text(json.dumps({**proof, "scores": [score + 1 for score in proof["scores"]]}))
    rewards.attach(find(folder, prepared), policies.start(prepared), prepared, 8)
    assert told in prepared.run.record.notes[-1]
    assert "shift by up to 1 (" in prepared.run.record.notes[-1]


def test_rounding_of_another_cpu_with_the_same_name_is_accepted(
    prepared: Prepared, reward_run: Path, tmp_path: Path
) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    path = tmp_path / "reward" / "proof.json"
    proof = json.loads(path.read_text())
    path.write_text(json.dumps({**proof, "scores": [score * (1 + 2e-4) for score in proof["scores"]]}))
    rewards.attach(find(folder, prepared), policies.start(prepared), prepared, 8)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_proof_by_the_models_own_head_is_accepted(
    how: dict[str, Any], llama: Path, rows: dict[str, Path], reward_run: Path, tmp_path: Path
) -> None:
    """As perlcli wrote it before it took the head's product in float32."""
    prepared = planned(llama, rows, **how)
    folder = copy_with(
        reward_run, tmp_path / "reward", lambda record: record["device"].update(prepared.run.record.device)
    )
    path = tmp_path / "reward" / "proof.json"
    proof = json.loads(path.read_text())
    model: Any = reward_model.load(locate(folder), prepared.settings.model).model
    ids, mask = tokenizers.padded(proof["rows"], prepared.tokenizer.pad_token_id)
    with torch.no_grad():
        scores = model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
    path.write_text(json.dumps({**proof, "scores": scores}))
    rewards.attach(find(folder, prepared), policies.start(prepared), prepared, 8)
    assert 0 < prepared.run.record.guards[f"shift of {folder}"] < 0.01


@pytest.mark.parametrize("command", ["eval", "rl"])
def test_a_folder_whose_chat_template_was_changed_is_refused(
    command: str, perl: Any, reward_run: Path, sft_run: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    original = {"eval": reward_run, "rl": sft_run}[command]
    folder = tmp_path / "changed"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = {"eval": ("--data", rows["pairs"]), "rl": ("--data", rows["prompts"], "--reward", reward_run)}[command]
    result = perl(command, "--model", folder, *words, "--output", "run", code=2)
    assert "was trained with another tokenizer or chat template" in result.stderr


def test_evaluation_of_a_reward_model_checks_its_proof(
    perl: Any, reward_run: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_with(reward_run, tmp_path / "reward", lambda record: None)
    path = tmp_path / "reward" / "proof.json"
    proof = json.loads(path.read_text())
    path.write_text(json.dumps({**proof, "scores": [score + 1 for score in proof["scores"]]}))
    words = ("--data", rows["pairs"], "--max-length", "128", "--output", "eval")
    assert "scores its own proof rows differently" in perl("eval", "--model", folder, *words, code=2).stderr
    perl("eval", "--model", reward_run, *words, "--overwrite")
