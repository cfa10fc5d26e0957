"""What all benchmarks share: interleaved repeats, medians, one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer repeats; under 10 minutes")
    made.add_argument("--json", action="store_true", help="print the JSON object only")
    return made


def interleaved(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run A, B, C, A, B, C, ... and collect what each returns."""
    values: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            values[name].append(run())
    return values


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Of paired repeats: their median, least and largest."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "median": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "repeats": len(each),
    }


def finish(figures: dict[str, Any], detail: dict[str, Any]) -> None:
    """The last line of a benchmark."""
    print(json.dumps({**figures, "detail": detail}))
