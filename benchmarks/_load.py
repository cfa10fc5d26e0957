"""Load on an HTTP server: wrk for the peak, and requests at a fixed rate for the tail.

    python benchmarks/_load.py URL RATE SECONDS HEADERS BODY

sends at the rate whatever the answers do, over as many connections as that takes up to `MOST`, and
times each request from the moment it was to be sent: a server that stalls is not asked less.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MOST = 1000  # connections
SCRIPT = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
{headers}
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
"""


def peak(
    url: str, headers: dict[str, str], body: Path, seconds: float, connections: int = 64
) -> dict[str, float]:
    """Requests a second that connections get answered, one thread of wrk on the last core."""
    lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items())
    script = body.with_suffix(".lua")
    script.write_text(SCRIPT.format(headers=lines, body=body))
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--timeout",
        "10s",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(
        [*pinned(last=True), *command], check=True, capture_output=True, text=True
    ).stdout
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    total = int(re.search(r"(\d+) requests in", text)[1])
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = (int(bad[1]) if bad else 0) + (sum(map(int, lost.groups())) if lost else 0)
    return {"rps": rate * (total - failed) / max(1, total), "failed": failed}


def fixed(
    url: str, headers: dict[str, str], body: Path, rate: float, seconds: float
) -> dict[str, Any]:
    """What `main` prints, from a process of its own on the last core."""
    command = [
        sys.executable,
        __file__,
        url,
        str(rate),
        str(seconds),
        json.dumps(headers),
        str(body),
    ]
    return json.loads(
        subprocess.run(
            [*pinned(last=True), *command], check=True, capture_output=True, text=True
        ).stdout
    )


def pinned(*, last: bool) -> list[str]:
    """The start of a command that runs on the last core, or on all the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return []
    chosen = cores[-1:] if last else cores[:-1]
    return ["taskset", "-c", ",".join(map(str, chosen))]


class Connection:
    """One at a time; opened again when it was closed."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> int:
        """The status; 0 when there was no answer."""
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(*self._where)
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.I)
            if length is None:
                raise ConnectionError("no length")
            await self._reader.readexactly(int(length[1]))
            if b"connection: close" in head.lower():
                self.close()
            return int(head[9:12])
        except (OSError, asyncio.IncompleteReadError, ConnectionError):
            self.close()
            return 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


async def send(url: str, headers: dict[str, str], body: bytes, rate: float, seconds: float) -> Any:
    parts = urlsplit(url)
    lines = {"host": parts.netloc, "content-type": "application/json", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    request = f"POST {parts.path} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode()
    free: list[Connection] = []
    room = asyncio.Semaphore(MOST)
    times, statuses = [], Counter()

    async def one(at: float) -> None:
        async with room:
            connection = free.pop() if free else Connection(parts.hostname, parts.port)
            status = await connection.ask(request + body)
            free.append(connection)
        statuses[status] += 1
        if status == 200:
            times.append(time.perf_counter() - at)

    tasks, start = set(), time.perf_counter()
    for number in range(int(rate * seconds)):
        at = start + number / rate
        if (left := at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        task = asyncio.create_task(one(at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.wait(tasks, timeout=60)
    took = time.perf_counter() - start
    times.sort()
    good = statuses[200]
    return {
        "sent": int(rate * seconds),
        "good": good,
        "good_per_s": good / took,
        "statuses": dict(statuses),
        "p50_ms": times[good // 2] * 1000 if good else None,
        "p99_ms": times[int(good * 0.99)] * 1000 if good else None,
    }


if __name__ == "__main__":
    url, rate, seconds, headers, body = sys.argv[1:]
    found = send(url, json.loads(headers), Path(body).read_bytes(), float(rate), float(seconds))
    print(json.dumps(asyncio.run(found)))
