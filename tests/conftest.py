"""What holds for every test: nothing of the person's own set-up is used, and CI skips nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def pytest_configure(config: pytest.Config) -> None:
    # A test must never reach the cluster or the MLflow store that the person's shell points to.
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    # No test talks to the network, usage reports included.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

    if os.environ.get("CI") == "true":
        config.pluginmanager.register(NoSkips(_allowed_skips()), "no-skips")


def _allowed_skips() -> set[tuple[str, str]]:
    lines = ALLOWED_SKIPS.read_text().splitlines()
    entries = [line.partition(" | ") for line in lines if line.strip() and line[0] != "#"]
    return {(node_id.strip(), reason.strip()) for node_id, _, reason in entries}


class NoSkips:
    """Fails a run that skipped a test, because a skip in CI reads as a pass and is none."""

    def __init__(self, allowed: set[tuple[str, str]]) -> None:
        self._allowed = allowed
        self._skips: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped too, but it did run.
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            reason = " ".join(str(reason).split()).removeprefix("Skipped: ")
            self._skips.append((report.nodeid, reason))

    @property
    def _refused(self) -> list[tuple[str, str]]:
        return [skip for skip in self._skips if skip not in self._allowed]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        passed = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self._refused and session.exitstatus in passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        # .ci/run adds these lines up.
        terminalreporter.write_line(f"skipped tests: {len(self._skips)}")
        if self._refused:
            terminalreporter.section("skips are failures in CI", red=True)
            for node_id, reason in self._refused:
                terminalreporter.write_line(f"{node_id} | {reason}")
            terminalreporter.write_line(
                f"Make them run, or copy the lines above to {ALLOWED_SKIPS.name} and say why."
            )
