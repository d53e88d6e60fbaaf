"""From tokens to text, one by one: what each kind of ``tokenizer.json`` does with the spelling of a token.

The reference is what ``tokenizers`` makes of all tokens of a text at once.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

from qwen_engine.errors import EngineError


def _bytes_of_characters() -> dict[str, int]:
    """The character byte-level vocabularies write for each byte: itself where printable, else the next from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES_OF_CHARACTERS = _bytes_of_characters()


class TokenText(Protocol):
    """The text of one answer, token by token."""

    def push(self, token: str) -> str:
        """The characters that ``token``, as the vocabulary spells it, completes; possibly none."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that are no character."""


class ByteLevelText:
    """Every character of a token stands for a byte; an added token stands for itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        return self._utf8.decode(token_bytes(token, None))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class PieceRules:
    """What is done with the tokens of a vocabulary made by sentencepiece.

    Attributes:
        replaced: pairs of what stands in a token and what it means, one after the other.
        byte_fallback: whether tokens such as ``<0xE4>`` are bytes.
        stripped: how many characters are taken off the beginning of a text, and which.
    """

    replaced: tuple[tuple[str, str], ...]
    byte_fallback: bool = False
    stripped: tuple[int, str] = (0, " ")


class PieceText:
    """Tokens are pieces of text; a run of byte tokens is text where all of it is UTF-8, and else as many U+FFFD."""

    def __init__(self, rules: PieceRules) -> None:
        self._rules = rules
        self._run = bytearray()
        self._to_strip = rules.stripped[0]

    def push(self, token: str) -> str:
        for old, new in self._rules.replaced:
            token = token.replace(old, new)
        if self._rules.byte_fallback and (match := _BYTE.fullmatch(token)):
            self._run.append(int(match[1], 16))
            return ""
        return self._stripped(self._end_run() + token)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        """The text of the byte tokens since the last other one: only their end says whether they are characters."""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return len(run) * "\ufffd"

    def _stripped(self, text: str) -> str:
        while text and self._to_strip:
            if text[0] != self._rules.stripped[1]:
                self._to_strip = 0
            else:
                text, self._to_strip = text[1:], self._to_strip - 1
        return text


_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(token: str, rules: PieceRules | None) -> bytes:
    """What one token adds to a text, but for what is taken off its beginning; ``rules``: of :func:`text_rules`."""
    if rules is not None:
        for old, new in rules.replaced:
            token = token.replace(old, new)
        match = _BYTE.fullmatch(token) if rules.byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()
    try:
        return bytes(BYTES_OF_CHARACTERS[character] for character in token)
    except KeyError:  # an added token in plain letters
        return token.encode()


def text_rules(core: tokenizers.Tokenizer) -> PieceRules | None:
    """How tokens of ``core`` become text; None: they are byte-level.

    Raises:
        EngineError: its decoder is of another kind.
    """
    steps = _steps(None if core.decoder is None else json.loads(core.decoder.__getstate__()))
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return None
    rules = _piece_rules(steps)
    if rules is None:
        names = " and ".join(str(step.get("type")) for step in steps) or "None"
        raise EngineError(
            f"tokenizer.json has decoder {names}, expected ByteLevel, or Replace with ByteFallback, Fuse and Strip; "
            "use the tokenizer of a Qwen, Llama or Mistral checkpoint"
        )
    return rules


def _steps(decoder: Any) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _piece_rules(steps: Sequence[Mapping[str, Any]]) -> PieceRules | None:
    """The rules that ``steps`` are; None where they are others, or in another order."""
    replaced, rest = [], list(steps)
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        replaced.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[byte_fallback:]
    fused = bool(rest) and rest[0]["type"] == "Fuse"
    rest = rest[fused:]
    stripped = (0, " ")
    if fused and rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
        step = rest.pop(0)
        stripped = (step["start"], step["content"])
    return PieceRules(tuple(replaced), byte_fallback, stripped) if replaced and fused and not rest else None
