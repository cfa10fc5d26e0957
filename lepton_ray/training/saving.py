"""When replica 0 saves, and how: beside the training, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lepton_ray.config.schema import Checkpoint
from lepton_ray.errors import CheckpointError
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.state import TrainState

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves in a thread of its own, one checkpoint at a time, so that steps do not wait.

    A failed save (a full disk) is reported and stops nothing.
    """

    def __init__(self, folder: CheckpointFolder, report: Callable[[dict[str, Any]], None]) -> None:
        self._folder = folder
        self._report = report
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Start to save copies that the caller no longer changes; waits for the one before."""
        self.wait()

        def write() -> None:
            try:
                saved = self._folder.save(step, tensors, values)
                self._report({"kind": "checkpoint", "step": step, "bytes": saved.bytes})
            except CheckpointError as error:
                logger.warning("%s", error)
                self._report({"kind": "checkpoint_failed", "step": step, "error": str(error)})

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save in flight is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class Saver:
    """Saves a state when it is time.

    Args:
        profile: the numerics, which a checkpoint carries.
        saved: step and epoch of the state that is saved already; None when that is not known.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        report: Callable[[dict[str, Any]], None],
        limits: Checkpoint,
        profile: dict[str, Any],
        saved: tuple[int, int] | None,
    ) -> None:
        self._checkpointer = Checkpointer(folder, report)
        self._limits = limits
        self._profile = profile
        self._saved = saved
        self._saved_at = time.monotonic()

    def after_step(self, state: TrainState) -> None:
        """Save it if it is time; training goes on meanwhile."""
        lasting = self._limits.keep_every is not None and state.step % self._limits.keep_every == 0
        if lasting or (self._due(state) and not self._checkpointer.busy):
            self._save(state)

    def save(self, state: TrainState) -> None:
        """Save it, if it is not yet, and wait for that."""
        if self._saved != (state.step, len(state.history)):
            self._save(state)
        self._checkpointer.wait()

    def wait(self) -> None:
        """Until the save in flight is done."""
        self._checkpointer.wait()

    def _due(self, state: TrainState) -> bool:
        if self._saved is None or time.monotonic() - self._saved_at >= self._limits.every_s:
            return True
        every = self._limits.every_steps
        return every is not None and state.step - self._saved[0] >= every

    def _save(self, state: TrainState) -> None:
        tensors, values = state.dump()
        values["profile"] = self._profile
        self._checkpointer.save(state.step, tensors, values)
        self._saved = (state.step, len(state.history))
        self._saved_at = time.monotonic()
