"""One trial of Syne Tune's local backend, which starts a process for each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from syne_tune import Reporter

sys.path.insert(0, str(Path(__file__).parents[1]))
import _task


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, (kind, *rest) in _task.SPACE.items():
        whole = kind == "int" or (kind == "choice" and isinstance(rest[0], int))
        parser.add_argument(f"--{name}", type=int if whole else float)
    parser.add_argument("--task")
    parser.add_argument("--trial_seed", type=int)
    parser.add_argument("--log")
    options, _ = parser.parse_known_args()
    settings = {name: getattr(options, name) for name in _task.SPACE}
    report = Reporter()
    epochs = _task.epochs_of(options.task)
    training = _task.make(options.task, settings, _task.arrays_of(options.task), options.trial_seed)
    for epoch in range(1, epochs + 1):
        value = training.train_epoch()
        if epoch == epochs:
            _task.Log(options.log).whole(value)
        report(epoch=epoch, loss=value)


main()
