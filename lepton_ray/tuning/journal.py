"""The study on disk: one line per started and finished trial, appended and synced.

What is read back after a crash is enough to go on: finished trials teach the searcher, started
ones are tried again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    id: str
    params: dict[str, Any]
    """Dotted path -> value."""
    state: State
    values: list[float] = field(default_factory=list)
    """The study's metric after each epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of the last epoch."""
    seconds: float = 0.0
    error: str = ""


class Journal:
    """The trials of one study."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "trials.jsonl"
        self.finished: list[TrialRecord] = []
        self.unfinished: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self._read()

    def start(self, trial_id: str, params: dict[str, Any]) -> None:
        """A trial was given out."""
        self.unfinished[trial_id] = params
        self._append({"started": trial_id, "params": params})

    def finish(self, record: TrialRecord) -> None:
        """A trial ended, whichever way."""
        self.unfinished.pop(record.id, None)
        self.finished.append(record)
        self._append({"ended": asdict(record)})

    def best(self, mode: str) -> TrialRecord | None:
        """The finished trial with the best last value; None when none finished."""
        sign = 1 if mode == "min" else -1
        complete = [r for r in self.finished if r.state == "finished"]
        return min(complete, key=lambda r: sign * r.values[-1], default=None)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # or this line would be lost with the half-written one
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        for text in self._path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the last line of a process that was killed while it wrote
            if "started" in line:
                self.unfinished[line["started"]] = line["params"]
            else:
                record = TrialRecord(**line["ended"])
                self.unfinished.pop(record.id, None)
                self.finished.append(record)
