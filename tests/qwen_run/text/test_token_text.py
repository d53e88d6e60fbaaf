"""The text of pieces as sentencepiece makes them: the stream joins up to what tokenizers makes of all tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from cases.pieces import BOS, EOS, pieces_tokenizer, write_pieces
from qwen_build.checkpoint.tokenizer_files import engine_tokenizer
from qwen_engine.errors import EngineError
from qwen_run.text.tokenizer import StreamDecoder, Tokenizer

TOKENIZER = Tokenizer(pieces_tokenizer())
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 3))
# bytes of characters and of none, pieces, a space at the beginning
LIKELY = st.lists(
    st.sampled_from([BOS, EOS, 259, 260, 269, 0xE4 + 3, 0xBD + 3, 0xA0 + 3, 0x20 + 3, 0xC3 + 3, 0xA9 + 3])
)


def stream(tokenizer, ids, skip_special_tokens=True):
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(IDS | LIKELY, st.booleans())
def test_stream_joins_up_to_decode(ids, skip_special_tokens):
    assert "".join(stream(TOKENIZER, ids, skip_special_tokens)) == TOKENIZER.decode(ids, skip_special_tokens)


def test_the_bytes_of_single_tokens():
    ids = TOKENIZER.encode("the é你")
    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids) == " the é你".encode()
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""


def test_a_run_of_bytes_is_text_when_it_ends():
    ids = TOKENIZER.encode("the 你a")
    assert [piece for piece in stream(TOKENIZER, ids) if piece] == ["the", " ", "你a"]
    assert stream(TOKENIZER, ids[:-2])[-1] == "\ufffd\ufffd"


@pytest.mark.parametrize("steps", [
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)],
    [decoders.Replace("▁", " "), decoders.Replace("a", "  b"), decoders.ByteFallback(), decoders.Fuse(),
     decoders.Strip(" ", 1, 0)],
])  # fmt: skip
@pytest.mark.parametrize("text", ["the  a", "  the", "a", "", "abc\n\n2.é你"])
def test_other_steps_of_that_kind(steps, text):
    core = pieces_tokenizer()
    core.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(core)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Replace(Regex("▁"), " "), decoders.Fuse()]), "Replace and Fuse"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]), "Replace and Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "Fuse and ByteFallback"),
        (None, "None"),
    ],
    ids=str,
)
def test_another_decoder_is_refused(decoder, named):
    core = pieces_tokenizer()
    core.decoder = decoder
    with pytest.raises(EngineError, match=rf"has decoder {named}, expected ByteLevel, or Replace with ByteFallback"):
        Tokenizer(core)


@pytest.mark.parametrize("config", [
    {}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("text", ["the a", " the", "</s>the</s> a", "abc 12.\n你好 é", ""])
def test_equals_transformers(config, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(write_pieces(tmp_path, **config))
    ours = engine_tokenizer(tmp_path).open()
    ids = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=True) == ids
    assert "".join(stream(ours, ids)) == theirs.decode(ids, skip_special_tokens=True)


def test_what_begins_a_text_is_there_once():
    once = TOKENIZER.encode("the", add_special_tokens=True)
    assert once == [BOS, *TOKENIZER.encode("the")]
    assert TOKENIZER.encode("<s>the", add_special_tokens=True)[:2] != [BOS, BOS]
    assert TOKENIZER.encode("<s>the") == TOKENIZER.encode("<s>the", add_special_tokens=True)
    assert TOKENIZER.encode("", add_special_tokens=True) == [BOS]
