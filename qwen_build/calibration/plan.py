"""Which linears a build calibrates, with which methods, over which text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from qwen_build.calibration.awq import Awq
from qwen_build.calibration.best import Best
from qwen_build.calibration.calibrate import Calibration
from qwen_build.calibration.gptq import Gptq
from qwen_build.calibration.method import Method
from qwen_build.calibration.smoothquant import SmoothQuant
from qwen_build.calibration.text import read_sequences
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import LAYER, linear_members, linear_names
from qwen_build.graph.layers import Schemes
from qwen_build.plan.options import CALIBRATED, DEFAULT_ALPHA, ResolvedOptions
from qwen_build.quantization.scheme_table import COARSE, SCHEMES
from qwen_build.quantization.schemes import IntScheme
from qwen_engine.errors import OptionsError

# any of them -> the method, as the options want it
METHODS: dict[str, Callable[[ResolvedOptions], Method]] = {
    "rtn": lambda options: Method(),
    "awq": lambda options: Awq(),
    "gptq": lambda options: Gptq(),
    "auto": lambda options: Best(),
    "smoothquant": lambda options: SmoothQuant(DEFAULT_ALPHA if options.alpha is None else options.alpha),
}


def plan_calibration(
    options: ResolvedOptions, config: ModelConfig, schemes: Schemes, directory: Path
) -> Calibration | None:
    """What calibrates the linears of the decoder layers; None if all of them are rounded to the nearest.

    Args:
        directory: of the checkpoint.

    Raises:
        BuildError: an option is of no use, or the text cannot be used.
    """
    choices = {name: schemes.choice_of(name) for name in linear_names(config) if LAYER.match(name)}
    own = {name: choice.scheme for name, choice in choices.items() if not choice.packed}
    rounded = {name: scheme for name, scheme in own.items() if isinstance(scheme, IntScheme)}
    if options.quant in CALIBRATED:  # which divides inputs, and those of experts can be divided by nothing
        stacks = [name for name, members in linear_members(config).items() if members != (name,)]
        rounded = {name: scheme for name, scheme in rounded.items() if name not in stacks}
    found = {scheme.grid.bits for scheme in rounded.values()}
    smoothed = SCHEMES[CALIBRATED[options.quant]].bits if options.quant in CALIBRATED else None
    names = {bits: options.quant if bits == smoothed else options.int4_method for bits in found}
    _check_smoothing(options, rounded.values())
    if options.int4_method != "rtn" and not found & {SCHEMES[name].bits for name in COARSE}:
        raise OptionsError(
            f"--int4-method {options.int4_method} has nothing to round, no linear layer becomes "
            f"{' or '.join(COARSE)} here; leave it out or choose --quant int4"
        )
    if all(names[bits] == "rtn" for bits in found):
        for option in ("calibration", "calibration_tokens"):
            if getattr(options, option) is not None:
                name = option.replace("_", "-")
                raise OptionsError(f"--{name} is of no use, nothing calibrates; add --int4-method gptq or leave it out")
        return None
    methods = {bits: METHODS[name](options) for bits, name in names.items()}
    sequences = read_sequences(directory, config, options.calibration, options.calibration_tokens)
    return Calibration(names, methods, sequences, rounded)


def expert_notes(calibration: Calibration | None, config: ModelConfig) -> tuple[str, ...]:
    """What to say of experts that calibration leaves alone."""
    stacks = [name for name, members in linear_members(config).items() if members != (name,)]
    if calibration is None or not stacks or any(name in calibration.schemes for name in stacks):
        return ()
    methods = " and ".join(sorted(set(calibration.names.values()) - {"rtn"}))
    return (f"{methods} leaves the experts alone: they are rounded to the nearest.",)


def _check_smoothing(options: ResolvedOptions, schemes: Iterable[IntScheme]) -> None:
    """Refuse an ``alpha`` that nobody reads, and smoothing for which no input is rounded."""
    if options.quant != "smoothquant":
        if options.alpha is not None:
            raise OptionsError(f"--alpha {options.alpha} is of no use, nothing is smoothed; add --quant smoothquant")
        return
    if all(scheme.grid.bits != 8 or scheme.activations == "float32" for scheme in schemes):
        raise OptionsError(
            "--quant smoothquant has nothing to smooth, no linear layer becomes int8 with rounded inputs here; "
            "leave --activations, --exclude and --quant-config out, or smoothquant"
        )
