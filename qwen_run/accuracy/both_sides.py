"""Engine and reference over the same token ids, one document at a time.

What is compared for one document are the ids of a prompt and of the reference's own greedy continuation, or a window of
plain text. Both sides read the same ids (teacher-forced). What a side writes itself is looked at by ROUGE and by the
comparison of continuations alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.graph_io import CHOSEN, LOGITS
from qwen_run.accuracy.datasets import Document
from qwen_run.accuracy.logits import (
    FullLogits,
    Positions,
    ReferenceLogits,
    compare,
    following_tokens,
    logit_pairs,
    positions_of,
)
from qwen_run.accuracy.metrics import first_jump
from qwen_run.accuracy.reference import CHUNK_TOKENS
from qwen_run.accuracy.report import LayerError
from qwen_run.api.llm import LLM
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.sampling.sample import SamplingParams
from qwen_run.text.text_model import TextModel

T = TypeVar("T")

# Tokens of a window of plain text, where the engine takes that many.
WINDOW_TOKENS = 512
# One position in so many has some of its logits plotted against each other.
PLOTTED_EVERY = 32

INSTRUCTION = "Summarize the following text in one sentence.\n\n"


@dataclass(frozen=True)
class ComparedPrompt:
    """The token ids of a document before anything is answered; ``continues`` is False for plain text."""

    token_ids: tuple[int, ...]
    continues: bool


def make_prompt(model: TextModel, document: Document, max_new_tokens: int) -> ComparedPrompt:
    """The ids of ``document``: a window of plain text, or a request for a summary through the chat template.

    A document that is too long is shortened before it goes into the template, so that the template stays whole.

    Raises:
        RequestError: the engine has no chat template for a summary, or no room for it and ``max_new_tokens``, or the
            text has no tokens.
    """
    if document.summary is None:
        window = min(WINDOW_TOKENS, model.max_seq_len - 1)
        token_ids = tuple(model.encode_raw(document.document)[:window])
        if len(token_ids) < 2:
            raise RequestError(f"document {document.id} has {len(token_ids)} tokens, expected at least 2")
        return ComparedPrompt(token_ids, continues=False)
    if model.template is None:
        raise RequestError(
            "the engine has no chat template that can be used, and summaries are asked for through it; "
            "compare on plain text, such as --dataset wikitext2"
        )
    room = model.max_seq_len - 1 - max_new_tokens
    text = document.document
    while True:
        token_ids = tuple(model.encode_chat([{"role": "user", "content": INSTRUCTION + text}]))
        excess = len(token_ids) - room
        if excess <= 0:
            return ComparedPrompt(token_ids, continues=True)
        kept = model.tokenizer.encode(text)[:-excess]
        if not kept:
            raise RequestError(
                f"the engine takes {model.max_seq_len} tokens, too few for the chat template and {max_new_tokens} new "
                "ones; lower --max-new-tokens or build the engine with a larger --max-seq-len if it can have more"
            )
        text = model.tokenizer.decode(kept)


def one_sequence(token_ids: Sequence[int], past: int, blocks: Sequence[int], first_logits: int = 0) -> Batch:
    """A run that feeds one sequence ``token_ids`` after ``past`` cached ones, with logits from ``first_logits`` on."""
    return Batch(
        input_ids=np.array(token_ids, np.int64),
        cumulative_lengths=np.array([0, len(token_ids)], np.int32),
        past_lengths=np.array([past], np.int32),
        block_table=np.array([blocks], np.int32),
        logits_indices=np.arange(first_logits, len(token_ids)),
    )


def engine_logits(engine: Engine, token_ids: Sequence[int], every: int = 1) -> Iterator[np.ndarray]:
    """Logits of positions of one sequence: chunks (up to 128, vocab_size) float32, in order.

    Args:
        every: a divisor of 128; of every so many positions the last, see :func:`positions_of`.
    """
    blocks = engine.cache.allocate(engine.cache.blocks_for(len(token_ids)))
    assert blocks is not None, "a sequence of the engine's length fits an empty cache"
    wanted = np.arange(len(token_ids))[positions_of(len(token_ids), every)]
    pieces: list[np.ndarray] = []
    try:
        for start in range(0, len(token_ids), CHUNK_TOKENS):
            batch = one_sequence(token_ids[start : start + CHUNK_TOKENS], start, blocks)
            inside = wanted[(wanted >= start) & (wanted < start + CHUNK_TOKENS)]
            pieces.append(engine.run(replace(batch, logits_indices=inside - start)))
            if sum(map(len, pieces)) == CHUNK_TOKENS or start + CHUNK_TOKENS >= len(token_ids):
                yield np.concatenate(pieces)
                pieces.clear()
    finally:
        engine.cache.free(blocks)


class Beside:
    """The logits of an engine whose activations are float, and on the way what the engine as it runs says beside them.

    Attributes:
        positions: of the comparison KL(float activations || as it runs), once all logits were asked for.
    """

    def __init__(self, exact: Iterator[np.ndarray], as_it_runs: Iterator[np.ndarray], token_ids: Sequence[int]) -> None:
        self._exact, self._as_it_runs, self._following = exact, as_it_runs, following_tokens(token_ids)
        self._pieces: list[Positions] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        start = 0
        for exact, found in zip(self._exact, self._as_it_runs, strict=True):
            self._pieces.append(compare(FullLogits(exact), found, self._following[start : start + len(found)]))
            start += len(found)
            yield exact

    @property
    def positions(self) -> Positions:
        return Positions.concatenate(self._pieces)


@dataclass(frozen=True)
class Comparison:
    """What both sides said of one sequence.

    ``worst``: the position with the largest KL, the token the reference ranked first there, and the engine's.
    ``pairs``: some logits of reference and engine, to plot against each other.
    """

    positions: Positions
    worst: tuple[int, int, int]
    pairs: tuple[tuple[float, ...], tuple[float, ...]]


def compare_sequence(
    reference: Iterator[ReferenceLogits], logits: Iterator[np.ndarray], token_ids: Sequence[int]
) -> Comparison:
    """Compare both sides at every position of one sequence, chunk by chunk."""
    following = following_tokens(token_ids)
    pieces, pairs, worst, start = [], [], (-1.0, 0, 0, 0), 0
    for expected, found in zip(reference, logits, strict=True):
        piece = compare(expected, found, following[start : start + len(found)])
        t = int(np.argmax(piece.kl))
        if not piece.kl[t] <= worst[0]:  # NaN is worse than anything
            worst = (float(piece.kl[t]), start + t, first_choice(expected, t), int(found[t].argmax()))
        pieces.append(piece)
        pairs.append(np.stack(logit_pairs(expected, found, every=PLOTTED_EVERY)))
        start += len(found)
    plotted = np.concatenate(pairs, axis=1)
    return Comparison(
        Positions.concatenate(pieces), worst[1:], (tuple(plotted[0].tolist()), tuple(plotted[1].tolist()))
    )


def first_choice(reference: ReferenceLogits, t: int) -> int:
    """The token the reference ranks first at position ``t`` of a chunk."""
    return int(reference.values[t].argmax() if isinstance(reference, FullLogits) else reference.top_ids[t, 0])


def timed(pieces: Iterator[T], seconds: dict[str, float], name: str) -> Iterator[T]:
    """``pieces``, the time each takes to come added to ``seconds[name]``."""
    while True:
        started = time.perf_counter()
        piece = next(pieces, None)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        if piece is None:
            return
        yield piece


def greedy(llm: LLM, prompt: Sequence[int], max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
    """The engine's greedy continuation of ``prompt``; a token that ends it is its last.

    Raises:
        EngineError: the engine cannot answer it.
    """
    return greedy_together(llm, [prompt], max_new_tokens, ignore_eos)[0]


def greedy_together(
    llm: LLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, ignore_eos: bool = False
) -> list[list[int]]:
    """As :func:`greedy`, of several prompts at once."""
    params = SamplingParams(temperature=0, max_tokens=max_new_tokens, ignore_eos=ignore_eos)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise EngineError(output.error)
    return [output.outputs[0].token_ids for output in outputs]


def answer_text(model: TextModel, token_ids: Sequence[int]) -> str:
    """The text of an answer, without the token that ended it."""
    ended = token_ids and token_ids[-1] in model.eos_token_ids
    return model.tokenizer.decode(list(token_ids[:-1] if ended else token_ids)).strip()


def layer_errors(
    reference: Mapping[str, np.ndarray], engine: Mapping[str, np.ndarray], name: Literal["original", "as_built"]
) -> list[LayerError]:
    """The error of every sub-block's output, in the order they are computed; both map names to (T, features)."""
    errors: dict[str, LayerError] = {}
    for block, found in engine.items():
        if block.endswith(CHOSEN):
            continue
        expected = reference[block].astype(np.float64)
        difference = found - expected
        rms = float(np.sqrt(np.mean(expected**2)))
        norms = float(np.linalg.norm(expected) * np.linalg.norm(found.astype(np.float64)))
        errors[block] = LayerError(
            name=block,
            reference=name,
            mean=float(expected.mean()),
            standard_deviation=float(expected.std()),
            max_difference=float(np.abs(difference).max()),
            cosine=float((expected * found).sum()) / norms if norms else 1.0,
            relative_rms=float(np.sqrt(np.mean(difference**2))) / rms if rms else float(np.abs(difference).max()),
            jumps=False,
        )
    jump = first_jump({block: error.relative_rms for block, error in errors.items()})
    return [replace(error, jumps=block == jump) for block, error in errors.items()]


def equal_choices(reference: Mapping[str, np.ndarray], engine: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Of each router, the tokens of which both sides chose the same experts, in whatever order.

    Args:
        reference, engine: outputs by name, among them those of routers, (T, k).
    """
    return {
        name.removesuffix(CHOSEN): int((np.sort(reference[name]) == np.sort(chosen)).all(axis=1).sum())
        for name, chosen in engine.items()
        if name.endswith(CHOSEN)
    }


def engine_layers(engine: Engine, token_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Every output of an engine opened with ``layers.onnx`` for one sequence, in the order they are computed."""
    blocks = engine.cache.allocate(engine.cache.blocks_for(len(token_ids)))
    assert blocks is not None, "a sequence of the engine's length fits an empty cache"
    try:
        outputs = engine.run_layers(one_sequence(token_ids, 0, blocks))
    finally:
        engine.cache.free(blocks)
    logits = outputs.pop(LOGITS)
    return outputs | {LOGITS: logits}
