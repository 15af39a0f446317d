"""Recipes: what each holds, how its values lie under the user's, and every stage up to the download."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlcli import coffee, data, recipes, settings
from perlcli.commands import reward as reward_module
from perlcli.commands import rl, sft
from perlcli.errors import PerlError
from perlcli.recipes import FOLDER, STAGES, TEXTS, fill, find, names, read
from perlcli.settings import COMMANDS, DataSettings, build, check, flat, resolve
from perlcli.settings.yaml import read_config

Perl = Callable[..., Any]
Write = Callable[[Path, list[dict[str, Any]]], Path]

NAMES = ("androidcontrol", "bolt", "hh-harmless", "shp", "taskmaster-coffee", "taskmaster-ticketing", "tldr")
EACH = pytest.mark.parametrize("name", NAMES)
PARTS = [(name, stage) for name in NAMES for stage in read(name).stages]
ARGUMENTS = {"sft": sft.trainer_args, "reward": reward_module.trainer_args, "rl": rl.trainer_args}


def resolved(stage: str, **given: Any) -> Any:
    """What a command runs with under a recipe."""
    kind = COMMANDS[stage]
    return resolve(build(kind, fill(kind, given)), {})


def values(stage: str, **given: Any) -> dict[str, Any]:
    return flat(resolved(stage, **given))


@pytest.fixture
def recipe() -> Callable[[str], str]:
    """Writes a recipe of the user's."""

    def write(text: str) -> str:
        Path("mine.yaml").write_text(text, encoding="utf-8")
        return "mine.yaml"

    return write


# What each recipe holds


def test_the_papers_tasks_are_there() -> None:
    assert tuple(names()) == NAMES


@EACH
def test_a_recipe_says_what_it_is_and_what_it_needs(name: str) -> None:
    content = yaml.safe_load(find(name).read_text(encoding="utf-8"))
    assert tuple(content) == (*TEXTS, *read(name).stages)
    assert all(content[key].strip() for key in TEXTS)
    assert f"{recipes.read(name).title}" in recipes.table()
    assert len(content["title"]) <= 100


@EACH
def test_every_value_tells_where_it_comes_from(name: str) -> None:
    lines = find(name).read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.split(":")[0] in STAGES)
    given = [line for line in lines[start:] if re.match(r"  \w", line)]
    assert len(given) == sum(map(len, read(name).stages.values()))
    assert not [line for line in given if not re.search(r" # \w", line)]


@pytest.mark.parametrize(("name", "stage"), PARTS)
def test_every_stage_is_one_that_its_command_takes(name: str, stage: str) -> None:
    found = resolved(stage, recipe=name)
    check(found)
    if stage in ARGUMENTS:
        ARGUMENTS[stage](found)


@EACH
def test_stages_find_each_other(name: str) -> None:
    stages = read(name).stages
    left = {part["output"] for each in NAMES for part in read(each).stages.values() if "output" in part}
    for stage in ("rl", "eval"):
        assert {stages[stage]["model"], *stages[stage]["reward"]} <= left
    assert stages["eval"]["model"] == stages["rl"]["output"] == f"runs/{name}/rl"
    if "sft" in stages:
        assert stages["sft"]["model"] == stages["reward"]["model"]
        assert (stages["rl"]["model"], *stages["rl"]["reward"]) == (f"runs/{name}/sft", f"runs/{name}/reward")


@EACH
def test_rl_is_as_the_paper_has_it(name: str) -> None:
    found = values("rl", recipe=name)
    sees = name == "androidcontrol"
    episodes = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert (found["algorithm"], found["beta"], found["num_generations"]) == ("reinforce", 0.05, 1)
    assert (episodes, found["temperature"]) == ((32, 0.9) if sees else (128, 0.7))
    assert found["learning_rate"] == (1e-4 if name == "bolt" else 1e-5)


@EACH
def test_reward_is_as_the_paper_has_it(name: str) -> None:
    if name == "bolt":
        assert "reward" not in read(name).stages
        return
    found = values("reward", recipe=name)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 128
    assert found["learning_rate"] == (2e-4 if name == "hh-harmless" else 1e-4)
    assert found["lora_target_modules"] == "attention"


# Each stage, up to the download


def turn(text: str) -> str:
    return json.dumps([{"role": "agent", "text": "Hello"}, {"role": "user", "text": text}])


POST = "SUBREDDIT: r/tea\n\nTITLE: a cup\n\nPOST: I like tea.\n\nTL;DR:"
TALK = "\n\nHuman: Hello\n\nAssistant: "
ACTION = '{"role": "agent", "text": "Hot?"}'
THUMBS = [{"context": turn("a latte"), "generation": ACTION, "reward": reward} for reward in (0.0, 1.0)]
STEPS = [{"goal": "a call", "screen": "button Call", "action": {"action_type": "click"}, "label": n} for n in (0, 1)]
COMMENTS = {"post_id": "a", "history": "Tea?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1}
# Rows of the shape that each source has; a stage's own where the recipe has several sources.
SHAPES: dict[str, Any] = {
    "androidcontrol": STEPS,
    "bolt": [{"prompt": "A: are you there yet?\nB: five minutes\n\nTL;DR:"}],
    "hh-harmless": [{"chosen": TALK + "Hi.", "rejected": TALK + "Go."}],
    "shp": [COMMENTS],
    "taskmaster-coffee": THUMBS,
    "taskmaster-ticketing": THUMBS,
    "tldr": [{"prompt": POST, "completion": " Tea is good."}],
    "tldr reward": [{"prompt": POST, "chosen": " Tea is good.", "rejected": " No."}],
}


@pytest.fixture(scope="module")
def models(llama: Path, sft_run: Path, reward_run: Path) -> dict[str, list[object]]:
    """What each stage starts from."""
    policy = ["--model", sft_run, "--reward", reward_run]
    return {"sft": ["--model", llama], "reward": ["--model", llama], "rl": policy, "eval": policy}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), PARTS)
def test_a_stage_resolves_with_local_rows_of_its_sources_shape(
    name: str, stage: str, perl: Perl, write: Write, models: dict[str, list[object]]
) -> None:
    rows = write(Path("rows.jsonl"), SHAPES.get(f"{name} {stage}", SHAPES[name]))
    said = perl(stage, "--recipe", name, *models[stage], "--data", rows, "--dry-run").stdout
    assert f"recipe: {name}\n" in said
    assert stage == "eval" or f"output: {values(stage, recipe=name)['output']}\n" in said
    assert not Path("runs").exists()


def test_the_download_is_where_a_recipe_ends_offline(perl: Perl, llama: Path) -> None:
    said = perl("sft", "--recipe", "tldr", "--model", llama, "--dry-run", code=2).stderr
    assert said.startswith(
        "Error: --data trl-lib/tldr is not a local file or folder, and reading it from the Hub failed"
    )


# Where its values lie


def test_the_order_is_command_line_config_recipe_default(
    recipe: Callable[[str], str], perl: Perl, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(sft, "run", given.append)
    mine = recipe(f"sft: {{lora_r: 1, lora-alpha: 1, seed: 1, model: {coffee.BASE}, data: coffee}}")
    Path("own.yaml").write_text("lora_r: 2\nlora_alpha: 2")
    perl("sft", "--recipe", mine, "--config", "own.yaml", "--lora-r", 3)
    found = flat(resolve(given[-1], {}))
    assert (found["lora_r"], found["lora_alpha"], found["seed"], found["lora_dropout"]) == (3, 2, 1, 0.0)
    assert (found["recipe"], found["model"]) == (mine, str(coffee.BASE))
    Path("own.yaml").write_text("recipe: mine.yaml\nseed: 2")
    perl("sft", "--config", "own.yaml")
    assert flat(given[-1])["lora_r"] == 1
    assert flat(given[-1])["seed"] == 2


def test_the_users_length_is_the_length(recipe: Callable[[str], str]) -> None:
    mine = recipe("sft: {max_steps: 5000}\nreward: {num_train_epochs: 3}")
    assert values("sft", recipe=mine)["max_steps"] == 5000
    found = values("sft", recipe=mine, num_train_epochs=2.0)
    assert (found["max_steps"], found["num_train_epochs"]) == (None, 2.0)
    found = values("reward", recipe=mine, max_steps=7)
    assert (found["max_steps"], found["num_train_epochs"]) == (7, 1.0)


def test_the_users_data_is_all_the_data() -> None:
    assert values("reward", recipe="tldr")["eval_data"] == "trl-lib/tldr-preference"
    assert values("reward", recipe="tldr", data="pairs.jsonl")["eval_data"] is None
    assert values("reward", recipe="tldr", data="pairs.jsonl", eval_data="dev.jsonl")["eval_data"] == "dev.jsonl"


@pytest.mark.parametrize(("name", "stage"), PARTS)
def test_every_stage_names_the_format_of_its_rows(name: str, stage: str, write: Write) -> None:
    rows = write(Path("rows.jsonl"), SHAPES.get(f"{name} {stage}", SHAPES[name]))
    wanted = values(stage, recipe=name)["data_format"]
    use = {"eval": "rl"}.get(stage, stage)
    assert data.load(str(rows), use, options=DataSettings(data_format=wanted)).report.format == wanted
    assert data.load(str(rows), use).report.format == wanted


def test_full_tuning_takes_neither_adapter_nor_learning_rate() -> None:
    found = values("reward", recipe="tldr", full=True)
    check(resolved("reward", recipe="tldr", full=True))
    assert (found["lora_r"], found["lora_dropout"], found["learning_rate"]) == (None, None, 1e-5)
    assert values("reward", recipe="tldr", full=True, learning_rate=3e-5)["learning_rate"] == 3e-5


def test_fields_of_trl_go_one_by_one(recipe: Callable[[str], str]) -> None:
    mine = recipe("sft: {set: [lr_scheduler_type=cosine, warmup_steps=2]}")
    assert values("sft", recipe=mine)["set"] == ("lr_scheduler_type=cosine", "warmup_steps=2")
    assert values("sft", recipe=mine, set=("warmup_steps=3",))["set"] == ("lr_scheduler_type=cosine", "warmup_steps=3")


def test_null_in_a_config_unsets_what_a_recipe_has() -> None:
    assert values("reward", recipe="tldr", eval_data=None)["eval_data"] is None


@pytest.mark.slow
def test_nothing_of_the_embedded_default_mixes_in(recipe: Callable[[str], str], perl: Perl) -> None:
    said = perl("sft", "--recipe", recipe("sft: {lora_r: 2}"), "--data", "coffee", "--dry-run").stdout
    assert "LoRA r=2, alpha=4" in said
    assert re.search(r"1 epoch\(s\), \d+ steps, of 8 rows, learning rate 0.0002 \(linear\)", said)
    assert coffee.SETTINGS["sft"]["learning_rate"] != 2e-4


# What is wrong with a recipe


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rl: {betta: 0.1}", "mine.yaml, rl: unknown key: betta. Did you mean beta?"),
        ("sft: {beta: 0.1}", "mine.yaml, sft: unknown key: beta."),
        ("rll: {beta: 0.1}", "mine.yaml: unknown key: rll. Did you mean rl?"),
        ("merge: {adapter: x}", "mine.yaml: unknown key: merge."),
        ("tilte: x", "mine.yaml: unknown key: tilte. Did you mean title?"),
        ("3: x", "mine.yaml: unknown key: 3."),
        ("title: 3", "mine.yaml: title must be text"),
        ("rl: {beta: much}", "mine.yaml, rl: beta must be a number, not 'much'"),
        ("rl: [1]", "mine.yaml, rl: must contain `name: value` lines, not [1]"),
        ("rl:", "mine.yaml, rl: must contain `name: value` lines, not None"),
        ("rl: {recipe: tldr}", "mine.yaml, rl: a recipe can't name another recipe"),
        ("- rl", "mine.yaml must contain `name: value` lines, not a list"),
        ("rl: {", "mine.yaml is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_told_with_its_file(text: str, told: str, recipe: Callable[[str], str], perl: Perl) -> None:
    said = perl("rl", "--recipe", recipe(text), "--dry-run", code=2).stderr
    assert told in said


def test_all_faults_of_a_recipe_are_told_at_once(recipe: Callable[[str], str]) -> None:
    with pytest.raises(PerlError) as caught:
        read(recipe("sft: {lorar: 8, seed: x}\nrl: {betta: 1}\nfoo: 1"))
    assert len(caught.value.problem.splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tldrr", "No such recipe: tldrr\nHint: Did you mean tldr? `perl recipes` lists them"),
        ("none.yaml", "Can't read --recipe none.yaml: No such file or directory"),
        (".", "No such recipe: ."),
    ],
)
def test_a_recipe_that_is_not_there_is_told(name: str, told: str, perl: Perl) -> None:
    assert told in perl("sft", "--recipe", name, code=2).stderr


def test_a_stage_that_a_recipe_lacks_is_told(perl: Perl) -> None:
    said = perl("reward", "--recipe", "bolt", code=2).stderr
    assert said == "Error: Recipe bolt has no stage reward; its stages: rl, eval\nHint: perl recipes show bolt\n"


# From stage to stage


def test_a_stage_that_needs_another_first_says_which(perl: Perl, sft_run: Path, recipe: Callable[[str], str]) -> None:
    said = perl("rl", "--recipe", "tldr", "--dry-run", code=2).stderr
    assert said.splitlines() == [
        "Error: --model runs/tldr/sft does not exist yet",
        "Hint: `perl sft --recipe tldr` creates it; or give another --model",
    ]
    said = perl("rl", "--recipe", "bolt", "--model", sft_run, "--dry-run", code=2).stderr
    assert "Hint: `perl reward --recipe tldr` creates it; or give another --reward" in said
    mine = recipe("reward: {output: here}\nrl: {reward: here}")
    assert "`perl reward --recipe mine.yaml` creates it" in perl("rl", "--recipe", mine, code=2).stderr
    said = perl("rl", "--recipe", "tldr", "--model", "./nowhere", "--reward", "perlcli.coffee:reward", code=2).stderr
    assert said.startswith("Error: --model ./nowhere does not exist")


@pytest.mark.slow
def test_a_stage_finds_what_the_earlier_ones_left(perl: Perl, write: Write, sft_run: Path, reward_run: Path) -> None:
    Path("runs/tldr").mkdir(parents=True)
    Path("runs/tldr/sft").symlink_to(sft_run)
    Path("runs/tldr/reward").symlink_to(reward_run)
    Path("data/bolt").mkdir(parents=True)
    write(Path("data/bolt/train.jsonl"), SHAPES["bolt"])
    said = perl("rl", "--recipe", "bolt", "--dry-run").stdout
    assert "model: runs/tldr/sft (base" in said
    assert "of 128 completions (16 x 8), learning rate 0.0001" in said
    assert "output: runs/bolt/rl" in said


def test_a_reward_model_is_measured_without_the_recipes_reward(
    perl: Perl, rows: dict[str, Path], reward_run: Path
) -> None:
    words = ["eval", "--model", reward_run, "--data", rows["pairs"], "--output", "eval", "--dry-run"]
    assert "only applies to policies, so the recipe's is ignored" in perl(*words, "--recipe", "hh-harmless").stdout
    assert "only applies to policies\n" in perl(*words, "--reward", reward_run, code=2).stderr


@pytest.mark.slow
def test_settings_of_a_run_need_the_recipe_no_more(
    perl: Perl, recipe: Callable[[str], str], llama: Path, rows: dict[str, Path]
) -> None:
    mine = recipe(
        f"""
        sft: {{model: {llama}, data: {rows["demonstrations"]}, eval_data: gone.jsonl, max_steps: 1, lora_r: 2,
              per_device_train_batch_size: 2, max_length: 128, output: out}}
        """
    )
    Path("own.yaml").write_text("eval_data: null")
    perl("sft", "--recipe", mine, "--config", "own.yaml")
    record = json.loads(Path("out/record.json").read_text())
    assert record["settings"]["recipe"] == mine
    written = read_config(settings.Sft, Path("out/settings.yaml"))
    assert {**written, "set": []} == {n: v for n, v in record["settings"].items() if n not in settings.ONCE}
    assert (written["lora_r"], written["eval_data"]) == (2, None)
    Path(mine).unlink()
    said = perl("sft", "--config", "out/settings.yaml", "--output", "again", "--dry-run").stdout
    assert f"recipe: {mine}\n" in said
    assert "1 step of 2 rows" in said
    said = perl("sft", "--config", "own.yaml", "--recipe", mine, code=2).stderr
    assert "Can't read --recipe mine.yaml" in said


@pytest.mark.slow
def test_the_stages_of_a_recipe_chain_by_themselves(
    perl: Perl, recipe: Callable[[str], str], write: Write, llama: Path
) -> None:
    Path("data").mkdir()
    for split in ("train", "test"):
        write(Path(f"data/{split}.jsonl"), [{"chosen": TALK + f"Hi {n}.", "rejected": TALK + "Go."} for n in range(4)])
    short = "data: data, max_length: 128, max_steps: 1, per_device_train_batch_size: 4"
    sampled = "reward: reward, max_completion_length: 8"
    mine = recipe(
        f"""
        sft: {{model: {llama}, output: sft, {short}}}
        reward: {{model: {llama}, output: reward, {short}}}
        rl: {{model: sft, output: rl, {sampled}, {short}}}
        eval: {{model: rl, data: data, max_length: 128, {sampled}}}
        """
    )
    for stage in STAGES:
        perl(stage, "--recipe", mine)
    assert json.loads(Path("eval-rl/record.json").read_text())["metrics"]["prompts"] == 4


# The command


def test_recipes_are_listed_a_line_each(perl: Perl) -> None:
    lines = perl("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(NAMES)]] == list(NAMES)
    assert (
        lines[-1] == "To run one: perl sft --recipe NAME, and so on. To change one: perl recipes show NAME > mine.yaml"
    )


@EACH
def test_a_recipe_is_shown_as_a_file_that_works(name: str, perl: Perl) -> None:
    shown = perl("recipes", "show", name).stdout
    assert shown == (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(shown, encoding="utf-8")
    assert read("mine.yaml").stages == read(name).stages
    assert perl("recipes", "show", "mine.yaml").stdout == shown


def test_a_recipe_that_can_not_be_shown_is_told(perl: Perl) -> None:
    assert "Did you mean bolt?" in perl("recipes", "show", "bold", code=2).stderr
    assert "Can't read the recipe none.yaml: No such file" in perl("recipes", "show", "none.yaml", code=2).stderr
    assert "No such command 'shwo'" in perl("recipes", "shwo", code=2).stderr
