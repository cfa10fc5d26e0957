"""The folder of one run: what was asked, which stages are done, and what each gave.

``run.json`` is written aside and renamed after every stage, so that a killed run can go on.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lepton_ray.config import load, render
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import InputError, StoreError

STATE = "run.json"
EXPERIMENT = "experiment.yaml"


class RunFolder:
    """``storage/NAME/ID``. Make one with `create` or `find_unfinished`."""

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.path = path
        self._state = state

    @staticmethod
    def create(experiment: Experiment, command: str) -> RunFolder:
        """A new folder with the experiment as it runs.

        Raises:
            StoreError: when the storage cannot be written.
        """
        run_id = time.strftime("%Y%m%d-%H%M%S")
        parent = Path(experiment.storage) / experiment.name
        path = parent / run_id
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(2, 100):  # two runs may start within a second
                if not path.exists():
                    break
                path = parent / f"{run_id}-{attempt}"
            path.mkdir()
            (path / EXPERIMENT).write_text(render(experiment))
        except OSError as error:
            raise StoreError(
                f"storage {experiment.storage!r} cannot be written: {error}; set storage"
            ) from error
        folder = RunFolder(path, {"command": command, "stages": {}, "status": "running"})
        folder._write()
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run.

        Raises:
            InputError: when there is none.
        """
        try:
            return RunFolder(path, json.loads((path / STATE).read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not the folder of a run: {error}") from error

    @staticmethod
    def find_unfinished(experiment: Experiment, command: str) -> RunFolder:
        """The last run of this experiment and command that did not finish.

        Raises:
            InputError: when there is none, or the experiment has changed since.
        """
        parent = Path(experiment.storage) / experiment.name
        found = []
        for state_file in sorted(parent.glob(f"*/{STATE}")):
            state = json.loads(state_file.read_text())
            if state["command"] == command and state["status"] != "finished":
                found.append(RunFolder(state_file.parent, state))
        if not found:
            raise InputError(
                f"nothing to resume: no unfinished '{command}' of {experiment.name!r} in {parent}"
            )
        last = found[-1]
        if load(last.path / EXPERIMENT) != experiment:
            raise InputError(
                f"the experiment has changed since the run in {last.path}: resume with the file "
                f"{last.path / EXPERIMENT}, or start anew without --resume"
            )
        return last

    @property
    def id(self) -> str:
        return self.path.name

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a finished stage gave; None when it is not done."""
        value: dict[str, Any] | None = self._state["stages"].get(name)
        return value

    def finish_stage(self, name: str, value: dict[str, Any]) -> None:
        self._state["stages"][name] = value
        self._write()

    def remember(self, name: str, value: Any) -> None:
        """Keep a value for a resume, such as the id of an MLflow run."""
        self._state[name] = value
        self._write()

    def recall(self, name: str) -> Any:
        return self._state.get(name)

    def end(self, status: str) -> None:
        """``finished`` or ``failed``; only the first is not resumed."""
        self._state["status"] = status
        self._write()

    def _write(self) -> None:
        aside = self.path / f"{STATE}.tmp"
        aside.write_text(json.dumps(self._state, indent=1))
        os.replace(aside, self.path / STATE)
