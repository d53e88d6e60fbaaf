"""The keywords of ``from_pretrained``: those of the engine's settings, of the Hub, and of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwen_engine.errors import CheckpointError, first_line
from qwen_run.api.build_on_demand import READ_SUFFIXES, is_engine
from qwen_run.api.causal_lm import Config
from qwen_run.api.engine_config import EngineConfig

PREFIX = "engine_"
HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# What transformers' models take and an engine has no use for: its precision and place are fixed.
WITHOUT_EFFECT = ("torch_dtype", "dtype", "device_map", "trust_remote_code", "attn_implementation", "low_cpu_mem_usage")


@dataclass(frozen=True)
class EngineArguments:
    """What ``from_pretrained`` was asked for: the directory, and how its engine is built and run."""

    path: str | Path
    engine_config: EngineConfig

    @classmethod
    def of(cls, path: str | Path, export: bool, engine_config: Config, options: Mapping[str, Any]) -> Self:
        """The keywords ``options`` sorted out.

        Raises:
            TypeError: one is unknown.
            ValueError: a setting violates a rule, or is given twice.
            CheckpointError: the Hub does not give the checkpoint.
        """
        settings = {name.removeprefix(PREFIX): value for name, value in options.items() if name.startswith(PREFIX)}
        hub = {name: options[name] for name in HUB if options.get(name) not in (None, False)}
        idle = [name for name in WITHOUT_EFFECT if options.get(name) is not None]
        known = {*HUB, *WITHOUT_EFFECT}
        if unknown := [name for name in options if name not in known and not name.startswith(PREFIX)]:
            expected = ", ".join(["export", "engine_config", f"{PREFIX}FIELD", *HUB])
            raise TypeError(f"from_pretrained has no {unknown[0]!r}, expected {expected}")
        if options.get("device_map") not in (None, "cpu", "auto"):
            raise ValueError(
                f"device_map is {options['device_map']!r}, expected 'cpu': an engine runs on the processor"
            )
        if idle:
            warnings.warn(
                f"{', '.join(idle)} has no effect: an engine computes in float32 on the processor", stacklevel=3
            )
        given = vars(EngineConfig.of(engine_config)) if engine_config is not None else {}
        if twice := sorted(settings.keys() & {name for name in given if given[name] != getattr(EngineConfig(), name)}):
            raise ValueError(f"{twice[0]} is in engine_config and given as {PREFIX}{twice[0]}, expected one of them")
        return cls(_from_hub(path, hub, export), EngineConfig.of({**given, **settings}))


def _from_hub(path: str | Path, hub: Mapping[str, Any], export: bool) -> str | Path:
    """A local directory of the Hub id ``path``, where anything of the Hub is asked for."""
    if not hub or is_engine(path) or Path(path).is_dir():
        folder = hub.get("subfolder")
        return Path(path) / str(folder) if folder else path
    if not export:
        raise ValueError(
            f"{path} is no directory and export is False; pass export=True to build a checkpoint of the Hub"
        )
    from huggingface_hub import snapshot_download

    folder = str(hub.get("subfolder", ""))
    inside = f"{folder}/" if folder else ""
    try:
        found = snapshot_download(
            str(path),
            **{name: value for name, value in hub.items() if name != "subfolder"},
            allow_patterns=[f"{inside}*{suffix}" for suffix in READ_SUFFIXES if suffix != ".gguf"],
            ignore_patterns=[f"{inside}*/*"],
        )
    except Exception as error:  # the Hub's libraries share no base class
        raise CheckpointError(f"{path} cannot be had from the Hugging Face Hub: {first_line(error)}") from error
    checkpoint = Path(str(found)) / folder
    if not checkpoint.is_dir():
        raise CheckpointError(f"{path} has no folder {folder} on the Hugging Face Hub; leave subfolder out, or mend it")
    return checkpoint
