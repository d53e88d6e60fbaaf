"""Text to token ids and back, and token ids to text while they arrive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.regular_files import read_regular
from qwen_run.runtime.native_calls import NATIVE_CALLS
from qwen_run.text.control_texts import ControlTexts
from qwen_run.text.token_text import ByteLevelText, PieceText, TokenText, text_rules, token_bytes
from qwen_run.text.tokenizer_file import MOST_BYTES, open_tokenizer, panics_as

TOKENIZER_FILE = "tokenizer.json"

# Characters from which a text is encoded without the interpreter lock, so that other threads go on. Shorter ones take a
# few milliseconds, and need not start the threads that tokenizers has for batches.
LONG_TEXT = 1 << 14

# of most texts, and more: no shorter text is looked at before it is tokenized
_CHARACTERS_PER_TOKEN = 16


class Tokenizer:
    """The tokenizer of a checkpoint, as its ``tokenizer.json`` describes it.

    Attributes:
        special_ids: control tokens such as ``<|im_end|>``, which have no text in an answer.
        added_ids: these, and others that are one token by decree, such as ``<tool_call>``.
        control_texts: how both are spelled.
        closing: what it puts behind every text, as ``<|endoftext|>`` of embedding models.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        """Take a tokenizer that the ``tokenizers`` package has read.

        Raises:
            EngineError: ``core`` makes text of its tokens in a way that is not known.
        """
        self._text_rules = text_rules(core)
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._before, self.closing = self._around()
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.added_ids = frozenset(added)
        self.control_texts = ControlTexts(
            special=[token.content for token in added.values() if token.special],
            structural=[token.content for token in added.values() if not token.special],
        )

    @classmethod
    def load(cls, engine_directory: Path) -> Tokenizer:
        """Read the tokenizer of an engine.

        Raises:
            EngineError: ``tokenizer.json`` is missing, cannot be read, or takes too much time or memory.
        """
        path = engine_directory / TOKENIZER_FILE
        remedy = "download it again and build the engine again"
        try:
            content = read_regular(path, MOST_BYTES)
        except FileNotFoundError:
            raise EngineError(
                f"{path} does not exist; build the engine from a checkpoint that has {TOKENIZER_FILE}"
            ) from None
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
        return cls(open_tokenizer(content, path, EngineError, remedy))

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included; a model's vocabulary may be padded beyond it."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """What ``tokenizer.json`` says, for libraries that read it themselves."""
        return str(self._core.to_str())

    @property
    def is_byte_level(self) -> bool:
        """Every character of a token of the vocabulary stands for a byte."""
        return self._text_rules is None

    def without_added(self) -> tokenizers.Tokenizer:
        """A copy that makes no added token of its spelling, and puts nothing around a text."""
        described = json.loads(self._core.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(described | {"added_tokens": [], "post_processor": None}))

    def encode(self, text: str, add_special_tokens: bool = False, most: int | None = None) -> list[int]:
        """Token ids of ``text``; what reads like a special token becomes one, as in transformers.

        Args:
            add_special_tokens: also add what the tokenizer puts around a text (nothing for Qwen): for text
                that does not come from a chat template. A text that begins with it already gets it once.
            most: tokens that are of any use. A text that is far longer is refused by its beginning.

        Raises:
            RequestError: ``text`` came from bytes that are not UTF-8, or has more than twice ``most`` tokens.
        """
        if most is not None:
            self._check_length(text, most)
        ids = self._encode(text, add_special_tokens)
        size = len(self._before)
        return ids[size:] if add_special_tokens and size and ids[size : 2 * size] == self._before else ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with panics_as(RequestError, f"{TOKENIZER_FILE} cannot encode the prompt", "build the engine again"):
            try:
                if len(text) < LONG_TEXT:
                    return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)
                with NATIVE_CALLS.call():
                    (encoded,) = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return list(encoded.ids)
            except (UnicodeEncodeError, TypeError) as error:
                raise RequestError("the prompt holds bytes that are not UTF-8; convert it to UTF-8") from error

    def encode_pieces(self, pieces: Sequence[str], most: int | None = None) -> list[int]:
        """Token ids of texts that are encoded one by one, so that no token reaches from one into the next.

        Args:
            most: as for :meth:`encode`, of all together.

        Raises:
            RequestError: as :meth:`encode`.
        """
        if len(pieces) == 1:
            return self.encode(pieces[0], most=most)
        if most is not None:
            self._check_length("".join(pieces), most)
        return [token_id for piece in pieces for token_id in self.encode(piece)]

    def _check_length(self, text: str, most: int) -> None:
        """Refuse a text whose beginning alone has more than twice ``most`` tokens: all of it may take minutes.

        A beginning that is cut within a word has a few tokens more than it has in the whole text: hence twice.
        """
        size = _CHARACTERS_PER_TOKEN * most
        while size < len(text):
            if len(self.encode(text[:size])) > 2 * most:
                raise RequestError(f"the prompt of {len(text)} characters has more than {most} tokens; shorten it")
            size *= 4

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        with panics_as(RequestError, f"{TOKENIZER_FILE} cannot decode these ids", "build the engine again"):
            return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Id of ``token`` as the vocabulary spells it, None where it has no such token."""
        found = self._core.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str | None:
        """The token of ``token_id`` as the vocabulary spells it, None where it has no such id."""
        found = self._core.id_to_token(token_id)
        return None if found is None else str(found)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; nothing for an id beyond the vocabulary."""
        return token_bytes(self.token(token_id) or "", self._text_rules)

    def new_text(self) -> TokenText:
        """What makes the text of an answer of its tokens."""
        return ByteLevelText() if self._text_rules is None else PieceText(self._text_rules)

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before every text, as ``<|begin_of_text|>``, and behind it; nothing for Qwen."""
        bare, whole = (list(self._core.encode("a", add_special_tokens=special).ids) for special in (False, True))
        size = len(bare)
        at = next((at for at in range(len(whole) - size + 1) if whole[at : at + size] == bare), None)
        return ([], []) if at is None else (whole[:at], whole[at + size :])


class StreamDecoder:
    """Text of tokens as they arrive, in whole characters: what is returned joins up to ``Tokenizer.decode`` of all.

    A character split over several tokens is returned with the last of them, or with the first that is none of its
    bytes; each token is decoded once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text = tokenizer.new_text()

    def push(self, token_id: int) -> str:
        """The characters that ``token_id`` completes, possibly none."""
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        return "" if token is None else self._text.push(token)

    def flush(self) -> str:
        """U+FFFD for a character that was left unfinished, else nothing."""
        return self._text.flush()
