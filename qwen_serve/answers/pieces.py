"""An answer's tokens beside its text: where in the text a token such as ``<tool_call>`` stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from qwen_run.text.tokenizer import StreamDecoder, Tokenizer


class Piece(NamedTuple):
    """A part of an answer's text; ``is_token``: it is one token by decree and not spelled out in letters."""

    text: str
    is_token: bool = False


class Pieces:
    """Takes an answer's tokens, and of its text how much is certain; gives the text in pieces.

    What the text leaves out at its end, such as a stop text, is in no piece.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Collection[str], skip_special_tokens: bool = True) -> None:
        """For an answer that has not begun.

        Args:
            tokens: spellings of the tokens that become pieces of their own, where the tokenizer has them.
        """
        ids = {tokenizer.token_id(token): token for token in tokens}
        self._tokens = {i: token for i, token in ids.items() if i is not None and i in tokenizer.added_ids}
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._waiting: deque[Piece] = deque()
        self._num_certain = 0

    @property
    def spellings(self) -> frozenset[str]:
        """Those of the tokens that the tokenizer has."""
        return frozenset(self._tokens.values())

    def push(self, token_ids: Sequence[int], num_characters: int, is_last: bool) -> list[Piece]:
        """The pieces that so many more characters of the text complete."""
        for token_id in token_ids:
            self._take(token_id)
        if is_last:
            self._waiting.append(Piece(self._decoder.flush()))
        self._num_certain += num_characters
        pieces = []
        while self._waiting:
            piece = self._waiting[0]
            size = 0 if self._is_hidden(piece) else len(piece.text)
            if size > self._num_certain:
                if (is_last or not piece.is_token) and self._num_certain:
                    pieces.append(Piece(piece.text[: self._num_certain]))
                    self._waiting[0] = Piece(piece.text[self._num_certain :])
                    self._num_certain = 0
                break
            self._num_certain -= size
            self._waiting.popleft()
            if piece.text:
                pieces.append(piece)
        return pieces

    def _take(self, token_id: int) -> None:
        token = self._tokens.get(token_id)
        if token is None:
            self._waiting.append(Piece(self._decoder.push(token_id)))
        elif token_id in self._hidden:
            self._waiting.append(Piece(token, True))
        else:
            self._waiting.append(Piece(self._decoder.push(token_id).removesuffix(token)))
            self._waiting.append(Piece(token, True))

    def _is_hidden(self, piece: Piece) -> bool:
        return piece.is_token and any(self._tokens[i] == piece.text for i in self._tokens if i in self._hidden)
