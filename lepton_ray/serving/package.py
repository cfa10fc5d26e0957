"""Build a model version: the one format, checked before it can be registered.

``model.pt2`` and ``model.onnx`` (exported in eval mode with a free batch size), ``preprocess.json``
with its tensors, ``schema.json``, ``decision.json``, ``experiment.yaml``, and ``manifest.json``
last. No pickle.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_ray.data import decision as decisions
from lepton_ray.data.decision import AnyDecision
from lepton_ray.data.fitted import Fitted
from lepton_ray.data.preprocess import Inputs
from lepton_ray.data.schema import Schema
from lepton_ray.errors import RunError
from lepton_ray.models import low_rank
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving.runtime import DECISION, open_session, run_session
from lepton_ray.training.digest import state_sha256

TOLERANCE = 1e-5  # between runtimes, and between batch sizes where they are not bit-equal
BATCH_SIZES = (1, 2, 3, 7)
PART = 256  # samples of one forward pass in `outputs`

Floats = npt.NDArray[np.float32]


def build(
    folder: Path,
    *,
    model: nn.Module,
    dataset_schema: Schema,
    preprocess: Fitted,
    decision: AnyDecision | None = None,
    experiment_yaml: str,
    sample_x: Inputs,
    max_batch: int,
    provenance: dict[str, Any],
    beside: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write a version into ``folder`` (made aside, then renamed) and return its manifest.

    Args:
        model: trained; it is copied, and the copy exported.
        decision: how its outputs become answers; default as they are.
        sample_x: [n >= 2, ...] real inputs, on which the runtimes are compared.
        max_batch: largest batch size the runtimes are compared at.
        beside: more files of the version, by name.

    Raises:
        RunError: when the runtimes disagree.
    """
    decision = decision or decisions.plain(dataset_schema)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    eager = copy.deepcopy(model).cpu().eval()
    weights_sha256 = state_sha256(eager.state_dict())
    low_rank.merge(eager)  # which is the same model, without the work of its adapters
    export(eager, torch.from_numpy(sample_x[:2].copy()), aside)
    preprocess.save(aside)
    (aside / "schema.json").write_text(json.dumps(dataset_schema.to_json(), indent=1))
    (aside / DECISION).write_text(json.dumps(asdict(decision), indent=1))
    (aside / "experiment.yaml").write_text(experiment_yaml)
    for name, content in (beside or {}).items():
        (aside / name).write_bytes(content)
    manifest = manifests.write(
        aside,
        {
            **provenance,
            "weights_sha256": weights_sha256,
            "parity": _compare(
                eager,
                aside,
                sample_x,
                max_batch,
                decision.probabilities if dataset_schema.classes else _unchanged,
            ),
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return manifest


def rows(schema: Schema, columns: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The first ``n`` samples as a person would send them: plain values, one mapping a row."""
    taken = {c.name: columns[c.name][:n].tolist() for c in schema.columns}
    return [
        {name: _plain(value) for name, value in zip(taken, values, strict=True)}
        for values in zip(*taken.values(), strict=True)
    ]


def _plain(value: Any) -> Any:
    """What JSON can say: nothing instead of NaN."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def export(model: nn.Module, example: torch.Tensor, folder: Path) -> None:
    """Write ``model.pt2`` and ``model.onnx``.

    Args:
        model: in eval mode.
        example: two samples: with one, the batch size would be frozen to 1.
    """
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "model.pt2")
        onnx = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
        assert onnx is not None
        onnx.save(folder / "model.onnx")


def _compare(
    eager: nn.Module,
    folder: Path,
    x: Inputs,
    max_batch: int,
    answers_of: Callable[[Floats], Floats],
) -> dict[str, Any]:
    """Answers of eager torch, pt2 and ONNX Runtime to the same samples: probabilities, or values in
    units of the training targets' deviation.

    Every row's answer alone is the reference for its answer inside larger batches.
    """
    x = x[: max(max_batch, *BATCH_SIZES)]
    session = open_session(folder / "model.onnx")
    with _quiet():
        program = torch.export.load(folder / "model.pt2").module()
    alone = np.concatenate([answers_of(run_session(session, x[i : i + 1])) for i in range(len(x))])
    sizes = sorted({min(n, len(x)) for n in (*BATCH_SIZES, max_batch)})
    runtime = batch = 0.0
    for size in sizes:
        part = x[:size]
        answers = answers_of(run_session(session, part))
        batch = max(batch, _distance(answers, alone[:size], f"batch size {size}"))
        for name, module in (("torch", eager), ("pt2", program)):
            runtime = max(runtime, _distance(answers, answers_of(_torch(module, part)), name))
    return {
        "batch_sizes": sizes,
        "batch_invariant": batch == 0.0,
        "largest_difference_over_batch_sizes": batch,
        "largest_difference_over_runtimes": runtime,
    }


def _distance(ours: Floats, theirs: Floats, name: str) -> float:
    """Largest difference of two answers to the same rows.

    Raises:
        RunError: beyond the tolerance, or when a label changes that was not a near tie.
    """
    difference = float(np.abs(ours - theirs).max())
    flipped = 0
    if ours.shape[1] > 1:
        ranked = np.sort(ours, axis=1)
        clear = ranked[:, -1] - ranked[:, -2] > TOLERANCE
        flipped = int(((ours.argmax(1) != theirs.argmax(1)) & clear).sum())
    if difference > TOLERANCE or flipped:
        raise RunError(
            f"the exported model differs from {name} by {difference:.2e} (at most {TOLERANCE:g} is "
            f"accepted) and in {flipped} labels: it was not registered"
        )
    return difference


def _unchanged(outputs: Floats) -> Floats:
    return outputs


def outputs(model: nn.Module, x: Inputs) -> Floats:
    """[n, outputs] What a model gives for samples, in parts."""
    was_training = model.training
    model.eval()
    parts = [_torch(model, x[at : at + PART]) for at in range(0, len(x), PART)]
    model.train(was_training)
    return np.concatenate(parts)


@torch.no_grad()
def _torch(module: nn.Module, x: Inputs) -> Floats:
    outputs: Floats = module(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print and warn about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
