"""The ways to train: their names and options, and the lists that users give."""

from typing import Any

import pytest

from perlcli import arms, settings
from perlcli.arms import KINDS, Arm
from perlcli.errors import PerlError


@pytest.mark.parametrize(
    ("arm", "name", "options"),
    [
        (Arm("full"), "full", {"full": True}),
        (Arm("lora"), "lora", {}),
        (Arm("lora-8bit", 4), "lora-8bit r=4", {"load_in_8bit": True, "lora_r": 4}),
        (Arm("dora-4bit", 2), "dora-4bit r=2", {"load_in_4bit": True, "use_dora": True, "lora_r": 2}),
        (Arm("lora", 2, "q_proj"), "lora r=2 q_proj", {"lora_r": 2, "lora_target_modules": "q_proj"}),
    ],
)
def test_an_arm_has_a_name_and_the_options_that_make_it(arm: Arm, name: str, options: dict[str, Any]) -> None:
    assert (arm.name, arm.options) == (name, options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_settings_describe_its_arm(kind: str) -> None:
    arm = Arm(kind, None if kind == "full" else 4)
    given = settings.resolve(settings.build(settings.Sft, arm.options), {})
    assert arms.of_run(given) == arm
    assert arm.bits == (8 if "8bit" in kind else 4 if "4bit" in kind else 0)


@pytest.mark.parametrize(
    ("words", "sets"),
    [
        ("attention", ["attention"]),
        ("attention, all-linear,attention", ["attention", "all-linear"]),
        ("q_proj, v_proj", ["q_proj,v_proj"]),
        ("attention;q_proj,v_proj", ["attention", "q_proj,v_proj"]),
        ("q_proj;;attention,all-linear;v_proj", ["q_proj", "attention", "all-linear", "v_proj"]),
    ],
)
def test_sets_of_modules(words: str, sets: list[str]) -> None:
    assert arms.parse_module_sets(words) == sets


def test_a_named_set_among_module_names_needs_a_semicolon() -> None:
    with pytest.raises(PerlError, match=r'mixes attention.*\nHint: .*"attention;q_proj,v_proj"'):
        arms.parse_module_sets("q_proj,attention,v_proj")
    with pytest.raises(PerlError, match="--lora-target-modules is empty"):
        arms.parse_module_sets(" ;, ")


def test_adapters_come_with_every_rank_and_every_set_of_modules() -> None:
    found = arms.every(["full", "lora"], [1, 2], ["attention", "all-linear"])
    assert [arm.name for arm in found] == [
        "full",
        "lora r=1 attention",
        "lora r=1 all-linear",
        "lora r=2 attention",
        "lora r=2 all-linear",
    ]
    assert arms.every(["lora"], [1], ["all-linear"]) == [Arm("lora", 1)]  # the only set needs no name
