"""`perl serve`: the command of a vLLM server for a run: its base, with the policy and its anchor as adapters."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

from peft import PeftConfig

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import sources
from perlcli.model.sources import Source
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.rollouts import vllm
from perlcli.terminal import say
from perlcli.training.policies import ANCHOR_FOLDER

ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}  # so that RL can send its adapter
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
LEAST = 16  # rank to make room for where the run has no adapter yet
POLICY, ANCHOR, BASE = "policy", "anchor", "base"  # what requests call the models


def run(given: settings.Serve) -> None:
    """Print the command, or become the server that it starts. Raises PerlError for a model that vLLM can't serve."""
    values = given.serve
    source = sources.locate(values.model, option="MODEL")
    if source.is_classifier:
        raise PerlError(f"{source.name} is a reward model; perl serve is for policies", "perl eval --model REWARD")
    adapters = adapters_of(source)
    words = arguments(values, source, adapters)
    if values.run:
        become(words)
    said = " ".join([*(f"{name}={value}" for name, value in ENVIRONMENT.items()), shlex.join(["vllm", *words])])
    print(said)
    where = f"http://{values.host}:{values.port}"
    names = ", ".join([BASE, *adapters])
    say(f"\nIt answers at {where}/v1 like OpenAI's API; models: {names}.")
    model = ["--model", values.model] if values.model else []
    words = ["perl", "rl", *model, "--rollouts", "vllm", "--vllm-server-base-url", where]
    say(f"RL on this base: {shlex.join(words)} …")


def adapters_of(source: Source) -> dict[str, tuple[str, PeftConfig]]:
    """The policy's and the anchor's folder and config, by their names on the server. Raises PerlError for an adapter
    that vLLM can't hold."""
    if source.adapter is None or source.adapter_config is None:
        return {}
    found = {POLICY: (str(Path(source.adapter).resolve()), source.adapter_config)}
    anchor = Path(source.adapter) / ANCHOR_FOLDER
    if (anchor / ADAPTER_CONFIG).exists():
        found[ANCHOR] = str(anchor.resolve()), PeftConfig.from_pretrained(str(anchor))
    for _, config in found.values():
        vllm.check_adapter(config)
    return found


def arguments(values: settings.ServeSettings, source: Source, adapters: dict[str, tuple[str, PeftConfig]]) -> list[str]:
    """The words after `vllm`."""
    base = str(Path(source.base).resolve()) if Path(source.base).is_dir() else source.base
    highest = max([LEAST, *(int(getattr(config, "r", 0)) for _, config in adapters.values())])
    rank = values.max_lora_rank or next((rank for rank in RANKS if rank >= highest), RANKS[-1])
    words = ["serve", base, "--served-model-name", BASE, "--host", values.host, "--port", str(values.port)]
    words += ["--dtype", values.dtype, "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(rank)]
    if adapters:
        words += ["--lora-modules", *(f"{name}={folder}" for name, (folder, _) in adapters.items())]
    if values.max_model_len is not None:
        words += ["--max-model-len", str(values.max_model_len)]
    # what is sampled is what the request says, and log-probabilities are those of that distribution
    return [*words, "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]


def become(words: list[str]) -> None:
    """Start the server in this process's place. Raises PerlError if vllm isn't installed."""
    program = shutil.which("vllm")
    command = [program, *words] if program else None
    if command is None and importlib.util.find_spec("vllm") is not None:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *words]
    if command is None:
        raise PerlError("vllm is not installed here", "pip install vllm, in an environment of its own")
    os.execve(command[0], command, os.environ | ENVIRONMENT)
