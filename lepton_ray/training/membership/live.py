"""A replica's side of a membership that outlives its replicas: no process starts anew but the lost.

While a replica computes, a thread of its own sends beats and hears from the coordinator. A lost
replica shows in the next collective, by its closed sockets or by the coordinator's word; those
that remain arrive for the next generation with the state of the last whole step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from lepton_ray.errors import DivergenceError, TrainingError
from lepton_ray.training.membership import Entry, LeftError
from lepton_ray.training.membership.coordinator import BEAT_S
from lepton_ray.training.membership.generations import Progress
from lepton_ray.training.membership.peers import LOOK_S, LostPeerError, Peers

COLLECTIVE_TIMEOUT_S = 300.0
RECENT = 0.1  # weight of the last step in a replica's pace
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT}  # a network that may return


class Live:
    """See `Membership`.

    Args:
        address: of the `Coordinator`.
        secret: of the run.
        id: ``place@process``: of two processes with one place in the run, the newer one has it.
        guaranteed: part of Ray Train's group.
        host: address of this machine for gradients.
        node: name of the machine, by which it is asked to leave.
        should_leave: asked before every step, besides.
    """

    lasting = True

    def __init__(
        self,
        address: tuple[str, int, int],
        secret: bytes,
        *,
        id: str,
        guaranteed: bool,
        host: str,
        node: str = "",
        should_leave: Callable[[], bool] = lambda: False,
    ) -> None:
        self._address = address
        self._should_leave = should_leave
        self._secret = secret
        self._hello = {"id": id, "guaranteed": guaranteed, "node": node, "again": False}
        self._device = ProcessGroupGloo.create_device(hostname=host)
        self._store = TCPStore(address[0], address[2], is_master=False, wait_for_workers=False)
        self._connection: Connection | None = None
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._change = threading.Event()
        self._leave = threading.Event()
        self._before: Peers | None = None
        self._shard_s: float | None = None

    @property
    def leaving(self) -> bool:
        return self._leave.is_set() or self._should_leave()

    def change_wished(self) -> bool:
        # One that trains alone waits for nobody, and would not see that its connection is gone.
        return self._change.is_set() or self._lost.is_set() or self.leaving

    def note_pace(self, shard_s: float) -> None:
        before = shard_s if self._shard_s is None else self._shard_s
        self._shard_s = before + RECENT * (shard_s - before)

    def enter(
        self, profile: dict[str, Any] | None, progress: Progress | None, *, done: bool = False
    ) -> Entry | None:
        broken = self._before is not None and self._before.broken
        while True:
            if self._connection is None:
                self._connect(profile)
            assert self._connection is not None
            if self.leaving:
                self._say({"kind": "bye"})
                raise LeftError
            self._say({"kind": "arrive", "progress": progress, "done": done, "broken": broken})
            message = self._heard.get()
            match message["kind"]:
                case "refused":
                    raise DivergenceError(message["reason"])
                case "end":
                    if progress is None:
                        raise LeftError  # it came too late
                    return None
                case "closed":
                    self._connection = None
                case "generation":
                    try:
                        peers = self._form(message)
                    except LostPeerError:
                        broken = True
                        continue
                    if self._before is not None:
                        self._before.close()  # not sooner: others may still have read from it
                    self._before = peers
                    return Entry(
                        peers=peers,
                        source=message["source"],
                        behind=tuple(message["behind"]),
                        joining=tuple(message["joining"]),
                        restore=message["restore"],
                    )

    def _form(self, message: dict[str, Any]) -> Peers:
        """The process group of a generation.

        Raises:
            LostPeerError: when one of them went while it formed.
        """
        lost = self._lost
        rank, size = message["rank"], message["size"]
        if size == 1:
            return Peers()
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        options._devices = [self._device]
        store = PrefixStore(str(message["generation"]), self._store)
        made: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def make() -> None:
            try:
                made.put(ProcessGroupGloo(store, rank, size, options))
            except RuntimeError as error:
                made.put(error)

        threading.Thread(target=make, daemon=True).start()  # it waits for all, and cannot be told
        while True:
            try:
                group = made.get(timeout=LOOK_S)
            except queue.Empty:
                if lost.is_set():
                    raise LostPeerError("while the generation formed") from None
                continue
            if isinstance(group, Exception):
                raise LostPeerError(str(group))
            return Peers(group, lost=lost, joining=len(message["joining"]))

    def _connect(self, profile: dict[str, Any] | None) -> None:
        """Wait for the network if it is what fails: with the run, Ray ends this process too.

        Raises:
            LeftError: when it was asked to leave meanwhile.
            TrainingError: when its host says that nothing answers there: the run is over.
        """
        host, port, _ = self._address
        while True:
            try:
                connection = Client((host, port), family="AF_INET")
                answer_challenge(connection, self._secret)
                deliver_challenge(connection, self._secret)
                connection.send_bytes(json.dumps({**self._hello, "profile": profile}).encode())
                self._hello["again"] = True
                break
            except (OSError, EOFError) as error:
                if getattr(error, "errno", None) not in UNREACHABLE:
                    raise TrainingError(
                        f"the run's coordinator at {host}:{port} is gone: {error}"
                    ) from None
            if self.leaving:
                raise LeftError
            time.sleep(LOOK_S)
        self._connection = connection
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        beaten = 0.0
        try:
            while True:
                if time.monotonic() - beaten >= BEAT_S:
                    beat = {"kind": "beat", "shard_s": self._shard_s}
                    connection.send_bytes(json.dumps(beat).encode())
                    beaten = time.monotonic()
                if not connection.poll(BEAT_S / 2):
                    continue
                message = json.loads(connection.recv_bytes())
                match message["kind"]:
                    case "lost":
                        self._lost.set()
                    case "change":
                        self._change.set()
                    case "leave":
                        self._leave.set()
                    case "generation":
                        self._lost = threading.Event()
                        self._change.clear()
                        self._heard.put(message)
                    case _:
                        self._heard.put(message)
        except (OSError, EOFError):
            self._lost.set()
            self._heard.put({"kind": "closed"})

    def _say(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):  # the listening thread says so
            self._connection.send_bytes(json.dumps(message).encode())
