"""A server on this machine that answers those requests of the Hub of Hugging Face by which datasets are read."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Datasets of a Hub: `files` by the name of the dataset, each a dictionary of paths and bytes."""

    def __init__(self):
        self.files, self.gated, self.commits = {}, set(), {}
        self.earlier = {}
        """Files of earlier commits by the commit."""
        self.requests = []
        self.cut_after = None
        """Number of bytes after which the server closes the connection of a download, None for never."""

    def commit(self, name, revision=None):
        return revision if revision in self.earlier else self.commits.get(name, COMMIT)


def entry(path, data):
    digest = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": digest}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        hub, address = self.hub, urlsplit(self.path)
        path = unquote(address.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        found = re.fullmatch(
            r"(?:/api)?/datasets/([\w.-]+(?:/[\w.-]+)?)(?:/(revision|tree|paths-info|resolve)/([\w.-]+)/?(.*))?", path
        )
        if not found or found[1] not in hub.files:
            self.give(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        name, verb, revision, rest = found.groups()
        files, commit = hub.earlier.get(revision, hub.files[name]), hub.commit(name, revision)
        if revision not in (None, "main", commit):
            self.give(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif verb in (None, "revision"):
            siblings = [{"rfilename": each} for each in files]
            self.give(200, {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif verb == "tree":
            self.tree(files, rest, parse_qs(address.query))
        elif verb == "paths-info":
            asked = json.loads(body)["paths"] if b"{" in body else parse_qs(body.decode()).get("paths", [])
            self.give(200, [found for each in asked if (found := self.entry(files, each))])
        elif name in hub.gated:
            self.give(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif rest not in files:
            self.give(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self.file(commit, rest, files[rest])

    def entry(self, files, path):
        if path in files:
            return entry(path, files[path])
        is_folder = any(each.startswith(path.rstrip("/") + "/") for each in files)
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} if is_folder else None

    def tree(self, files, folder, query):
        prefix = folder and folder.rstrip("/") + "/"
        below = [each for each in files if each.startswith(prefix)]
        if folder and not below:
            self.give(404, {"error": "no folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        folders = {prefix + each[len(prefix) :].rpartition("/")[0] for each in below if "/" in each[len(prefix) :]}
        if query.get("recursive", ["false"])[0].lower() != "true":
            below = [each for each in below if "/" not in each[len(prefix) :]]
        self.give(200, [self.entry(files, each) for each in (*sorted(folders), *below)])

    def file(self, commit, path, data):
        first, last = 0, len(data) - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(last, int(match[2] or last))
        part = data[first : last + 1]
        headers = {
            "ETag": f'"{entry(path, data)["oid"]}"',
            "X-Repo-Commit": commit,
            "Content-Range": f"bytes {first}-{last}/{len(data)}",
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self.give(206 if match else 200, part, headers)

    def give(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.hub.cut_after if isinstance(content, bytes) else None
            self.wfile.write(data[:cut])
            self.close_connection = cut is not None


@contextmanager
def hub_server():
    """Run a server, and yield its content and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
