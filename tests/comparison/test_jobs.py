"""Which runs a comparison takes, and with which settings."""

from pathlib import Path
from typing import Any

import pytest

from perlcli import settings
from perlcli.arms import KINDS, Arm
from perlcli.comparison import jobs
from perlcli.comparison.jobs import Job
from perlcli.errors import PerlError


def given(stage: str = "reward", **values: Any) -> settings.CompareFull:
    found: settings.CompareFull = settings.build(
        settings.CompareFull, {"stage": stage, "model": "m", "seed": (0,), **values}
    )
    return found


def test_all_is_the_three_stages_in_their_order() -> None:
    assert jobs.stages(given("all")) == ("sft", "reward", "rl")
    assert jobs.stages(given("rl")) == ("rl",)


def test_a_stage_must_be_named() -> None:
    with pytest.raises(PerlError, match="STAGE is missing"):
        jobs.stages(settings.CompareFull())


def test_full_tuning_comes_first_and_adapters_come_with_every_rank() -> None:
    chosen = given(arms="lora,full,lora-4bit", lora_r=(1, 8))
    assert [each.arm.name for each in jobs.plan(chosen, "reward")] == [
        "full",
        "lora r=1",
        "lora r=8",
        "lora-4bit r=1",
        "lora-4bit r=8",
    ]


def test_every_arm_has_what_makes_it_one() -> None:
    chosen = given(arms=",".join(KINDS))
    values = {each.arm.kind: each.values for each in jobs.plan(chosen, "reward")}
    assert [kind for kind in values if values[kind].get("full")] == ["full"]
    assert [kind for kind in values if values[kind].get("load_in_8bit")] == ["lora-8bit", "dora-8bit"]
    assert [kind for kind in values if values[kind].get("load_in_4bit")] == ["lora-4bit", "dora-4bit"]
    assert [kind for kind in values if values[kind].get("use_dora")] == ["dora", "dora-8bit", "dora-4bit"]


def test_full_tuning_takes_no_option_of_adapters() -> None:
    chosen = given(lora_r=(4,), lora_alpha=8, lora_dropout=0.1, lora_target_modules="q_proj")
    full, lora = (each.values for each in jobs.plan(chosen, "reward"))
    assert not [name for name in full if name.startswith("lora")]
    assert (lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"]) == (4, 8, 0.1)


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({}, (1e-4, 1e-5)),
        ({"learning_rate": 3e-4}, (3e-4, 3e-5)),
        ({"full_learning_rate": 5e-6}, (1e-4, 5e-6)),
        ({"learning_rate": 1e-3, "full_learning_rate": 1e-3}, (1e-3, 1e-3)),
    ],
)
def test_full_tuning_learns_at_a_tenth_of_the_rate_unless_told(values: Any, rates: tuple[float, float]) -> None:
    full, lora = (each.values["learning_rate"] for each in jobs.plan(given(**values), "reward"))
    assert (lora, full) == pytest.approx(rates)


def test_every_arm_shares_what_the_user_gave() -> None:
    chosen = given(data="pairs.jsonl", max_steps=7, max_length=99, set=("lr_scheduler_type=cosine",), eval_fraction=0.1)
    for values in (each.values for each in jobs.plan(chosen, "reward")):
        assert (values["data"], values["max_steps"], values["max_length"]) == ("pairs.jsonl", 7, 99)
        assert (values["set"], values["eval_fraction"]) == (("lr_scheduler_type=cosine",), 0.1)


def test_the_embedded_default_brings_its_settings() -> None:
    chosen = given(model=None, set=("warmup_steps=2",))
    full, lora = (each.values for each in jobs.plan(chosen, "sft"))
    assert (lora["max_steps"], lora["lora_r"], lora["learning_rate"]) == (60, 8, 3e-3)
    assert (full["max_steps"], full["learning_rate"]) == (60, pytest.approx(3e-4))
    assert full["set"] == ("lr_scheduler_type=cosine", "warmup_steps=2")
    assert "lora_r" not in full


def test_a_length_of_the_users_replaces_the_embedded_defaults() -> None:
    chosen = given(model=None, num_train_epochs=2.0)
    assert all("max_steps" not in values for values in (each.values for each in jobs.plan(chosen, "sft")))


def test_a_recipe_lies_below_what_the_user_gives() -> None:
    chosen = given(model=None, recipe="hh-harmless", max_steps=3)
    full, lora = (each.values for each in jobs.plan(chosen, "reward"))
    assert (lora["data"], lora["max_steps"]) == ("Anthropic/hh-rlhf", 3)
    assert lora["learning_rate"] == pytest.approx(10 * full["learning_rate"])
    assert not [name for name in full if name.startswith("lora")]


def test_ranks_of_the_users_leave_a_recipes_alpha_behind() -> None:
    values = jobs.given_values(given(model=None, recipe="hh-harmless", lora_r=(2, 4)), "reward")
    assert "lora_alpha" not in values


def test_an_option_of_another_stage_is_refused() -> None:
    with pytest.raises(PerlError, match="--pos-weight, --temperature: not an option of perl sft"):
        jobs.given_values(given("sft", temperature=0.5, pos_weight="none"), "sft")
    assert "temperature" not in jobs.given_values(given("all", temperature=0.5), "sft")
    assert jobs.given_values(given("all", temperature=0.5), "rl")["temperature"] == 0.5


def test_an_unknown_arm_names_the_nearest() -> None:
    with pytest.raises(PerlError, match=r"unknown arm lora-4bits\nHint: Did you mean lora-4bit\?"):
        jobs.plan(given(arms="full,lora-4bits"), "reward")


def test_no_arm_is_an_error() -> None:
    with pytest.raises(PerlError, match="--arms is empty"):
        jobs.plan(given(arms=","), "reward")


def runs(chosen: settings.CompareFull, *, memory: bool = False) -> list[Job]:
    return list(jobs.jobs(chosen, "reward", jobs.plan(chosen, "reward"), memory=memory))


def test_arms_take_turns_over_seeds_and_repeats() -> None:
    found = runs(given(seed=(0, 5), repeats=2))
    assert [(job.arm.kind, job.seed, job.repeat) for job in found] == [
        ("full", 0, 1),
        ("lora", 0, 1),
        ("lora", 5, 1),
        ("full", 5, 1),
        ("full", 0, 2),
        ("lora", 0, 2),
        ("lora", 5, 2),
        ("full", 5, 2),
    ]
    assert [job.values["seed"] for job in found] == [0, 0, 5, 5] * 2


def test_every_run_has_a_folder_of_its_own() -> None:
    found = runs(given(model="org/a,org/b,../b", seed=(0, 1), repeats=2, lora_r=(1, 2)), memory=True)
    folders = [job.folder for job in found]
    assert len(set(folders)) == len(folders) == 9 * 5
    assert folders[0] == Path("1-a/full/memory")
    assert not [part for folder in folders for part in folder.parts if part == ".."]


def test_one_model_needs_no_folder() -> None:
    assert [str(job.folder) for job in runs(given())] == ["full/seed-0", "lora-r-16/seed-0"]


def test_a_run_for_memory_is_short() -> None:
    found = runs(given(max_steps=100, seed=(3,)), memory=True)
    assert [(job.for_memory, job.values["max_steps"], job.seed) for job in found] == [
        (True, 8, 3),
        (True, 8, 3),
        (False, 100, 3),
        (False, 100, 3),
    ]
    assert [job.values.get("max_eval_samples") for job in found] == [8, 8, None, None]
    assert runs(given(max_steps=2), memory=True)[0].values["max_steps"] == 2
    assert jobs.for_memory({}) == {"max_steps": 8, "max_eval_samples": 8}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("org/SmolLM2-135M", "SmolLM2-135M"), ("../..", "model"), ("lora r=8", "lora-r-8"), ("a/b/", "b"), ("…", "model")],
)
def test_a_folders_name_is_plain(name: str, folder: str) -> None:
    assert jobs.slug(name) == folder


def test_a_job_says_what_it_is() -> None:
    assert Job("rl", Arm("lora", 8), "m", 3, 2).words == "rl, m, lora r=8, seed 3, repeat 2"
    assert Job("rl", Arm("full"), None, 0, for_memory=True).words == "rl, full, memory"
