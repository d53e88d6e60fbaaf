"""One answer told apart while it comes: thinking, text, calls of tools.

The same object reads streamed and whole answers, so that what is streamed adds up to what would have come at once. It
reads tokens: ``<tool_call>`` counts where the model wrote that token, and in a tokenizer without it where the letters
stand. What a model wrote is never an error: what is no call is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from qwen_run.api.outputs import CompletionOutput
from qwen_run.text.tokenizer import Tokenizer
from qwen_serve.answers.events import CallArguments, CallBegin, Content, Event, Reasoning
from qwen_serve.answers.json_call import JsonCall
from qwen_serve.answers.pieces import Piece, Pieces
from qwen_serve.answers.xml_call import FUNCTION, XmlCall

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKERS = (THINK, END_THINK, CALL, END_CALL)


@dataclass(frozen=True)
class Reading:
    """How an answer is to be read.

    Attributes:
        starts_thinking: the prompt has opened ``<think>``.
        thinks: ``<think>`` at the beginning of an answer is thinking.
        calls: tools may be called.
        schemas: of the tools' parameters, by name.
        skip_special_tokens: as in the sampling parameters.
    """

    starts_thinking: bool = False
    thinks: bool = True
    calls: bool = False
    schemas: Mapping[str, Any] = field(default_factory=dict)
    skip_special_tokens: bool = True


_BEFORE_TAGS = re.compile("(?=<)")


class _Reached(Enum):
    BEGINNING = auto()  # nothing but white space so far
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()  # after <tool_call>, while nobody knows yet in which form the call is written
    IN_CALL = auto()


class AnswerParser:
    """Reads one answer.

    Attributes:
        num_reasoning_tokens: how many of its tokens were thinking.
        num_calls: calls that have begun.
    """

    def __init__(self, tokenizer: Tokenizer, reading: Reading) -> None:
        self.num_reasoning_tokens = self.num_calls = 0
        self._reading = reading
        self._pieces = Pieces(tokenizer, MARKERS, reading.skip_special_tokens)
        self._spelled = frozenset(MARKERS) - self._pieces.spellings
        self._text = ""  # that may be the beginning of a marker
        self._begin_id, self._end_id = (tokenizer.token_id(token) for token in (THINK, END_THINK))
        self._counts_thinking, self._is_first_token = reading.starts_thinking, True
        self._state = _Reached.REASONING if reading.starts_thinking else _Reached.BEGINNING
        self._held = ""  # white space that may be dropped
        self._is_fresh = reading.starts_thinking  # white space at the beginning of a part is dropped
        self._raw = ""  # of a call that has not begun
        self._call: JsonCall | XmlCall | None = None
        self._has_begun = self._awaits_end = False
        self._events: list[Event] = []

    def push(self, output: CompletionOutput) -> list[Event]:
        """What ``output``, which holds what is new since the last, adds to the answer."""
        is_last = output.finish_reason is not None
        self._count(output.token_ids)
        for piece in self._pieces.push(output.token_ids, len(output.text), is_last):
            if piece.is_token:
                self._flush()
                self._read(piece)
            else:
                for part in _BEFORE_TAGS.split(piece.text):
                    self._find_markers(part)
        if is_last:
            self._flush()
            self._close(output.finish_reason == "stop")
        events, self._events = self._events, []
        return events

    def _count(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self._counts_thinking:
                self.num_reasoning_tokens += 1
                self._counts_thinking = token_id != self._end_id
            elif self._is_first_token and token_id == self._begin_id and self._reading.thinks:
                self.num_reasoning_tokens += 1
                self._counts_thinking = True
            self._is_first_token = False

    def _find_markers(self, part: str) -> None:
        """Read ``part``, which has ``<`` at its beginning alone: a state can change between two parts, not within."""
        self._text += part
        if "<" not in self._text:  # every marker begins with it
            self._flush()
            return
        is_text = self._state in (_Reached.BEGINNING, _Reached.CONTENT)
        markers = self._spelled | ({FUNCTION} if self._reading.calls and is_text else frozenset())
        found = min(((self._text.find(each), each) for each in markers if each in self._text), default=None)
        if found is not None:
            index, marker = found
            text, self._text = self._text, ""
            self._read_text(text[:index])
            self._read(Piece(marker, True))
            self._find_markers(text[index + len(marker) :])
            return
        size = len(self._text) - max((_held(self._text, marker) for marker in markers), default=0)
        text, self._text = self._text[:size], self._text[size:]
        self._read_text(text)

    def _flush(self) -> None:
        text, self._text = self._text, ""
        self._read_text(text)

    def _read(self, piece: Piece) -> None:
        text = piece.text
        if not piece.is_token:
            self._read_text(text)
        elif self._state in (_Reached.CALL, _Reached.IN_CALL):
            self._read_marker_in_call(text)
        elif text in (CALL, FUNCTION) and self._reading.calls:
            self._begin_call(text)
        elif self._state is _Reached.REASONING:
            if text == END_THINK:
                self._end_part(_Reached.CONTENT)
            else:
                self._say(text)
        elif text == THINK and self._state is _Reached.BEGINNING and self._reading.thinks:
            self._held = ""
            self._end_part(_Reached.REASONING)
        elif text == END_THINK and self._reading.thinks:
            self._end_part(_Reached.CONTENT)
        elif text == END_CALL and self._awaits_end:
            self._awaits_end, self._is_fresh = False, True
        else:
            self._say(text)

    def _read_text(self, text: str) -> None:
        while text:
            if self._state is _Reached.CALL:
                text = self._choose_form(text)
            elif self._state is _Reached.IN_CALL:
                text = self._read_call(text)
            else:
                self._say(text)
                return

    def _say(self, text: str) -> None:
        """A part of what is thought or said; white space at its end waits for what follows."""
        if self._state is _Reached.BEGINNING and text.strip():
            self._state = _Reached.CONTENT
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        text = self._held + text
        self._awaits_end = self._awaits_end and not text.strip()
        said = text.rstrip() if self._reading.calls or self._state is not _Reached.CONTENT else text
        self._held = text[len(said) :]
        if said:
            self._events.append(Reasoning(said) if self._state is _Reached.REASONING else Content(said))

    def _end_part(self, state: _Reached) -> None:
        """Go over to thinking or saying; the white space between is nobody's."""
        self._state, self._held, self._is_fresh = state, "", True

    def _begin_call(self, marker: str) -> None:
        self._raw, self._state, self._call = self._held + marker, _Reached.CALL, None
        self._has_begun = False
        if marker == FUNCTION:
            self._state, self._call = _Reached.IN_CALL, XmlCall(self._reading.schemas)
            self._call.push(marker)

    def _choose_form(self, text: str) -> str:
        """See by its first letter how a call is written."""
        bare = text.lstrip()
        self._raw += text[: len(text) - len(bare)]
        if not bare:
            return ""
        if bare[0] not in "{<":
            self._give_up()
            return bare
        self._call = JsonCall() if bare[0] == "{" else XmlCall(self._reading.schemas)
        self._state = _Reached.IN_CALL
        return bare

    def _read_call(self, text: str) -> str:
        call = self._call
        assert call is not None
        size = call.push(text)
        if not self._has_begun:
            self._raw += text[:size]
        if call.is_bad:
            self._give_up()
            return text[size:]
        self._tell_call()
        if call.is_done:
            self._end_call()
        return text[size:]

    def _read_marker_in_call(self, marker: str) -> None:
        call = self._call
        if call is not None and call.is_in_text:
            self._read_text(marker)
            return
        if call is not None:
            call.close()
            self._tell_call()
        if not self._has_begun:
            self._give_up()
        else:
            self._end_call()
        self._read(Piece(marker, True))

    def _tell_call(self) -> None:
        call = self._call
        assert call is not None
        if not call.has_begun:
            return
        if not self._has_begun:
            assert call.name is not None
            self._events.append(CallBegin(self.num_calls, call.name))
            self._has_begun, self._raw, self._held = True, "", ""
            self.num_calls += 1
        if call.arguments:
            self._events.append(CallArguments(self.num_calls - 1, call.arguments))
            call.arguments = ""

    def _end_call(self) -> None:
        self._call, self._raw = None, ""
        self._end_part(_Reached.CONTENT)
        self._awaits_end = True

    def _give_up(self) -> None:
        """What looked like a call is text."""
        raw, self._raw, self._call = self._raw, "", None
        if self._has_begun:
            self._end_part(_Reached.CONTENT)
            return
        self._state, self._held = _Reached.CONTENT, ""
        self._say(raw)

    def _close(self, by_itself: bool) -> None:
        """The answer has ended: what waited for more is text; a call that the model did not close is closed."""
        if self._state is _Reached.IN_CALL and self._call is not None and by_itself:
            self._call.close()
            self._tell_call()
        if self._state in (_Reached.CALL, _Reached.IN_CALL) and not self._has_begun:
            self._give_up()
        if self._held and self._state in (_Reached.CONTENT, _Reached.BEGINNING):
            self._events.append(Content(self._held))
        self._held = ""


def _held(text: str, marker: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``marker``."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
