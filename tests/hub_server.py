"""A stand-in for the Hugging Face hub: repositories that are folders, served as the hub serves them."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "9c512ab7d0a1b2c3d4e5f60718293a4b5c6d7e8f"


class Server:
    """Attributes:
    url: its address.
    asked: paths of the files whose contents were sent.
    """

    def __init__(self, repositories: dict[str, pathlib.Path], revisions: tuple[str, ...]):
        self.repositories, self.revisions, self.asked = repositories, (*revisions, COMMIT), []
        self.http = http.server.ThreadingHTTPServer(("localhost", 0), self._handler())
        self.url = f"http://localhost:{self.http.server_port}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]  # slashes in revisions are quoted
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        if (folder := self.repositories.get("/".join(parts[:2]))) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        kind, revision = parts[2:4] if len(parts) > 3 else ("revision", "main")
        name = "/".join(parts[4:])
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api:
            entries = [self._entry(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": e["path"]} for e in entries]}
            return 200, {}, json.dumps(entries if kind == "tree" else info).encode()
        if not (file := folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        entry = self._entry(folder, file)
        return 200, {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, file.read_bytes()

    def _entry(self, folder: pathlib.Path, file: pathlib.Path) -> dict:
        digest = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": digest}

    def _handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.reply(send=False)

            def do_GET(self):
                self.reply(send=True)

            def reply(self, send: bool):
                path = urllib.parse.urlsplit(self.path).path
                status, headers, body = server.answer(path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if send:
                    self.wfile.write(body)
                    if "/resolve/" in path and status == 200:
                        server.asked.append(path.partition("/resolve/")[2].partition("/")[2])

            def log_message(self, *_):
                pass

        return Handler


@contextlib.contextmanager
def serving(repositories: dict[str, pathlib.Path], revisions: tuple[str, ...] = ("main",)) -> Iterator[Server]:
    """Runs a hub of some repositories, OWNER/NAME -> folder, that have some revisions, all with the same files."""
    server = Server(repositories, revisions)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
