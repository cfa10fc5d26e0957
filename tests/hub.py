"""What the Hugging Face hub's own client asks of it to read files of a data set.

Made after https://huggingface.co/docs/hub/api; no test asks the real one.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def serving(folder: Path, name: str) -> Iterator[str]:
    """The address at which a folder is the data set ``owner/name``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/main"):
                self._json({"id": name, "sha": "0" * 40, "siblings": []})
            elif found := re.fullmatch(f"/api/datasets/{name}/tree/[^/]+/?(.*)", path):
                self._json([_entry(folder, p) for p in sorted((folder / found[1]).rglob("*"))])
            elif found := re.fullmatch(f"/datasets/{name}/resolve/[^/]+/(.*)", path):
                self._file(folder / found[1])
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["content-length"])).decode()
            paths = json.loads(asked)["paths"]
            self._json([_entry(folder, folder / p) for p in paths if (folder / p).exists()])

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

        def _file(self, path: Path) -> None:
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
            if asked is None:
                self._send(200, content, {})
                return
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            about = {"content-range": f"bytes {first}-{last}/{len(content)}"}
            self._send(206, content[first : last + 1], about)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    name = str(path.relative_to(folder))
    return {"type": kind, "path": name, "oid": "1" * 40, "size": size}
