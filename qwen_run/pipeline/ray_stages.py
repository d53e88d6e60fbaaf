"""Stages as actors of a Ray cluster, each on a node of its own. No other module of this folder imports ray.

An actor is started by Ray again where it dies, on another node where its own is gone. It then knows nothing, and has
no generation: batches that were meant for the one before are refused until the driver has joined it again.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from qwen_engine.errors import EngineError, QwenError, first_line
from qwen_run.pipeline.alike import facts
from qwen_run.pipeline.executor import Executor, StagePlan
from qwen_run.pipeline.stage_process import answer, load, start_of
from qwen_run.pipeline.wire import Kind, Message, batch_arrays
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.flights import StageLost
from qwen_run.runtime.kv_cache import Edit
from qwen_run.runtime.stage import Stage

PLACES_S = 60.0  # to find nodes for all stages
START_S = 600.0  # until all stages are loaded, also after one was lost
JOIN_S = 60.0  # that a stage which lives has for what it was doing
# A batch that takes so many times the longest before, and at least so long, meets a stage that does not work any more.
_TIMES_LONGEST, _LEAST_STEP_S, _FIRST_STEP_S = 3.0, 5.0, 120.0
_RETRY_S = 0.2


class StageActor:
    """A stage in an actor. It loads when it is joined, so that an error is an answer and no death."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._generation = 0  # of none
        self._number = 0

    def join(self, generation: int, start: str) -> dict[str, Any]:
        """Be the stage that ``start`` describes, for batches of ``generation``.

        Returns:
            facts of it, or ``error``.
        """
        try:
            if self._stage is None:
                self._stage = load(json.loads(start))
            found = facts(self._stage)
        except QwenError as error:
            return {"error": str(error)}
        self._generation, self._number = generation, 0
        return found

    def run(self, message: Message) -> Message:
        """What the stage makes of a batch.

        Raises:
            RuntimeError: it is not the next one of this generation: what it builds on is in no cache of this process.
        """
        if self._stage is None or (message.generation, message.number) != (self._generation, self._number + 1):
            raise RuntimeError(
                f"batch {message.number} of generation {message.generation}, expected {self._number + 1} of "
                f"{self._generation}"
            )
        self._number += 1
        return answer(self._stage, message)


class RayStages(Executor):
    """Actors in a row; each gives its result to the next, wherever that is.

    Attributes:
        told: ``facts`` of each, of its latest start.
    """

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self._ray = _require_ray()
        self._plans: Sequence[StagePlan] = ()
        self._actors: list[Any] = []
        self._group: Any = None
        self._sent: deque[tuple[Any, float]] = deque()
        self._generation = self._number = 0
        self._longest_s = 0.0
        self._least_s = _LEAST_STEP_S
        self._is_closed = False

    def start(self, plans: Sequence[StagePlan]) -> None:
        ray = self._ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False)  # at RAY_ADDRESS, or on this machine alone
        self._plans = plans
        self._group = self._reserve(plans)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        for index, plan in enumerate(plans):
            options = {
                "num_cpus": plan.threads,
                "max_restarts": -1,
                "max_task_retries": 0,  # a batch that Ray repeats on a new actor would meet an empty cache
                "scheduling_strategy": strategy(self._group, placement_group_bundle_index=index),
            }
            self._actors.append(ray.remote(StageActor).options(**options).remote())

    def connect(self) -> list[dict[str, Any]]:
        self._join_all()
        return self.told

    def send(self, batch: Batch, edits: Sequence[Edit]) -> None:
        self._check_open()
        self._number += 1
        result: Any = Message(Kind.BATCH, self._generation, self._number, batch_arrays(batch, edits, None))
        try:
            for actor in self._actors:
                result = actor.run.remote(result)
        except self._ray.exceptions.RayError as error:
            raise StageLost(f"a stage is lost: {first_line(error)}") from error
        self._sent.append((result, time.monotonic()))

    def receive(self) -> np.ndarray | str:
        result, sent = self._sent.popleft()
        most_s = max(_TIMES_LONGEST * self._longest_s, self._least_s) if self._longest_s else _FIRST_STEP_S
        try:
            message = self._ray.get(result, timeout=most_s)
        except self._ray.exceptions.GetTimeoutError as error:
            self._least_s *= 2  # one that is slow for once is not taken for lost again and again
            raise StageLost(f"a batch is not there after {most_s:.0f} s") from error
        except self._ray.exceptions.RayError as error:
            raise StageLost(f"a stage is lost: {first_line(error)}") from error
        self._longest_s = max(self._longest_s, time.monotonic() - sent)
        if message.kind == Kind.REFUSED:
            return str(message.text)
        return np.array(message.arrays[-1])  # its own: what came is a view of memory that Ray takes back

    def recover(self) -> None:
        self._check_open()
        self._join_all()

    def close(self) -> None:
        actors, self._actors, self._is_closed = self._actors, [], True
        if not self._ray.is_initialized():
            return
        for actor in actors:
            with suppress(Exception):  # whatever it is: the cluster ends them with this program
                self._ray.kill(actor)
        if self._group is not None:
            with suppress(Exception):
                self._ray.util.remove_placement_group(self._group)

    def _reserve(self, plans: Sequence[StagePlan]) -> Any:
        """Nodes for all stages, each its own.

        Raises:
            EngineError: there are not so many.
        """
        ray = self._ray
        group = ray.util.placement_group([{"CPU": plan.threads} for plan in plans], strategy="STRICT_SPREAD")
        if not group.wait(PLACES_S):
            with suppress(Exception):
                ray.util.remove_placement_group(group)
            cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            raise EngineError(
                f"{len(plans)} stages beside this one need as many nodes with {plans[0].threads} free CPUs each; the "
                f"cluster has {len(cpus)} with {', '.join(map(str, cpus))}; add nodes, or ask for fewer stages or "
                "threads"
            )
        return group

    def _join_all(self) -> None:
        """Let every actor, old or new, take batches of a new generation, from the first.

        Raises:
            EngineError: one cannot be loaded, or does not come back in time.
        """
        ends = time.monotonic() + START_S
        self._sent.clear()
        self._generation += 1
        self._number = 0
        found: list[dict[str, Any]] = []
        for index, (actor, plan) in enumerate(zip(self._actors, self._plans, strict=True)):
            name = f"stage {index} (layers {plan.layers.start} to {plan.layers[-1]})"
            told = self._join(actor, plan, name, ends)
            if "error" in told:
                raise EngineError(f"{name}: {told['error']}")
            found.append(told)
        self.told = found

    def _join(self, actor: Any, plan: StagePlan, name: str, ends: float) -> dict[str, Any]:
        ray = self._ray
        start = start_of(plan.engine, plan.layers, plan.num_blocks, plan.threads)
        while True:
            try:
                told: dict[str, Any] = ray.get(actor.join.remote(self._generation, start), timeout=JOIN_S)
                return told
            except ray.exceptions.GetTimeoutError as error:
                lost: Exception = error
                if self._longest_s:  # it was loaded, and does nothing: another takes its place
                    with suppress(ray.exceptions.RayError):
                        ray.kill(actor, no_restart=False)
            except ray.exceptions.RayError as error:
                lost = error
                time.sleep(_RETRY_S)
            if time.monotonic() > ends:
                raise EngineError(
                    f"{name} does not come back within {START_S:.0f} s: {first_line(lost)}; look at the nodes of the "
                    "cluster (ray status)"
                ) from lost

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine's stages have been ended; load it again")


def _require_ray() -> Any:
    """The module ``ray``.

    Raises:
        EngineError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of its use unless it is told not to
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise EngineError(
            f"{error.name} is not installed, and the executor ray needs it; run pip install 'ray[data]>=2.60'"
        ) from error
    return ray
