"""The tokenizer of an engine: the checkpoint's ``tokenizer.json`` with every token that its other files add.

transformers reads tokens from ``tokenizer_config.json`` (or, in older checkpoints, ``added_tokens.json`` and
``special_tokens_map.json``) on top of ``tokenizer.json``, and makes a tokenizer of ``vocab.json`` and ``merges.txt``
where that is all there is. So does this module, without transformers: ``TokenizersBackend`` and ``Qwen2Tokenizer`` of
transformers 5 are its reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_build.checkpoint import tiktoken_file
from qwen_build.checkpoint.files import read_bytes, read_json, read_optional_json
from qwen_engine.errors import CheckpointError, EngineError
from qwen_run.text.token_text import text_rules
from qwen_run.text.tokenizer import TOKENIZER_FILE, Tokenizer
from qwen_run.text.tokenizer_file import QWEN_WORDS, open_tokenizer, panics_as

CONFIG_FILE, ADDED_FILE, SPECIAL_FILE = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"

# everything a tokenizer is made of
SOURCES = (TOKENIZER_FILE, CONFIG_FILE, ADDED_FILE, SPECIAL_FILE, VOCABULARY_FILE, MERGES_FILE, tiktoken_file.FILE)

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# what Qwen2Tokenizer has where its files say nothing
CLASS_ROLES = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

# switches of tokenizer_config.json that engines do not have -> what they do; some count for a vocabulary alone
SWITCHES = {
    "split_special_tokens": "what reads like a special token becomes one",
    "add_prefix_space": "a text begins as tokenizer.json says",
}
OF_VOCABULARIES = ("add_prefix_space",)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space


@dataclass(frozen=True)
class EngineTokenizer:
    """``content`` is the engine's tokenizer.json, ``added`` the ids of added tokens, ``notes`` what to say of them."""

    content: bytes
    added: Mapping[str, int]
    notes: tuple[str, ...]

    def open(self) -> Tokenizer:
        """The tokenizer itself."""
        return Tokenizer(tokenizers.Tokenizer.from_buffer(self.content))


def engine_tokenizer(checkpoint: Path) -> EngineTokenizer | None:
    """What the engine of the directory ``checkpoint`` tokenises with; None where it has no tokenizer.

    Raises:
        CheckpointError: a file is damaged, or a tokenizer of an unknown kind.
    """
    path = checkpoint / TOKENIZER_FILE
    content: bytes | None
    if path.is_file():
        found = read_bytes(path)
        content, core, where = found, open_tokenizer(found, path, CheckpointError, "download it again"), path
    elif (checkpoint / VOCABULARY_FILE).is_file() and (checkpoint / MERGES_FILE).is_file():
        content, core, where = None, _from_vocabulary(checkpoint), checkpoint / VOCABULARY_FILE
    elif (checkpoint / tiktoken_file.FILE).is_file():
        content, where = None, checkpoint / tiktoken_file.FILE
        core = _with_words(tiktoken_file.read_tiktoken(where), prefixed=False)
    else:
        return None
    try:
        changed = _as_class(core, read_optional_json(checkpoint / CONFIG_FILE))
        Tokenizer(core)
    except EngineError as error:
        raise CheckpointError(f"{where}: {error}") from error
    before = core.get_added_tokens_decoder()
    declared, special = _declared(checkpoint, content is None)
    core.add_tokens([declared[token_id] for token_id in sorted(declared)])
    _add_special(core, special)
    after = core.get_added_tokens_decoder()
    if content is None or changed or after != before:
        content = core.to_str().encode()
    ids = {token.content: token_id for token_id, token in after.items()}
    moved = [
        f"{token.content} is declared with the id {token_id} and gets {ids[token.content]}, as in transformers."
        for token_id, token in sorted(declared.items())
        if ids.get(token.content, token_id) != token_id
    ]
    return EngineTokenizer(content, ids, (*moved, *_left_out(checkpoint, has_file=path.is_file())))


def _as_class(core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Make ``core`` what LlamaTokenizer makes of its vocabulary, where that is the class; whether anything changed.

    transformers 5 reads vocabulary, merges and what is put around a text; how spaces are written, the class decides.
    Byte-level files keep what they say, under any class.
    """
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer" or text_rules(core) is None:
        return False
    prefixed = config.get("add_prefix_space")
    scheme = "never" if prefixed is False else "always" if config.get("legacy") else "first"
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return True


def _left_out(checkpoint: Path, has_file: bool) -> Iterator[str]:
    """A sentence about each switch of ``tokenizer_config.json`` that engines do not have."""
    config = read_optional_json(checkpoint / CONFIG_FILE)
    for name, consequence in SWITCHES.items():
        if config.get(name) is True and (has_file or name not in OF_VOCABULARIES):
            yield f"{CONFIG_FILE}: {name} is left out, {consequence}."


def _from_vocabulary(checkpoint: Path) -> tokenizers.Tokenizer:
    """The tokenizer that Qwen2Tokenizer makes of ``vocab.json`` and ``merges.txt``."""
    vocabulary = read_json(checkpoint / VOCABULARY_FILE)
    path = checkpoint / MERGES_FILE
    content = read_bytes(path)
    with panics_as(CheckpointError, f"{path} and {VOCABULARY_FILE} make no tokenizer", "download them again"):
        lines = content.decode().replace("\r\n", "\n").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        core = tokenizers.Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]
    prefixed = bool(read_optional_json(checkpoint / CONFIG_FILE).get("add_prefix_space"))
    return _with_words(core, prefixed)


def _with_words(core: tokenizers.Tokenizer, prefixed: bool) -> tokenizers.Tokenizer:
    """``core`` with the way in which all Qwen tokenizers cut text into words, and write them."""
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _declared(checkpoint: Path, is_slow: bool) -> tuple[dict[int, AddedToken], list[AddedToken | str]]:
    """The added tokens by the ids they are declared with, and the special ones, whose ids nothing says."""
    config = read_optional_json(checkpoint / CONFIG_FILE)
    try:
        if "added_tokens_decoder" in config:
            declared = {int(i): _token(token) for i, token in config["added_tokens_decoder"].items()}
        else:
            config |= read_optional_json(checkpoint / SPECIAL_FILE)
            special = {_content(token) for token in _special(config, is_slow)}
            declared = {
                token_id: AddedToken(text, normalized=text not in special, special=text in special)
                for text, token_id in read_optional_json(checkpoint / ADDED_FILE).items()
                if type(token_id) is int or _refuse(token_id)
            }
        by_content = {token.content: token for token in declared.values()}
        return declared, [by_content.get(_content(token), token) for token in _special(config, is_slow)]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint}: the tokens of {CONFIG_FILE}, {SPECIAL_FILE} or {ADDED_FILE} are damaged: {error}; "
            "download them again"
        ) from error


def _special(config: Mapping[str, Any], is_slow: bool) -> Iterator[AddedToken | str]:
    """The special tokens that have a role, and those that have none; ``is_slow``: of a vocabulary alone."""
    roles = (CLASS_ROLES if is_slow else {}) | dict(config)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [
        value for name, value in config.items() if name.endswith("_token") and name not in ROLES and _is_token(value)
    ]
    for token in (
        *(roles.get(role) for role in ROLES),
        *others,
        *(extra.values() if isinstance(extra, dict) else extra),
    ):
        if token is not None:
            yield token if isinstance(token, str) else _token(token)


def _add_special(core: tokenizers.Tokenizer, special: list[AddedToken | str]) -> None:
    """Add the special tokens that are not there, and make those special that are."""
    known = {token.content: token for token in core.get_added_tokens_decoder().values()}
    for token in special:
        found = known.get(_content(token), token)
        if isinstance(found, str):
            found = AddedToken(found, special=True, normalized=False)
        if not found.special or found.content not in known:
            core.add_special_tokens([found])


def _token(value: Any) -> AddedToken:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no token")
    return AddedToken(**{name: part for name, part in value.items() if name != "__type"})


def _content(token: AddedToken | str) -> str:
    return token if isinstance(token, str) else token.content


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _refuse(value: Any) -> bool:
    raise TypeError(f"{value!r} is no id")
