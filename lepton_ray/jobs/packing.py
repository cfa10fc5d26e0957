"""What of this folder an experiment needs on a cluster, and nothing else."""

from __future__ import annotations

import hashlib
import modulefinder
import shutil
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from pathspec import GitIgnoreSpec

from lepton_ray.config import render, with_settings
from lepton_ray.config.schema import Experiment
from lepton_ray.data import pretrained
from lepton_ray.data.frames import PATTERN
from lepton_ray.errors import ExperimentError, InputError

LIMIT_MB = 100  # what Ray's job server takes
EXPERIMENT = "experiment.yaml"
ALWAYS_OUT = GitIgnoreSpec.from_lines([".git/", "__pycache__/", ".venv/", "*.pyc"])


def pack(experiment: Experiment, root: Path, target: Path) -> str:
    """Copy the experiment, its data and its own modules into an empty folder.

    Args:
        root: the folder the experiment's paths start from, and its modules are imported from.

    Returns:
        SHA-256 of the names and contents.

    Raises:
        ExperimentError: when the data or the model's module are not there.
        InputError: when it is more than the job server takes, naming the largest files.
    """
    files: dict[str, Path] = {}
    experiment = _add_data(experiment, root, files)
    if experiment.serve.keys and (root / experiment.serve.keys).is_file():
        files[experiment.serve.keys] = root / experiment.serve.keys
    if (place := pretrained.local_path(experiment.model.name)) is not None:
        place = _add_source(experiment, place, root, files, "model.name")
        # With ./, since it must be a path there too.
        name = f"{pretrained.PREFIX}{'' if Path(place).is_absolute() else './'}{place}"
        experiment = with_settings(experiment, {"model.name": name})
    elif not pretrained.is_pretrained(experiment.model.name):
        for path in modules(experiment.model.name, root, experiment.name):
            files[path.relative_to(root).as_posix()] = path
    _check_size(files)
    digest = hashlib.sha256()
    for name, content in [(EXPERIMENT, render(experiment).encode())]:
        (target / name).write_bytes(content)
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for name, path in sorted(files.items()):
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        with path.open("rb") as file:
            content_digest = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content_digest}\0".encode())
    return digest.hexdigest()


def _add_data(experiment: Experiment, root: Path, files: dict[str, Path]) -> Experiment:
    """The experiment as the cluster finds its data, which go along unless they are there."""
    source = experiment.data.source
    if isinstance(source, str) and not PATTERN.search(source):
        return with_settings(
            experiment, {"data.source": _add_source(experiment, source, root, files)}
        )
    names: list[str] = []
    for one in (source,) if isinstance(source, str) else source:
        here = ":" not in one.split("/")[0] and PATTERN.search(one) and not Path(one).is_absolute()
        matching = sorted(str(p.relative_to(root)) for p in root.glob(one)) if here else [one]
        names += [_add_source(experiment, name, root, files) for name in matching or [one]]
    return with_settings(experiment, {"data.source": names})


def _add_source(
    experiment: Experiment,
    source: str,
    root: Path,
    files: dict[str, Path],
    setting: str = "data.source",
) -> str:
    """What a source is called there."""
    if ":" in source.split("/")[0]:  # sklearn:digits, s3://..., package.module:function
        for path in modules(source, root, experiment.name) if "://" not in source else ():
            files[path.relative_to(root).as_posix()] = path
        return source
    path = Path(source)
    found = path if path.is_absolute() else root / path
    if not found.exists():
        if path.is_absolute():
            return source  # a folder that the cluster's machines mount
        raise ExperimentError(
            experiment.name,
            [
                f"{setting}: {source!r} does not exist in {root}; a path that only the cluster "
                "has must be absolute"
            ],
        )
    inside = not path.is_absolute() and ".." not in path.parts
    name = path.as_posix() if inside else f"data/{found.resolve().name}"
    if found.is_dir():
        for file in sorted(p for p in found.rglob("*") if p.is_file()):
            files[f"{name}/{file.relative_to(found).as_posix()}"] = file
    else:
        files[name] = found
    return name


def modules(model: str, root: Path, source: str) -> list[Path]:
    """The files of ``package.module:function`` and of all it imports from ``root``.

    A package goes whole, for it may read files of its own; what .gitignore names stays here.

    Raises:
        ExperimentError: when the module cannot be read.
    """
    name, colon, _ = model.partition(":")
    if not colon or PathFinder.find_spec(name.split(".")[0], [str(root)]) is None:
        return []  # built in, or of a package that is installed there too
    finder = modulefinder.ModuleFinder(path=[str(root)])
    try:
        finder.import_hook(name)
    except (ImportError, SyntaxError) as error:
        raise ExperimentError(
            source, [f"model.name: {model!r} cannot be packed: {error}"]
        ) from None
    tops = {
        found.split(".")[0]
        for found, module in finder.modules.items()
        if getattr(module, "__file__", None)
    } - {"lepton_ray"}  # is there, in the cluster's version
    selected: list[Path] = []
    for top in sorted(tops):
        folder, file = root / top, root / f"{top}.py"
        selected += [file] if file.is_file() else list(walk(folder, root))
    return selected


def walk(folder: Path, root: Path) -> Iterator[Path]:
    """The files of a folder but those that a .gitignore in it or above it names."""
    rules = [(root, ALWAYS_OUT)]
    above = [root]
    for part in folder.relative_to(root).parts:
        above.append(above[-1] / part)
    for place in above[:-1]:
        rules += _rules(place)
    yield from _walk(folder, rules)


def _walk(folder: Path, rules: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
    rules = rules + _rules(folder)
    for path in sorted(folder.iterdir()):
        slash = "/" if path.is_dir() else ""
        if any(s.match_file(path.relative_to(at).as_posix() + slash) for at, s in rules):
            continue
        if path.is_dir():
            yield from _walk(path, rules)
        elif path.is_file():
            yield path


def _rules(folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    file = folder / ".gitignore"
    if not file.is_file():
        return []
    return [(folder, GitIgnoreSpec.from_lines(file.read_text().splitlines()))]


def _check_size(files: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total <= LIMIT_MB << 20:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    shown = ", ".join(f"{name} ({size / (1 << 20):,.1f} MiB)" for name, size in largest)
    raise InputError(
        f"the job is {total / (1 << 20):,.1f} MiB, a cluster takes at most {LIMIT_MB}; the "
        f"largest files: {shown}. Put the data where the machines find them and name that folder, "
        "absolute, in data.source (a model's in model.name); files that are not needed belong into "
        ".gitignore"
    )
