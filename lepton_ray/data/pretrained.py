"""A pretrained model of texts or images, ``hf:NAME``: its configuration, what prepares its samples,
and its weights, and no code.

NAME is a folder or a name on the Hugging Face hub. All is read once, by the driver, and travels to
the replicas with the data: no worker needs the folder or the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lepton_ray.errors import ExperimentError

PREFIX = "hf:"
WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
IMAGES = "preprocessor_config.json"
PATTERNS = [
    "config.json", "tokenizer*.json", "special_tokens_map.json", IMAGES, "model*.safetensors*"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Words:
    """How texts become what a model takes."""

    tokenizer: Tokenizer
    """Cuts and fills up nothing yet; see `words.adopt`."""
    padding: int
    """Number of the token that fills up a text."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How images become what a model takes."""

    mean: tuple[float, ...]
    """[channels] Of pixels from 0 to 255, as the next."""
    deviation: tuple[float, ...]
    size: tuple[int, int] | None
    """(height, width) that it was trained on; None where its files do not say."""

    @property
    def color(self) -> Literal["grey", "rgb"]:
        return "rgb" if len(self.mean) > 1 else "grey"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    name: str
    """As ``model.name`` has it."""
    config: Mapping[str, Any]
    samples: Words | Pixels
    weights: Mapping[str, npt.NDArray[np.uint8]]
    """File -> its content, all safetensors."""
    sha256: str
    """Of the file of weights, as the hub shows it; of several, over their names and digests."""

    def identity(self) -> Iterator[bytes]:
        """What the result of a training depends on."""
        yield self.sha256.encode()
        yield json.dumps(self.config, sort_keys=True).encode()
        given = self.samples
        yield (given.tokenizer.to_str() if isinstance(given, Words) else repr(given)).encode()


def is_pretrained(name: str) -> bool:
    """Whether ``model.name`` means one."""
    return name.startswith(PREFIX)


def local_path(name: str) -> str | None:
    """The folder that ``model.name`` means; None where it means one on the hub.

    A path from the working folder, as all paths of an experiment.
    """
    place = name.removeprefix(PREFIX)
    is_path = place.startswith((".", "/", "~")) or place.count("/") > 1 or Path(place).is_dir()
    return place if is_path and is_pretrained(name) else None


def read(name: str, kind: Literal["text", "image"]) -> Pretrained:
    """The model of texts or of images that ``model.name`` means.

    Raises:
        ExperimentError: when it is not there, lacks a file, or has weights in pickles only.
    """
    folder = _folder(name)
    config = _json(name, folder / "config.json")
    weights, digest = _weights(name, folder)
    return Pretrained(
        name=name,
        config=config,
        samples=_words(name, folder, config) if kind == "text" else _pixels(name, folder, config),
        weights=weights,
        sha256=digest,
    )


def _words(name: str, folder: Path, config: Mapping[str, Any]) -> Words:
    if not (folder / TOKENIZER).is_file():
        raise _problem(
            name,
            f"{folder} has no {TOKENIZER}: write it with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises nothing narrower
        raise _problem(name, f"{folder / TOKENIZER} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Words(tokenizer=tokenizer, padding=_padding(name, folder, config, tokenizer))


def _pixels(name: str, folder: Path, config: Mapping[str, Any]) -> Pixels:
    if not (folder / IMAGES).is_file():
        raise _problem(
            name,
            f"{folder} has no {IMAGES}, so that it is no model of images, or not whole: choose "
            "another, or write it with transformers' AutoImageProcessor",
        )
    told = _json(name, folder / IMAGES)
    scale = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
    channels = int(config.get("num_channels", 3))
    plain = not told.get("do_normalize", True)
    mean = [0.0] * channels if plain else told.get("image_mean", [])
    deviation = [1.0] * channels if plain else told.get("image_std", [])
    if channels not in (1, 3) or not len(mean) == len(deviation) == channels:
        raise _problem(
            name,
            f"it must take images of 1 or 3 channels, with a mean and a deviation of each, but has "
            f"{channels} in config.json, {len(mean)} and {len(deviation)} in {IMAGES}: choose "
            "another model",
        )
    return Pixels(
        mean=tuple(m / scale for m in mean),
        deviation=tuple(d / scale for d in deviation),
        size=_size(told.get("crop_size") if told.get("do_center_crop") else None)
        or _size(told.get("size"))
        or _size(config.get("image_size")),
    )


def _size(told: Any) -> tuple[int, int] | None:
    """(height, width) in one of the forms that the files of models have."""
    if isinstance(told, dict):
        side = told.get("shortest_edge")
        told = [told.get("height", side), told.get("width", side)]
    elif isinstance(told, int):
        told = [told, told]
    if isinstance(told, list) and len(told) == 2 and all(isinstance(n, int) for n in told):
        return told[0], told[1]
    return None


def _folder(name: str) -> Path:
    local = local_path(name)
    if local is not None:
        folder = Path(local).expanduser()
        if not folder.is_dir():
            raise _problem(name, f"no folder {local!r} (looked in {Path.cwd()}): correct it")
        return folder
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS)
        )
    except Exception as error:  # of the network, the hub, or the name's form
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _problem(
            name,
            f"neither a folder in {Path.cwd()} nor to be had from the Hugging Face hub ({said}): "
            "correct the name, or name a folder that holds the model, as hf:./FOLDER",
        ) from error


def _weights(name: str, folder: Path) -> tuple[dict[str, npt.NDArray[np.uint8]], str]:
    if (folder / INDEX).is_file():
        files = sorted(set(_json(name, folder / INDEX).get("weight_map", {}).values()))
    else:
        files = [WEIGHTS]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or not files:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        way_out = (
            f" but {pickles[0]}, a pickle, which can run code and is not read: convert it where "
            "you trust it, with transformers' from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if pickles
            else ": save the model with transformers' save_pretrained(FOLDER)"
        )
        raise _problem(name, f"{folder} has no {(missing or [WEIGHTS])[0]}{way_out}")
    weights = {file: np.fromfile(folder / file, np.uint8) for file in files}
    digests = {file: hashlib.sha256(content.data).hexdigest() for file, content in weights.items()}
    if len(files) == 1:
        return weights, digests[files[0]]
    told = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
    return weights, hashlib.sha256(told.encode()).hexdigest()


def _padding(name: str, folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    """The tokenizer's own settings name it, or the model's do."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        told = _json(name, folder / file) if (folder / file).is_file() else {}
        token = told.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (number := tokenizer.token_to_id(str(token))) is not None:
            return int(number)
    number = config.get("pad_token_id")
    if number is None:
        raise _problem(
            name,
            "names no token that fills up a text, neither as pad_token in tokenizer_config.json "
            "nor as pad_token_id in config.json: add one, such as its end-of-text token",
        )
    return int(number)


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _problem(name, f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _problem(name, f"{path} must hold an object of JSON, but holds {str(value)[:80]}")
    return value


def _problem(name: str, said: str) -> ExperimentError:
    return ExperimentError("experiment", [f"model.name: {name!r}: {said}"])
