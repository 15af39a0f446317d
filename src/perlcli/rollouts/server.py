"""One vLLM server, spoken to by its own HTTP interface: no patch of it is needed, and token ids go in and come out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests

from perlcli import web
from perlcli.errors import PerlError
from perlcli.rollouts.how import FULL, Ids, Sampling
from perlcli.text import shorten

OPTION, EXAMPLE = "--vllm-server-base-url", "http://localhost:8000"
RETRIES = 8  # further tries, over about two minutes: a server that restarts is back by then
TIMEOUT = 1200.0  # seconds until a request must be answered
HURRY = 10.0  # the same, once the run has ended
CONNECTIONS = 64  # requests at the same time
KEY = "VLLM_API_KEY"  # the environment variable with the server's key, if it has one
SERVE = "perl serve prints the command that starts one"


class Lost(Exception):
    """The server has no model of this name, since an adapter is lost when it starts again; or it gave up a completion,
    since it is about to end."""


@dataclass(frozen=True)
class Written:
    """A completion, and the log-probability of each of its tokens under the model that sampled it."""

    ids: Ids
    log_probs: list[float]


@dataclass
class Server:
    """A running vLLM server. Every method raises PerlError if it doesn't answer, or not with what was asked for."""

    url: str  # without a path
    retries: int = RETRIES
    timeout: float = TIMEOUT
    session: requests.Session = field(init=False, repr=False)
    # vLLM keeps what it computed for a prompt by the adapter's name and folder, not by its weights: with another salt
    # nothing of earlier weights is found (vllm/v1/core/kv_cache_utils.py, vLLM 0.32)
    salt: str = field(default_factory=lambda: uuid4().hex)
    loads: int = 0  # of adapters, all names together

    def __post_init__(self) -> None:
        self.session = web.session(self.retries, CONNECTIONS)
        if os.environ.get(KEY):
            self.session.headers["Authorization"] = f"Bearer {os.environ[KEY]}"

    def hurry(self) -> None:
        """From now on ask only once, and for some seconds: a run that ends doesn't wait for a server that is gone."""
        self.retries, self.timeout = 0, HURRY
        web.session(0, CONNECTIONS, self.session)

    def models(self) -> list[dict[str, Any]]:
        """The models that the server has: bases, and adapters, which have a `parent`."""
        found = self._json("get", "/v1/models").get("data")
        if not isinstance(found, list) or not all(isinstance(each, dict) and "id" in each for each in found):
            raise self.failed("doesn't list its models as vLLM does")
        return found

    def tokens(self, model: str, text: str) -> Ids:
        """The tokens of a text, without special ones."""
        asked = {"model": model, "prompt": text, "add_special_tokens": False}
        found = self._json("post", "/tokenize", asked).get("tokens")
        if not isinstance(found, list):
            raise self.failed("doesn't tokenize as vLLM does")
        return found

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in a folder under this name, in the place of an earlier one."""
        asked = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        self.loads += 1
        answer = self._answer("post", "/v1/load_lora_adapter", asked)
        if answer.status_code == 400 and "already been loaded" in answer.text:  # by a vLLM without load_inplace
            self.unload(name)
            answer = self._answer("post", "/v1/load_lora_adapter", asked)
        if answer.status_code == 404:
            hint = f"start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora; {SERVE}"
            raise PerlError(f"The vLLM server {self.url} takes no adapters while it runs", hint)
        if not answer.ok:
            problem = f"could not load the adapter in {folder}: {_message(answer)}"
            raise self.failed(problem, f"it must see that folder under the same path; {SERVE}")

    def unload(self, name: str) -> None:
        """Forget an adapter; nothing happens if the server doesn't have it."""
        self._answer("post", "/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, model: str, prompt: Ids, count: int, how: Sampling, ends: Sequence[int]) -> list[Written]:
        """`count` completions of a prompt, each up to and including the EOS or stop string that ends it. Raises Lost if
        the server lost the adapter or gave up."""
        asked = {
            **_distribution(how), "n": count, "seed": how.seed, "max_tokens": how.max_new_tokens,
            "min_tokens": how.min_new_tokens, "stop": list(how.stop), "stop_token_ids": list(ends),
            "skip_special_tokens": False, "spaces_between_special_tokens": False, "logprobs": 0,
        }  # fmt: skip
        choices = sorted(self._completions(model, prompt, asked), key=lambda choice: int(choice.get("index", 0)))
        if len(choices) != count:
            raise self.failed(f"wrote {len(choices)} completions, not {count}")
        return [self._written(choice) for choice in choices]

    def read(self, model: str, ids: Ids) -> list[float]:
        """The log-probability of each token after the first one."""
        asked = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}
        choice = self._completions(model, ids, asked)[0]
        found = choice.get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(ids):
            raise self.failed("gives no log-probabilities of a prompt")
        return [float(place[str(token)]["logprob"]) for place, token in zip(found[1:], ids[1:], strict=True)]

    def failed(self, what: str, hint: str = "") -> PerlError:
        """An error of this server."""
        return PerlError(f"The vLLM server {self.url} {what}", hint)

    def _completions(self, model: str, prompt: Ids, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        sent = {"model": model, "prompt": prompt, "return_token_ids": True, **asked}
        sent["cache_salt"] = f"{self.salt}-{self.loads}"
        found = self._json("post", "/v1/completions", sent)
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self.failed(f"gave no completion: {shorten(found)}")
        return choices

    def _written(self, choice: Mapping[str, Any]) -> Written:
        if choice.get("finish_reason") == "abort":
            raise Lost("it gave up a completion")
        ids, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(log_probs, list) or len(ids) != len(log_probs):
            raise self.failed("gives no token ids and log-probabilities of what it writes", "vllm 0.11 or later does")
        if not ids:
            raise Lost("it wrote nothing")
        return Written(ids, [float(value) for value in log_probs])

    def _json(self, method: str, path: str, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer = self._answer(method, path, asked)
        if answer.status_code == 404 and path == "/v1/completions":
            raise Lost(_message(answer))
        if not answer.ok:
            raise self.failed(f"answered {path} with {answer.status_code} {answer.reason}: {_message(answer)}")
        try:
            found = answer.json()
        except ValueError as error:
            raise self.failed(f"answered {path} with something that isn't JSON: {shorten(answer.text)}") from error
        if not isinstance(found, dict):
            raise self.failed(f"answered {path} with {shorten(found)}: is it a vLLM server?", SERVE)
        return found

    def _answer(self, method: str, path: str, asked: Mapping[str, Any] | None = None) -> requests.Response:
        try:
            return self.session.request(method, f"{self.url}{path}", json=asked, timeout=self.timeout)
        except requests.RequestException as error:
            problem = f"did not answer, after {self.retries + 1} tries: {web.cause(error)}"
            raise self.failed(problem, "start it again, then continue with --resume") from error


def _distribution(how: Sampling) -> dict[str, float]:
    """All that decides the distribution: what isn't sent would come from the model's own generation config."""
    return {name: getattr(how, name) for name in ("temperature", *FULL)}


def _message(answer: requests.Response) -> str:
    """What a server says is wrong."""
    try:
        found = answer.json()
    except ValueError:
        return shorten(answer.text)
    error = found.get("error", found) if isinstance(found, dict) else found
    return shorten(error.get("message", error) if isinstance(error, dict) else error)
