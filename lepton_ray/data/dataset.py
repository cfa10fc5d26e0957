"""From a data section to arrays a model can train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import ImageData, TableData, TextData
from lepton_ray.data import drift, features, leaks, preprocess, room, sources, split, words
from lepton_ray.data.drift import Bins
from lepton_ray.data.fitted import Fitted
from lepton_ray.data.hands import Hands, Own, enough
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.pretrained import Pixels, Pretrained
from lepton_ray.data.schema import Schema
from lepton_ray.data.slices import Groups
from lepton_ray.errors import DataError

BLOCK = 1 << 23  # bytes of the rows that are prepared together


@dataclass(frozen=True, kw_only=True)
class Samples:
    x: Any
    """[n, *input_shape] An array, or what makes the rows of one when they are asked for."""
    y: Any
    """[n] Index into the classes, or the target's value; [n, classes] 1 for each label
    of a sample; [n, items] 1 for an item to find, -1 for one had before; or [n, horizon] values."""

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, rows: npt.NDArray[np.int64], key: int) -> tuple[Any, Any]:
        """x and y of some samples in a training step.

        Args:
            key: of what is drawn for them by chance.
        """
        return self.x[rows], self.y[rows]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    schema: Schema
    preprocess: Fitted
    train: Samples
    validation: Samples
    test: Samples
    test_columns: dict[str, Any]
    """The test split as a person would send it: column name -> raw values [n, ...]."""
    digest: str
    """SHA-256 over all raw values, labels and the split, and over what was pretrained."""
    pretrained: Pretrained | None = None
    """What the model starts from, where that was trained before."""
    slices: Groups = field(default_factory=dict)
    """Column -> group [n] of each sample of the test split."""
    bins: Mapping[str, Bins] = field(default_factory=dict)
    """What later rows are compared with, see `drift`."""
    notes: tuple[str, ...] = ()
    """What a person should know about the samples, for the plan to tell."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What only the data can tell a model, by the name of its argument (`models.FACTS`)."""
        if self.pretrained is None:
            return self.preprocess.facts
        return {**self.preprocess.facts, "starts_from": self.pretrained}


def load(
    data: ImageData | TableData | TextData,
    sliced: Sequence[str] = (),
    pretrained: Pretrained | None = None,
    hands: Hands | None = None,
) -> Dataset:
    """Read, split, fit the preprocessing on the training split, apply it to all.

    Args:
        sliced: columns to group the test split by, as ``evaluate.slices`` says.
        pretrained: prepares texts by its tokenizer, and images to the size, channels and range it
            was trained on.
        hands: for many rows.

    All samples are held as the model takes them, many rows of a table on disk (see `room`), and
    those of the test split also as the source has them.

    Raises:
        DataError: see `sources.read`, `split.divide` and `preprocess`.
    """
    own = pretrained.samples if pretrained is not None else None
    pixels = own if isinstance(own, Pixels) else None
    raw = sources.read(data, sliced, pixels, hands)
    if hands is None or isinstance(data, ImageData):  # to send pictures takes longer than to scale
        hands = Own()
    size = _size(raw)
    hands = enough(size, hands)
    together = max(1, BLOCK * len(raw) // max(1, size))
    classes, y = _classes(data, raw)
    parts = split.divide(raw.labels, data.split, raw.given_test, groups=raw.groups, times=raw.times)
    columns = {part: _Part(raw.columns, indices) for part, indices in parts.items()}
    if isinstance(data, ImageData):
        fitted = (
            preprocess.adopt_image(raw.kinds[0], pixels)
            if pixels is not None
            else preprocess.fit_image(
                raw.kinds[0], columns["train"]["image"], data.preprocess.normalize
            )
        )
    elif isinstance(data, TableData):
        fitted = preprocess.fit_table(raw.kinds, columns["train"], data.preprocess, hands)
    else:
        texts = columns["train"][data.text]
        fitted = preprocess.fit_text(raw.kinds[0], texts, data.preprocess, pretrained)
    if not classes:
        log = isinstance(data, TableData) and data.target_log
        fitted = preprocess.fit_target(fitted, y[parts["train"]], log)
    samples = {
        part: Samples(x=_inputs(fitted, raw, indices, hands, together), y=y[indices])
        for part, indices in parts.items()
    }
    # The words of the training texts are those that are known: they would tell of no unknown ones.
    unlike = "validation" if isinstance(data, TextData) else "train"
    return Dataset(
        schema=Schema(
            columns=fitted.columns,
            target=raw.target,
            classes=classes,
            task="multilabel" if raw.names else "",
        ),
        preprocess=fitted,
        test_columns=dict(columns["test"]),
        digest=_digest(raw, parts, pretrained),
        pretrained=pretrained,
        bins=drift.fit(fitted, columns[unlike]),
        slices={name: groups[parts["test"]] for name, groups in raw.slices.items()},
        notes=_notes(fitted, raw, pretrained) + _warnings(data, raw, y, parts, hands),
        **samples,
    )


def _size(raw: sources.Raw) -> int:
    """Bytes of the rows, about: those of texts are what a hundredth of them has."""
    texts = [v[:: len(v) // 100 + 1] for v in raw.columns.values() if v.dtype == object]
    mean = sum(sum(map(len, some)) / len(some) for some in texts)
    return int(len(raw) * mean) + sum(v.nbytes for v in raw.columns.values())


def _inputs(
    fitted: Preprocess, raw: sources.Raw, rows: split.Indices, hands: Hands, together: int
) -> Any:
    """[n, *input_shape] Of these rows, made so many together."""
    blocks = [rows[at : at + together] for at in range(0, len(rows), together)]
    asked = ({name: v[some] for name, v in raw.columns.items()} for some in blocks)
    made: npt.NDArray[Any] | None = None
    at = 0
    for x in hands.map("blocks of rows", fitted.apply, asked, len(blocks)):
        if made is None:
            made = room.zeros((len(rows), *x.shape[1:]), x.dtype)
        made[at : at + len(x)] = x
        at += len(x)
    return made


class _Part(Mapping[str, npt.NDArray[np.generic]]):
    """The columns of some samples, taken out of the source when they are asked for."""

    def __init__(
        self, columns: Mapping[str, npt.NDArray[np.generic]], indices: split.Indices
    ) -> None:
        self._columns = columns
        self._indices = indices

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        return self._columns[name][self._indices]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _classes(
    data: ImageData | TableData | TextData, raw: sources.Raw
) -> tuple[tuple[str, ...], npt.NDArray[np.integer] | npt.NDArray[np.float64]]:
    """The classes and each sample's index, or its labels; no classes and the values where labels
    are numbers."""
    if raw.names:
        return raw.names, raw.labels.astype(np.int8)
    if raw.labels.dtype.kind == "f":
        return (), raw.labels.astype(np.float64)
    classes, y = np.unique(raw.labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"{data.source}: all labels are {str(classes[0])!r}; there is nothing to learn"
        )
    return tuple(str(c) for c in classes), y.astype(np.int64)


def _warnings(
    data: ImageData | TableData | TextData,
    raw: sources.Raw,
    y: npt.NDArray[Any],
    parts: dict[str, split.Indices],
    hands: Hands,
) -> tuple[str, ...]:
    told = split.check_labels(raw.names, y, parts) if raw.names else ""
    if isinstance(data, ImageData):
        return (told,) if told else ()
    found = leaks.warnings(raw.kinds, raw.columns, y, parts, data.split, raw.groups, hands)
    return (*((told,) if told else ()), *found)


def _notes(fitted: Preprocess, raw: sources.Raw, pretrained: Pretrained | None) -> tuple[str, ...]:
    told = []
    if pretrained is not None:
        told.append(f"starts from {pretrained.name}, weights SHA-256 {pretrained.sha256}")
    if fitted.features:
        return raw.notes + features.notes(fitted.columns, fitted.features)
    if fitted.tokenizer is None:
        return (*raw.notes, *told)
    (texts,) = raw.columns.values()
    counts = words.counts(fitted.tokenizer, texts.tolist())
    (length,) = fitted.input_shape
    nothing = words.counts(fitted.tokenizer, [""])[0]
    cut, empty = int((counts > length).sum()), int((counts == nothing).sum())
    notes = [f"{fitted.facts['vocabulary']:,} words are known, a text is {length} of them"]
    if cut:
        notes.append(f"{cut:,} of {len(texts):,} texts are longer and are cut")
    if empty:
        notes.append(f"{empty:,} of {len(texts):,} texts have no words")
    return (*notes, *told)


def _digest(
    raw: sources.Raw, parts: dict[str, split.Indices], pretrained: Pretrained | None
) -> str:
    digest = hashlib.sha256()
    for content in pretrained.identity() if pretrained is not None else ():
        digest.update(f"pretrained|{len(content)}|".encode() + content)
    arrays = [*raw.columns.items(), ("", raw.labels), *parts.items()]
    if raw.names:
        arrays.append(("names", np.array(raw.names)))
    for name, values in arrays:
        digest.update(f"{name}|{values.dtype}|{values.shape}".encode())
        if values.dtype == object:  # texts, each behind its length
            for text in values:
                content = text.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
        else:
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
