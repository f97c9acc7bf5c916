"""A chat server on this machine, for the endpoint engine."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Answers POST /v1/chat/completions with `reply(body)`, a (status, object) pair; keeps what it was asked.

    seconds: how long a reply takes; replies are given one at a time, as by a busy machine.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (200, completion("hello"))
        self.seconds = 0.0
        self.max_in_flight = 0
        self._in_flight = 0
        self._counting, self._busy = threading.Lock(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._counting:
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        with self._busy:
            time.sleep(self.seconds)
        with self._counting:
            self._in_flight -= 1
        status, reply = self.reply(body)
        data = json.dumps(reply).encode()
        with contextlib.suppress(OSError):  # the client may have been killed
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as servers send it; `message` adds fields such as reasoning_content or tool_calls."""
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    reply = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": reply, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
