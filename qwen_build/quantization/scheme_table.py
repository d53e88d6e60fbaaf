"""The schemes by their names on the command line: what each of them is, and which kernels have which."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_build.quantization.grid import Grid
from qwen_build.quantization.schemes import ACCURACY_LEVELS, Float32, NativeInt, Scheme, StockInt
from qwen_engine.choices import ACTIVATION_SCALES, WEIGHT_SCALES
from qwen_engine.errors import BuildError
from qwen_plugin.layout import BLOCK_COLUMNS, GROUP_SIZES


@dataclass(frozen=True)
class SchemeRow:
    """A choice of ``--quant``: its bits (0: float32), whether its grid is symmetric unless asked, what it is for.

    A zero point takes a fifth of int4's KL off and nothing of int8's: tables of ``benchmarks/schemes.py``.
    """

    bits: int
    symmetric: bool
    help: str


@dataclass(frozen=True)
class KernelsRow:
    """A choice of ``--kernels``: who stores and multiplies integers, in which precisions; the first is the default."""

    store: type[NativeInt] | type[StockInt]
    activations: tuple[str, ...]


# name on the command line -> scheme; option choices, help text and tests are made from these tables
SCHEMES = {
    "none": SchemeRow(0, True, "float32, equal to Hugging Face"),
    "int8": SchemeRow(8, True, "8-bit weights, a scale for each group"),
    "int4": SchemeRow(4, False, "4-bit weights, a scale for each group"),
}
KERNELS = {
    "native": KernelsRow(NativeInt, ("int8", "int8x2", "float32")),
    "stock": KernelsRow(StockInt, tuple(ACCURACY_LEVELS)),
}


def make_scheme(
    name: str,
    group_size: int,
    symmetric: bool | None,
    activations: str | None,
    kernels: str,
    weight_scales: str = "group",
    activation_scales: str | None = None,
) -> Scheme:
    """The scheme called ``name`` on the command line; None is the default of the tables.

    ``activation_scales`` are of a "block" by default where they can be, and of a "group" elsewhere.

    Raises:
        BuildError: an option is not one of its table, or does not go with ``kernels``.
    """
    for option, value, choices in (
        ("quant", name, tuple(SCHEMES)),
        ("group-size", group_size, GROUP_SIZES),
        ("kernels", kernels, tuple(KERNELS)),
        ("weight-scales", weight_scales, WEIGHT_SCALES),
        ("activation-scales", activation_scales or "group", ACTIVATION_SCALES),
    ):
        if value not in choices:
            raise BuildError(f"--{option} {value} is not one of {', '.join(map(str, choices))}")
    row, store, precisions = SCHEMES[name], KERNELS[kernels].store, KERNELS[kernels].activations
    if activations is not None and activations not in precisions:
        raise BuildError(f"--kernels {kernels} has no --activations {activations}; choose {' or '.join(precisions)}")
    if not row.bits:
        return Float32()
    shared = weight_scales != "group"
    if shared and symmetric is False:
        raise BuildError(f"--weight-scales {weight_scales} goes with symmetric grids only; leave --asymmetric out")
    grid = Grid(row.bits, group_size, shared or row.symmetric if symmetric is None else symmetric, weight_scales)
    activations = activations or precisions[0]
    if store is StockInt:
        for option, chosen in (("weight-scales", weight_scales), ("activation-scales", activation_scales)):
            if chosen not in (None, "group"):
                raise BuildError(f"--kernels stock has no --{option} {chosen}; use --kernels native")
        return StockInt(grid, activations)
    return _native_int(grid, activations, activation_scales)


def _native_int(grid: Grid, activations: str, activation_scales: str | None) -> NativeInt:
    if activations == "float32" and activation_scales not in (None, "group"):
        raise BuildError(f"--activations float32 has no --activation-scales {activation_scales}; choose int8 or int8x2")
    small_groups = grid.weight_scales == "group" and grid.group_size < BLOCK_COLUMNS
    blocks = grid.bits == 4 and small_groups and activations != "float32"
    if activation_scales == "block" and not blocks:
        raise BuildError(
            "--activation-scales block goes with int4 in groups of 32 or 64 and a scale for each group, found "
            f"int{grid.bits} in groups of {grid.group_size} and a scale for each {grid.weight_scales}; choose group, "
            "or leave it out"
        )
    return NativeInt(grid, activations, activation_scales or ("block" if blocks else "group"))
