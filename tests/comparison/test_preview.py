"""What a comparison decides before it starts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.arms import Arm
from perlcli.comparison import preview
from perlcli.comparison.jobs import Planned
from perlcli.memory import plans, prediction

FULL, LORA = Arm("full"), Arm("lora", 4)


@pytest.fixture
def planned(llama: Path) -> dict[str, list[Planned]]:
    """Full tuning and LoRA of a reward model."""

    def arm(which: Arm) -> Planned:
        values: dict[str, Any] = {"model": str(llama), "max_length": 512, "dtype": "float32", **which.options}
        return Planned(which, str(llama), values)

    return {"reward": [arm(FULL), arm(LORA)]}


def chosen(found: dict[str, list[Planned]]) -> list[object]:
    return [each.values.get("gradient_checkpointing") for each in found["reward"]]


def needed(llama: Path, planned: Planned, *, checkpointing: str) -> int:
    from perlcli import settings

    values = planned.values | {"gradient_checkpointing": checkpointing}
    given = settings.resolve(settings.build(settings.Reward, values), {})
    model = plans.Model(str(llama))
    plan = model.plan(given, planned.arm, on_gpu=True)
    return prediction.takes(prediction.predict(model.shape, plan), plan)


def test_a_cpu_leaves_it_to_the_runs(planned: dict[str, list[Planned]]) -> None:
    assert preview.same_checkpointing(planned) == planned


@pytest.mark.slow
def test_all_arms_of_a_model_have_the_same(
    like_stubbed_cuda: None, llama: Path, planned: dict[str, list[Planned]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu_of(size: int) -> dict[str, list[Planned]]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (size, size))
        return preview.same_checkpointing(planned)

    full = [needed(llama, planned["reward"][0], checkpointing=choice) for choice in ("false", "true")]
    assert chosen(on_gpu_of(full[0])) == ["false", "false"]
    assert chosen(on_gpu_of(full[0] - 1)) == ["true", "true"]  # full tuning needs it
    assert chosen(on_gpu_of(full[1] - 1))[0] == chosen(on_gpu_of(full[1] - 1))[1]
    planned["reward"][1].values["gradient_checkpointing"] = "false"
    assert chosen(on_gpu_of(full[0] - 1)) == ["true", "false"]
