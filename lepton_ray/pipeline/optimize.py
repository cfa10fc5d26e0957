"""Look for a faster or smaller form of a version, and register one that loses little enough."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lepton_ray.config import load
from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.errors import GateError, InputError
from lepton_ray.jobs.runs import local_root
from lepton_ray.pipeline import students
from lepton_ray.pipeline.promotion import dataset_of
from lepton_ray.pipeline.students import Student
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving import package, smaller
from lepton_ray.serving.runtime import CHUNK, Model, OnnxModel, Runtime
from lepton_ray.serving.signature import signature
from lepton_ray.serving.smaller import Latency
from lepton_ray.serving.torch_model import FORMS, Form, TorchModel
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import registry
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.tracking.store import Tracker
from lepton_ray.training.tasks import task_of

PRESENT = "as it is"
ON_CPU = "ONNX Runtime on a CPU"
ALIKE = 64  # rows on which it is looked whether neighbours matter
GAIN = 0.9  # of the present latency or size, that a candidate must stay below to be worth a version
BATCH = 64
METRICS = {"classification": "accuracy", "multilabel": "f1_micro", "regression": "r2"}
"""Of each task, what may suffer."""
CALLS = 100  # with one row, in each of five rounds


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A form of a version, measured."""

    name: str
    bytes: int
    latency: Latency
    validation: dict[str, float]
    test: dict[str, float]
    neighbours: float
    """Largest difference that the rows beside a row make to its outputs."""
    tolerance: float = package.TOLERANCE
    """Of that, what its arithmetic alone may make."""
    training_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A form of a version, ready to be measured."""

    model: Model
    path: Path
    """Of its file, for the size."""
    torch: Form | None = None
    """How torch runs it, if it does."""
    student: Student | None = None
    kept: bool = True
    """Whether it could become a version, or is only measured beside."""


def optimize(
    reference: str,
    *,
    smallest: bool,
    lose: float,
    terminal: Terminal,
    methods: Collection[str] = (),
    student: str | None = None,
    device: str = "",
) -> dict[str, Any]:
    """Measure int8 forms of a version, students of it and levels of graph optimization, and
    register the best form.

    Chosen is on the validation split, reported on the test split.

    Args:
        smallest: look for the smallest, instead of the fastest.
        lose: share of its metric (`METRICS`, for numbers R2) that it may lose, 0.005 by default.
        methods: of `students.METHODS`, each trained.
        student: the setting that students have smaller, see `students.settings`.
        device: of torch, such as ``cuda``: measure the ways to run the version there instead,
            `torch_model.FORMS`.

    Raises:
        GateError: when none is better and loses little enough, with all that was measured.
        ModelError: when the data of the version have changed.
    """
    if not 0 <= lose < 1:
        raise InputError(f"--lose is a share of at least 0 and below 1, but got {lose:g}")
    if student is not None and not methods:
        raise InputError(
            f"--student {student} is of a form that is trained: add --distill or --prune"
        )
    if device and (smallest or methods):
        raise InputError(
            "--gpu looks for the fastest way to run a version as it is: leave out --smallest, "
            "--distill and --prune"
        )
    version = registry.resolve(reference)
    folder = version.folder()
    before = manifests.verify(folder)
    if "optimized" in before:
        raise InputError(f"{reference} is {before['optimized']['form']} already: name its original")
    experiment = load(folder / "experiment.yaml")
    if student is not None:
        students.settings(experiment, student)  # before anything is measured
    dataset = dataset_of(version, experiment)
    if dataset.schema.task not in METRICS:
        raise InputError(
            f"forms of models for {', '.join(METRICS)} are looked for, but {reference} is for "
            f"{dataset.schema.task}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        if device:
            forms, failed = _by_torch(folder, device)
        else:
            forms, failed = _by_onnx(folder, Path(scratch), dataset)
        for method in methods:
            target = Path(scratch) / method
            try:
                made = students.train(
                    method, student, experiment, dataset, folder, target, terminal.progress
                )
                path = made.folder / "model.onnx"
                forms[method] = _Form(model=OnnxModel(path), path=path, student=made)
            except Exception as error:  # whatever training raises: the others are measured
                failed[method] = f"cannot be made: {error}"
        found = _measure(forms, dataset)
        present = found[0]
        metric = METRICS[dataset.schema.task]
        whys = {
            c.name: _why_not(c, present, metric, lose, smallest)
            for c in found[1:]
            if forms[c.name].kept
        }
        terminal.say(_table(found, metric, {**whys, **failed}))
        good = [c for c in found if whys.get(c.name) == ""]
        best = min(good, key=lambda c: _cost(c, smallest), default=None)
        value = {"candidates": [asdict(c) for c in found], "failed": failed, "not_taken": whys}
        tracker = Tracker(version.name, local_root(experiment.storage) / "artifacts")
        run_id = tracker.start(f"optimize {version.version}", tags={"lepton_ray.kind": "optimize"})
        kept = Path(scratch) / "kept"
        kept.mkdir()
        (kept / "candidates.json").write_text(json.dumps(value, indent=1))
        (kept / "pareto.png").write_bytes(_picture(found, metric))
        tracker.files(run_id, kept, "optimize")
        try:
            if best is None:
                raise GateError(
                    f"{version.name}/{version.version} stays as it is: no form of it is "
                    f"{'smaller' if smallest else 'faster'} by a tenth and loses at most {lose:g} "
                    f"of {metric}"
                )
            version = _register(version, folder, forms[best.name], best, run_id, scratch)
        finally:
            tracker.finish(run_id)
    said = f"{version.name}/{version.version} is {best.name}; promote it, or try it as a canary"
    terminal.say(said)
    return {**value, "taken": best.name, "name": version.name, "version": version.version}


def _by_onnx(
    folder: Path, scratch: Path, dataset: Dataset
) -> tuple[dict[str, _Form], dict[str, str]]:
    """Name -> form, the present one first; and name -> why one cannot be made."""
    present = folder / "model.onnx"
    forms = {PRESENT: _Form(model=OnnxModel(present), path=present)}
    failed = {}
    for name, made in smaller.quantized(present, scratch, dataset.train.x).items():
        if isinstance(made, Path):
            forms[name] = _Form(model=OnnxModel(made), path=made)
        else:
            failed[name] = made
    forms |= {
        name: _Form(model=OnnxModel(present, level), path=present, kept=False)
        for name, level in smaller.LEVELS.items()
    }
    return forms, failed


def _by_torch(folder: Path, device: str) -> tuple[dict[str, _Form], dict[str, str]]:
    """The same on another device.

    Raises:
        ServingError: when torch does not have it.
        ModelError: when the version as it is computes otherwise there.
    """
    path = folder / "model.pt2"
    on_cpu = OnnxModel(folder / "model.onnx")
    present = TorchModel(path, device)
    present.check(on_cpu)
    forms = {PRESENT: _Form(model=present, path=path, torch=Form())}
    failed = {}
    for name, form in FORMS.items():
        try:
            model = TorchModel(path, device, form)
            model.check(on_cpu)  # and compile
            forms[name] = _Form(model=model, path=path, torch=form)
        except Exception as error:  # whatever a compiler raises
            failed[name] = f"cannot be made: {smaller.first_line(error)}"
    forms[ON_CPU] = _Form(model=on_cpu, path=folder / "model.onnx", kept=False)
    return forms, failed


def _measure(forms: Mapping[str, _Form], dataset: Dataset) -> list[Candidate]:
    models = {name: form.model for name, form in forms.items()}
    times = smaller.latencies(models, dataset.validation.x, batch=BATCH, calls=CALLS)
    task = task_of(dataset)

    def scores(model: Model, samples: Samples) -> dict[str, float]:
        outputs = torch.from_numpy(smaller.outputs(model, samples.x, CHUNK))
        return task.measure(task.answers(outputs, samples), samples)

    alike = dataset.validation.x[:ALIKE]
    return [
        Candidate(
            name=name,
            bytes=form.path.stat().st_size,
            latency=times[name],
            validation=scores(form.model, dataset.validation),
            test=scores(form.model, dataset.test),
            neighbours=smaller.neighbours_matter(form.model, alike),
            tolerance=(
                form.torch.tolerance(form.model(alike)) if form.torch else package.TOLERANCE
            ),
            training_s=form.student.training_s if form.student else 0.0,
        )
        for name, form in forms.items()
    ]


def _cost(candidate: Candidate, smallest: bool) -> float:
    return float(candidate.bytes) if smallest else candidate.latency.p50_ms


def _why_not(
    candidate: Candidate, present: Candidate, metric: str, lose: float, smallest: bool
) -> str:
    """What speaks against taking a candidate in place of the present form; "" for nothing."""
    lost = present.validation[metric] - candidate.validation[metric]
    if lost > lose:
        return f"loses {lost:.4f} of {metric}"
    if candidate.neighbours > max(candidate.tolerance, present.neighbours):
        return f"answers change by {candidate.neighbours:.2g} with the rows beside"
    if _cost(candidate, smallest) > GAIN * _cost(present, smallest):
        return f"not {'smaller' if smallest else 'faster'} by a tenth"
    return ""


def _table(found: list[Candidate], metric: str, whys: dict[str, str]) -> str:
    head = f"{'':24}{metric:>10}{'on test':>10}{'p50 ms':>9}{'p99 ms':>9}{'batch ms':>10}{'KiB':>9}"
    head += f"{'train s':>9}"
    lines = [
        f"{c.name:24}{c.validation[metric]:>10.4f}{c.test[metric]:>10.4f}{c.latency.p50_ms:>9.3f}"
        f"{c.latency.p99_ms:>9.3f}{c.latency.batch_ms:>10.2f}{c.bytes / 1024:>9.1f}"
        f"{c.training_s:>9.1f}  {whys.get(c.name, '')}".rstrip()
        for c in found
    ]
    shown = {c.name for c in found}
    lines += [f"{name:24}{why}" for name, why in whys.items() if name not in shown]
    return "\n".join([head, *lines])


def _picture(found: list[Candidate], metric: str) -> bytes:
    """PNG: each candidate by its latency and what it gets right; those that none beats in both are
    joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = {c.name: (c.latency.p50_ms, c.validation[metric]) for c in found}
    for name, (x, y) in points.items():
        axes.scatter(x, y)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4))
    front, best = [], -np.inf
    for x, y in sorted(points.values(), key=lambda point: (point[0], -point[1])):
        if y > best:
            front.append((x, y))
            best = y
    axes.step(*zip(*front, strict=True), where="post", linestyle="--", linewidth=1)
    axes.set_xlabel("p50 of one row, ms")
    axes.set_ylabel(f"{metric} on the validation split")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _register(
    version: ModelVersion,
    folder: Path,
    form: _Form,
    best: Candidate,
    run_id: str,
    scratch: str,
) -> ModelVersion:
    """A version of the files in ``folder``, or of a student's, that runs in the form."""
    origin = form.student.folder if form.student else folder
    made = Path(scratch) / "version"
    shutil.copytree(origin, made)
    if form.path.parent != origin:
        shutil.copyfile(form.path, made / "model.onnx")
    before = manifests.verify(origin)
    kept = {k: v for k, v in before.items() if k not in ("format", "files")}
    if form.torch:
        kept[manifests.TORCH] = asdict(form.torch)
    optimized = {
        "form": best.name,
        "of": f"{version.name}/{version.version}",
        "latency": asdict(best.latency),
        "validation": best.validation,
        "training_s": best.training_s,
    }
    manifests.write(made, {**kept, "mlflow_run": run_id, "optimized": optimized})
    return registry.register(
        version.name,
        run_id=run_id,
        folder=made,
        python_model=Path(package.__file__).with_name("pyfunc_model.py"),
        signature=signature(Runtime.load(made).schema),
        tags={
            "lepton_ray.optimized": best.name,
            "lepton_ray.weights_sha256": before["weights_sha256"],
            **{f"test_{m}": f"{v:.6f}" for m, v in best.test.items()},
        },
    )
