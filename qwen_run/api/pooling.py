"""What becomes of the output of a prompt's last token: embeddings, probabilities of classes, scores of pairs.

The names are those of vLLM's parameters and results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from qwen_engine.errors import RequestError, shown
from qwen_engine.tasks import Pooling
from qwen_run.text.rerank_prompt import rerank_ids
from qwen_run.text.tokenizer import Tokenizer

Output = TypeVar("Output")

# what stands before a query that has an instruction; nothing stands between the colon and the query
QUERY = "Instruct: {instruction}\nQuery:"


@dataclass(frozen=True)
class PoolingParams:
    """What is made of a text.

    Attributes:
        dimensions: of an embedding, its first ones; None: all that the model has.
        normalize: whether an embedding is divided by its length; None: as the checkpoint says.
        use_activation: whether classes are probabilities, and a score is one; None: as the checkpoint says.
        truncate_prompt_tokens: tokens of a text that are read, of a longer one the first; -1: as many as the engine
            takes; None: a longer one is refused.
        cache_salt: texts share what is in the cache with those of the same salt alone.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            RequestError: names the first field that is out of range.
        """
        for name, least in (("dimensions", 1), ("truncate_prompt_tokens", -1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least or value == 0):
                raise RequestError(f"{name} is {shown(value)}, expected a whole number, 1 or more")
        for name in ("normalize", "use_activation"):
            if not isinstance(getattr(self, name), bool | None):
                raise RequestError(f"{name} is {shown(getattr(self, name))}, expected true or false")
        if not isinstance(self.cache_salt, str | None):
            raise RequestError(f"cache_salt is {shown(self.cache_salt)}, expected a text")

    def most_tokens(self, max_seq_len: int) -> int | None:
        """Tokens of a text that are read; None: all of them."""
        most = self.truncate_prompt_tokens
        return most if most is None or most > 0 else max_seq_len


@dataclass(frozen=True)
class EmbeddingOutput:
    """``embedding``: the numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many there are."""
        return len(self.embedding)


@dataclass(frozen=True)
class ClassificationOutput:
    """``probs``: a number for each class; ``label``: the name of the likeliest."""

    probs: list[float]
    label: str

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)


@dataclass(frozen=True)
class ScoringOutput:
    """``score``: from 0 to 1 of a reranker; of embeddings the cosine."""

    score: float


@dataclass(frozen=True)
class PoolingRequestOutput(Generic[Output]):
    """A text and what was made of it.

    Attributes:
        num_cached_tokens: tokens of the prompt that an earlier one had left in the cache.
    """

    request_id: str
    outputs: Output
    prompt_token_ids: list[int]
    num_cached_tokens: int | None = None
    finished: bool = True


def check_dimensions(params: PoolingParams, width: int) -> None:
    """
    Raises:
        RequestError: an embedding of ``width`` has not so many dimensions.
    """
    if params.dimensions is not None and params.dimensions > width:
        raise RequestError(f"dimensions is {params.dimensions}, expected at most the model's {width}")


def embedding(output: np.ndarray, pooling: Pooling, params: PoolingParams | None = None) -> np.ndarray:
    """The embedding (dimensions,) float32 of a last token's ``output`` (width,): cut first, then divided by its length.

    Matryoshka representations, arXiv 2205.13147.
    """
    params = params or PoolingParams()
    kept = output[: params.dimensions].astype(np.float64)
    if pooling.normalize if params.normalize is None else params.normalize:
        kept /= max(math.sqrt(np.square(kept).sum()), 1e-12)
    return kept.astype(np.float32)


def classification(output: np.ndarray, pooling: Pooling, params: PoolingParams | None = None) -> ClassificationOutput:
    """The classes of a last token's ``output`` (labels,)."""
    logits, label = output.astype(np.float64), pooling.labels[int(output.argmax())]
    if params is not None and params.use_activation is False:
        return ClassificationOutput(logits.tolist(), label)
    if pooling.activation == "softmax":
        powers = np.exp(logits - logits.max())
        logits = powers / powers.sum()
    elif pooling.activation == "sigmoid":
        logits = np.array([_sigmoid(each) for each in logits])
    return ClassificationOutput(logits.tolist(), label)


def relevance(output: np.ndarray, params: PoolingParams | None = None) -> float:
    """How probable yes is, beside no: ``output`` (2,) has the logits of no and yes."""
    difference = float(output[1]) - float(output[0])
    return difference if params is not None and params.use_activation is False else _sigmoid(difference)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def prompted(
    prompt: str | List[int], pooling: Pooling, prompt_name: str | None, instruction: str | None
) -> str | List[int]:
    """As :func:`with_prompt`; token ids as they are.

    Raises:
        RequestError: as there, or something is to stand before token ids.
    """
    if isinstance(prompt, str):
        return with_prompt(str(prompt), pooling, prompt_name, instruction)
    if prompt_name is not None or instruction is not None:
        raise RequestError("prompt_name and instruction are put before texts, found token ids; give texts")
    return prompt


def with_prompt(text: str, pooling: Pooling, prompt_name: str | None = None, instruction: str | None = None) -> str:
    """``text`` with what is put before it.

    Raises:
        RequestError: the engine has no prompt of this name, or both are given.
    """
    if instruction is not None:
        if prompt_name is not None:
            raise RequestError("prompt_name and instruction are given, expected one of them")
        return QUERY.format(instruction=instruction) + text
    name = pooling.default_prompt_name if prompt_name is None else prompt_name
    if name is None:
        return text
    if name not in pooling.prompts:
        known = ", ".join(pooling.prompts) or "none: the checkpoint has no config_sentence_transformers.json with some"
        raise RequestError(f"prompt_name is {shown(name)}, expected one of {known}")
    return pooling.prompts[name] + text


class Pairs(NamedTuple):
    """Prompts that are to be run, and what makes a score for each pair of their outputs.

    Attributes:
        documents: of each pair, the index of the prompt that has its document.
    """

    prompts: list[str | list[int]]
    documents: list[int]
    scores: Callable[[List[np.ndarray]], list[float]]


def reranked(
    tokenizer: Tokenizer,
    pairs: List[tuple[str, str]],
    params: PoolingParams,
    instruction: str | None,
    max_seq_len: int,
) -> Pairs:
    """``pairs`` of query and document as prompts of a reranker."""
    most = params.most_tokens(max_seq_len)
    ids = [rerank_ids(tokenizer, query, document, instruction, most) for query, document in pairs]
    return Pairs([*ids], list(range(len(ids))), lambda outputs: [relevance(output, params) for output in outputs])


def compared(pairs: List[tuple[str, str]], pooling: Pooling, params: PoolingParams, instruction: str | None) -> Pairs:
    """``pairs`` of query and document as texts to embed, each once; a score is the cosine of both embeddings.

    A query has the instruction, or the prompt that the engine calls ``query``; a document that called ``document``.
    """
    named = [name if name in pooling.prompts else None for name in ("query", "document")]
    queries = [with_prompt(query, pooling, None if instruction else named[0], instruction) for query, _ in pairs]
    documents = [with_prompt(document, pooling, named[1]) for _, document in pairs]
    texts = list(dict.fromkeys([*queries, *documents]))
    places = {text: index for index, text in enumerate(texts)}

    def scores(outputs: List[np.ndarray]) -> list[float]:
        found = [embedding(output, Pooling(), params).astype(np.float64) for output in outputs]
        each = zip(queries, documents, strict=True)
        return [float((found[places[query]] * found[places[document]]).sum()) for query, document in each]

    return Pairs([*texts], [places[document] for document in documents], scores)
