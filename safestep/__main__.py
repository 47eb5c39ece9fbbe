"""Run the command ``safestep`` as ``python -m safestep``."""

import sys

from safestep.cli import main

sys.exit(main())
