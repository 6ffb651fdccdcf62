"""``python peak_memory.py {fmkernels,diffsort}``: bytes by which a step raises the peak (Linux)."""

import sys

from fmkernels._memory import peak_extra_bytes
from fmkernels.demo import comparison

if __name__ == "__main__":
    step = comparison.STEPS[sys.argv[1]]
    student, teacher = comparison.scores()
    one = slice(0, 1)
    step(student.detach()[one].requires_grad_(), teacher[one])  # load and initialise everything
    print(peak_extra_bytes(lambda: step(student, teacher)))
