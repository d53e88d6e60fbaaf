"""The tokenizer: text to ids as transformers gives them; the stream of an answer joins up to the whole decode."""

import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, pre_tokenizers

from cases.scripted import ENDOFTEXT, IM_END, IM_START, core_tokenizer, write_text_files
from qwen_engine.errors import EngineError, RequestError
from qwen_run.text.tokenizer import LONG_TEXT, StreamDecoder, Tokenizer
from qwen_run.text.tokenizer_file import panics_as

TOKENIZER = Tokenizer(core_tokenizer())
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 5))  # a model's vocabulary is padded beyond the tokenizer's


def stream(ids, skip_special_tokens=True):
    decoder = StreamDecoder(TOKENIZER, skip_special_tokens)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(IDS, st.booleans())
def test_stream_joins_up_to_decode(ids, skip_special_tokens):
    assert "".join(stream(ids, skip_special_tokens)) == TOKENIZER.decode(ids, skip_special_tokens)


@given(st.text())
def test_text_survives_and_streams_in_whole_characters(text):
    ids = TOKENIZER.encode(text)
    pieces = stream(ids, skip_special_tokens=False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    # a character comes with the last token of its bytes, not later
    for i in range(len(ids)):
        assert "".join(pieces[: i + 1]) == TOKENIZER.decode(ids[: i + 1], False).rstrip("�") or "�" in text


def test_characters_split_over_tokens():
    ids = TOKENIZER.encode("a 你🤗")
    assert [piece for piece in stream(ids) if piece] == ["a", " ", "你", "🤗"]
    assert stream(ids[:-1])[-1] == "�"
    assert "".join(stream(TOKENIZER.encode("é<工具 x>"))) == "é<工具 x>"


def test_leading_space_stays():
    assert stream(TOKENIZER.encode(" the"))[0] == " the"


def test_special_tokens():
    ids = TOKENIZER.encode("<|im_start|>x<think><|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (IM_START, IM_END, 4)
    assert TOKENIZER.decode(ids) == "x<think>"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<|im_start|>x<think><|im_end|>"
    assert TOKENIZER.token_id("<|endoftext|>") == ENDOFTEXT
    assert TOKENIZER.token_id("<|nothing|>") is None
    assert TOKENIZER.special_ids == {ENDOFTEXT, IM_START, IM_END}


@pytest.mark.parametrize(
    "text", ["", "x<|im_start|>user", " the\n\nthe <think>é</think>", "你好🤗", "<工具 x>", "<|im_end"]
)
def test_equals_transformers(text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core_tokenizer())
    assert TOKENIZER.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert TOKENIZER.encode(text, add_special_tokens=True) == theirs.encode(text)


def test_settings_of_the_file_that_cut_or_fill_are_off():
    core = core_tokenizer()
    core.enable_truncation(3)
    core.enable_padding(length=9)
    assert len(Tokenizer(core).encode("abcdef")) == 6
    assert len(Tokenizer(core).encode("a")) == 1


def test_text_that_was_not_utf8():
    with pytest.raises(RequestError, match="not UTF-8"):
        TOKENIZER.encode("a\udcff")


def test_files(tmp_path):
    assert Tokenizer.load(write_text_files(tmp_path)).encode("the") == TOKENIZER.encode("the")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match=r"tokenizer\.json is no tokenizer: .*EOF while parsing"):
        Tokenizer.load(tmp_path)
    with pytest.raises(EngineError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path / "absent")


def test_other_decoders_are_refused():
    core = core_tokenizer()
    core.decoder = decoders.WordPiece()
    with pytest.raises(EngineError, match="WordPiece, expected ByteLevel"):
        Tokenizer(core)


@pytest.fixture
def patient_threads():
    """No thread is asked to let another run: that depends on what it does alone."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("patient_threads")
def test_other_threads_go_on_while_a_long_text_is_encoded():
    tokenizer, ticks, over = Tokenizer(core_tokenizer()), [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(0)
            time.sleep(0.001)

    text = "the quick brown fox " * 2000
    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    tokenizer.encode(text)
    during = len(ticks) - before
    over.set()
    thread.join(60)
    assert len(text) > LONG_TEXT
    assert during > 0


def test_a_long_text_is_encoded_as_a_short_one_is(monkeypatch):
    tokenizer = Tokenizer(core_tokenizer())
    text = "the <|im_end|> 你好 \n\n" * 2000
    long = tokenizer.encode(text, add_special_tokens=True)
    monkeypatch.setattr("qwen_run.text.tokenizer.LONG_TEXT", 10**9)
    assert tokenizer.encode(text, add_special_tokens=True) == long
    monkeypatch.undo()
    with pytest.raises(RequestError, match="not UTF-8"):
        tokenizer.encode("a" * LONG_TEXT + "\udcff")


def test_a_panic_of_the_tokenizer_is_an_error_of_the_request():
    core = core_tokenizer()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(?:a|aa|a)+[bcd]{3}"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    tokenizer = Tokenizer(core)
    with pytest.raises(RequestError, match=r"cannot encode the prompt: .*retry-limit-in-match over; build the engine"):
        tokenizer.encode("a" * 64 + "x")
    assert tokenizer.decode(tokenizer.encode("the")) == " the"


def test_what_ends_a_program_is_no_panic():
    with pytest.raises(KeyboardInterrupt), panics_as(RequestError, "it", "again"):
        raise KeyboardInterrupt
