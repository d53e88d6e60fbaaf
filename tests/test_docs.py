"""The documentation: what it says of commands, files, modules and tables is so, and its examples run as they stand.

More than 400 lines: a page is read once, and every rule of the text is a row of one table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import pytest

from cases.markdown import CHECKS, Page, option_table, rounds_to, table_column, table_rows, unknown_options
from qwen_build.cli import main as build_command
from qwen_build.plan.rules import read_rules
from qwen_engine.graph_io import Kind
from qwen_engine.json_output import SCHEMA_VERSION, head
from qwen_engine.manifest import FORMAT_VERSION, Manifest
from qwen_run import EngineConfig, SamplingParams
from qwen_run.accuracy.gate import load_thresholds
from qwen_run.accuracy.report import Report
from qwen_run.api.llm_options import IDLE, SYNONYMS
from qwen_run.commands.bench import main as bench_command
from qwen_run.commands.inspect import main as inspect_command
from qwen_run.commands.prompt_file import parse_prompts
from qwen_run.commands.run import main as run_command
from qwen_run.commands.summarize import main as summarize_command
from qwen_run.runtime.core import CoreOptions
from qwen_serve.cli import main as serve_command

ROOT = Path(__file__).parents[1]
README = Page.read(ROOT / "README.md", ROOT)
PATHS = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "qwen" / "README.md",
    *(ROOT / name / "data" / "README.md" for name in ("benchmarks", "qwen_run/accuracy", "tests")),
]
PAGES = {str(path.relative_to(ROOT)): Page.read(path, ROOT) for path in PATHS}
COMMANDS: dict[str, click.Command] = {
    "qwen-build": build_command,
    "qwen-run": run_command,
    "qwen-summarize": summarize_command,
    "qwen-bench": bench_command,
    "qwen-inspect": inspect_command,
    "qwen-serve": serve_command,
}
ENGINE = "engines/SmolLM2-135M-Instruct-int4"
# Commands of other programs stand in this page's left column.
OTHERS = "docs/coming-from.md"


def here_column(page: Page) -> Page:
    """A page of tables, of which only the last column is kept."""
    kept = re.sub(r"^\|.*\|(.*\|)$", r"|\1", page.text, flags=re.MULTILINE)
    return Page(page.path, page.root, kept)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound(name: str, check: str) -> None:
    page = here_column(PAGES[name]) if name == OTHERS and check == "paths exist" else PAGES[name]
    assert CHECKS[check](page) == []


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name: str) -> None:
    page = here_column(PAGES[name]) if name == OTHERS else PAGES[name]
    assert unknown_options(page, COMMANDS) == []


@pytest.mark.parametrize("check", ["links lead somewhere", "paths exist"])
@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda path: path.stem)
def test_a_kept_table_names_what_is_there(path: Path, check: str) -> None:
    assert CHECKS[check](Page.read(path, ROOT)) == []


def test_every_option_is_named_somewhere() -> None:
    pages = " ".join(page.text for page in PAGES.values())
    spellings = {
        (*each.opts, *each.secondary_opts) for command in COMMANDS.values() for each in option_table(command).values()
    }
    assert [each for each in spellings if not any(re.search(rf"`?{spelt}\b", pages) for spelt in each)] == []


MADE_UP = {
    "lines are short": ("x" * 121, ["line 1"]),
    "headings are unique": ("# A\n\n## B\n\n## B\n", ["B"]),
    "links lead somewhere": ("# A b!\n[a](#a-b) [b](#b) [c](README.md#limits) [d](none.md)", ["#b", "none.md"]),
    "paths exist": (
        "`qwen_run/api/llm.py` `api/none.py` `qwen_run.api.none` `LLM` (`qwen_run/api/llm.py`) `NO` (`api/llm.py`)",
        ["api/none.py", "qwen_run.api.none", "NO in api/llm.py"],
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_finds_what_is_wrong(check: str) -> None:
    text, complaints = MADE_UP[check]
    assert CHECKS[check](Page(ROOT / "made-up.md", ROOT, text)) == complaints


def test_options_that_do_not_exist_are_found() -> None:
    text = "```\nqwen-build X --quant int7 --nope  # --no\n$ qwen-bench speed\n```\n"
    text += "`qwen-run --force` `--quant` `--qant int4`"
    found = unknown_options(Page(ROOT / "made-up.md", ROOT, text), COMMANDS)
    assert found == ["qwen-build --quant int7", "qwen-build --nope", "qwen-bench speed", "qwen-run --force", "--qant"]


def test_the_readme_is_short_and_opens_with_the_two_commands() -> None:
    assert len(README.text.splitlines()) <= 165
    lines = README.text.splitlines()
    assert lines[2] == "```"
    assert [line.partition("#")[0].strip() for line in lines[3:5]] == ["make demo", "make test"]


def test_the_chinese_readme_says_the_same() -> None:
    chinese = PAGES["README.zh-CN.md"]
    assert chinese.fences == README.fences
    assert len(chinese.headings) == len(README.headings)
    assert sorted(set(chinese.targets) - {"README.md"}) == sorted(set(README.targets) - {"README.zh-CN.md"})
    for pattern in (r"\d[\d.,]*\d|\d", r"`[^`\n]+`"):
        assert sorted(re.findall(pattern, chinese.prose)) == sorted(re.findall(pattern, README.prose))


def test_the_index_names_every_page() -> None:
    named = {target.partition("#")[0] for target in PAGES["docs/index.md"].targets}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - named == {"index.md"}


def test_the_design_names_every_folder() -> None:
    packages = ("qwen_run", "qwen_build", "qwen_serve")
    parts = (path.parent for name in packages for path in (ROOT / name).glob("*/__init__.py"))
    assert {str(folder.relative_to(ROOT)) for folder in parts} - set(PAGES["docs/design.md"].codes) == set()


def test_every_benchmark_is_named() -> None:
    page = PAGES["benchmarks/README.md"]
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_")}
    assert scripts - set(page.codes) == set()
    kept = {f"results/{path.name}" for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert kept - set(page.targets) == set()


# Tables that list what a class has


def names_in(page: str, heading: str) -> set[str]:
    cells = table_column(PAGES[page].section(heading))
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_tables_name_every_field_of_a_class() -> None:
    assert names_in("docs/python.md", "Sampling options") == set(SamplingParams.__dataclass_fields__)
    assert names_in("docs/python.md", "The interface of transformers") == set(EngineConfig.__dataclass_fields__)
    assert names_in("docs/engine-format.md", "The manifest") == set(Manifest.__dataclass_fields__)
    assert set(CoreOptions.__dataclass_fields__) - names_in("docs/python.md", "Answering prompts") == {"keep_logits"}


def test_vllms_names_of_options_are_listed() -> None:
    rows = table_rows(PAGES[OTHERS].section("vLLM"))
    for theirs, ours in SYNONYMS.items():
        assert any(f"`{theirs}=" in row and f"`{ours}=" in " ".join(cells) for row, cells in rows.items()), theirs
    without_effect = " ".join(row for row, cells in rows.items() if "no effect" in cells[0])
    assert set(IDLE) - set(re.findall(r"\w+", without_effect)) == {"quantization"}


def test_the_engine_format_is_the_one_that_is_described() -> None:
    section = PAGES["docs/engine-format.md"].section("The manifest")
    kinds = re.search(r"^\| kind .*?\n\n", section, re.DOTALL | re.MULTILINE)
    assert kinds is not None
    assert [cell.strip("`") for cell in table_column(kinds[0])] == list(get_args(Kind))
    assert f"format version, which is {FORMAT_VERSION};" in PAGES["docs/engine-format.md"].text


def test_sampling_defaults_are_those_of_the_class() -> None:
    section = PAGES["docs/python.md"].section("Sampling options")
    for names, defaults in zip(table_column(section), table_column(section, 1), strict=True):
        fields = re.findall(r"`(\w+)`", names)
        written = defaults.split(", ") * (1 if ", " in defaults else len(fields))
        actual = [getattr(SamplingParams(), field) for field in fields]
        assert written == ["none" if value == () else getattr(value, "name", str(value)) for value in actual], names


# Figures


RESULTS = ROOT / "benchmarks" / "results"
README_ROWS = {
    "(no option: int4)": "int4",
    "`--int4-method gptq`": "int4 gptq",
    "`--quant int6`": "int6",
    "`--quant int8`": "int8",
    "`--quant smoothquant`": "smoothquant",
    "`--quant none`": "float32",
}
# The names of docs/accuracy.md, word by word, as those of benchmarks.schemes.
SCHEME_WORDS = (
    (r"^smoothquant, (scales )?per channel(, | and )(\w+)$", r"smoothquant auto channel/\3"),
    (r"^(int8), scales per channel and token$", r"\1 channel/token"),
    (r"^smoothquant$", "smoothquant auto"),
    (r"^int8, groups of (\d+)$", r"int8 g\1"),
    (r"^int4, groups of (\d+)(, symmetric)?$", r"int4, groups of \1\2, rtn"),
    (r"^int4, groups of (\d+), symmetric, (\w+)$", r"int4 g\1 symmetric \2"),
    (r"^int4, groups of (\d+), (\w+)$", r"int4 g\1 asymmetric \2"),
    (r"^(auto, size of int4 g\d+) gptq$", r"\1 asymmetric gptq"),
)


def measured_schemes(ending: str = "") -> dict[str, dict[str, str]]:
    """The rows of a table of schemes of the demo, by the names of its columns."""
    rows = table_rows((RESULTS / f"schemes-SmolLM2-135M-Instruct{ending}.md").read_text(encoding="utf-8"))
    return {name: dict(zip(rows["scheme"], cells, strict=True)) for name, cells in rows.items()}


def test_the_readmes_table_is_one_run() -> None:
    rows, measured = table_rows(README.section("Which quantisation to take")), measured_schemes("-choice")
    rows.pop(next(iter(rows)))
    assert rows.keys() == README_ROWS.keys()
    for name, cells in rows.items():
        expected = [measured[README_ROWS[name]][column] for column in ("MB", "decode tok/s", "KL", "top-1")]
        assert all(map(rounds_to, cells, expected)), name


def test_the_tables_of_schemes_are_one_run_each() -> None:
    columns = ["MB", "KL", "top-1", "ratio", "prefill tok/s", "decode tok/s", "build s"]
    page, measured = PAGES["docs/accuracy.md"], measured_schemes("-choice")
    choice = table_rows(page.section("What each scheme costs").partition("### ")[0])
    assert {name.replace(",", "") for name in choice} == measured.keys()
    choice.pop("scheme")
    for name, cells in choice.items():
        expected = [measured[name.replace(",", "")][column] for column in columns[:-1]]
        assert all(map(rounds_to, cells, expected)), name
    rows, measured = table_rows(page.section("More schemes")), measured_schemes()
    rows.pop("scheme")
    for name, cells in rows.items():
        scheme = name
        for pattern, other in SCHEME_WORDS:
            scheme = re.sub(pattern, other, scheme)
        expected = [measured[scheme][column] for column in columns]
        assert all(map(rounds_to, cells, expected)), name
    assert len(rows) > 15


def test_the_rows_beside_llama_cpps_types_are_measured() -> None:
    rows = table_rows(PAGES["docs/accuracy.md"].section("Beside llama.cpp's types"))
    rows.pop("side")
    measured = table_rows((RESULTS / "quality-qwen2-medium.md").read_text(encoding="utf-8"))
    columns = [measured["side"].index(name) for name in ("MB", "KL, wikitext2", "KL, library")]
    for name, cells in rows.items():
        assert all(map(rounds_to, cells, (measured[name][column] for column in columns))), name
    assert len(rows) > 8


def test_figures_beside_other_programs_are_one_run() -> None:
    measured = table_rows((RESULTS / "peers-qwen2.5-0.5b.md").read_text(encoding="utf-8"))
    rows = table_rows(PAGES["docs/performance.md"].section("Beside other programs"))
    rows.pop("")
    assert rows.keys() < measured.keys()
    for name, cells in rows.items():
        for shown, exact in zip(cells, measured[name], strict=False):
            assert not shown or rounds_to(shown, exact), name
    one, many = (name for name in rows if name.startswith(("decode at 512 past tokens, head", "16 requests")))
    shown = list(table_rows(README.section("How fast it is")).values())[1:3]
    for cells, name in zip(shown, (one, many), strict=True):
        ours, peer = cells[0], cells[1].removeprefix("llama.cpp ")
        assert rounds_to(ours, measured[name][0])
        assert rounds_to(peer, measured[name][1])


def test_figures_of_a_large_model_are_one_run() -> None:
    text = (RESULTS / "build-7b.md").read_text(encoding="utf-8")
    calibrated, plain = text.split("r7b, ")[1:]
    rows = table_rows(PAGES["docs/performance.md"].section("Memory"))
    for column, part in ((0, plain), (1, calibrated)):
        measured = table_rows(part)
        for name, of in {"load": "load", "decode": "decode, 32 tokens", "engine on disk": "engine"}.items():
            assert rounds_to(rows[name][column], measured[of][0]), name
        for name in ("first token of a 512-token prompt", "peak memory of the answer"):
            assert rounds_to(rows[name][column], measured[name][0]), name
    assert "86 s," in plain
    assert "peak memory 236 MB" in plain
    assert "2254 s," in calibrated
    assert [rows["build, time"], rows["build, peak memory"]] == [["86 s", "38 min"], ["236 MB", "4.8 GB"]]


def test_the_head_of_json_objects_is_described() -> None:
    assert names_in("docs/json.md", "What all objects share") - {"name", "directory"} == set(
        head("qwen-run", Path("e"))
    )
    written = PAGES["docs/json.md"].section("What all objects share")
    assert f"the version of these rules, {SCHEMA_VERSION} |" in written


# Examples of files


def test_examples_of_files_are_read(tmp_path: Path) -> None:
    rules = next(fence.text for fence in PAGES["docs/build.md"].fences if fence.language == "json")
    (tmp_path / "rules.json").write_text(rules)
    assert [rule.quant for rule in read_rules(tmp_path / "rules.json")] == ["int8", "none"]
    thresholds = next(fence.text for fence in PAGES["docs/accuracy.md"].fences if fence.language == "toml")
    (tmp_path / "thresholds.toml").write_text(thresholds)
    assert len(load_thresholds(tmp_path / "thresholds.toml")) == 3
    prompts, answers = (fence.text for fence in PAGES["docs/run.md"].fences if fence.language == "json")
    assert [prompt.error for prompt in parse_prompts(prompts)] == [None, None]
    assert json.loads(answers)["line"] == 1


# Pictures


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """The script that draws them."""
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "pictures" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_what_the_script_draws(pictures: ModuleType) -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert files == {name: draw().to_svg() for name, draw in pictures.PICTURES.items()}, "run docs/pictures/make.py"


SVGS = [*(ROOT / "docs" / "pictures").glob("*.svg"), *RESULTS.glob("*.svg")]


@pytest.mark.parametrize("path", sorted(SVGS), ids=lambda path: path.stem)
def test_a_picture_needs_no_page_around_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "var(" not in text
    assert "prefers-color-scheme" not in text
    root = xml.etree.ElementTree.fromstring(text)
    first = next(element for element in root if element.tag.endswith("}rect"))
    assert first.get("fill") in ("#fff", "#ffffff")
    for side in ("width", "height"):
        covers = first.get(side, "0")
        assert covers == "100%" or float(covers) == pytest.approx(float(root.get(side, 0)), abs=1)


# What runs


@pytest.fixture(scope="module")
def demo(tmp_path_factory, build_engine):
    """A directory in which ``qwen-build`` was run."""
    pytest.importorskip("gguf")
    from qwen_build.checkpoint.locate import resolve_checkpoint
    from qwen_engine.errors import BuildError

    try:
        checkpoint = resolve_checkpoint(None).path
    except BuildError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(build_engine(checkpoint), directory / ENGINE)
    return directory


EXAMPLES = {
    f"{name}:{index}": fence.text
    for name, page in PAGES.items()
    for index, fence in enumerate(fence for fence in page.fences if fence.language == "python")
    if name != "README.zh-CN.md"  # has those of README.md
}


def test_each_way_to_call_it_has_an_example() -> None:
    assert [name for name in EXAMPLES if name.startswith("README")] == ["README.md:0"]
    for name in ("LLM(", "AsyncLLM(", "QwenForCausalLM.", ".stream("):
        assert any(name in text and ENGINE in text for text in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_prints_what_it_says(demo, monkeypatch, capsys, name):
    if "structured_outputs" in EXAMPLES[name]:
        pytest.importorskip("llguidance")
    monkeypatch.chdir(demo)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__"})
    printed, expected = capsys.readouterr().out, re.findall(r"# prints: (.+)", EXAMPLES[name])
    assert expected
    for words in expected:
        assert words in printed
        printed = printed.partition(words)[2]


@pytest.mark.parametrize(
    ("line", "section"),
    [
        ("qwen-run Hello --max-new-tokens 2 --json", "qwen-run"),
        ("qwen-build --dry-run --json", "qwen-build"),
        ("qwen-inspect --json", "qwen-inspect"),
        ("qwen-inspect --graph --json", "qwen-inspect"),
        ("qwen-inspect --list --json", "qwen-inspect"),
        ("qwen-bench latency --repeat 1 --input-length 4 --output-length 2 --json", "qwen-bench"),
    ],
)
def test_every_field_of_a_json_object_is_described(demo, line, section):
    program, *arguments = line.split()
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shared = list(head(section, Path("engine")))
    assert list(found)[: len(shared)] == shared
    described = set(re.findall(r"`(\w+)`", PAGES["docs/json.md"].section(section)))
    assert set(found) - set(shared) - described == set()


def test_every_field_of_a_report_is_described() -> None:
    described = names_in("docs/json.md", "qwen-summarize") | names_in("docs/json.md", "What all objects share")
    assert set(Report.__dataclass_fields__) <= described


def without_numbers(line: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", line.strip())


def test_the_readmes_session_goes_as_it_says(demo, tmp_path):
    shutil.copytree(demo / ENGINE, tmp_path / ENGINE, copy_function=os.link)  # where no example has built another
    session = re.search(r"^```\n(.*?)^```", README.section("A session"), re.DOTALL | re.MULTILINE)
    assert session is not None
    first, *rest = re.split(r"^\$ ", session[1], flags=re.MULTILINE)[1:]
    assert first.strip() == "source .venv/bin/activate"
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()
    assert len(rest) == 3
    for part in rest:
        line, *shown = part.strip().splitlines()
        program, *arguments = shlex.split(line)
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = list(map(without_numbers, f"{done.stdout}\n{done.stderr}".splitlines()))
        for each in shown:
            assert without_numbers(each) in printed
