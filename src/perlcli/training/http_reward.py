"""Rewards from a server: completions go out as JSON, numbers come back.

One POST has {"prompts": […], "completions": […], "columns": {name: […]}}, each list with one item per completion; the
answer is a JSON list of as many numbers, null for no opinion, or {"rewards": […]}."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from perlcli.errors import PerlError
from perlcli.text import clip, shorten
from perlcli.training.reward_errors import KWARGS, RewardRaised

BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another try; any other error stays what it is
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries: at first, doubled each time, at most
DAY = 86_400  # seconds
TOLD = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # what a server doesn't get
TAKEN: dict[str, tuple[str, Callable[[Any], bool]]] = {  # keyword arguments: what each must be
    "timeout": (
        f"a number of seconds above 0 and at most {DAY:,}",
        lambda value: _is_number(value) and 0 < value <= DAY,
    ),
    "retries": ("a number from 0", lambda value: type(value) is int and value >= 0),
    "batch_size": ("a number above 0", lambda value: type(value) is int and value > 0),
    "token_env": ("the name of an environment variable", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class HttpReward:
    """A reward function that asks a server: its `--reward-kwargs`, and how it is called."""

    url: str
    timeout: float = 60.0  # seconds until a batch must be answered
    retries: int = 5  # further tries where the server can't be reached, is busy or doesn't answer in time
    batch_size: int = 32  # completions per request
    token_env: str = ""  # the environment variable with a token for the header Authorization
    session: requests.Session = field(default_factory=requests.Session, compare=False, repr=False)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """A number or None per completion. Raises PerlError if the server gives anything else."""
        rewards: list[float | None] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            others = {name: values[part] for name, values in columns.items() if name not in TOLD}
            sent = {"prompts": prompts[part], "completions": completions[part], "columns": others}
            rewards += self._asked(json.dumps(sent, default=str), len(prompts[part]))
        return rewards

    def _asked(self, sent: str, count: int) -> list[float | None]:
        headers = {"Content-Type": "application/json"}
        if self.token_env:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        try:
            answer = self.session.post(
                self.url, data=sent.encode(), headers=headers, timeout=self.timeout, allow_redirects=False
            )
        except requests.RequestException as error:
            # not RewardRaised, after which each completion would be tried on its own
            problem = f"The reward server {self.url} did not answer, after {self.retries + 1} tries: {_cause(error)}"
            raise PerlError(problem) from error
        if answer.is_redirect:  # followed, many become a GET without the completions
            place = urljoin(self.url, answer.headers["location"])
            raise PerlError(f"The reward server {self.url} redirects to {place}", f"--reward {place}")
        if not answer.ok:
            raise self._failed(f"answered {answer.status_code} {answer.reason}: {shorten(answer.text)}")
        try:
            found = answer.json()
        except (ValueError, RecursionError) as error:
            raise self._failed(f"answered with something that isn't JSON: {shorten(answer.text)}") from error
        rewards = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(rewards, list) or not all(each is None or _is_number(each) for each in rewards):
            raise self._failed(f"must answer with a list of numbers, not {shorten(found)}")
        if len(rewards) != count:
            raise self._failed(f"answered with {len(rewards)} rewards for {count} completions")
        return rewards

    def _failed(self, what: str) -> RewardRaised:
        return RewardRaised(f"The reward server {self.url} {what}")


def connect(url: str, given: Mapping[str, Any]) -> HttpReward:
    """The reward of a server that can be reached. Raises PerlError if it can't, or for bad keyword arguments."""
    for name, value in given.items():
        if name not in TAKEN:
            raise PerlError(f"{KWARGS} {clip(name)}: a server takes {', '.join(TAKEN)}")
        what, is_right = TAKEN[name]
        if not is_right(value):
            raise PerlError(f"{KWARGS} {name} must be {what}, not {shorten(value)}")
    _check_address(url)
    reward = HttpReward(url, **given)
    if reward.token_env and not os.environ.get(reward.token_env):
        raise PerlError(f"{KWARGS} token_env: the environment variable {clip(reward.token_env)} is not set")
    again = Retry(
        total=reward.retries, status_forcelist=BUSY, allowed_methods=None, backoff_factor=PAUSE,
        backoff_max=LONGEST_PAUSE, raise_on_status=False,
    )  # fmt: skip
    for start in ("http://", "https://"):
        reward.session.mount(start, HTTPAdapter(max_retries=again))
    return reward


def _check_address(url: str) -> None:
    """Raises PerlError unless something listens there: before weights are loaded, not after."""
    problem = f"--reward {url}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise PerlError(f"{problem} is not an address: {error}") from error
    if not host:
        raise PerlError(f"{problem} is not an address", "--reward http://localhost:8000/score")
    if parts.username or parts.password:
        raise PerlError(
            "--reward must not have a login in its address: addresses are kept in the run's record",
            f'{KWARGS} \'{{"token_env": "NAME"}}\' sends what an environment variable has',
        )
    if requests.utils.get_environ_proxies(url):
        return  # the proxy knows
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        why = f"{problem} can't be reached: {error.strerror or error}"
        raise PerlError(why, "start the server before the run") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cause(error: BaseException) -> str:
    """The innermost reason of an error that libraries have wrapped."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
