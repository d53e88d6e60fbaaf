"""LoRA adapters as peft saves them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

LLaMA-Factory, ms-swift and Unsloth write the same files. ``merging.py`` computes what they add.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwen_build.checkpoint.files import check_inside, read_json
from qwen_build.checkpoint.patterns import matches
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import STORAGE
from qwen_build.checkpoint.shards import ADAPTER_FILE, graph_name, some
from qwen_engine.errors import CheckpointError, UnsupportedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# parts of an adapted module, as their names end: peft's own attribute names
A, B, EMBEDDING_A, EMBEDDING_B = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, BIAS, TOKENS = "lora_magnitude_vector", "lora_B.bias", "trainable_tokens_delta"
_PART = re.compile(
    rf"(?P<module>.+?)\.(?P<part>{A}|{B}|{EMBEDDING_A}|{EMBEDDING_B}|{MAGNITUDE}|(?:token_adapter\.)?{TOKENS})"
    r"(?:\.default)?(?P<kind>\.weight|\.bias)?"
)
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer|original_module)(?=\.)")

# key of adapter_config.json -> what cannot be merged where it is set
REFUSED = {
    "layer_replication": "it runs layers more than once",
    "alora_invocation_tokens": "it acts from some tokens on alone",
    "use_qalora": "it belongs to quantised inputs",
    "use_bdlora": "its matrices are of blocks",
    "arrow_config": "it routes among several adapters",
    "kasa_config": "it has singular values",
    "monteclora_config": "its weights are random",
    "target_parameters": "it adapts parameters that are no linears",
    "megatron_config": "it is of a model in pieces",
}
# ways to begin that change the base model too, as init_lora_weights says them
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraChoice(NamedTuple):
    """An adapter to merge, and the factor of what it adds."""

    directory: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read ``DIR`` or ``DIR=WEIGHT``; a folder that exists goes before.

        Raises:
            CheckpointError: there is no such folder, or the weight is no number.
        """
        directory, separator, weight = text.rpartition("=")
        if not separator or os.path.isdir(os.path.expanduser(text)):
            directory, weight = text, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise CheckpointError(f"--lora {text}: {weight!r} is no weight, expected a number such as 0.5")
        path = Path(os.path.expanduser(directory))
        if not os.path.isdir(path):  # what the system refuses to look at is absent too
            raise CheckpointError(f"--lora {text}: no such directory; give the folder with {ADAPTER_FILE}")
        return cls(path.resolve(), factor)


@dataclass(frozen=True)
class Adapter:
    """One adapter, its file open.

    Attributes:
        parts: by module of the graph, part by part the name of the tensor in ``files``.
        replaced: weights of the graph that it has whole, and the names of their tensors.
    """

    directory: Path
    weight: float
    config: Mapping[str, Any]
    files: Safetensors
    parts: Mapping[str, Mapping[str, str]]
    replaced: Mapping[str, str]

    @property
    def base(self) -> str:
        """What it says that it was trained on."""
        return str(self.config.get("base_model_name_or_path") or "an unnamed model")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that decide what it adds."""
        return adapter_files(self.directory)

    def rank(self, module: str) -> int:
        """What the config says of the rows of ``lora_A`` of ``module``."""
        return int(self._of_pattern("rank_pattern", module, "r"))

    def scale(self, module: str) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) (rslora, arXiv 2312.03732), times ``weight``."""
        rank, alpha = self.rank(module), float(self._of_pattern("alpha_pattern", module, "lora_alpha"))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank) * self.weight

    def _of_pattern(self, patterns: str, module: str, common: str) -> float:
        """What the first of ``patterns`` says that matches the end of a module's name, as peft finds it."""
        rules = self.config.get(patterns) or {}
        found = next((rules[key] for key in rules if matches(rf"(.*\.)?({key})$", module)), self.config.get(common))
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 2**31:
            raise CheckpointError(
                f"{self.directory / ADAPTER_FILE}: {common} of {module} is {found!r}, expected a positive number"
            )
        return found


def adapter_files(directory: Path) -> tuple[Path, Path]:
    """The files of the adapter in ``directory`` that decide what it adds."""
    return directory / ADAPTER_FILE, directory / ADAPTER_WEIGHTS


def open_adapter(choice: LoraChoice) -> Adapter:
    """Open the adapter in a folder; its header is read, no weight is.

    Raises:
        CheckpointError: it is no adapter, or damaged.
        UnsupportedModel: it is of a kind that cannot be merged.
    """
    directory = choice.directory
    if not (directory / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{directory} has no {ADAPTER_FILE}: it is no LoRA adapter; give the folder that peft saved"
        )
    config = read_json(directory / ADAPTER_FILE)
    _check_config(directory, config)
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        others = sorted(found.name for found in directory.glob("adapter_model.*"))
        raise CheckpointError(
            f"{directory} has no {ADAPTER_WEIGHTS}, but {some(others)}; save the adapter with save_pretrained of a "
            "recent peft"
        )
    check_inside(path)
    files = Safetensors.open_file(path)
    try:
        if odd := [f"{info.name} ({info.dtype})" for info in files.tensors.values() if info.dtype not in STORAGE]:
            raise CheckpointError(f"{path} stores {some(odd)}, expected only {', '.join(STORAGE)}")
        parts, replaced = _sorted_out(files)
        return Adapter(directory, choice.weight, config, files, parts, replaced)
    except BaseException:
        files.close()
        raise


def _check_config(directory: Path, config: Mapping[str, Any]) -> None:
    where = directory / ADAPTER_FILE
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedModel(
            f"{where}: peft_type is {kind!r}, only 'LORA' can be merged; merge it with peft's merge_and_unload, and "
            "give what was saved as the checkpoint"
        )
    for key, reason in REFUSED.items():
        if config.get(key):
            raise UnsupportedModel(
                f"{where} has {key}: {reason}; merge it with peft where that can, and give what was saved"
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGED_BASE):
        raise UnsupportedModel(
            f"{where}: init_lora_weights is {begun!r}, which changes the base model as well; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key), dict | None):
            raise CheckpointError(f"{where}: {key} is {config[key]!r}, expected an object")


def _sorted_out(files: Safetensors) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The tensors by module and part, and those that are whole weights; see :class:`Adapter`."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in files.tensors:
        plain = name.removeprefix(PREFIX)
        if match := _PART.fullmatch(plain):
            part = match["part"].removeprefix("token_adapter.")
            if (part, match["kind"]) == (B, ".bias"):
                part = BIAS
            parts.setdefault(graph_name(match["module"]), {})[part] = name
        else:
            module, _, kind = _WRAPPED.sub("", plain).rpartition(".")
            replaced[f"{graph_name(module)}.{kind}"] = name
    return parts, replaced
