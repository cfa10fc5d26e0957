"""Pictures: from a folder to pixels, a version and an answer."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.config.schema import ImageData, Limits, Model
from lepton_ray.data import images, pixels
from lepton_ray.data.images import ImageError
from lepton_ray.errors import DataError, InputError
from lepton_ray.pipeline import batch
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training.loop import Replica
from tests import apps

SHAPE = (8, 8, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lepton_ray" / "images"


def picture(number: int, color: str = "RGB", size: tuple[int, int] = (12, 9)) -> Image.Image:
    """[width, height] Noise around a colour: red for an even number, else blue."""
    rng = np.random.default_rng(number)
    values = rng.integers(0, 100, (size[1], size[0], 3), np.uint8)
    values[..., 2 * (number % 2)] += 150
    return Image.fromarray(values).convert(color)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def write(folder: Path, n: int = 12, **options: Any) -> Path:
    """Pictures red/0.png, red/2.png ... and blue/1.png ..."""
    for number in range(n):
        path = folder / ("red", "blue")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(picture(number, **options)))
    return folder


def load(folder: Path, **settings: Any) -> data.Dataset:
    section = {"kind": "image", "source": str(folder), **settings}
    section.setdefault("split", {"test": 0.25, "validation": 0.25})
    return data.load(ImageData.model_validate(section))


def everything(dataset: data.Dataset) -> int:
    return len(dataset.train) + len(dataset.validation) + len(dataset.test)


# --- one picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright(orientation: int, form: str) -> None:
    """A camera stores what it saw turned, and says in EXIF how: the decoder turns it back."""
    upright = Image.new("L", (16, 16), 0)
    upright.paste(255, (0, 0, 8, 8))
    upright.paste(128, (8, 0, 16, 8))
    stored_by = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of each, in Pillow's words
    stored = upright
    if orientation in stored_by:
        stored = upright.transpose(Image.Transpose(stored_by[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = images.decode(saved(stored, form, exif=exif), (2, 2), resized=True).astype(int)
    assert (abs(found - [[255, 128], [0, 0]]) < 60).all(), found


def test_scaling_covers_the_size_and_cuts_evenly() -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200  # the middle
    found = images.decode(saved(Image.fromarray(wide)), (4, 4), resized=True)
    assert (found == 200).all(), "what is cut off has no part in what stays"
    same = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert (images.decode(saved(Image.fromarray(same)), (4, 4), resized=True) == same).all()


def test_modes_become_what_is_asked_for() -> None:
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    palette = red.quantize(4)
    see_through = Image.new("P", (8, 8), 0)
    for image, options, color, grey in [
        (red, {}, (200, 0, 0), 60),
        (palette, {}, (200, 0, 0), 60),
        (clear, {}, (255, 255, 255), 255),
        (see_through, {"transparency": 0}, (255, 255, 255), 255),
        (Image.new("LA", (8, 8), (7, 255)), {}, (7, 7, 7), 7),
        (Image.new("1", (8, 8), 1), {}, (255, 255, 255), 255),
    ]:
        content = saved(image, **options)
        assert images.decode(content, (8, 8, 3), resized=True)[3, 3].tolist() == list(color)
        assert images.decode(content, (8, 8), resized=True)[3, 3] == grey
    print_colours = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert (abs(images.decode(print_colours, SHAPE, resized=True)[0, 0] - [254, 0, 0.0]) < 9).all()
    assert images.decode(saved(clear), (8, 8, 4), resized=True)[0, 0].tolist() == [9, 9, 9, 0]


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        code = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + code

    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b"")


MOVING = saved(picture(0), "GIF", save_all=True, append_images=[picture(1)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (saved(Image.fromarray(np.zeros((8, 8), np.uint16))), "8 bits a channel, .*got I;16"),
        (saved(picture(0))[:200], r"must be a whole BMP, GIF, JPEG, PNG or WEBP, but got 200 byt"),
        (saved(picture(0), "TIFF"), "must be a whole"),
        (b"", "must be a whole"),
        (claims(9_000, 9_000), "at most 67,108,864 pixels.*got 9000 x 9000"),
        (claims(60_000, 60_000), "at most 67,108,864 pixels"),
        (MOVING, "is a still picture"),
    ],
)
def test_what_is_no_still_picture_of_eight_bits_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        images.decode(content, SHAPE, resized=True)


def test_a_large_photo_is_unpacked_small() -> None:
    """Of a JPEG only an eighth of each side is computed; the result is near that of the whole."""
    photo = Image.fromarray(np.indices((1600, 1200)).sum(0).astype(np.uint8) // 16 * 16)
    found = images.decode(saved(photo, "JPEG", quality=95), (8, 8), resized=True)
    exact = images.decode(saved(photo), (8, 8), resized=True)
    assert abs(found.astype(int) - exact).max() <= 3


# --- a folder ------------------------------------------------------------------------------------


def test_a_folder_is_read_by_its_class_folders(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "p"))
    assert dataset.schema.classes == ("blue", "red")
    assert everything(dataset) == 12
    assert dataset.train.x.shape[1:] == (3, 9, 12), "small pictures of one size stay as they are"
    assert dataset.notes == (
        "pictures are taken at 9 x 12 (height x width), rgb; at the median they have 9 x 12 "
        "(data.preprocess)",
    )
    colors = dataset.test_columns["image"].mean(axis=(1, 2))
    assert ((colors[:, 0] > colors[:, 2]) == (dataset.test.y == 1)).all(), "red is of red"


def test_what_the_settings_leave_open_is_taken_from_the_pictures(tmp_path: Path) -> None:
    wide = load(write(tmp_path / "wide", 8, size=(200, 100)))
    assert wide.schema.columns[0].shape == (32, 64, 3)
    grey = load(write(tmp_path / "grey", 8, color="L"))
    assert grey.schema.columns[0].shape == (9, 12)
    (tmp_path / "grey" / "red" / "0.png").write_bytes(saved(picture(0)))
    assert load(tmp_path / "grey").schema.columns[0].shape == (9, 12, 3)
    told = load(tmp_path / "grey", preprocess={"size": [5, 4], "color": "grey"})
    assert told.schema.columns[0].shape == (5, 4)
    assert told.notes == ("pictures are taken at 5 x 4 (height x width), grey",)


def test_a_picture_on_its_side_counts_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(8):
        path = tmp_path / "p" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(picture(number), "JPEG", exif=exif))
    assert load(tmp_path / "p").schema.columns[0].shape == (12, 9, 3)


def test_train_and_test_folders_are_the_split(tmp_path: Path) -> None:
    write(tmp_path / "p" / "train", 12)
    write(tmp_path / "p" / "test", 4)
    (tmp_path / "p" / "readme.txt").write_text("hello")
    (tmp_path / "p" / "test" / "more.txt").write_text("hello")
    split = {"test": "given", "validation": 0.25}
    dataset = load(tmp_path / "p", split=split)
    assert (everything(dataset), len(dataset.test)) == (16, 4)
    assert dataset.notes[-1] == "2 other files are skipped: 2 .txt"
    assert dataset.schema.classes == ("blue", "red")
    with pytest.raises(DataError, match="'given', but the source has no test part"):
        load(tmp_path / "p" / "train", split=split)
    write(tmp_path / "p" / "val", 4)
    with pytest.raises(DataError, match="beside train/ and test/ there is val/: move its pict"):
        load(tmp_path / "p", split=split)


def test_other_files_are_skipped_and_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    (folder / "readme.txt").write_text("hello")
    (folder / "red" / ".DS_Store").write_bytes(b"x")
    (folder / "red" / "more").mkdir()
    (folder / "red" / "more" / "20.JPG").write_bytes(saved(picture(20), "JPEG"))
    (folder / "blue" / "Thumbs.db").write_bytes(b"x")
    (folder / "blue" / "notes.txt").write_text("hello")
    (folder / "blue" / "._1.png").write_bytes(b"x")
    (folder / ".hidden").mkdir()
    dataset = load(folder)
    assert everything(dataset) == 13
    assert dataset.schema.classes == ("blue", "red")
    assert dataset.notes[-1].startswith("5 other files are skipped: 2 .txt, ")


def test_unreadable_pictures_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", 20)
    (folder / "red" / "4.png").write_bytes(saved(picture(4))[:100])
    (folder / "blue" / "5.png").write_bytes(saved(picture(5), "TIFF"))
    dataset = load(folder, max_bad=0.1)
    assert everything(dataset) == 18
    assert dataset.notes[1].startswith("2 of 20 cannot be read and are left out: blue/5.png (the ")
    colors = dataset.test_columns["image"].mean(axis=(1, 2))
    assert ((colors[:, 0] > colors[:, 2]) == (dataset.test.y == 1)).all(), "the labels fit still"
    said = r"2 of 20 pictures cannot be read, .* 0\.09: .*red/4\.png .*: repair .* data\.max_bad"
    with pytest.raises(DataError, match=said):
        load(folder, max_bad=0.09)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "must hold a folder of pictures for each class .*, but holds nothing"),
        ({"1.png": b"x", "2.png": b"x"}, "but holds 2 files and no folder"),
        ({"a/1.png": b"x", "a/2.png": b"x"}, "holds one class only, 'a'"),
        ({"a/1.png": b"x", "a/2.png": b"x", "b/1.tif": b"x"}, "b: .*, but holds 1 .tif: add some"),
        ({"a/1.png": b"x", "a/2.png": b"x", "b/1.png": b"x"}, "two pictures .*, but 'b' has 1"),
        ({"train/a/1.png": b"x", "test/1.png": b"x"}, "test: must hold .* 1 files and no folder"),
    ],
)
def test_a_folder_of_another_form_is_told(tmp_path: Path, files: dict, said: str) -> None:
    (tmp_path / "p").mkdir()
    for name, content in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "p")


def test_a_class_whose_pictures_are_all_bad_is_not_lost_in_silence(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    for name in ("1", "2"):
        (folder / "green").mkdir(exist_ok=True)
        (folder / "green" / f"{name}.png").write_bytes(b"x")
    with pytest.raises(DataError, match="'green' has 0"):
        load(folder, max_bad=0.5)


def test_settings_of_folders_are_refused_elsewhere() -> None:
    with pytest.raises(DataError, match=r"data\.preprocess\.size is for folders of pictures"):
        data.load(
            ImageData.model_validate(
                {"kind": "image", "source": "sklearn:digits", "preprocess": {"size": [8, 8]}}
            )
        )


def test_the_digest_covers_the_pixels(tmp_path: Path) -> None:
    digest = load(write(tmp_path / "p")).digest
    assert load(write(tmp_path / "q")).digest == digest, "the same pictures at another place"
    path = tmp_path / "p" / "red" / "0.png"
    changed = Image.open(path)
    changed.putpixel((3, 3), (1, 2, 3))
    changed.save(path)
    assert load(tmp_path / "p").digest != digest
    assert load(tmp_path / "q", preprocess={"color": "grey"}).digest != digest


# --- the cache -----------------------------------------------------------------------------------


def test_pictures_are_decoded_again_only_when_they_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "p")
    first = load(folder)
    decoded: list[Path] = []

    def counted(path: Path, shape: tuple[int, ...]) -> Any:
        decoded.append(path)
        return decode(path, shape)

    decode = pixels._decode
    monkeypatch.setattr(pixels, "_decode", counted)
    assert load(folder).digest == first.digest
    assert decoded == []
    path = folder / "red" / "0.png"
    path.write_bytes(saved(picture(40)))
    os.utime(path, ns=(1, 1))
    assert load(folder).digest != first.digest
    assert len(decoded) == 12
    assert load(folder, preprocess={"size": [4, 4]}).digest != first.digest
    assert len(decoded) == 24
    assert len(list(cache.iterdir())) == 3, "nothing is left beside the three arrays"


@pytest.mark.parametrize("damage", ["pixels.npy", "bad.json"])
def test_a_half_written_cache_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    folder = write(tmp_path / "p")
    digest = load(folder).digest
    (made,) = cache.iterdir()
    whole = (made / damage).read_bytes()
    (made / damage).write_bytes(whole[: len(whole) // 2])
    (cache / "tmp_of_a_killed_process").mkdir()
    assert load(folder).digest == digest
    assert (made / damage).read_bytes() == whole


def test_two_at_once_make_the_same_cache(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", 40)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(load(folder).digest)) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [load(folder).digest] * 4


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written: .*: set XDG_CACHE_HOME"):
        load(write(tmp_path / "p"))


# --- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, data.Dataset, Runtime]:
    """A model of red and blue photos of several sizes; their folder; the data it learned from."""
    home = tmp_path_factory.mktemp("trained")
    for number in range(60):
        path = home / "p" / ("red", "blue")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(picture(number, size=(40 + number, 90 - number)), "JPEG"))
    asked = validate(
        {
            "name": "photos",
            "data": {
                "kind": "image",
                "source": str(home / "p"),
                "preprocess": {"size": [16, 16]},
                "split": {"test": 0.25, "validation": 0.25},
            },
            "model": {"name": "cnn", "width": 4},
            "train": {"epochs": 8, "batch": 8, "optimizer": {"lr": 0.01}},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        dataset = data.load(asked.data)
    replica = Replica(asked, dataset)
    *_, last = replica.epochs()
    assert last["val_accuracy"] == 1.0, "red and blue are told apart"
    runtime = apps.version(home / "v", dataset, Model(name="cnn", width=4), "photos")
    return home / "p", dataset, runtime


def test_a_posted_file_is_answered_as_training_saw_it(
    trained: tuple[Path, data.Dataset, Runtime],
) -> None:
    """Bit for bit: the same pixels, and the same answer in every form of a request."""
    folder, dataset, runtime = trained
    (column,) = runtime.schema.columns
    seen = {
        image.tobytes(): position
        for position, image in enumerate(dataset.test_columns[column.name])
    }
    app = apps.app(runtime)
    answered = 0
    for path in sorted(folder.rglob("*.jpg")):
        content = path.read_bytes()
        decoded = images.decode(content, column.shape, resized=True)
        if decoded.tobytes() not in seen:
            continue
        position = seen[decoded.tobytes()]
        (direct,) = runtime.predict([{"image": dataset.test_columns["image"][position].tolist()}])
        posted = app.post("/predict", content=content, headers={"content-type": "image/jpeg"})
        text = base64.b64encode(content).decode()
        coded = app.post("/predict", json={"rows": [{"image": text}]})
        expected = json.loads(direct.model_dump_json())
        assert [posted.json()["predictions"], coded.json()["predictions"]] == [[expected]] * 2
        answered += 1
    assert answered == len(dataset.test) == 16


def test_what_a_picture_unpacks_to_is_limited(
    trained: tuple[Path, data.Dataset, Runtime],
) -> None:
    runtime = trained[2]
    room = 100 * 100 * 4 * 3  # bytes of three such pictures
    app = apps.app(runtime, decoded_mb=room / (1 << 20))
    text = base64.b64encode(saved(picture(0, size=(100, 100)))).decode()
    for n, status in ((3, 200), (4, 413)):
        assert app.post("/predict", json={"rows": [{"image": text}] * n}).status_code == status
    large = saved(picture(0, size=(200, 200)))
    sent = app.post("/predict", content=large, headers={"content-type": "image/png"})
    assert sent.status_code == 413
    assert Limits().decoded_mb * (1 << 20) == 4 * images.MAX_PIXELS, "one picture always fits"


class Lines:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, text: str) -> None: ...


def test_predict_takes_folders_and_files(
    trained: tuple[Path, data.Dataset, Runtime], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _, runtime = trained
    monkeypatch.setattr(batch, "load_model", lambda reference: runtime)
    other = tmp_path / "other.webp"
    other.write_bytes(saved(picture(3), "WEBP"))
    terminal = Lines()
    given = [str(folder / "red"), str(other)]
    done = batch.predict("photos/1", given, output=None, terminal=terminal)
    assert done["rows"] == 31
    first, *_, last = map(json.loads, terminal.said)
    assert (first["file"], last["file"]) == (str(folder / "red" / "0.jpg"), str(other))
    content = (folder / "red" / "0.jpg").read_bytes()
    direct = images.decode(content, (16, 16, 3), resized=True)
    (expected,) = runtime.predict([{"image": direct}])
    assert first["probabilities"] == expected.probabilities
    (tmp_path / "bad.png").write_bytes(b"x")
    for paths, said in [
        ([str(tmp_path / "bad.png")], "bad.png: the file must be a whole"),
        ([str(tmp_path / "none.png")], "none.png cannot be read: No such file"),
        ([str(folder), "rows.jsonl"], "are predicted apart, but got both"),
        ([str(tmp_path / "cache")], "must hold pictures .*, but holds none"),
    ]:
        (tmp_path / "cache").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=said):
            batch.predict("photos/1", paths, output=None, terminal=terminal)
