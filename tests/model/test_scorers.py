"""Scores of reward models: on the shared base they equal the stand-alone model's, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD, PRECISIONS, ROWS
from models import LORA, load_policy, saved_reward, scramble
from peft import PeftModel

from perlcli.model import loading, roles, scorers
from perlcli.model.sources import locate
from perlcli.settings import ModelSettings

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


@quiet_8bit
@pytest.mark.parametrize("precision", PRECISIONS)
def test_shared_base_scores_equal_the_stand_alone_model_bit_for_bit(
    precision: str, llama: Path, tmp_path: Path
) -> None:
    settings = PRECISIONS[precision]
    folder = saved_reward(tmp_path / "reward", llama, settings)
    alone = loading.load_classifier(locate(str(llama)), settings, PAD)
    wanted = scorers.ClassifierScorer(PeftModel.from_pretrained(alone, folder), PAD)(ROWS)
    policy = load_policy(llama, settings)
    scramble(policy, 2)
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, folder), PAD)
    assert shared(ROWS) == wanted
    assert len(set(wanted)) == len(ROWS)
    with torch.autocast("cpu", torch.bfloat16):  # as under a trainer in bf16
        assert shared(ROWS) == wanted


def test_a_reward_that_was_padded_with_eos_is_read_before_it(llama: Path, policy: Any, reward: str) -> None:
    """As plain transformers reads it: at the last token that isn't padding. trl pads so where nothing else is named."""
    eos = 2
    alone = loading.load_classifier(locate(str(llama)), ModelSettings(), eos)
    wanted = scorers.ClassifierScorer(PeftModel.from_pretrained(alone, reward), eos)(ROWS)
    head = scorers.attach_reward(policy, reward)
    assert scorers.SharedScorer(policy, head, PAD, unread=eos)(ROWS) == wanted
    assert [a == b for a, b in zip(scorers.SharedScorer(policy, head, PAD)(ROWS), wanted, strict=True)] == [
        ROWS[0][-1] != eos,
        True,
        True,
    ]


def test_reward_depends_on_the_reward_adapter_and_not_on_the_policys(policy: Any, reward: str) -> None:
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    before = shared(ROWS)
    for name, parameter in policy.named_parameters():
        if f".{roles.POLICY}." in name:
            parameter.data.mul_(2)
    assert shared(ROWS) == before
    for name, parameter in policy.named_parameters():
        if f".{roles.REWARD}." in name:
            parameter.data.mul_(2)
    assert shared(ROWS) != before


def test_padding_does_not_move_a_reward(policy: Any, reward: str) -> None:
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    assert shared(ROWS) == pytest.approx([shared([row])[0] for row in ROWS], abs=1e-5)


def test_reward_is_read_at_the_last_token_even_where_that_is_the_pad_token(policy: Any, reward: str) -> None:
    head = scorers.attach_reward(policy, reward)
    row = [1, 40, 41, 2]
    eos_as_pad, other_pad = scorers.SharedScorer(policy, head, 2), scorers.SharedScorer(policy, head, PAD)
    assert eos_as_pad([row]) == other_pad([row])
    assert other_pad([row]) != other_pad([row[:-1]])


def test_scoring_uses_no_dropout_and_leaves_the_mode(llama: Path) -> None:
    model: Any = roles.new_adapter(loading.load_classifier(locate(str(llama)), ModelSettings(), PAD), LORA, "SEQ_CLS")
    scramble(model, 2)
    scorer = scorers.ClassifierScorer(model.train(), PAD)
    assert scorer(ROWS) == scorer(ROWS)
    assert model.training


def test_scores_in_batches_keep_their_order() -> None:
    sizes = []

    def lengths(rows: list[list[int]]) -> list[float]:
        sizes.append(len(rows))
        return [float(len(row)) for row in rows]

    rows = [[0] * length for length in (3, 1, 4, 1, 5)]
    assert scorers.scores_in_batches(lengths, rows, 2) == [3, 1, 4, 1, 5]
    assert sizes == [2, 2, 1]
