"""Where several replicas stand together, and what they have done: :class:`FleetStatistics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from qwen_run.runtime.core import CoreStatistics

NOTHING = CoreStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
_STATES = ("num_running", "num_waiting", "num_free_blocks", "num_blocks")  # end with a replica; all others only rise


@dataclass(frozen=True)
class FleetStatistics(CoreStatistics):
    """The sum over all replicas; what only rises has those in it that are gone.

    Attributes:
        num_replicas: places.
        num_ready: replicas that answer.
        num_deaths: replicas that have ended or counted as gone.
        num_moved: requests that another replica had to begin again.
    """

    num_replicas: int = 0
    num_ready: int = 0
    num_deaths: int = 0
    num_moved: int = 0


def total(statistics: Sequence[CoreStatistics]) -> CoreStatistics:
    """The sum of each figure."""
    return CoreStatistics(
        **{each.name: sum(getattr(one, each.name) for one in statistics) for each in fields(CoreStatistics)}
    )


def done_by(statistics: CoreStatistics) -> CoreStatistics:
    """What a replica that is gone has done, without where it stood."""
    return replace(statistics, **dict.fromkeys(_STATES, 0))
