"""Scores of reward models: on the shared base they equal the stand-alone model's, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD, PRECISIONS, ROWS
from models import LORA, load_policy, saved_reward, scramble
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from perlcli.model import heads, loading, roles, scorers
from perlcli.model.sources import locate
from perlcli.model.tokenizers import padded
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


def test_batches_are_of_similar_lengths_longest_first_and_scores_in_the_order_given() -> None:
    batches, counts = [], []

    def lengths(rows: scorers.Rows, _: object) -> list[float]:
        batches.append([len(row) for row in rows])
        return [float(len(row)) for row in rows]

    rows = [[0] * length for length in (3, 1, 4, 1, 5)]
    assert scorers.in_batches(lengths, rows, 2, counts.append) == [3, 1, 4, 1, 5]
    assert batches == [[5, 4], [3, 1], [1]]
    assert counts == [2, 4, 5]
    assert scorers.in_batches(lengths, rows, None) == [3, 1, 4, 1, 5]
    assert batches[-1] == [3, 1, 4, 1, 5]
    assert scorers.in_batches(lengths, [], 2) == []


@pytest.mark.parametrize("size", [1, 2])
def test_both_scorers_take_the_same_batches(size: int, llama: Path, policy: Any, reward: str) -> None:
    alone = PeftModel.from_pretrained(loading.load_classifier(locate(str(llama)), ModelSettings(), PAD), reward)
    wanted = scorers.ClassifierScorer(alone, PAD)(ROWS, size)
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    assert shared(ROWS, size) == wanted
    assert wanted == pytest.approx(shared(ROWS), abs=1e-5)


def test_a_call_switches_once_whatever_the_number_of_batches(
    policy: Any, reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, reward), PAD)
    switches = []

    def counted(*given: Any, **more: Any) -> Any:
        switches.append(given)
        return roles.switched(*given, **more)

    monkeypatch.setattr(scorers, "switched", counted)
    shared(ROWS * 3, 2)
    assert len(switches) == 1


# In 16 bits


def many_rows(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 390, (6,), generator=draw).tolist() for _ in range(count)]


def by_the_models_own_head(model: Any, rows: list[list[int]]) -> list[float]:
    """Scores as plain transformers computes them, and perlcli did before it took the head's product in float32."""
    ids, mask = padded(rows, PAD)
    with torch.no_grad():
        return [float(score) for score in model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0]]


@pytest.mark.parametrize("precision", ["bfloat16", "4-bit"])
def test_scores_are_not_rounded_to_16_bits_but_as_plain_transformers_within_it(
    precision: str, llama: Path, tmp_path: Path
) -> None:
    folder = saved_reward(tmp_path / "reward", llama, PRECISIONS[precision])
    alone = loading.load_classifier(locate(str(llama)), PRECISIONS[precision], PAD)
    model = roles.load_adapter(alone, folder, trainable=False)
    rows = many_rows(300)
    scores, plain = scorers.ClassifierScorer(model, PAD)(rows), by_the_models_own_head(model, rows)
    assert len(set(scores)) == len(rows) > len(set(plain))
    assert scores == pytest.approx(plain, rel=2**-7, abs=2**-7)
    assert by_the_models_own_head(model, rows) == plain  # the model itself is as it was


def test_a_classifier_with_another_head_scores_as_it_does_itself() -> None:
    config = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).bfloat16().eval()
    rows = many_rows(8)
    assert scorers.ClassifierScorer(model, PAD)(rows) == by_the_models_own_head(model, rows)


def test_a_head_in_bfloat16_reads_states_in_float32() -> None:
    """Mamba's last hidden states are float32 in every precision of the base."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=256, hidden_size=32, num_hidden_layers=2, pad_token_id=PAD)
    model = heads.put_on(AutoModelForCausalLM.from_config(config), torch.bfloat16).bfloat16()
    head = model.score.weight
    scores = scorers.ClassifierScorer(model, PAD)(ROWS)
    assert model.score.weight is head
    assert head.dtype == torch.bfloat16
    ids, mask = padded(ROWS, PAD, head.device)
    with torch.no_grad():
        hidden = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    assert hidden.dtype == torch.float32
    assert scores == scorers.at_last(hidden @ head.float().T, mask)
