"""A Hugging Face hub for one data set repository, with as much of its API as `HfFileSystem` needs to read files."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/name"


class FakeHub(ThreadingHTTPServer):
    """A server of `files`, by their paths in the repository; the hub itself is at `url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0  # bytes of files sent
        self.url = f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: str) -> dict[str, object]:
        """Describe a file as the API does."""
        content = self.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def listing(self, folder: str) -> list[dict[str, object]]:
        """List a folder as the API does."""
        within = f"{folder}/" if folder else ""
        names = {name.removeprefix(within).split("/")[0] for name in self.files if name.startswith(within)}
        return [
            self.entry(within + name)
            if within + name in self.files
            else {"type": "directory", "path": within + name, "oid": "0", "size": 0}
            for name in sorted(names)
        ]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, files = unquote(urlsplit(self.path).path), self.server.files
        api = f"/api/datasets/{REPOSITORY}"
        if path in (api, f"{api}/revision/main"):
            self._answer({"id": REPOSITORY, "sha": "0" * 40, "private": False, "downloads": 0, "tags": []})
        elif path.startswith(f"{api}/tree/main"):
            self._answer(self.server.listing(path.removeprefix(f"{api}/tree/main").strip("/")))
        elif (name := path.removeprefix(f"/datasets/{REPOSITORY}/resolve/main/")) in files:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert asked
            part = files[name][int(asked[1]) : int(asked[2]) + 1]
            self.server.sent += len(part)
            self._answer(part, 206)
        else:
            self._answer({"error": "not found"}, 404, "RepoNotFound" if path.startswith("/api") else "EntryNotFound")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer([self.server.entry(path) for path in asked["paths"] if path in self.server.files])

    def _answer(self, content: object, status: int = 200, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
