"""The ports beside an endpoint's, as they are on this machine."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from lepton_ray.cli import main
from lepton_ray.jobs import proxy
from lepton_ray.serving import ports
from lepton_ray.tracking import endpoints
from lepton_ray.tracking.endpoints import Port, Report
from lepton_ray.tracking.store import client
from tests import stores


def test_what_listens_is_named_and_whether_others_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ports.opened() == (), "without HAProxy"
    with proxy.own_ports(proxy.ports_needed()) as first:
        for name, value in proxy.settings(tmp_path, first, 2).items():
            monkeypatch.setenv(name, value)
        assert ports.opened() == (), "nothing listens yet"
        with (
            socket.create_server(("", first)),
            socket.create_server(("127.0.0.1", first + 1)),
            socket.create_server(("", first + 5)),
            socket.create_server(("", 0)),
        ):
            assert ports.opened() == (
                Port(first, "HAProxy's statistics", False),
                Port(first + 1, "HAProxy's counts", True),
                Port(first + 5, "a replica", False),
            )


def test_status_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    client().create_registered_model("people")
    told = Report(
        id="a", url="http://x", reference="people/1", version=1, replicas=1, seen_s=time.time(),
        ports=(Port(20_001, "HAProxy's counts", False), Port(20_005, "a replica", True)),
    )  # fmt: skip
    endpoints.report("people", told)
    assert endpoints.reports("people") == [told]
    assert main(["status", "people"]) == 0
    said = capsys.readouterr().out
    assert "port 20001: HAProxy's counts, on all addresses of its machine" in said
    assert "port 20005: a replica, on loopback only" in said


def test_ports_that_one_has_found_no_other_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at them yet: both clusters are still starting."""
    needed = proxy.ports_needed()
    monkeypatch.setattr(proxy, "LAST_PORT", proxy.FIRST_PORT + 2 * (needed + 1))  # room for two
    with proxy.own_ports(needed) as one, proxy.own_ports(needed) as other:
        assert abs(one - other) > needed
        with pytest.raises(OSError, match="no 53 free ports"), proxy.own_ports(needed):
            pass
    with proxy.own_ports(needed) as again:
        assert again in (one, other)
