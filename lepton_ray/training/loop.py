"""What one replica does, from start or checkpoint to the last epoch.

The same loop runs in a worker of Ray Train, in a live replica, in a trial of a study and in a plain
process; what differs is given: the membership, where checkpoints go and who is told.

What a step or an epoch changes, it changes on every replica or on none: all that is exchanged comes
before the first change. So a replica that is lost costs the others the step they are in, at most.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.data.order import steps_per_epoch
from lepton_ray.errors import DataError, DivergenceError, TrainingError
from lepton_ray.training import allocator, determinism, digest, evaluation, exactness
from lepton_ray.training.batches import batches
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.joining import Arrival
from lepton_ray.training.membership import (
    DoubtError,
    Entry,
    Fixed,
    LostPeerError,
    Membership,
    OutvotedError,
    delivery,
)
from lepton_ray.training.metrics import direction
from lepton_ray.training.profiler import Profiler
from lepton_ray.training.saving import Saver
from lepton_ray.training.state import initial_state
from lepton_ray.training.step import TrainStep
from lepton_ray.training.tasks import task_of

Report = Callable[[dict[str, Any]], None]
PROGRESS_S = 0.5  # between two progress reports


def _silent(event: dict[str, Any]) -> None:
    """Nobody is told."""


class Replica:
    """One copy of the model in training.

    Args:
        membership: who trains together; a single replica by default.
        checkpoints: where to save and resume; None saves nothing.
        report: gets events as plain dicts, on replica 0 only.
        epochs: where to stop, if before ``train.epochs``; the schedule stays that of the whole run.

    Building one waits until it is part of a generation and holds its state, or the first part of it
    (see `joining`).
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        *,
        device: torch.device | None = None,
        membership: Membership | None = None,
        checkpoints: CheckpointFolder | None = None,
        epochs: int | None = None,
        report: Report | None = None,
    ) -> None:
        train = experiment.train
        self.experiment = experiment
        self.dataset = dataset
        self._epochs = min(epochs or train.epochs, train.epochs)
        self._task = task_of(dataset, train.class_weights)
        self.device = device or torch.device("cpu")
        self.profile = determinism.configure(train, self.device)
        allocator.keep_freed_memory()
        self._membership = membership or Fixed()
        self._tell = report or _silent
        self._report: Report = _silent  # until it is replica 0
        self._checkpoints = checkpoints
        self._saver: Saver | None = None
        self._profiler: Profiler | None = None
        self._has_state = False
        self._arrival: Arrival | None = None
        self._told_at = time.monotonic()
        self._stepped_at: float | None = None
        self.epoch_steps = steps_per_epoch(len(dataset.train), train.batch)
        if self.epoch_steps == 0:
            raise DataError(
                f"train.batch is {train.batch}, but the training split has only "
                f"{len(dataset.train)} samples: set a smaller batch"
            )
        self.total_steps = train.epochs * self.epoch_steps
        self._begin()
        self._join()

    def _begin(self) -> None:
        """A state from the seed, and the step over it."""
        self.state = initial_state(self.experiment, self.dataset, self.device)
        self._step = TrainStep(
            self.state,
            self.experiment.train,
            total_steps=self.total_steps,
            loss=self._task.loss,
            fetch=batches(self.experiment.train, self.dataset.train, self.device),
            device=self.device,
        )
        if self._membership.lasting:
            with exactness.naming_causes(self.experiment.name):
                self._step.rehearse()

    def _join(self, *, done: bool = False) -> bool:
        """Become part of the next generation; False when the run has ended instead."""
        profile = self.profile.to_json() if self.experiment.train.exact else None
        while True:
            progress = (self.state.step, self.epoch) if self._has_state else None
            entry = self._membership.enter(profile, progress, done=done)
            if entry is None:
                return False
            try:
                self._take_part(entry)
                return True
            except LostPeerError:
                self._part()
                if not self._membership.lasting:
                    raise

    def _take_part(self, entry: Entry) -> None:
        if self._arrival and not self._has_state:
            self._begin()  # what it holds is void
        self.peers = entry.peers
        if entry.restore and self.peers.rank == entry.source:
            self._restore()
        if entry.behind:
            is_source = self.peers.rank == entry.source
            tensors, values = self.state.view() if is_source else ({}, {})
            found = delivery.deliver(self.peers, tensors, values, entry.source, entry.behind)
            if self.peers.rank in entry.behind:
                self.state.load(*found)
        self._has_state = self.peers.rank not in entry.joining
        self._arrival = Arrival(self.state, entry) if entry.joining else None
        self._take_in()
        self._step.join(self.peers)
        if self.peers.rank == 0:
            self._take_charge(restored=entry.restore)
        else:
            self._report, self._saver, self._profiler = _silent, None, None
        self._pace = (time.monotonic(), self.state.step)
        self._first_step = True
        self._report(
            {
                "kind": "start",
                "step": self.state.step,
                "steps": self.total_steps,
                "replicas": self.peers.size,
                "pid": os.getpid(),
                "profile": self.profile.to_json(),
            }
        )

    def _take_in(self, *, to_the_end: bool = False) -> bool:
        """Bring those that join further; True when they now hold the whole state, and host shards
        from the step's next `TrainStep.join` on."""
        arrival = self._arrival
        if arrival is None or not arrival.go_on(to_the_end=to_the_end):
            return False
        self._arrival = None
        self._has_state = True
        self.peers.hosts = self.peers.size
        if arrival.parts > 1:
            told = {"step": self.state.step, "parts": arrival.parts, "hosts": self.peers.hosts}
            self._report({"kind": "joined", **told})
        return True

    def _part(self) -> None:
        """Let the generation go, so that those who still wait in it are told."""
        self._step.leave()
        self.peers.close()

    def _take_charge(self, *, restored: bool) -> None:
        """Replica 0 reports and saves; when it is lost, the next one is replica 0."""
        if self._report is self._tell and self._report is not _silent:
            return
        self._report = self._tell
        if self._checkpoints:
            self._saver = Saver(
                self._checkpoints,
                self._report,
                self.experiment.train.checkpoint,
                self.profile.to_json(),
                # What the one before has saved is not known here.
                (self.state.step, self.epoch) if restored else None,
            )
        if self.experiment.train.profile:
            self._profiler = Profiler(self.experiment.train.profile, self.device, self._report)
        # The one before may not have come to report all, or its driver not to write it down.
        self._report({"kind": "history", "epochs": self.state.history, "steps": self.epoch_steps})

    def _restore(self) -> None:
        """Go on from the last whole checkpoint, if there is one.

        Raises:
            DivergenceError: when it was made with other numerics.
        """
        found = self._checkpoints.load_last() if self._checkpoints else None
        if found is None:
            return
        differing = determinism.differences(self.profile.to_json(), found[1]["profile"])
        if differing and self.experiment.train.exact:
            raise DivergenceError(
                f"the checkpoint of step {found[1]['step']} was made with other numerics "
                f"({'; '.join(differing)}): resume on the same kind of machine, or set "
                "train.exact: false"
            )
        self.state.load(*found)

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train, one epoch at a time; yields what the epoch measured (on every replica)."""
        if self.finished:
            yield self.state.history[-1]
        while True:
            try:
                if self.finished:
                    self._take_in(to_the_end=True)
                    if self._saver:  # before others hear of the end, and end this process
                        self._saver.save(self.state)
                    if not self._join(done=True):
                        break
                elif self.state.step < (self.epoch + 1) * self.epoch_steps:
                    self.advance()
                else:
                    yield self._end_epoch()
            except LostPeerError:
                self._part()
                if not self._membership.lasting:
                    raise
                self._join()
        if self._profiler:
            self._profiler.stop()

    @property
    def epoch(self) -> int:
        """The epoch that is running, or the next one."""
        return len(self.state.history)

    @property
    def finished(self) -> bool:
        """All epochs are done, or no better one came for ``early_stop.patience`` epochs."""
        stop = self.experiment.train.early_stop
        waited = self.epoch - 1 - self.state.best_epoch
        stopped = stop is not None and self.state.best_epoch >= 0 and waited >= stop.patience
        return stopped or self.epoch >= self._epochs

    def _end_epoch(self) -> dict[str, float]:
        """Measure the epoch, and count it."""
        metrics = self.measure()
        if not math.isfinite(metrics["train_loss"]):
            raise TrainingError(
                f"the loss is {metrics['train_loss']} at step {self.state.step}: training "
                "diverged; lower train.optimizer.lr or set train.clip"
            )
        self.state.history.append(metrics)
        self._keep_best(metrics)
        told = {"epoch": self.epoch, "step": self.state.step, "metrics": metrics}
        self._report({"kind": "epoch", **told})
        self._pace = (time.monotonic(), self.state.step)
        return metrics

    def advance(self) -> None:
        """One step and what follows it: digest, checkpoint, a change of the generation."""
        began, waited = time.monotonic(), self.peers.waited_s
        # Others that come wait until those that join have; one that leaves may have no time to.
        membership = self._membership
        wish = membership.leaving if self._arrival else membership.change_wished()
        with exactness.naming_causes(self.experiment.name):
            self._step.run(wish=wish)
        if self._step.hosted:
            own_s = time.monotonic() - began - (self.peers.waited_s - waited)
            membership.note_pace(own_s / self._step.hosted)
        if self._profiler:
            self._profiler.step()
        now = time.monotonic()
        if self._first_step:
            self._first_step = False
            stood = None if self._stepped_at is None else now - self._stepped_at
            self._report({"kind": "first_step", "step": self.state.step, "stood_still_s": stood})
        self._stepped_at = now
        train = self.experiment.train
        if self.state.step % train.digest_every == 0 or self.state.step == self.total_steps:
            self._link_digest()
        if self._saver:
            self._saver.after_step(self.state)
        self._report_progress()
        if self._take_in():
            self._step.join(self.peers)
        if self._step.wished and self.state.step < self.total_steps:
            self._change()

    def _change(self) -> None:
        """On to the next generation; a replica that leaves saves what might be lost with it."""
        self._take_in(to_the_end=True)
        # A group that does not last is ended as a whole; this replica may be the last to hear it.
        if self._membership.leaving or not self._membership.lasting:
            if self._saver:
                self._saver.save(self.state)
            self._tell({"kind": "paused", "step": self.state.step})
        self._join()

    def _report_progress(self) -> None:
        started, first_step = self._pace
        now = time.monotonic()
        if now - self._told_at < PROGRESS_S:
            return
        self._told_at = now
        self._report(
            {
                "kind": "progress",
                "step": self.state.step,
                "steps": self.total_steps,
                "steps_per_s": (self.state.step - first_step) / max(now - started, 1e-9),
            }
        )

    def measure(self) -> dict[str, float]:
        """What an epoch reports. Collective.

        ``train_loss`` is the last step's: a mean over the epoch's steps that this process did
        would depend on where it resumed.
        """
        assert self.state.loss is not None
        validation = self.dataset.validation
        outputs = evaluation.outputs(
            self.state.evaluated,
            validation,
            width=self.dataset.schema.outputs,
            device=self.device,
            peers=self.peers,
        )
        measured = self._task.measure(self._task.answers(outputs, validation), validation)
        return {"train_loss": float(self.state.loss)} | {f"val_{n}": v for n, v in measured.items()}

    def _keep_best(self, metrics: dict[str, float]) -> None:
        stop = self.experiment.train.early_stop
        if stop is None:
            return
        if stop.metric not in metrics:
            raise TrainingError(
                f"train.early_stop.metric is {stop.metric!r}, reported are {', '.join(metrics)}"
            )
        sign = 1 if direction(stop.metric.split("_", 1)[1]) == "min" else -1
        values = [sign * m[stop.metric] for m in self.state.history]
        if values[-1] < min(values[:-1], default=math.inf):
            self.state.keep_best(len(values) - 1)

    def _link_digest(self) -> None:
        """Extend the chain with this step's gradients and weights, and compare over replicas."""
        state = self.state
        weights = state.model.state_dict()
        gradients = self._step.reduced_gradients()
        link = digest.link(state.digest, state.step, [*gradients, *weights.values()])
        state.links.append((state.step, link))
        if self.peers.size > 1:
            mine = torch.tensor(list(bytes.fromhex(link)), dtype=torch.uint8)
            rows = self.peers.gather(mine)[: self.peers.hosts]
            links = [bytes(row.tolist()).hex() for row in rows]
            if len(set(links)) > 1:
                self._settle(links, weights, gradients)
        self._report({"kind": "digest", "step": state.step, "digest": link})

    def _settle(
        self, links: list[str], weights: dict[str, Tensor], gradients: list[Tensor]
    ) -> NoReturn:
        """Replicas hold different bytes: most are believed, and go on without the others.

        Raises:
            OutvotedError: in a replica that differs from more than half of all.
            DoubtError: in the others, which go back to before the difference.
            DivergenceError: in all, where nobody can be outvoted or nobody could go on.
        """
        if self._saver:
            self._saver.wait()  # or one of void steps could be there after `drop_after`
        what = exactness.first_difference(self.peers, self.state.step, gradients, weights)
        wrong = digest.outvoted(links)
        if not wrong or not self._membership.lasting:
            raise DivergenceError(what)
        if self.peers.rank in wrong:
            raise OutvotedError(f"{what}; {len(links) - len(wrong)} others agree")
        if self._checkpoints and self.peers.rank == min(set(range(len(links))) - set(wrong)):
            checked = [step for step, _ in self.state.links[:-1]]
            self._checkpoints.drop_after(checked[-1] if checked else -1)
        raise DoubtError(what)
