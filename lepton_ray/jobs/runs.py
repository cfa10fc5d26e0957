"""The folder of one run: what was asked, which stages are done, and what each gave.

``run.json`` is written whole after every stage, so that a killed run can go on. With ``storage`` on
another machine it lies there, beside the checkpoints, and the run can go on from anywhere; a copy
of it is here, for who looks on.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from lepton_ray import storage
from lepton_ray.config import flatten, loads, render
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import InputError, StoreError
from lepton_ray.jobs import mirror
from lepton_ray.tuning import space

STATE = "run.json"
EXPERIMENT = "experiment.yaml"


class RunFolder:
    """``storage/NAME/ID``. Make one with `create`, `open` or `find_unfinished`.

    Attributes:
        uri: where the state and the checkpoints are.
        path: the folder on this machine for all other files; the same unless ``storage`` is a URI.
    """

    def __init__(self, uri: str, path: Path, state: dict[str, Any]) -> None:
        self.uri = uri
        self.path = path
        self._state = state
        self._fs, self._root = storage.open_folder(uri, patient=True)

    @staticmethod
    def create(experiment: Experiment, command: str) -> RunFolder:
        """A new folder with the experiment as it runs.

        Raises:
            StoreError: when the storage cannot be written.
        """
        run_id = time.strftime("%Y%m%d-%H%M%S")
        parent = f"{experiment.storage}/{experiment.name}"
        state = {"command": command, "stages": {}, "status": "running"}
        filesystem, root = storage.open_folder(parent)
        try:
            name = run_id
            for attempt in range(2, 100):  # two runs may start within a second
                info = filesystem.get_file_info(f"{root}/{name}")
                if info.type == pafs.FileType.NotFound:
                    break
                name = f"{run_id}-{attempt}"
            filesystem.create_dir(f"{root}/{name}", recursive=True)
            path = local_root(experiment.storage) / experiment.name / name
            path.mkdir(parents=True, exist_ok=True)
            (path / EXPERIMENT).write_text(render(experiment))
            folder = RunFolder(f"{parent}/{name}", path, state)
            storage.write(folder._fs, f"{folder._root}/{EXPERIMENT}", render(experiment).encode())
            folder._write()
        except OSError as error:
            raise StoreError(
                f"storage {experiment.storage!r} cannot be written: {error}; set storage"
            ) from error
        return folder

    @staticmethod
    def open(folder: str, path: Path | None = None) -> RunFolder:
        """An existing run.

        Args:
            folder: a local folder or a URI.
            path: for a URI, the run's other files.

        Raises:
            InputError: when there is none.
        """
        filesystem, root = storage.open_folder(folder)
        try:
            state = json.loads(storage.read(filesystem, f"{root}/{STATE}"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is not the folder of a run: {error}") from error
        return RunFolder(folder, path or Path(folder), state)

    @staticmethod
    def find_unfinished(experiment: Experiment, command: str) -> RunFolder:
        """The last run of this experiment and command that did not finish.

        Raises:
            InputError: when there is none, or the experiment has changed since.
            StoreError: when the storage cannot be read.
        """
        found = [
            folder
            for folder in RunFolder.all_of(experiment.storage, experiment.name)
            if folder.command == command and folder._state["status"] != "finished"
        ]
        if not found:
            raise InputError(
                f"nothing to resume: no unfinished '{command}' of {experiment.name!r} in "
                f"{experiment.storage}/{experiment.name}"
            )
        last = found[-1]
        changed = differences(experiment, last.experiment())
        if changed:
            raise InputError(
                f"the experiment has changed since the run in {last.uri} ({'; '.join(changed)}): "
                f"resume with the file {last.uri}/{EXPERIMENT}, or start anew without --resume"
            )
        last.settle()
        return last

    @staticmethod
    def all_of(place: str, name: str) -> list[RunFolder]:
        """All runs of an experiment, oldest first.

        Args:
            place: its ``storage``.

        Raises:
            StoreError: when that cannot be read.
        """
        parent = f"{place}/{name}"
        filesystem, root = storage.open_folder(parent)
        try:
            entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        except OSError as error:
            raise StoreError(f"storage {place!r} cannot be read: {error}") from error
        found = []
        for run in sorted(e.base_name for e in entries if e.type == pafs.FileType.Directory):
            state_file = filesystem.get_file_info(f"{root}/{run}/{STATE}")
            if state_file.type == pafs.FileType.File:
                found.append(RunFolder.open(f"{parent}/{run}", local_root(place) / name / run))
        return found

    def experiment(self) -> Experiment:
        """The experiment as it runs, without what its study found."""
        content = storage.read(self._fs, f"{self._root}/{EXPERIMENT}")
        return loads(content.decode(), EXPERIMENT)

    def settle(self) -> None:
        """Have the run's folder on this machine, which may be another than before."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.fetch(EXPERIMENT)
        self._write()

    def fetch(self, file: str) -> None:
        """Have a file of the run on this machine that lies with its state, unless what is here is
        as long.

        Raises:
            StoreError: when the storage cannot be read.
        """
        if storage.is_uri(self.uri):
            try:
                mirror.fetch(self._fs, f"{self._root}/{file}", self.path / file)
            except OSError as error:
                raise StoreError(f"{self.uri}/{file} cannot be read: {error}") from error

    def mirrored(self, file: str) -> contextlib.AbstractContextManager[Any]:
        """Within the block a growing file of the run is copied to where its state is, so that the
        run can go on elsewhere. It begins with what is there.

        Raises:
            StoreError: when the storage cannot be read.
        """
        if not storage.is_uri(self.uri):
            return contextlib.nullcontext()
        self.fetch(file)
        return mirror.Mirror(self._fs, f"{self._root}/{file}", self.path / file)

    @property
    def checkpoints(self) -> str:
        """Folder or URI of the run's checkpoints."""
        return f"{self.uri}/checkpoints"

    @property
    def command(self) -> str:
        """``run``, ``tune`` or ``train``."""
        return str(self._state["command"])

    @property
    def id(self) -> str:
        return self.path.name

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a finished stage gave; None when it is not done."""
        value: dict[str, Any] | None = self._state["stages"].get(name)
        return value

    def reopen_stage(self, name: str) -> None:
        """Have a finished stage done again."""
        self._state["stages"].pop(name, None)
        self.end("running")

    def finish_stage(self, name: str, value: dict[str, Any]) -> None:
        self._state["stages"][name] = value
        self._write()

    def remember(self, name: str, value: Any) -> None:
        """Keep a value for a resume, such as the id of an MLflow run."""
        self._state[name] = value
        self._write()

    def recall(self, name: str) -> Any:
        return self._state.get(name)

    def is_of_data(self, digest: str) -> None:
        """Keep the digest of the data, of which a run has one from its beginning to its end.

        Raises:
            InputError: when it began on others.
        """
        before = self.recall("data_digest")
        if before not in (None, digest):
            raise InputError(
                f"the data have changed since {self.uri} began (digest {before[:12]}, now "
                f"{digest[:12]}), and a run is of one data set: begin another, without --resume or "
                "--add-trials"
            )
        self.remember("data_digest", digest)

    def end(self, status: str) -> None:
        """``finished`` or ``failed``; only the first is not resumed."""
        self._state["status"] = status
        self._write()

    def _write(self) -> None:
        content = json.dumps(self._state, indent=1).encode()
        storage.write(self._fs, f"{self._root}/{STATE}", content)
        if storage.is_uri(self.uri) and self.path.is_dir():
            storage.write(pafs.LocalFileSystem(), str(self.path / STATE), content)


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """How two experiments differ, a text for each setting; of their search spaces too."""
    flat = [flatten(e.model_dump(mode="json", exclude={"tune": {"space"}})) for e in (ours, theirs)]
    found = [
        f"{path} is {flat[0].get(path)!r} now and was {flat[1].get(path)!r}"
        for path in sorted({*flat[0], *flat[1]})
        if flat[0].get(path) != flat[1].get(path)
    ]
    if ours.tune is not None and theirs.tune is not None:
        found += space.differences(ours.tune.space, theirs.tune.space)
    return found


def local_root(folder: str) -> Path:
    """Where on this machine the files of runs go: ``storage`` itself unless that is a URI."""
    return Path("lepton_results") if storage.is_uri(folder) else Path(folder)
