"""``qwen-summarize`` on tiny engines: healthy ones pass, and every planted fault is caught and found.

More than 400 lines: all tests share three engines, their saved references and one table of planted faults.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cases.chat_checkpoint import WORDS, write_chat_checkpoint
from cases.processes import run_python
from qwen_build.checkpoint.rope import Rope
from qwen_build.graph.rope import rope_tables
from qwen_build.plan.rules import Rule
from qwen_engine.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_plugin.layout import pack_panels, round_block_scales, round_scales, unpack_panels
from qwen_run.accuracy.assess import engine_info
from qwen_run.accuracy.metrics import METRIC_NAMES
from qwen_run.accuracy.report import Report
from qwen_run.commands.summarize import main
from qwen_run.engine_files.checksums import measure_part

LAYER = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "qwen2").path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [
        {"document": " ".join(rng.choice(WORDS, 40)), "summary": " ".join(rng.choice(WORDS, 6)) if i % 2 else None}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def engines(checkpoint, build_engine) -> dict[str, Path]:
    return {quant: build_engine(checkpoint, quant=quant) for quant in ("none", "int8", "int4")}


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory) -> Path:
    """As built: the built-in bounds. Against the original, a random tiny model has bounds of its own."""
    path = tmp_path_factory.mktemp("gate") / "gate.toml"
    path.write_text(
        "[original]\nkl_mean = { at_most = 0.5 }\n"
        "[as_built]\nkl_mean = { at_most = 1e-5 }\ntop1 = { at_least = 0.995 }\n"
        "perplexity_ratio = { at_least = 0.999, at_most = 1.001 }\n"
    )
    return path


def summarize(engine: Path, dataset: Path, report: Path, *options: object) -> Any:
    fixed = ["--engine", engine, "--dataset", dataset, "--report", report, "--max-new-tokens", 8, "--threads", 1]
    return CliRunner().invoke(main, [str(a) for a in (*fixed, "--no-cost", *options)], catch_exceptions=False)


@pytest.fixture(scope="module")
def saved(engines, dataset, thresholds, tmp_path_factory) -> dict[str, Path]:
    """A saved reference of each healthy engine, which passes live."""
    directory = tmp_path_factory.mktemp("saved")
    for quant, engine in engines.items():
        options = ["--thresholds", thresholds, "--save-reference", directory / f"{quant}.npz"]
        result = summarize(engine, dataset, directory / quant, *options)
        assert result.exit_code == 0, result.output
    return {quant: directory / f"{quant}.npz" for quant in engines}


# ---------------------------------------------------------------------------------------------- planted faults


class Weights:
    """The tensors of an engine's weights file, by the names of the graph, to be changed in place."""

    def __init__(self, engine: Path) -> None:
        graph = onnx.load(engine / GRAPH_FILE, load_external_data=False).graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
        self.file = np.memmap(engine / WEIGHTS_FILE, np.uint8, "r+")

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.initializers[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(place["offset"]), int(place["length"])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return self.file[start : start + length].view(dtype).reshape(tuple(tensor.dims))


def swap_gate_and_up(engine: Path) -> None:
    weights = Weights(engine)
    for name in weights.initializers:
        if name.startswith(f"model.layers.{LAYER}.mlp.gate_up_proj."):
            weights[name][:] = np.roll(weights[name], len(weights[name]) // 2, axis=0)


def change_panels(engine: Path, linear: str, change: Callable[[np.ndarray, np.ndarray], None]) -> None:
    """Let ``change`` alter q (out_features, padded in_features) and scales (out_features, groups) in place."""
    record = next(record for record in Manifest.read(engine).linears if record.name == linear)
    grid = record.quantization
    padded = -(-record.in_features // grid.group_size) * grid.group_size
    panels = Weights(engine)[f"{linear}.panels"]
    blocks = grid.activation_scales == "block"
    q, scales, zero_points = unpack_panels(
        panels, record.out_features, padded, grid.bits, grid.group_size, grid.symmetric, blocks
    )
    change(q, scales)
    scales = round_block_scales(scales, grid.bits, grid.group_size, zero_points) if blocks else round_scales(scales)
    panels[:] = pack_panels(q, scales, zero_points, grid.bits, grid.group_size, blocks)


def swap_halves_of_bytes(engine: Path) -> None:
    def swap(q: np.ndarray, scales: np.ndarray) -> None:
        q[:, 0::2], q[:, 1::2] = q[:, 1::2].copy(), q[:, 0::2].copy()

    change_panels(engine, f"model.layers.{LAYER}.mlp.down_proj", swap)


def scale_by_five_percent(engine: Path) -> None:
    def scale(q: np.ndarray, scales: np.ndarray) -> None:
        scales *= 1.05

    change_panels(engine, f"model.layers.{LAYER}.self_attn.o_proj", scale)


def wrong_rotary_base(engine: Path) -> None:
    weights, limit = Weights(engine), Manifest.read(engine)
    tables = rope_tables(limit.model.head_dim, Rope("default", limit.model.rope_theta * 10), limit.limits.max_seq_len)
    for name, table in zip(("rope.cos", "rope.sin"), tables, strict=True):
        weights[name][:] = table


def off_by_one_positions(engine: Path) -> None:
    """From the 64th on, every position is one too large. (All of them one too large would change nothing.)"""
    weights = Weights(engine)
    for name in ("rope.cos", "rope.sin"):
        table = weights[name]
        table[64:-1] = table[65:].copy()


def norm_of_ones(engine: Path) -> None:
    Weights(engine)[f"model.layers.{LAYER}.input_layernorm.weight"][:] = 1


def end_of_sequence_missing(engine: Path) -> None:
    manifest = json.loads((engine / MANIFEST_FILE).read_text())
    manifest["eos_token_ids"].pop(0)
    (engine / MANIFEST_FILE).write_text(json.dumps(manifest))


def merge_missing(engine: Path) -> None:
    path = engine / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


# fault -> (scheme of the engine, what must be named: weights by the comparison with the checkpoint, else a sub-block
# by --layers; None where the model computes as it should)
FAULTS: dict[Callable[[Path], None], tuple[str, str | None]] = {
    swap_gate_and_up: ("int8", f"model.layers.{LAYER}.mlp.gate_proj, model.layers.{LAYER}.mlp.up_proj"),
    swap_halves_of_bytes: ("int4", f"model.layers.{LAYER}.mlp.down_proj"),
    scale_by_five_percent: ("int4", f"model.layers.{LAYER}.self_attn.o_proj"),
    wrong_rotary_base: ("int8", "model.layers.0.self_attn.o_proj.input"),
    off_by_one_positions: ("int8", "model.layers.0.self_attn.o_proj.input"),
    norm_of_ones: ("int8", f"model.layers.{LAYER}.input_layernorm.weight"),
    end_of_sequence_missing: ("int8", None),
    merge_missing: ("int8", None),
}
OF_WEIGHTS = (swap_gate_and_up, swap_halves_of_bytes, scale_by_five_percent, norm_of_ones)
OF_GRAPH = (wrong_rotary_base, off_by_one_positions)
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


def faulty_engine(fault: Callable[[Path], None], engines: dict[str, Path], directory: Path) -> Path:
    """A copy of a healthy engine with ``fault`` planted, its checksums made right again."""
    engine = Path(shutil.copytree(engines[FAULTS[fault][0]], directory / fault.__name__))
    fault(engine)
    manifest = json.loads((engine / MANIFEST_FILE).read_text())
    manifest["parts"] = {name: vars(measure_part(engine / name)) for name in manifest["parts"]}
    (engine / MANIFEST_FILE).write_text(json.dumps(manifest))
    return engine


@every_fault
def test_a_planted_fault_fails_the_gate(fault, engines, saved, dataset, tmp_path):
    engine = faulty_engine(fault, engines, tmp_path)
    options = ["--check", "--reference", saved[FAULTS[fault][0]]]
    result = summarize(engine, dataset, tmp_path / "report", *options)
    assert result.exit_code == 3, result.output
    report = Report.read(tmp_path / "report" / "report.json")
    assert report.outcome == "failed"
    if FAULTS[fault][1] is None:
        assert any(not check.passed for check in report.checks)
    else:
        failed = [verdict.threshold.metric for verdict in report.verdicts if verdict.outcome == "failed"]
        assert "as_built.kl_mean" in failed  # the bound that healthy engines keep, see below; not the original's


@pytest.mark.parametrize("fault", OF_WEIGHTS, ids=lambda fault: fault.__name__)
def test_wrong_weights_are_named(fault, engines, dataset, tmp_path):
    result = summarize(faulty_engine(fault, engines, tmp_path), dataset, tmp_path / "report", "--max-samples", 1)
    assert result.exit_code == 3, result.output
    failed = [check for check in Report.read(tmp_path / "report" / "report.json").checks if not check.passed]
    assert [check.name for check in failed] == ["weights"]
    assert f": {FAULTS[fault][1]} (" in re.sub(r" \([^)]*\)(?=,)", "", failed[0].message)


@pytest.mark.parametrize("fault", OF_GRAPH, ids=lambda fault: fault.__name__)
def test_the_layers_name_where_a_fault_is(fault, engines, dataset, tmp_path):
    engine = faulty_engine(fault, engines, tmp_path)
    result = summarize(engine, dataset, tmp_path / "report", "--layers", "--max-samples", 1)
    assert result.exit_code == 0, result.output  # nothing was to be judged
    report = Report.read(tmp_path / "report" / "report.json")
    jumps = [layer.name for layer in report.layers if layer.jumps and layer.reference == "as_built"]
    assert jumps == [FAULTS[fault][1]]
    assert jumps[0] in result.stdout


# ---------------------------------------------------------------------------------------------- healthy engines


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_saved_reference_gives_the_same_verdicts(quant, engines, saved, dataset, thresholds, tmp_path):
    options = ["--check", "--thresholds", thresholds, "--reference", saved[quant]]
    result = summarize(engines[quant], dataset, tmp_path, *options)
    assert result.exit_code == 0, result.output
    live, kept = (Report.read(path / "report.json") for path in (saved[quant].with_suffix(""), tmp_path))
    assert [v.outcome for v in kept.verdicts] == [v.outcome for v in live.verdicts]
    names = [check.name for check in live.checks if check.name != "weights"]  # for that, there are none
    assert [check.name for check in kept.checks] == names
    assert {"token by token", "full length"} < set(names)
    assert all(check.passed for check in kept.checks)
    assert all(check.passed for check in live.checks)
    for name in ("original.top1", "as_built.perplexity_ratio", "greedy.identical", "rouge.agreement.rouge1"):
        # the kept logarithms of sums were made in another order
        assert kept.metric(name).value == pytest.approx(live.metric(name).value, rel=1e-9)


def test_a_saved_reference_needs_no_torch(engines, saved, dataset, tmp_path):
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'qwen_build'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from qwen_run.commands.summarize import main\n"
        "main()\n"
    )
    options = ["--engine", engines["int8"], "--dataset", dataset, "--report", tmp_path, "--max-new-tokens", "8"]
    options += ["--reference", saved["int8"], "--no-cost", "--threads", "1", "--threshold", "as_built.kl_mean<=1e-5"]
    done = run_python(program, *options)
    assert done.returncode == 0, done.stderr
    assert Report.read(tmp_path / "report.json").outcome == "passed"


def test_a_float_engine_is_the_reference(engines, dataset, tmp_path):
    result = summarize(engines["none"], dataset, tmp_path, "--check")
    assert result.exit_code == 0, result.output
    report = Report.read(tmp_path / "report.json")
    assert report.metric("original.kl_mean").value < 1e-8
    assert report.metric("greedy.identical").value == 1
    assert not [layer for layer in report.layers if layer.jumps]


def test_a_healthy_engine_has_no_layer_that_jumps(engines, dataset, tmp_path):
    result = summarize(engines["int4"], dataset, tmp_path, "--layers", "--max-samples", 1)
    assert "jumps nowhere" in result.stdout
    report = Report.read(tmp_path / "report.json")
    assert not [layer for layer in report.layers if layer.jumps and layer.reference == "as_built"]


def test_an_engine_of_several_schemes_is_named_by_all(checkpoint, build_engine):
    rules = {"quant": "int8", "exclude": ("*.up_proj",), "quant_config": (Rule("rules", "*.o_proj", "int4"),)}
    engine = build_engine(checkpoint, **rules)
    # of a layer's 48 560 weights, 8960 float and 6400 int4
    assert engine_info(engine, Manifest.read(engine)).quantization == (
        "64% of the layers' weights int8, groups of 32, symmetric, int8 activations; "
        "21% of the layers' weights float32; "
        "15% of the layers' weights int4, groups of 32, asymmetric, int8 per block activations; "
        "head int8; float16 cache"
    )
    uniform = build_engine(checkpoint, quant="int8")
    assert engine_info(uniform, Manifest.read(uniform)).quantization == (
        "int8, groups of 32, symmetric, int8 activations; head int8; float16 cache"
    )


def test_every_file_of_the_report_is_written(saved):
    directory = saved["int8"].with_suffix("")
    assert {path.name for path in directory.iterdir()} >= {"report.json", "report.md", "report.xml", "report.html"}


# ---------------------------------------------------------------------------------------------- options and errors


def test_an_interrupted_run_goes_on_where_it_stopped(engines, dataset, saved, tmp_path, monkeypatch):
    from qwen_run.accuracy import phases

    compare, calls = phases.compare_sequence, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(phases, "compare_sequence", interrupted)
    options = ["--reference", saved["int8"]]
    assert summarize(engines["int8"], dataset, tmp_path, *options).exit_code == 130
    assert not (tmp_path / "report.json").exists()
    assert summarize(engines["int8"], dataset, tmp_path, *options, "--resume").exit_code == 0
    assert len(calls) == 6 + 16 - 5  # 8 documents, 2 references, 5 comparisons kept
    resumed = Report.read(tmp_path / "report.json")
    assert summarize(engines["int8"], dataset, tmp_path / "whole", *options).exit_code == 0
    assert resumed.metrics == Report.read(tmp_path / "whole" / "report.json").metrics


def test_a_journal_of_something_else_is_not_resumed(engines, dataset, saved, tmp_path):
    assert summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"]).exit_code == 0
    result = summarize(engines["int4"], dataset, tmp_path, "--reference", saved["int4"], "--resume")
    assert result.exit_code == 1
    assert "was made with another engine, reference" in result.stderr


def test_a_baseline_says_what_changed(engines, dataset, saved, tmp_path):
    baseline = saved["int8"].with_suffix("") / "report.json"
    result = summarize(engines["int4"], dataset, tmp_path, "--reference", saved["int4"], "--baseline", baseline)
    assert result.exit_code == 0, result.output
    changes = {change.metric: change.change for change in Report.read(tmp_path / "report.json").baseline.changes}
    assert changes["original.kl_mean"] == "worse"


def test_too_few_samples_are_undecided(engines, dataset, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path, "--max-samples", 2, "--threshold", "as_built.kl_mean<=1")
    assert result.exit_code == 4, result.output
    assert "UNDECIDED" in result.stdout


def test_a_changed_checkpoint_is_refused(checkpoint, engines, dataset, tmp_path):
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    result = summarize(engines["int8"], dataset, tmp_path / "report", "--checkpoint", changed)
    assert result.exit_code == 1
    assert "model.safetensors has changed" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl is neither a file nor one of the data sets"),
        (["--thresholds", "nowhere.toml"], "nowhere.toml"),
        (["--baseline", "nowhere.json"], "nowhere.json"),
        (["--reference", "nowhere.npz"], "nowhere.npz does not exist; make it with --save-reference"),
        (["--checkpoint", "./nowhere"], "nowhere"),
        (["--engine", "nowhere"], "nowhere does not exist; make an engine with qwen-build"),
        (["--max-new-tokens", "635"], "too few for the chat template and 635 new"),
    ],
)
def test_mistakes_are_one_line(options, message, engines, dataset, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path / "report", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_json_is_the_report(engines, dataset, saved, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"], "--json")
    assert Report.from_json(result.stdout) == Report.read(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "kl<0.1"], "threshold 'kl<0.1' is not METRIC<=NUMBER or METRIC>=NUMBER"),
        (["--threshold", "orignal.kl_mean<=0.1"], "did you mean original.kl_mean?\n"),
        (["--layers", "--reference", "x"], "--layers needs the checkpoint in transformers; leave out --reference"),
        (["--save-reference", "y", "--reference", "x"], "leave one out"),
        (["--max-samples", "0"], "--max-samples"),
    ],
)
def test_misuse_exits_2_before_anything_runs(options, message, engines, dataset, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path / "report", *options)
    assert (result.exit_code, message in result.stderr) == (2, True)
    assert not (tmp_path / "report").exists()


def test_other_texts_are_told_apart(engines, dataset, saved, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"], "--max-samples", 3)
    assert result.exit_code == 1
    advice = re.search(r"other texts \(8 documents, not 3; give (--max-samples) (8)\)", result.stderr)
    assert summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"], *advice.groups()).exit_code == 0


def test_every_metric_is_known(engines, dataset, saved, tmp_path):
    """A threshold of a metric that is not in the list would be refused as misspelt."""
    result = summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"])
    assert result.exit_code == 0
    names = {metric.name for metric in Report.read(tmp_path / "report.json").metrics}
    absent = {"greedy.first_divergence", "router.same_experts"}  # where no answer differs, and no router is
    assert set(METRIC_NAMES) - names <= absent, names
    assert names <= set(METRIC_NAMES)


def test_progress_is_told_without_a_terminal(engines, dataset, saved, tmp_path):
    result = summarize(engines["int8"], dataset, tmp_path, "--reference", saved["int8"])
    for phase in ("compare with the original: 0 of 8", "compare with what was meant: 0 of 8", "engine writes: 0 of 4"):
        assert f"{phase} documents\n" in result.stderr


def test_plain_text_needs_no_chat_template(engines, saved, tmp_path):
    engine = Path(shutil.copytree(engines["int8"], tmp_path / "engine"))
    manifest = json.loads((engine / MANIFEST_FILE).read_text())
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (engine / name).unlink(missing_ok=True)
        manifest["parts"].pop(name, None)
    (engine / MANIFEST_FILE).write_text(json.dumps(manifest))
    (tmp_path / "text.txt").write_text("Some words to be scored. " * 20)
    (tmp_path / "asked.jsonl").write_text('{"document": "A text.", "summary": "Text."}')
    result = summarize(engine, tmp_path / "asked.jsonl", tmp_path / "report")
    assert result.exit_code == 1
    assert "compare on plain text, such as --dataset wikitext2" in result.stderr
    result = summarize(engine, tmp_path / "text.txt", tmp_path / "report")
    assert (tmp_path / "report" / "report.json").exists(), result.output
