"""A judge behind any endpoint that speaks OpenAI's chat completions, asked through the `openai` client."""

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import openai

from utils.cli.errors import UserError
from utils.evaluation.judge.asking import Judge, Unanswered

KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable that holds the endpoint's key."""

_PATH = "/chat/completions"
_REFUSES_ALL = frozenset({401, 403, 404, 405})
_HIDDEN = "***"
_SECRET = re.compile(r"(key|token|secret|password|signature)", re.IGNORECASE)


@dataclass(frozen=True)
class RequestSettings:
    """How an endpoint is asked.

    timeout: seconds until a reply counts as late. tries: per question; the client waits between them, longer every
    time, or as long as Retry-After says. rate: requests per minute, 0 for no limit. parallel: requests at once.
    temperature: below 0 it is not sent.
    """

    timeout: float = 60.0
    tries: int = 6
    rate: float = 0.0
    parallel: int = 4
    temperature: float = 0.0


class RateLimit:
    """Lets callers through `rate` times a minute, evenly spread; 0: at once."""

    def __init__(self, rate: float) -> None:
        self._interval = 60.0 / rate if rate else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def delay(self) -> float:
        """Seconds the caller has to wait before its request."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self._interval
            return turn - now


class Endpoint(Judge):
    """A judge at `url`, asked for by the name `model`. The key is sent to that place alone and shown nowhere.

    UserError for an address that is none, or carries a name and password; for a key that cannot be sent.
    """

    def __init__(self, url: str, model: str, key: str = "", settings: RequestSettings | None = None) -> None:
        settings = settings or RequestSettings()
        self._base, self._query = _split_address(url)
        self._key = key.strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY_VARIABLE} holds signs that no key has (it is not shown here): set it again")
        self._request: dict[str, Any] = {"model": model}
        if settings.temperature >= 0:
            self._request["temperature"] = settings.temperature
        self.facts: Mapping[str, Any] = {"kind": "endpoint", "url": self._base + _PATH, **self._request}
        self.parallel, self._tries = settings.parallel, settings.tries
        self._client = openai.OpenAI(
            base_url=self._base,
            api_key=self._key or "none",
            default_query=self._query,
            # A redirect would carry the key to another place.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, timeout=settings.timeout),
            timeout=settings.timeout,
            max_retries=settings.tries - 1,
        )
        self._limit, self._closed = RateLimit(settings.rate), threading.Event()

    def close(self) -> None:
        """No further question is asked, and what waits for its turn stops waiting."""
        self._closed.set()

    def ask(self, prompt: str) -> str:
        """The reply to one prompt. Unanswered after all tries, or where the endpoint refuses it; UserError where it
        would refuse any."""
        if self._closed.wait(self._limit.delay()):
            raise Unanswered("asking was ended")
        try:
            reply = self._client.chat.completions.create(
                messages=[{"role": "user", "content": prompt}], **self._request
            )
            return self._hide_key(reply.choices[0].message.content or "")
        except openai.APIStatusError as error:
            raise self._explain_status(error) from None
        except openai.APIConnectionError as error:  # a reply that is late among them
            cause = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise Unanswered(self._hide_key(f"{cause} At the last of {self._tries} tries")) from None
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise Unanswered(f"a reply that is no chat completion ({type(error).__name__})") from None

    def _explain_status(self, error: openai.APIStatusError) -> Exception:
        """What an answer without success means for this question, or for all."""
        status = error.status_code
        text = " ".join("".join(sign if sign.isprintable() else " " for sign in error.response.text).split())
        why = f"status {status} from {self.facts['url']}" + (f": {self._hide_key(text[:200])}" if text else "")
        if status < 400:
            return UserError(f"{why}: it wants to send requests elsewhere, give the address that answers: --judge_url")
        if status in _REFUSES_ALL:
            return UserError(f"{why}: check --judge_url, --judge_model and the key in {KEY_VARIABLE}")
        return Unanswered(
            f"{why}, at the last of {self._tries} tries" if status in {408, 429} or status >= 500 else why
        )

    def _hide_key(self, text: str) -> str:
        """Text that may be written down: whatever a server echoes, the key is not in it."""
        return text.replace(self._key, _HIDDEN) if self._key else text


def _split_address(url: str) -> tuple[str, dict[str, str]]:
    """(the address without the path of chat completions and its query, the query). UserError where it is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        query = dict(parse_qsl(parts.query))
        secret = parts.username is not None or any(_SECRET.search(name) for name in query)
    except ValueError:
        usable, secret, query = False, False, {}
    if secret:
        raise UserError(f"--judge_url carries a password or key (not shown here): put it into {KEY_VARIABLE} instead")
    if not usable:
        raise UserError(f"--judge_url must be an address such as https://host/v1, found {url!r}")
    path = parts.path.rstrip("/").removesuffix(_PATH)
    return urlunsplit((parts.scheme, parts.netloc, path, "", "")), query
