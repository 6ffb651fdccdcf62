"""100 of the digits, so that what is trained and tested on them takes seconds."""


def shrink(monkeypatch):
    """60 to learn from and 40 to test, in batches of 16."""
    from fmkernels.demo import digits  # needs rich, which other users of this folder do not

    halves = digits.halves

    def some(seed):
        data = halves(seed)
        counts = (60, 60, 40, 40)
        return digits.Digits(*(own[:n] for own, n in zip(data, counts, strict=True)))

    monkeypatch.setattr(digits, "halves", some)
    monkeypatch.setattr(digits, "BATCH", 16)
