"""A digest of what the package is built from: whether a wheel is that of a checkout.

The build runs this file alone, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCES = ("setup.py", "csrc/**/*.h", "csrc/**/*.c*", "fmkernels/**/*.py", "python_api/**/*.py")


def digest(root: Path) -> str:
    """Of the names and contents of all sources in a checkout, but for what the build writes."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        if path.name != "_build_info.py":
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
