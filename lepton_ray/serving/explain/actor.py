"""Explanations in a process of their own, so that they cannot slow predictions.

The replicas of an endpoint share an actor and call it themselves: a handle of a Serve deployment
takes milliseconds of a replica for each question, in which it does not predict.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from lepton_ray.errors import InputError
from lepton_ray.priority import give_way
from lepton_ray.serving.explain import answers
from lepton_ray.serving.files import Files, write_files
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import Columns

if TYPE_CHECKING:
    from lepton_ray.serving.explain.explainer import Explainer

WAITING = 16  # questions of a replica, beyond which one is sent away
LATER_S = 5.0  # after which whoever was sent away may come again
AGAIN_S = (0.1, 1.0, 3.0)  # to wait, where it has gone: its name is not free at once
REST_S = 0.2  # between two explanations, where they would hold predictions up
IDLE_S = 120.0  # without a question, after which the process goes
VERSIONS = 2  # that are kept open: with a canary two answer at a time


@dataclass(frozen=True)
class Question:
    """In one piece: Ray takes time for each argument of a call."""

    model: str
    version: int
    files: ray.ObjectRef[Files]
    """Of the version; within another object, so that Ray does not fetch them for each question."""
    columns: Columns
    method: str | None
    target: str | None
    gives_way: bool = False
    """The replica that asks predicts too: see `REST_S`."""


class Questions:
    """Those of one replica. Needs a running event loop.

    Args:
        name: of the endpoint, whose replicas share one actor.
        idle_s: without a question, after which the actor goes.
    """

    def __init__(self, name: str, idle_s: float = IDLE_S) -> None:
        self._name = f"{name}-explain"
        self._idle_s = idle_s
        self._actor: Any = None
        self._starting = asyncio.Lock()
        self._asked = 0

    async def ask(self, question: Question) -> str:
        """See `Explainer.explain`; starts the actor where there is none.

        Returns:
            See `answers.to_json`.

        Raises:
            InputError: see `Explainer.explain`.
            RefusedError: 429 when too many are waiting.
        """
        if self._asked > WAITING:
            text = "too many explanations are waiting: come again later"
            raise RefusedError(429, text, retry_after_s=LATER_S)
        self._asked += 1
        try:
            for pause_s in AGAIN_S:
                # It goes when it has nothing to do, and with the replica that started it.
                with contextlib.suppress(RayActorError):
                    return await self._call(question)
                await asyncio.sleep(pause_s)
            return await self._call(question)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        finally:
            self._asked -= 1

    async def _call(self, question: Question) -> str:
        # One at a time: Ray ends an actor with the first handle of the process that made it.
        async with self._starting:
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._start)
            actor = self._actor
        answer = actor.explain.remote(question)
        try:
            said: str = await answer
        except asyncio.CancelledError:  # nobody waits for it any more
            ray.cancel(answer)
            raise
        except RayActorError:
            if self._actor is actor:
                self._actor = None
            raise
        return said

    def _start(self) -> Any:
        """The actor, which ends at the latest with the replica that started it."""
        # No share of the processors: it lives from what predictions leave, and has always room.
        remote = ray.remote(Explaining).options(name=self._name, get_if_exists=True, num_cpus=0)
        return remote.remote(self._idle_s)


class Explaining:
    """The actor: holds the versions that it was asked about last."""

    def __init__(self, idle_s: float) -> None:
        import torch

        give_way()
        torch.set_num_threads(1)
        self._versions: dict[int, asyncio.Task[Explainer]] = {}
        self._asked = 0
        self._ended_s = 0.0  # the last explanation, by the monotonic clock
        self._idle_s = idle_s
        # From here on: a question may be taken back before it arrives.
        self._leaving = asyncio.get_running_loop().call_later(idle_s, _leave)
        # One thread: the work stays off the event loop, which takes questions.
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=_have_what_is_left)

    async def explain(self, question: Question) -> str:
        """See `Questions.ask`."""
        self._asked += 1
        self._leaving.cancel()
        loop = asyncio.get_running_loop()
        try:
            explainer = await self._explainer(question.version, question.files)
            return await loop.run_in_executor(self._thread, self._explain, explainer, question)
        finally:
            self._asked -= 1
            if not self._asked:
                self._leaving = loop.call_later(self._idle_s, _leave)

    def _explain(self, explainer: Explainer, asked: Question) -> str:
        """May rest before it.

        A replica reads each question and hands it on, whatever the priority here: 3 ms in which it
        does not predict. Short explanations that followed each other without a rest made the 99th
        percentile of predictions on two processors more than twice what it is alone.
        """
        if asked.gives_way:
            time.sleep(max(0.0, self._ended_s + REST_S - time.monotonic()))
        try:
            found = explainer.explain(asked.columns, asked.method, asked.target)
            return answers.to_json(asked.model, asked.version, found)
        finally:
            self._ended_s = time.monotonic()

    async def _explainer(self, version: int, files: ray.ObjectRef[Files]) -> Explainer:
        """Opened by whoever asks first."""
        if version not in self._versions:
            self._versions[version] = asyncio.create_task(self._open(files))
            for old in list(self._versions)[:-VERSIONS]:
                del self._versions[old]
        opening = self._versions[version]
        try:
            return await asyncio.shield(opening)  # the others need it if this one goes away
        except Exception:
            if self._versions.get(version) is opening:
                del self._versions[version]
            raise

    async def _open(self, files: ray.ObjectRef[Files]) -> Explainer:
        content = await files
        return await asyncio.get_running_loop().run_in_executor(self._thread, _load, content)


def _leave() -> None:
    ray.kill(ray.get_runtime_context().current_actor)


def _have_what_is_left() -> None:
    """What predicts has the processor first, also where Ray made it as nice as `give_way` makes the
    rest of this process: this thread has what is left."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _load(files: Files) -> Explainer:
    # Here, since replicas that predict load this module too, and do without torch.
    from lepton_ray.serving.explain.explainer import Explainer

    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        return Explainer.load(Path(folder))
