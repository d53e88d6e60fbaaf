"""How every linear of a build is stored, as its options, their exceptions and the checkpoint decide."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.stored import PackedWeight
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LAYER, linear_members, linear_names
from qwen_build.graph.layers import SchemeChoice, Schemes
from qwen_build.plan.options import CALIBRATED, DEFAULT_GROUP_SIZE, MIXES, BuildOptions, ResolvedOptions
from qwen_build.plan.rules import Rule, choose, excluding, packed_choices
from qwen_build.quantization.scheme_table import make_scheme
from qwen_build.quantization.schemes import Scheme
from qwen_engine.errors import BuildError, OptionsError
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_engine.manifest import LinearRecord
from qwen_plugin.layout import GROUP_SIZES


def as_stored(options: BuildOptions, config: ModelConfig, checkpoint: Checkpoint) -> BuildOptions:
    """``options`` for what ``checkpoint`` decided of how its linears are stored.

    What it has packed is stored as it is; ``quant`` says what becomes of the rest, and is by default as most of those.

    Raises:
        BuildError: they choose something else.
    """
    form, quant = checkpoint.format, checkpoint.quant
    if form is None or quant is None:
        return options
    if not rounds_rest(config, checkpoint):
        for name in ("quant", "group_size", "symmetric", "weight_scales"):
            if (value := getattr(options, name)) is not None:
                raise BuildError(
                    f"{name} {value} cannot be chosen, the checkpoint is stored as {form.name} {quant} already; "
                    "leave it out or build from the float checkpoint"
                )
    if options.embedding_quant is not None and all(checkpoint.is_packed(name) for name in (EMBEDDING, HEAD)):
        raise BuildError(
            f"embedding_quant {options.embedding_quant} cannot be chosen, the checkpoint has embedding and head as "
            f"{form.name} already; leave it out or build from the float checkpoint"
        )
    if options.activation_scales == "block":
        raise BuildError(
            f"--activation-scales block needs weight scales of its own, the checkpoint has those of {form.name}; "
            "leave it out or build from the float checkpoint"
        )
    return dataclasses.replace(options, quant=options.quant or quant)


def rounds_rest(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether a linear of a layer is rounded as ``quant`` says, and neither packed nor left float."""
    if checkpoint.format is None or not checkpoint.format.keeps_float:
        members = (own for name, own in linear_members(config).items() if LAYER.match(name))
        return not all(checkpoint.is_packed(one) for own in members for one in own)
    return False


def plan_schemes(options: ResolvedOptions, config: ModelConfig, checkpoint: Checkpoint) -> Schemes:
    """The scheme of every linear. What a packed checkpoint left float stays so.

    Raises:
        BuildError: they contradict each other or the checkpoint, or a pattern decides nothing.
    """

    def scheme(quant: str, **chosen: Any) -> Scheme:
        fields = {name: getattr(options, name) for name in ("symmetric", "activations")}
        fields["group_size"] = options.group_size or DEFAULT_GROUP_SIZE
        fields |= {name: value for name, value in chosen.items() if value is not None}
        return make_scheme(quant, kernels=options.kernels, **fields)

    def scheme_of(rule: Rule) -> Scheme:
        try:
            return scheme(
                rule.quant, group_size=rule.group_size, symmetric=rule.symmetric, activations=rule.activations
            )
        except BuildError as error:
            raise BuildError(f"{rule.origin}: {rule.pattern!r}: {error}") from error

    if options.exclude and options.quant == "none":
        raise OptionsError("--exclude keeps linears float, as --quant none keeps all of them; leave one out")
    _check_scales(options)
    scales = {"weight_scales": options.weight_scales, "activation_scales": options.activation_scales}

    def scheme_of_packed(weight: PackedWeight) -> Scheme:
        grid = weight.grid
        return scheme(
            f"int{grid.bits}",
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            weight_scales=grid.weight_scales,
            activation_scales=options.activation_scales or weight.activation_scales or "group",
        )

    packed = packed_choices(config, checkpoint, scheme_of_packed)
    rest = "none" if packed and not rounds_rest(config, checkpoint) else _most(options.quant)
    rules = (*excluding(options.exclude), *options.quant_config)
    mixed = {name: SchemeChoice(scheme(quant)) for name, quant in _mixed(options, config).items()}
    schemes = Schemes(
        scheme(rest, **scales),
        scheme(options.embedding_quant, group_size=_embedding_group_size(options, config)),
        mixed | choose(linear_members(config), packed, rules, scheme_of),
    )
    _check_experts(options, config, schemes)
    return schemes


def _check_experts(options: ResolvedOptions, config: ModelConfig, schemes: Schemes) -> None:
    """Refuse experts that their operator could not multiply."""
    stacked = (name for name, members in linear_members(config).items() if members != (name,))
    name = next((name for name in stacked if not schemes.choice_of(name).scheme.in_experts), None)
    if name is not None and options.kernels == "stock":
        raise OptionsError(f"--kernels stock cannot multiply with experts ({name}); use --kernels native")
    if name is not None:
        raise OptionsError(f"--activation-scales static cannot be had of experts ({name}); choose token")


def _most(quant: str) -> str:
    """The scheme that a choice of ``--quant`` gives most linears."""
    return MIXES[quant].quant if quant in MIXES else CALIBRATED.get(quant, quant)


def _mixed(options: ResolvedOptions, config: ModelConfig) -> dict[str, str]:
    """What a mix stores otherwise than most of the linears, by name."""
    if options.quant not in MIXES:
        return {}
    mix = MIXES[options.quant]
    found = {name: mix.linears.get(name.rpartition(".")[2]) for name in linear_names(config) if LAYER.match(name)}
    if not config.tie_word_embeddings and options.embedding_quant == mix.head:
        found[EMBEDDING] = mix.lookup
    return {name: quant for name, quant in found.items() if quant}


def _embedding_group_size(options: ResolvedOptions, config: ModelConfig) -> int | None:
    """That of embedding and head, where it is not that of all linears.

    Beside int4, what int8 rounds does not show, whatever its groups. On 15 documents of WikiText-2 the demo's KL is
    0.319, 0.317 and 0.318 with groups of 32, 64 and 128; of the head alone, 0.0007, 0.0016 and 0.0027. With 128 a token
    of the 0.5B shape reads 2 % less.
    """
    if options.group_size is not None or (options.quant, options.embedding_quant) != ("int4", "int8"):
        return None
    return max((size for size in GROUP_SIZES if config.hidden_size % size == 0), default=None)


def padding_notes(linears: Iterable[LinearRecord]) -> tuple[str, ...]:
    """A sentence about each size of groups that fill a width up to more than the smallest groups would."""
    filled = Counter(
        (linear.in_features, linear.quantization.group_size)
        for linear in linears
        if linear.quantization.weight_scales == "group" and linear.quantization.method != "imported"
    )
    notes = []
    for (width, size), count in sorted(filled.items()):
        smaller = [own for own in GROUP_SIZES if own < size and _filled(width, own) < _filled(width, size)]
        if size and smaller:
            best = max(smaller, key=lambda own: (-_filled(width, own), own))
            notes.append(
                f"groups of {size} fill the {width} inputs of {count} linears up to {_filled(width, size)}, so they "
                f"are larger and less accurate; groups of {best} take {_filled(width, best)}."
            )
    return tuple(notes)


def _filled(width: int, group_size: int) -> int:
    """Inputs that are stored of ``width``: whole groups."""
    return -(-width // group_size) * group_size


def _check_scales(options: ResolvedOptions) -> None:
    """Refuse scales that the weights do not have, or that only calibration finds."""
    for name, calibrated in (("weight_scales", "tensor"), ("activation_scales", "static")):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if options.quant == "none" and value not in (None, "group"):
            raise OptionsError(f"{option} {value} says how integers are scaled, --quant none has none; leave one out")
        if value == calibrated and options.quant not in CALIBRATED:
            raise OptionsError(f"{option} {value} needs calibration; add --quant {' or '.join(CALIBRATED)}")
