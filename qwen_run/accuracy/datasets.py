"""Texts to measure with: the samples that come with the package, and files of the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from qwen_engine.errors import RequestError
from qwen_engine.regular_files import read_regular
from qwen_run.text.encoding import decode_utf8

# Documents of the built-in samples are in exactly one of the halves, so that what calibrates never evaluates.
Half = Literal["evaluation", "calibration"]

_DATA = Path(__file__).parent / "data"
_SAMPLES = ("scitldr", "wikitext2")

# name -> what it is
BUILT_IN = {
    "default": "scitldr and wikitext2 in turn",
    "scitldr": "abstracts of papers with a one-sentence summary (SciTLDR)",
    "wikitext2": "Wikipedia articles (WikiText-2)",
}


@dataclass(frozen=True)
class Document:
    """A text, and what a person wrote as its summary; None for text that is only scored."""

    id: str
    document: str
    summary: str | None


@dataclass(frozen=True)
class Dataset:
    """``sha256`` is that of the documents with their ids and summaries, whatever file they came from."""

    name: str
    documents: tuple[Document, ...]
    sha256: str


def load_dataset(
    source: str, document_field: str = "document", summary_field: str = "summary", max_samples: int | None = None
) -> Dataset:
    """The evaluation half of a built-in sample, or all of a file.

    A file is JSON Lines if its first line with anything on it begins with ``{``, else it is one document. A document
    may be a list of sentences; of a list of summaries the first is taken. Either every line has a summary
    (possibly null) or none.

    Args:
        source: a name of ``BUILT_IN``, or a path.
        max_samples: keep the first this many documents.

    Raises:
        RequestError: there is no such name or file, it is not UTF-8 or empty, or a line is not what it should be.
    """
    if source in BUILT_IN:
        documents = built_in_documents(source)
    else:
        text = decode_utf8(_read(source), source)
        if not text.strip():
            raise RequestError(f"{source} is empty, expected JSON Lines or a text")
        if text.lstrip().startswith("{"):
            documents = _parse_lines(text, source, document_field, summary_field)
        else:
            documents = (Document(Path(source).stem, text, None),)
    documents = documents[:max_samples]
    content = json.dumps([astuple(document) for document in documents], separators=(",", ":"))
    return Dataset(source, documents, hashlib.sha256(content.encode()).hexdigest())


def built_in_documents(name: str, half: Half = "evaluation") -> tuple[Document, ...]:
    """One half of the built-in sample ``name``."""
    samples = _SAMPLES if name == "default" else (name,)
    columns = []
    for sample in samples:
        lines = (_DATA / f"{sample}.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [Document(line["id"], line["document"], line.get("summary")) for line in map(json.loads, lines)]
        columns.append([document for document in documents if half_of(document.document) == half])
    return tuple(document for row in zip_longest(*columns) for document in row if document is not None)


def half_of(text: str) -> Half:
    """The half a built-in document belongs to: by its hash, so that it stays there when others are added."""
    return "calibration" if _fingerprint(text)[0] & 1 else "evaluation"


def overlap(a: Iterable[Document], b: Iterable[Document]) -> tuple[str, ...]:
    """Ids of the documents of ``a`` whose text is in ``b`` too, but for letter case and white space.

    >>> overlap([Document("1", "One  text", None)], [Document("2", "one text", None)])
    ('1',)
    """
    known = {_fingerprint(document.document) for document in b}
    return tuple(document.id for document in a if _fingerprint(document.document) in known)


def _read(source: str) -> bytes:
    try:
        return read_regular(Path(source))
    except FileNotFoundError:
        raise RequestError(f"{source} is neither a file nor one of the data sets {', '.join(BUILT_IN)}") from None
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror}") from error


def _parse_lines(text: str, source: str, document_field: str, summary_field: str) -> tuple[Document, ...]:
    records = {}
    # str.splitlines would also split at U+2028, which may stand in a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records[f"{source} line {number}"] = _parse_object(line, f"{source} line {number}")
    without = [where for where, record in records.items() if summary_field not in record]
    if without and (len(without) < len(records) or summary_field != "summary"):
        raise RequestError(f"{without[0]} {_lacks(summary_field, records[without[0]])}")
    documents = {}
    for number, (where, record) in enumerate(records.items(), start=1):
        if document_field not in record:
            raise RequestError(f"{where} {_lacks(document_field, record)}")
        document = _text(record[document_field], f"{where}: {document_field!r}")
        summary = record.get(summary_field)
        if isinstance(summary, list):
            summary = summary[0] if summary else None
        if summary is not None:
            summary = _text(summary, f"{where}: {summary_field!r}")
        id = str(record.get("id", number))
        if id in documents:
            raise RequestError(f"{where} has the id {id!r} of an earlier line; give each line its own")
        documents[id] = Document(id, document, summary)
    return tuple(documents.values())


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RequestError(f"{where} holds {type(record).__name__}, expected an object")
    return record


def _lacks(field: str, record: dict[str, Any]) -> str:
    return f"has no field {field!r}, only {', '.join(map(repr, record)) or 'none'}; name the fields to read"


def _text(value: Any, where: str) -> str:
    """``value``, its sentences joined where it is a list of them."""
    if isinstance(value, list) and all(isinstance(sentence, str) for sentence in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise RequestError(f"{where} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        half = f"{where} has {value[error.start]!r} at character {error.start}"
        raise RequestError(f"{half}, which stands for nothing alone; remove it") from error
    if not value.strip():
        raise RequestError(f"{where} is empty, expected text")
    return value


def _fingerprint(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
