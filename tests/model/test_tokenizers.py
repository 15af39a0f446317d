"""A model's tokenizer: where it comes from, what it pads with, which tokens end a text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapter_folder, in_hub_cache
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, PreTrainedTokenizerFast

from perlcli import coffee
from perlcli.errors import PerlError
from perlcli.model import tokenizers
from perlcli.model.sources import locate
from perlcli.model.tokenizers import choose_pad, padded


def test_hub_adapter_without_a_tokenizer_takes_the_bases(llama: Path, tmp_path: Path) -> None:
    source = locate(in_hub_cache("adapter", adapter_folder(tmp_path / "adapter", str(llama))))
    assert (source.adapter, tokenizers.load_tokenizer(source).name_or_path) == ("org/adapter", str(llama))


def test_padding_that_a_reward_was_trained_with(llama: Path, gpt2: Path, classifier: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama), "SEQ_CLS")
    eos = AutoConfig.from_pretrained(llama).eos_token_id
    assert tokenizers.score_pad(locate(str(adapter))) == eos  # as the base's tokenizer says
    other = tokenizers.load_tokenizer(locate(str(llama)))
    other.save_pretrained(adapter)
    assert tokenizers.score_pad(locate(str(adapter))) == other.pad_token_id != eos  # as `perl reward` leaves it
    plain = adapter_folder(tmp_path / "plain", str(gpt2), "SEQ_CLS")
    assert (
        tokenizers.score_pad(locate(str(plain))) == AutoConfig.from_pretrained(gpt2).eos_token_id
    )  # as trl chooses it
    assert tokenizers.score_pad(locate(str(classifier))) == AutoConfig.from_pretrained(classifier).pad_token_id


def words(*vocabulary: str, template: str = "", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these words."""
    names = dict.fromkeys([*vocabulary, *special.values()])
    raw = Tokenizer(tokenizer_models.WordLevel({word: index for index, word in enumerate(names)}, unk_token=None))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template or None
    return tokenizer


PADS = {
    "own pad": (words("a", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"), "<pad>"),
    "pad is EOS": (words("a", eos_token="</s>", pad_token="</s>", unk_token="<unk>"), "<unk>"),
    "no pad": (words("a", eos_token="</s>", bos_token="<s>", unk_token="<unk>"), "<unk>"),
    "unk is EOS": (words("a", eos_token="</s>", unk_token="</s>", sep_token="<sep>"), "<sep>"),
    "special in the template": (
        words("a", "<0x00>", eos_token="</s>", sep_token="<sep>", template="{{ '<sep>' }}"),
        "<0x00>",
    ),
    "BOS alone": (words("a", "<0x00>", eos_token="</s>", bos_token="<s>"), "<0x00>"),
}


@pytest.mark.parametrize("case", PADS)
def test_pad_is_a_token_other_than_eos(case: str) -> None:
    tokenizer, pad = PADS[case]
    choose_pad(tokenizer)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_pad_of_byte_level_vocabularies(llama: Path, gpt2: Path) -> None:
    assert tokenizers.load_tokenizer(locate(str(llama))).pad_token == "<|endoftext|>"  # its unk
    assert tokenizers.load_tokenizer(locate(str(gpt2))).pad_token == "Ā"  # the NUL byte: every special token is EOS


def test_tokenizer_without_a_token_to_pad_with_is_an_error() -> None:
    with pytest.raises(PerlError, match="no token besides EOS to pad with"):
        choose_pad(words("a", "b", eos_token="</s>"))


def test_tokenizer_comes_from_the_adapter_where_it_has_one(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama))
    assert tokenizers.load_tokenizer(locate(str(adapter))).name_or_path == str(llama)
    own = tokenizers.load_tokenizer(locate(str(llama)))
    own.chat_template = "{{ messages }}"
    own.save_pretrained(adapter)
    assert tokenizers.load_tokenizer(locate(str(adapter))).chat_template == "{{ messages }}"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_tokenizer_that_is_missing_is_an_error(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shutil.copy(request.getfixturevalue(model) / "config.json", tmp_path)
    with pytest.raises(PerlError, match="has no readable tokenizer"):
        tokenizers.load_tokenizer(locate(str(tmp_path)))


def test_renderer_ends_at_every_token_of_the_generation_config(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    source = locate(str(tmp_path / "model"))
    tokenizer = tokenizers.load_tokenizer(source)
    assert tokenizers.renderer(source, tokenizer).eos_ids == (tokenizer.eos_token_id,)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert tokenizers.renderer(source, tokenizer).eos_ids == (tokenizer.eos_token_id, 0)


def test_tokenizer_fingerprint_is_of_what_decides_tokens(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.load_tokenizer(locate(str(llama)))
    mark = tokenizers.tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again.pad_token = "<|im_start|>"  # padding is masked: it decides nothing
    assert tokenizers.tokenizer_fingerprint(again) == mark
    assert tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(locate(str(gpt2)))) != mark
    for change in ({"chat_template": "{{ messages }}"}, {"bos_token": "a"}, {"eos_token": "a"}):
        (name,) = change
        before = getattr(again, name)
        setattr(again, name, change[name])
        assert tokenizers.tokenizer_fingerprint(again) != mark
        setattr(again, name, before)
    again.add_tokens(["word"])
    assert tokenizers.tokenizer_fingerprint(again) != mark


@pytest.mark.parametrize("end", ["x", [1, "x"], {"a": 1}, [[1]]])
def test_an_end_of_text_that_is_not_a_number_is_an_error(end: Any, tmp_path: Path) -> None:
    shutil.copytree(coffee.BASE, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(PerlError, match=r"eos_token_id must be a number|generation_config.json can't be read"):
        tokenizers.eos_ids(locate(str(tmp_path / "base")))


def test_a_tokenizer_that_can_not_encode_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(coffee.BASE, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": {}}))
    with pytest.raises(PerlError, match="has no readable tokenizer"):
        tokenizers.load_tokenizer(locate(str(tmp_path / "base")))


# Padded batches

ROWS = [[5], [6, 7, 8], [9, 0]]


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = padded(ROWS, 3)
    assert ids.tolist() == [[5, 3, 3], [6, 7, 8], [9, 0, 3]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = padded(ROWS, 3, on_left=True)
    assert ids.tolist() == [[3, 3, 5], [6, 7, 8], [3, 9, 0]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_the_batch_is_made_on_the_device_that_is_asked_for() -> None:
    ids, mask = padded(ROWS, 3, torch.device("meta"))
    assert (ids.device.type, mask.device.type) == ("meta", "meta")
