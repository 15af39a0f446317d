"""Every stage on a GPU, in each precision: it trains there, starts where it should and leaves what is frozen alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imitations import on_a_real_gpu
from safetensors.torch import load_file
from unbroken import differences, killed_after

from perlcli.run.record import RunRecord, read_record

pytestmark = pytest.mark.gpu
Perl = Callable[..., Any]

PRECISIONS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("--dtype", "bfloat16"),
    "float16": ("--dtype", "float16"),
    "8-bit": ("--load-in-8bit",),
    "4-bit": ("--load-in-4bit",),
    "dora 4-bit": ("--use-dora", "--load-in-4bit"),
    "full": ("--full",),
}
TRIED = [pytest.param(name, marks=[on_a_real_gpu] * (name == "float16")) for name in PRECISIONS]
# float16's scaler starts so high that it skips the first steps: the run must be long enough to learn all the same.
TRAINING = ("--max-steps", "12", "--per-device-train-batch-size", "4", "--max-length", "128", "--learning-rate", "1e-2")
SAMPLING = ("--max-completion-length", "8")
RL = ("--gradient-accumulation-steps", "1", "--max-steps", "4", *SAMPLING)
Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def runs(perl: Perl, llama: Path, rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a stage's run in a precision, with the runs that it needs; each is made once."""
    top = tmp_path_factory.mktemp("gpu")

    def run(precision: str, stage: str) -> Path:
        folder = top / precision / stage
        if not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            perl(*words(precision, stage), "--output", folder)
        return folder

    def words(precision: str, stage: str) -> list[object]:
        options = PRECISIONS[precision]
        rank = () if precision == "full" else ("--lora-r", "4")
        base = tuple(word for word in options if word not in ("--full", "--use-dora"))
        if stage == "sft":
            return ["sft", "-m", llama, "-d", rows["demonstrations"], *TRAINING, *rank, *options]
        if stage == "reward":
            return ["reward", "-m", llama, "-d", rows["pairs"], *TRAINING, *rank, *options]
        scored = ["--reward", run(precision, "reward"), "-d", rows["prompts"], "--max-length", "128"]
        if stage == "eval":
            return ["eval", "-m", run(precision, "rloo"), *scored, *SAMPLING, *base]
        kept = ("--full",) if precision == "full" else ()
        start = ["rl", "-m", run(precision, "sft"), *scored, "--algorithm", stage, *TRAINING, *RL, *base, *kept]
        return [*start, "--num-generations", "2"] if stage == "rloo" else start

    return run


def record_of(runs: Runs, precision: str, stage: str) -> tuple[RunRecord, Path]:
    """A run's record, after what holds for any run: it ended well, on the GPU."""
    folder = runs(precision, stage)
    record = read_record(folder)
    assert (record.status, record.device["type"]) == ("finished", "cuda")
    return record, folder


def first_row(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize("precision", TRIED)
def test_gpu_sft_trains(precision: str, runs: Runs) -> None:
    record, _ = record_of(runs, precision, "sft")
    assert record.memory["training_mb"] > 0


@pytest.mark.parametrize("precision", TRIED)
def test_gpu_rewards_score_after_a_reload_as_they_did(precision: str, runs: Runs) -> None:
    record, _ = record_of(runs, precision, "reward")
    assert record.metrics["reload_shift"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [
        pytest.param(name, algorithm, marks=[on_a_real_gpu] * (name == "float16"))
        for name in PRECISIONS
        for algorithm in ("rloo", "reinforce")
        if (name, algorithm) != ("full", "reinforce")  # its value model needs a frozen base
    ],
)
def test_gpu_rl_starts_at_its_anchor_on_one_base(precision: str, algorithm: str, runs: Runs) -> None:
    record, folder = record_of(runs, precision, algorithm)
    assert first_row(folder)["kl"] == pytest.approx(0, abs=1e-3)
    if precision != "full":
        assert record.memory["base_copies"] == 1
        assert record.guards["unchanged"] == ["anchor", "base", "reward"]


@pytest.mark.parametrize("precision", TRIED)
def test_gpu_eval_measures_a_policy(precision: str, runs: Runs) -> None:
    record, _ = record_of(runs, precision, "eval")
    assert isinstance(record.metrics["mean_reward"], float)


@pytest.mark.parametrize("precision", ["bfloat16", "4-bit", "dora 4-bit"])
def test_gpu_merge_gives_the_adapted_model(precision: str, runs: Runs, perl: Perl, tmp_path: Path) -> None:
    perl("merge", runs(precision, "sft"), "--output", tmp_path / "merged")
    record = read_record(tmp_path / "merged")
    assert (record.status, record.device["type"]) == ("finished", "cuda")
    assert load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.parametrize(("precision", "stage"), [("bfloat16", "reward"), ("bfloat16", "rl"), ("4-bit", "rl")])
def test_gpu_resume_is_as_exact_as_two_equal_runs(
    precision: str, stage: str, perl: Perl, llama: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    """CUDA's kernels may add in another order each time: a resumed run differs only where an equal run does."""
    kept = ("--save-steps", "1", "--save-total-limit", "4", *PRECISIONS[precision])
    words = ["reward", "-m", llama, "-d", rows["pairs"], *TRAINING, "--max-steps", "4", *kept]
    if stage == "rl":
        perl(*words, "--output", "reward")
        data = ("-d", rows["prompts"], "--reward", "reward", "--num-generations", "2")
        words = ["rl", "-m", llama, *data, *TRAINING, *RL, *kept]
    for name in ("one", "other"):
        perl(*words, "--output", name)
    killed_after(tmp_path / "one", 2, tmp_path / "resumed")
    perl(*words, "--output", "resumed", "--resume")
    assert set(differences(Path("one"), Path("resumed"))) <= set(differences(Path("one"), Path("other")))


@on_a_real_gpu
def test_gpu_doctor_finds_nothing_wrong(perl: Perl) -> None:
    found = perl("doctor").stdout
    assert "FAIL" not in found and "cuda" in found.lower()
