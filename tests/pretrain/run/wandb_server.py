"""A minimal wandb server, enough for its real client to send a run online: no network, no account."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")


class WandbServer(ThreadingHTTPServer):
    """Serves on a free port of this machine.

    Args:
        rewinds: whether it supports rewinding a run; not every server does.
    Attributes:
        history: each run's rows by the run's id, as a wandb page would show them.
        alerts: title and text of each.
    """

    def __init__(self, rewinds: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rewinds = rewinds
        self.lines: dict[str, list[str]] = {}
        self.configs: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.alerts: list[tuple[str, str]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""

    @property
    def history(self) -> dict[str, list[dict[str, Any]]]:
        return {run: [json.loads(line) for line in lines if line] for run, lines in self.lines.items()}

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "k" * 40}

    def bucket(self, run: str) -> dict[str, object]:
        project = {"id": "p", "name": "headrace", "entity": {"id": "e", "name": "lab"}}
        return {
            "id": base64.b64encode(run.encode()).decode(), "name": run, "displayName": self.names.get(run, run),
            "description": "", "config": self.configs.get(run, "{}"), "sweepName": None, "project": project,
            "historyLineCount": len(self.lines.get(run, [])),
        }  # fmt: skip

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, object] | None:
        if operation == "UpsertBucket":
            run = given.get("name") or base64.b64decode(given["id"]).decode()
            is_new = run not in self.lines
            self.lines.setdefault(run, [])
            self.configs[run] = given.get("config") or self.configs.get(run, "{}")
            self.names[run] = given.get("displayName") or self.names.get(run, run)
            return {"upsertBucket": {"bucket": self.bucket(run), "inserted": is_new}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append((given["title"], given["text"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "headrace", "entity": {"id": "e", "name": "lab"}} | self._tail(given)}
        if operation == "RewindRun" and self.rewinds:
            run, to = given["runName"], given["metricValue"]
            self.lines[run] = [line for line in self.lines[run] if json.loads(line)["_step"] <= to]
            return {"rewindRun": {"rewoundRun": self.bucket(run)}}
        return {
            "Viewer": {
                "viewer": {"id": "u", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}
            },
            "ServerInfo": {"serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "CreateRunFiles": {"createRunFiles": {"runID": given.get("run"), "uploadHeaders": [], "files": []}},
            "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
        }.get(operation)

    def _tail(self, given: dict[str, Any]) -> dict[str, object]:
        if (lines := self.lines.get(given["name"])) is None:
            return {"bucket": None}
        rest = {"summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": []}
        return {
            "bucket": {
                **self.bucket(given["name"]),
                **rest,
                "historyTail": json.dumps(lines[-1:]),
                "wandbConfig": json.dumps({"t": 1}),
            }
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {})

    def do_PUT(self) -> None:
        self._body()
        self._reply(200, {})

    def do_POST(self) -> None:
        content = self._body()
        body = json.loads(content) if content[:1] == b"{" else {}
        if self.path == "/graphql":
            found = _OPERATION.search(body["query"])
            answer = self.server.answer(found[1] if found else "", body.get("variables") or {})
            unknown = {"data": None, "errors": [{"message": f"unknown operation {found and found[1]}"}]}
            self._reply(200, unknown if answer is None else {"data": answer})
        elif streamed := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream$", self.path):
            if chunk := body.get("files", {}).get("wandb-history.jsonl"):
                lines = self.server.lines[streamed[1]]
                lines += [""] * (chunk["offset"] - len(lines))
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
            self._reply(200, {"exitcode": None, "limits": {}})
        else:
            self._reply(404, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _reply(self, code: int, answer: dict[str, object]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def wandb_server(rewinds: bool) -> Iterator[WandbServer]:
    with WandbServer(rewinds) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
