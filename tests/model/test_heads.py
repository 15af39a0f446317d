"""The head of a reward model on any causal backbone, and how it is chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD, PRECISIONS, ROWS
from models import LORA, scramble
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from perlcli.errors import PerlError
from perlcli.model import heads, loading, roles, scorers
from perlcli.model.sources import Source, locate
from perlcli.settings import ModelSettings

TEXT = {
    **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": PAD},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CTRL = {"vocab_size": 400, "n_embd": 32, "dff": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": PAD}
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "layer_types": ["full_attention"] * 2}
BERT = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# Without a class; with a head of another name; of two layers; a multimodal model; and one whose class names a base that
# it doesn't have.
CONFIGS: dict[str, dict[str, Any]] = {
    "granite": TEXT,
    "ctrl": CTRL,
    "modernbert-decoder": {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "gemma3": {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION | {"image_size": 28}},
    "llama4_text": TEXT | LLAMA4,
}
ON_CAUSAL = {"granite", "modernbert-decoder", "gemma3", "llama4_text"}


def config_of(family: str) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **CONFIGS[family])


def source_of(family: str, **values: Any) -> Source:
    return Source("x", "x", AutoConfig.for_model(family, **values))


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """Makes the folder of a random model of a family."""

    def make(family: str) -> str:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config_of(family))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return make


def saved_reward(base: str, folder: Path, settings: ModelSettings) -> str:
    torch.manual_seed(3)
    model: Any = roles.new_adapter(loading.load_classifier(locate(base), settings, PAD), LORA, "SEQ_CLS")
    scramble(model, 1)
    roles.round_head(model, model.dtype)
    roles.save_adapter(model, folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
@pytest.mark.parametrize(
    ("family", "precision"), [*((family, "float32") for family in CONFIGS), *(("granite", name) for name in PRECISIONS)]
)
def test_a_reward_scores_the_same_alone_and_on_the_policys_base(
    family: str, precision: str, base: Any, tmp_path: Path
) -> None:
    settings, place = PRECISIONS[precision], base(family)
    folder = saved_reward(place, tmp_path / "reward", settings)
    source = locate(folder)
    assert heads.is_on_causal(source) == (family in ON_CAUSAL)
    assert heads.why_alone(source) is None
    alone = roles.load_adapter(loading.load_classifier(source, settings, PAD), folder, trainable=False)
    wanted = scorers.ClassifierScorer(alone, PAD)(ROWS)
    assert len(set(wanted)) == len(ROWS)
    policy = roles.new_adapter(loading.load_causal(locate(place), settings), LORA, "CAUSAL_LM")
    scramble(policy, 2)
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, folder), PAD, unread=PAD)
    assert shared(ROWS) == wanted


@pytest.mark.parametrize("family", sorted(ON_CAUSAL))
def test_the_head_reads_what_the_output_layer_reads(family: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(config_of(family)).eval()
    seen: list[torch.Tensor] = []
    name = {"modernbert-decoder": "lm_head"}.get(family)  # a norm and more come before its output layer
    output = model.get_submodule(name) if name else model.get_output_embeddings()
    output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor(ROWS[0])[None]
    with torch.no_grad():
        model(input_ids=ids)
        hidden = heads.decoder_of(model)(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, seen[0])


def test_our_head_scores_as_a_class_of_transformers_does(llama: Path) -> None:
    """For a family that has a class: the same weights, the same scores, padded and not."""
    theirs = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    theirs.config.pad_token_id = PAD
    ours = heads.put_on(AutoModelForCausalLM.from_pretrained(llama), torch.float32, theirs.score.weight)
    ours.config.pad_token_id = PAD
    assert scorers.ClassifierScorer(ours, PAD)(ROWS) == scorers.ClassifierScorer(theirs, PAD)(ROWS)
    assert type(ours).__name__ == type(theirs).__name__ == "LlamaForSequenceClassification"
    assert heads.described(ours) == {"class": "LlamaForCausalLM", "decoder": "model"}
    assert heads.described(theirs) is None


def test_all_that_scores_trains_under_full_tuning_and_nothing_else() -> None:
    model = heads.put_on(AutoModelForCausalLM.from_config(config_of("gemma3")), torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in heads.scored(model)}
    assert "score.weight" in found
    assert not [name for name in found if "vision" in name or "projector" in name]
    assert found >= {name for name in names.values() if name.startswith("model.language_model.layers.")}


# Which head


def test_an_encoder_keeps_its_own_class_and_scores_on_a_base_of_its_own(tmp_path: Path) -> None:
    source = source_of("bert", **BERT)
    assert not heads.is_on_causal(source)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **BERT, num_labels=1))
    model.save_pretrained(tmp_path / "bert")
    folder = saved_reward(str(tmp_path / "bert"), tmp_path / "reward", ModelSettings())
    assert heads.why_alone(locate(folder)) == "its head has more than one weight: classifier.bias, classifier.weight"


def test_a_language_model_without_its_classs_pooler_gets_our_head(tmp_path: Path) -> None:
    """BERT's pooler would start at random, and the adapter of a reward model doesn't contain it."""
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **BERT, is_decoder=True))
    causal.save_pretrained(tmp_path)
    assert heads.is_on_causal(locate(str(tmp_path)))
    own = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **BERT))
    own.config.architectures = ["BertForPreTraining"]  # as the Hub has it, with a pooler
    own.bert.save_pretrained(tmp_path / "with pooler")
    assert not heads.is_on_causal(locate(str(tmp_path / "with pooler")))


def test_a_classifier_of_two_layers_that_comes_trained_keeps_them(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(config_of("modernbert-decoder"))
    model.save_pretrained(tmp_path)
    assert not heads.is_on_causal(locate(str(tmp_path)))


def test_a_head_on_the_causal_model_is_found_again_in_a_folder_of_full_weights(base: Any, tmp_path: Path) -> None:
    for family in ("granite", "modernbert-decoder"):
        source = locate(base(family))
        torch.manual_seed(5)
        model = loading.load_classifier(source, ModelSettings(), PAD)
        model.save_pretrained(tmp_path / f"{family} full")
        saved = locate(str(tmp_path / f"{family} full"))
        assert saved.is_classifier
        assert heads.is_on_causal(saved)
        again = loading.load_classifier(saved, ModelSettings(), PAD)
        assert scorers.ClassifierScorer(again, PAD)(ROWS) == scorers.ClassifierScorer(model, PAD)(ROWS)


def test_a_family_with_neither_class_is_refused() -> None:
    with pytest.raises(
        PerlError, match=r"x \(vit\) can't be a reward model: transformers has no causal language model"
    ):
        heads.is_on_causal(source_of("vit"))


def test_random_layers_that_an_adapter_does_not_save_are_refused_but_not_under_full_tuning() -> None:
    source = source_of("deberta-v2", **BERT)
    with pytest.raises(PerlError, match="can't get a reward adapter: its class starts with a random pooler") as caught:
        heads.is_on_causal(source)
    assert caught.value.hint == "train all of it with --full"
    assert not heads.is_on_causal(source, full=True)


def test_the_names_of_classes_with_our_head() -> None:
    names = ["GraniteForCausalLM", "Gemma3ForConditionalGeneration", "CTRLLMHeadModel", "Odd"]
    found = [heads.name_of(type(name, (), {})) for name in names]
    families = ["Granite", "Gemma3", "CTRL", "Odd"]
    assert found == [f"{family}ForSequenceClassification" for family in families]
