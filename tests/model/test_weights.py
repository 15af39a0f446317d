"""Fingerprints of weights: the same content gives the same one, other content another."""

import json
import os
import shutil
from pathlib import Path

import pytest
from models import in_hub_cache
from safetensors.torch import load_file, save_file

from perlcli.errors import PerlError
from perlcli.model import sources, weights
from perlcli.model.sources import locate


def test_fingerprint_is_of_the_weights_wherever_they_lie(llama: Path, tmp_path: Path) -> None:
    cached = in_hub_cache("tiny", llama)
    mark = weights.fingerprint(str(llama))
    shutil.copy(llama / "model.safetensors", tmp_path)
    assert mark
    assert weights.fingerprint(str(tmp_path)) == weights.fingerprint(cached) == mark
    assert sources.same_base(locate(str(llama)), locate(cached))


def test_fingerprint_notices_other_weights(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights.fingerprint(str(tmp_path)) != weights.fingerprint(str(llama))
    assert not sources.same_base(locate(str(llama)), locate(str(gpt2)))


def test_fingerprint_is_read_again_when_files_come_or_change(llama: Path, tmp_path: Path) -> None:
    file, marks = tmp_path / "model.safetensors", [weights.fingerprint(str(tmp_path))]
    shutil.copy(llama / "model.safetensors", file)
    marks.append(weights.fingerprint(str(tmp_path)))
    os.utime(file, ns=(0, 0))
    assert weights.fingerprint(str(tmp_path)) == marks[1]
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7f")
    assert len({*marks, weights.fingerprint(str(tmp_path))}) == 3


def test_fingerprint_covers_every_shard(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    one = weights.fingerprint(str(tmp_path))
    shutil.copy(llama / "model.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    assert weights.fingerprint(str(tmp_path)) != one


def test_fingerprint_of_an_adapter_in_the_hub_cache(sft_run: Path) -> None:
    assert weights.fingerprint(in_hub_cache("tuned", sft_run)) == weights.fingerprint(str(sft_run)) != ""


def test_fingerprint_of_an_adapter_is_of_what_it_does(sft_run: Path, tmp_path: Path) -> None:
    mark = weights.fingerprint(str(sft_run))
    for name in (weights.ADAPTER_WEIGHTS, weights.ADAPTER_CONFIG):
        shutil.copy(sft_run / name, tmp_path)
    config = tmp_path / weights.ADAPTER_CONFIG
    values = json.loads(config.read_text())
    for more, is_same in (({"base_model_name_or_path": "moved"}, True), ({"lora_alpha": 99}, False)):
        config.write_text(json.dumps(dict(reversed((values | more).items()))))
        assert (weights.fingerprint(str(tmp_path)) == mark) == is_same
    for damaged in ("[", "[1]", "7"):
        config.write_text(damaged)
        with pytest.raises(PerlError, match=r"adapter_config\.json can't be read"):
            weights.fingerprint(str(tmp_path))


def test_fingerprint_is_empty_without_weights(tmp_path: Path) -> None:
    assert weights.fingerprint("nobody/nothing") == weights.fingerprint(str(tmp_path)) == ""


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x08" + b"\0" * 7 + b'{"a": 1}',
        b"\x09" + b"\0" * 7 + b'{"a": {}}',
        b"\x1f" + b"\0" * 7 + b'{"a": {"data_offsets": [-9, 1]}}',
    ],
    ids=repr,
)
def test_weights_with_a_broken_header_are_damaged(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(PerlError, match=r"model\.safetensors is damaged: its header can't be read"):
        weights.fingerprint(str(tmp_path))


def test_a_folder_in_place_of_a_weight_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(PerlError, match=r"model\.safetensors can't be read: Is a directory"):
        weights.fingerprint(str(tmp_path))
