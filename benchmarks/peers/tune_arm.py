"""One study by a peer, in its own environment.

    python tune_arm.py ARM TASK TRIALS SECONDS SEED LOG

ARM: tune_default, tune_expert, optuna_none, optuna_hyperband, optuna_halving,
optuna_median, syne_asha, syne_bohb. Two trials at a time. Each trial that comes to its last epoch
is written to LOG.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import _task

SLOTS = 2


def main() -> None:
    arm, task, trials, seconds, seed, log = sys.argv[1:7]
    run = {"tune": ray_tune, "optuna": optuna_processes, "syne": syne_tune}[arm.split("_")[0]]
    run(arm, task, int(trials), float(seconds), int(seed), log)


# --- Ray Tune ------------------------------------------------------------------------------------


def ray_tune(arm: str, task: str, trials: int, seconds: float, seed: int, log: str) -> None:
    """``default``: Tuner as it comes (random search, no stopping, a process a trial). ``expert``:
    OptunaSearch, ASHA, class API, reused actors, no loggers, two at a time."""
    expert = arm == "tune_expert"
    if expert:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import ray
    from ray import tune

    ray.init(address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    arrays = ray.put(_task.arrays_of(task))
    epochs = _task.epochs_of(task)

    def function(config: dict[str, Any]) -> None:
        training = _task.make(task, config, ray.get(arrays), seed)
        for epoch in range(1, epochs + 1):
            value = training.train_epoch()
            if epoch == epochs:
                _task.Log(log).whole(value)
            tune.report({"loss": value})

    class Class(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._training = _task.make(task, config, ray.get(arrays), seed)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            value = self._training.train_epoch()
            last = self._training.epoch == epochs
            if last:
                _task.Log(log).whole(value)
            return {"loss": value, "done": last}

    kinds: dict[str, Any] = {
        "log": tune.loguniform, "float": tune.uniform, "int": lambda a, b: tune.randint(a, b + 1),
        "choice": lambda *values: tune.choice(list(values)),
    }  # fmt: skip
    space = {name: kinds[kind](*rest) for name, (kind, *rest) in _task.SPACE.items()}
    options: dict[str, Any] = {}
    if expert:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        options = {
            "search_alg": OptunaSearch(seed=seed, points_to_evaluate=[_task.OWN]),
            "scheduler": ASHAScheduler(max_t=epochs),
            "reuse_actors": True,
            "max_concurrent_trials": SLOTS,
        }
    trainable: Any = Class if expert else function
    _task.Log(log).ready()
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="loss", mode="min", num_samples=trials, time_budget_s=seconds, **options
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                # A class would be asked for a checkpoint, which these trials have no use for.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    ray.shutdown()


# --- Optuna --------------------------------------------------------------------------------------


def optuna_processes(arm: str, task: str, trials: int, seconds: float, seed: int, log: str) -> None:
    """Two processes over one journal; Optuna's default sampler."""
    if len(sys.argv) > 7:
        optuna_worker(arm, task, trials, seconds, seed, log, sys.argv[7], int(sys.argv[8]))
        return
    with tempfile.TemporaryDirectory() as folder:
        journal = str(Path(folder) / "journal")
        workers = [
            subprocess.Popen([sys.executable, *sys.argv[:7], journal, str(n)]) for n in range(SLOTS)
        ]
        for worker in workers:
            worker.wait()


def optuna_worker(
    arm: str, task: str, trials: int, seconds: float, seed: int, log: str, journal: str, worker: int
) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import MaxTrialsCallback

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    epochs, arrays = _task.epochs_of(task), _task.arrays_of(task)
    pruners: dict[str, Any] = {
        "none": optuna.pruners.NopPruner(),
        "hyperband": optuna.pruners.HyperbandPruner(max_resource=epochs),
        "halving": optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3),
        "median": optuna.pruners.MedianPruner(),
    }
    study = optuna.create_study(
        study_name="benchmark",
        storage=optuna.storages.JournalStorage(JournalFileBackend(journal)),
        load_if_exists=True,
        pruner=pruners[arm.split("_")[1]],
        sampler=optuna.samplers.TPESampler(seed=seed * SLOTS + worker),
    )
    if worker == 0:
        study.enqueue_trial(_task.OWN)

    def objective(trial: optuna.Trial) -> float:
        settings: dict[str, Any] = {}
        for name, (kind, *rest) in _task.SPACE.items():
            if kind == "choice":
                settings[name] = trial.suggest_categorical(name, rest)
            elif kind == "int":
                settings[name] = trial.suggest_int(name, *rest)
            else:
                settings[name] = trial.suggest_float(name, *rest, log=kind == "log")
        training = _task.make(task, settings, arrays, seed)
        for epoch in range(1, epochs + 1):
            value = training.train_epoch()
            trial.report(value, epoch)
            if epoch < epochs and trial.should_prune():
                raise optuna.TrialPruned
        _task.Log(log).whole(value)
        return value

    _task.Log(log).ready()
    study.optimize(objective, timeout=seconds, callbacks=[MaxTrialsCallback(trials, states=None)])


# --- Syne Tune -----------------------------------------------------------------------------------


def syne_tune(arm: str, task: str, trials: int, seconds: float, seed: int, log: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SYNETUNE_FOLDER"] = folder
        syne_study(arm, task, trials, seconds, seed, log)


def syne_study(arm: str, task: str, trials: int, seconds: float, seed: int, log: str) -> None:
    from syne_tune import StoppingCriterion, Tuner
    from syne_tune.backend import LocalBackend
    from syne_tune.config_space import choice, loguniform, randint, uniform
    from syne_tune.optimizer import baselines

    kinds: dict[str, Any] = {
        "log": loguniform, "float": uniform, "int": randint,
        "choice": lambda *values: choice(list(values)),
    }  # fmt: skip
    space = {name: kinds[kind](*rest) for name, (kind, *rest) in _task.SPACE.items()}
    space |= {"task": task, "trial_seed": seed, "log": log}
    epochs = _task.epochs_of(task)
    make = {"syne_asha": baselines.ASHA, "syne_bohb": baselines.BOHB}[arm]
    scheduler = make(
        space, metric="loss", do_minimize=True, time_attr="epoch", max_t=epochs,
        random_seed=seed, points_to_evaluate=[dict(_task.OWN)],
    )  # fmt: skip
    _task.Log(log).ready()
    Tuner(
        trial_backend=LocalBackend(entry_point=str(Path(__file__).with_name("syne_trial.py"))),
        scheduler=scheduler,
        stop_criterion=StoppingCriterion(max_num_trials_started=trials, max_wallclock_time=seconds),
        n_workers=SLOTS,
        sleep_time=0.1,
        save_tuner=False,
        print_update_interval=1e9,
    ).run()


if __name__ == "__main__":
    began = time.time()
    main()
