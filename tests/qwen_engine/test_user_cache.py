"""What is kept in the user's cache directory is listed and removed: ``qwen-inspect --list`` and ``--clean``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen_engine.errors import EngineError
from qwen_engine.user_cache import Kept, list_kept, lock_file, remove
from qwen_engine.whole_files import locked_file
from qwen_run import LLM, SamplingParams
from qwen_run.api.build_on_demand import engine_of
from qwen_run.commands.inspect import main

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory with an engine of 3 MiB and the demo."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder, size_bytes in (("engines/tiny-int4-0123", 3 << 20), ("demo/Demo", 1000)):
        directory = tmp_path / "qwen-engine" / folder
        directory.mkdir(parents=True)
        (directory / "weights.bin").write_bytes(bytes(size_bytes))
        os.utime(directory, (86_400 * 365, 86_400 * 365))
    (tmp_path / "qwen-engine" / "engines" / ".digests-1.json").write_text("{}")
    (tmp_path / "qwen-engine" / "engines" / ".building.partial").mkdir()
    return tmp_path


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_what_is_kept_is_listed(cache: Path) -> None:
    assert inspect("--list").output == (
        "engine           1971-01-01  3.0 MiB  tiny-int4-0123\n"
        "demo checkpoint  1971-01-01  0.0 MiB  Demo\n"
        f"3.0 MiB kept in {cache / 'qwen-engine'}\n"
    )
    data = json.loads(inspect("--list", "--json").output)
    assert data["cache"] == str(cache / "qwen-engine")
    assert data["kept"][1] == {
        "kind": "demo checkpoint",
        "path": str(cache / "qwen-engine" / "demo" / "Demo"),
        "size_bytes": 1000,
        "made": "1971-01-01",
    }


def test_everything_that_is_kept_goes(cache: Path) -> None:
    assert inspect("--clean").output.endswith(f"3.0 MiB removed in {cache / 'qwen-engine'}\n")
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size] == []
    assert inspect("--list").output == f"0.0 MiB kept in {cache / 'qwen-engine'}\n"
    assert inspect("--clean").exit_code == 0


def test_one_goes_by_its_name_or_its_path(cache: Path) -> None:
    assert inspect("--clean", "Demo").exit_code == 0
    assert [kept.path.name for kept in list_kept(cache)] == ["tiny-int4-0123"]
    assert inspect("--clean", str(cache / "qwen-engine/engines/tiny-int4-0123")).exit_code == 0
    assert list_kept(cache) == []


def test_an_unknown_name_is_refused_and_nothing_goes(cache: Path) -> None:
    result = inspect("--clean", "absent")
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {cache / 'qwen-engine'} keeps nothing of the name absent; qwen-inspect --list shows what it keeps\n"
    )
    assert len(list_kept(cache)) == 2


def test_what_is_being_built_stays(cache: Path) -> None:
    engine = cache / "qwen-engine" / "engines" / "tiny-int4-0123"
    with locked_file(lock_file(engine)):
        result = inspect("--clean")
    assert result.stderr == f"Note: {engine} is being built and stays.\n"
    assert [kept.path for kept in list_kept(cache)] == [engine]


@pytest.mark.parametrize("options", [["--list", "--clean"], ["--list", "--graph"], ["--clean", "--verify"]])
def test_options_that_do_not_go_together_are_refused(options: list[str], cache: Path) -> None:
    result = inspect(*options)
    assert result.exit_code == 2
    assert "--list and --clean stand alone, or with --json" in result.output
    assert len(list_kept(cache)) == 2


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (cache / "qwen-engine" / "engines" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(list_kept(cache)) == 2


def test_what_cannot_be_removed_says_so(cache: Path) -> None:
    absent = Kept("engine", cache / "absent" / "engine", 0, 0)
    with pytest.raises(EngineError, match=r"engine cannot be removed: No such file .*; remove it by hand"):
        remove(absent)


def test_an_engine_that_was_removed_is_built_again_and_an_open_one_goes_on(
    tiny_checkpoint,
    cache: Path,  # type: ignore[no-untyped-def]
) -> None:
    checkpoint = tiny_checkpoint("qwen2").path
    engine = engine_of(checkpoint, {"quant": "int8"})
    llm = LLM(engine)
    before = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert [kept.path for kept in list_kept(cache) if kept.path == engine] == [engine]
    assert inspect("--clean", engine.name).exit_code == 0
    assert not engine.exists()
    assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == before
    assert engine_of(checkpoint, {"quant": "int8"}) == engine
    assert engine.is_dir()
