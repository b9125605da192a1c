"""An HTTP server on 127.0.0.1, for downloads."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from timemix.data.downloads import Download


class Server(ThreadingHTTPServer):
    """HTTP server with `content` at every path; it cuts the connection after `cuts[i]` bytes of the i-th answer."""

    def __init__(self, content):
        self.content = content
        self.cuts = []
        self.asked = []
        self.ranges = True
        super().__init__(("127.0.0.1", 0), Handler)

    def download(self, **fields):
        return Download(url=f"http://127.0.0.1:{self.server_port}/text.zip", **({"file": "text.zip"} | fields))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(content):
    """Run a server for some content, and yield the server."""
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
