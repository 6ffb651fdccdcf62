"""How every part of the demo says what it found, and what it leaves out."""

from __future__ import annotations

import importlib.util

from rich.console import Console
from rich.table import Table


def table(*headings: str, caption: str = "") -> Table:
    """Words in the first column, figures in the others."""
    made = Table(caption=caption or None, caption_justify="left")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    return made


def is_there(console: Console, module: str, package: str, what: str = "left out") -> bool:
    """Whether a module can be imported; if not, says what that leaves out."""
    if importlib.util.find_spec(module) is not None:
        return True
    console.print(f"   {what}: {package} is missing: pip install {package}")
    return False
