"""A llama-server that only says that it is healthy, and sends the events of `/v1/atlas/metrics/stream` for ever."""

from __future__ import annotations

import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        if "metrics/stream" not in self.path:
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"9\r\ndata: 1\n\n\r\n")
            time.sleep(0.01)


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who asked went away


if __name__ == "__main__":
    Server(sys.argv[sys.argv.index("--host") + 1], Request).serve_forever()
