"""Calibrating the experts of a layer, one at a time, each with the tokens that its router sent it.

An expert that saw too few of them to tell is rounded to the nearest. Inputs of experts are divided by nothing: the
router and all experts read one input, and no factor of it suits them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.calibration.layer_runner import LayerWeights
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import LayerKind
from qwen_build.quantization.grid import Rounded
from qwen_build.quantization.schemes import IntScheme

# Tokens that an expert has to have seen: a part of the inputs of a linear where a second moment of them is taken, else
# so many; and tokens that are held out, where a method asks for some.
_INPUTS_PER_TOKEN, _FEWEST, _FEWEST_HELD_OUT = 4, 16, 8


@dataclass(frozen=True, eq=False)
class Routed:
    """What the experts of a layer read, of T tokens.

    Attributes:
        input: float32 (T, hidden_size).
        chosen: int32 (T, k), the experts of each token.
        held_out: bool (T), those that choose between ways to round.
    """

    input: np.ndarray
    chosen: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, eq=False)
class ExpertRounding:
    """The experts of a layer on their way to the weights that the engine computes with.

    Attributes:
        weights: of the layer, changed in place.
        schemes: of the stacks that are rounded, by their names in the layer.
        method: of a scheme.
        save: takes the name in the layer of an expert's weight, and its numbers.
    """

    config: ModelConfig
    kind: LayerKind
    weights: LayerWeights
    schemes: Mapping[str, IntScheme]
    method: Callable[[IntScheme], Method]
    save: Callable[[str, Rounded, IntScheme], None]

    def round(self, routed: Routed) -> tuple[dict[str, tuple[float, float]], int]:
        """Round every expert.

        Returns:
            Squared error and squared size of the outputs of each linear on a sample of its tokens, by its name in the
            layer, and how many experts saw too few tokens.
        """
        errors: dict[str, tuple[float, float]] = {}
        few = 0
        for expert in range(self.config.mixture.num_experts):
            tokens = np.flatnonzero((routed.chosen == expert).any(axis=1))
            x, held_out = routed.input[tokens], routed.held_out[tokens]
            both = self._weight("mlp.experts.gate_up_proj", expert)
            gate, up = (x @ half.T for half in np.split(both, 2))
            inputs = {
                "mlp.experts.gate_up_proj": x,
                "mlp.experts.down_proj": gate / (1 + np.exp(-gate.clip(min=-88))) * up,
            }
            found = [self._round_stack(name, expert, inputs[name], held_out, errors) for name in self.schemes]
            few += not all(found)
        return errors, few

    def _weight(self, stack: str, expert: int) -> np.ndarray:
        """An expert's part of a stack, (rows, in_features), which can be written to."""
        weight = self.weights[f"{stack}.weight"]
        each = len(weight) // self.config.mixture.num_experts
        return weight[expert * each : (expert + 1) * each]

    def _round_stack(
        self,
        stack: str,
        expert: int,
        x: np.ndarray,
        held_out: np.ndarray,
        errors: dict[str, tuple[float, float]],
    ) -> bool:
        """Round an expert's linears of one stack; whether it saw enough of ``x`` for its method."""
        scheme = self.schemes[stack]
        parts = self.kind.stacks[stack].parts
        names = [part.replace("*", str(expert)) for part in parts]
        weights = dict(zip(names, np.split(self._weight(stack, expert), len(parts)), strict=True))
        method = self.method(scheme)
        enough = _is_enough(method, x, held_out)
        statistics = _statistics(x, held_out if enough else np.zeros(len(x), bool), method if enough else Method())
        if enough:
            assert statistics is not None
            read = next(linear.reads for linear in self.kind.linears if linear.name == stack)
            schemes = dict.fromkeys(names, scheme)
            rounded = method.round(InputReaders(self.config, read, statistics, weights, schemes))
        else:
            rounded = {name: scheme.round(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            self.save(name, rounded[name], scheme)
            values = scheme.grid.values(rounded[name], weight.shape[1])
            if statistics is not None:
                errors[name] = statistics.output_square(weight - values), statistics.output_square(weight)
            weight[...] = values
        return enough


def _is_enough(method: Method, x: np.ndarray, held_out: np.ndarray) -> bool:
    """Whether a method can learn from the tokens ``x`` (T, K), of which some are ``held_out``."""
    apart = int(held_out.sum())
    needed = x.shape[1] // _INPUTS_PER_TOKEN if method.needs_second_moment else _FEWEST
    return len(x) - apart >= needed and (apart >= _FEWEST_HELD_OUT or not method.needs_held_out)


def _statistics(x: np.ndarray, held_out: np.ndarray, method: Method) -> InputStatistics | None:
    """Those of ``x`` that ``method`` asks for; None of no tokens."""
    if not len(x):
        return None
    collector = Collector(x.shape[1], held_out, method.needs_second_moment)
    collector.add(x)
    return collector.finish()
