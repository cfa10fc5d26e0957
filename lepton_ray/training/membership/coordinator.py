"""The one process that knows which replicas are there, and says when a generation follows.

Replicas hold one connection each. A process that dies closes it, at once; one that hangs, or a node
that vanishes, stops to send beats. Connections prove that they know the run's secret (HMAC, by
`multiprocessing.connection`), carry JSON and never a pickle, and no gradients: those go from
replica to replica.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lepton_ray.training.membership import refusal
from lepton_ray.training.membership.generations import End, Generation, Standing, decide, held_up

BEAT_S = 0.5
HEARTBEAT_S = 2.0
"""Without a beat for this long a replica is taken for lost."""
STRAGGLER_S = 10.0
"""A replica that holds the others up for this long is reported."""
LEFT = "left"
HANDSHAKE_S = 5
MESSAGE_BYTES = 1 << 16


class Coordinator:
    """Serves the replicas of one run until `close`.

    Args:
        host: address of this machine that the replicas reach; nothing listens on another.
        secret: of the run.
        minimum: guaranteed replicas, see `generations.decide`.
        heartbeat_s: silence after which a replica is dropped.
        straggler_s: for how long one may hold the others up before it is reported.
        tell: called from other threads, one at a time, with what happened, as a plain dict.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        *,
        minimum: int,
        heartbeat_s: float = HEARTBEAT_S,
        straggler_s: float = STRAGGLER_S,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self._secret = secret
        self._minimum = minimum
        self._heartbeat_s = heartbeat_s
        self._straggler_s = straggler_s
        self._tell = tell
        self._lock = threading.Lock()
        self._there: dict[str, Standing] = {}
        self._connections: dict[str, Connection] = {}
        self._generation = 0
        self._ended = False
        self._closed = threading.Event()
        self._profile: dict[str, Any] | None = None
        self._listener = Listener((host, 0), family="AF_INET", backlog=128)
        self._store = _store(host)
        self.address: tuple[str, int, int] = (host, self._listener.address[1], self._store.port)
        """Host, port, and the port of the store over which process groups find each other."""
        threading.Thread(target=self._accept, name="coordinator", daemon=True).start()

    def connected(self) -> list[Standing]:
        """Who is there, in the order in which they came."""
        with self._lock:
            return list(self._there.values())

    def ask_to_leave(self, node: str) -> None:
        """Ask the live replicas of a node to leave at the next step boundary."""
        with self._lock:
            for standing in self._there.values():
                if standing.node == node and not standing.guaranteed and not standing.leaving:
                    standing.leaving = True
                    self._send(standing.id, {"kind": "leave"})

    def close(self) -> None:
        """Stop to serve; the replicas' connections end."""
        self._closed.set()
        self._listener.close()
        with self._lock:
            for connection in self._connections.values():
                _shut(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                if self._closed.wait(BEAT_S):
                    return
                continue  # one that gave up while it waited, or no more files to open just now
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """One replica, from its first message to its last."""
        name, reason = "", "lost"
        try:
            _limit_waiting(connection)
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            hello = json.loads(connection.recv_bytes(MESSAGE_BYTES))
            name = self._welcome(hello, connection)
            heard = time.monotonic()
            while name:
                if connection.poll(min(BEAT_S, self._heartbeat_s / 2)):
                    message = json.loads(connection.recv_bytes(MESSAGE_BYTES))
                    heard = time.monotonic()
                    if message["kind"] == "bye":
                        reason = LEFT
                        break
                    if message["kind"] == "arrive":
                        self._arrived(name, message)
                    else:
                        self._paced(name, message["shard_s"], heard)
                elif time.monotonic() - heard > self._heartbeat_s:
                    reason = f"silent for {self._heartbeat_s:g} s"
                    break
        except (EOFError, OSError, ValueError, AuthenticationError):
            pass  # gone, or not one of ours
        finally:
            if name:
                self._gone(name, connection, reason)
            connection.close()  # after nobody else finds it

    def _welcome(self, hello: dict[str, Any], connection: Connection) -> str:
        """Take a replica in; "" for one that may not train with the others, or whose place
        another has taken while it was away."""
        name = str(hello["id"])
        profile = hello["profile"]
        with self._lock:
            if profile is not None and self._profile is None:
                self._profile = profile
            reason = refusal(name, profile, self._profile) if profile and self._profile else ""
            if reason:
                connection.send_bytes(json.dumps({"kind": "refused", "reason": reason}).encode())
                self._tell({"kind": "refused", "reason": reason, "at": time.time()})
                return ""
            before = next((n for n in self._there if _place(n) == _place(name)), None)
            if before is not None and before != name:  # the machine of one of them was cut off
                if hello["again"]:
                    connection.send_bytes(json.dumps({"kind": "leave"}).encode())
                    return ""
                self._send(before, {"kind": "leave"})
                _shut(self._connections[before])
            if before is not None:  # its connection broke, which shows here later
                self._drop(before, "lost")
            self._there[name] = Standing(
                id=name, guaranteed=hello["guaranteed"], node=hello["node"]
            )
            self._connections[name] = connection
        return name

    def _arrived(self, name: str, message: dict[str, Any]) -> None:
        with self._lock:
            standing = self._there.get(name)
            if standing is None:
                return
            if self._ended:
                self._send(name, {"kind": "end"})
                return
            standing.arrived = True
            standing.progress = tuple(message["progress"]) if message["progress"] else None
            standing.done = message["done"]
            # Not every replica of a broken generation need see it: one may wait for another that
            # has given up already.
            kind = "change" if not standing.member else "lost" if message["broken"] else ""
            if kind:
                self._send_members(kind)
            self._follow()

    def _paced(self, name: str, shard_s: float | None, now_s: float) -> None:
        """Report one that holds the others up, once while it does."""
        with self._lock:
            standing = self._there.get(name)
            if standing is None:
                return
            standing.shard_s = shard_s
            others_s = held_up(list(self._there.values()), name)
            if others_s is None:
                standing.slow_since, standing.told_slow = None, False
                return
            standing.slow_since = standing.slow_since or now_s
            if now_s - standing.slow_since >= self._straggler_s and not standing.told_slow:
                standing.told_slow = True
                reason = (
                    f"{name} holds the others up: {shard_s:.3f} s for a shard, where they take "
                    f"{others_s:.3f} s"
                )
                self._tell({"kind": "straggler", "reason": reason, "at": time.time()})

    def _gone(self, name: str, connection: Connection, reason: str) -> None:
        with self._lock:
            if self._connections.get(name) is connection:  # else it has come back by another one
                self._drop(name, reason)

    def _drop(self, name: str, reason: str) -> None:
        """Go on without one. Under the lock."""
        standing = self._there.pop(name)
        del self._connections[name]
        if self._ended:
            return
        if standing.member and reason != LEFT:  # who leaves does so between two steps
            self._send_members("lost")
        if standing.member:
            self._event(f"{name} {reason}")
        self._follow()

    def _follow(self) -> None:
        """Form the next generation if it is time. Under the lock."""
        following = decide(list(self._there.values()), self._minimum)
        if isinstance(following, End):
            self._ended = True
            for name in self._there:
                self._send(name, {"kind": "end"})
        elif following is not None:
            joined = [n for n in following.members if not self._there[n].member]
            if joined and self._generation:
                self._event(f"{', '.join(joined)} joined")
            self._publish(following)

    def _publish(self, following: Generation) -> None:
        self._generation += 1
        for standing in self._there.values():
            standing.member = standing.id in following.members
            standing.arrived = standing.arrived and not standing.member
        for rank, name in enumerate(following.members):
            message = {
                "kind": "generation",
                "generation": self._generation,
                "rank": rank,
                "size": len(following.members),
                "source": following.source,
                "behind": following.behind,
                "joining": following.joining,
                "restore": following.restore,
            }
            self._send(name, message)

    def _send_members(self, kind: str) -> None:
        """To those that train."""
        for standing in self._there.values():
            if standing.member and not standing.arrived:
                self._send(standing.id, {"kind": kind})

    def _send(self, name: str, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its own thread sees it go
            self._connections[name].send_bytes(json.dumps(message).encode())

    def _event(self, reason: str) -> None:
        self._tell({"kind": "resize", "reason": reason, "at": time.time()})


def _place(name: str) -> str:
    """Of a replica in its run; one process after the other has it."""
    return name.partition("@")[0]


def _shut(connection: Connection) -> None:
    """Its own thread closes it; a peer may have gone already."""
    with _socket_of(connection) as same, contextlib.suppress(OSError):
        same.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: Connection) -> socket.socket:
    """The same socket by another descriptor."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _limit_waiting(connection: Connection) -> None:
    """A peer that is silent in the middle of a message, or reads none, holds nobody up for long."""
    limit = struct.pack("ll", int(HANDSHAKE_S), 0)
    with _socket_of(connection) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _store(host: str) -> TCPStore:
    """A store that listens on one address; TCPStore's own choice is all of them."""
    listening = socket.socket()
    listening.bind((host, 0))
    listening.listen()
    port = listening.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
