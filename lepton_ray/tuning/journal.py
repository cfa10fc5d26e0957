"""The study on disk: one line for each decision, appended before anything follows from it.

Reading the lines again gives back the study: what each trial was given, what it reported, what was
decided on that, and how it ended. A driver that is killed goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lepton_ray.errors import StudyError

FILE = "trials.jsonl"

State = Literal["finished", "pruned", "failed"]
Kind = Literal["search", "confirm", "member"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """How a trial ended."""

    number: int
    params: dict[str, Any]
    """Dotted path -> value."""
    state: State
    values: list[float] = field(default_factory=list)
    """The study's first metric after each epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of the last epoch, and what the trial measured of itself."""
    seconds: float = 0.0
    error: str = ""
    reason: str = ""
    """Why it was stopped."""
    weights_sha256: str = ""
    feasible: bool = True
    """Within the study's constraints."""
    kind: Kind = "search"

    @property
    def id(self) -> str:
        return trial_id(self.number)


@dataclass(kw_only=True)
class TrialStart:
    """What a trial was given."""

    number: int
    params: dict[str, Any]
    kind: Kind = "search"
    parent: int | None = None
    """The trial whose checkpoint it goes on from (population based training)."""
    attrs: dict[str, Any] = field(default_factory=dict)
    """What the sampler keeps with the trial."""
    at: float = 0.0
    """Time of day, for who looks on."""

    @property
    def id(self) -> str:
        return trial_id(self.number)


@dataclass(frozen=True)
class Report:
    """One epoch of a trial, and what was decided on it."""

    epoch: int
    value: float
    stop: str
    """Why the trial was stopped; empty when it went on."""


@dataclass(frozen=True)
class Prior:
    """A trial of an earlier study."""

    params: dict[str, Any]
    value: float
    values: list[float]
    comparable: bool
    """On the same data and settings, so that its value counts; else only its settings are tried."""
    source: str


def trial_id(number: int) -> str:
    return f"{number:04d}"


class Journal:
    """All decisions of one study, in their order.

    Attributes:
        starts, reports: by the number of the trial.
        finished: trials that ended, whichever way, in the order in which they did.
        order: all reports as they came, for who judges by the order.
        seconds, usd: spent by processes before this one.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self.header: dict[str, Any] = {}
        self.starts: dict[int, TrialStart] = {}
        self.reports: dict[int, list[Report]] = {}
        self.order: list[tuple[int, Report]] = []
        self.finished: list[TrialRecord] = []
        self.ended: dict[int, TrialRecord] = {}
        self.priors: list[Prior] = []
        self.seconds = 0.0
        self.usd = 0.0
        self.closed = ""
        """Why the study ended; empty while it goes on."""
        self._before = (0.0, 0.0)
        self._since = (0.0, 0.0)
        if self._path.exists():
            for line in self._lines():
                self._apply(line)
        self.seconds, self.usd = self.spent

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds and USD, of all processes."""
        return self._before[0] + self._since[0], self._before[1] + self._since[1]

    @property
    def unfinished(self) -> dict[int, TrialStart]:
        """Trials that were started and have not ended, by number."""
        return {n: start for n, start in self.starts.items() if n not in self.ended}

    @property
    def age_s(self) -> float:
        """Seconds since the last line was written."""
        return time.time() - self._path.stat().st_mtime

    def open(self, header: dict[str, Any]) -> None:
        """Begin a study, or go on with one.

        Raises:
            StudyError: when the journal is of a study that searched something else.
        """
        if self.header:
            changed = [k for k in self.header if self.header[k] != header.get(k)]
            if changed:
                were = "; ".join(f"{k} was {self.header[k]}" for k in changed)
                raise StudyError(
                    f"{self._path} is the journal of a study with another {', '.join(changed)} "
                    f"({were}): go on with the same, or start anew without --resume"
                )
        self._append({"opened": True, **({} if self.header else {"study": header})})

    def close(self, reason: str) -> None:
        """The study is over; more trials open it again."""
        self._append({"closed": reason})

    def add_prior(self, prior: Prior) -> None:
        """A trial of an earlier study that this one learns from."""
        self._append({"prior": asdict(prior)}, sync=False)

    def start(self, start: TrialStart) -> None:
        """A trial is given out."""
        line = {k: v for k, v in asdict(start).items() if v not in (None, {})}
        self._append({"started": line | {"at": time.time()}}, sync=False)

    def report(self, number: int, report: Report, spent: tuple[float, float] = (0.0, 0.0)) -> None:
        """A trial reported an epoch, and it was decided whether it goes on.

        Args:
            spent: seconds and USD by this process so far.
        """
        line = {"reported": number, "epoch": report.epoch, "value": report.value}
        stop = {"stop": report.stop} if report.stop else {}
        self._append({**line, **stop, "spent": spent}, sync=False)

    def finish(self, record: TrialRecord, spent: tuple[float, float] = (0.0, 0.0)) -> None:
        """A trial ended, whichever way."""
        self._append({"ended": asdict(record), "spent": spent})

    def _append(self, line: dict[str, Any], *, sync: bool = True) -> None:
        """One line. What a failing machine loses of those not synced is decided the same again."""
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # or this line would be lost with the half-written one
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._apply(line)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for text in self._path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the last line of a process that was killed while it wrote
            yield line

    def _apply(self, line: dict[str, Any]) -> None:
        if "opened" in line:
            self._before, self._since = self.spent, (0.0, 0.0)
            self.closed = ""
        if "spent" in line:
            self._since = (line["spent"][0], line["spent"][1])
        if "study" in line:
            self.header = line["study"]
        elif "prior" in line:
            self.priors.append(Prior(**line["prior"]))
        elif "started" in line:
            start = TrialStart(**line["started"])
            self.starts[start.number] = start
            self.reports[start.number] = []
        elif "reported" in line:
            report = Report(line["epoch"], float(line["value"]), line.get("stop", ""))
            self.reports[line["reported"]].append(report)
            self.order.append((line["reported"], report))
        elif "ended" in line:
            record = TrialRecord(**line["ended"])
            self.finished.append(record)
            self.ended[record.number] = record
        elif "closed" in line:
            self.closed = line["closed"]
