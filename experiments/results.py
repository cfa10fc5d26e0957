"""Train the experiments with several seeds, and write what came of it into README.md here.

    python experiments/results.py                  # all whose data are here
    python experiments/results.py adult.yaml       # these, and the table of all that were ever run

Each is trained as its file says, without its study, by `lepton-ray train`: the seed of the split
stays, that of the training changes. results.json keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results.json"
START, END = "<!-- made by results.py -->", "<!-- end -->"
RIVALS = {"boosting": "gradient boosting", "linear": "linear"}


def measure(file: Path, seeds: int, settings: list[str]) -> dict[str, Any] | None:
    """Metrics of each seed; None where the data are not here.

    Raises:
        RuntimeError: for a training that failed.
    """
    metric = yaml.safe_load(file.read_text())["gate"]["metric"]
    ours: list[float] = []
    seconds = []
    rivals: dict[str, float] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as scratch:
            start = time.monotonic()
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "lepton_ray", "train", str(file), "--json"),
                    *(f"--set=storage={scratch}/results", f"--set=train.seed={seed}"),
                    *(f"--set={setting}" for setting in settings),
                ],
                cwd=HERE.parent,
                env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db"},
                capture_output=True,
                text=True,
                check=False,
            )
            seconds.append(time.monotonic() - start)
        if done.returncode == 2 and "does not exist" in done.stdout + done.stderr:
            return None
        if done.returncode != 0:
            raise RuntimeError(f"{file.name} failed: {(done.stdout + done.stderr)[-2000:]}")
        test = json.loads(done.stdout)["register"]["test"]
        ours.append(test["model"][metric])
        rivals = {name: test[name][metric] for name in RIVALS if name in test}
        print(f"{file.name} seed {seed}: {metric} {ours[-1]:.4f}; {rivals}", flush=True)
    return {
        "metric": metric,
        "values": ours,
        "rivals": rivals,
        "seconds": round(statistics.median(seconds)),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each experiment, in the order of their names."""
    lines = [
        "| Experiment | Metric | Mean | Spread | Same split | Seconds | Command |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in sorted(results.items()):
        values = found["values"]
        beside = ", ".join(f"{RIVALS[key]} {v:.4g}" for key, v in found["rivals"].items())
        spread = f"{min(values):.4g} to {max(values):.4g} ({len(values)} seeds)"
        lines.append(
            f"| `{name}` | {found['metric']} | {statistics.mean(values):.4g} | {spread} | "
            f"{beside} | {found['seconds']} | "
            f"`lepton-ray train experiments/{name}` |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the experiments.")
    parser.add_argument("names", nargs="*", help="their files; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--keep", action="store_true", help="do not write README.md, only print")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    names = options.names or sorted(path.name for path in HERE.glob("*.yaml"))
    for name in names:
        found = measure(HERE / Path(name).name, options.seeds, options.set)
        if found is None:
            print(f"{name}: skipped, get its data: python experiments/fetch.py --for {name}")
        else:
            kept[Path(name).name] = found
    made = table(kept)
    if options.keep:
        print(made)
        return 0
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{before}{START}\n{made}\n{END}{rest.partition(END)[2]}")
    print(f"{len(kept)} experiments in {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
