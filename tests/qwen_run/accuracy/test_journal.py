"""The journal of a comparison: kept whatever happens, and nobody else's."""

import json
import signal

import pytest

from cases.processes import run_python
from qwen_engine.errors import RequestError
from qwen_run.accuracy.journal import Journal

KEY = {"engine": {"weights.bin": "ab"}, "reference": 1}
HEAD = json.dumps(KEY) + "\n"


def results(path, resume=True):
    """What a journal that is resumed has for three names; what it lacks is None."""
    with Journal(path, KEY, resume) as journal:
        return [journal.do("phase", name, lambda: None) for name in "abc"]


def test_results_are_kept_and_made_once(tmp_path):
    path = tmp_path / "new" / "journal"
    with Journal(path, KEY, resume=True) as journal:
        assert journal.do("phase", "a", lambda: (1, 2)) == [1, 2]
        assert journal.do("phase", "a", lambda: pytest.fail("made twice")) == [1, 2]
        assert (journal.has("phase", "a"), journal.has("other", "a")) == (True, False)
    assert results(path) == [[1, 2], None, None]
    assert results(path, resume=False) == [None, None, None]


@pytest.mark.parametrize("torn", ["", '["ph', '["phase", "b", 2', '["phase", "b", 2]'])
def test_a_line_that_an_interruption_cut_short_is_dropped(tmp_path, torn):
    path = tmp_path / "journal"
    path.write_text(f'{HEAD}["phase", "a", 1]\n{torn}')
    assert results(path) == [1, None, None]
    assert path.read_text() == f'{HEAD}["phase", "a", 1]\n["phase", "b", null]\n["phase", "c", null]\n'


@pytest.mark.parametrize("length", [0, 1, 10, len(HEAD) - 1])
def test_a_journal_cut_short_in_its_head_begins_anew(tmp_path, length):
    path = tmp_path / "journal"
    path.write_text(HEAD[:length])
    assert results(path) == [None, None, None]
    assert path.read_text().startswith(HEAD)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json\n", "line 1 is no result"),
        ("notes", "line 1 is no result"),
        ("5\n", "line 1 is no result"),
        ("[" * 100_000 + "\n", "line 1 is no result"),
        ("\xff\n", "line 1 is no result"),
        (f"{HEAD}not json\n", "line 2 is no result"),
        (f'{HEAD}["x"]\n', "line 2 is no result"),
        (f'{HEAD}["phase", ["a"], 1]\n', "line 2 is no result"),
        (f'{HEAD}["phase", "a", 1]\n{{}}\n', "line 3 is no result"),
        ('{"reference": 1}\n', "was made with another engine; run without --resume or with the same options"),
    ],
)
def test_what_is_no_journal_of_this_comparison_is_refused_and_left_alone(tmp_path, text, says):
    path = tmp_path / "journal"
    path.write_text(text, "latin-1")
    with pytest.raises(RequestError, match=says):
        Journal(path, KEY, resume=True)
    assert path.read_text("latin-1") == text
    assert results(path, resume=False) == [None, None, None]  # the advice


def test_a_journal_that_cannot_be_written(tmp_path):
    with pytest.raises(RequestError, match="choose another --report"):
        Journal(tmp_path, KEY, resume=True)


# The kernel kills a process that writes beyond the limit of a file's size.
KILLED = """if True:
    import json, resource, signal, sys
    from pathlib import Path
    from qwen_run.accuracy.journal import Journal
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    Journal(Path(sys.argv[1]), json.loads(sys.argv[2]), True).do("phase", "c", lambda: 3)
"""


@pytest.mark.parametrize("torn", ["", '["phase", "c'])
def test_a_kill_while_a_journal_is_resumed_loses_nothing(tmp_path, torn):
    path = tmp_path / "journal"
    path.write_text(f'{HEAD}["phase", "a", 1]\n["phase", "b", 2]\n{torn}')
    assert run_python(KILLED, path, json.dumps(KEY)).returncode == -signal.SIGXFSZ
    assert results(path) == [1, 2, None]
