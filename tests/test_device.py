"""The device of a run: its line, what goes unused and why, and which GPU of several is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TWO_STEPS

from perlcli import device
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings

Patch = pytest.MonkeyPatch
GPU_LINE = "device: NVIDIA Imitation, {}, 20.0 GB of 24.0 GB free"


@pytest.fixture
def no_gpu(monkeypatch: Patch) -> Patch:
    """A machine without any GPU, whatever this one has."""
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    monkeypatch.setattr(device, "driver", lambda: "")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv(device.VISIBLE, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("like_stubbed_cuda")
def test_the_line_of_a_gpu_has_its_memory() -> None:
    for settings, precision in ((ModelSettings(), "bfloat16"), (ModelSettings(load_in_4bit=True), "4-bit")):
        found = device.describe(settings)
        assert device.line(found) == GPU_LINE.format(precision)
        assert (found["free_mb"], found["total_mb"]) == (20_000.0, 24_000.0)
        assert set(found) - set(device.identity(found)) == {"free_mb"}
    assert not list(device.remarks(ModelSettings()))
    assert device.line(device.describe(ModelSettings(), measures_memory=False)) == "device: NVIDIA Imitation, bfloat16"


def test_the_line_of_a_cpu(no_gpu: Patch) -> None:
    no_gpu.setattr(device, "_cpu_name", lambda: "AMD EPYC 7B13 (2 cores)")
    assert device.line(device.describe(ModelSettings())) == "device: CPU, AMD EPYC 7B13 (2 cores), float32"
    no_gpu.setattr(device, "_cpu_name", lambda: "CPU (64 cores)")  # an ARM, which has no name
    assert device.line(device.describe(ModelSettings())) == "device: CPU (64 cores), float32"
    assert not list(device.remarks(ModelSettings()))


def too_old() -> None:
    raise RuntimeError("too old")


@pytest.mark.parametrize(
    ("version", "visible", "cuda", "remark"),
    [
        ("570.1", "", "13.0", "CUDA_VISIBLE_DEVICES='' hides the GPUs: the CPU is used (unset CUDA_VISIBLE_DEVICES"),
        ("570.1", None, None, "There is an NVIDIA driver (570.1), but torch is built for the CPU, which is used (ins"),
        ("470.1", None, "13.0", "torch can't use the GPU: driver 470.1, torch for CUDA 13.0: too old (install a CUDA "),
        ("570.1", "7", "13.0", "torch can't use the GPU: driver 570.1, CUDA_VISIBLE_DEVICES='7', torch for CUDA 13.0"),
    ],
)
def test_a_gpu_that_is_not_used(
    version: str, visible: str | None, cuda: str | None, remark: str, no_gpu: Patch
) -> None:
    no_gpu.setattr(device, "driver", lambda: version)
    no_gpu.setattr(torch.version, "cuda", cuda)
    no_gpu.setattr(torch.cuda, "init", too_old)
    if visible is not None:
        no_gpu.setenv(device.VISIBLE, visible)
    (only,) = device.remarks(ModelSettings())
    assert only.startswith(remark) and only.endswith(").")


def test_a_gpu_that_is_hidden_otherwise(no_gpu: Patch) -> None:
    no_gpu.setattr(torch.cuda, "init", lambda: None)
    no_gpu.setattr(torch.version, "cuda", "13.0")
    no_gpu.setattr(device, "driver", lambda: "570.1")
    reason = device.why_cpu()
    assert reason is not None and reason.problem.endswith("torch for CUDA 13.0: no device is visible")


def test_gpus_that_are_not_supported_are_named(no_gpu: Patch) -> None:
    no_gpu.setattr(torch.backends.mps, "is_available", lambda: True)
    assert list(device.remarks(ModelSettings())) == ["Apple's GPU (MPS) is not supported yet: the CPU is used."]
    no_gpu.setattr(torch.xpu, "is_available", lambda: True)
    assert list(device.remarks(ModelSettings())) == ["Intel GPUs (XPU) are not supported yet: the CPU is used."]


@pytest.mark.usefixtures("like_stubbed_cuda")
def test_of_several_gpus_the_first_is_used(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(device.VISIBLE, raising=False)
    (only,) = device.remarks(ModelSettings())
    assert only == "2 GPUs are visible; a run uses the first one, and CUDA_VISIBLE_DEVICES=1 selects the second."
    monkeypatch.setenv(device.VISIBLE, "4, 6")
    assert "CUDA_VISIBLE_DEVICES=6 selects the second" in device.which_gpu()


@pytest.mark.usefixtures("like_stubbed_cuda")
def test_a_gpu_without_bfloat16(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert device.dtype_name(ModelSettings()) == "float32"
    assert device.dtype_name(ModelSettings(load_in_4bit=True)) == "float16"
    assert list(device.remarks(ModelSettings())) == [f"{device.NO_BFLOAT16}."]
    assert not list(device.remarks(ModelSettings(), takes_dtype=False))  # what trains is in float32 on any GPU
    for given in (ModelSettings(dtype="float16"), ModelSettings(load_in_8bit=True)):
        assert not list(device.remarks(given))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "reward", "rl", "eval", "merge", "quickstart"])
def test_every_command_that_loads_a_model_begins_with_its_device(
    command: str, perl: Any, sft_run: Path, reward_run: Path, no_gpu: Patch
) -> None:
    no_gpu.setattr(torch.backends.mps, "is_available", lambda: True)
    words: dict[str, tuple[object, ...]] = {
        "rl": ("--model", sft_run, "--reward", reward_run, "--data", "coffee"),
        "eval": ("--model", sft_run, "--data", "coffee"),
        "merge": (sft_run,),
    }
    lines = perl(command, *words.get(command, ()), "--output", "out", "--dry-run").stdout.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("device: CPU"))
    assert lines[place + 1] == "Apple's GPU (MPS) is not supported yet: the CPU is used."
    assert place == (2 if command == "quickstart" else 0)  # after its story


@pytest.mark.slow
@pytest.mark.usefixtures("like_stubbed_cuda")
def test_the_record_has_the_device(perl: Any, llama: Path, rows: dict[str, Path]) -> None:
    words = ("--model", llama, "--data", rows["demonstrations"], *TWO_STEPS, "--output", "out")
    assert perl("sft", *words, "--dry-run").stdout.startswith(GPU_LINE.format("bfloat16"))
    perl("sft", *words)
    found = read_record(Path("out")).device
    assert (found["name"], found["precision"], found["free_mb"]) == ("NVIDIA Imitation", "bfloat16", 20_000.0)


def test_only_device_asks_whether_there_is_a_gpu() -> None:
    """So that one stub covers every branch."""
    package = Path(device.__file__).parent
    asking = [path.name for path in package.rglob("*.py") if "cuda.is_available" in path.read_text(encoding="utf-8")]
    assert asking == ["device.py"]


def test_busy_cores_are_told_where_threads_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, used = 2, 100.0
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda _: used)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert device.busy_cores() == (
        "Other processes use 2.0 of the 2 CPU cores. torch's 2 threads would wait for each other there: "
        "OMP_NUM_THREADS=1 can be several times faster."
    )
    assert any(device.busy_cores() == remark for remark in device.remarks(ModelSettings()))
    used = 5.0
    assert not device.busy_cores()
    threads, used = 1, 100.0
    assert not device.busy_cores()
