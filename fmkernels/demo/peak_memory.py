"""``python peak_memory.py {fmkernels,diffsort}``: bytes by which a step raises the peak (Linux)."""

import sys
from pathlib import Path

from fmkernels.demo import comparison

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kibibytes(field: str) -> int:
    """A line such as ``VmRSS:  123 kB``."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    step = comparison.STEPS[sys.argv[1]]
    student, teacher = comparison.scores()
    one = slice(0, 1)
    step(student.detach()[one].requires_grad_(), teacher[one])  # load and initialise everything
    CLEAR.write_text("5")  # forget the peak so far
    before = kibibytes("VmRSS:")
    step(student, teacher)
    print(1024 * max(0, kibibytes("VmHWM:") - before))
