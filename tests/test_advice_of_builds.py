"""Advice of qwen-build and qwen-bench: each is given here, and what it says is done; or why that cannot be, is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cases.advice import (
    Act,
    Row,
    advice_of,
    config,
    follow,
    is_followed,
    move,
    not_followed,
    remove,
    stale,
    typed,
    write,
)
from cases.calibration import letters, with_tokenizer
from qwen_build.cli import main as build
from qwen_run.commands.bench import main as bench


def rules(**patterns: Any) -> Act:
    return write("rules.json", json.dumps(patterns))


DRY = "C --dry-run"
BUILDS = [
    Row(
        f"{DRY} --max-kl 0.1",
        "is a budget for --quant auto to choose within; add that, or leave it out",
        DRY,
        exit_code=2,
    ),
    Row(f"{DRY} --quant auto", "--quant auto chooses by what it measures; leave one out", DRY, exit_code=2),
    Row(
        f"{DRY} --quant none --exclude lm_head",
        "as --quant none keeps all of them; leave one out",
        f"{DRY} --quant none",
        exit_code=2,
    ),
    Row(
        f"{DRY} --quant none --weight-scales channel",
        "--quant none has none; leave one out",
        f"{DRY} --quant none",
        exit_code=2,
    ),
    Row(
        f"{DRY} --kernels stock --activations int8x2",
        "; choose int8 or float32",
        f"{DRY} --kernels stock --activations int8",
        exit_code=2,
    ),
    Row(
        f"{DRY} --weight-scales channel --quant int8 --asymmetric",
        "; leave --asymmetric out",
        f"{DRY} --weight-scales channel --quant int8",
        exit_code=2,
    ),
    Row(
        f"{DRY} --activations float32 --activation-scales token",
        "; choose int8 or int8x2",
        f"{DRY} --activations int8 --activation-scales token",
        exit_code=2,
    ),
    Row(
        f"{DRY} --quant int8 --activation-scales block",
        "; choose group, or leave it out",
        f"{DRY} --quant int8 --activation-scales group",
        exit_code=2,
    ),
    Row(
        f"{DRY} --kernels stock --quant int8 --weight-scales channel",
        "; use --kernels native",
        f"{DRY} --kernels native --quant int8 --weight-scales channel",
        exit_code=2,
    ),
    Row(
        f"{DRY} --alpha 0.5",
        "nothing is smoothed; add --quant smoothquant",
        f"{DRY} --alpha 0.5 --quant smoothquant",
        exit_code=2,
    ),
    Row(
        f"{DRY} --calibration-tokens 999",
        "nothing calibrates; add --int4-method gptq or leave it out",
        DRY,
        exit_code=2,
    ),
    Row(
        f"{DRY} --quant int8 --int4-method gptq",
        "; leave it out or choose --quant int4",
        f"{DRY} --quant int4 --int4-method gptq",
        exit_code=2,
    ),
    Row(
        f"{DRY} --quant smoothquant --activations float32",
        "; leave --activations, --exclude and --quant-config out",
        f"{DRY} --quant smoothquant",
        exit_code=2,
    ),
    Row(
        f"{DRY} --int4-method gptq",
        "which calibration needs; add it, or leave calibration out",
        f"{DRY} --int4-method gptq",
        move("C/tokenizer.json", "tokenizer.json"),
        move("tokenizer.json", "C/tokenizer.json"),
    ),
    Row(
        f"{DRY} --quant int4 --weight-scales tensor",
        "needs calibration; add --quant smoothquant",
        f"{DRY} --weight-scales tensor --quant smoothquant",
        exit_code=2,
    ),
    Row("C --quant auto --max-kl 1 --max-size 9MB", "; give one", DRY, exit_code=2),
    Row(
        "C --int4-method gptq --calibration short.txt --output other",
        "; give a longer text with --calibration",
        "C --int4-method gptq --calibration long.txt --calibration-tokens 2048 --output other",
        lambda: (write("short.txt", "abc")(), write("long.txt", letters(40_000))()),
    ),
    Row(DRY, "outside the vocabulary", DRY, config(eos_token_id=[1, 999]), config(eos_token_id=[1])),
    Row(f"{DRY} --ignore-tensors nope", "matches no tensor of the checkpoint; leave it out", DRY),
    Row(
        f"{DRY} --quant-config rules.json",
        "quant none has no",
        f"{DRY} --quant-config rules.json",
        rules(lm_head={"quant": "none", "group_size": 64}),
        rules(lm_head={"quant": "none"}),
    ),
    Row(
        f"{DRY} --quant-config rules.json",
        "matches no linear; their names are such as",
        f"{DRY} --quant-config rules.json",
        rules(nope={"quant": "int8"}),
        rules(**{"model.layers.0.self_attn.q_proj": {"quant": "int8"}}),
    ),
    Row(
        f"{DRY} --quant-config rules.json",
        "earlier patterns match the same linears; remove one",
        f"{DRY} --quant-config rules.json",
        rules(**{"*": {"quant": "int8"}, "*.q_proj": {"quant": "int4"}}),
        rules(**{"*": {"quant": "int8"}}),
    ),
    Row(f"{DRY} --quant-config absent.json", "; choose another --quant-config", DRY),
    Row(
        f"{DRY} --yarn 2 --rope-scaling rope.json",
        "both say how positions are rotated; leave one out",
        f"{DRY} --yarn 2",
        write("rope.json", "{}"),
        exit_code=2,
    ),
    Row(
        "C --output taken",
        "; use --force to replace it",
        "C --output taken --force",
        lambda: typed(build, "C --output taken"),
    ),
    Row(
        "C --output taken --force",
        "; move it away or choose another --output",
        "C --output taken --force",
        lambda: (typed(build, "C --output taken"), write("taken/mine.txt", "x")()),
        move("taken/mine.txt", "mine.txt"),
    ),
    Row(
        "C --output notes.txt --force",
        "is not an engine, which --force could replace; choose another --output",
        "C --output other",
        write("notes.txt", "x"),
    ),
    Row("C --output notes.txt/inside", "cannot be written: ", "C --output other", write("notes.txt", "x")),
    Row("C/config.json --dry-run", "is a file; give the directory it is in", DRY),
    Row(
        "empty --dry-run",
        "has no config.json; give a complete Hugging Face directory",
        DRY,
        lambda: (Path("empty").mkdir(), shutil.copy("C/model.safetensors", "empty")),
    ),
    Row("absent --dry-run", "; give a Hugging Face directory, a .gguf file, or a Hub id such as", DRY),
    Row(
        DRY,
        "are outside the vocabulary of 131; correct eos_token_id there",
        DRY,
        config(eos_token_id=999),
        config(eos_token_id=1),
    ),
    Row(
        DRY,
        "config.json has no num_hidden_layers; download config.json again, or add what is missing",
        DRY,
        config(num_hidden_layers=None),
        config(num_hidden_layers=3),
    ),
    Row(
        DRY,
        "model.layers.3; config.json has no num_hidden_layers; download config.json again, or add what is missing",
        DRY,
        config(num_hidden_layers=None, layer_types=None),
        config(num_hidden_layers=3),
    ),
    Row(
        DRY,
        "config.json has no vocab_size and no intermediate_size; download config.json again, or add what is missing",
        DRY,
        config(intermediate_size=None, vocab_size=None),
        config(intermediate_size=112, vocab_size=131),
    ),
    Row(
        DRY,
        "layer_types, num_hidden_layers 3; make them agree",
        DRY,
        config(layer_types=["full_attention"] * 2),
        config(layer_types=["full_attention"] * 3),
    ),
    Row(
        DRY,
        "outside the checkpoint; put the file itself there, or remove the link",
        DRY,
        lambda: (
            write("private.json", "{}")(),
            Path("C/generation_config.json").unlink(missing_ok=True),
            Path("C/generation_config.json").symlink_to(Path("private.json").resolve()),
        ),
        remove("C/generation_config.json"),
    ),
    Row(
        DRY,
        "is not a file; download it again or remove it",
        DRY,
        lambda: (Path("C/generation_config.json").unlink(missing_ok=True), Path("C/generation_config.json").mkdir()),
        lambda: Path("C/generation_config.json").rmdir(),
    ),
    Row(
        DRY,
        "; download the index, or rename the file",
        DRY,
        move("C/model.safetensors", "C/other.safetensors"),
        move("C/other.safetensors", "C/model.safetensors"),
    ),
    Row("C/x.gguf --dry-run", "; give a Hugging Face directory, a .gguf file, or a Hub id such as", DRY),
]

BENCH = "latency --input-length 9 --output-length 3 --repeat 1 --threads 1"
MANY = "throughput --batch 1,2 --input-length 9 --output-length 3 --repeat 1 --threads 1"
BENCHES = [
    Row(f"{BENCH} --hf-dtype float32", "say how transformers runs; give them with --compare hf", BENCH, exit_code=2),
    Row(f"{MANY} --plot a.png", "pictures are SVG; name it", f"{MANY} --plot a.svg", exit_code=2),
    Row(
        f"{MANY} --plot absent/a.svg",
        "is no directory; make it first",
        f"{MANY} --plot absent/a.svg",
        followed=lambda: Path("absent").mkdir(),
    ),
    Row("latency --input-length 600 --output-length 99 --repeat 1 --threads 1", "together; ask for fewer", BENCH),
    Row(
        "serve-trace --threads 1 --trace absent.csv",
        "; choose another --trace",
        "serve-trace --threads 1 --trace few.csv",
    ),
    Row(
        "serve-trace --threads 1 --trace latin1.csv",
        "is no CSV in UTF-8",
        "serve-trace --threads 1 --trace few.csv",
        lambda: Path("latin1.csv").write_bytes(b"arrival_s,input_tokens,output_tokens\n0,\xe9,2\n"),
    ),
    Row(
        "serve-trace --threads 1 --trace few.csv --rate 1",
        "arrive at once; leave out --rate, or use a trace with pauses",
        "serve-trace --threads 1 --trace few.csv",
    ),
    Row(
        "serve-trace --threads 1 --trace odd.csv",
        "expected seconds or a date and time, and two whole numbers from 1",
        "serve-trace --threads 1 --trace odd.csv",
        write("odd.csv", "arrival_s,input_tokens,output_tokens\n0,0,2\n"),
        write("odd.csv", "arrival_s,input_tokens,output_tokens\n0,1,2\n"),
    ),
]


@pytest.fixture
def folder(tiny_checkpoint: Any, build_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint C, an engine under engines/ and a short trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen_run.bench.measure.PAUSE_S", 0.0)
    with_tokenizer(tiny_checkpoint("qwen2").path, Path("C"))
    shutil.copytree(build_engine(tiny_checkpoint("qwen2").path, quant="int8"), "engines/tiny")
    Path("few.csv").write_text("arrival_s,input_tokens,output_tokens\n0,5,2\n0,5,2\n")
    return tmp_path


@pytest.mark.parametrize("row", BUILDS, ids=lambda row: f"{row.typed}: {row.advice}"[:70])
def test_advice_of_a_build_works_when_it_is_followed(folder: Path, row: Row) -> None:
    follow(build, row)


@pytest.mark.parametrize("row", BENCHES, ids=lambda row: f"{row.typed}: {row.advice}"[:70])
def test_advice_of_a_benchmark_works_when_it_is_followed(folder: Path, row: Row) -> None:
    follow(bench, row)


FOLDERS = ("qwen_build", "qwen_run/bench")
# what is not followed here: a piece of the message -> why, or where it is
ELSEWHERE = {
    "measures how likely next tokens are": "tests/whole/test_pooled.py",
    "do_lower_case is not supported": "the texts of a caller: tests/whole/test_pooled.py",
    "has no tokenizer, in which": "tests/whole/test_pooled.py",
    "build it without --task score": "tests/whole/test_pooled.py",
    "it {}; ask it with {}": "tests/whole/test_pooled.py",
    'quant="auto"': "of Python; the command line's is the first row",
    "twice; keep one": "tests/qwen_build/plan/test_rules.py",
    "download": "a sound copy of the file is what tests/fuzz/checkpoint.py starts from; a test has no Hub",
    "git lfs pull": "needs a server of Git LFS",
    "changed while it was read; build again": "building again is what every other row does",
    "cannot be downloaded": "needs the Hub",
    "Hugging Face Hub": "needs the Hub",
    "pip install --force-reinstall": "would replace the package whose data are damaged",
    "; set XDG_CACHE_HOME": "tests/qwen_build/checkpoint/test_demo.py sets it",
    "float checkpoint": "building the float checkpoint is what every row without quantization_config does",
    "float one": "as above",
    "it was made from": "as above",
    "merge_and_unload": "needs peft",
    "save_pretrained": "what save_pretrained writes is the checkpoint of every row",
    "GGUF": "the directory of the model is what every row gives",
    "by its metadata; give it and the others": "tests/qwen_build/checkpoint/formats/test_gguf.py",
    "is file {} of {}; give the first": "as above",
    "is not a directory; give": "as above",
    "no LoRA adapter": "tests/qwen_build/checkpoint/test_merging.py gives the folder that peft saved",
    "path_initial_model_for_weight_conversion": "needs peft",
    "give the folder with": "tests/qwen_build/checkpoint/test_merging.py gives the folder that peft saved",
    "merge it with peft": "needs peft",
    "is a LoRA adapter of": "tests/qwen_build/checkpoint/test_merging.py builds from base and --lora",
    "resizes the vocabulary": "the tokenizer's files of a checkpoint are those of every row with text",
    "pip install gguf": "the package is there where the tests run",
    "is not one of {}; give another model": "another model is what every row gives",
    "rope_freqs.weight": "the directory of the model is what every row gives",
    "with the splitting": "as above",
    "too large for float32 on the calibration text": "a sound copy of the checkpoint is that of every row",
    "NaN or infinite values": "as above",
    "it was trained on {}, give that one": "tests/qwen_build/checkpoint/test_merging.py gives that one",
    "which may take for ever to match": "a pattern of plain names: tests/qwen_build/checkpoint/formats/test_words.py",
    "pip install gguf &&": "make demo does it",
    "old AutoGPTQ": "tests/qwen_build/checkpoint/test_shards.py",
    "no quantization_config that says": "as above",
    "remove the copies": "tests/qwen_build/checkpoint/test_shards.py",
    "remove the file that is left over": "which file is left over its owner alone knows",
    "set tie_word_embeddings to false": "tests/qwen_build/checkpoint/formats/test_words.py",
    "keep the right one": "tests/qwen_build/checkpoint/test_config.py",
    "save the checkpoint whole": "what save_pretrained writes is the checkpoint of every row",
    "use --kernels stock": "tests/qwen_build/test_cli.py builds with it where a native kernel cannot hold a number",
    "use the model's own": "the model's own tokenizer is the one of every row",
    "wait for it or choose another --output": "tests/qwen_build/calibration/test_calibrate.py",
    "is no directory that a build of yours made": "choosing another --output is a row above",
    "cannot be reached: the most accurate engine": "tests/qwen_build/auto/test_search.py allows as much",
    "the smallest engine has": "tests/qwen_build/auto/test_search.py allows as much",
    "has nothing to choose": "without it this is a build of another row",
    "makes the choice of": "without it: tests/qwen_build/auto/test_search.py",
    "are needed to calibrate and to": "the row of a text that is too short gives a longer one",
    "which the checkpoint has quantised already": "without it: tests/qwen_build/checkpoint/formats/test_words.py",
    "cannot be chosen, the checkpoint is stored as": "tests/qwen_build/checkpoint/formats/test_words.py",
    "needs weight scales of its own": "without it: tests/qwen_build/checkpoint/formats/test_words.py",
    "leave out --compare hf": "every row of BENCHES does without",
    "there is no server at": "tests/qwen_run/bench/test_load.py asks one that is there",
    "run it with --max-seq-len for fewer": "tests/qwen_run/runtime/test_engine.py runs engines so",
    "this one is a mixture of experts; choose": "tests/whole/test_calibrated_experts.py builds with --int4-method gptq",
    "cannot multiply with experts": "tests/whole/test_experts.py builds with native kernels",
    "cannot be had of experts": "tests/whole/test_shared_scales.py builds mixtures of experts with token",
    "the checkpoint has both": "which of the two is left over its owner alone knows",
    "expected all on one grid with their inputs": "tests/whole/test_experts.py builds from float checkpoints",
    "linears that are stored alike as": "tests/qwen_build/plan/test_rules.py gives that name",
    "say how an engine stores them; give them too": "with its weights this is a build of every row",
    "use --exclude '*.mlp.experts.*'": "tests/whole/test_experts.py builds so",
    "there is no window": "tests/whole/test_windows.py builds with both keys",
}


def test_every_advice_is_followed_or_says_why_not() -> None:
    followed = [row.advice for row in (*BUILDS, *BENCHES)]
    assert not_followed(FOLDERS, followed, ELSEWHERE) == []
    assert stale(FOLDERS, ELSEWHERE) == []


def test_advice_that_nobody_followed_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('x = f"{y} is odd; give an even one"\nz = "it is odd; odd it is"\n')
    assert list(advice_of(tmp_path)) == ["{} is odd; give an even one"]
    assert not is_followed("{} is odd; give an even one", [row.advice for row in BUILDS], ELSEWHERE)
