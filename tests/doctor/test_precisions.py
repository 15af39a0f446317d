"""Each precision against float32: right ones pass by a wide margin, planted faults don't."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.doctor import precisions
from perlcli.doctor.precisions import TOLERANCES, compare
from perlcli.model import loading

ON_CPU = ("float32", "bfloat16", "8-bit", "4-bit")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_precision_computes_what_float32_does(name: str) -> None:
    found = compare(name)
    assert found.is_right and 1 - found.cosine < (1 - TOLERANCES[name][1]) / 5, found
    assert found.loss == pytest.approx(found.float32_loss, rel=0.03)


def test_every_precision_has_its_tolerance() -> None:
    assert set(TOLERANCES) == set(precisions.PRECISIONS)


@pytest.mark.parametrize("name", ["bfloat16", "8-bit", "4-bit"])
def test_gradients_that_miss_the_lower_layers_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = precisions.adapted

    def cut(settings: Any) -> Any:
        model = adapted(settings)
        if settings.dtype != "float32":  # the one that is checked, not what it is compared with
            model.base_model.model.model.layers[1].register_forward_hook(lambda _, __, output: output.detach())
        return model

    monkeypatch.setattr(precisions, "adapted", cut)
    found = compare(name)
    assert not found.is_right and found.cosine < 0.95


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_numbers_that_are_none_are_found(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = precisions.passes

    def spoiled(model: Any, dtype: Any) -> Any:
        loss, gradients = passes(model, dtype)
        return loss, gradients if dtype is None else gradients * broken

    monkeypatch.setattr(precisions, "passes", spoiled)
    assert not compare("bfloat16").is_right


def test_weights_that_quantising_spoils_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = precisions.adapted

    def spoiled(settings: Any) -> Any:
        model = adapted(settings)
        if settings.dtype == "bfloat16":
            for name, parameter in model.named_parameters():
                if "down_proj" in name:
                    parameter.data.zero_()
        return model

    monkeypatch.setattr(precisions, "adapted", spoiled)
    found = compare("bfloat16")
    assert found.cosine > 0.9 and not found.is_right  # its own weights it computes right


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning")
@pytest.mark.skipif(
    "avx512_bf16" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")
    or torch.cuda.is_available(),
    reason="bitsandbytes takes the path without autograd on such a CPU alone",
)
def test_the_path_of_bitsandbytes_without_autograd_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_keep_autograd", lambda model: None)
    assert compare("4-bit").cosine < 0.5
