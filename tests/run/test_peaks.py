"""Peak memory as it is measured, on a GPU apart for loading and training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import GenerationMixin

from perlcli.run import peaks
from perlcli.run.record import read_record


@pytest.fixture
def calls(like_stubbed_cuda: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch's allocator, in order; the peak is a MB more at each reset."""
    asked: list[str] = []

    def noting(name: str, answer: Callable[[], Any] = lambda: None) -> None:
        def ask(*_: object) -> Any:
            asked.append(name)
            return answer()

        monkeypatch.setattr(torch.cuda, name, ask)

    noting("empty_cache")
    noting("reset_peak_memory_stats")
    noting("max_memory_allocated", lambda: asked.count("reset_peak_memory_stats") * 1_000_000)
    return asked


def test_on_a_gpu_training_has_a_peak_of_its_own(calls: list[str]) -> None:
    before = peaks.begin()
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    assert peaks.loaded_mb(before) == 1.0
    assert calls[-3:] == ["max_memory_allocated", "empty_cache", "reset_peak_memory_stats"]
    assert peaks.of_training(before) == {"training_mb": 2.0, "reserved_mb": 234.6}


def test_on_a_cpu_training_includes_loading() -> None:
    before = peaks.begin()
    loaded = peaks.loaded_mb(before)
    assert before > 0 and loaded >= 0
    assert peaks.of_training(before)["training_mb"] >= loaded


@pytest.mark.slow
def test_a_run_records_both(perl: Any, llama: Path, rows: dict[str, Path], calls: list[str]) -> None:
    words = ("--data", rows["pairs"], "--output", "run", "--max-steps", "1", "--max-length", "96", "--dtype", "float32")
    out = perl("reward", "--model", llama, *words).output
    found = read_record(Path("run"))
    assert (found.memory["loading_mb"], found.memory["training_mb"]) == (1.0, 2.0)
    assert found.peak_memory_mb == 2.0
    assert "peak memory 2.00 MB (loading 1.00 MB, training 2.00 MB)" in out


@pytest.mark.slow
def test_what_rl_samples_before_it_trains_is_not_loading(
    perl: Any, llama: Path, rows: dict[str, Path], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = GenerationMixin.generate

    def noted(*args: Any, **options: Any) -> Any:
        calls.append("generate")
        return generate(*args, **options)

    monkeypatch.setattr(GenerationMixin, "generate", noted)
    source = "def reward(completions, **_): return [float(sum(map(ord, str(each)))) for each in completions]\n"
    Path("sums.py").write_text(source)
    monkeypatch.syspath_prepend(".")
    few = ("--max-steps", "1", "--per-device-train-batch-size", "2", "--num-generations", "2")
    lengths = ("--max-length", "96", "--max-completion-length", "4", "--dtype", "float32")
    perl("rl", "--model", llama, "--data", rows["pairs"], "--reward", "sums:reward", *few, *lengths)
    resets = [place for place, call in enumerate(calls) if call == "reset_peak_memory_stats"]
    assert len(resets) == 2 and resets[-1] < calls.index("generate")
