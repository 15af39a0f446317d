"""Rows that start alike share the forward pass of their start, and nothing but rounding changes: neither states nor
gradients, nor what is sampled."""

from typing import Any

import families
import pytest
import torch

from perlcli.model import prompt_splits
from perlcli.model.prompt_splits import split_columns, split_groups
from perlcli.model.shared_prompts import Sharer, repeated

WINDOW = dict.fromkeys(("sliding_window", "attention_chunk_size"), 8)  # much shorter than the rows
QUICK = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "bloom",
    "mpt",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gemma3",
]
RUNNING = [family.name for family in families.FAMILIES if family.kind in ("hybrid", "state-space")] + [
    "minimax",  # its attention is linear in some layers
    "qwen3_5",
]
OTHERS = [
    family.name for family in families.FAMILIES if family.name not in (*QUICK, *RUNNING, "llama4")
]  # gemma3 and others with an image tower among them
PROMPT = 20
OWNERS, WRITTEN = (0, 1, 0, 2, 1, 0, 1), (9, 4, 7, 9, 1, 3, 8)  # of each row: its prompt, and its own tokens


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes cost so little that these few rows go through in several parts."""
    monkeypatch.setitem(prompt_splits.PASS, "cpu", 4)


def model_of(name: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    (family,) = (family for family in families.FAMILIES if family.name == name)
    config = families.config_of(family)
    for key, value in (WINDOW | more).items():
        if getattr(config.get_text_config(), key, None):
            setattr(config.get_text_config(), key, value)
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family.kind == families.IMAGES else AutoModelForCausalLM
    return auto.from_config(config).eval()


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(10, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [tokens(20, 1), tokens(13, 2), tokens(17, 3)]


def side_by_side(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """As in RL: prompts are padded on the left, completions on the right."""
    ids, mask = torch.zeros(2, len(OWNERS), PROMPT + max(WRITTEN), dtype=torch.long)
    for row, (owner, count) in enumerate(zip(OWNERS, WRITTEN, strict=True)):
        prompt = prompts[owner]
        ids[row, PROMPT - len(prompt) : PROMPT + count] = torch.tensor(prompt + tokens(count, 10 + row))
        mask[row, PROMPT - len(prompt) : PROMPT + count] = 1
    return ids, mask


def on_right(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """As for rewards: rows are padded on the right."""
    rows = [
        prompts[owner] + tokens(count, 10 + row) for row, (owner, count) in enumerate(zip(OWNERS, WRITTEN, strict=True))
    ]
    longest = max(map(len, rows))
    ids = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def states_and_gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    read = model if model.base_model is model else model.base_model
    read = getattr(read, "model", read) if read is model else read  # Llama 4's text model is its own `base_model`
    states = read(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    slope = torch.linspace(-1, 1, states.shape[-1])
    ((states * slope).sin() * mask.unsqueeze(-1)).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return (states * mask.unsqueeze(-1)).detach(), torch.cat(gradients)


def assert_shared(model: Any, prompts: list[list[int]]) -> None:
    sharer = Sharer(model)
    for (ids, mask), inside in (
        (side_by_side(prompts), lambda: sharer.columns(PROMPT)),
        (on_right(prompts), lambda: sharer.groups(OWNERS)),
    ):
        alone = states_and_gradients(model, ids, mask)
        read = sharer.count.read
        with inside():
            shared = states_and_gradients(model, ids, mask)
        for one, other in zip(alone, shared, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
        assert not torch.equal(alone[1], shared[1])
        assert sharer.count.read - read < 0.7 * ids.numel()
    assert (sharer.why_not, sharer.count.given) == ("", 2 * len(OWNERS) * (PROMPT + max(WRITTEN)))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)], ids=str)
def test_states_and_gradients_are_those_of_separate_rows(name: str, prompts: list[list[int]]) -> None:
    """With windows that are shorter than a prompt, positions by rotation, by table and by slope, padding on both sides,
    experts, and image towers around the decoder."""
    assert_shared(model_of(name), prompts)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_offsets_that_sampling_leaves_in_the_model_move_no_later_row(name: str, prompts: list[list[int]]) -> None:
    model = model_of(name)
    ids, mask = side_by_side(prompts)
    alone = states_and_gradients(model, ids, mask)
    model.generate(input_ids=ids[:2], attention_mask=mask[:2], max_new_tokens=2, pad_token_id=0, do_sample=False)
    assert model.base_model.rope_deltas is not None
    sharer = Sharer(model)
    with sharer.columns(PROMPT):
        shared = states_and_gradients(model, ids, mask)
    for one, other in zip(alone, shared, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
    assert model.base_model.rope_deltas is not None


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=() if n in ("lfm2", "mamba") else pytest.mark.slow) for n in RUNNING)]
)
def test_a_model_with_a_running_state_reads_rows_as_they_are(name: str, prompts: list[list[int]]) -> None:
    model = model_of(name)
    sharer = Sharer(model)
    ids, mask = side_by_side(prompts)
    alone = states_and_gradients(model, ids, mask)
    with sharer.columns(PROMPT):
        shared = states_and_gradients(model, ids, mask)
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    assert sharer.why_not.endswith("keeps a running state, not only keys and values") and not sharer.count.saved


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "lfm2"])
def test_equal_prompts_are_read_once_before_sampling(name: str, prompts: list[list[int]]) -> None:
    from transformers import GenerationConfig

    model = model_of(name)
    sharer = Sharer(model)
    rows = [prompts[owner] for owner in OWNERS]
    ids = torch.tensor([[0] * (PROMPT - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (PROMPT - len(row)) + [1] * len(row) for row in rows])
    how = GenerationConfig(max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(1)
    alone = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    torch.manual_seed(1)
    with sharer.prefill():
        shared = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    assert torch.equal(alone, shared)
    assert sharer.count.saved == (0 if name == "lfm2" else 4 * PROMPT)


def test_a_model_whose_cache_gives_other_results_reads_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(cache: Any, owners: Any) -> Any:
        made = repeated(cache, owners)
        made.layers[0].keys = made.layers[0].keys * 1.1
        return made

    model = model_of("llama")
    monkeypatch.setattr("perlcli.model.shared_prompts.repeated", wrong)
    sharer = Sharer(model)
    sharer.try_out()
    assert "LlamaModel gives other results with a cache (by 0." in sharer.why_not and not sharer.shares


@pytest.mark.slow
def test_a_model_whose_decoder_is_out_of_reach_reads_rows_as_they_are() -> None:
    sharer = Sharer(model_of("llama4"))
    sharer.try_out()
    assert sharer.why_not == "Llama4TextModel is given embeddings instead of tokens"


def test_what_asks_for_more_than_states_goes_through_as_it_is(prompts: list[list[int]]) -> None:
    model = model_of("llama")
    ids, mask = side_by_side(prompts)
    sharer = Sharer(model)
    with sharer.columns(PROMPT):
        output = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        assert output.hidden_states[0].shape[:2] == ids.shape
        model.base_model(input_ids=ids[:1], attention_mask=mask[:1])
        model.gradient_checkpointing_enable()
        model.train()
        model.base_model(input_ids=ids, attention_mask=mask)
    assert sharer.count.given and not sharer.count.saved
    off = Sharer(model.eval(), is_on=False)
    with off.columns(PROMPT):
        model.base_model(input_ids=ids, attention_mask=mask)
    assert not off.count.given
    assert "forward" not in vars(model.base_model)


def test_router_logits_come_in_the_order_of_the_batch(prompts: list[list[int]]) -> None:
    model = model_of("mixtral")
    ids, mask = side_by_side(prompts)
    alone = model.base_model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    with Sharer(model).columns(PROMPT):
        shared = model.base_model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    for one, other in zip(alone.router_logits, shared.router_logits, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one[mask.flatten().bool()], other[mask.flatten().bool()], atol=1e-4, rtol=1e-4)


def test_every_token_of_a_batch_has_its_place_in_the_parts(prompts: list[list[int]]) -> None:
    for ids, mask, split in (
        (*side_by_side(prompts), split_columns(*side_by_side(prompts), PROMPT)),
        (*on_right(prompts), split_groups(*on_right(prompts), OWNERS)),
    ):
        assert split is not None
        parts = [[part.start, *(rest.ids for rest in part.rests)] for part in split.parts]
        tokens = torch.cat([piece.flatten() for part in parts for piece in part])
        assert torch.equal(tokens[split.places] * mask, ids * mask)
        assert len(tokens) == split.tokens < 0.7 * ids.numel()


def test_rows_that_start_differently_are_not_split() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 4], [6, 7, 8, 9]])
    mask = torch.ones_like(ids)
    assert split_columns(ids, mask, 2) is None
    assert split_groups(ids, mask, (0, 0, 1)) is None  # nothing in common
    assert split_groups(ids, mask, (0, 1, 2)) is None
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert split_groups(ids, left, (0, 0, 1)) is None  # padded on the left
    short = torch.tensor([[1, 2], [1, 0], [3, 0]])
    assert split_groups(short, (short != 0).long(), (0, 0, 1)) is None  # a row of one token
    same = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    split = split_groups(same, torch.ones_like(same), (0, 0))
    assert split is not None and split.parts[0].rests[0].ids.tolist() == [[4], [4]]  # each row keeps a token


def test_rows_of_similar_length_go_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as pay: padding costs as much as tokens, and a pass some tokens too."""
    lengths = (40, 5, 38, 6)
    ids = torch.zeros(4, 10 + 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : 10 + length] = torch.tensor([*range(1, 11), *tokens(length, row)])
    mask = (ids != 0).long()
    for spare, widths in ((0, [[40], [38], [6], [5]]), (16, [[40, 40], [6, 6]]), (1000, [[40, 40, 40, 40]])):
        monkeypatch.setitem(prompt_splits.PASS, "cpu", spare)
        by_columns, by_groups = split_columns(ids, mask, 10), split_groups(ids, mask, (0, 1, 0, 1))
        assert by_columns is not None and by_groups is not None
        assert [[rest.ids.shape[1]] * len(rest.ids) for rest in by_columns.parts[0].rests] == widths
        assert len(by_columns.parts) == 1
    monkeypatch.setitem(prompt_splits.PASS, "cpu", 0)
    pairs = split_groups(ids[[0, 2, 1, 3]], mask[[0, 2, 1, 3]], (0, 0, 1, 1))
    assert pairs is not None and [tuple(part.rests[0].ids.shape) for part in pairs.parts] == [(2, 40), (2, 6)]
