"""Random hostile input, bounded and seeded: ``make fuzz``, or ``PYTHONPATH=tests python -m fuzz.engines --seconds 60``.

A round is made from the seed and its number alone, so ``--first N --rounds 1`` repeats the one that found something.
"""
