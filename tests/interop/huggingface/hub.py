"""A hub on this machine: takes repositories and commits over HTTP and keeps files in a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@contextmanager
def hub(folder: Path, *, token: str) -> Iterator[str]:
    """Serve a hub whose repositories are folders below `folder`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer({"error": "Invalid username or password."}, 401)
            parts = self.path.strip("/").split("/")
            address = f"http://127.0.0.1:{self.server.server_address[1]}"
            if parts == ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                (folder / name).mkdir(parents=True, exist_ok=True)
                return self.answer({"url": f"{address}/{name}", "id": name})
            name, action = "/".join(parts[2:4]), parts[4]
            if action == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = folder / name / entry["value"]["path"]
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            commit = {"commitOid": "0" * 40, "hookOutput": "", "success": True}
            return self.answer({**commit, "commitUrl": f"{address}/{name}/commit/{'0' * 40}"})

        def do_GET(self) -> None:
            self.answer({"error": "Not Found"}, 404)

        do_HEAD = do_GET

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.command != "HEAD" else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
