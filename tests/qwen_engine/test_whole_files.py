"""What is written appears whole or not at all; what killed processes left goes; what others planted is not touched."""

from __future__ import annotations

import os

import pytest

from cases.processes import run_python
from qwen_engine.whole_files import NEW, OLD, lock, locked, open_own, scratch_beside, whole_directory, whole_file


def hidden(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_a_file_is_seen_only_when_it_is_whole(tmp_path):
    target = tmp_path / "answers.jsonl"
    target.write_text("old")
    target.chmod(0o640)
    with whole_file(target) as file:
        file.write(b"new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert hidden(tmp_path) == []


def test_a_new_file_has_the_mode_that_any_program_gives(tmp_path):
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("whole", [whole_file, whole_directory])
def test_an_error_leaves_everything_as_it_was(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "target"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_directory_takes_the_place_of_the_old_one_if_it_is_to(tmp_path):
    target = tmp_path / "engine"
    for content, replaces, expected in (("a", True, "a"), ("b", True, "b"), ("c", False, "b")):
        with whole_directory(target, lambda answer=replaces: answer) as new:
            (new / "file").write_text(content)
        assert (target / "file").read_text() == expected
        assert hidden(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen_engine import whole_files
with getattr(whole_files, sys.argv[1])(Path(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("whole", ["whole_file", "whole_directory"])
def test_what_a_killed_writer_left_goes_with_the_next_one_and_the_living_keep_theirs(whole, tmp_path):
    target = tmp_path / "target"
    with whole_file(target):
        run_python(KILLED, whole, target)
        assert len(hidden(tmp_path)) == 2
        with scratch_beside(target):
            assert len(hidden(tmp_path)) == 2  # the living one's and that of this one
    assert hidden(tmp_path) == []


def test_a_planted_link_is_neither_followed_nor_removed(tmp_path):
    private, target = tmp_path / "private", tmp_path / "out" / "engine"
    (private / OLD).mkdir(parents=True)
    (private / OLD / "key").touch()
    target.parent.mkdir()
    planted = target.parent / ".engine.aaaaaaaa.partial"
    planted.symlink_to(private)
    with scratch_beside(target), whole_file(target.with_name("engine")):
        pass
    assert (private / OLD / "key").exists()
    assert planted.is_symlink()


def test_only_what_this_user_made_is_opened(tmp_path, monkeypatch):
    file, link, fifo, everybodys = (tmp_path / name for name in ("file", "link", "fifo", "everybodys"))
    for path in (file, everybodys):
        path.touch(mode=0o600)
    everybodys.chmod(0o666)
    link.symlink_to(file)
    os.mkfifo(fifo)
    for path in (link, fifo, everybodys):
        with pytest.raises(PermissionError), open_own(path):
            pass
    with pytest.raises(NotADirectoryError), open_own(file, os.O_DIRECTORY):
        pass
    with open_own(file) as descriptor:
        assert lock(descriptor, wait=False)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(PermissionError), open_own(file):
        pass


def test_a_held_lock_is_told_from_a_missing_one(tmp_path, monkeypatch):
    with locked(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            lock(descriptor, wait=False)
    assert lock(descriptor, wait=False)

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert not lock(descriptor)
    os.close(descriptor)
    with whole_directory(tmp_path / "engine") as new:
        assert new.name == NEW
