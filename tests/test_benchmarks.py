"""The benchmark scripts: their command lines, their figures, and short runs on a CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "one_base.py"


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], Any]]:
    """Imports a script by its name, in the way that the scripts import each other."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPT.with_name(f"{name}.py"))
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(SCRIPT.parent)])
        yield load


@pytest.fixture(scope="module")
def one_base(script: Callable[[str], Any]) -> Any:
    """The script one_base.py as a module."""
    return script("one_base")


@pytest.fixture(scope="module")
def data_script(script: Callable[[str], Any]) -> Any:
    """The script data.py as a module."""
    return script("data")


def run_of(one_base: Any, arm: str, repeat: int, peak: float, step: float, **more: Any) -> dict[str, Any]:
    """The result of one process."""
    times = (9.0, 9.0, step, step, step)
    figures = one_base.Figures(arm, "finished", peak_mb=peak, training_mb=peak, wall=times, cpu=times, copies=1.0)
    return asdict(figures) | {"repeat": repeat, "kinds": ["memory", "time"], "step_tokens": 64.0} | more


def test_command_line(one_base: Any) -> None:
    given = one_base.parse(["--config", "tiny", "--arms", "perl,stock", "--precision", "4bit"])
    assert given.arms == ["perl", "stock"]
    assert given.precision == "4bit"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "tiny", "--arms", "perl,mine"], "not mine"),
        (["--config", "tiny", "--batch", "6"], "a multiple of --generations"),
        (["--config", "tiny", "--steps", "2"], "--steps must be above 2, the number of warm-up steps, not 2"),
        ([], "one of the arguments --model --config is required"),
    ],
)
def test_bad_options_are_reported(
    one_base: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        one_base.parse(words)
    assert message in capsys.readouterr().err


def test_figures_are_medians_and_ratios_of_one_repeat(one_base: Any) -> None:
    found = [
        run_of(one_base, "perl", 0, 100.0, 1.0),
        run_of(one_base, "stock", 0, 150.0, 2.0),
        run_of(one_base, "stock", 1, 160.0, 4.0),
        run_of(one_base, "perl", 1, 100.0, 4.0),
    ]
    arms = one_base.summary(found, base_mb=50.0)
    assert arms["stock"]["peak_mb"] == [155.0, 150.0, 160.0]
    against = arms["perl"]["against stock"]
    assert against["saved_bases"] == pytest.approx([1.1, 1.0, 1.2])
    assert against["wall"] == pytest.approx([0.75, 0.5, 1.0])
    shown = one_base.table(arms, on_gpu=False)
    assert "| perl / stock | 0.646 (0.625 to 0.667) |" in shown
    assert "reserved" not in shown


def test_out_of_memory_is_a_result(one_base: Any) -> None:
    failed = asdict(one_base.Figures("full", "out of memory", peak_mb=80000.0)) | {
        "repeat": 0,
        "kinds": ["memory", "time"],
    }
    arms = one_base.summary([run_of(one_base, "perl", 0, 100.0, 1.0), failed], base_mb=50.0)
    assert "against full" not in arms["perl"]
    assert "| full | out of memory (at 80,000) |" in one_base.table(arms, on_gpu=True)
    assert one_base.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not one_base.is_out_of_memory(RuntimeError("shapes differ"))


def test_different_work_is_an_error(one_base: Any) -> None:
    found = [run_of(one_base, "perl", 0, 1.0, 1.0), run_of(one_base, "stock", 0, 1.0, 1.0, step_tokens=63.0)]
    with pytest.raises(SystemExit, match="step_tokens is"):
        one_base.check_equal_work(found)


def test_every_result_says_what_it_was_measured_on() -> None:
    for path in (SCRIPT.parent / "results").glob("*.json"):
        about = json.loads(path.read_text(encoding="utf-8"))["about"]
        assert all(about[name] for name in ("command", "date", "git_commit", "device", "versions"))
        assert path.with_suffix(".md").exists()


def test_figures_of_data_are_saved_as_json_and_markdown(data_script: Any, tmp_path: Path) -> None:
    found = [data_script.Figures(1000, 1.5, 12.3, 14.5, 600.0)]
    about = {"command": "c", "date": "d", "git_commit": "g", "device": "e", "versions": {"a": "1"}, "model": "m"}
    data_script.write(tmp_path / "results" / "a", about, found)
    assert json.loads((tmp_path / "results" / "a.json").read_text())["runs"] == [asdict(found[0])]
    assert "| 1,000 | 2 | 12.3 | 14.5 | 600 |" in (tmp_path / "results" / "a.md").read_text()


def test_a_long_run_that_grows_is_reported(script: Any, tmp_path: Path) -> None:
    long_run = script("long_run")
    flat = [long_run.Look(step, 600.0 + step % 2, 400.0, 3 + (step == 10), 2) for step in range(1, 101)]
    found = long_run.parts(flat, 100)
    assert [one.steps for one in found] == ["1 to 25", "26 to 50", "51 to 75", "76 to 99"]
    assert (found[0].resident_mb, found[0].files, found[0].most_files, found[0].looks) == (601.0, 3, 4, 25)
    assert long_run.faults(found, 4.0) == []
    grown = [long_run.Look(step, 600.0 + step / 10, 400.0, 3 + step // 40, 2 + step // 90) for step in range(1, 101)]
    grown_parts = long_run.faults(long_run.parts(grown, 100), 4.0)
    assert [line.split(":")[0] for line in grown_parts] == ["memory", "open files"]
    about = {
        "command": "c",
        "runs": ["r"],
        "date": "d",
        "git_commit": "g",
        "device": "e",
        "versions": {},
        "seconds": 1.0,
    }
    long_run.write(tmp_path / "a", about, found, {"metrics_rows": 100})
    assert "| 1 to 25 | 601.0 | 400.0 | 601.0 | 3 | 4 | 2 |" in (tmp_path / "a.md").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["parts"][0] == asdict(found[0])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_process_is_read_from_outside(script: Any, tmp_path: Path) -> None:
    long_run = script("long_run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    with (tmp_path / "open").open("w"):
        one = long_run.look(os.getpid(), tmp_path / "metrics.jsonl")
    assert one.step == 7 and one.resident_mb > one.private_mb > 10 and one.threads >= 1
    assert one.files - 1 == long_run.look(os.getpid(), tmp_path / "metrics.jsonl").files
    assert long_run.look(2**22 + 1, tmp_path / "metrics.jsonl") is None


def test_rows_have_the_requested_length(script: Any, tmp_path: Path, llama: Path) -> None:
    from perlcli import data
    from perlcli.data.chat import Style
    from perlcli.data.render import of_demonstration, of_preference, of_prompt
    from perlcli.model import sources, tokenizers

    shapes = script("shapes")
    shapes.make_model("tiny", tmp_path / "model", "float32")
    for model in (tmp_path / "model", llama):
        shapes.make_rows(model, tmp_path, 40, 10, 3)
        source = sources.locate(str(model))
        render = tokenizers.renderer(source, tokenizers.load_tokenizer(source), Style(chat=False))
        (pair, *_), (chat, *_), (prompt, *_) = (
            data.load(str(tmp_path / file), use).rows
            for file, use in (("pairs.jsonl", "reward"), ("chats.jsonl", "sft"), ("prompts.jsonl", "rl"))
        )
        assert {len(ids) for ids in of_preference(render, pair).values()} == {40}
        assert len(of_demonstration(render, chat)["input_ids"]) == 40
        assert len(of_prompt(render, prompt)["ids"]) == 30


def test_predictions_are_next_to_measurements(script: Any, tmp_path: Path) -> None:
    estimate = script("estimate")
    found = [
        estimate.Figures("reward", "full", 110.0, 100.0, 50.0, 50.0, None),
        estimate.Figures("rl", "full", 90.0, None, 60.0, None, None, "out of memory: at 79 GB"),
    ]
    about = {"command": "c", "date": "d", "git_commit": "g", "device": "e", "versions": {"a": "1"}, "model": "m"}
    estimate.write(tmp_path / "results" / "a", about, found)
    shown = (tmp_path / "results" / "a.md").read_text()
    assert "| reward | full | 110 | 100 | 1.10 |" in shown
    assert "| rl | full | 90 | out of memory |  |" in shown
    assert json.loads((tmp_path / "results" / "a.json").read_text())["runs"][0]["ratio"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "qlora"], r"--arms must be one or more of full, lora, .*, not qlora"),
        (["--stages", "rm"], r"--stages must be one or more of sft, reward, rl, not rm"),
    ],
)
def test_unknown_arms_and_stages_are_reported(
    script: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        script("estimate").parse(["--config", "tiny", *words])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory on a CPU is read from /proc")
def test_predictions_are_compared_with_runs(tmp_path: Path) -> None:
    words = ["--config", "tiny", "--stages", "reward,rl", "--arms", "full,lora", "--steps", "2", "--length", "64"]
    command = [sys.executable, str(SCRIPT.with_name("estimate.py")), *words, "--output", str(tmp_path / "tiny")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    runs = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["stage"], run["arm"]) for run in runs] == [
        ("reward", "full"),
        ("reward", "lora"),
        ("rl", "full"),
        ("rl", "lora"),
    ]
    assert all(run["measured_mb"] > 0 and run["predicted_mb"] > 0 for run in runs)


@pytest.mark.slow
def test_the_data_script_measures_the_command(data_script: Any, tmp_path: Path, llama: Path) -> None:
    words = ["--rows", "20", "40", "--model", str(llama), "--output", str(tmp_path / "a")]
    command = [sys.executable, str(SCRIPT.with_name("data.py")), *words]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("perl reward  yes  pairs, 40 rows read, 40 kept") == 1
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert [run["rows"] for run in runs] == [20, 40]
    assert all(run["cpu_seconds"] > 0 and run["peak_mb"] > 50 for run in runs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory on a CPU is read from /proc")
def test_three_arms_on_a_cpu(tmp_path: Path, llama: Path) -> None:
    words = [
        "--steps",
        "3",
        "--repeats",
        "1",
        "--batch",
        "4",
        "--tokens",
        "8",
        "--prompt-tokens",
        "8",
        "--device",
        "cpu",
    ]
    command = [sys.executable, str(SCRIPT), "--model", str(llama), "--arms", "perl,stock,full", *words]
    found = subprocess.run([*command, "--output", str(tmp_path / "tiny")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "| perl / stock |" in (tmp_path / "tiny.md").read_text(encoding="utf-8")
    content = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    arms = {run["arm"]: run for run in content["runs"] if run["kinds"] == ["memory"]}
    assert len(content["runs"]) == 6
    assert {name: run["outcome"] for name, run in arms.items()} == dict.fromkeys(("perl", "stock", "full"), "finished")
    assert {name: round(run["copies"]) for name, run in arms.items()} == {"perl": 1, "stock": 2, "full": 3}
    assert {run["mean_length"] for run in arms.values()} == {8.0}
    assert {len(run["wall"]) for run in content["runs"]} == {3}


def test_the_page_on_gpus_shows_the_predictions(script: Any) -> None:
    sizes = script("gpu_sizes")
    content = json.loads(sizes.PATH.read_text(encoding="utf-8"))
    assert tuple(content) == sizes.MODELS
    page = sizes.PATH.with_suffix(".md").read_text(encoding="utf-8")
    for table in (*map(sizes.table, sizes.STAGES), sizes.full_table()):
        assert table in page


@pytest.mark.slow
def test_the_predictions_for_gpus_are_current(script: Any) -> None:
    sizes = script("gpu_sizes")
    found = json.loads(sizes.PATH.read_text(encoding="utf-8"))["llama-3.2-1b"]
    assert found == sizes.figures("llama-3.2-1b")
