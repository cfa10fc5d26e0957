"""What one replica does, from start or checkpoint to the last epoch.

The same loop runs in a worker of Ray Train, in a trial of a study and in a plain process; what
differs is given: the process group, where checkpoints go and who is told.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lepton_ray import models
from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.data.order import key, shard_indices, steps_per_epoch
from lepton_ray.errors import DataError, DivergenceError, ExperimentError, TrainingError
from lepton_ray.training import allocator, determinism, digest, evaluation
from lepton_ray.training.checkpoint import Checkpointer, CheckpointFolder
from lepton_ray.training.metrics import DIRECTIONS
from lepton_ray.training.optimization import build_optimizer
from lepton_ray.training.profiler import Profiler
from lepton_ray.training.state import TrainState, averaged_copy
from lepton_ray.training.step import TrainStep
from lepton_ray.training.tasks import task_of

Report = Callable[[dict[str, Any]], None]
PROGRESS_S = 0.5  # between two progress reports
PAUSE_S = 60


class Replica:
    """One copy of the model in training.

    Args:
        group: the replicas' process group; None for a single replica.
        checkpoints: where to save and resume; None saves nothing.
        report: gets events as plain dicts, on replica 0 only.
        epochs: where to stop, if before ``train.epochs``; the schedule stays that of the whole run.
        should_pause: asked after every step on replica 0; once true, it saves, reports, and waits
            to be ended.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        *,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
        checkpoints: CheckpointFolder | None = None,
        epochs: int | None = None,
        report: Report = lambda event: None,
        should_pause: Callable[[], bool] = lambda: False,
    ) -> None:
        train = experiment.train
        self.experiment = experiment
        self.dataset = dataset
        self._epochs = min(epochs or train.epochs, train.epochs)
        self._task = task_of(dataset)
        self.device = device or torch.device("cpu")
        self.profile = determinism.configure(train, self.device)
        allocator.keep_freed_memory()
        self._group = group
        self._first = group is None or group.rank() == 0
        self._report = report if self._first else lambda event: None
        self._should_pause = should_pause
        self._checkpoints = checkpoints
        self._checkpointer = (
            Checkpointer(checkpoints, self._report) if checkpoints and self._first else None
        )
        profiled = train.profile if self._first else None
        self._profiler = Profiler(profiled, self.device, report) if profiled else None
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._reported_first_step = False
        self.epoch_steps = steps_per_epoch(len(dataset.train), train.batch)
        if self.epoch_steps == 0:
            raise DataError(
                f"train.batch is {train.batch}, but the training split has only "
                f"{len(dataset.train)} samples: set a smaller batch"
            )
        self.total_steps = train.epochs * self.epoch_steps
        self._compare_profiles()
        self.state = self._initial_state()
        self._resume()
        self._step = TrainStep(
            self.state,
            train,
            total_steps=self.total_steps,
            loss=self._task.loss,
            fetch=self._fetch,
            device=self.device,
            group=group,
        )

    def _initial_state(self) -> TrainState:
        train, dataset = self.experiment.train, self.dataset
        torch.manual_seed(key(train.seed, "init"))
        model = models.build(
            self.experiment.model,
            dataset.preprocess.input_shape,
            dataset.schema.outputs,
            dataset.preprocess.vocabulary,
        ).to(self.device)
        refuse_inexact(model)
        optimizer = build_optimizer(
            train.optimizer, [p for p in model.parameters() if p.requires_grad]
        )
        averaged = averaged_copy(model) if train.ema is not None else None
        return TrainState(model=model, optimizer=optimizer, averaged=averaged)

    def _compare_profiles(self) -> None:
        """All replicas compute alike, or their bytes would drift apart. Collective.

        Raises:
            DivergenceError: naming what differs.
        """
        if self._group is None or self._group.size() == 1 or not self.experiment.train.exact:
            return
        profiles: list[Any] = [None] * self._group.size()
        dist.all_gather_object(profiles, self.profile.to_json(), group=self._group)
        for replica, profile in enumerate(profiles):
            differing = determinism.differences(profiles[0], profile)
            if differing:
                raise DivergenceError(
                    f"replica {replica} computes unlike replica 0 ({'; '.join(differing)}): use "
                    "one kind of machine, or set train.exact: false"
                )

    def _resume(self) -> None:
        """Go on from the last whole checkpoint, if there is one.

        Raises:
            DivergenceError: when it was made with other numerics.
        """
        found = self._checkpoints.load_last() if self._checkpoints else None
        if found is not None:
            differing = determinism.differences(self.profile.to_json(), found[1]["profile"])
            if differing and self.experiment.train.exact:
                raise DivergenceError(
                    f"the checkpoint of step {found[1]['step']} was made with other numerics "
                    f"({'; '.join(differing)}): resume on the same kind of machine, or set "
                    "train.exact: false"
                )
            self.state.load(*found)
            self._saved_step = self.state.step
        self._report(
            {
                "kind": "start",
                "step": self.state.step,
                "steps": self.total_steps,
                "replicas": self._group.size() if self._group else 1,
                "pid": os.getpid(),
                "profile": self.profile.to_json(),
            }
        )

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train, one epoch at a time; yields what the epoch measured (on every replica)."""
        if self.finished:
            yield self.state.history[-1]
        while not self.finished:
            yield self._epoch()
        if self._checkpointer:
            self._checkpointer.wait()
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

    def _epoch(self) -> dict[str, float]:
        start, first_step = time.monotonic(), self.state.step
        told_at = start
        end = (self.epoch + 1) * self.epoch_steps
        while self.state.step < end:
            self.advance()
            now = time.monotonic()
            if now - told_at >= PROGRESS_S:
                told_at = now
                rate = (self.state.step - first_step) / (now - start)
                self._report(
                    {
                        "kind": "progress",
                        "step": self.state.step,
                        "steps": self.total_steps,
                        "steps_per_s": rate,
                    }
                )
        metrics = self.measure()
        if not math.isfinite(metrics["train_loss"]):
            raise TrainingError(
                f"the loss is {metrics['train_loss']} at step {self.state.step}: training "
                "diverged; lower train.optimizer.lr or set train.clip"
            )
        self.state.history.append(metrics)
        self._keep_best(metrics)
        self._report(
            {
                "kind": "epoch",
                "epoch": self.epoch,
                "step": self.state.step,
                "metrics": metrics,
                "seconds": time.monotonic() - start,
            }
        )
        if self.finished:
            self._save(force=True)
        return metrics

    def advance(self) -> None:
        """One step and what follows it: digest, checkpoint, a pause that was asked for."""
        self._step.run()
        if self._profiler:
            self._profiler.step()
        if not self._reported_first_step:
            self._reported_first_step = True
            self._report({"kind": "first_step", "step": self.state.step})
        self._after_step()

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
            group=self._group,
        )
        measured = self._task.measure(self._task.answers(outputs), validation.y)
        return {
            "train_loss": float(self.state.loss),
            **{f"val_{n}": v for n, v in measured.items()},
        }

    def _keep_best(self, metrics: dict[str, float]) -> None:
        stop = self.experiment.train.early_stop
        if stop is None:
            return
        if stop.metric not in metrics:
            raise TrainingError(
                f"train.early_stop.metric is {stop.metric!r}, reported are {', '.join(metrics)}"
            )
        sign = 1 if DIRECTIONS[stop.metric.split("_", 1)[1]] == "min" else -1
        values = [sign * m[stop.metric] for m in self.state.history]
        if values[-1] < min(values[:-1], default=math.inf):
            self.state.keep_best(len(values) - 1)

    def _after_step(self) -> None:
        train, state = self.experiment.train, self.state
        if state.step % train.digest_every == 0 or state.step == self.total_steps:
            self._link_digest()
        self._save(force=False)
        if self._checkpointer and self._should_pause() and state.step < self.total_steps:
            self._pause(self._checkpointer)

    def _pause(self, checkpointer: Checkpointer) -> None:
        """Hold the whole group at this step: the others cannot finish the next one without us,
        and a step that is not finished changes nothing."""
        self._save(force=True)
        checkpointer.wait()
        self._report({"kind": "paused", "step": self.state.step})
        time.sleep(PAUSE_S)  # ended meanwhile; if not, training goes on

    def _link_digest(self) -> None:
        """Extend the chain with this step's gradients and weights, and compare over replicas."""
        state = self.state
        weights = state.model.state_dict()
        gradients = self._step.reduced_gradients()
        link = digest.link(state.digest, state.step, [*gradients, *weights.values()])
        state.links.append((state.step, link))
        if self._group is not None and self._group.size() > 1:
            mine = torch.tensor(list(bytes.fromhex(link)), dtype=torch.uint8)
            everyone = torch.empty(self._group.size() * 32, dtype=torch.uint8, device=self.device)
            dist.all_gather_single(everyone, mine.to(self.device), group=self._group)
            rows = everyone.view(-1, 32)
            if bool((rows != rows[0]).any()):
                self._name_divergence(weights, gradients)
        self._report({"kind": "digest", "step": state.step, "digest": link})

    def _name_divergence(self, weights: dict[str, Tensor], gradients: list[Tensor]) -> None:
        names = [*(f"gradient {i}" for i in range(len(gradients))), *weights]
        mine = [digest.state_sha256({"": t}) for t in (*gradients, *weights.values())]
        rows: list[Any] = [None] * self._group.size()  # type: ignore[union-attr]
        dist.all_gather_object(rows, mine, group=self._group)
        tensor = digest.first_difference(rows, names)
        raise DivergenceError(
            f"replicas hold different bytes at step {self.state.step}, first in {tensor}: a "
            "replica's hardware or a model that keeps state outside its parameters and buffers"
        )

    def _save(self, *, force: bool) -> None:
        if self._checkpointer is None:
            return
        limits = self.experiment.train.checkpoint
        steps = self.state.step - self._saved_step
        due = time.monotonic() - self._saved_at >= limits.every_s or (
            limits.every_steps is not None and steps >= limits.every_steps
        )
        lasting = limits.keep_every is not None and self.state.step % limits.keep_every == 0
        if force or lasting or (due and not self._checkpointer.busy):
            tensors, values = self.state.dump()
            values["profile"] = self.profile.to_json()
            self._checkpointer.save(self.state.step, tensors, values)
            self._saved_at = time.monotonic()
            self._saved_step = self.state.step

    def _fetch(self, step: int, shard: int) -> tuple[Tensor, Tensor]:
        train, samples = self.experiment.train, self.dataset.train
        epoch, epoch_step = divmod(step, self.epoch_steps)
        rows = shard_indices(
            seed=train.seed,
            epoch=epoch,
            step=epoch_step,
            shard=shard,
            shards=train.n_shards,
            batch=train.batch,
            samples=len(samples),
        )
        x, y = torch.from_numpy(samples.x[rows]), torch.from_numpy(samples.y[rows])
        return x.to(self.device), y.to(self.device)


def refuse_inexact(model: torch.nn.Module) -> None:
    """What the exact step cannot do.

    Raises:
        ExperimentError: naming the modules and tensors, and the way out.
    """
    problems = [
        f"model: {name or 'the model'} is SyncBatchNorm, which mixes shards: use BatchNorm, whose "
        "statistics are averaged over the shards of each step"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.SyncBatchNorm)
    ]
    problems += [
        f"model: {name} is {tensor.dtype}: weights must be float32; for less precise arithmetic "
        "set train.precision: bf16"
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    if problems:
        raise ExperimentError("experiment", problems)
