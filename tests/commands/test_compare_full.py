"""`perl compare-full`: the arms run one by one, whatever becomes of each, and the report tells."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, Perl
from imitations import NO_ROOM, PLACES
from typer.testing import CliRunner

from perlcli import device, settings
from perlcli.cli.app import app
from perlcli.comparison import loop, processes, results
from perlcli.comparison.assembly import State
from perlcli.comparison.processes import Stopped
from perlcli.comparison.results import Report
from perlcli.errors import RunFailed
from perlcli.run import lifecycle
from perlcli.run.record import read_record, write_record

OUT = Path("out")
Words = list[str]


KNOWN: dict[str, Path] = {}  # the folder of each run that a test made, by what it was told: a second one is a copy


class Runner:
    """Runs perlcli's processes in this one, which is quicker; `faults` replace the run of a folder by what they do."""

    def __init__(self, store: Path) -> None:
        self.store, self.calls = store, list[Words]()
        self.faults: dict[str, Callable[[Path], int]] = {}

    def __call__(self, words: Sequence[str], log: Path, environment: Any = None) -> int:
        self.calls.append([*words])
        log.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(words[words.index("--output") + 1])
        fault = next((fault for name, fault in self.faults.items() if str(folder).endswith(name)), None)
        if fault is not None:
            log.write_text("Error: a planted fault\n")
            return fault(folder)
        return self.copied(words, folder, log) if self.is_known(words, folder) else self.made(words, folder, log)

    def key(self, words: Sequence[str]) -> str:
        """What decides a run's result."""
        config = Path(words[2]).read_text() if words[1] == "--config" else words[1]
        return f"{words[0]} {config}"

    def is_known(self, words: Sequence[str], folder: Path) -> bool:
        return self.key(words) in KNOWN and not folder.exists()

    def copied(self, words: Sequence[str], folder: Path, log: Path) -> int:
        shutil.copytree(KNOWN[self.key(words)], folder)
        log.write_text("copied")
        return 0

    def made(self, words: Sequence[str], folder: Path, log: Path) -> int:
        result = CliRunner().invoke(app, [*words])
        log.write_text(result.output)
        if result.exit_code == 0 and "--resume" not in words:
            KNOWN[self.key(words)] = shutil.copytree(folder, self.store / str(len(KNOWN)))
        return result.exit_code

    @property
    def folders(self) -> list[str]:
        """The folders that were run into, below the comparison's."""
        return [str(Path(words[words.index("--output") + 1]).relative_to(OUT)) for words in self.calls]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    found = Runner(tmp_path_factory.mktemp("store"))
    monkeypatch.setattr(processes, "run", found)
    return found


@pytest.fixture
def words(llama: Path, rows: dict[str, Path]) -> Words:
    """A comparison of the reward stage in two steps."""
    data = str(rows["pairs"])
    return ["compare-full", "reward", "--model", str(llama), "--data", data, "--output", str(OUT), *SHORT]


def report() -> Report:
    return results.read(OUT / "report.json")


@pytest.mark.slow
def test_a_comparison_of_reward_models(runner: Runner, perl: Perl, words: Words) -> None:
    result = perl(*words)
    assert runner.folders == [
        "reward/full/memory",
        "reward/lora-r-4/memory",
        "reward/full/seed-0",
        "reward/lora-r-4/seed-0",
    ]
    found = report()
    assert found.status == "finished"
    (only,) = found.comparisons
    full, lora = only.arms
    assert (full.name, full.is_baseline, full.learning_rate, full.rank) == ("full", True, pytest.approx(1e-3), None)
    assert (lora.name, lora.is_baseline, lora.learning_rate, lora.rank) == ("lora r=4", False, 1e-2, 4)
    assert full.precision == lora.precision == "float32"
    assert full.trainable_parameters > 10 * lora.trainable_parameters
    assert {"speed", "cpu_speed", "tokens_per_second", "trainable", "weights", "optimizer"} <= set(lora.ratios)
    assert lora.ratios["optimizer"] < 0.5
    assert full.memory_mb is not None and lora.memory_mb is not None
    assert set(full.quality) == {"accuracy", "auc"}
    assert full.runs[0].step_tokens == lora.runs[0].step_tokens
    assert full.predicted_mb and lora.predicted_mb and lora.predicted_mb < full.predicted_mb
    assert only.warnings == []
    assert only.paper["memory"]["Harmless"] == 0.431
    assert "lora r=4" in result.output and "report.html" in result.output


@pytest.mark.slow
def test_memory_is_that_of_the_process_that_ran_for_it(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words)
    apart = read_record(OUT / "reward/full/memory").memory["training_mb"]
    assert report().comparisons[0].arms[0].runs[0].memory_mb == apart
    assert not list((OUT / "reward/full/memory").glob("*.safetensors"))
    assert list((OUT / "reward/full/seed-0").glob("*.safetensors"))


@pytest.mark.slow
def test_nothing_is_left_for_going_on(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words)
    assert not list(OUT.rglob("checkpoint-*"))


@pytest.mark.slow
def test_the_record_tells_the_ratios(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words)
    record = read_record(OUT)
    assert (record.command, record.status, record.settings["seed"]) == ("compare-full", "finished", [0])
    assert record.metrics["reward/lora r=4/trainable"] == report().comparisons[0].arms[1].ratios["trainable"]


@pytest.mark.slow
def test_each_run_can_be_run_again_by_its_command(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words)
    run = report().comparisons[0].arms[1].runs[0]
    assert run.command == "perl reward --config out/reward/lora-r-4/seed-0.yaml --output DIR"
    perl(*run.command.split()[1:])
    assert read_record(Path("DIR")).metrics["accuracy"] == run.metrics["accuracy"]


@pytest.mark.slow
def test_the_report_is_rendered_again_by_its_folder(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words)
    page = (OUT / "report.html").read_text()
    (OUT / "report.html").unlink()
    assert "lora r=4" in perl("report", OUT).output
    assert (OUT / "report.html").read_text() == page


def test_resumed_only_what_is_missing_runs(runner: Runner, perl: Perl, words: Words) -> None:
    def stop(folder: Path) -> int:
        raise Stopped("Stopped by SIGINT")

    runner.faults["full/seed-0"] = stop
    result = perl(*words, code=130)
    assert ": perl compare-full --config out/settings.yaml --resume continues." in result.output
    assert read_record(OUT).status == "interrupted" and report().status == "interrupted"
    for arm in report().comparisons[0].arms:  # of the runs for memory nothing else counts
        assert (arm.failure, arm.quality, arm.steps_per_second) == (None, {}, None) and arm.memory_mb
    runner.faults.clear()
    runner.calls.clear()
    perl("compare-full", "--config", OUT / "settings.yaml", "--resume")
    assert runner.folders == ["reward/full/seed-0", "reward/lora-r-4/seed-0"]
    assert report().status == "finished"
    runner.calls.clear()
    perl("compare-full", "--config", OUT / "settings.yaml", "--resume")
    assert runner.folders == []


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words, "--save-steps", "1")
    record = read_record(OUT / "reward/full/seed-0")
    record.status = "interrupted"
    write_record(OUT / "reward/full/seed-0", record)
    runner.calls.clear()
    perl("compare-full", "--config", OUT / "settings.yaml", "--resume")
    assert [call[-1] for call in runner.calls] == ["--resume"]


def no_memory(folder: Path) -> int:
    """What a run leaves that found no memory on a GPU."""
    from perlcli import settings
    from perlcli.run.lifecycle import Run
    from perlcli.settings.yaml import read_config

    values = read_config(settings.Reward, folder.with_suffix(".yaml"))
    run = Run(settings.resolve(settings.build(settings.Reward, {**values, "output": str(folder)}), {}))
    run.begin()
    run.record.status, run.record.failure = "failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    run.record.memory["training_mb"] = 79_200.0
    run.write()
    return 1


def killed(folder: Path) -> int:
    """What a run leaves that the system killed."""
    no_memory(folder)
    record = read_record(folder)
    record.status, record.failure, record.memory = "running", None, {"before_mb": 1.0}
    write_record(folder, record)
    return -9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told", "again"),
    [
        (no_memory, "out of memory at 79.2 GB", []),
        (killed, "out of memory", ["reward/full/memory", "reward/full/seed-0"]),
    ],
    ids=["told", "killed"],
)
def test_an_arm_without_memory_is_a_result(
    runner: Runner, perl: Perl, words: Words, fault: Callable[[Path], int], told: str, again: list[str]
) -> None:
    runner.faults = {"full/memory": fault, "full/seed-0": fault}
    result = perl(*words)
    full, lora = report().comparisons[0].arms
    assert full.failure == told
    assert lora.failure is None and lora.ratios == {} and lora.quality
    assert told in result.output
    way_on = "out of memory: killed by signal 9, as the system does when it is out of memory (--resume tries again)"
    assert (way_on in result.output) == bool(again)
    runner.calls.clear()
    runner.faults.clear()
    perl("compare-full", "--config", OUT / "settings.yaml", "--resume")
    assert runner.folders == again  # what found no memory would find none again; a kill may have been anyone's
    assert report().comparisons[0].arms[0].failure == (None if again else told)


@pytest.mark.slow
def test_an_arm_that_finds_no_room_at_load_lets_the_others_run(runner: Runner, perl: Perl, words: Words) -> None:
    """The very first run, too: its error is the run's, not one of the settings."""

    def no_room(folder: Path) -> int:
        def fail(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError(NO_ROOM)

        with pytest.MonkeyPatch.context() as patch:
            PLACES["loading"](patch, fail)
            result = CliRunner().invoke(app, [*runner.calls[-1]])
        folder.with_suffix(".log").write_text(result.output)
        return result.exit_code

    runner.faults = {"full/memory": no_room, "full/seed-0": no_room}
    result = perl(*words, "--arms", "full,lora")
    full, lora = report().comparisons[0].arms
    assert full.failure == "out of memory" and lora.failure is None
    assert (
        "out of memory: The GPU's memory is too small (out of memory while loading the base in float" in result.output
    )
    assert result.output.startswith("device: CPU")


@pytest.mark.slow
def test_a_merge_without_room_on_the_gpu_is_made_on_the_cpu(sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Words, Any]] = []

    def run(words: Words, log: Path, environment: Any = None) -> int:
        calls.append((words, environment))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("Error: The GPU's memory is too small (out of memory while merging)\n")
        return int(environment is None)

    monkeypatch.setattr(processes, "run", run)
    given = settings.build(settings.CompareFull, {"stage": "rl", "output": str(OUT), "seed": (0,)})
    state = State(given, lifecycle.Run(given), Report(), {}, measures_memory=False)
    with pytest.raises(RunFailed, match="too small"):
        loop.merged(state, str(sft_run))
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    assert Path(loop.merged(state, str(sft_run))).parent == OUT / "merged"
    (_, first), (_, second), (words, third) = calls
    assert (first, second, third) == (None, None, {"CUDA_VISIBLE_DEVICES": ""}) and words[-1] == "--overwrite"


@pytest.mark.slow
def test_a_failed_arm_lets_the_others_run_and_is_told_at_the_end(runner: Runner, perl: Perl, words: Words) -> None:
    runner.faults = {"lora-r-4/memory": lambda folder: 1, "lora-r-4/seed-0": lambda folder: 1}
    result = perl(*words, "--lora-r", "4,8", code=1)
    assert "Error: 2 of 6 runs failed: reward/lora-r-4/memory: a planted fault" in result.output
    names = {arm.name: arm.failure for arm in report().comparisons[0].arms}
    assert names == {"full": None, "lora r=4": "failed: a planted fault", "lora r=8": None}
    assert read_record(OUT).status == "failed"
    runner.faults.clear()
    runner.calls.clear()
    perl("compare-full", "--config", OUT / "settings.yaml", "--resume")
    assert runner.folders == ["reward/lora-r-4/memory", "reward/lora-r-4/seed-0"]
    assert read_record(OUT).status == "finished"


def test_a_first_run_that_is_refused_stops_all(runner: Runner, perl: Perl, words: Words) -> None:
    Path("empty.jsonl").touch()
    result = perl(*words, "--data", "empty.jsonl", code=2)
    assert "Error: reward, " in result.output and "empty.jsonl" in result.output
    assert len(runner.calls) == 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--arms", "full,lora,nora"], "--arms: unknown arm nora"),
        (["--lora-r", "4,0"], "--lora-r must be above 0, not 0"),
        (["--lora-r", "4,x"], "--lora-r must be whole numbers, comma-separated, not 4,x"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--repeats", "0"], "--repeats must be above 0, not 0"),
        (["--temperature", "0.5"], "--temperature: not an option of perl reward"),
        (["--max-steps", "0"], "--max-steps must be above 0"),
        (["--dtype", "float16"], "--dtype float16 needs a GPU"),
        (["--data", "-"], "Standard input can only be read once"),
        (["--full-learning-rate", "0"], "--full-learning-rate must be above 0"),
    ],
)
def test_what_an_arm_would_refuse_is_refused_before_any_runs(
    runner: Runner, perl: Perl, words: Words, more: list[str], told: str
) -> None:
    assert told in perl(*words, *more, code=2).output
    assert runner.calls == [] and not OUT.exists()


def test_a_stage_must_be_named(perl: Perl) -> None:
    assert "STAGE is missing" in perl("compare-full", code=2).output


@pytest.mark.slow
def test_a_dry_run_tells_the_plan_and_writes_nothing(runner: Runner, perl: Perl, words: Words) -> None:
    result = perl(*words, "--seed", "0,1", "--dry-run")
    assert "reward: full, lora r=4; learning rate 0.01, full tuning 0.001" in result.output
    assert "6 runs, each in its own process (2 seeds), into out" in result.output
    assert runner.calls == [] and not OUT.exists()


@pytest.mark.slow
def test_a_dry_run_names_everything_that_its_stages_would_refuse(
    runner: Runner, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    words = ("compare-full", "all", "--model", llama, "--output", OUT, "--dry-run", "--lora-r", "4", "--max-steps", "1")
    sets = ("--lora-target-modules", "attention;q_proj,nowhere")
    lines = perl(*words, *sets, "--data", rows["pairs"], code=2).stderr.splitlines()
    problem = "lora r=4 q_proj,nowhere: --lora-target-modules: the model has no module"
    for stage, line in zip(("Error: sft", "reward", "rl"), lines, strict=False):
        assert line.startswith(f"{stage}, {problem}")
    assert len(lines) == 4 and lines[-1].startswith("Hint: its linear modules")
    reward = ("compare-full", "reward", *words[2:], "--data", rows["pairs"], "--arms", "full,lora,dora-8bit")
    told = perl(*reward, "--max-length", "2", code=2).stderr
    assert "Error: reward, full, lora r=4: " in told and "every row is longer than 2 tokens" in told
    assert "\nreward, dora-8bit r=4: The adapter is DoRA" in told
    assert runner.calls == [] and not OUT.exists()


@pytest.mark.slow
def test_every_set_of_modules_is_an_arm(runner: Runner, perl: Perl, words: Words) -> None:
    perl(*words, "--arms", "lora,dora-4bit", "--lora-target-modules", "attention,all-linear")
    assert [arm.name for arm in report().comparisons[0].arms] == [
        "lora r=4 attention",
        "lora r=4 all-linear",
        "dora-4bit r=4 attention",
        "dora-4bit r=4 all-linear",
    ]
    modules = {
        name: yaml.safe_load((OUT / f"reward/{name}/seed-0.yaml").read_text())["lora_target_modules"]
        for name in ("lora-r-4-attention", "lora-r-4-all-linear", "dora-4bit-r-4-all-linear")
    }
    assert list(modules.values()) == ["attention", "all-linear", "all-linear"]


@pytest.mark.slow
def test_memory_is_predicted_without_a_run(runner: Runner, perl: Perl, words: Words) -> None:
    told = perl(*words, "--arms", "full,lora,lora-4bit", "--estimate", "--gpu", "24GB").output
    assert [line.split("  ")[0] for line in told.splitlines()[3:]] == ["full", "lora r=4", "lora-4bit r=4"]
    assert "fits 24 GiB" in told and "largest batch" in told
    assert runner.calls == [] and not OUT.exists()


def test_a_gpu_is_of_a_prediction(perl: Perl, words: Words) -> None:
    assert "--gpu only applies with --estimate" in perl(*words, "--gpu", "24GB", code=2).output


@pytest.mark.slow
def test_equal_learning_rates_and_missing_held_out_rows_are_warnings(
    runner: Runner, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    perl(
        "compare-full",
        "reward",
        "--model",
        llama,
        "--data",
        rows["pairs"] / "train.jsonl",
        "--output",
        OUT,
        *SHORT,
        "--full-learning-rate",
        "1e-2",
    )
    warnings = report().comparisons[0].warnings
    assert [words for words in warnings if "learning rate" in words]
    assert [words for words in warnings if words.startswith("No rows were held out")]
    assert len(warnings) == 2


@pytest.mark.slow
def test_full_rl_takes_merged_adapters_and_lora_the_adapters_themselves(
    runner: Runner, perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    perl(
        "compare-full",
        "rl",
        "--model",
        sft_run,
        "--reward",
        reward_run,
        "--data",
        rows["prompts"],
        "--output",
        OUT,
        "--max-steps",
        "2",
        "--max-length",
        "128",
        "--max-completion-length",
        "8",
        "--per-device-train-batch-size",
        "4",
        "--gradient-accumulation-steps",
        "1",
    )
    full, lora = (yaml.safe_load((OUT / f"rl/{name}/seed-0.yaml").read_text()) for name in ("full", "lora"))
    assert lora["model"] == str(sft_run) and lora["reward"] == [str(reward_run)]
    assert Path(full["model"]).parent == Path(full["reward"][0]).parent == OUT / "merged"
    found = report().comparisons[0]
    assert [arm.name for arm in found.arms] == ["full", "lora"]
    assert found.arms[1].rank == 4  # the adapter's own
    assert set(found.arms[0].runs[0].phases) == {"sampling", "scoring", "anchor", "learning"}
    assert "reward" in found.arms[0].quality
    records = [read_record(OUT / f"rl/{name}/seed-0") for name in ("full", "lora")]
    assert records[0].metrics["first_reward"] == pytest.approx(records[1].metrics["first_reward"], abs=1e-3)
    assert records[1].memory["base_copies"] == 1


def test_rl_without_a_reward_is_refused_by_its_first_run(runner: Runner, perl: Perl) -> None:
    assert "--reward is missing" in perl("compare-full", "rl", "--max-steps", "1", "--output", OUT, code=2).output
    assert len(runner.calls) == 1


@pytest.mark.slow
def test_ranks_of_an_adapter_are_its_own(perl: Perl, sft_run: Path, reward_run: Path) -> None:
    words = ("compare-full", "rl", "--model", sft_run, "--reward", reward_run, "--data", "coffee", "--lora-r", "2,4")
    assert f"--lora-r 2,4: {sft_run} is already an adapter" in perl(*words, code=2).output


@pytest.mark.slow
def test_all_builds_each_stage_on_the_one_before(
    runner: Runner, perl: Perl, llama: Path, rows: dict[str, Path]
) -> None:
    perl(
        "compare-full",
        "all",
        "--model",
        llama,
        "--data",
        rows["pairs"],
        "--output",
        OUT,
        "--arms",
        "full,lora",
        "--max-steps",
        "1",
        "--max-length",
        "128",
        "--per-device-train-batch-size",
        "4",
        "--lora-r",
        "4",
        "--max-completion-length",
        "8",
        "--gradient-accumulation-steps",
        "1",
        "--max-eval-samples",
        "4",
    )
    assert [found.stage for found in report().comparisons] == ["sft", "reward", "rl"]
    configs = {
        (stage, arm): yaml.safe_load((OUT / stage / arm / "seed-0.yaml").read_text())
        for stage in ("reward", "rl")
        for arm in ("full", "lora-r-4")
    }
    starts = {config["model"] for config in configs.values()}
    assert len(starts) == 1 and Path(starts.pop()).parent == OUT / "merged"  # the SFT policy, for every arm
    assert configs["rl", "lora-r-4"]["reward"] == ["out/reward/lora-r-4/seed-0"]
    assert Path(configs["rl", "full"]["reward"][0]).parent == OUT / "merged"
    assert read_record(OUT / "rl/lora-r-4/seed-0").memory["base_copies"] == 1


@pytest.mark.slow
def test_a_stage_without_its_foundation_stops(runner: Runner, perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    runner.faults = {"sft/lora-r-4/seed-0": lambda folder: 1}
    words = ["compare-full", "all", "--model", llama, "--data", rows["pairs"], "--output", OUT, *SHORT]
    words += ["--max-completion-length", "8", "--gradient-accumulation-steps", "1"]
    assert "sft, " in (output := perl(*words, code=1).output) and "the next stage builds on it" in output


@pytest.mark.slow
def test_the_embedded_default_in_processes_of_its_own(perl: Perl) -> None:
    result = perl("compare-full", "reward", "--max-steps", "2", "--output", OUT)
    full, lora = report().comparisons[0].arms
    assert full.memory_mb is not None and lora.memory_mb is not None
    assert lora.ratios["memory"] < 1
    assert "lora r=8" in result.output


def test_the_command_to_go_on_may_be_typed_as_it_stands(tmp_path: Path) -> None:
    given = settings.build(settings.CompareFull, {"stage": "sft", "output": str(tmp_path / "a b"), "seed": (0,)})
    state = State(given, lifecycle.Run(given), results.Report(), {}, measures_memory=False)
    loop.begin(state)
    assert shlex.split(state.report.command)[-1] == f"{tmp_path}/a b/settings.yaml"
