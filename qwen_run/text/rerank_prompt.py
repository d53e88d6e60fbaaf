"""The prompt of Qwen3-Reranker: a question about a query and a document, which is answered with yes or no.

Its words, and that its three parts are encoded one by one, are those of the model's own description.
"""

from __future__ import annotations

from qwen_engine.errors import RequestError
from qwen_run.text.tokenizer import Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def rerank_ids(
    tokenizer: Tokenizer, query: str, document: str, instruction: str | None = None, most: int | None = None
) -> list[int]:
    """Token ids of the question whether ``document`` answers ``query``.

    What query and document say stays text, also where it spells a control token.

    Args:
        instruction: what is looked for; None: :data:`INSTRUCTION`.
        most: tokens of the prompt; the end of a longer document is left out.

    Raises:
        RequestError: there is no room for any of the document.
    """
    said = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    marked = tokenizer.control_texts.marked([{"role": "user", "content": said}], None)
    text = str(marked.messages[0]["content"])
    body = tokenizer.encode_pieces(text.split(marked.mark) if marked.mark else (text,))
    before, after = tokenizer.encode(BEFORE), tokenizer.encode(AFTER)
    if most is not None:
        room = most - len(before) - len(after)
        if room < 1:
            raise RequestError(f"{most} tokens hold no more than the words around a document, expected more")
        body = body[:room]
    return [*before, *body, *after]
