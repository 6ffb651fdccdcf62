"""``python -m fmkernels``."""

import sys

from fmkernels.cli import main

sys.exit(main())
