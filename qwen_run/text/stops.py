"""The text of one answer as it may be shown, and where it ends at a stop string."""

from __future__ import annotations

from collections.abc import Collection

from qwen_run.text.tokenizer import StreamDecoder, Tokenizer


class TextStopper:
    """Finds stop strings in an answer, token by token, and holds back what may be the beginning of one.

    The answer ends at the character that first completes a stop string, wherever the tokens end; what the last token
    brings after it is dropped. A stop string that is the name of a special token (``<|im_end|>``) is found although
    special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Collection[str] = (),
        *,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """
        Args:
            stop: not empty ones; of two that end together the longer counts.
            include_stop_str_in_output: the stop string stays in the text.
            min_tokens: a stop string that ends within so many first tokens does not count.
            skip_special_tokens: special tokens have no text.
        """
        self.stop_reason: str | None = None
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._matchers = [_Matcher(text) for text in sorted(stop, key=len, reverse=True)]
        named = {text: tokenizer.token_id(text) for text in stop} if skip_special_tokens else {}
        self._special = {token_id: text for text, token_id in named.items() if token_id in tokenizer.special_ids}
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

    def __init__(self, text: str) -> None:
        self.text = text
        self._matched = 0
        self._borders = [0] * (len(text) + 1)  # of the first i characters: the longest proper prefix they end with
        for i in range(1, len(text)):
            self._borders[i + 1] = self._extended(self._borders[i], text[i])

    @property
    def held(self) -> int:
        """Characters at the end of the input that may be the beginning of the text."""
        return self._matched if self._matched < len(self.text) else self._borders[self._matched]

    def push(self, character: str) -> bool:
        """Whether ``character`` completes the text."""
        self._matched = self._extended(self.held, character)
        return self._matched == len(self.text)

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched]
        return matched + (self.text[matched] == character)
