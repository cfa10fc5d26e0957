"""One trial: the training loop of a single replica, an epoch at a time, in a reused actor."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from typing import Any

import ray
from ray import tune

from lepton_ray.config import validate, with_settings
from lepton_ray.training.loop import Replica


class Trial(tune.Trainable):
    """Trains with the settings Tune gives. Ray keeps the actor for the next trial, so that one
    process start and one look at the data serve many trials."""

    def setup(self, config: dict[str, Any], experiment: Any = None, dataset: Any = None) -> None:
        self._experiment = validate(experiment)
        self._dataset = ray.get(dataset[0])
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._settings = new_config
        self._replica: Replica | None = None
        return True

    def step(self) -> dict[str, Any]:
        """One epoch. A trial that raises ends with its error; the actor serves the next one."""
        try:
            if self._replica is None:
                experiment = with_settings(self._experiment, self._settings)
                self._replica = Replica(experiment, self._dataset)
                self._epochs: Iterator[dict[str, float]] = self._replica.epochs()
            metrics = next(self._epochs)
        except Exception:
            tune_settings = self._experiment.tune
            assert tune_settings is not None
            return {tune_settings.metric: math.nan, "error": traceback.format_exc(), "done": True}
        finished = self._replica.finished
        return {**metrics, "finished": finished, "done": finished}
