"""Predict files of any size: a part for each block of rows, then the whole.

What was done is kept beside the output until all of it is there, so that a second call goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow.fs as pafs
import ray

from lepton_ray import storage
from lepton_ray.errors import InputError, LeptonRayError, RunError
from lepton_ray.jobs import session
from lepton_ray.priority import give_way
from lepton_ray.serving import blocks, parts
from lepton_ray.serving.blocks import Block, Source
from lepton_ray.serving.files import Files, read_files, write_files
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import Runtime
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import registry

ALONE = 4  # blocks that one process does sooner than a Ray starts


def predict(
    reference: str,
    paths: Sequence[str],
    *,
    output: str | None,
    keep: Sequence[str] = (),
    address: str | None = None,
    terminal: Terminal,
) -> dict[str, Any]:
    """Predict every row of files, or every picture; what was written, and how much.

    Up to `ALONE` blocks are done in this process, more on Ray Data. A call that was ended goes on
    when it is made again.

    Args:
        paths: JSONL, CSV or Parquet files, or folders of them; for a model of images also
            pictures and folders of pictures.
        output: a ``.jsonl``, ``.csv`` or ``.parquet`` file; by default lines of JSON are told to
            the terminal, and nothing is kept.
        keep: columns of the input to repeat before the answers.
        address: of a Ray cluster, which then is used at any size.

    Raises:
        InputError: for what cannot be read or does not fit the model; no output is written then.
    """
    runtime = load_model(reference)
    suffix = PurePosixPath(output).suffix if output else ".jsonl"
    if suffix not in parts.FORMATS:
        raise InputError(f"the output must end with {', '.join(parts.FORMATS)}, but is {output!r}")
    keep = list(dict.fromkeys(keep))
    parts.check_kept(runtime.schema, suffix, keep)
    source = blocks.find(runtime.schema, paths, keep)
    blocks.check_output(output, paths)
    shown = [blocks.FILE] if source.pictures else keep
    if output is None:
        for block in source.blocks:
            for line in parts.lines(runtime, block, shown):
                terminal.say(line)
        return {"rows": source.rows, "output": None}
    start = time.monotonic()
    with _Parts.open(output, _plan_of(runtime, source, keep, suffix), terminal) as made:
        missing = [n for n in range(len(source.blocks)) if not made.has(n)]
        if done := len(source.blocks) - len(missing):
            terminal.say(f"predict goes on after {done} of {len(source.blocks)} parts")
        work = _Work(source, shown, suffix, made.folder)
        if not session.is_embedded(address) or len(missing) > ALONE:
            numbers = _on_ray(reference, runtime, work, missing, address)
        else:
            numbers = (work.do(runtime, number) for number in missing)
        for count, _ in enumerate(numbers, done + 1):
            terminal.progress(f"predict {count} of {len(source.blocks)} parts")
        made.join(len(source.blocks), partial(_join, runtime, shown, suffix))
    seconds = time.monotonic() - start
    terminal.say(f"{source.rows:,} predictions written to {output} in {seconds:.1f} s")
    return {"rows": source.rows, "output": output, "parts": len(source.blocks), "done_before": done}


def _join(
    runtime: Runtime,
    keep: Sequence[str],
    suffix: str,
    read: Sequence[Callable[[], bytes]],
    into: Any,
) -> None:
    parts.join(read, into, runtime.schema, keep, suffix)


def _plan_of(runtime: Runtime, source: Source, keep: Sequence[str], suffix: str) -> str:
    """What the parts are made of and by, to the letter."""
    return json.dumps(
        {
            "model": f"{runtime.name}/{runtime.version}",
            "files_of_model": runtime.manifest["files"],
            "input": source.files,
            "keep": keep,
            "format": suffix,
            "block": [blocks.ROWS, blocks.BYTES, blocks.PICTURES],
        },
        sort_keys=True,
    )


class _Work:
    """One block after the other; goes to where it is done."""

    def __init__(self, source: Source, keep: Sequence[str], suffix: str, folder: str) -> None:
        self._source = source
        self._keep = keep
        self._suffix = suffix
        self._folder = folder

    def do(self, runtime: Runtime, number: int) -> int:
        """Write the part of a block.

        Raises:
            InputError: when its rows cannot be read or do not fit.
            RunError: when the part cannot be written.
        """
        block: Block = self._source.blocks[number]
        part = parts.content(runtime, block, self._keep, self._suffix, self._source.kept)
        filesystem, folder = storage.open_folder(self._folder)
        try:
            storage.write(filesystem, f"{folder}/{_name(number)}", part)
        except OSError as error:
            raise RunError(f"{self._folder} cannot be written: {error}") from error
        return number


def _on_ray(
    reference: str, runtime: Runtime, work: _Work, missing: list[int], address: str | None
) -> Iterator[int]:
    """The numbers of the blocks as they are done, on all of the cluster's processors.

    Raises:
        InputError, RunError: as `_Work.do` does there.
    """
    with session.session(address):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        files = ray.put(read_files(registry.resolve(f"{runtime.name}/{runtime.version}").folder()))
        most = max(1, min(len(missing), int(session.resources().get("CPU", 1))))
        done = ray.data.from_items(
            [{"number": number} for number in missing], override_num_blocks=len(missing)
        ).map(
            cast(Any, _Worker),  # Ray's types have only functions here
            fn_constructor_args=([files], runtime.name, runtime.version, [ray.put(work)]),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=1,
        )
        for row in done.iter_rows():
            if row["error"]:
                kind = InputError if row["exit_code"] == InputError.exit_code else RunError
                raise kind(row["error"])
            yield row["number"]


class _Worker:
    """Of Ray Data: has the model, does blocks.

    An error is its answer: raised, Ray would tell it in its own words.
    """

    def __init__(
        self,
        files: list[ray.ObjectRef[Files]],
        name: str,
        version: int,
        work: list[ray.ObjectRef[_Work]],
    ) -> None:
        give_way()
        self._work: _Work = ray.get(work[0])
        with tempfile.TemporaryDirectory() as folder:
            write_files(ray.get(files[0]), Path(folder))
            self._runtime = Runtime.load(Path(folder), name=name, version=version)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        try:
            self._work.do(self._runtime, number)
        except LeptonRayError as error:
            return {"number": number, "error": str(error), "exit_code": error.exit_code}
        return {"number": number, "error": "", "exit_code": 0}


class _Parts:
    """The folder of parts beside an output."""

    def __init__(self, output: str, folder: str, filesystem: pafs.FileSystem, path: str) -> None:
        self.folder = folder
        self._output = output
        self._filesystem = filesystem
        self._path = path
        self._there: set[str] = set()

    @staticmethod
    @contextlib.contextmanager
    def open(output: str, plan: str, terminal: Terminal) -> Iterator[_Parts]:
        """Made, or found again with what is in it where it is of the same plan.

        Raises:
            InputError: when it cannot be written, or another process is at it.
        """
        folder = f"{output}.parts"
        filesystem, path = storage.open_folder(folder)
        parts_ = _Parts(output, folder, filesystem, path)
        try:
            if not storage.is_uri(output) and not Path(path).parent.is_dir():
                raise InputError(f"{output!r} cannot be written: its folder does not exist")
            filesystem.create_dir(path)
            with _alone(folder, None if storage.is_uri(output) else Path(path)):
                parts_.resume(plan, terminal)
                yield parts_
        except OSError as error:
            raise InputError(f"{output!r} cannot be written: {error}") from error

    def resume(self, plan: str, terminal: Terminal) -> None:
        """Keep the parts of the same plan; others are in nobody's way any more."""
        try:
            same = storage.read(self._filesystem, f"{self._path}/plan.json").decode() == plan
        except FileNotFoundError:
            same = False
        listed = self._filesystem.get_file_info(pafs.FileSelector(self._path))
        names = {info.base_name for info in listed if info.base_name.startswith("part-")}
        if not same:
            if names:
                terminal.say(
                    f"predict starts anew: what {self.folder} holds is of another model or input"
                )
            for name in names:
                self._filesystem.delete_file(f"{self._path}/{name}")
            storage.write(self._filesystem, f"{self._path}/plan.json", plan.encode())
            names = set()
        self._there = names

    def has(self, number: int) -> bool:
        """Whether a part was there when this was opened."""
        return _name(number) in self._there

    def join(self, count: int, join: Callable[[Sequence[Callable[[], bytes]], Any], None]) -> None:
        """The output from all parts, which then are removed."""
        read = [
            partial(storage.read, self._filesystem, f"{self._path}/{_name(n)}")
            for n in range(count)
        ]
        filesystem, path = storage.open_folder(self._output)
        local = isinstance(filesystem, pafs.LocalFileSystem)
        aside = f"{path}.tmp" if local else path
        with filesystem.open_output_stream(aside) as into:
            join(read, into)
        if local:
            os.replace(aside, path)
        self._filesystem.delete_dir(self._path)


def _name(number: int) -> str:
    return f"part-{number:06}"


@contextlib.contextmanager
def _alone(folder: str, path: Path | None) -> Iterator[None]:
    """One process at a time writes parts; where files can be locked.

    Raises:
        InputError: while another one does.
    """
    if path is None:
        yield
        return
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is writing {folder}: wait for it, or end it"
            ) from None
        yield
