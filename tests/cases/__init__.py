"""What several tests need: checkpoints, models without weights, traffic, sessions of one operator."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
