"""Where a model name leads, and what is refused on the way."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import adapter_folder, in_hub_cache

from perlcli import coffee
from perlcli.errors import PerlError
from perlcli.model import auto_classes, loading, places, roles, sources, weights
from perlcli.model.sources import Source, locate
from perlcli.run import record as run_record
from perlcli.settings import LoraSettings, ModelSettings

LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")


def test_no_name_leads_to_the_embedded_base() -> None:
    source = locate(None)
    assert (source.base, source.adapter, source.base_name) == (str(coffee.BASE), None, coffee.NAME)
    assert source.is_embedded


def test_folder_leads_to_itself_from_anywhere(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    source = locate("llama")
    assert (source.name, source.base, source.adapter) == ("llama", str(llama), None)
    assert not source.is_embedded
    assert not source.is_classifier
    assert source.base_name == str(llama)


def test_hub_id_leads_to_the_hub(llama: Path) -> None:
    cached = in_hub_cache("tiny", llama)
    source = locate(cached)
    assert (source.base, source.adapter, source.config.model_type) == (cached, None, "llama")


@pytest.mark.parametrize("name", ["./none", "/no/such", "../none/here", "a/b/c", "~/perlcli-none"])
def test_folder_that_is_missing_is_an_error(name: str) -> None:
    with pytest.raises(PerlError, match=f"^--model {name} does not exist$"):
        locate(name)


def test_hub_id_that_is_not_available_is_an_error() -> None:
    with pytest.raises(
        PerlError, match=r"^--reward nobody/nothing is not a local folder, and .*\nHint: check the name"
    ):
        locate("nobody/nothing", option="--reward")


def test_file_is_an_error(llama: Path) -> None:
    with pytest.raises(PerlError, match=r"config\.json is a file\nHint: name the folder"):
        locate(str(llama / "config.json"))


def test_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match="can't be read as a model"):
        locate(str(tmp_path))


def test_adapter_leads_to_its_base(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama))
    source = locate(str(adapter))
    assert (source.base, source.adapter, source.config.model_type) == (str(llama), str(adapter), "llama")
    assert not source.is_classifier


def test_adapter_of_a_hub_base_leads_to_the_hub(llama: Path, tmp_path: Path) -> None:
    cached = in_hub_cache("tiny", llama)
    assert locate(str(adapter_folder(tmp_path / "adapter", cached))).base == cached


def test_adapter_with_a_head_is_a_classifier(llama: Path, tmp_path: Path) -> None:
    assert locate(str(adapter_folder(tmp_path / "adapter", str(llama), "SEQ_CLS"))).is_classifier


def test_full_classifier_is_a_classifier(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert locate(str(tmp_path)).is_classifier


def test_adapter_whose_base_is_gone_is_an_error(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", "/moved/away")
    message = f"^The adapter {adapter} belongs to the base /moved/away, which was not found\nHint: put it back"
    with pytest.raises(PerlError, match=message):
        locate(str(adapter))


def test_adapter_without_a_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match="does not say which base it belongs to"):
        locate(str(adapter_folder(tmp_path / "adapter", None)))


def test_adapter_config_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(PerlError, match=r"adapter_config\.json can't be read"):
        locate(str(tmp_path))


def test_adapter_of_another_environment_finds_the_embedded_base(tmp_path: Path) -> None:
    elsewhere = "/other/lib/python3.12/site-packages/perlcli/coffee/base"
    source = locate(str(adapter_folder(tmp_path / "adapter", elsewhere)))
    assert source.is_embedded
    assert source.base == str(coffee.BASE)


def test_base_that_an_adapter_names_from_here_is_found_from_anywhere(llama: Path, tmp_path: Path) -> None:
    """`trl --model_name_or_path llama` leaves such an adapter; what is trained on from it names the whole path."""
    (tmp_path / "llama").symlink_to(llama)
    base_model = loading.load_causal(locate(str(llama)), ModelSettings())
    roles.save_adapter(roles.new_adapter(base_model, LORA, "CAUSAL_LM"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "llama"}))
    source = locate("adapter")
    assert source.base == str(llama.resolve())
    model = roles.load_adapter(loading.load_causal(source, ModelSettings()), str(source.adapter), trainable=True)
    roles.save_adapter(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == source.base


def test_bases_without_weights_to_compare_are_not_the_same(llama: Path) -> None:
    config = locate(str(llama)).config
    assert not sources.same_base(Source("a", "nobody/one", config), Source("b", "nobody/two", config))
    assert sources.same_base(Source("a", "nobody/one", config), Source("b", "nobody/one", config))


def test_the_embedded_base_is_known_in_another_environment_too(tmp_path: Path) -> None:
    """An adapter of another checkout or environment names that one's copy."""
    copy = tmp_path / "perlcli" / "coffee" / "base"
    shutil.copytree(coffee.BASE, copy)
    assert sources.locate(str(copy)).is_embedded
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert not sources.locate(str(copy)).is_embedded


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"base_model_name_or_path": [1]}, "base_model_name_or_path must be text, not [1]"),
        ({"base_model_name_or_path": "x" * 300}, "names is too long for a file name"),
        ({"target_modules": {"a": 1}}, "target_modules must be text or a list, not {'a': 1}"),
        ({"lora_dropout": [0]}, "lora_dropout must be a number, not [0]"),
        ({"lora_dropout": 1}, "lora_dropout must be at least 0 and below 1, not 1"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not null"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be finite, not inf"),
        ({"r": None}, "r must be a whole number or a mapping, not null"),
        ({"r": 0}, "r must be above 0, not 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must be a mapping, not {'q_proj': 'x'}"),
        ({"modules_to_save": 5}, "modules_to_save must be a list, not 5"),
        ({"layers_to_transform": "x"}, "layers_to_transform must be a whole number or a list, not 'x'"),
        ({"peft_type": "NEW"}, "has peft_type 'NEW', which peft does not know"),
        ({"peft_type": None}, "has peft_type null, which peft does not know"),
        ({"base_model_name_or_path": "a\0b"}, "names must be text without NUL characters"),
        ({"target_modules": "(.*)*x"}, "the regular expression '(.*)*x' takes longer than 2 s to match module names"),
        ({"target_modules": "("}, "'(' is not a valid regular expression"),
        ({"rank_pattern": {"(": 1}}, "is not a valid regular expression"),
    ],
)
def test_a_config_of_an_adapter_that_can_not_be_used_is_an_error(change: Any, problem: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", str(coffee.BASE))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PerlError, match=r"adapter_config\.json") as caught:
        locate(str(folder))
    assert problem in caught.value.problem


def test_a_config_of_an_adapter_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", None)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(PerlError, match=r"adapter_config\.json can't be read: maximum recursion depth"):
        locate(str(folder))


def test_architectures_that_are_not_names_are_ignored() -> None:
    assert auto_classes.architectures(SimpleNamespace(architectures=[41, None, "LlamaForCausalLM"])) == [
        "LlamaForCausalLM"
    ]
    assert auto_classes.architectures(SimpleNamespace(architectures="Llama")) == []


@pytest.mark.slow
def test_a_run_reads_each_record_and_each_weight_file_once(
    perl: Any, sft_run: Path, reward_run: Path, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`perl rl` has three sources on one base: the policy, its reward and its anchor."""
    records: Counter[Path] = Counter()
    files: Counter[Path] = Counter()
    invalid, probes = run_record._invalid, weights._probes

    def counted_check(content: Mapping[str, Any]) -> Iterator[str]:
        records[Path(content["settings"]["output"])] += 1
        return invalid(content)

    def counted_probes(file: Path) -> Iterator[bytes]:
        files[file] += 1
        return probes(file)

    monkeypatch.setattr(run_record, "_invalid", counted_check)
    run_record._record_in.cache_clear()
    monkeypatch.setattr(weights, "_probes", counted_probes)
    weights._digest_of.cache_clear()
    words = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
    more = ("--learning-rate", "1e-2", "--max-completion-length", "6", "--max-length", "128", "--output", "run")
    perl("rl", "--model", sft_run, "--reward", reward_run, "--data", rows["prompts"], *words, *more)
    assert records == {sft_run: 1, reward_run: 1}
    assert files == {
        llama / "model.safetensors": 1,
        sft_run / weights.ADAPTER_WEIGHTS: 1,
        reward_run / weights.ADAPTER_WEIGHTS: 1,
    }


def test_an_oft_adapter_with_a_block_size_has_no_rank(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", str(coffee.BASE))
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "base_model_name_or_path": str(coffee.BASE)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    assert locate(str(folder)).adapter == str(folder)


def test_a_base_that_can_not_be_a_file_is_found_nowhere(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", "a\0b")
    assert places.find(str(folder)).base == ""
