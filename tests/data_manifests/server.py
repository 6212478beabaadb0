"""A local HTTP server that misbehaves as it is told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """What the server does with a path; counters and lists say what it saw."""

    content: bytes
    drop_after: list[int] = field(default_factory=list)  # bytes sent in each of the first answers before it hangs up
    status: list[int] = field(default_factory=list)  # statuses of the first answers, in place of content
    ranges: bool = True  # does it know Range?
    length: bool = True  # does it send Content-Length?
    etag: str | None = '"v1"'
    wrong_range: bool = False  # answers a Range request with other bytes than asked for
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        if self.status:
            handler.send_response(self.status.pop(0))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = 0
        fresh = handler.headers.get("If-Range") in (None, self.etag)
        if self.ranges and wanted and fresh:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.content):
                handler.send_response(416)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            start += self.wrong_range
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        body = self.content[start:]
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.end_headers()
        handler.wfile.write(body[: self.drop_after.pop(0)] if self.drop_after else body)
        handler.close_connection = True


@contextmanager
def serving(paths: dict[str, Behaviour]) -> Iterator[str]:
    """Serve the paths on this machine; gives the address they begin with. Anything else is a 404."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path in paths:
                paths[self.path].answer(self)
            else:
                self.send_error(404, "Not Found")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
