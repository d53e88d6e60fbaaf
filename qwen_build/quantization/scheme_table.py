"""The schemes by their names on the command line: what each of them is, and which kernels have which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_build.quantization.grid import Grid
from qwen_build.quantization.schemes import ACCURACY_LEVELS, Float32, NativeInt, Scheme, StockInt
from qwen_engine.choices import ACTIVATION_SCALES, WEIGHT_SCALES
from qwen_engine.errors import OptionsError
from qwen_plugin.layout import BITS, BLOCK_BITS, BLOCK_COLUMNS, GROUP_SIZES


@dataclass(frozen=True)
class KernelsRow:
    """A choice of ``--kernels``: who stores and multiplies integers of which bits, in which precisions.

    The first precision is the default.
    """

    store: type[NativeInt] | type[StockInt]
    activations: tuple[str, ...]
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """The options beside the name of a scheme, each one of its table; those of None are for the scheme to choose."""

    group_size: int
    symmetric: bool | None
    activations: str
    kernels: KernelsRow
    weight_scales: str
    activation_scales: str | None


@dataclass(frozen=True)
class SchemeRow:
    """A choice of ``--quant``, and all that the builder knows of it.

    Attributes:
        bits: of a weight; 0: float32.
        symmetric: whether its grid is so unless asked. A zero point takes a fifth of int4's KL off and nothing of
            int8's: tables of ``benchmarks/schemes.py``.
        help: what it is for.
        make: the scheme of a linear, by what was asked for; raises OptionsError where that does not go together.
        auto: which of its grids ``--quant auto`` tries, by whether they are symmetric.
    """

    bits: int
    symmetric: bool
    help: str
    make: Callable[[SchemeRow, Asked], Scheme]
    auto: tuple[bool, ...] = ()

    @property
    def is_coarse(self) -> bool:
        """Whether ``--int4-method`` says how it rounds: 8 bits lose little that calibrating could bring back."""
        return 0 < self.bits < 8


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
        OptionsError: an option is not one of its table, or does not go with ``kernels``.
    """
    for option, value, choices in (
        ("quant", name, tuple(SCHEMES)),
        ("group-size", group_size, GROUP_SIZES),
        ("kernels", kernels, tuple(KERNELS)),
        ("weight-scales", weight_scales, WEIGHT_SCALES),
        ("activation-scales", activation_scales or "group", ACTIVATION_SCALES),
    ):
        if value not in choices:
            raise OptionsError(f"--{option} {value} is not one of {', '.join(map(str, choices))}")
    row, chosen = SCHEMES[name], KERNELS[kernels]
    precisions = chosen.activations
    if activations is not None and activations not in precisions:
        raise OptionsError(f"--kernels {kernels} has no --activations {activations}; choose {' or '.join(precisions)}")
    activations = activations or precisions[0]
    return row.make(row, Asked(group_size, symmetric, activations, chosen, weight_scales, activation_scales))


def _on_grid(row: SchemeRow, asked: Asked) -> Scheme:
    if row.bits not in asked.kernels.bits:
        raise OptionsError(f"--kernels stock has no weights of {row.bits} bits; use --kernels native")
    shared = asked.weight_scales != "group"
    if shared and asked.symmetric is False:
        raise OptionsError(
            f"--weight-scales {asked.weight_scales} goes with symmetric grids only; leave --asymmetric out"
        )
    symmetric = shared or row.symmetric if asked.symmetric is None else asked.symmetric
    grid = Grid(row.bits, asked.group_size, symmetric, asked.weight_scales)
    if asked.kernels.store is StockInt:
        scales = ("weight-scales", asked.weight_scales), ("activation-scales", asked.activation_scales)
        for option, chosen in scales:
            if chosen not in (None, "group"):
                raise OptionsError(f"--kernels stock has no --{option} {chosen}; use --kernels native")
        return StockInt(grid, asked.activations)
    return _native_int(grid, asked.activations, asked.activation_scales)


def _native_int(grid: Grid, activations: str, activation_scales: str | None) -> NativeInt:
    if activations == "float32" and activation_scales not in (None, "group"):
        raise OptionsError(
            f"--activations float32 has no --activation-scales {activation_scales}; choose int8 or int8x2"
        )
    small_groups = grid.weight_scales == "group" and grid.group_size < BLOCK_COLUMNS
    blocks = grid.bits in BLOCK_BITS and small_groups and activations != "float32"
    if activation_scales == "block" and not blocks:
        raise OptionsError(
            "--activation-scales block goes with less than 8 bits in groups of 32 or 64 and a scale for each group, "
            f"found int{grid.bits} in groups of {grid.group_size} and a scale for each {grid.weight_scales}; "
            "choose group, or leave it out"
        )
    return NativeInt(grid, activations, activation_scales or ("block" if blocks else "group"))


# name on the command line -> scheme; option choices, help text and tests are made from these tables
SCHEMES = {
    "none": SchemeRow(0, True, "float32, equal to Hugging Face", lambda row, asked: Float32()),
    "int8": SchemeRow(8, True, "8-bit weights, a scale for each group", _on_grid, auto=(True,)),
    "int6": SchemeRow(6, False, "6-bit weights, a scale for each group", _on_grid, auto=(False,)),
    "int5": SchemeRow(5, False, "5-bit weights, a scale for each group", _on_grid, auto=(False,)),
    "int4": SchemeRow(4, False, "4-bit weights, a scale for each group", _on_grid, auto=(False, True)),
}
# those that --int4-method rounds
COARSE = tuple(name for name, row in SCHEMES.items() if row.is_coarse)
KERNELS = {
    "native": KernelsRow(NativeInt, ("int8", "int8x2", "float32"), BITS),
    "stock": KernelsRow(StockInt, tuple(ACCURACY_LEVELS), (4, 8)),
}
