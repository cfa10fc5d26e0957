"""``python -m lepton_ray``."""

import sys

from lepton_ray.cli import main

sys.exit(main())
