"""What the builder has to know about a checkpoint, read from its ``config.json``.

What the config asks for and the graph does not have is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from qwen_build.architectures import ARCHITECTURES, REFUSED, Architecture
from qwen_build.checkpoint import qwen1
from qwen_build.checkpoint.config_keys import check_only, read_window, sliding_layers, unknown_keys
from qwen_build.checkpoint.endings import Ending
from qwen_build.checkpoint.experts import check_experts, read_experts, sparse_layers, with_one_count
from qwen_build.checkpoint.fields import boolean, integer, number, token_ids
from qwen_build.checkpoint.files import read_json
from qwen_build.checkpoint.rope import ROPE_OBJECTS, Rope, read_rope
from qwen_engine.errors import CheckpointError, UnsupportedModel
from qwen_engine.sizes import ModelSizes

MOST_POSITIONS = 2**24  # the rotary tables grow with them
# what every config.json says of a model; where one does not, its family's class in transformers has a default
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)

# what config.json says -> the rope object in place of its own
RopeOverride = Callable[["ModelConfig"], Mapping[str, Any]]


class Longest(NamedTuple):
    """The most tokens of a sequence.

    Attributes:
        why: no more, to be read after "the N tokens".
        trained: the tokens that YaRN could stretch; None: it cannot.
    """

    tokens: int
    why: str
    trained: int | None


@dataclass(frozen=True)
class ModelConfig(ModelSizes):
    """Sizes and features of one checkpoint.

    Attributes:
        layer_kinds: those of the layers, by turns.
        rope: how positions are rotated.
        longest: the most tokens of a sequence.
        qkv_bias, o_bias: which linears of the attention have biases.
        eos_token_ids: the config's own, maybe none.
        sliding_window: tokens that a layer of sliding_attention attends to, itself included; None: there is none.
        unknown: keys of the config that nobody here knows.
        ending: what the graph ends in; of a language model, where nothing else is said.
        assumed: sizes that it leaves out, which are those of the family's class in transformers.
    """

    architecture: Architecture
    layer_kinds: tuple[str, ...]
    max_position_embeddings: int
    rope: Rope
    longest: Longest
    qkv_bias: bool
    o_bias: bool
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None
    unknown: tuple[str, ...] = ()
    ending: Ending = field(default_factory=Ending)
    assumed: tuple[str, ...] = ()

    @property
    def sizes(self) -> ModelSizes:
        """The part that goes into the manifest."""
        return ModelSizes(**{name: getattr(self, name) for name in ModelSizes.__dataclass_fields__})

    @property
    def task(self) -> str:
        """What the engine is for."""
        return self.ending.task

    @property
    def width(self) -> int:
        """Numbers that the graph puts out for a token."""
        return self.vocab_size if self.ending.width is None else self.ending.width

    @property
    def missing(self) -> str:
        """What to say of sizes that ``config.json`` leaves out, where they do not fit the weights; empty for none."""
        return said_of_missing(self.assumed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of the config beside what was computed of it."""
        keys = ", ".join(self.unknown)
        unknown = f"config.json has {keys}, unknown to {self.model_type}'s configuration and left unread."
        return (*((unknown,) if keys else ()), *self.ending.notes)

    @classmethod
    def from_hf(cls, checkpoint: Path, override: RopeOverride | None = None) -> ModelConfig:
        """Read ``config.json`` of the directory ``checkpoint``.

        Args:
            override: makes of it the rope object that counts in place of its own; None: its own counts.

        Raises:
            CheckpointError: the file is missing, unreadable, or lacks a field.
            UnsupportedModel: the checkpoint needs something the graph does not have.
        """
        hf = read_json(checkpoint / "config.json")
        config = cls.from_json(hf)
        return config if override is None else cls.from_json(with_rope(hf, config, override(config)))

    @classmethod
    def from_json(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """As :meth:`from_hf`, from the parsed file."""
        model_type = hf.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            what = f" ({REFUSED[model_type]})" if isinstance(model_type, str) and model_type in REFUSED else ""
            raise UnsupportedModel(f"model_type {model_type!r}{what} is not one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[model_type]
        if model_type == qwen1.MODEL_TYPE:
            hf = qwen1.as_other_families(hf)
        if architecture.sparse:
            hf = with_one_count(hf)
        check_only(hf, architecture)
        assumed = tuple(key for key in SIZES if key not in hf)
        hf = with_defaults(hf, architecture)
        check_complete(hf)
        hidden_size, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
        positions = integer(hf, "max_position_embeddings", most=MOST_POSITIONS)
        biased = architecture.bias_key is not None and boolean(hf, architecture.bias_key)
        qkv_biased = architecture.qkv_bias_key is not None and boolean(hf, architecture.qkv_bias_key)
        rope = read_rope(hf, architecture.rope_theta, positions)
        length = longest(hf, rope, architecture, positions)
        window, kinds = layer_kinds(hf, architecture, length.tokens, assumed)
        experts = read_experts(hf, architecture)
        config = cls(
            architecture=architecture,
            layer_kinds=kinds,
            model_type=model_type,
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer(hf, "intermediate_size"),
            num_hidden_layers=integer(hf, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=integer(hf, "num_key_value_heads", heads),
            head_dim=integer(hf, "head_dim", architecture.head_dim or hidden_size // heads),
            rms_norm_eps=number(hf, "rms_norm_eps"),
            rope_theta=rope.theta,
            rope_type=rope.kind,
            rope_factor=rope.factor,
            tie_word_embeddings=boolean(hf, "tie_word_embeddings"),
            max_position_embeddings=positions,
            rope=rope,
            longest=length,
            experts=experts,
            qkv_bias=architecture.qkv_bias or biased or qkv_biased,
            o_bias=biased,
            eos_token_ids=token_ids(hf.get("eos_token_id")),
            sliding_window=window,
            unknown=unknown_keys(hf, architecture),
            assumed=assumed,
        )
        check_sizes(config)
        return config


def with_defaults(hf: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """``hf`` with what its family's class has where a key is absent; numbers and switches also where it is null."""
    defaults = dict(architecture.defaults)
    if architecture.bias_key:
        defaults[architecture.bias_key] = False
    absent = {key for key, value in defaults.items() if hf.get(key) is None and isinstance(value, float | bool)}
    return {**defaults, **{key: value for key, value in hf.items() if key not in absent}}


def check_complete(hf: Mapping[str, Any]) -> None:
    """Raise unless every size without which there is no model is there."""
    if missing := said_of_missing([key for key in SIZES if key not in hf]):
        raise CheckpointError(missing)


def said_of_missing(keys: Sequence[str]) -> str:
    """What to say of ``config.json`` where it has none of ``keys``; empty where there is none of them.

    >>> said_of_missing(["num_hidden_layers"])
    'config.json has no num_hidden_layers; download config.json again, or add what is missing'
    """
    named = " and no ".join(keys)
    return f"config.json has no {named}; download config.json again, or add what is missing" if keys else ""


def with_rope(hf: Mapping[str, Any], config: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """``hf``, read as ``config``, with ``rope`` in place of its rope objects; where that has no theta, it stays."""
    rest = {key: value for key, value in hf.items() if key not in (*ROPE_OBJECTS, "rope_theta")}
    return {**rest, ROPE_OBJECTS[0]: {"rope_theta": config.rope.theta} | dict(rope)}


def longest(hf: Mapping[str, Any], rope: Rope, architecture: Architecture, positions: int) -> Longest:
    """The most tokens of a sequence that the config is right for, and why no more."""
    tokens = rope.longest(positions)
    if tokens > MOST_POSITIONS:
        raise UnsupportedModel(f"config.json asks for sequences of {tokens} tokens, expected at most {MOST_POSITIONS}")
    chunked = hf.get("dual_chunk_attention_config")
    if chunked is not None:
        if not isinstance(chunked, dict):
            raise CheckpointError(f"config.json: dual_chunk_attention_config is {chunked!r}, expected an object")
        sizes = [integer(chunked, "chunk_size"), integer(chunked, "original_max_position_embeddings", tokens), tokens]
        return Longest(min(sizes), "of a chunk, up to which dual chunk attention is plain attention", None)
    if architecture.beyond:
        return Longest(tokens, f"beyond which it needs {architecture.beyond}, which engines have not", None)
    trained = architecture.trained.get(positions, positions)
    if rope.depends_on_length:
        why = f"beyond which rope type {rope.kind!r} gives a token other numbers in a longer text"
        return Longest(tokens, why, rope.original or trained)
    stretched = {"default": trained, "yarn": rope.original}
    return Longest(tokens, "the checkpoint was trained for", stretched.get(rope.kind))


def layer_kinds(
    hf: Mapping[str, Any], architecture: Architecture, most: int, assumed: Sequence[str]
) -> tuple[int | None, tuple[str, ...]]:
    """The window of the layers that have one, and the kinds of the layers, by turns; ``assumed`` are keys it left out.

    A list of ``layer_types`` says the kinds, else the keys of the family for windows, else its row. A window of all
    the ``most`` tokens of a sequence is none.
    """
    count, found = integer(hf, "num_hidden_layers"), hf.get("layer_types")
    window = read_window(hf, architecture.window)
    if found is None:
        own = architecture.layer_kinds
        kinds = own if architecture.window is None else sliding_layers(hf, architecture.window, window, count)
        kinds = own if kinds == ("full_attention",) else kinds
    else:
        if isinstance(found, list) and len(found) != count and "num_hidden_layers" in assumed:
            raise CheckpointError(said_of_missing(["num_hidden_layers"]))
        kinds = check_layer_types(found, architecture, window, count)
    if window is None or window >= most or "sliding_attention" not in kinds:
        window, kinds = None, tuple("full_attention" if kind == "sliding_attention" else kind for kind in kinds)
    if architecture.sparse:
        kinds = sparse_layers(hf, architecture.sparse, kinds, count)
    for turns in (architecture.layer_kinds, kinds[:1]):
        if all(kind == expected for kind, expected in zip(kinds, cycle(turns), strict=False)):
            return window, turns
    return window, kinds


def check_layer_types(found: Any, architecture: Architecture, window: int | None, count: int) -> tuple[str, ...]:
    """``layer_types`` of a config, which name kinds of its family.

    Raises:
        CheckpointError: they are no list of ``count``, or contradict other keys.
        UnsupportedModel: the family has no such layers.
    """
    if not isinstance(found, list):
        raise CheckpointError(f"config.json: layer_types is {found!r}, expected a list")
    known = [*architecture.layer_kinds, *(["sliding_attention"] if architecture.window else [])]
    if others := sorted({repr(kind) for kind in found if kind not in known}):
        raise UnsupportedModel(
            f"config.json: layer_types {', '.join(others)} are not supported, only {' and '.join(known)} is"
        )
    if len(found) != count:
        raise CheckpointError(f"config.json: {len(found)} layer_types, num_hidden_layers {count}; make them agree")
    if "sliding_attention" in found and window is None:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window or sliding_window says there is no "
            "window; keep the right one"
        )
    return tuple(found)


def check_sizes(config: ModelConfig) -> None:
    """Raise unless the sizes fit each other and the operators."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 8 or head_dim > 256:
        raise UnsupportedModel(f"head_dim {head_dim} is not a multiple of 8 up to 256")
    if config.experts is not None:
        check_experts(config.experts, config.hidden_size)
