"""One local Ray for the whole of tests/ray."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import ray

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.data import Dataset
from lepton_ray.jobs import embedded, proxy
from lepton_ray.priority import RAY


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with (
        proxy.environment(RAY),
        proxy.own_ports(len(embedded.AGENT_PORTS)) as ports,
        embedded.alone(ports),
    ):
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def port() -> int:
    """Of Serve, which listens on one port for as long as its Ray lives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def experiment(**sections) -> Experiment:
    """A training of a second on scikit-learn's digits."""
    return validate(
        {
            "name": "small",
            "data": {"kind": "image", "source": "sklearn:digits", "split": {"test": 0.6}},
            "model": {"name": "cnn", "width": 4},
            "train": {"epochs": 3, "batch": 64, "digest_every": 5},
            "workers": {"min": 2, "max": 2},
            **sections,
        }
    )


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return data.load(experiment().data)


@pytest.fixture(scope="session")
def reference(cluster: None, dataset: Dataset) -> ray.ObjectRef:
    return ray.put(dataset)
