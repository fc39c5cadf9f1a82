"""A judge behind any endpoint that speaks OpenAI's chat completions, asked with the standard library alone."""

import email.utils
import http.client
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from utils.cli.errors import UserError
from utils.evaluation.judge.asking import Unanswered

KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable that holds the endpoint's key."""

_PATH = "/chat/completions"
_MOST_BYTES = 1 << 20
_MOST_SECONDS_TO_WAIT = 600.0
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_NOT_HERE = frozenset({401, 403, 404, 405})
_HIDDEN = "***"
_SECRET = re.compile(r"(key|token|secret|password|signature)[^=&]*=", re.IGNORECASE)


@dataclass(frozen=True)
class Manners:
    """How an endpoint is asked.

    timeout: seconds until a reply counts as late. tries: per question. rate: requests per minute, 0 for no limit.
    parallel: requests at once. temperature: below 0 it is not sent. backoff: seconds before the second try, about
    twice that before the third, and so on.
    """

    timeout: float = 60.0
    tries: int = 6
    rate: float = 0.0
    parallel: int = 4
    temperature: float = 0.0
    backoff: float = 1.0


class _Again(Exception):
    """It may go well at another try, at the earliest after `wait` seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Pace:
    """Lets callers through `rate` times a minute, evenly spread."""

    def __init__(self, rate: float) -> None:
        self._between = 60.0 / rate if rate else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def delay(self) -> float:
        """Seconds the caller has to wait before its request."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self._between
            return turn - now


class Endpoint:
    """A judge at `url`, asked for by the name `model`. The key is sent to that place alone and shown nowhere.

    UserError for an address that is none, or carries a name and password; for a key that cannot be sent.
    """

    def __init__(self, url: str, model: str, key: str = "", manners: Manners | None = None) -> None:
        self._manners = manners or Manners()
        self._url, shown = _addresses(url)
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY_VARIABLE} holds signs that no key has (it is not shown here): set it again")
        self._key = key
        self._settings: dict[str, Any] = {"model": model}
        if self._manners.temperature >= 0:
            self._settings["temperature"] = self._manners.temperature
        self.facts: Mapping[str, Any] = {"kind": "endpoint", "url": shown, **self._settings}
        self.parallel = self._manners.parallel
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._pace, self._closed = _Pace(self._manners.rate), threading.Event()

    def close(self) -> None:
        """No further try is made, and what waits for its turn stops waiting."""
        self._closed.set()

    def ask(self, prompt: str) -> str:
        """The reply to one prompt. Unanswered after all tries, or where the endpoint refuses it; UserError where it
        would refuse any."""
        why = "it was not asked"
        for attempt in range(self._manners.tries):
            try:
                self._wait(self._pace.delay())
                return self._shown(self._request(prompt))
            except _Again as error:
                why = str(error)
                if attempt + 1 < self._manners.tries:
                    self._wait(max(error.wait, self._manners.backoff * 2**attempt * random.uniform(0.75, 1.25)))
        raise Unanswered(f"{why}, at the last of {self._manners.tries} tries")

    def _wait(self, seconds: float) -> None:
        if self._closed.wait(min(seconds, _MOST_SECONDS_TO_WAIT)):
            raise Unanswered("asking was ended")

    def _request(self, prompt: str) -> str:
        body = self._settings | {"messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        late_at = time.monotonic() + self._manners.timeout
        try:
            with self._opener.open(request, timeout=self._manners.timeout) as response:
                return _content(_read(response, late_at))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise _Again(f"no whole reply in {self._manners.timeout:g} seconds") from None
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            why = f"no reply in {self._manners.timeout:g} seconds" if late else f"cannot be reached: {error.reason}"
            raise _Again(self._shown(why)) from None
        except (http.client.HTTPException, OSError) as error:
            raise _Again(self._shown(f"the connection broke ({type(error).__name__})")) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an answer without success means for this question, or for all."""
        why = f"status {error.code} from {self.facts['url']}"
        if told := self._shown(_complaint(error)):
            why += f": {told}"
        if error.code in _TRY_AGAIN or error.code >= 500:
            return _Again(why, _seconds_to_wait(error.headers.get("Retry-After")))
        if error.code < 400:
            return UserError(
                f"{why}: it wants to send requests elsewhere, give the address that answers as --judge_url"
            )
        if error.code in _NOT_HERE:
            return UserError(f"{why}: check --judge_url, --judge_model and the key in {KEY_VARIABLE}")
        return Unanswered(why)

    def _shown(self, text: str) -> str:
        """Text that may be written down: whatever a server echoes, the key is not in it."""
        return text.replace(self._key, _HIDDEN) if self._key else text


def _addresses(url: str) -> tuple[str, str]:
    """(where requests go, what is shown of it: without a query, which may hold a key)."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        told = parts.username is not None or parts.password is not None or bool(_SECRET.search(parts.query))
    except ValueError:
        usable = told = False
    if told:
        raise UserError(f"--judge_url carries a password or key (not shown here): put it into {KEY_VARIABLE} instead")
    if not usable:
        raise UserError(f"--judge_url must be an address such as https://host/v1, found {url!r}")
    path = parts.path.rstrip("/")
    path = path if path.endswith(_PATH) else path + _PATH
    whole = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    return whole, urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _read(response: Any, late_at: float) -> bytes:
    """The whole body. TimeoutError where it trickles in beyond `late_at`, _Again where it never ends."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > late_at:
            raise TimeoutError
        if size > _MOST_BYTES:
            raise _Again(f"a reply of more than {_MOST_BYTES} bytes")
    return b"".join(parts)


def _content(body: bytes) -> str:
    """The words in a chat completion; none where the judge gave none. _Again where it is not one."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _Again("a reply that is no chat completion") from None
    if content is not None and not isinstance(content, str):
        raise _Again("a reply that is no chat completion")
    return content or ""


def _complaint(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of its refusal, on one line; empty where it cannot be read."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:200]


def _seconds_to_wait(told: str | None) -> float:
    """What a Retry-After asks for, seconds or a date; 0 where it says nothing one can read."""
    if told is None:
        return 0.0
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _MOST_SECONDS_TO_WAIT) if seconds == seconds else 0.0
