"""Receive what alert.py sends: messages through apprise, and heartbeats, over HTTP."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Receive alerts and heartbeats over HTTP. `accepts`: whether it responds 200, or 500."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        self.pings: list[str] = []
        self.accepts = True
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.alerts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.respond()

            def do_GET(self) -> None:
                receiver.pings.append(self.path)
                self.respond()

            def respond(self) -> None:
                self.send_response(200 if receiver.accepts else 500)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.alert_url = f"json://{self.address}/alerts"

    def texts(self) -> list[str]:
        """Return the texts received since the last call."""
        texts = [received["message"] for received in self.alerts]
        self.alerts.clear()
        return texts


@contextlib.contextmanager
def running_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:  # else the thread would keep the tests' process alive
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()
