"""The command of a vLLM server for a run."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli import coffee
from perlcli.commands import serve

Perl = Callable[..., Any]


def command(perl: Perl, *words: object) -> list[str]:
    """The words after `vllm serve` that the command prints."""
    first = perl("serve", *words).stdout.splitlines()[0]
    start = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve "
    assert first.startswith(start)
    return shlex.split(first.removeprefix(start))


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_a_base_is_served_without_adapters(perl: Perl, llama: Path) -> None:
    assert command(perl)[0] == str(coffee.BASE)
    words = command(perl, llama, "--port", "8123", "--dtype", "bfloat16", "--max-model-len", "256")
    assert words[0] == str(llama) and "--lora-modules" not in words and "--enable-lora" in words
    assert [value(words, name) for name in ("--port", "--dtype", "--max-model-len")] == ["8123", "bfloat16", "256"]
    assert value(words, "--logprobs-mode") == "processed_logprobs"
    assert value(words, "--max-lora-rank") == "16"
    assert value(command(perl, llama, "--max-lora-rank", "64"), "--max-lora-rank") == "64"


def test_a_run_is_served_with_policy_and_anchor_on_its_base(
    perl: Perl, llama: Path, sft_run: Path, rl_run: Path
) -> None:
    words = command(perl, rl_run)
    adapters = words[words.index("--lora-modules") + 1 : words.index("--generation-config")]
    assert words[0] == str(llama) and value(words, "--max-loras") == "2"
    assert adapters == [f"policy={rl_run}", f"anchor={rl_run / 'anchor'}"]
    told = perl("serve", sft_run, "--port", "8123").stdout
    assert "models: base, policy." in told
    assert f"perl rl --model {sft_run} --rollouts vllm --vllm-server-base-url http://127.0.0.1:8123 …" in told
    assert "--model" not in perl("serve").stdout.splitlines()[-1]  # the embedded base has no name


def test_what_a_server_can_not_hold_is_refused(perl: Perl, llama: Path, reward_run: Path, tmp_path: Path) -> None:
    assert "is a reward model; perl serve is for policies" in perl("serve", reward_run, code=2).output
    perl("sft", "--output", "dora", "--use-dora", "--max-steps", "1", "--max-length", "64")
    assert "an adapter with use_dora: vLLM doesn't know it" in perl("serve", "dora", code=2).output
    perl("sft", "--output", "coffee", "--max-steps", "1", "--max-length", "64")
    assert "perl rl --model coffee --rollouts vllm" in perl("serve", "./coffee").stdout.replace("./", "")
    assert "./nowhere does not exist" in perl("serve", "./nowhere", code=2).output


def test_run_becomes_the_server(perl: Perl, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *given: seen.append(given))
    monkeypatch.setattr(serve.shutil, "which", lambda _: "/opt/bin/vllm")
    perl("serve", llama, "--run")
    ((program, words, environment),) = seen
    assert program == "/opt/bin/vllm" and words[:3] == ["/opt/bin/vllm", "serve", str(llama)]
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    monkeypatch.setattr(serve.shutil, "which", lambda _: None)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda _: None)
    assert "vllm is not installed here" in perl("serve", llama, "--run", code=2).output
