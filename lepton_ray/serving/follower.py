"""What a reference names now, for the replicas of an endpoint; and what they know of each other.

One actor asks the registry and reads the file of keys; replicas ask the actor, and get a version's
files as bytes, so that they need neither MLflow nor a file system in common. When they ask, they
tell what they have counted (see `metrics`). It also decides what becomes of a canary.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from lepton_ray.data.drift import Bins
from lepton_ray.errors import ServingError
from lepton_ray.priority import look_after
from lepton_ray.serving import drift, keys, manifest, metrics, ports
from lepton_ray.serving.board import Board
from lepton_ray.serving.drift import Drifts, Seen
from lepton_ray.serving.files import Files, read_files
from lepton_ray.serving.keys import Key
from lepton_ray.serving.metrics import Snapshot
from lepton_ray.serving.told import Present, Told
from lepton_ray.tracking import endpoints, registry
from lepton_ray.tracking.canary import Canary, Tally, add, decide
from lepton_ray.tracking.endpoints import Report, Tried

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at the registry
# Between two reports into it; a crash loses what was counted of a canary since the last.
REPORT_S, REPORT_CANARY_S = 10.0, 4.0
UNREAD_S = 60.0  # in which the files of a canary may come back
UNREADABLE = "the files of version {} cannot be read, see the log"
DRIFTS = 8  # columns of a version that are reported, the furthest


@dataclass(frozen=True)
class KeySource:
    """Where an endpoint's keys are."""

    path: Path
    extra: tuple[Key, ...] = ()
    """Accepted besides those of the file."""

    def read(self) -> tuple[Key, ...]:
        """
        Raises:
            ServingError: when the file cannot be used.
        """
        return (*keys.read(self.path), *self.extra)


@dataclass(frozen=True)
class About:
    """An endpoint on this cluster."""

    id: str
    reference: str
    url: str
    guarded: bool
    """Whether requests need a key."""
    age_s: float
    answers: str
    """With which versions, and what is wrong, in words; "" before it knows."""


class Follower:
    """Follows ``name@alias``; ``name/version`` never changes.

    It goes on when the command that started it has gone, and after a crash: all that it must know
    then is in the registry.

    Args:
        endpoint: an id, under which it reports.
        key_source: None where no keys are needed.
    """

    def __init__(
        self, reference: str, endpoint: str, url: str, key_source: KeySource | None = None
    ) -> None:
        look_after()
        self._reference = reference
        self._name = registry.name_of(reference)
        self._endpoint = endpoint
        self._url = url
        self._key_source = key_source
        self._keys: tuple[Key, ...] = ()
        self._key_problem = ""
        self._look_problem = ""
        self._board = Board()
        self._started_s = time.monotonic()
        self._version = 0
        self._tried = Tried()
        self._files: dict[int, ray.ObjectRef[Files]] = {}
        self._attempt = ""
        self._tally: Tally = {}
        self._refused: dict[int, str] = {}
        self._unread: dict[int, float] = {}  # version -> since when its files cannot be read
        self._bins: dict[int, dict[str, Bins]] = {}
        self._seen: Seen = {}
        self._decision = ""
        self._report_s: float | None = None  # when to report again; from the first replica on
        self._looked: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    async def present(self, replica: str, told: Told) -> Present:
        """What is so now, for a replica that tells what it has counted.

        Raises:
            LeptonRayError: when the registry cannot be read at the first look.
        """
        await self.begin()
        now_s = time.monotonic()
        self._board.note(replica, told.counted, now_s)
        if self._report_s is None:  # now there is an endpoint to tell of
            self._report_s = now_s
            await self._tell()
        if told.attempt == self._attempt:
            self._tally = add([self._tally, told.tally])
        # What a replica refused before it knew what is so now is over.
        self._refused |= {v: text for v, text in told.refused.items() if v in self._files}
        drift.add(self._seen, {v: s for v, s in told.seen.items() if v in self._bins})
        return Present(
            self._version,
            self._tried.canary,
            self._tried.shadow,
            dict(self._files),
            self._keys,
            self._board.replicas(now_s),
            "; ".join(self._problems()),
            self._state(),
        )

    async def about(self) -> About:
        """What it follows, for whoever would start another."""
        guarded = self._key_source is not None
        age_s = time.monotonic() - self._started_s
        return About(self._endpoint, self._reference, self._url, guarded, age_s, self._answers())

    async def admit(self, key: Key) -> None:
        """Accept one key more, until it is dismissed or this process ends."""
        assert self._key_source is not None
        extra = (*self._key_source.extra, key)
        self._key_source = dataclasses.replace(self._key_source, extra=extra)
        self._read_keys()

    async def dismiss(self, key: Key) -> None:
        """The end of `admit`."""
        assert self._key_source is not None
        extra = tuple(k for k in self._key_source.extra if k.id != key.id)
        self._key_source = dataclasses.replace(self._key_source, extra=extra)
        self._read_keys()

    async def totals(self, replica: str, counted: Snapshot) -> Snapshot:
        """What all replicas have counted; the one that asks tells its own first."""
        now_s = time.monotonic()
        self._board.note(replica, counted, now_s)
        tried, drifts = metrics.of_tally(self._tally), metrics.of_drifts(self._drifts())
        return {**self._board.totals(now_s), **tried, **drifts}

    async def begin(self) -> None:
        """Look once, then go on looking; at the first call, or a restart's.

        Raises:
            LeptonRayError: when the registry cannot be read.
        """
        if self._following is not None:
            return
        if self._looked is None or (self._looked.done() and self._looked.exception()):
            self._looked = asyncio.create_task(self._look())
        await self._looked
        self._following = self._following or asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
                self._look_problem = ""
            except Exception as error:  # a registry and a store raise what they like
                # It may be back next time. What went wrong names files: it is for the log.
                logger.warning("cannot follow %s: %s", self._reference, error)
                kind = type(error).__name__
                self._look_problem = f"the registry cannot be followed, see the log: {kind}"

    async def _look(self) -> None:
        self._read_keys()
        version, tried, files, tags = await asyncio.to_thread(self._find)
        attempt = tried.canary.id if tried.canary else ""
        if attempt != self._attempt:
            self._refused, self._decision = {}, ""
            self._tally = await asyncio.to_thread(self._tally_before, attempt)
        self._version, self._tried, self._files = version, tried, files
        self._refused = {v: text for v, text in self._refused.items() if v in files}
        self._bins = {v: bins for v, bins in self._bins.items() if v in files}
        self._seen = {v: seen for v, seen in self._seen.items() if v in files}
        self._attempt = attempt
        if tried.canary is not None:
            await self._decide(tried.canary)
        if self._report_s is not None and time.monotonic() >= self._report_s:
            await asyncio.to_thread(endpoints.forget, self._name, tags, time.time())
            await self._tell()

    async def _tell(self) -> None:
        await asyncio.to_thread(endpoints.report, self._name, self._report())
        every_s = REPORT_CANARY_S if self._attempt else REPORT_S
        self._report_s = time.monotonic() + every_s

    def _find(self) -> tuple[int, Tried, dict[int, ray.ObjectRef[Files]], dict[str, str]]:
        """What the registry says: the version, what is tried, the files of all of them, and the
        model's tags. By one question: each takes milliseconds of a processor that replicas may
        share."""
        name, at, alias = self._reference.partition("@")
        if at:
            model = registry.model(name)
            found = model.aliases.get(alias) or registry.resolve(self._reference).version
        else:
            model = registry.Model({}, {})
            found = self._version or registry.resolve(self._reference).version
        tried = endpoints.tried_in(model.tags) if alias == "champion" else Tried()
        canary = tried.canary.version if tried.canary else None
        files: dict[int, ray.ObjectRef[Files]] = {}
        unread: dict[int, float] = {}
        for version in (found, canary, tried.shadow):
            if version is None or version in files:
                continue
            try:
                files[version] = self._files.get(version) or self._read(version)
            except Exception as error:
                if version == found:
                    raise
                logger.warning("the files of version %s cannot be read: %s", version, error)
                unread[version] = self._unread.get(version, time.monotonic())
        self._unread = unread
        return found, tried, files, model.tags

    def _read(self, version: int) -> ray.ObjectRef[Files]:
        content = read_files(registry.resolve(f"{self._name}/{version}").folder())
        self._bins[version] = drift.read(json.loads(content[manifest.NAME]))
        return ray.put(content)

    def _tally_before(self, attempt: str) -> Tally:
        """What was counted before this process was there."""
        for report in endpoints.reports(self._name):
            if report.id == self._endpoint and attempt and report.canary == attempt:
                return report.tally
        return {}

    async def _decide(self, canary: Canary) -> None:
        refused = self._refused.get(canary.version, "")
        unread_s = time.monotonic() - self._unread.get(canary.version, math.inf)
        if unread_s > UNREAD_S:
            refused = UNREADABLE.format(canary.version)
        decision = decide(
            canary,
            self._tally,
            self._version,
            time.time(),
            refused,
            self._drifts().get(canary.version, {}),
        )
        self._decision = decision.reason
        if decision.what == "wait":
            return
        # With what it was decided on, for whoever asks later.
        await asyncio.to_thread(endpoints.report, self._name, self._report())
        if await asyncio.to_thread(endpoints.end_canary, self._name, canary, decision):
            text = "canary %s/%s: %s, %s"
            logger.warning(text, self._name, canary.version, decision.what, decision.reason)

    def _read_keys(self) -> None:
        if self._key_source is None:
            return
        try:
            self._keys, self._key_problem = self._key_source.read(), ""
        except ServingError as error:  # whom it lets in is not known, so it lets in nobody
            logger.warning("no key is accepted: %s", error)
            self._keys = ()
            self._key_problem = "the key file cannot be read: no key is accepted"

    def _report(self) -> Report:
        return Report(
            id=self._endpoint,
            url=self._url,
            reference=self._reference,
            version=self._version,
            replicas=self._board.replicas(time.monotonic()),
            seen_s=time.time(),
            canary=self._attempt,
            tally=self._tally,
            decision=self._decision,
            problem="; ".join([*self._problems(), *self._refused.values()]),
            ports=ports.opened(),
            drifts={v: dict(list(d.items())[:DRIFTS]) for v, d in self._drifts().items()},
        )

    def _problems(self) -> list[str]:
        unread = [UNREADABLE.format(version) for version in self._unread]
        return [text for text in (self._key_problem, self._look_problem, *unread) if text]

    def _answers(self) -> str:
        """ "" before it knows."""
        if not self._version:
            return ""
        canary, shadow = self._tried.canary, self._tried.shadow
        said = [f"version {self._version}"]
        if canary is not None:
            said.append(f"version {canary.version} for {canary.share:.0%} of callers")
        if shadow is not None:
            said.append(f"copies to version {shadow}")
        return "; ".join([", ".join(said), *self._problems(), *self._refused.values()])

    def _drifts(self) -> Drifts:
        return drift.compare(self._bins, self._seen)

    def _state(self) -> dict[str, Any]:
        canary, shadow = self._tried.canary, self._tried.shadow
        said: dict[str, Any] = {}
        if canary is not None:
            said["canary"] = {
                "version": canary.version,
                "share": canary.share,
                "instead_of": canary.instead_of,
                "decision": self._decision,
            }
        if shadow is not None:
            said["shadow"] = {"version": shadow}
        if said:
            said["versions"] = {str(v): c.summary() for v, c in sorted(self._tally.items())}
        if self._tried.last is not None:
            said["last"] = self._tried.last
        return said
