"""A local HTTP server that behaves like a judge's endpoint, well or badly, as told."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What to do with one request. body: bytes to send; cut: send only so many of the announced ones. delay: seconds
    before anything is sent. drip: seconds between the body's bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    delay: float = 0.0
    drip: float = 0.0


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def says(text: Any, **more: Any) -> Reply:
    return Reply(body=completion(text), **more)


@dataclass
class Server:
    """url: to ask at. requests: (path, headers, parsed body) of all requests so far."""

    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for _, _, body in self.requests]


@contextmanager
def judge_server(respond: Callable[[int, str], Reply]) -> Iterator[Server]:
    """A server that answers request number n (from 0) about a prompt with respond(n, prompt)."""
    told, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(told.requests)
                headers = {name.title(): value for name, value in self.headers.items()}
                told.requests.append((self.path, headers, body))
            reply = respond(number, body["messages"][0]["content"])
            time.sleep(reply.delay)
            with contextlib.suppress(OSError):  # the client may no longer listen
                self._send(reply)

        def do_GET(self) -> None:
            with lock:
                told.requests.append(
                    (
                        self.path,
                        {name.title(): value for name, value in self.headers.items()},
                        {"messages": [{"content": "GET"}]},
                    )
                )
            self._send(says("SCORE: 10"))

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if not reply.drip:
                self.wfile.write(reply.body[: reply.cut])
                return
            for place in range(len(reply.body)):
                self.wfile.write(reply.body[place : place + 1])
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
