"""torch.profiler over a few steps of one replica (``train.profile``)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP = 5, 2  # steps before the recorded ones, which allocate and compile


class Profiler:
    """Records ``steps`` steps and reports one ``profile`` event: a Chrome trace and its table.

    Call `step` after every step and `stop` at the end of training.
    """

    def __init__(
        self, steps: int, device: torch.device, report: Callable[[dict[str, Any]], None]
    ) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._report = report
        self._left = WAIT + WARM_UP + steps
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._ready,
        )
        self._profile.start()

    def step(self) -> None:
        """One step is done."""
        if self._left > 0:
            self._left -= 1
            self._profile.step()
            if self._left == 0:
                self._profile.stop()

    def stop(self) -> None:
        """Training is over; report what there is."""
        if self._left > 0:
            self._left = 0
            self._profile.stop()

    def _ready(self, done: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"  # the ending makes torch compress it
            done.export_chrome_trace(str(path))
            self._report(
                {
                    "kind": "profile",
                    "trace": path.read_bytes(),
                    "table": done.key_averages().table(sort_by="self_cpu_time_total", row_limit=20),
                }
            )
