"""benchmarks/gpu_proof.py: its jobs, tables, aims, time keeping and resumption with faked jobs; and a rehearsal."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPES = ("llama-3.2-1b", "llama-3.1-8b")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    names = ("gpu_jobs", "gpu_proof", "gpu_predictions", "gpu_tables", "gpu_work", "measured", "one_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def jobs(modules: SimpleNamespace) -> list[Any]:
    return modules.gpu_jobs.every_job(*SHAPES)


def finished(**figures: Any) -> Row:
    return {"outcome": "finished", "seconds": 1.0, **figures}


# Jobs


def test_jobs_have_work_and_come_after_what_they_need(modules: SimpleNamespace, jobs: list[Any]) -> None:
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert {job.kind for job in jobs} == set(modules.gpu_work.KINDS)
    assert all(job.needs in names[: names.index(job.name)] for job in jobs if job.needs)


def test_the_first_call_reaches_every_comparison_with_stock(modules: SimpleNamespace, jobs: list[Any]) -> None:
    """Before the time is up: what is expected to take longer is left for a second call."""
    total, reached = 0.0, set()
    for job in jobs:
        total += job.seconds
        if total < modules.gpu_proof.SECONDS - modules.gpu_proof.RESERVE:
            reached.add(job.name)
    assert {"reward-small-full", "rl-small-bf16-full", "rl-large-bf16-stock", "rl-large-4bit-stock"} <= reached


def test_some_jobs_can_be_chosen(modules: SimpleNamespace, jobs: list[Any]) -> None:
    found = modules.gpu_proof.chosen(jobs, "rl-small-bf16-s*,precisions")
    assert [job.name for job in found] == ["machine", "inputs-small", "rl-small-bf16-stock", "precisions"]
    with pytest.raises(SystemExit, match="--only must name jobs, not speed"):
        modules.gpu_proof.chosen(jobs, "speed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o"], "--out and --work are required"),
        (["--out", "o", "--work", "w", "--seconds", "9"], "--seconds must be above 10, not 9"),
    ],
)
def test_bad_options_are_reported(
    modules: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        modules.gpu_proof.parse(words)
    assert message in capsys.readouterr().err


# Aims and tables


def test_aims_compare_jobs_that_exist(modules: SimpleNamespace, jobs: list[Any]) -> None:
    names = {job.name for job in jobs}
    assert all({aim.job, aim.baseline} <= names for aim in modules.gpu_tables.AIMS)


@pytest.mark.parametrize(
    ("one", "other", "shown", "state"),
    [
        (finished(training_mb=25.0), finished(training_mb=100.0), "0.25", "met"),
        (finished(training_mb=26.0), finished(training_mb=100.0), "0.26", "missed"),
        (finished(training_mb=20.0), {"outcome": "out of memory", "peak_mb": 100.0}, "below 0.20", "met"),
        (finished(training_mb=40.0), {"outcome": "out of memory", "peak_mb": 100.0}, "below 0.40", "not measured"),
        (finished(training_mb=40.0), {"outcome": "failed"}, "", "not measured"),
        ({"outcome": "out of memory", "peak_mb": 9.0}, finished(training_mb=100.0), "", "not measured"),
        ({}, {}, "", "not measured"),
    ],
)
def test_memory_next_to_its_aim(modules: SimpleNamespace, one: Row, other: Row, shown: str, state: str) -> None:
    row = modules.gpu_tables.aims({"reward-small-lora": one, "reward-small-full": other})[0]
    assert row == ["reward-small-lora / reward-small-full", "memory", shown, "<= 0.25", state]


@pytest.mark.parametrize(("seconds", "state"), [(3.0, "met"), (2.9, "missed")])
def test_speed_next_to_its_aim(modules: SimpleNamespace, seconds: float, state: str) -> None:
    results = {"reward-small-lora": finished(step_s=2.0), "reward-small-full": finished(step_s=seconds)}
    row = modules.gpu_tables.aims(results)[2]
    assert row[1:] == ["speed", f"{seconds / 2:.2f}x", ">= 1.50x", state]


def test_predictions_are_compared_by_phase(modules: SimpleNamespace) -> None:
    predicted = {"loading": 109.0, "training": 230.0, "phases": {"learning": 230.0}}
    results = {
        "a": finished(predicted=predicted, loading_mb=100.0, training_mb=200.0),
        "b": finished(predicted=predicted, loading_mb=1.0, training_mb=1.0, own={"loading_mb": 109.0}),
        "c": {"outcome": "out of memory", "predicted": predicted, "training_mb": 200.0},
    }
    assert modules.gpu_tables.predictions(results)[:3] == [
        ["a", "loading", "109", "100", "1.09", "met"],
        ["a", "training", "230", "200", "1.15", "missed"],
        ["b", "loading", "109", "109", "1.00", "met"],
    ]
    assert modules.gpu_tables.aims(results)[-1][2:] == ["2 of 4", "0.90 to 1.10", "missed"]
    assert modules.gpu_tables.aims({})[-1][2:] == ["0 of 0", "0.90 to 1.10", "not measured"]


def test_the_report_has_every_job(modules: SimpleNamespace, jobs: list[Any]) -> None:
    ways = {"as it is": {"tokens_s": 100.0, "token_ms": 1.0, "first_s": 2.0}}
    compiled = {"as it is, compiled": {"tokens_s": 250.0, "token_ms": 0.4, "first_s": 30.0}}
    sizes = {"mean_length": 4.0, "min_length": 4.0, "max_length": 4.0, "step_tokens": 64.0}
    results = {
        "machine": finished(checks={"a C compiler and Python.h for Triton": False}, notes=["no header"]),
        "rl-small-bf16-perl": finished(training_mb=1234.5, step_s=0.5, phases={"seconds_sampling": 0.25}, **sizes),
        "rl-small-bf16-stock": finished(**sizes | {"step_tokens": 63.0}),
        "reward-small-full": {"outcome": "failed", "seconds": 3.0, "error": "a | b\nc"},
        "sampling": finished(ways=ways),
        "sampling-compiled": finished(ways=compiled),
    }
    report = modules.gpu_tables.report(results, jobs)
    assert all(f"| {job.name} |" in report for job in jobs)
    for row in (
        "| machine | a C compiler and Python.h for Triton | NO |",
        "| rl-small-bf16-perl | finished |  | 1,234 |  |  |  | 0.500 |",
        "| rl-small-* | each run reads and writes the same number of tokens | NO |",
        "| rl-small-bf16-perl | 0.250 |  |  |  |",
        "| reward-small-full | failed | 3 | 22 | a / b c |",
        "| as it is, compiled | 250 | 2.50x | 0.4 | 30.0 |",
        "| resume | left out |  | 15 |  |",
        "- machine: no header",
    ):
        assert row in report


def test_a_job_in_a_line(modules: SimpleNamespace) -> None:
    result = finished(training_mb=1234.5, step_s=0.5, checks={"KL is 0 at the start": False}, notes=["KL 0.1"])
    line = modules.gpu_tables.line("rl-small-bf16-perl", result, 20.0)
    assert line == (
        "rl-small-bf16-perl: finished, 1 s (H100: 20); training 1,234 MB; step 0.500 s; NOT: KL is 0 at the start\n"
        "    KL 0.1"
    )
    failed = {"outcome": "cut off", "seconds": 9.0, "error": "after 9 s", "log": "\n".join("abcdefgh")}
    line = modules.gpu_tables.line("resume", failed, 3.0)
    assert line.split("\n    ") == ["resume: cut off, 9 s (H100: 3)", "after 9 s", *"cdefgh"]


# Time and resumption, with faked jobs


class Fake:
    """Workers that take the seconds and have the outcomes that a test gives; time passes only in them."""

    forked = False

    def __init__(self, outcomes: dict[str, str] | None = None, seconds: float = 10.0) -> None:
        self.outcomes, self.seconds, self.now = outcomes or {}, seconds, 0.0
        self.ran: list[str] = []
        self.limits: list[float] = []

    def next(self, *, is_last: bool) -> "Fake":
        return self

    def run(self, job: Row, limit: float) -> Row:
        self.ran.append(job["name"])
        self.limits.append(limit)
        self.now += min(limit, self.seconds)
        return {"outcome": self.outcomes.get(job["name"], "finished")}

    def clock(self) -> float:
        return self.now


@pytest.fixture
def run(modules: SimpleNamespace, jobs: list[Any], tmp_path: Path) -> Callable[..., tuple[Any, Fake]]:
    """Runs some of the jobs with a fake, in folders that later calls share."""

    def go(fake: Fake, only: str = "*", seconds: float = 580.0, *words: str) -> tuple[Any, Fake]:
        common = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "more")]
        given = modules.gpu_proof.parse([*common, "--seconds", str(seconds), *words])
        for folder in (given.out, given.work):
            folder.mkdir(exist_ok=True)
        shapes = modules.gpu_jobs.every_job(given.small, given.large)
        proof = modules.gpu_proof.Proof(given, modules.gpu_proof.chosen(shapes, only))
        modules.gpu_proof.run(proof, fake, fake.clock)
        return proof, fake

    return go


def test_no_job_may_take_more_than_the_time_that_is_left(run: Any, modules: SimpleNamespace) -> None:
    proof, fake = run(Fake(seconds=1000.0), "tests,roles", 200.0)
    assert fake.limits == [104.0, 86.0]  # 3 x 28 + 20, and what is left of 200 minus the reserve
    assert fake.now <= 200 - modules.gpu_proof.RESERVE
    assert proof.results["roles"]["outcome"] == "left out"
    assert proof.results["roles"]["error"] == "only 0 s left"


def test_a_short_job_uses_the_time_that_is_too_short_for_a_long_one(run: Any) -> None:
    proof, fake = run(Fake(), "tests,resume", 45.0)
    assert fake.ran == ["machine", "resume"]
    assert proof.open == ["tests"]


def test_with_more_time_each_job_may_take_longer(run: Any) -> None:
    _, fake = run(Fake(), "machine", 5800.0)
    assert fake.limits == [1040.0]


def test_jobs_without_their_inputs_are_left_out(run: Any) -> None:
    proof, fake = run(Fake({"inputs-small": "failed"}), "rl-small-bf16-perl,resume")
    assert fake.ran == ["machine", "inputs-small", "resume"]
    assert proof.results["rl-small-bf16-perl"]["error"] == "inputs-small did not finish"


def test_a_machine_on_which_no_command_starts_costs_no_more_time(run: Any) -> None:
    proof, fake = run(Fake({"machine": "failed"}), "resume,precisions")
    assert fake.ran == ["machine"]
    assert proof.open == ["machine", "resume", "precisions"]
    assert run(Fake(), "resume,precisions")[1].ran == ["machine", "resume", "precisions"]


def test_a_second_call_runs_what_failed_or_was_left_out(run: Any) -> None:
    first = {"resume": "failed", "precisions": "cut off", "no-room": "needs a GPU", "roles": "out of memory"}
    run(Fake(first), "resume,precisions,no-room,roles")
    proof, fake = run(Fake(), "resume,precisions,no-room,roles")
    assert fake.ran == ["resume", "precisions"]
    assert proof.open == []
    assert run(Fake(), "resume,precisions,no-room,roles")[1].ran == []
    assert len(proof.commands) == 2


def test_what_failed_comes_after_what_was_left_out(run: Any) -> None:
    proof, _ = run(Fake({"tests": "cut off"}, seconds=55.0), "tests,roles", 140.0)
    assert proof.open == ["tests", "roles"]
    _, fake = run(Fake(), "tests,roles")
    assert fake.ran == ["roles", "tests"]
    run(Fake({"inputs-small": "failed"}), "rl-small-bf16-perl")
    assert run(Fake(), "rl-small-bf16-perl")[1].ran == ["inputs-small", "rl-small-bf16-perl"]


def test_a_result_for_another_model_is_not_kept(run: Any) -> None:
    run(Fake(), "inputs-small,precisions")
    _, fake = run(Fake(), "inputs-small,precisions", 580.0, "--small", "qwen2.5-1.5b")
    assert fake.ran == ["inputs-small"]


def test_the_report_is_written_after_each_job(run: Any, modules: SimpleNamespace, tmp_path: Path) -> None:
    seen = []

    class Looking(Fake):
        def run(self, job: Row, limit: float) -> Row:
            path = tmp_path / "out" / "nvidia-h100-proof.json"
            seen.append(sorted(json.loads(path.read_text())["jobs"]) if path.exists() else [])
            named = {"device": "NVIDIA H100", "versions": {"driver": "580.1"}} if job["name"] == "machine" else {}
            return super().run(job, limit) | named | {"log": "a line of a log"}

    run(Looking(), "resume,precisions", 580.0, "--commit", "abc")
    assert seen == [[], ["machine"], ["machine", "resume"]]
    for folder in ("out", "more"):
        about = json.loads((tmp_path / folder / "nvidia-h100-proof.json").read_text())["about"]
        assert (about["device"], about["git_commit"], about["versions"]["driver"]) == ("NVIDIA H100", "abc", "580.1")
        assert "## Jobs" in (tmp_path / folder / "nvidia-h100-proof.md").read_text()
    assert (tmp_path / "out" / "logs.txt").read_text().count("a line of a log") == 3
    assert "a line of a log" not in (tmp_path / "out" / "nvidia-h100-proof.json").read_text()


def test_a_fault_of_the_report_does_not_end_the_jobs(
    run: Any, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.gpu_tables, "report", lambda *_: 1 / 0)
    assert run(Fake(), "resume")[1].ran == ["machine", "resume"]


# Processes

SCRIPT = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    job = json.loads(line)
    print("began", job["name"], flush=True)
    if job["name"] == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", child.pid, flush=True)
        time.sleep(60)
    if job["name"] == "dies":
        os._exit(7)
    if job["name"] == "crashes":
        os.write(int(os.environ["GPU_PROOF_PIPE"]), b"exit code -11\\n")
        continue
    open(job["answer"], "w").write(json.dumps({"outcome": "finished", "pid": os.getpid()}))
    if not job["forked"]:
        os._exit(0)
    os.write(int(os.environ["GPU_PROOF_PIPE"]), b"exit code 0\\n")
"""


@pytest.fixture
def workers(modules: SimpleNamespace, tmp_path: Path) -> Iterator[Callable[[bool], Any]]:
    """Workers whose process runs SCRIPT."""
    made = []

    def make(forked: bool) -> Any:
        made.append(modules.gpu_proof.Workers(tmp_path, "cpu", forked=forked, command=(sys.executable, "-c", SCRIPT)))
        return made[-1]

    yield make
    for each in made:
        each.end()


def is_alive(process: Path) -> bool:
    """Whether a process runs, by its folder in /proc."""
    try:
        return "zombie" not in (process / "status").read_text()
    except OSError:
        return False


def order(tmp_path: Path, name: str, *, forked: bool) -> Row:
    return {"name": name, "answer": str(tmp_path / "answer.json"), "forked": forked}


@pytest.mark.parametrize("forked", [False, True])
def test_each_job_is_answered(workers: Any, tmp_path: Path, forked: bool) -> None:
    pool = workers(forked)
    results = [pool.next(is_last=n == 2).run(order(tmp_path, f"job {n}", forked=forked), 20.0) for n in range(3)]
    assert [one["outcome"] for one in results] == ["finished"] * 3
    assert len({one["pid"] for one in results}) == (1 if forked else 3)
    assert pool.count == (1 if forked else 3)
    assert [one["log"] for one in results] == [f"began job {n}\n" for n in range(3)]


@pytest.mark.parametrize("forked", [False, True])
def test_a_job_that_hangs_costs_only_itself(workers: Any, tmp_path: Path, forked: bool) -> None:
    pool = workers(forked)
    start = time.monotonic()
    result = pool.next(is_last=False).run(order(tmp_path, "hangs", forked=forked), 1.5)
    assert time.monotonic() - start < 10
    assert (result["outcome"], result["error"]) == ("cut off", "after 2 s")
    child = Path("/proc") / result["log"].split("child ")[1].strip()
    while is_alive(child) and time.monotonic() - start < 10:
        time.sleep(0.05)
    assert not is_alive(child)
    assert pool.next(is_last=True).run(order(tmp_path, "next", forked=forked), 20.0)["outcome"] == "finished"


@pytest.mark.parametrize(
    ("name", "forked", "how"), [("dies", False, "exit code 7"), ("dies", True, "exit code 7"), ("crashes", True, "-11")]
)
def test_a_job_that_dies_costs_only_itself(workers: Any, tmp_path: Path, name: str, forked: bool, how: str) -> None:
    pool = workers(forked)
    result = pool.next(is_last=False).run(order(tmp_path, name, forked=forked), 20.0)
    assert result["outcome"] == "failed"
    assert result["error"].startswith("the process ended without a result: ") and result["error"].endswith(how)
    assert pool.next(is_last=True).run(order(tmp_path, "next", forked=forked), 20.0)["outcome"] == "finished"


def test_a_process_that_dies_before_its_job_says_why(modules: SimpleNamespace, tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import no_such_module")
    pool = modules.gpu_proof.Workers(tmp_path, "cpu", forked=False, command=command)
    worker = pool.next(is_last=True)
    worker.process.wait(20)
    result = worker.run(order(tmp_path, "job", forked=False), 20.0)
    pool.end()
    assert result["error"] == "the process ended without a result: exit code 1"
    assert "No module named 'no_such_module'" in result["log"]


def test_a_job_that_fails_says_why(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fails(error: BaseException) -> Callable[[Row], Row]:
        def action(job: Row) -> Row:
            raise error

        return action

    for error, outcome in (
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError("The GPU's memory is too small"), "out of memory"),
        (ValueError("wrong"), "failed"),
        (SystemExit("perl reward failed"), "failed"),
    ):
        monkeypatch.setitem(modules.gpu_work.KINDS, "fails", fails(error))
        result = modules.gpu_work.result_of({"kind": "fails"})
        assert (result["outcome"], result["error"]) == (outcome, f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("failure", "error"), [("OutOfMemoryError: CUDA out of memory", MemoryError), ("NaN", SystemExit)]
)
def test_a_failed_command_is_out_of_memory_or_a_failure(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str, error: type[BaseException]
) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"failure": failure}))
    monkeypatch.setattr("perlcli.cli.app.app", lambda *_, **__: 1)
    with pytest.raises(error, match=failure):
        modules.one_base.perl(["reward"], tmp_path)


# Predictions


def test_the_kept_predictions_are_of_these_jobs(modules: SimpleNamespace, jobs: list[Any]) -> None:
    found = modules.gpu_predictions.read(BENCHMARKS / "predictions.json")
    assert list(found) == [job.name for job in jobs if modules.gpu_predictions.settings_of(job) is not None]
    assert all(one["loading"] > 1000 and one["training"] > 1000 for one in found.values())


def test_predictions_are_of_the_runs_that_are_measured(modules: SimpleNamespace, jobs: list[Any]) -> None:
    """The same settings: sizes, precision, checkpointing and rewards."""
    by_name = {job.name: job for job in jobs}
    settings_of = modules.gpu_predictions.settings_of
    reward = settings_of(by_name["reward-small-lora-8bit-reentrant"])
    assert (reward.model.load_in_8bit, reward.data.max_length, reward.train.per_device_train_batch_size) == (
        True,
        512,
        8,
    )
    assert any("use_reentrant" in item for item in reward.train.set)
    rl = settings_of(by_name["rl-large-4bit-perl"])
    assert (rl.model.load_in_4bit, rl.data.max_length, rl.sampling.max_completion_length) == (True, 256, 64)
    assert len(settings_of(by_name["rl-small-bf16-perl-4-rewards"]).sampling.reward) == 4
    assert settings_of(by_name["reward-small-full"]).lora.full
    assert settings_of(by_name["rl-small-bf16-stock"]) is None


def test_figures_name_device_and_commit(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert modules.measured.short_name("cuda", "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert modules.measured.short_name("cpu", "AMD EPYC (2 cores)") == "cpu"
    monkeypatch.setattr("perlcli.run.record.git_commit", lambda: None)
    assert modules.measured.commit() == "unknown"


# A rehearsal


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory on a CPU is read from /proc")
def test_a_rehearsal_on_a_cpu_runs_every_job(modules: SimpleNamespace, tmp_path: Path) -> None:
    """Every job on the tiny model, then a second call for one whose result was removed, in processes of their own."""
    script, tiny = str(BENCHMARKS / "gpu_proof.py"), ["--small", "tiny", "--large", "tiny"]
    predictions = tmp_path / "predictions.json"
    out, work, results = tmp_path / "out", tmp_path / "work", tmp_path / "results"
    words = [*tiny, "--device", "cpu", "--out", str(out), "--work", str(work), "--results", str(results)]
    words += ["--predictions", str(predictions), "--seconds", "1800"]

    def call(*words: str) -> str:
        found = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
        assert found.returncode == 0, (found.stdout + found.stderr)[-10_000:]
        return found.stdout

    call(*tiny, "--predict", str(predictions))
    first = call(*words)
    jobs = modules.gpu_jobs.every_job("tiny", "tiny")
    found = json.loads((results / "cpu-proof.json").read_text())["jobs"]
    outcomes = {job.name: found[job.name]["outcome"] for job in jobs}
    assert outcomes == {name: "needs a GPU" if name == "no-room" else "finished" for name in outcomes}
    assert [name for name, one in found.items() for holds in one.get("checks", {}).values() if not holds] == []
    assert all(
        one["training_mb"] > 0 and one["step_s"] > 0
        for name, one in found.items()
        if name.startswith(("rl-", "reward-"))
    )
    assert (results / "cpu-proof.md").read_text() == (out / "cpu-proof.md").read_text()
    aims = modules.gpu_tables.aims(found)
    assert [row for row in aims if row[-1] == "not measured"] == []
    assert all(f"| {way} |" in first for job in jobs for way in job.values.get("ways", ()))
    phases = {(row[0], row[1]) for row in modules.gpu_tables.predictions(found)}
    assert {("reward-small-lora", "training"), ("rl-small-4bit-perl", "training")} <= phases

    state = json.loads((work / "proof.json").read_text())
    del state["jobs"]["rl-small-bf16-stock"]
    (work / "proof.json").write_text(json.dumps(state))
    again = call(*words, "--processes", "fresh")
    assert [line.split(":")[0] for line in again.splitlines() if "(H100:" in line] == ["rl-small-bf16-stock"]
    assert not any("(H100:" in line for line in call(*words).splitlines())
