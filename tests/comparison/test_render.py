"""A comparison report in its forms: what each of them tells, that nothing is cut, and that no text becomes markup."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from perlcli.comparison import contrasts, results
from perlcli.comparison.render import files as render_files
from perlcli.comparison.render import pictures, tables, terminal, words
from perlcli.comparison.render.pictures import Picture
from perlcli.comparison.results import ArmResult, Comparison, Report
from perlcli.run import plots
from perlcli.run.files import METRICS

PLANTED = "<script>alert('x')</script>"
VOID = {"meta", "img", "br"}


def accuracy(value: float, rows: int = 1500) -> dict[str, Any]:
    return {"accuracy": value, "accuracy_low": value - 0.02, "accuracy_high": value + 0.02, "rows": rows, "auc": 0.9}


@pytest.fixture
def two(arm_of: Any) -> Comparison:
    """Full tuning and LoRA on one model."""
    full = arm_of("full", 2.0, metrics=accuracy(0.78), memory_mb=2800.0, trainable_parameters=10_000)
    return contrasts.compare("reward", [full, arm_of(metrics=accuracy(0.782), memory_mb=1050.0)])


@pytest.fixture
def ended(arm_of: Any) -> Comparison:
    """Full tuning out of memory, LoRA done, another arm failed at length, a last one not run."""
    full = arm_of("full", status="out of memory", memory_mb=79_200.0, of_arm={"predicted_mb": 112_000.0})
    failed = arm_of("lora-8bit r=16", status="failed", failure="no int8 here, " * 20 + "sorry")
    return contrasts.compare("reward", [full, arm_of(metrics=accuracy(0.8)), failed, arm_of("dora r=16", seeds=())])


@pytest.fixture
def rl(arm_of: Any) -> Comparison:
    phases = {"sampling": 0.5, "scoring": 0.1, "anchor": 0.1, "learning": 0.3}
    metrics = {"gold": 0.5, "reward": -0.25}
    return contrasts.compare(
        "rl", [arm_of("full", phases=phases, metrics=metrics), arm_of(phases=phases, metrics=metrics)]
    )


def report(*comparisons: Comparison, **values: Any) -> Report:
    return Report(
        **{
            "title": "A title",
            "command": "perl compare-full reward",
            "status": "finished",
            "versions": {"torch": "2.13"},
            "started": "2026-01-02T03:04:05+00:00",
            "device": {"type": "cpu", "name": "CPU", "threads": 2},
            "elapsed_seconds": 61.0,
            "comparisons": list(comparisons),
            **values,
        }
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, to look inside."""
    found: list[Any] = []
    for module in (plots, pictures):
        save = module.save
        monkeypatch.setattr(
            module, "save", lambda figure, target, save=save: (found.append(figure), save(figure, target))
        )
    return found


# words


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        (words.count, 999, "999"),
        (words.count, 32_896, "32.9k"),
        (words.count, 134_515_008, "135M"),
        (words.count, 1.7e9, "1.7B"),
        (words.count, 999_950, "1M"),
        (words.share, 0.374, "37%"),
        (words.share, 0.043, "4.3%"),
        (words.share, 0.0008, "0.08%"),
        (words.share, 2.67, "267%"),
        (words.times, 1.9, "1.90x"),
        (words.times, 0.854, "0.85x"),
        (words.times, 12.34, "12.3x"),
    ],
)
def test_figures_in_words(word: Any, value: float, text: str) -> None:
    assert word(value) == text


def test_names_are_as_short_as_they_can_be() -> None:
    assert words.shortest(["org/a", "org/b", "c/"]) == {"org/a": "a", "org/b": "b", "c/": "c"}
    assert words.shortest(["one/a", "two/a"]) == {"one/a": "one/a", "two/a": "two/a"}
    assert words.shortest([]) == {}


def test_the_headline_tells_cost_and_quality_of_lora_against_full(two: Comparison) -> None:
    assert words.headline(two) == (
        "LoRA r=16 trains the reward model in 38% of the memory at 2.00x the speed; "
        "accuracy 78.2% against 78.0%, which may be chance."
    )


def test_the_headline_takes_the_default_rank_of_the_largest_model(arm_of: Any) -> None:
    arms = []
    for model, size in (("org/small", 10), ("org/large", 20)):
        ranks = {"full": None, "lora r=1": 1, "lora r=16": 16, "lora-4bit r=16": 16}
        arms += [
            arm_of(name, of_arm={"model": model, "rank": rank}, total_parameters=size) for name, rank in ranks.items()
        ]
        arms[-1].precision = "4-bit"
    found = contrasts.compare("reward", arms)
    chosen = words.chosen(found)
    assert chosen and (chosen.model, chosen.name) == ("org/large", "lora r=16")
    assert words.headline(found).startswith("On large, LoRA r=16 trains")
    assert words.labels(found.arms)[0] == "small · full"


def test_the_headline_without_a_baseline_is_what_the_arm_takes(arm_of: Any, ended: Comparison) -> None:
    alone = contrasts.compare("reward", [arm_of(metrics=accuracy(0.8), of_arm={"is_baseline": True})])
    own = "LoRA r=16 trains the reward model in 500 MB at 0.750 steps per second; accuracy 80.0%."
    assert words.headline(alone) == own
    assert words.headline(ended) == f"Full tuning: out of memory at 79.2 GB (predicted 112 GB); {own}"


def test_the_headline_of_what_has_no_figures(arm_of: Any) -> None:
    failed = contrasts.compare("sft", [arm_of(status="failed", failure="why")])
    assert words.headline(failed) == "No run finished: LoRA r=16: failed: why."
    assert words.headline(Comparison("sft")) == "No run finished."
    measured = contrasts.compare("eval", [arm_of("mine", metrics={"gold": 0.5})])
    assert words.headline(measured) == "mine: gold 50.0%."


def test_an_unfinished_comparison_says_how_far_it_is(two: Comparison, ended: Comparison) -> None:
    assert words.state(report(two)) == ""
    assert words.state(report(ended, status="interrupted")) == (
        "The comparison is interrupted: 1 of 4 arms have figures so far."
    )


def test_the_method_is_told_for_what_was_measured(two: Comparison, rl: Comparison) -> None:
    on_cpu, on_gpu = (
        words.method(report(two)),
        words.method(report(two, rl, device={"type": "cuda"}, command="perl report")),
    )
    assert "resident set" in on_cpu[1] and "its own process" in on_cpu[0]
    assert "on the GPU" in on_gpu[0] and "sampling completions" in on_gpu[-1]
    assert dict(words.facts(report(two)))["device"] == "CPU, 2 threads"


# the terminal


def test_the_terminal_shows_ratios_the_papers_and_the_remarks(two: Comparison) -> None:
    two.warnings = ["rows differ"]
    assert terminal.text(report(two)).splitlines()[4:] == [
        "               trained   memory  of full  steps/s  speed  tokens/s                accuracy  AUC",
        "-------------  -------  -------  -------  -------  -----  --------  ----------------------  ---",
        "full               10k  2.80 GB        -    0.375      -      18.8  78.0% (76.0% to 80.0%)  0.9",
        "lora r=16 [1]      100  1.05 GB      38%    0.750  2.00x      37.5  78.2% (76.2% to 80.2%)  0.9",
        "[1] accuracy: +0.2 points, within the ±3.0 that chance allows on 1,500 rows",
        "",
        "In the paper, LoRA to full (arXiv 2403.10704, Table 1; PaLM 2 and Gemini Pro):",
        "        lora r=16 here  Harmless   SHP  TL;DR    UI    VQA",
        "------  --------------  --------  ----  -----  ----  -----",
        "memory             38%     43.1%   48%    50%   56%    74%",
        "speed            2.00x      1.6x  1.5x   1.7x  1.9x  1.15x",
        "",
        "model          org/base",
        "precision      float32",
        "steps          4",
        "seeds          0",
        "kind           full: full; lora: lora r=16",
        "rank           -: full; 16: lora r=16",
        "learning rate  1e-05: full; 0.0001: lora r=16",
        "",
        "Warning: rows differ",
    ]


def test_arms_without_figures_stand_in_the_table_with_the_reason(ended: Comparison) -> None:
    text = terminal.text(report(ended, status="running"))
    assert text.startswith("The comparison is running: 1 of 4 arms have figures so far.\n")
    assert re.search(r"^full +out of memory at 79\.2 GB \(predicted 112 GB\)$", text, re.M)
    assert re.search(r"^dora r=16 +not run yet$", text, re.M)
    assert re.search(r"^lora-8bit r=16 \[1\] +failed: no int8 here.*…$", text, re.M)
    assert "[1] failed: no int8 here" in text and "sorry" in text
    assert "In the paper" not in text  # there is nothing to compare it with


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminals_lines_fit_whatever_the_names(width: int, arm_of: Any, ended: Comparison, rl: Comparison) -> None:
    models = [f"organisation/a-model-with-a-really-long-name-{size}b-instruct" for size in (1, 2)]
    arms = [
        arm_of(name, metrics=accuracy(0.8), of_arm={"model": model, "predicted_mb": 1.0})
        for model in models
        for name in ("full", "lora r=16")
    ]
    text = terminal.text(report(contrasts.compare("reward", arms, ["word " * 60]), ended, rl), width)
    assert max(map(len, text.splitlines())) <= width
    assert "of full" in text and "accuracy" in text


def test_without_any_figure_the_table_is_the_reasons(arm_of: Any) -> None:
    text = terminal.text(report(contrasts.compare("reward", [arm_of("a", seeds=()), arm_of("bcd", status="failed")])))
    assert "\na    not run yet\nbcd  failed\n" in text


def test_rl_tells_where_its_time_goes(rl: Comparison) -> None:
    text = terminal.text(report(rl))
    assert re.search(r"^seconds per step +total +sampling +scoring +anchor +learning$", text, re.M)
    assert re.search(r"^lora r=16 +1\.00 +0\.500 \(50%\) +0\.100 \(10%\) +0\.100 \(10%\) +0\.300 \(30%\)$", text, re.M)


def test_ratios_to_another_baseline_are_called_so_and_not_held_against_the_paper(arm_of: Any) -> None:
    first = arm_of("first", of_arm={"is_baseline": True})
    text = terminal.text(report(contrasts.compare("reward", [first, arm_of("second")])))
    assert "of baseline" in text and "In the paper" not in text


def test_figures_come_with_rows_setup_verdicts_and_samples(arm_of: Any) -> None:
    def arm(name: str, score: float) -> ArmResult:
        samples = [{"prompt": "tea?", "policy": f"yes by {name}", "policy_reward": score, "anchor": "no"}]
        setup = {"held-out data": "rows.jsonl, 40 rows", "opponent": "the base"}
        values = {"samples": samples, "setup": setup, "eval_rows": 40, "verdicts": ["all agree", f"{name} is good"]}
        return arm_of(name, metrics={"gold": 0.5, "prompts": 40}, of_arm={"is_baseline": name == "a"}, **values)

    found = report(contrasts.compare("eval", [arm("a", 0.5), arm("b", 1.25)]))
    page = render_files.page(found, Path(), [])
    for text in (terminal.text(found), render_files.markdown(found), page):
        for part in (
            "eval rows",
            "rows.jsonl, 40 rows",
            "all agree",
            "a: a is good",
            "b: b is good",
            "tea?",
            "the base",
        ):
            assert part in text, part
        assert text.count("all agree") == 1
        assert re.search(r"b: policy.{0,12}1\.25.{0,40}yes by b", text, re.DOTALL)
    assert ", [0.5], " not in page


def test_a_table_has_no_column_without_figures(arm_of: Any) -> None:
    (arm,) = contrasts.compare("eval", [arm_of("a", metrics={"gold": 0.5})]).arms
    arm.runs[0].memory_mb, arm.runs[0].step_seconds = None, []
    assert tables.runs(Comparison("eval", [arm]))[0] == ["folder", "arm", "seed", "result"]


# Markdown and CSV


def test_markdown_holds_everything(two: Comparison, rl: Comparison) -> None:
    two.warnings = ["rows differ"]
    text = render_files.markdown(
        report(two, rl), [Picture("reward", "plots/a.png", "A picture."), Picture("rl", "plots/b.png", "B.")]
    )
    assert text.startswith("# A title\n\n## Reward model\n\nLoRA r=16 trains the reward model in 38%")
    speed = "2.00x (2.00x by the clock, 2.00x by CPU time)"
    assert f"| lora r=16 \\[1] | 100 (1.00%) | 1.05 GB | 38% | 0.750 (0.625 to 0.875) | {speed} |" in text
    for part in (
        "1. accuracy: +0.2 points",
        "| memory | 38% | 43.1% |",
        "> **Warning.** rows differ",
        "kB (100% of the",
        "![A picture.](plots/a.png)",
        "seconds per step",
        "- versions: torch 2.13",
        "| full | full | - | 1e-05 |",
        "### How every arm ran\n\n- model: org/base\n- precision: float32\n- steps: 4\n- seeds: 0\n",
        "$ perl reward --seed 0",
    ):
        assert part in text, part
    assert text.index("a.png") < text.index("## Reinforcement learning") < text.index("b.png")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1


def test_markdown_of_arms_without_figures_keeps_its_columns(ended: Comparison) -> None:
    text = render_files.markdown(report(ended, status="running"))
    assert "**The comparison is running" in text
    assert "| full | out of memory at 79.2 GB (predicted 112 GB) | |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_text_of_others_is_no_markup_in_markdown(arm_of: Any) -> None:
    arm = arm_of(f"{PLANTED} | `x` *y*\n# z", of_arm={"model": PLANTED, "remarks": [PLANTED]}, failure=PLANTED)
    arm.runs[0].command = "perl\n```\n<script>"
    text = render_files.markdown(report(contrasts.compare("reward", [arm], [PLANTED]), title=f"{PLANTED}\n# z"))
    outside, _, fenced = text.partition("```console\n")
    assert "<script" not in outside and "\n# z" not in text and "\\|" in outside
    assert fenced.count("```") == 1 and fenced.endswith("```\n")


def test_csv_has_plain_numbers_a_row_per_arm_and_per_run(two: Comparison, rl: Comparison, ended: Comparison) -> None:
    arms = list(csv.DictReader(io.StringIO(render_files.arms_csv(report(two, rl, ended)))))
    assert [row["arm"] for row in arms][:4] == ["full", "lora r=16", "full", "lora r=16"]
    assert (arms[1]["ratio_memory"], arms[1]["accuracy"], arms[1]["accuracy_low"]) == ("0.375", "0.782", "0.762")
    assert (arms[1]["gold"], arms[3]["gold"], arms[1]["may_be_chance"], arms[3]["stage"]) == ("", "0.5", "True", "rl")
    assert (arms[4]["failure"], arms[4]["predicted_mb"], arms[4]["memory_mb"]) == (
        "out of memory at 79.2 GB",
        "112000.0",
        "",
    )
    runs = list(csv.DictReader(io.StringIO(render_files.runs_csv(report(two, rl, ended)))))
    assert len(runs) == 7  # an arm that was not run has none
    assert (runs[1]["folder"], runs[1]["median_step_seconds"], runs[1]["metric_accuracy"]) == (
        "lora r=16-0",
        "1.5",
        "0.782",
    )
    assert (runs[2]["seconds_sampling"], runs[4]["status"]) == ("0.5", "out of memory")
    assert render_files.arms_csv(report()) == render_files.runs_csv(report()) == ""


# pictures


def texts_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_the_baselines_memory_is_100_per_cent(two: Comparison, tmp_path: Path, drawn: list[Any]) -> None:
    found = pictures.draw(report(two), tmp_path)
    assert [item.path for item in found] == ["plots/reward-cost.png", "plots/reward-quality.png"]
    memory, speed = drawn[0].axes
    assert memory.get_title() == "peak memory, full = 100%"
    assert [bar.get_width() for bar in memory.patches] == [1.0, 0.375]
    assert texts_of(memory) == ["100%  (2.80 GB)", "38%  (1.05 GB)"]
    assert texts_of(speed) == ["1.00x  (0.375 steps/s)", "2.00x  (0.750 steps/s)"]
    (axis,) = drawn[1].axes
    assert axis.get_xscale() == "log"
    assert [line.get_text() for line in drawn[1].legends[0].get_texts()] == ["full", "lora r=16"]


@pytest.mark.slow
def test_no_words_leave_their_picture_or_lie_on_each_other(
    two: Comparison, ended: Comparison, rl: Comparison, arm_of: Any, tmp_path: Path, drawn: list[Any]
) -> None:
    many = [
        arm_of(name, metrics=accuracy(0.7), of_arm={"model": f"org/a-model-with-a-long-name-{size}"})
        for size in "abc"
        for name in ("full", "lora-4bit r=16")
    ]
    pictures.draw(report(two, ended, rl, contrasts.compare("reward", many)), tmp_path)
    assert len(drawn) == 8
    for figure in drawn:
        figure.draw_without_rendering()
        whole = figure.bbox
        boxes = [text.get_window_extent() for axis in figure.axes for text in axis.texts]
        boxes += [
            label.get_window_extent() for axis in figure.axes for label in axis.get_yticklabels() if label.get_text()
        ]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1 for box in boxes)
        for axis in figure.axes:
            inside = [text.get_window_extent() for text in axis.texts]
            assert all(box.x1 <= axis.bbox.x1 + 2 for box in inside)
            assert not any(one.overlaps(other) for i, one in enumerate(inside) for other in inside[i + 1 :])


def test_an_arm_out_of_memory_has_an_open_bar_to_where_it_came(
    ended: Comparison, tmp_path: Path, drawn: list[Any]
) -> None:
    pictures.draw(report(ended), tmp_path)
    memory, speed = drawn[0].axes
    assert memory.get_title() == "peak memory"
    assert [(bar.get_width(), bar.get_hatch()) for bar in memory.patches] == [(79_200, "///"), (500, None)]
    assert texts_of(memory)[:2] == ["out of memory at 79.2 GB", "500 MB"]
    assert texts_of(memory)[2].startswith("failed: no int8") and texts_of(memory)[3] == "not run yet"
    assert len(speed.patches) == 1


def test_points_of_equal_size_stand_beside_each_other(arm_of: Any, tmp_path: Path, drawn: list[Any]) -> None:
    arms = [arm_of(name, metrics=accuracy(0.7)) for name in ("a", "b", "c")]
    pictures.draw(report(contrasts.compare("reward", arms)), tmp_path)
    places = [line.get_xdata()[0] for line in drawn[1].axes[0].lines if line.get_marker() not in ("_", "None", "|")]
    assert len({round(place) for place in places}) == 3


def test_rl_has_its_split_as_stacked_bars(rl: Comparison, tmp_path: Path, drawn: list[Any]) -> None:
    found = pictures.draw(report(rl), tmp_path)
    assert "plots/rl-phases.png" in [item.path for item in found]
    (axis,) = drawn[-1].axes
    assert [bar.get_x() for bar in axis.patches[::2]] == pytest.approx([0, 0.5, 0.6, 0.7])
    assert [t.get_text() for t in drawn[-1].legends[0].get_texts()] == ["sampling", "scoring", "anchor", "learning"]


def test_curves_are_drawn_for_each_model_from_what_metrics_there_are(
    arm_of: Any, tmp_path: Path, drawn: list[Any]
) -> None:
    arms = [arm_of(seeds=(0, 1), of_arm={"model": model}) for model in ("org/a", "org/b")]
    for number, run in enumerate(arms[0].runs, 1):
        run.folder = f"runs/{number}"
        (tmp_path / run.folder).mkdir(parents=True)
        rows = [json.dumps({"step": step * 10, "loss": number / step, "accuracy": 0.5}) for step in (1, 2, 3)]
        (tmp_path / run.folder / METRICS).write_text("\n".join([*rows, '{"step": 4']))
    found = pictures.draw(report(contrasts.compare("reward", arms)), tmp_path)
    assert [item.path for item in found] == ["plots/reward-cost.png", "plots/reward-curves-1.png"]
    assert "of a:" in found[1].caption
    lines = drawn[1].axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[10, 20, 30]] * 3
    assert list(lines[2].get_ydata()) == pytest.approx([1.5, 0.75, 0.5])


def test_nothing_is_drawn_of_nothing(arm_of: Any, tmp_path: Path) -> None:
    assert pictures.draw(report(contrasts.compare("reward", [arm_of(seeds=())])), tmp_path) == []
    assert not (tmp_path / "plots").exists()


# the page


class Page(HTMLParser):
    """What a page holds, and whether every element that it opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(found: Report, folder: Path) -> Page:
    page = Page(render_files.page(found, folder, pictures.draw(found, folder)))
    assert page.open == []
    return page


def test_the_page_begins_with_the_finding_and_holds_the_rest(
    two: Comparison, ended: Comparison, rl: Comparison, tmp_path: Path
) -> None:
    two.warnings = ["rows differ"]
    page = page_of(report(two, rl, status="running"), tmp_path)
    heads = [page.texts[i] for i, text in enumerate(page.texts) if text.strip()]
    told = "\n".join(heads)
    assert [tag for tag, _ in page.seen].count("h1") == 1
    assert told.index("LoRA r=16 trains the reward model in 38%") < told.index("LoRA r=16 trains the policy by RL")
    for part in (
        "78.2%",
        "76.2% to 80.2%",
        "within the ±3.0",
        "43.1%",
        "rows differ",
        "Where a step's time goes",
        "CPU, 2 threads",
        "torch 2.13",
        "perl compare-full reward",
        "The comparison is running",
        "2026-01-02 03:04:05 UTC",
    ):
        assert part in told, part
    failed = page_of(report(ended), tmp_path)
    assert "out of memory at 79.2 GB (predicted 112 GB)" in failed.texts


def test_the_page_needs_nothing_from_outside_and_runs_nothing(two: Comparison, tmp_path: Path) -> None:
    page = page_of(report(two), tmp_path)
    assert {tag for tag, _ in page.seen} & {"script", "link", "iframe", "object", "form"} == set()
    sources = [values["src"] for tag, values in page.seen if tag == "img"]
    assert len(sources) == 2 and all(str(source).startswith("data:image/png;base64,iVBOR") for source in sources)
    assert all(values["alt"] for tag, values in page.seen if tag == "img")
    style = "".join(page.texts)
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "max-width: 40rem" in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen


def test_no_text_becomes_markup_in_the_page(arm_of: Any, tmp_path: Path) -> None:
    def arm(name: str, **values: Any) -> ArmResult:
        return arm_of(name, of_arm={"model": f"org/{PLANTED}", "remarks": [PLANTED], "precision": PLANTED}, **values)

    arms = [arm(PLANTED, metrics=accuracy(0.5)), arm(f'"{PLANTED}', status="failed", failure=PLANTED)]
    for made in arms:
        made.runs[0].folder = made.runs[0].command = f'x" onload="{PLANTED}'
    values = {
        "title": PLANTED,
        "command": PLANTED,
        "versions": {PLANTED: PLANTED},
        "git_commit": PLANTED,
        "device": {"name": PLANTED},
        "started": PLANTED,
    }
    page = page_of(report(contrasts.compare("reward", arms, [PLANTED]), **values), tmp_path)
    assert "script" not in {tag for tag, _ in page.seen}
    assert not any("onload" in given for _, given in page.seen)
    assert sum(PLANTED in text for text in page.texts) > 10


# all of it


def test_every_form_is_written_and_json_is_the_report(two: Comparison, tmp_path: Path, files: Any) -> None:
    found = report(two)
    render_files.write_all(found, tmp_path / "new")
    names = {"report.json", "report.md", "report.csv", "report-runs.csv", "report.html", "plots/reward-cost.png"}
    assert files(tmp_path / "new") == names | {"plots/reward-quality.png"}
    assert results.read(tmp_path / "new" / "report.json") == found


def test_rendering_again_leaves_the_json(two: Comparison, tmp_path: Path, files: Any) -> None:
    render_files.render(report(two), tmp_path)
    assert "report.json" not in files(tmp_path) and "report.html" in files(tmp_path)


def test_a_report_without_comparisons_is_written_too(tmp_path: Path) -> None:
    render_files.write_all(report(), tmp_path)
    assert page_of(report(), tmp_path).texts


def test_names_that_matplotlib_could_read_as_formulas_are_drawn_as_they_are(
    arm_of: Any, tmp_path: Path, drawn: list[Any]
) -> None:
    arms = [arm_of(r"$\frac$ a", metrics=accuracy(0.5)), arm_of("two\nlines 模", metrics=accuracy(0.6))]
    failed = arm_of("c", status="failed", failure=r"$\nothing$")
    pictures.draw(report(contrasts.compare("reward", [*arms, failed])), tmp_path)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == [r"\$\frac\$ a", "two lines 模", "c"]


def test_figures_that_are_no_numbers_hinder_nothing(arm_of: Any, tmp_path: Path) -> None:
    nan = float("nan")
    arms = [arm_of(name, metrics=accuracy(nan)) for name in ("full", "lora r=16")]
    render_files.write_all(report(contrasts.compare("reward", arms)), tmp_path)
    assert "nan" in (tmp_path / "report.md").read_text()
