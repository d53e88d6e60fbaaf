"""Answers that keep to a form: what was asked for, compiled by llguidance for a tokenizer, as a constraint."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import EngineError, RequestError
from qwen_run.sampling.constraint import Constraint
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_run.text.tokenizer import Tokenizer

_KEPT = 64  # compiled forms
_LONGEST_PROBLEM = 300  # characters of what llguidance says
_DEEP_STACK = 1 << 30  # bytes of addresses; what is not touched is no memory
_ONE_DEEP = threading.Lock()

Result = TypeVar("Result")


class Grammars:
    """Compiles forms for one tokenizer, and keeps those of late. Any thread may call it.

    Args:
        vocab_size: of the model, which may have more tokens than the tokenizer.
        eos_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ends = sorted(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
        self._guard = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[tuple[str, str, bool], Any] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary, which takes a second for Qwen's: else the first form pays for it.

        Raises:
            EngineError: llguidance is not installed, or does not know such a tokenizer.
        """
        with self._guard:
            self._read_vocabulary()

    def constraint(self, form: StructuredOutputsParams, thinks_first: bool, is_thinking: bool) -> Constraint:
        """A constraint for an answer of this form, which begins where thinking ends.

        Args:
            thinks_first: an answer may begin with ``<think>``.
            is_thinking: the prompt has begun to think.

        Raises:
            RequestError: the form cannot be compiled; says why.
            EngineError: llguidance is not installed.
        """
        if form.after is not None:
            return self._after(form, form.after)
        matcher = self._matcher(form)
        begin, end, break_ = (self._tokenizer.token_id(token) for token in ("<think>", "</think>", "ĊĊ"))
        return GrammarConstraint(
            matcher.deep_copy(),
            self._vocab_size,
            np.array(self._ends, np.int64),
            begin if thinks_first and end is not None else None,
            end if end is not None else -1,
            is_thinking,
            break_,
        )

    def _after(self, form: StructuredOutputsParams, token: str) -> AfterToken:
        token_id = self._tokenizer.token_id(token)
        if token_id is None:
            raise RequestError(f"after is {token!r:.80}, which is no token of the model's; leave it out")
        ends, matcher = np.array(self._ends, np.int64), self._matcher(form).deep_copy()
        return AfterToken(token_id, GrammarConstraint(matcher, self._vocab_size, ends, None, -1, False, None))

    def _matcher(self, form: StructuredOutputsParams) -> Any:
        key = (form.kind, form.text, form.strict)
        with self._guard:
            vocabulary = self._read_vocabulary()
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        matcher, problem = _with_deep_stack(_compile, vocabulary, form)
        if problem:
            raise RequestError(f"{form.kind} cannot be kept to: {problem[:_LONGEST_PROBLEM]}; change it")
        with self._guard:
            self._compiled[key] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _read_vocabulary(self) -> Any:
        if self._vocabulary is None:
            try:
                import llguidance
            except ImportError as error:
                message = "llguidance is not installed, and forms of answers need it; run pip install llguidance"
                raise EngineError(message) from error
            tokenizer: Any = self._tokenizer.to_json()
            if self._tokenizer.is_byte_level:
                tokenizer = _Vocabulary(self._tokenizer, self._vocab_size, self._ends)
            self._vocabulary = llguidance.LLTokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=self._ends or None)
        return self._vocabulary


class _Vocabulary:
    """A byte-level tokenizer as llguidance takes one.

    What it reads itself of a ``tokenizer.json`` makes the token ``</tool_call>`` of a text that a form demands, and
    then refuses the token.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        self._plain = tokenizer.without_added()
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(each for each in tokenizer.added_ids if each < vocab_size)
        self.eos_token_id = next(iter(ends), 0)

    def __call__(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def _compile(vocabulary: Any, form: StructuredOutputsParams) -> tuple[Any, str]:
    """A matcher of ``form``, and why it cannot be kept to; no words where it can."""
    import llguidance

    grammar = _grammar_of(form)
    problem = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if not problem and not matcher.is_error():
        first = matcher.deep_copy()
        first.compute_bitmask()  # says whether anything may come first
        problem = first.get_error()
    return matcher, _with_keyword(problem or matcher.get_error())


def _with_deep_stack(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function`` in a thread of its own: llguidance descends 4 KiB for every rule that stands within another, and
    its end of the stack is the end of the process. It takes 65,000 rules."""
    with _ONE_DEEP, ThreadPoolExecutor(1) as pool:
        others = threading.stack_size(_DEEP_STACK)
        try:
            found = pool.submit(function, *arguments)
        finally:
            threading.stack_size(others)
        return found.result()


# what llguidance says without a keyword of the schema, and the keyword
_KEYWORDS = {
    "regex parse error": "pattern or regex",
    "Pointer": "$ref",
    "anyOf is empty": "enum or anyOf",
    "NoExtensionBias": "nothing is of this form, as where a $ref leads to itself",
}


def _with_keyword(problem: str) -> str:
    """What llguidance says, in one line, with the keyword that it means."""
    said = " ".join(re.split("<state>|<backtrace>", problem)[0].split())
    return ": ".join([*(keyword for words, keyword in _KEYWORDS.items() if words in said), said])


def json_style(strict: bool) -> dict[str, Any]:
    """How JSON is written: as Python writes it, which is what models have read most of, with no other white space."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return style if strict else {**style, "lenient": True}


def _grammar_of(form: StructuredOutputsParams) -> str:
    """The form as llguidance reads it; JSON without white space in which models may lose themselves."""
    import llguidance

    matcher = llguidance.LLMatcher
    if form.kind in ("json", "json_object"):
        schema = json.loads(form.text) if form.kind == "json" else {"type": "object"}
        _narrow_bounds(schema)
        return str(matcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": json_style(form.strict)})))
    if form.kind == "regex":
        return str(matcher.grammar_from_regex(form.text))
    if form.kind == "choice":
        choices = " | ".join(json.dumps(each, ensure_ascii=False) for each in form.choice or ())
        return str(matcher.grammar_from_lark(f"start: {choices}"))
    return str(matcher.grammar_from_lark(form.text))


_DATA = ("const", "enum", "default", "examples")  # keywords that hold values, not schemas


def _narrow_bounds(schema: dict[str, Any]) -> None:
    """Move a whole bound that is excluded a little inwards where less than 1 is between it and the other bound.

    llguidance 1.9.1 allows 0 for ``{"exclusiveMinimum": 0, "maximum": 0.5}``.
    """
    waiting: list[Any] = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        if not isinstance(each, dict):
            continue
        waiting += [value for name, value in each.items() if name not in _DATA]
        low, high = (each.get(f"exclusive{end}", each.get(end.lower())) for end in ("Minimum", "Maximum"))
        if not isinstance(low, int | float) or not isinstance(high, int | float) or not 0 < high - low < 1:
            continue
        little = 10 ** (math.floor(math.log10(high - low)) - 3)
        for end, bound, inwards in (("Minimum", low, little), ("Maximum", high, -little)):
            if f"exclusive{end}" in each and bound == int(bound):
                del each[f"exclusive{end}"]
                each[end.lower()] = round(bound + inwards, 15)


class GrammarConstraint:
    """Keeps an answer to a form; see :class:`~qwen_run.sampling.constraint.Constraint`.

    Args:
        matcher: llguidance's, at the beginning.
        ends: ids that end an answer.
        begin, end: ``<think>``, None where the answer does not begin with it, and ``</think>``.
        break_: the token of an empty line, which models write after thinking.
    """

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        ends: NDArray[np.int64],
        begin: int | None,
        end: int,
        is_thinking: bool,
        break_: int | None,
    ) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, ends
        self._begin, self._end, self._break = begin, end, break_
        self._is_thinking, self._is_first, self._may_break = is_thinking, not is_thinking, False
        self._allowed: NDArray[np.bool_] | None = None  # where it is known already
        self._is_asked = self._was_asked = False  # what may come next, and what might have come before the last token

    def prepare(self) -> None:
        """Work out what may come next, if that was asked before the last token: a greedy answer often need not ask."""
        is_needed = self._was_asked and not self._is_thinking and not self._matcher.is_stopped()
        if is_needed and self._allowed is None:
            with suppress(RequestError):  # ``allowed`` raises it for the answer that it ends
                self._allowed = self._mask()

    def allowed(self) -> NDArray[np.int64] | NDArray[np.bool_] | None:
        """What may come next; None within thinking.

        Raises:
            RequestError: the form has grown beyond what can be followed.
        """
        self._is_asked = True
        if self._is_thinking:
            return None
        if self._matcher.is_stopped():
            self._check()
            return self._ends
        return self._mask() if self._allowed is None else self._allowed

    def _mask(self) -> NDArray[np.bool_]:
        import llguidance.numpy

        mask = llguidance.numpy.allocate_token_bitmask(1, self._vocab_size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask, 0)
        self._check()
        allowed = np.unpackbits(mask[0].view(np.uint8), bitorder="little")[: self._vocab_size].view(np.bool_)
        allowed[list(self._beside_form())] = True
        return allowed

    def permits(self, token_id: int) -> bool:
        """``token_id`` may come next.

        Raises:
            RequestError: the form has grown beyond what can be followed.
        """
        if self._is_thinking:
            return True
        if self._allowed is not None:
            return bool(self._allowed[token_id])
        if self._matcher.is_stopped():
            self._check()
            return bool((self._ends == token_id).any())
        permitted = token_id in self._beside_form() or self._matcher.validate_tokens([token_id]) == 1
        self._check()
        return permitted

    def _beside_form(self) -> tuple[int, ...]:
        """Tokens that may come next and are not of the form."""
        tokens = self._begin if self._is_first else None, self._break if self._may_break else None
        return tuple(token_id for token_id in tokens if token_id is not None)

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""
        is_first, may_break, self._allowed = self._is_first, self._may_break, None
        self._was_asked, self._is_asked = self._is_asked, False
        self._is_first = self._may_break = False
        if self._is_thinking:
            self._is_thinking = token_id != self._end
            self._may_break = not self._is_thinking
        elif is_first and token_id == self._begin:
            self._is_thinking = True
        elif not (may_break and token_id == self._break) and not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""
        return bool(self._matcher.is_stopped())

    def fork(self) -> GrammarConstraint:
        """A copy that goes its own way."""
        copy: GrammarConstraint = object.__new__(GrammarConstraint)
        copy.__dict__.update(self.__dict__)
        copy._matcher = self._matcher.deep_copy()
        return copy

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the form of the answer cannot be kept to: {_with_keyword(self._matcher.get_error())}")


class AfterToken:
    """Keeps what follows a token to a form, each time the token comes, until nothing can follow in the form.

    Args:
        token_id: of the token.
        form: at its beginning.
    """

    def __init__(self, token_id: int, form: GrammarConstraint) -> None:
        self._token_id, self._form = token_id, form
        self._open: GrammarConstraint | None = None

    def prepare(self) -> None:
        """Work out what may come next."""
        if self._open is not None:
            self._open.prepare()

    def allowed(self) -> NDArray[np.int64] | NDArray[np.bool_] | None:
        """What may come next; None where all may.

        Raises:
            RequestError: the form has grown beyond what can be followed.
        """
        return None if self._open is None else self._open.allowed()

    def permits(self, token_id: int) -> bool:
        """``token_id`` may come next.

        Raises:
            RequestError: the form has grown beyond what can be followed.
        """
        return self._open is None or self._open.permits(token_id)

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""
        if self._open is not None:
            self._open.append(token_id)
            self._open = None if self._open.is_complete else self._open
        elif token_id == self._token_id:
            self._open = self._form.fork()

    def fork(self) -> AfterToken:
        """A copy that goes its own way."""
        copy = AfterToken(self._token_id, self._form)
        copy._open = None if self._open is None else self._open.fork()
        return copy
