"""What an experiment on some data could say, each setting with its reason: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_ray.config.load import render_value
from lepton_ray.config.schema import TextPreprocess, Train
from lepton_ray.data.dataset import Dataset
from lepton_ray.data.sources import Raw
from lepton_ray.errors import DataError, nearest
from lepton_ray.pipeline import guess_labels, guess_sequences
from lepton_ray.pipeline.guesses import Guess
from lepton_ray.pipeline.profiles import (
    Profile,
    is_code,
    is_group,
    is_ordered,
    is_whole,
    profile,
    says_split,
)

if TYPE_CHECKING:
    import pandas as pd

TARGETS = ("target", "label", "class", "y", "outcome", "category", "sentiment", "diagnosis")
RARE = (1000, 10)  # from so many rows on, categories of fewer training rows are taken together
FEW_CLASSES = 20  # of whole numbers; more are amounts
STEPS = 1500  # of one training
EPOCHS = {"table": 60, "text": 20, "image": 30, "interactions": 30, "series": 20}  # at most
KINDS = {"image": "image", "text": "text", "id": "interactions", "time": "series"}
DECAY = {"table": 0.05, "interactions": 0.1}
BATCH = (8, 256)
STEPS_PER_EPOCH = 16  # at least, where the smallest batch allows
ENOUGH = 5000  # samples of which a tenth is enough to validate on


# --- data ----------------------------------------------------------------------------------------


def pictures(source: str, raw: Raw) -> list[Guess]:
    """The data section of images."""
    (column,) = raw.kinds
    height, width, *channels = column.shape
    found = [Guess("data.kind", "image", f"{len(raw):,} images"), Guess("data.source", source)]
    if column.resized:
        found += [
            Guess("data.preprocess.size", [height, width], raw.notes[0]),
            Guess("data.preprocess.color", "rgb" if channels else "grey", "as the pictures are"),
        ]
    given = "the source has a test part" if raw.given_test is not None else ""
    return found + _split(len(raw), given, None)


def rows(source: str, frame: pd.DataFrame, target: str | None = None) -> list[Guess]:
    """The data section of interactions, of a series, of a table or of texts.

    Args:
        target: the column to predict, where a person has named it; several with commas between
            are labels.

    Raises:
        DataError: when there is no such column, or nothing to predict from.
    """
    if len(frame) == 0 or len(frame.columns) < 2:
        raise DataError(
            f"{source}: must have rows, a column to predict and at least one to predict it from, "
            f"but has {len(frame)} rows and {len(frame.columns)} columns"
        )
    sequence = guess_sequences.series(source, frame, target)
    if sequence is None and target is None:
        sequence = guess_sequences.interactions(source, frame)
    if sequence is not None:
        return sequence
    profiles = {name: profile(str(name), frame[name]) for name in frame.columns}
    labels = guess_labels.find(frame, profiles, target)
    if labels is not None:
        targets, task, predicted = labels.columns, "classification", labels.guesses
    else:
        target, why = _target(source, frame, profiles, target)
        if profiles[target].kind == "useless" and frame[target].dtype.kind not in "iuf":
            raise DataError(
                f"{source}: {target!r} cannot be predicted ({profiles[target].reason}): name "
                "another column with --target"
            )
        targets = (target,)
        task, task_reason = _task(frame[target])
        predicted = [Guess("data.target", target, why), Guess("data.task", task, task_reason)]
    split = next((n for n, p in profiles.items() if says_split(p, frame[n])), None)
    features = {n: p for n, p in profiles.items() if n not in (*targets, split)}
    groups = [n for n in features if split is None and is_group(str(n), frame[n])]
    times = [n for n, p in features.items() if p.kind == "date" and not groups and split is None]
    ordered = [n for n in times if frame[n].notna().all() and is_ordered(frame[n])]
    texts = {name: p.words for name, p in features.items() if p.kind == "text"}
    if texts and task == "classification":
        longest = max(texts, key=lambda name: texts[name])
        others = [str(name) for name in features if name != longest]
        if labels is None:  # a text has no task but this
            reason = "; ".join(made.reason for made in predicted)
            predicted = [Guess("data.target", targets[0], reason)]
        found = [
            Guess("data.kind", "text", f"{longest} holds free texts, {features[longest].reason}"),
            Guess("data.source", source),
            Guess("data.text", longest, f"not read: {_some(others) or 'nothing'}"),
            *predicted,
        ]
        most = int(frame[longest].astype(str).str.len().max())
        if most > TextPreprocess().characters:
            found.append(Guess("data.preprocess.characters", most, "the longest text has them"))
        return found + _split(len(frame), "", split)
    aside = {*groups[:1], *ordered[:1]}
    left_out = {
        n: p for n, p in features.items() if p.kind in ("useless", "text") and n not in aside
    }
    used = features.keys() - left_out.keys() - aside
    if not used:
        told = "; ".join(f"{name}: {p.reason}" for name, p in left_out.items())
        raise DataError(f"{source}: no column is left to predict {targets[0]!r} from ({told})")
    count = Counter(features[name].kind for name in used)
    kinds = f"{count['number']} columns of numbers, {count['category']} of categories"
    if count["date"]:
        kinds += f", {count['date']} of dates"
    found = [
        Guess("data.kind", "table", f"{len(frame):,} rows; {kinds}"),
        Guess("data.source", source),
        *predicted,
    ]
    if left_out:
        reasons = [
            f"{name}: {'free texts, ' * (p.kind == 'text')}{p.reason}"
            for name, p in left_out.items()
        ]
        found.append(Guess("data.drop", [str(name) for name in left_out], _some(reasons)))
    codes = [n for n in frame.columns if n in used and is_code(str(n), features[n], frame[n])]
    if codes:
        types = {str(name): "category" for name in codes}
        found.append(Guess("data.types", types, "numbers that only name something"))
    numbers = [n for n in used if features[n].kind in ("number", "date") and n not in codes]
    if any(features[name].kind == "number" for name in numbers):
        found.append(Guess("data.preprocess.scale", "quantile", "long tails do no harm"))
    if len(frame) >= RARE[0] and (count["category"] or codes):
        found.append(Guess("data.preprocess.rare", RARE[1], "too few rows to learn from"))
    empty = sum(bool(frame[name].isin([np.nan, np.inf, -np.inf, ""]).any()) for name in numbers)
    if empty:
        found.append(Guess("data.preprocess.missing", "median", f"{empty} columns have gaps"))
    found += _split(len(frame), "", split)
    if groups:
        distinct = frame[groups[0]].nunique()
        reason = f"{distinct:,} values; the rows of one stay in one split"
        found.append(Guess("data.split.group", groups[0], reason))
    elif ordered:
        reason = "the rows are in its order: the test is what came last"
        found.append(Guess("data.split.time", ordered[0], reason))
    return found


def _target(
    source: str, frame: pd.DataFrame, profiles: dict[Any, Profile], asked: str | None
) -> tuple[str, str]:
    """The column to predict, and why."""
    names = list(frame.columns)
    if asked is not None:
        if asked not in names:
            raise DataError(f"{source}: no column {asked!r}, {nearest(asked, map(str, names))}")
        return asked, "as asked"
    named = [n for t in TARGETS for n in names if str(n).lower() == t]
    if named:
        return named[0], "by its name"
    able = [n for n in names if profiles[n].kind in ("number", "category")]
    able = [n for n in able if not says_split(profiles[n], frame[n])]
    if not able:
        raise DataError(
            f"{source}: no column can be predicted (all are ids, free texts or of one value): name "
            "one with --target"
        )
    last = "the last column" if able[-1] == names[-1] else "the last column of numbers or classes"
    return able[-1], last


def _task(values: pd.Series) -> tuple[str, str]:
    import pandas as pd

    present = values.dropna()
    distinct = present.nunique()
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        return "classification", f"{distinct} distinct values"
    few = min(FEW_CLASSES, max(3, len(values) // 5))
    if is_whole(present) and distinct <= few:
        return "classification", f"{distinct} distinct whole numbers"
    return "regression", f"numbers from {present.min():g} to {present.max():g}"


def _split(n: int, given: str, column: str | None) -> list[Guess]:
    if column is not None:
        test = [
            Guess("data.split.test", "given", f"{column} says train or test"),
            Guess("data.split.column", column, "it says nothing else"),
        ]
    elif given:
        test = [Guess("data.split.test", "given", given)]
    else:
        test = [Guess("data.split.test", 0.2, "a share, drawn by chance: there is no test part")]
    share = 0.1 if n >= ENOUGH else 0.2
    return [*test, Guess("data.split.validation", share, f"{n:,} samples")]


# --- everything else -----------------------------------------------------------------------------


def training(dataset: Dataset) -> list[Guess]:
    """Model, training, study and gate for data that are read already."""
    n, column = len(dataset.train), dataset.schema.columns[0]
    kind = KINDS.get(column.kind, "table")
    batch = _batch(n)
    steps = max(1, n // batch)
    epochs = max(3, min(EPOCHS[kind], -(-STEPS // steps)))
    lr = 0.005 if kind == "text" else 0.003
    metric, reason = _metric(dataset)
    weights = _weights(dataset)
    measured, mode = "val_loss" if dataset.schema.classes else "val_mae", "min"
    if kind in ("interactions", "series"):
        metric, mode, reason = guess_sequences.MEASURES[dataset.schema.task]
        measured = f"val_{metric}"
    space = {
        "train.optimizer.lr": {"loguniform": [round(lr / 5, 6), round(lr * 5, 6)]},
        "model.dropout": {"uniform": [0.0, 0.5]},
    }
    return [
        *_model(kind, dataset),
        Guess("train.epochs", epochs, f"about {epochs * steps:,} steps"),
        Guess("train.batch", batch, f"{n:,} training samples, {steps} steps an epoch"),
        Guess("train.shards", Train(batch=batch).n_shards, "workers it can grow to; divides batch"),
        Guess("train.optimizer.name", "adamw", "rarely the worst choice"),
        Guess("train.optimizer.lr", lr, "the study looks around it"),
        Guess("train.optimizer.weight_decay", DECAY.get(kind, 0.01), f"usual for {kind}"),
        Guess("train.schedule.name", "cosine", "ends with small steps"),
        Guess("train.schedule.warmup", 0.1, "a tenth of the steps"),
        *[made for made in weights if made.path.startswith("train.")],
        Guess("train.early_stop.metric", measured, "finer than a count of errors"),
        Guess("train.early_stop.patience", max(3, epochs // 5), "a fifth of the epochs"),
        Guess("workers.min", 1, "starts on any machine"),
        Guess("workers.max", 2, "more machines take more, the model stays the same"),
        Guess("tune.metric", measured, "as early_stop"),
        Guess("tune.mode", mode, f"{'less' if mode == 'min' else 'more'} is better"),
        Guess("tune.trials", 8, "a small study; most stop early"),
        Guess("tune.space", space, "what matters most"),
        *[made for made in weights if not made.path.startswith("train.")],
        Guess("gate.metric", metric, reason),
        Guess("gate.beats", ["baseline", "champion"], "the least; add linear, or at_least"),
        Guess("serve.port", 8000, "the default"),
    ]


def _batch(n: int) -> int:
    """The largest power of two that leaves `STEPS_PER_EPOCH`, so that shards divide it."""
    least, most = BATCH
    if n < least:
        raise DataError(f"a training split needs at least {least} samples, but has {n}: add some")
    return max(least, min(most, 1 << max(0, (n // STEPS_PER_EPOCH).bit_length() - 1)))


def _model(kind: str, dataset: Dataset) -> list[Guess]:
    if kind in ("interactions", "series"):
        return guess_sequences.model(dataset)
    shape, n = dataset.preprocess.input_shape, len(dataset.train)
    small = n < 1000
    if kind == "text":
        return [
            Guess("model.name", "text_bag", "words and their pairs; text_cnn reads order"),
            Guess("model.ngrams", 1 if small else 2, f"{n:,} training texts"),
            Guess("model.dropout", 0.5, "of whole words"),
        ]
    if kind == "image" and min(shape[1:]) >= 4:
        halvings = max(1, min(5, round(float(np.log2(min(shape[1:]) / 7)))))
        return [
            Guess("model.name", "cnn", "images"),
            Guess("model.width", 16 if small else 32, f"{n:,} training images"),
            Guess("model.blocks", halvings, f"halvings of {shape[1]} x {shape[2]} pixels"),
            Guess("model.dropout", 0.2, "the study looks around it"),
        ]
    if "columns" in dataset.preprocess.facts:
        return [
            Guess("model.name", "table_resnet", "a vector for each column of a table"),
            Guess("model.bins", 16 if small else 64, f"{n:,} training samples"),
            Guess("model.embedding", 8 if small else 32, "as bins"),
            Guess("model.width", 32 if small else 128, "as bins"),
            Guess("model.depth", 0 if small else 1, "as bins"),
            Guess("model.dropout", 0.3 if small else 0.2, "the study looks around it"),
        ]
    return [
        Guess("model.name", "mlp", f"{int(np.prod(shape))} numbers a sample"),
        Guess("model.width", 32 if small else 64, f"{n:,} training samples"),
        Guess("model.depth", 1 if small else 2, "as width"),
        Guess("model.dropout", 0.2, "the study looks around it"),
    ]


def _weights(dataset: Dataset) -> list[Guess]:
    """For classes or labels of which one is rare."""
    classes = dataset.schema.classes
    if not classes:
        return []
    if dataset.schema.task == "multilabel":
        shares = dataset.train.y.mean(axis=0)
        if min(shares.min(), 1 - shares.max()) >= 0.25:
            return []
        best = "where each label is found best, on the validation split"
        return [Guess("evaluate.threshold", "f1", best)]
    share = np.bincount(dataset.train.y.astype(int), minlength=len(classes)) / len(dataset.train)
    if share.min() >= 0.5 / len(classes):
        return []
    found = [Guess("train.class_weights", "balanced", "a rare class counts as much as the others")]
    if len(classes) == 2:
        back = "takes the weights back out of the probabilities"
        best = "where both classes are found best, on the validation split"
        found.append(Guess("evaluate.calibrate", "platt", back))
        found.append(Guess("evaluate.threshold", "f1_macro", best))
    return found


def _metric(dataset: Dataset) -> tuple[str, str]:
    """What the gate looks at, and why."""
    if not dataset.schema.classes:
        return "mae", "the mean error, in the target's own unit"
    if dataset.schema.task == "multilabel":
        return "average_precision", "the mean over labels, whatever their thresholds"
    counts = np.bincount(dataset.train.y.astype(int), minlength=len(dataset.schema.classes))
    rarest = int(counts.argmin())
    share = counts[rarest] / counts.sum()
    named = dataset.schema.classes[rarest]
    said = f"{len(counts)} classes, {100 * share:.2g} % of the samples are {named!r}"
    if share >= 0.5 / len(counts):
        return "accuracy", said
    # It is measured where a part holds both classes.
    if len(counts) == 2 and all(len(set(p.y)) == 2 for p in (dataset.validation, dataset.test)):
        return "auc", f"{said}: accuracy would praise a model that never says so"
    return "f1_macro", f"{said}: the mean over classes, since accuracy would forget the rare ones"


# --- the file ------------------------------------------------------------------------------------


def render(guesses: Sequence[Guess], title: str) -> str:
    """The YAML, a line for each guess with its reason behind it."""
    lines = [f"# {_line(title)}"]
    opened: list[str] = []
    for guess in guesses:
        *sections, key = guess.path.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        opened = sections
        comment = f"  # guessed: {_line(guess.reason)}" if guess.reason else ""
        lines.append(f"{'  ' * len(sections)}{key}: {render_value(guess.value)}{comment}")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _some(texts: Sequence[str], most: int = 4) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if texts[most:] else "")
