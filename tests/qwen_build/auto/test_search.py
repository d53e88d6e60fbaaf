"""``--quant auto`` on tiny checkpoints: budgets that engines keep to, what is told, what goes on."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from tokenizers import decoders, models

from cases.packed import CASES
from cases.tiny import DENSE, TinyCheckpoint
from qwen_build.auto import search as auto
from qwen_build.auto import trials
from qwen_build.auto.report import CHOICES_FILE, REPORT_FILE, Trial
from qwen_build.auto.search import build_auto
from qwen_build.auto.sensitivity import Probing
from qwen_build.calibration.built_in import built_in_text
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.plan.options import BuildOptions
from qwen_build.plan.rules import read_rules
from qwen_engine.errors import BuildError
from qwen_engine.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_run.accuracy.both_sides import engine_logits
from qwen_run.accuracy.datasets import built_in_documents
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.engine_files.checksums import verify_parts
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """Makes a copy of a tiny checkpoint with a tokenizer of single characters."""

    def make(family: str) -> TinyCheckpoint:
        tiny = tiny_checkpoint(family)
        path = tmp_path_factory.mktemp("text") / family
        shutil.copytree(tiny.path, path)
        tokenizer = tokenizers.Tokenizer(models.BPE({chr(c): c - 32 for c in range(32, 127)}, []))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(path / "tokenizer.json"))
        return TinyCheckpoint(path, tiny.model)

    return make


def search_engine(path: Path, output: Path, method: str | None = "rtn", max_kl=None, max_bytes=None, **options):
    with Checkpoint.open(path) as weights:
        return build_auto(
            weights,
            resolve_checkpoint(str(path)),
            BuildOptions(quant="auto", int4_method=method, **options),
            output,
            max_kl,
            max_bytes,
        )


def held_out_kl(tiny: TinyCheckpoint, engine: Path) -> float:
    """Measured here from transformers' logits, over the first 512 tokens of the evaluation half."""
    tokenizer, ids = Tokenizer.load(tiny.path), []
    for document in built_in_text(tiny.path, "evaluation"):
        ids += tokenizer.encode(document.document)
    found = np.concatenate(list(engine_logits(Engine.load(engine), ids[:512])))
    return float(compare(FullLogits(tiny.logits(ids[:512])), found, np.full(512, -1)).kl.mean())


def parts(engine: Path) -> dict[str, object]:
    """The parts but for the report, which says where the engine lies."""
    return {name: part for name, part in Manifest.read(engine).parts.items() if name not in (REPORT_FILE, CHOICES_FILE)}


def files(engine: Path) -> int:
    return sum(path.stat().st_size for path in engine.iterdir())


@pytest.mark.parametrize("family", DENSE)
def test_an_engine_keeps_to_its_kl_and_is_built_again_from_its_choices(family, checkpoint, tmp_path, monkeypatch):
    tiny, output = checkpoint(family), tmp_path / "engines" / "auto"
    report = search_engine(tiny.path, output, max_kl=0.01)
    measured = held_out_kl(tiny, output)
    assert measured == pytest.approx(report.best.held_out_kl, rel=1e-3)
    assert 0.005 < max(measured, report.best.calibration_kl) <= 0.01
    verify_parts(output, Manifest.read(output))
    assert {path.name for path in output.iterdir()} == {MANIFEST_FILE, *Manifest.read(output).parts}
    assert list(output.parent.iterdir()) == [output]
    assert files(output) <= report.best.size_bytes
    again = tmp_path / "again"
    result = CliRunner().invoke(main, [*shlex.split(report.rebuild)[1:], "--output", str(again)])
    assert result.exit_code == 0, result.output
    assert parts(again) == parts(output)
    assert len({linear.quantization for linear in Manifest.read(output).linears}) > 2  # it did choose


@pytest.mark.parametrize("error", [0.1, 10])
def test_what_was_predicted_wrong_is_corrected(error, checkpoint, tmp_path, monkeypatch):
    measure = Probing.measure
    monkeypatch.setattr(
        Probing, "measure", lambda self, advance: [[error * kl for kl in one] for one in measure(self, advance)]
    )
    report = search_engine(checkpoint("qwen2-tied").path, tmp_path / "auto", max_kl=0.02)
    assert 0.005 < report.best.kl <= 0.02  # the whole budget is not used where the next choice would exceed it
    assert len(report.trials) > 1


def test_an_engine_keeps_to_its_size(checkpoint, tmp_path):
    tiny = checkpoint("qwen3")
    found = []
    for number, size in enumerate((440_000, 500_000, 600_000, 2_000_000)):
        report = search_engine(tiny.path, tmp_path / str(number), max_bytes=size)
        found.append(report.best)
        assert files(tmp_path / str(number)) <= report.best.size_bytes <= size
    assert [trial.kl for trial in found] == sorted([trial.kl for trial in found], reverse=True)
    assert found[0].kl > 20 * found[2].kl
    assert found[0].size_bytes > 0.9 * 440_000
    assert {linear.quantization.scheme for linear in Manifest.read(tmp_path / "3").linears} == {"none"}


def test_calibrated_rounding_is_used_where_there_is_int4(checkpoint, tmp_path):
    path = checkpoint("qwen2").path
    report = search_engine(path, tmp_path / "small", method=None, max_kl=0.2, calibration_tokens=1024)
    methods = {linear.quantization.method for linear in Manifest.read(tmp_path / "small").linears}
    assert "gptq" in methods
    assert "--int4-method gptq --calibration-tokens 1024" in report.rebuild
    report = search_engine(path, tmp_path / "exact", method=None, max_kl=1e-4, calibration_tokens=1024)
    assert {linear.quantization.scheme for linear in Manifest.read(tmp_path / "exact").linears} <= {"int8", "none"}
    assert "--int4-method" not in report.rebuild


def test_what_the_user_decides_stays(checkpoint, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text('{"*.1.mlp.down_proj": {"quant": "int8", "group_size": 128}}')
    path = checkpoint("qwen2-tied").path
    search_engine(path, tmp_path / "auto", max_kl=0.5, exclude=("*.k_proj", "lm_head"), quant_config=read_rules(rules))
    stored = {linear.name: linear.quantization for linear in Manifest.read(tmp_path / "auto").linears}
    assert {stored[f"model.layers.{i}.self_attn.k_proj"].scheme for i in range(3)} == {"none"}
    assert (stored["lm_head"].scheme, stored["model.embed_tokens"].scheme) == ("none", "int4")
    fixed = stored["model.layers.1.mlp.down_proj"]
    assert (fixed.scheme, fixed.group_size) == ("int8", 128)


def test_the_end_of_a_text_is_held_out(checkpoint, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(d.document for d in built_in_documents("wikitext2", "calibration"))[:6000], "ascii", "ignore"
    )
    path = checkpoint("qwen2").path
    ids = Tokenizer.load(path).encode(text.read_text())
    seen = []
    monkeypatch.setattr(auto, "float_states", lambda c, m, token_ids, advance: seen.append(token_ids) or _stop())
    with pytest.raises(KeyboardInterrupt):
        search_engine(path, tmp_path / "auto", max_kl=0.1, calibration=text)
    count = len(ids) // 512
    options, calibration, held_out, words = auto.split_text(
        BuildOptions(int4_method="awq", calibration=text), path, auto.ModelConfig.from_hf(path), 640
    )
    assert np.array_equal(np.concatenate([calibration, held_out]).ravel(), ids[: count * 512])
    assert len(held_out) == -(-count // 4)
    assert options.calibration_tokens == calibration.size
    assert str(text) in words
    assert np.array_equal(seen[0], calibration[:1])


@pytest.mark.parametrize("kl", [(0.1, math.nan), (math.nan, 0.1)])
def test_a_measurement_that_failed_is_within_no_budget(kl):
    assert not Trial((), 0.1, *kl, 1000).kl <= 1


def _stop():
    raise KeyboardInterrupt


def test_the_same_budget_gives_the_same_engine_also_after_an_interruption(checkpoint, tmp_path, monkeypatch):
    path = checkpoint("qwen2").path
    search_engine(path, tmp_path / "one" / "auto", max_kl=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "measure_kl", lambda *_: _stop())
        with pytest.raises(KeyboardInterrupt):
            search_engine(path, tmp_path / "two" / "auto", max_kl=0.05)
    assert not (tmp_path / "two" / "auto").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Probing, "measure", lambda *_: _stop())  # finished before
        search_engine(path, tmp_path / "two" / "auto", max_kl=0.05)
    assert parts(tmp_path / "one" / "auto") == parts(tmp_path / "two" / "auto")
    assert (tmp_path / "one" / "auto" / CHOICES_FILE).read_bytes() == (
        tmp_path / "two" / "auto" / CHOICES_FILE
    ).read_bytes()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["auto"]


def test_the_page_says_what_was_chosen(checkpoint, tmp_path):
    report = search_engine(checkpoint("qwen3-tied").path, tmp_path / "auto", max_kl=0.05)
    page = (tmp_path / "auto" / REPORT_FILE).read_text()
    for linear in Manifest.read(tmp_path / "auto").linears:
        assert linear.name in page or linear.name == "lm_head"
    assert f"{report.best.held_out_kl:.3g} on 512 tokens" in page
    assert "<svg" in page
    assert page.count("<script") == page.count("http://") - page.count("http://www.w3.org/2000/svg") == 0


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["--quant", "auto"], "either --max-kl or --max-size, found neither; give one"),
        (2, ["--quant", "auto", "--max-kl", "1", "--max-size", "1MB"], "found both; give one"),
        (2, ["--max-kl", "1"], "--max-kl is a budget for --quant auto"),
        (2, ["--quant", "int8", "--max-size", "50%"], "--max-size is a budget for --quant auto"),
        (
            2,
            ["--quant", "auto", "--max-kl", "1", "--group-size", "64"],
            "the choice of --group-size 64 for each linear",
        ),
        (2, ["--quant", "auto", "--max-kl", "1", "--asymmetric"], "the choice of --symmetric or --asymmetric"),
        (2, ["--quant", "auto", "--max-kl", "1", "--embedding-quant", "int8"], "the choice of --embedding-quant int8"),
        (
            2,
            ["--quant", "auto", "--max-kl", "1", "--weight-scales", "channel"],
            "the choice of --weight-scales channel",
        ),
        (2, ["--quant", "auto", "--max-kl", "1", "--dry-run"], "--dry-run measures nothing"),
        (1, ["--quant", "auto", "--max-kl", "1", "--exclude", "nothing"], "matches no linear"),
        (1, ["--quant", "auto", "--max-kl", "1e-12"], "--max-kl 1e-12 cannot be reached: the most accurate engine, "),
        (1, ["--quant", "auto", "--max-size", "100kB"], "--max-size is 0.1 MB, the smallest engine has 0.3 MB"),
        (1, ["--quant", "auto", "--max-kl", "1", "--calibration", "short.txt"], "short.txt"),
    ],
)
def test_one_line_says_what_is_wrong(code, arguments, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short " * 120)
    result = CliRunner().invoke(main, [str(checkpoint("qwen2").path), *arguments, "--output", "engines/auto"])
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    left = list(Path("engines").iterdir()) if Path("engines").exists() else []
    assert len(left) == ("What was finished is kept in" in result.stderr)
    assert not any(list(path.rglob("*.bin")) for path in left), "figures alone"


@pytest.mark.parametrize("size", ["much", "10", "0MB", "-1GB", "10 parsecs", "nan%", "1e400MB"])
def test_a_size_has_a_unit(size):
    result = CliRunner().invoke(main, ["--quant", "auto", "--max-size", size])
    assert result.exit_code == 2
    assert "120MB, 1.5GB or 30%" in result.stderr


def test_a_share_is_one_of_the_checkpoint(checkpoint, tmp_path):
    path = checkpoint("qwen2").path
    result = CliRunner().invoke(
        main,
        [
            str(path),
            "--quant",
            "auto",
            "--max-size",
            "60%",
            "--int4-method",
            "rtn",
            "--json",
            "--output",
            str(tmp_path / "e"),
        ],
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert 0.5 < files(tmp_path / "e") / summary["checkpoint_bytes"] <= 0.6
    assert summary["auto"]["held_out_tokens"] == 512
    assert (tmp_path / "e" / summary["auto"]["page"]).exists()
    assert summary["weights_bytes"] == (tmp_path / "e" / WEIGHTS_FILE).stat().st_size


def test_a_packed_checkpoint_has_nothing_to_choose(pack):
    with (
        Checkpoint.open(pack(CASES[0]).path) as packed,
        pytest.raises(BuildError, match="is stored as gptq int4 already"),
    ):
        auto.check_options(BuildOptions(quant="auto"), packed, 0.1, None)
