"""The text of one answer as it may be shown, and where it ends at a stop string."""

from __future__ import annotations

from collections.abc import Collection

from qwen_run.text.tokenizer import StreamDecoder, Tokenizer


class StopTexts:
    """The stop strings of a request, prepared once for all of its answers.

    Attributes:
        by_length: with their borders, longest first: of two that end together the longer counts.
        special: those that are names of special tokens, by id.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Collection[str] = ()) -> None:
        """Prepare ``texts``, none of which is empty."""
        self.by_length = [(text, _borders(text)) for text in sorted(texts, key=len, reverse=True)]
        named = {tokenizer.token_id(text): text for text in texts}
        self.special = {i: text for i, text in named.items() if i in tokenizer.special_ids}


class TextStopper:
    """Finds stop strings in an answer, token by token, and holds back what may be the beginning of one.

    The answer ends at the character that first completes a stop string, wherever the tokens end; what the last token
    brings after it is dropped. A stop string that is the name of a special token (``<|im_end|>``) is found although
    special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: StopTexts | Collection[str] = (),
        *,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """A stopper for an answer that has not begun.

        Args:
            stop: not empty ones; prepared where several answers have the same.
            include_stop_str_in_output: the stop string stays in the text.
            min_tokens: a stop string that ends within so many first tokens does not count.
            skip_special_tokens: special tokens have no text.
        """
        self.stop_reason: str | None = None
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        stops = stop if isinstance(stop, StopTexts) else StopTexts(tokenizer, stop)
        self._matchers = [_Matcher(text, borders) for text, borders in stops.by_length]
        self._special = stops.special if skip_special_tokens else {}
        self._includes = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""  # decoded and not yet released

    def push(self, token_id: int) -> bool:
        """Take the next token of the answer; True when it ends the answer, ``stop_reason`` then is the stop string."""
        assert self.stop_reason is None, "the answer has ended"
        self._num_tokens += 1
        may_stop = self._num_tokens > self._min_tokens
        if may_stop and token_id in self._special:
            self.stop_reason = self._special[token_id]
            self._text += self._decoder.flush() + (self.stop_reason if self._includes else "")
            return True
        arrived = self._decoder.push(token_id)
        for count, character in enumerate(arrived, start=1):
            completed = [matcher for matcher in self._matchers if matcher.push(character)]
            if completed and may_stop:
                self.stop_reason = completed[0].text
                self._text += arrived[:count]
                if not self._includes:
                    self._text = self._text.removesuffix(self.stop_reason)
                return True
        self._text += arrived
        return False

    def release(self) -> str:
        """What has become certain to be part of the answer since the last call."""
        held = 0 if self._includes or self.stop_reason else max((matcher.held for matcher in self._matchers), default=0)
        certain = len(self._text) - held
        text, self._text = self._text[:certain], self._text[certain:]
        return text

    def close(self) -> str:
        """The rest, once the answer has ended: what was held back was no stop string."""
        text, self._text = self._text, ""
        return text if self.stop_reason else text + self._decoder.flush()


class _Matcher:
    """How much of one text the characters so far end with (Knuth, Morris and Pratt)."""

    def __init__(self, text: str, borders: list[int]) -> None:
        self.text = text
        self._borders = borders
        self._matched = 0

    @property
    def held(self) -> int:
        """Characters at the end of the input that may be the beginning of the text."""
        return self._matched if self._matched < len(self.text) else self._borders[self._matched]

    def push(self, character: str) -> bool:
        """Whether ``character`` completes the text."""
        self._matched = _extended(self.text, self._borders, self.held, character)
        return self._matched == len(self.text)


def _borders(text: str) -> list[int]:
    """For each i, the length of the longest proper prefix that the first i characters of ``text`` end with."""
    borders = [0] * (len(text) + 1)
    for i in range(1, len(text)):
        borders[i + 1] = _extended(text, borders, borders[i], text[i])
    return borders


def _extended(text: str, borders: list[int], matched: int, character: str) -> int:
    """How much of ``text`` is matched after ``character``, where its first ``matched`` characters were before."""
    while matched and text[matched] != character:
        matched = borders[matched]
    return matched + (text[matched] == character)
