"""lepton_ray's arm of benchmarks/tuning.py: its study over the same training code as the peers'.

    python _ours.py TASK TRIALS SECONDS SEED LOG [OUT]

Started as `lepton-ray tune` is: Ray comes up while the rest is imported. With OUT, MLflow records
it too, and memory and waits are written there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lepton_ray.jobs.session import session_beside


def main() -> None:
    task, trials, seconds, seed, log = sys.argv[1:6]
    out = sys.argv[6] if len(sys.argv) > 6 else None
    with session_beside("_ours_study"):
        import _ours_study

        _ours_study.run(task, int(trials), float(seconds), int(seed), log, out)


if __name__ == "__main__":
    main()
