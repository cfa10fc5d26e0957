"""One trial: the training loop of a run, some epochs at a time, in a reused actor."""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.exceptions import RayActorError

from lepton_ray.config import validate, with_settings
from lepton_ray.data.dataset import Dataset
from lepton_ray.priority import give_way
from lepton_ray.training.checkpoint import CheckpointFolder, copy_last
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.membership import Fixed, LostPeerError
from lepton_ray.tuning.results import excesses
from lepton_ray.tuning.team import Team

TELL_S = 0.5  # the longest that a trial keeps finished epochs to itself
KEPT_LINES = 30  # of what a trial prints, for when it fails


class Measure(Protocol):
    """Measures a trained model beside what its epochs do, such as its latency."""

    def __call__(self, model: torch.nn.Module, dataset: Dataset) -> float: ...


class Trial(tune.Trainable):
    """Trains with the settings Tune gives. Ray keeps the actor for the next trial, so that one
    process start and one look at the data serve many trials.

    Epochs are told together up to the next one at which the study may stop the trial.
    """

    def setup(
        self,
        config: dict[str, Any],
        experiment: Any = None,
        dataset: Any = None,
        checkpoints: str = "",
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        give_way()
        self._experiment = validate(experiment)
        self._reference = dataset
        self._dataset: Dataset = ray.get(dataset[0])
        self._checkpoints = checkpoints
        self._measures = measures or {}
        self._team: Team | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial = dict(new_config)
        self._replica: Replica | None = None
        self._tail = Tail()
        self._seconds = 0.0
        return True

    def step(self) -> dict[str, Any]:
        """Some epochs. A trial that raises ends with its error; the actor serves the next one."""
        rows: list[dict[str, float]] = []
        result: dict[str, Any] = {"epochs": rows, "first": self._done_epochs + 1, "done": False}
        self._began = time.monotonic()
        try:
            with self._tail.keeping():
                self._run(rows, result)
        except RayActorError:
            raise  # a replica's process died: Tune tries the whole trial once more
        except Exception as error:
            if self._team and isinstance(error, LostPeerError):
                self._team.tell_death()
            self._disband()
            result |= {"error": traceback.format_exc() + self._tail.text(), "done": True}
        self._seconds += time.monotonic() - self._began
        return result | {"seconds": self._seconds}

    def cleanup(self) -> None:
        self._disband()

    @property
    def _done_epochs(self) -> int:
        return self._replica.epoch if self._replica is not None else 0

    def _run(self, rows: list[dict[str, float]], result: dict[str, Any]) -> None:
        began = time.monotonic()
        if self._replica is None:
            self._begin()
            assert self._replica is not None
            # What a checkpoint holds is told again: it may not have been heard.
            after, done = self._trial["after"], self._replica.state.history
            result["first"] = after + 1
            rows += done[after : -1 if self._replica.finished else None]
            measured = {"parameters": float(_parameters(self._replica))}
            settings = self._experiment.tune
            assert settings is not None
            if any(e > 0 for e in excesses(settings.constraints, measured).values()):
                result |= {"measured": list(measured.items()), "done": True}
                return
        replica = self._replica
        while True:
            waiting = self._team.epoch() if self._team and not replica.finished else []
            rows.append(next(self._epochs))
            ray.get(waiting)
            last = replica.finished
            if last or replica.epoch in self._trial["decide"]:
                break
            if time.monotonic() - began > TELL_S:
                break
        if last:
            for _ in self._epochs:  # to the end of the loop, which waits for the checkpoint
                pass
            result |= {"done": True, "finished": True, **self._result(replica)}

    def _begin(self) -> None:
        experiment = with_settings(self._experiment, self._trial["settings"])
        gpu = experiment.workers.gpus > 0
        device = torch.device("cuda" if gpu else "cpu")
        epochs, number = self._trial["epochs"], self._trial["trial"]
        folder = CheckpointFolder(f"{self._checkpoints}/{number:04d}", keep=1)
        if self._trial["parent"] is not None:
            copy_last(CheckpointFolder(f"{self._checkpoints}/{self._trial['parent']:04d}"), folder)
        membership = Fixed()
        waiting: list[Any] = []
        workers = self._experiment.tune.workers if self._experiment.tune else 1
        if workers > 1:
            if self._team is None:
                self._team = Team(
                    workers,
                    cpus=experiment.workers.cpus,
                    gpus=experiment.workers.gpus,
                    dataset=self._reference,
                )
            waiting = self._team.start(experiment, epochs)
            membership = Fixed(dist.group.WORLD, device=device)
        self._replica = Replica(
            experiment,
            self._dataset,
            device=device,
            membership=membership,
            checkpoints=folder,
            epochs=epochs,
        )
        ray.get(waiting)
        self._epochs: Iterator[dict[str, float]] = self._replica.epochs()

    def _result(self, replica: Replica) -> dict[str, Any]:
        """What the trial ends with: metrics of the weights it would give, and their digest."""
        state = replica.state
        weights = state.final_weights()
        best = state.history[state.best_epoch] if state.best is not None else state.history[-1]
        seconds = self._seconds + time.monotonic() - self._began
        measured = {"parameters": float(_parameters(replica)), "seconds": seconds}
        if self._measures:
            model = state.evaluated.cpu()
            model.load_state_dict(weights)
            measured |= {name: m(model, self._dataset) for name, m in self._measures.items()}
        # Pairs, because Tune pulls nested mappings apart.
        pairs = list({**best, **measured}.items())
        return {"measured": pairs, "weights_sha256": state_sha256(weights)}

    def _disband(self) -> None:
        if self._team is not None:
            self._team.close()
            self._team = None


def _parameters(replica: Replica) -> int:
    return sum(p.numel() for p in replica.state.model.parameters())


class Tail(io.TextIOBase):
    """The last lines of what is printed; all of it still goes where it went."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._to = sys.stdout

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        self._to = sys.stdout
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        self._lines += [line for line in text.splitlines() if line.strip()]
        return self._to.write(text)

    def text(self) -> str:
        """The end of an error text."""
        return (
            "\nlast lines of the trial's output:\n" + "\n".join(self._lines) if self._lines else ""
        )
