"""An experiment and what can be done with it, in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_ray.config import load
from lepton_ray.config import schema as config
from lepton_ray.jobs.costs import Fit
from lepton_ray.jobs.planning import Plan, make_plan, plan_on
from lepton_ray.pipeline.run import Run


@dataclass(frozen=True)
class Experiment:
    """The verbs of the command line in Python: ``Experiment.load(path).run()``."""

    config: config.Experiment

    @staticmethod
    def load(path: str | Path, settings: Sequence[str] = ()) -> Experiment:
        """See `lepton_ray.config.load`."""
        return Experiment(load(path, settings))

    def plan(self, *, address: str | None = None) -> Plan:
        """Check everything and run one real step; changes nothing."""
        return make_plan(self.config, address=address)[0]

    def plan_on(self, cluster: str | Path, *, prices: str | Path | None = None) -> tuple[Plan, Fit]:
        """The same for the cluster of a file that need not run, and what it costs there.

        Raises:
            ClusterError: when the file is wrong, or has no room for ``workers.min``.
        """
        return plan_on(self.config, cluster, prices)

    def tune(self, **options: Any) -> dict[str, Any]:
        """Search; returns the best trial. Options as for `run`."""
        return Run(self.config, "tune", **options).go()

    def train(self, **options: Any) -> dict[str, Any]:
        """Train, evaluate and register, without a search. Options as for `run`."""
        return Run(self.config, "train", **options).go()

    def run(self, **options: Any) -> dict[str, Any]:
        """Plan, tune, train, register, gate, serve. Options are those of `Run`.

        Raises:
            GateError: when the version was not promoted; it stays registered.
        """
        return Run(self.config, "run", **options).go()
