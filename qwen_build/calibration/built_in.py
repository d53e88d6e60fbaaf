"""The built-in text: prose, papers, articles, chats, code and Chinese in turn, so that few tokens have some of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qwen_engine.errors import QwenError
from qwen_run.accuracy.datasets import Document, Half, built_in_documents
from qwen_run.text.chat_template import ChatTemplate

_MIX = Path(__file__).parent / "data" / "mix.jsonl"
_SAMPLES = ("wikitext2", "scitldr")
_KINDS = ("chat", "code", "chinese", "prose")

# Of what was written for calibration, one document in so many is in the other half.
_VERIFIES = 4

# Characters of a document that are read in its turn; what longer ones have beyond comes when all had their turns.
_TURN = 2000


def built_in_text(directory: Path, half: Half) -> list[Document]:
    """One half of the documents in the order in which calibration reads them; no document is in both.

    Args:
        directory: of the checkpoint, whose chat template writes the chats; one without has the words of both sides.
    """
    template, calibrates = _template(directory), half == "calibration"
    columns = [list(built_in_documents(sample, half)) for sample in _SAMPLES]
    lines = [json.loads(line) for line in _MIX.read_text(encoding="utf-8").splitlines()]
    for kind in _KINDS:
        own = [line for line in lines if line["kind"] == kind]
        columns.append(
            [_document(line, template) for n, line in enumerate(own, 1) if (n % _VERIFIES > 0) is calibrates]
        )
    documents = [document for row in zip_longest(*columns) for document in row if document is not None]
    first = [Document(one.id, one.document[:_TURN], None) for one in documents]
    rest = [Document(one.id, one.document[_TURN:], None) for one in documents if len(one.document) > _TURN]
    return [*first, *rest]


def _template(directory: Path) -> ChatTemplate | None:
    try:
        return ChatTemplate.load(directory)
    except QwenError:  # there is none, or none that can be used: the build or the first chat says so
        return None


def _document(line: dict[str, Any], template: ChatTemplate | None) -> Document:
    if template is not None and "messages" in line:
        try:
            return Document(line["id"], template.render(line["messages"], add_generation_prompt=False), None)
        except QwenError:
            pass
    return Document(line["id"], _words(line), None)


def _words(line: dict[str, Any]) -> str:
    messages: Sequence[dict[str, str]] = line.get("messages", ())
    return line.get("document") or "".join(f"{one['role'].title()}: {one['content']}\n\n" for one in messages)
