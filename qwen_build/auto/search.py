"""``--quant auto``: a scheme for every linear, so that the engine is as small, or as accurate, as its user asked.

The KL that every choice causes is predicted (``sensitivity.py``), the best choices within the budget are picked
(``knapsack.py``), and that engine is built and measured through the runtime (``trials.py``). What the prediction missed
corrects the budget of the next one (``budget.py``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_build.auto.budget import SchemeSearch
from qwen_build.auto.report import CHOICES_FILE, REPORT_FILE, AutoReport, megabytes, rebuild_command, to_html
from qwen_build.auto.sensitivity import Probing, Unit, decision_units, kept
from qwen_build.auto.trials import BuiltEngines, Progress, Text, float_states, without_calibration
from qwen_build.calibration.text import read_halves
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.endings import read_ending
from qwen_build.checkpoint.files import digest_files
from qwen_build.checkpoint.locate import Located
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_build.plan.rope_options import rope_override
from qwen_build.plan.rules import write_rules
from qwen_build.quantization.scheme_table import KERNELS, SCHEMES, make_scheme
from qwen_build.quantization.schemes import Scheme
from qwen_build.writing.output import check_output, engine_directory, resumable_beside
from qwen_engine import __version__
from qwen_engine.errors import BuildError, OptionsError
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_engine.tasks import GENERATE, TASKS
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.engine_files.checksums import measure_part

# quant, group size and symmetric of a probe: in the middle of those of int4, whose errors matter most
_PROBE = ("int4", 64, False)

# --int4-method where none is asked for
_METHOD = "gptq"
# What a method leaves of the squared error of rounding to nearest: 0.30 of the KL of a small Qwen2 with int4 g32.
# It weighs rounded weights against rounded inputs; being wrong about it is corrected like the rest.
_LEFT = {"gptq": 0.3}

# Sequences of 512 tokens that probes run. With the demo, choices by 512 tokens have 0.3 to 1.2 % more KL than those by
# 1,024 others, as these see it.
_PROBED = 1
# Sequences of either text that engines are measured with.
_MEASURED = 8


def build_auto(
    checkpoint: Checkpoint,
    located: Located,
    options: BuildOptions,
    output: Path,
    max_kl: float | None = None,
    max_bytes: int | None = None,
    replace: bool = False,
    command: str = "",
    progress: Progress = lambda label, length: nullcontext(lambda done: None),
) -> AutoReport:
    """Write the best engine within a budget to ``output``, and beside its other parts what was chosen and why.

    Where this is interrupted, what it measured is kept beside ``output`` for the next time.

    Args:
        options: their ``exclude`` and ``quant_config`` decide the linears that they name.
        max_kl: the smallest engine of this KL; mean of KL(float || engine) in nats, on calibration text and other text.
        max_bytes: or the most accurate engine of this size, all its files together.

    Raises:
        BuildError: an option does not go with auto, the text is too short, or no engine is within the budget.
    """
    check_output(output, replace)
    config = checkpoint.adapted(ModelConfig.from_hf(located.path, rope_override(options)))
    check_options(options, checkpoint, max_kl, max_bytes)
    if config.experts is not None:
        raise BuildError(
            "--quant auto measures each linear of a dense model, this one is a mixture of experts; choose --quant "
            "int8, or int4 with --int4-method gptq"
        )
    if (found := read_ending(located.path, config.hidden_size, options.task).task) != GENERATE:
        raise BuildError(
            f"--quant auto measures how likely next tokens are, an engine that {TASKS[found].does} has none; "
            "choose --quant int8, or int4 with --int4-method gptq"
        )
    task = _plan_search(checkpoint, located, options, config)
    with resumable_beside(output, task.key(checkpoint)) as scratch:
        kl = _probe(task, checkpoint, scratch, progress)
        texts = _run_float_model(task, checkpoint, progress)
        engines = BuiltEngines(checkpoint, located, task.options, task.units, texts, scratch, command, progress)
        search = SchemeSearch(task.units, kl, engines.stored_bytes, engines)
        best = search.within_kl(max_kl) if max_kl is not None else search.within_bytes(max_bytes or 0)
        report = AutoReport(
            located.name, task.units, kl, best, search.trials,
            budget=f"KL of at most {max_kl:g}" if max_kl is not None else f"at most {megabytes(max_bytes or 0)}",
            held_out=task.held_out,
            held_out_tokens=texts[1].token_ids.size,
            rebuild=rebuild_command(engines.options_of(best.choice), located.source, output / CHOICES_FILE),
        )  # fmt: skip
        engine = engines.engine(best.choice, "Building the best again")
        files = {CHOICES_FILE: write_rules(engines.rules(best.choice)), REPORT_FILE: to_html(report)}
        with engine_directory(output, replace) as new:
            for path in engine.iterdir():
                path.rename(new / path.name)
            add_parts(new, files)
    return report


@dataclass(frozen=True, eq=False)
class _SearchTask:
    """What a search chooses from, and by which texts.

    Attributes:
        options: of every engine.
        calibration_ids, held_out_ids: int64 (S, L); what the latter is, in words, is ``held_out``.
        probe: the scheme that is run of every unit.
        left: the share of its squared error that calibrated rounding leaves.
    """

    config: ModelConfig
    options: BuildOptions
    calibration_ids: np.ndarray
    held_out_ids: np.ndarray
    held_out: str
    units: Sequence[Unit]
    probe: Scheme
    left: float

    def key(self, checkpoint: Checkpoint) -> str:
        """The same for searches that find the same."""
        decisive = [
            digest_files(checkpoint.files), repr(self.units), repr(self.probe), repr(self.options), __version__,
        ]  # fmt: skip
        hashed = hashlib.sha256(json.dumps(decisive).encode())
        for ids in (self.calibration_ids, self.held_out_ids):
            hashed.update(ids.tobytes())
        return hashed.hexdigest()[:16]


def _plan_search(checkpoint: Checkpoint, located: Located, options: BuildOptions, config: ModelConfig) -> _SearchTask:
    plain = plan_build(checkpoint, located, dataclasses.replace(without_calibration(options), quant="int8"))
    options, calibration_ids, held_out_ids, held_out = split_text(options, located.path, config, plain.max_seq_len)
    units = decision_units(config, plain.schemes.exceptions, candidates(options))
    probe = make_scheme(*_PROBE, kernels=options.kernels, activations="float32")
    left = _LEFT.get(options.int4_method or "", 1.0)
    return _SearchTask(config, options, calibration_ids, held_out_ids, held_out, units, probe, left)


def _probe(task: _SearchTask, checkpoint: Checkpoint, scratch: Path, progress: Progress) -> list[list[float]]:
    """The KL predicted of each unit and each of its schemes."""
    ids, probes = task.calibration_ids, scratch / "probes"
    probes.mkdir(exist_ok=True)
    evenly = np.linspace(0, len(ids) - 1, min(_PROBED, len(ids))).astype(int)
    probing = Probing(checkpoint, task.config, task.units, task.probe, ids[evenly], probes, task.left)
    with progress("Probing every linear", probing.work) as advance:
        kl: list[list[float]] = kept(scratch / "sensitivity.json", lambda: probing.measure(advance))
    shutil.rmtree(probes)
    return kl


def _run_float_model(task: _SearchTask, checkpoint: Checkpoint, progress: Progress) -> tuple[Text, Text]:
    """The texts that engines are measured with: the calibration text and the one held out."""
    calibration_ids, held_out_ids = task.calibration_ids[:_MEASURED], task.held_out_ids[:_MEASURED]
    work = (calibration_ids.size + held_out_ids.size) * task.config.num_hidden_layers
    with progress("Running the float model", work) as advance:
        return (
            Text("calibration text", calibration_ids, float_states(checkpoint, task.config, calibration_ids, advance)),
            Text("held-out text", held_out_ids, float_states(checkpoint, task.config, held_out_ids, advance)),
        )


def check_options(options: BuildOptions, checkpoint: Checkpoint, max_kl: float | None, max_bytes: int | None) -> None:
    """Refuse what contradicts ``--quant auto``.

    Raises:
        BuildError: names the option.
    """
    if (max_kl is None) == (max_bytes is None):
        found = "neither" if max_kl is None else "both"
        raise OptionsError(f"--quant auto keeps to either --max-kl or --max-size, found {found}; give one")
    for name in ("group_size", "symmetric", "embedding_quant", "weight_scales", "activation_scales", "alpha"):
        if (value := getattr(options, name)) is not None:
            option = "--symmetric or --asymmetric" if name == "symmetric" else f"--{name.replace('_', '-')} {value}"
            raise OptionsError(f"--quant auto makes the choice of {option} for each linear; leave it out")
    if checkpoint.quant is not None and checkpoint.format is not None:
        raise BuildError(
            f"--quant auto has nothing to choose, the checkpoint is stored as {checkpoint.format.name} "
            f"{checkpoint.quant} already; leave it out or build from the float checkpoint"
        )


def candidates(options: BuildOptions) -> tuple[Scheme, ...]:
    """The schemes to choose from, those of fewer bits first, each with every group size; and float."""
    bits = KERNELS[options.kernels].bits
    rows = sorted(SCHEMES.items(), key=lambda item: item[1].bits)
    grids = [(quant, symmetric) for quant, row in rows for symmetric in row.auto if row.bits in bits]
    chosen = [(quant, size, symmetric) for quant, symmetric in grids for size in GROUP_SIZES]
    return tuple(
        make_scheme(*one, kernels=options.kernels, activations=options.activations)
        for one in [*chosen, ("none", GROUP_SIZES[0], None)]
    )


def split_text(
    options: BuildOptions, directory: Path, config: ModelConfig, max_seq_len: int
) -> tuple[BuildOptions, np.ndarray, np.ndarray, str]:
    """The text to calibrate with, and other text to verify with, see :func:`qwen_build.calibration.text.read_halves`.

    Returns:
        The options of the engines, which calibrate with the former alone; both texts, token ids int64 (S, L); and what
        the latter is, in words.

    Raises:
        BuildError: the text is too short.
    """
    text = options.calibration
    sequences, held_out, words = read_halves(directory, config, text, options.calibration_tokens, _MEASURED)
    method = options.int4_method or _METHOD
    options = dataclasses.replace(options, int4_method=method)
    if method == "rtn":
        options = without_calibration(options)
    elif text is not None:
        options = dataclasses.replace(options, calibration_tokens=sequences.size)
    shortened = min(sequences.shape[1], max_seq_len)
    return options, sequences[:, :shortened], held_out[:, :shortened], words


def add_parts(engine: Path, files: Mapping[str, str]) -> None:
    """Make files of these names and texts parts of an engine."""
    for name, text in files.items():
        (engine / name).write_text(text, encoding="utf-8")
    manifest = Manifest.read(engine)
    parts = dict(manifest.parts) | {name: measure_part(engine / name) for name in files}
    manifest = dataclasses.replace(manifest, parts=dict(sorted(parts.items())))
    (engine / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
