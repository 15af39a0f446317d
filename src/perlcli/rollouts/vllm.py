"""Sampling by vLLM servers that hold the same base: before each generation only the adapter goes to them.

The base on a server must be ours, or the policy would learn from what another model wrote: its name, its tokens and its
log-probabilities are compared with ours, bare and with an adapter, before the first step."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from perlcli import web
from perlcli.data import Renderer
from perlcli.errors import PerlError, RunFailed
from perlcli.model import roles
from perlcli.model.log_probs import log_probs
from perlcli.model.prompt_splits import grouped
from perlcli.model.roles import Model
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.server import CONNECTIONS, EXAMPLE, OPTION, SERVE, Lost, Server, Written

FOLDER = "rollout-adapters"  # in a run's folder, while it samples
TEXTS = ("Hello, world! 1,234.5", "def f(x):\n\treturn x ** 2  # ünïcödé 你好", '<think>no</think> {"a": [1]}')
KNOWN = 4  # prompts whose log-probabilities are compared
# Of the noise on the adapter that is compared: its first deviation, which is doubled until log-probabilities move by so
# many times the limit, or the deviation is this large.
NOISE, CLEAR, MOST_NOISE = 0.02, 4.0, 2.0
HOT, ENOUGH = 2.0, 8  # temperature and tokens by which the kinds of log-probabilities are told apart
PLAIN: dict[str, Any] = {  # what an adapter's config must have, since vLLM knows nothing else
    "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "target_parameters": None, "lora_bias": False, "trainable_token_indices": None,
}  # fmt: skip


@dataclass
class Vllm:
    """Samples from the roles of a model by servers that hold its base."""

    servers: Sequence[Server]
    folder: Path  # of the run; the servers see it under the same path
    render: Renderer
    limit: float  # the largest mean difference of log-probabilities
    bases: list[str] = field(default_factory=list)  # the name of the base on each server
    is_processed: bool = False  # whether their log-probabilities are those of the distribution that is sampled from
    bytes_sent: int = 0
    generations: int = 0
    differences: dict[str, float] = field(default_factory=dict)  # what the comparison found
    _known: tuple[list[Ids], list[list[float]]] = ([], [])

    @property
    def names(self) -> dict[str, str]:
        """The names of a run's adapters on the servers, by role: another run's have other names."""
        run = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:10]
        return {role: f"perl-{run}-{role}" for role in (roles.POLICY, roles.ANCHOR)}

    def connect(self, base: str, longest: int) -> list[str]:
        """Find the base on each server, and return what to note. Raises PerlError if one isn't there, or can't read
        `longest` tokens."""
        notes = []
        for server in self.servers:
            found = [model for model in server.models() if not model.get("parent")]
            if not found:
                raise server.failed("has no model", SERVE)
            name, root = str(found[0]["id"]), str(found[0].get("root") or found[0]["id"])
            most = found[0].get("max_model_len")
            if isinstance(most, int) and most < longest:
                raise server.failed(f"reads {most} tokens, but prompt and completion have up to {longest}", SERVE)
            if Path(root).name != Path(base).name:
                notes.append(f"The base of the vLLM server {server.url} is called {root}, that of the run {base}.")
            self.bases.append(name)
            self._compare_tokens(server, name)
        return notes

    def compare(self, model: Model, prompts: Sequence[Ids]) -> dict[str, float]:
        """Compare the servers' log-probabilities with ours: of the bare base, and with an adapter that changes them.
        Returns the mean and the largest difference. Raises RunFailed if a mean is above the limit."""
        known = [list(ids) for ids in prompts[:KNOWN] if len(ids) > 1] or self._texts()
        with bare(model):
            expected = _read(model, known)
        self._known = (known, expected)
        self._check_bases(range(len(self.servers)))
        if isinstance(model, PeftModel):
            self._compare_adapter(model, known, expected)
        self.is_processed = self._find_mode(model, known[0])
        return self.differences

    def sample(self, model: Model, prompts: Sequence[Ids], how: Sampling) -> list[Written]:
        """One completion for each prompt, by the role that the model is switched to. Equal prompts are sent once."""
        name = self._send(model)
        groups = grouped([tuple(ids) for ids in prompts])
        # vLLM numbers the seeds of a request's completions on from its own: these lie far apart
        seeds = random.Random(how.seed).sample(range(2**31), len(groups))
        written: list[Written] = [Written([], [])] * len(prompts)

        def ask(job: tuple[int, list[int], int]) -> None:
            number, places, seed = job
            part = number % len(self.servers)
            prompt = list(prompts[places[0]])
            found = self._complete(model, part, name, prompt, len(places), replace(how, seed=seed))
            for place, completion in zip(places, found, strict=True):
                written[place] = completion

        jobs = [(number, group, seed) for number, (group, seed) in enumerate(zip(groups, seeds, strict=True))]
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(ask, jobs))
        self.generations += 1
        return written

    def compares(self, how: Sampling) -> bool:
        """Whether the servers' log-probabilities are of the distribution whose log-probabilities training computes."""
        return how.is_full if self.is_processed else how.temperature == 1.0

    def close(self) -> None:
        """Take the run's adapters off the servers, and delete their files."""
        for server in self.servers:
            server.hurry()
            for name in self.names.values():
                try:
                    server.unload(name)
                except PerlError:  # it is gone, and they with it
                    break
            server.session.close()
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

    def _send(self, model: Model) -> str | None:
        """Write the active adapter and load it on all servers; its name there, None for the bare base."""
        role = role_of(model)
        if role is None or not isinstance(model, PeftModel):
            return None
        place = self._write(model, role)
        for server in self.servers:
            server.load(self.names[role], place)
        self.bytes_sent += sum(file.stat().st_size for file in place.glob("*.safetensors")) * len(self.servers)
        return self.names[role]

    def _write(self, model: PeftModel, role: str) -> Path:
        place = self.folder / FOLDER / role
        shutil.rmtree(place, ignore_errors=True)
        roles.save_adapter(model, place if role == roles.POLICY else place.parent, role)  # others get a subfolder
        return place.resolve()

    def _complete(
        self, model: Model, part: int, name: str | None, prompt: Ids, count: int, how: Sampling
    ) -> list[Written]:
        server, ends = self.servers[part], self.render.eos_ids
        try:
            return server.complete(name or self.bases[part], prompt, count, how, ends)
        except Lost:  # it was started again
            self._check_bases([part])
            if name is not None:
                role = next(role for role, called in self.names.items() if called == name)
                server.load(name, (self.folder / FOLDER / role).resolve())
        try:
            return server.complete(name or self.bases[part], prompt, count, how, ends)
        except Lost as error:
            raise server.failed(f"has no model {name or self.bases[part]}: {error}") from error

    def _check_bases(self, parts: Sequence[int]) -> None:
        known, expected = self._known
        for part in parts:
            server = self.servers[part]
            try:
                found = [server.read(self.bases[part], ids) for ids in known]
            except Lost as error:
                raise server.failed(f"has another base now: {error}") from error
            self._judge("base", found, expected, server)

    def _compare_adapter(self, model: PeftModel, known: list[Ids], bare_log_probs: list[list[float]]) -> None:
        """The policy's adapter with noise: at its start an adapter adds nothing, and a server that ignores it would
        pass. There is so much noise that ignoring it is far above the limit."""
        noise = NOISE
        while True:
            with _noisy(model, noise):
                expected = _read(model, known)
                effect = _differences(expected, bare_log_probs)[0]
                if effect < CLEAR * self.limit and noise < MOST_NOISE:
                    noise *= 2
                    continue
                place = self._write(model, roles.POLICY)
                for server in self.servers:
                    server.load(self.names[roles.POLICY], place)
                    try:
                        found = [server.read(self.names[roles.POLICY], ids) for ids in known]
                    except Lost as error:
                        raise server.failed(f"doesn't keep an adapter that it has loaded: {error}") from error
                    self._judge("adapter", found, expected, server)
                break
        self.differences["adapter_effect"] = effect

    def _judge(self, what: str, found: list[list[float]], expected: list[list[float]], server: Server) -> None:
        mean, largest = _differences(found, expected)
        self.differences[f"{what}_mean"] = max(mean, self.differences.get(f"{what}_mean", 0.0))
        self.differences[f"{what}_max"] = max(largest, self.differences.get(f"{what}_max", 0.0))
        if not mean <= self.limit:  # or NaN
            thing = "base" if what == "base" else "base with the run's adapter"
            raise RunFailed(
                f"The {thing} on the vLLM server {server.url} is not the run's: log-probabilities differ by {mean:.3g} "
                f"per token, more than --vllm-max-logprob-diff {self.limit:g}",
                f"serve the base of the run; {SERVE}",
            )

    def _texts(self) -> list[Ids]:
        return [self.render.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]

    def _compare_tokens(self, server: Server, name: str) -> None:
        for text, ours in zip(TEXTS, self._texts(), strict=True):
            if server.tokens(name, text) != ours:
                raise server.failed(f"splits {text!r} into other tokens than the run's tokenizer", SERVE)

    def _find_mode(self, model: Model, prompt: Ids) -> bool:
        """Whether all servers give log-probabilities at the temperature of sampling (`--logprobs-mode
        processed_logprobs`), and not at 1."""
        return all(self._is_processed(model, prompt, part) for part in range(len(self.servers)))

    def _is_processed(self, model: Model, prompt: Ids, part: int) -> bool:
        server = self.servers[part]
        how = Sampling(temperature=HOT, max_new_tokens=ENOUGH, seed=0)
        try:
            written = server.complete(self.bases[part], prompt, 1, how, self.render.eos_ids)[0]
        except Lost as error:
            raise server.failed(f"doesn't answer: {error}") from error
        with bare(model):
            raw, processed = (
                _differences([written.log_probs], log_probs(model, [prompt], [written.ids], heat))[0]
                for heat in (1.0, HOT)
            )
        return processed <= raw


def connected(urls: Sequence[str], folder: Path, render: Renderer, limit: float) -> Vllm:
    """The engine for servers at these addresses. Raises PerlError if nothing listens at one."""
    servers = []
    for url in urls:
        web.check_address(OPTION, url, EXAMPLE, "the environment variable VLLM_API_KEY has the server's key")
        servers.append(Server(url.rstrip("/").removesuffix("/v1")))
    return Vllm(servers, folder, render, limit)


def check_adapter(config: Any) -> None:  # noqa: ANN401
    """Raises PerlError for an adapter that vLLM can't hold."""
    if not isinstance(config, LoraConfig):
        raise PerlError(f"--rollouts vllm takes LoRA adapters only, not {type(config).__name__.removesuffix('Config')}")
    for name, wanted in PLAIN.items():
        if (getattr(config, name, wanted) or None) != (wanted or None):
            raise PerlError(f"--rollouts vllm can't be combined with an adapter with {name}: vLLM doesn't know it")


def role_of(model: Model) -> str | None:
    """The role whose adapter is active; None for the bare base."""
    if not isinstance(model, PeftModel):
        return None
    layer = next(module for module in model.modules() if hasattr(module, "_disable_adapters"))
    return None if layer._disable_adapters else str(model.active_adapter)


def bare(model: Model) -> AbstractContextManager[object]:
    """Switches to the model's base without an adapter."""
    return roles.switched(model, None) if isinstance(model, PeftModel) else nullcontext()


def _read(model: Model, known: Sequence[Ids]) -> list[list[float]]:
    return log_probs(model, [ids[:1] for ids in known], [ids[1:] for ids in known], 1.0)


@contextmanager
def _noisy(model: PeftModel, noise: float) -> Iterator[None]:
    """The policy's adapter with noise of this deviation on its weights, which it loses again."""
    parameters = [parameter for name, parameter in model.named_parameters() if roles.is_of(roles.POLICY, name)]
    kept = [parameter.detach().clone() for parameter in parameters]
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((noise * torch.randn(parameter.shape, generator=drawn)).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def _differences(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean and the largest difference of log-probabilities, per token."""
    pairs = zip([x for row in found for x in row], [x for row in expected for x in row], strict=True)
    gaps = [abs(one - other) for one, other in pairs]
    return fmean(gaps), max(gaps)
