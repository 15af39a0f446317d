"""RL and evaluation by a vLLM server: only the adapter travels, and a server that isn't right is noticed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_stand_in import StandIn

from perlcli import web
from perlcli.model import loading, roles, sources
from perlcli.rollouts.vllm import CLEAR, FOLDER, HOT
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]
LENGTHS = ("--max-length", "128", "--max-completion-length", "6", "--eval-fraction", "0")
BATCH = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--learning-rate", "1e-2")
RL = ("--max-steps", "2", *BATCH, *LENGTHS, "--rollouts", "vllm")


@pytest.fixture
def server(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(web, "PAUSE", 0.01)
    found = StandIn(llama)
    yield found
    found.close()


@pytest.fixture
def rl(perl: Perl, server: StandIn, llama: Path, reward_run: Path, rows: dict[str, Path]) -> Perl:
    def run(*words: object, **options: Any) -> Any:
        given = ("--model", llama, "--reward", reward_run, "--data", rows["prompts"], "--output", "run", *RL)
        return perl("rl", *given, "--vllm-server-base-url", server.url, *words, **options)

    return run


def metrics() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_server_samples_what_training_learns_from(rl: Perl, server: StandIn) -> None:
    rl()
    asked = [body for path, body in server.asked if path == "/v1/completions" and "prompt_logprobs" not in body]
    loaded = [body for path, body in server.asked if path == "/v1/load_lora_adapter"]
    assert {body["model"] for body in asked if body["temperature"] != HOT} == {loaded[0]["lora_name"]}
    assert all(body["n"] == 4 for body in asked[-1:])  # the completions of a prompt are one request
    assert len(loaded) == 1 + 1 + 2  # the comparison, the probe, and each step
    for row in metrics():
        assert row["sampler/diff_mean"] < 1e-4 and abs(row["sampler/kl"]) < 1e-4
        assert row["sampler/importance"] == pytest.approx(1.0, abs=1e-3)
    found = read_record(Path("run"))
    assert found.guards["kl_at_start"] == 0
    assert found.guards["rollouts"]["base_mean"] < 1e-4 and found.guards["rollouts"]["adapter_mean"] < 1e-4
    assert found.guards["rollouts"]["adapter_effect"] > 1e-3  # the comparison would notice a server without it
    assert found.guards["sent"]["generations"] == 3
    assert not server.adapters and not (Path("run") / FOLDER).exists()  # nothing is left behind


def test_the_second_step_samples_from_what_the_first_one_learned(rl: Perl, server: StandIn) -> None:
    seen: list[torch.Tensor] = []
    posted = server.posted

    def spy(path: str, asked: dict[str, Any]) -> Any:
        answer = posted(path, asked)
        if path == "/v1/load_lora_adapter":
            weights = server.adapters[asked["lora_name"]].state_dict()
            seen.append(torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name]))
        return answer

    server.posted = spy  # type: ignore[method-assign]
    rl()
    _, probe, first, second = seen
    assert torch.equal(probe, first) and not probe.any() and second.any()


def test_prompts_are_shared_out_to_several_servers(rl: Perl, server: StandIn, llama: Path) -> None:
    other = StandIn(llama)
    rl("--vllm-server-base-url", other.url)
    for each in (server, other):
        assert [path for path, body in each.asked if path == "/v1/completions" and body.get("n")]
    other.close()


def test_raw_log_probabilities_correct_for_nothing_but_at_temperature_1(rl: Perl, server: StandIn) -> None:
    server.is_raw = True
    shown = rl("--temperature", "0.7").stdout
    assert "Importance weights are off" in shown and "processed_logprobs" in shown
    assert "sampler/kl" not in metrics()[0]
    assert "Importance weights" not in rl("--temperature", "1", "--overwrite").stdout
    assert metrics()[0]["sampler/diff_mean"] < 1e-4


def test_reinforce_corrects_for_each_token(rl: Perl) -> None:
    rl("--algorithm", "reinforce", "--num-generations", "1")
    assert all(row["sampler/importance"] == pytest.approx(1.0, abs=1e-3) for row in metrics())


def test_a_server_that_started_again_gets_the_adapter_again(rl: Perl, server: StandIn) -> None:
    count = 0

    def lose(path: str, asked: dict[str, Any]) -> None:
        nonlocal count
        count += path == "/v1/completions"
        if count == 12:
            server.adapters.clear()

    server.before = lose
    rl()
    assert [path for path, _ in server.asked].count("/v1/load_lora_adapter") >= 5


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("ignores_adapters", "The base with the run's adapter on the vLLM server"),
        ("takes_no_adapters", "takes no adapters while it runs\nHint: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    ],
)
def test_a_server_without_the_adapter_stops_the_run(flag: str, said: str, rl: Perl, server: StandIn) -> None:
    setattr(server, flag, True)
    assert said in rl(code=1 if flag == "ignores_adapters" else 2).stderr


def test_another_base_stops_the_run(rl: Perl, server: StandIn) -> None:
    with torch.no_grad():
        server.model.lm_head.weight.mul_(1.5)
    stderr = rl(code=1).stderr
    assert "The base on the vLLM server" in stderr and "more than --vllm-max-logprob-diff 0.1" in stderr
    assert rl("--overwrite", "--vllm-max-logprob-diff", "100").exit_code == 0


def test_a_server_that_cannot_read_the_rows_is_refused_before_weights_load(rl: Perl, server: StandIn) -> None:
    server.max_model_len = 8
    assert "reads 8 tokens, but prompt and completion have up to" in rl(code=2).stderr
    assert not Path("run").exists()


def test_a_server_that_dies_leaves_the_last_step(rl: Perl, server: StandIn) -> None:
    steps = 0

    def die(path: str, asked: dict[str, Any]) -> Any:
        nonlocal steps
        steps += path == "/v1/load_lora_adapter"
        return (503, {"error": {"message": "draining"}}) if steps >= 4 else None

    server.before = die
    stderr = rl(code=2).stderr
    assert "answered" in stderr or "could not load" in stderr or "did not answer" in stderr
    server.before = lambda path, asked: None
    assert read_record(Path("run")).steps == 1
    rl("--resume")
    assert read_record(Path("run")).steps == 2


def test_evaluation_samples_policy_and_anchor_by_the_server(
    perl: Perl, server: StandIn, rl_run: Path, reward_run: Path, rows: dict[str, Path]
) -> None:
    words = ("--model", rl_run, "--reward", reward_run, "--data", rows["prompts"], "--output", "eval")
    more = ("--max-completion-length", "6", "--rollouts", "vllm", "--vllm-server-base-url", server.url)
    perl("eval", *words, *more)
    names = {body["model"] for path, body in server.asked if path == "/v1/completions" and body.get("n")}
    assert len([name for name in names if name != "base"]) == 2  # the policy and its anchor, both adapters
    assert read_record(Path("eval")).guards["sent"]["generations"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rollouts", "transformers"), "--vllm-server-base-url only applies with --rollouts vllm"),
        (("--full",), "--rollouts vllm sends the adapter only, so it can't be combined with --full"),
        (("--use-dora",), "--rollouts vllm can't be combined with an adapter with use_dora: vLLM doesn't know it"),
        (("--vllm-server-base-url", "http://127.0.0.1:9"), "can't be reached: Connection refused"),
        (("--vllm-server-base-url", "ftp://x"), "--vllm-server-base-url ftp://x is not an address"),
    ],
)
def test_what_can_not_work_is_refused(words: tuple[str, ...], said: str, rl: Perl) -> None:
    assert said in rl(*words, code=2).stderr


def test_nothing_that_was_computed_with_earlier_weights_is_found(rl: Perl, server: StandIn) -> None:
    """vLLM keeps the states of prompts by an adapter's name and folder: each load has another salt, each run too."""
    rl()
    salts: list[set[str]] = [set()]
    for path, body in server.asked:
        if path == "/v1/load_lora_adapter":
            salts.append(set())
        if path == "/v1/completions":
            salts[-1].add(body["cache_salt"])
    every = [salt for each in salts for salt in each]
    assert all(len(each) == 1 for each in salts) and len(set(every)) == len(salts)
    first, server.asked = every[0].partition("-")[0], []
    rl("--output", "again")
    assert not [body for path, body in server.asked if first in body.get("cache_salt", "")]


@pytest.mark.parametrize("broken", [{"finish_reason": "abort"}, {"token_ids": [], "logprobs": {"token_logprobs": []}}])
def test_a_completion_that_a_server_gives_up_is_written_again(
    rl: Perl, server: StandIn, broken: dict[str, Any]
) -> None:
    posted, failed = server.posted, []

    def give_up(path: str, asked: dict[str, Any]) -> Any:
        status, body = posted(path, asked)
        if asked.get("n", 1) > 1 and not failed:
            failed.append(1)
            body["choices"][0] |= broken
        return status, body

    server.posted = give_up  # type: ignore[method-assign]
    rl()
    assert failed and [row["step"] for row in metrics()] == [1, 2]


def test_an_adapter_that_a_server_ignores_is_far_above_any_limit(rl: Perl, server: StandIn) -> None:
    server.ignores_adapters = True
    told = rl("--vllm-max-logprob-diff", "0.3", "--lora-r", "1", code=1).output
    assert "The base with the run's adapter on the vLLM server" in told
    server.ignores_adapters = False
    rl("--output", "right", "--vllm-max-logprob-diff", "0.3", "--lora-r", "1")
    assert read_record(Path("right")).guards["rollouts"]["adapter_effect"] > CLEAR * 0.3


def test_a_resumed_run_can_do_without_its_server(rl: Perl, perl: Perl, server: StandIn) -> None:
    rl("--importance-cap", "3")
    written = read_record(Path("run")).settings
    words = [f"--{name.replace('_', '-')}" for name in ("rollouts", "max_steps")]
    kept = ("--model", written["model"], "--reward", *written["reward"], "--data", written["data"], "--output", "run")
    again = (*kept, *BATCH, *LENGTHS, words[0], "merged", words[1], "3", "--resume")
    told = perl("rl", *again).stdout
    assert "--rollouts was vllm, now merged: results may differ from here on by rounding." in told
    assert "--importance-cap was 3.0, now not set." in told


def test_an_adapter_is_left_as_it_was_by_the_comparison(llama: Path, sft_run: Path, server: StandIn) -> None:
    from perlcli.rollouts.vllm import _noisy

    model = roles.load_adapter(
        loading.load_causal(sources.locate(str(llama)), ModelSettings()), str(sft_run), trainable=True
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with _noisy(model, 0.02):
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
