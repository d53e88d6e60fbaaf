"""How an engine computes, so that a reference can do the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from qwen_engine.manifest import WEIGHTS_FILE, Manifest, Quantization


@dataclass(frozen=True)
class Recipe:
    """How an engine computes, and with what.

    Attributes:
        engine: its directory.
        quantizations: of every linear and the embedding, by transformers' name.
        cache_dtype: what keys and values are rounded to.
        calibrated: sha256 of the weights where they were calibrated; else they follow from checkpoint and schemes.
        rope_scaling: what was given in place of the checkpoint's rope object.
    """

    engine: Path
    quantizations: Mapping[str, Quantization]
    cache_dtype: str
    calibrated: str | None
    rope_scaling: str | None

    @classmethod
    def read(cls, engine: Path) -> Recipe:
        """The recipe that the manifest in the directory ``engine`` records.

        Raises:
            EngineError: it cannot be read.
        """
        manifest = Manifest.read(engine)
        quantizations = {part.name: linear.quantization for linear in manifest.linears for part in linear.all_parts}
        calibrated = any(linear.output_error is not None for linear in manifest.linears)
        digest = manifest.parts[WEIGHTS_FILE].sha256 if calibrated else None
        return cls(engine, quantizations, manifest.cache.dtype, digest, manifest.origin.rope_scaling)

    def with_float_activations(self) -> Recipe:
        """The same without the rounding of what goes into a linear.

        Rounding is a step function: two sums that differ in the last bit land on two sides of a step now and then, and
        within a few layers sides that agree in everything else are as far apart as rounding itself is large. From
        end to end only weights, graph and cache can be held to float thresholds; rounded inputs can be one
        sub-block at a time, see :meth:`qwen_run.accuracy.reference.HuggingFace.hidden_outputs`.
        """
        unrounded = {name: replace(row, activations="float32") for name, row in self.quantizations.items()}
        return replace(self, quantizations=unrounded)

    @property
    def digest(self) -> str:
        """sha256 of everything that the answers depend on besides the checkpoint."""
        rows = sorted((name, *astuple(quantization)) for name, quantization in self.quantizations.items())
        return hashlib.sha256(
            json.dumps([rows, self.cache_dtype, self.calibrated, self.rope_scaling]).encode()
        ).hexdigest()
