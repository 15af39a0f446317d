"""Asking a server over HTTP: further tries with growing pauses, addresses that are checked early, plain errors."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from perlcli.errors import PerlError

BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another try; any other error stays what it is
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries: at first, doubled each time, at most


def session(retries: int, connections: int = 10, made: requests.Session | None = None) -> requests.Session:
    """A session that asks again `retries` times where the server can't be reached, is busy or is too slow, and keeps so
    many connections open: a new one, or one that was `made` before."""
    again = Retry(
        total=retries, status_forcelist=BUSY, allowed_methods=None, backoff_factor=PAUSE,
        backoff_max=LONGEST_PAUSE, raise_on_status=False,
    )  # fmt: skip
    made = made or requests.Session()
    for start in ("http://", "https://"):
        made.mount(start, HTTPAdapter(max_retries=again, pool_connections=connections, pool_maxsize=connections))
    return made


def check_address(option: str, url: str, example: str, secret: str = "") -> None:
    """Raises PerlError unless something listens there: before weights are loaded, not after. `secret` is a hint for
    addresses with a login."""
    problem = f"{option} {url}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise PerlError(f"{problem} is not an address: {error}") from error
    if not host or parts.scheme not in ("http", "https"):
        raise PerlError(f"{problem} is not an address", f"{option} {example}")
    if parts.username or parts.password:
        problem = f"{option} must not have a login in its address: addresses are kept in the run's record"
        raise PerlError(problem, secret)
    if requests.utils.get_environ_proxies(url):
        return  # the proxy knows
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        why = f"{problem} can't be reached: {error.strerror or error}"
        raise PerlError(why, "start the server before the run") from error


def cause(error: BaseException) -> str:
    """The innermost reason of an error that libraries have wrapped."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
