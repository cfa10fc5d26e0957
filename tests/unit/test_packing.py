"""What of a folder goes to a cluster with an experiment, and how secrets travel."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_ray.config import load, validate
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import ClusterError, ExperimentError, InputError
from lepton_ray.jobs import packing, secrets


def experiment(source: str | list[str] = "rows.csv", model: str = "mlp") -> Experiment:
    return validate(
        {
            "name": "x",
            "data": {"kind": "table", "source": source, "target": "y"},
            "model": {"name": model},
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with more in it than any job needs."""
    files = {
        "rows.csv": "a,y\n1,2\n",
        "other.csv": "not needed",
        "nets/__init__.py": "",
        "nets/small.py": "import torch, helper\nfrom . import parts\n",
        "nets/parts.py": "",
        "nets/table.json": "{}",
        "nets/big.bin": "weights",
        "nets/cache/x.json": "",
        "nets/__pycache__/small.pyc": "",
        "helper.py": "",
        "unrelated.py": "",
        ".gitignore": "*.bin\n.data/\n",
        "nets/.gitignore": "cache/\n",
        ".data/pictures/cat/1.jpg": "jpg",
        ".git/config": "",
    }
    root = tmp_path / "project"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def packed(asked: Experiment, root: Path, target: Path) -> set[str]:
    target.mkdir()
    packing.pack(asked, root, target)
    return {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}


def test_only_what_is_needed_goes(root: Path, tmp_path: Path) -> None:
    assert packed(experiment(), root, tmp_path / "t") == {"experiment.yaml", "rows.csv"}


def test_several_sources_a_pattern_and_a_function_go(root: Path, tmp_path: Path) -> None:
    there = packed(experiment(["rows.csv", "nets.small:rows"]), root, tmp_path / "t")
    assert {"rows.csv", "nets/small.py", "helper.py"} <= there
    assert packed(experiment("*.csv"), root, tmp_path / "u") == {
        *("experiment.yaml", "other.csv", "rows.csv"),
    }
    written = load(tmp_path / "u" / "experiment.yaml")
    assert written.data.source == ("other.csv", "rows.csv")


def test_a_model_brings_what_it_imports_and_no_ignored_file(root: Path, tmp_path: Path) -> None:
    found = packed(experiment(model="nets.small:build"), root, tmp_path / "t")
    assert found == {
        "experiment.yaml", "rows.csv", "helper.py", "nets/__init__.py", "nets/small.py",
        "nets/parts.py", "nets/table.json", "nets/.gitignore",
    }  # fmt: skip


def test_data_that_are_named_go_though_git_ignores_them(root: Path, tmp_path: Path) -> None:
    found = packed(experiment(".data/pictures"), root, tmp_path / "t")
    assert ".data/pictures/cat/1.jpg" in found


def test_data_from_elsewhere_get_a_path_inside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "far.csv").write_text("a,y\n")
    for number, source in enumerate(["../far.csv", str(tmp_path / "far.csv")]):
        target = tmp_path / f"t{number}"
        assert packed(experiment(source), root, target) == {"experiment.yaml", "data/far.csv"}
        assert load(target / "experiment.yaml").data.source == "data/far.csv"


def test_data_that_only_the_cluster_has_stay_named(root: Path, tmp_path: Path) -> None:
    for number, source in enumerate(["/mnt/no-such/rows.csv", "sklearn:diabetes"]):
        target = tmp_path / f"t{number}"
        assert packed(experiment(source), root, target) == {"experiment.yaml"}
        assert load(target / "experiment.yaml").data.source == source
    with pytest.raises(ExperimentError, match="must be absolute"):
        packing.pack(experiment("none.csv"), root, tmp_path)


def test_the_digest_is_of_the_contents(root: Path, tmp_path: Path) -> None:
    digests = []
    for number in range(3):
        (tmp_path / f"t{number}").mkdir()
        digests.append(packing.pack(experiment(), root, tmp_path / f"t{number}"))
        if number:
            (root / "rows.csv").write_text("a,y\n3,4\n")
    assert digests[0] == digests[1] != digests[2]


def test_too_much_names_the_largest_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LIMIT_MB", 1)
    (root / "rows.csv").write_bytes(b"x" * (3 << 20))
    with pytest.raises(InputError, match=r"is 3.0 MiB.*largest files: rows.csv \(3.0 MiB\)"):
        packing.pack(experiment(), root, tmp_path)


def test_a_module_that_cannot_be_read_is_told(root: Path, tmp_path: Path) -> None:
    (root / "nets" / "broken.py").write_text("def (")
    with pytest.raises(ExperimentError, match=r"'nets.broken:f' cannot be packed"):
        packing.pack(experiment(model="nets.broken:f"), root, tmp_path)


def test_a_secret_is_read_with_the_token_only() -> None:
    sealed = secrets.seal(["A"], {"A": "hunter2", "B": "x"}, "token")
    assert "hunter2" not in str(sealed)
    assert secrets.unseal(sealed[secrets.VARIABLE], "token") == {"A": "hunter2"}
    for other in ("another", None):
        with pytest.raises(ClusterError, match="another token"):
            secrets.unseal(sealed[secrets.VARIABLE], other)


def test_a_secret_that_cannot_travel_is_refused() -> None:
    with pytest.raises(InputError, match="no such variable"):
        secrets.seal(["A"], {}, "token")
    with pytest.raises(InputError, match="has no token to seal"):
        secrets.seal(["A"], {"A": "1"}, None)
    assert secrets.seal([], {}, None) == {}
