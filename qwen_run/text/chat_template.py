"""Conversations as the text a model was trained on: the checkpoint's Jinja template, rendered as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from qwen_engine.errors import EngineError, QwenError, RequestError
from qwen_engine.json_files import read_object
from qwen_engine.regular_files import read_regular
from qwen_run.text.bounded_run import BoundsError, run_bounded
from qwen_run.text.control_texts import ControlTexts
from qwen_run.text.messages import Message as Message
from qwen_run.text.messages import check_tools, normalized_messages, with_object_arguments

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

# the fields of tokenizer_config.json that templates may refer to
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")

# stands for a text that a template may write, or drop
_PROBE = "The answer."
_QUESTION = {"role": "user", "content": "A question."}
_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}

# what the template is given in any case
_OURS = ("messages", "tools", "documents", "add_generation_prompt")
# stands behind a message that is to be continued: a noncharacter, which is in no text
_END_OF_MESSAGE = "\ufdd1"

# what a message is probed after, by its role: templates ask for it
_BEFORE: dict[str, list[Message]] = {"system": [], "tool": [_QUESTION, _CALL]}
# roles that a template may write without naming them, as it does with every role it is given
_STANDARD_ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """The chat template of a checkpoint; several where it has one of its own for tools.

    Args:
        templates: Jinja text by name, ``default`` and possibly ``tool_use``.
        special_tokens: what the template may refer to as ``eos_token`` and the like.
        source: the file they are in, for messages.

    Raises:
        EngineError: a template is not valid Jinja, does not come to an end or fills the memory, or none is named
            ``default``.
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, Any], source: Path | None = None
    ) -> None:
        if "default" not in templates:
            raise EngineError(f"the chat templates are named {', '.join(templates)}, expected one named default")
        self._special_tokens = special_tokens
        self._texts = templates
        self._known: dict[tuple[str, str], bool] = {}  # whether a template writes messages of a role
        try:  # also what is constant is computed when a template is compiled
            self._end_of_turn = run_bounded(self._compile_and_probe) or ""
        except BoundsError as error:
            raise EngineError(
                f"{source or 'the chat template'}: to write two short messages the chat template takes {error}; "
                "correct it in the checkpoint and build again, or use --raw"
            ) from error
        self._templates = self._compiled()
        self._variables = frozenset().union(*map(_variables_of, templates.values())) - {*_OURS, *special_tokens}

    @classmethod
    def load(cls, engine_directory: Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, else ``chat_template.json``, else what ``tokenizer_config.json`` holds.

        Raises:
            EngineError: there is none, or it cannot be read.
        """
        config = read_json(engine_directory / CONFIG_FILE) if (engine_directory / CONFIG_FILE).is_file() else {}
        text_file, json_file = (engine_directory / name for name in TEMPLATE_FILES)
        source = next((path for path in (text_file, json_file) if path.is_file()), engine_directory / CONFIG_FILE)
        if source == text_file:
            found: Any = _read(text_file)
        else:
            found = (read_json(json_file) if source == json_file else config).get("chat_template")
        if not found:
            raise EngineError(f"{engine_directory} has no chat template; use --raw to send the prompt as it is")
        tokens = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
        return cls(_by_name(found), tokens, source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens written out.

        Args:
            messages: objects with ``role`` and ``content``, text or a list of text parts, and what else the template
                reads (``tool_calls``); :func:`~qwen_run.text.messages.normalized_messages` says what becomes of them.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: end with the opening of an answer.
            continue_final_message: end within the last message instead, so that the answer goes on with it.
            variables: passed on to the template, such as ``enable_thinking``.

        Raises:
            RequestError: there are no messages, one holds what is no text or has a role that the template does not
                know, or the template refuses them.
        """
        return self.pieces(messages, tools, add_generation_prompt, continue_final_message, **variables)[0]

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        control_texts: ControlTexts | None = None,
        **variables: Any,
    ) -> tuple[str, ...]:
        """The text of a conversation in pieces to be encoded one by one: one, unless a message spells a control token.

        Args:
            control_texts: what no message may say; without, whatever they say is taken as it is.
            messages, tools, add_generation_prompt, continue_final_message, variables: as in :meth:`render`.

        Raises:
            RequestError: as in :meth:`render`.
        """
        check_tools(tools)
        normalized = normalized_messages(messages)
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        for index, message in enumerate(normalized):
            if not self._knows(name, message["role"]):
                known = ", ".join(role for role in _STANDARD_ROLES if self._knows(name, role))
                raise RequestError(
                    f"message {index} has the role {message['role']!r}, which the chat template does not know; "
                    f"expected one of {known}"
                )
        self._check_variables(variables)
        mark = ""
        if control_texts:
            normalized, tools, mark = control_texts.marked(normalized, tools)
        write = self._write_open if continue_final_message else partial(self._write, opens=add_generation_prompt)
        try:
            text = write(name, normalized, tools, variables)
        except RequestError:
            objects = with_object_arguments(normalized)
            if objects == normalized:
                raise
            text = write(name, objects, tools, variables)
        return tuple(text.split(mark)) if mark else (text,)

    @property
    def variables(self) -> frozenset[str]:
        """What the template reads beside the messages, such as ``enable_thinking``."""
        return self._variables

    @property
    def source(self) -> str:
        """The Jinja text of the template that is used with tools."""
        return self._texts.get("tool_use", self._texts["default"])

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in _OURS or name in self._special_tokens:
                raise RequestError(f"the chat template's {name!r} is not to be set, expected others; leave it out")

    def _write_open(
        self,
        name: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The text up to the end of the last message's content."""
        last = messages[-1]
        opened = [*messages[:-1], {**last, "content": last["content"] + _END_OF_MESSAGE}]
        text, found, _ = self._write(name, opened, tools, variables).rpartition(_END_OF_MESSAGE)
        if not found:
            raise RequestError("the chat template does not write the last message, which is to be continued")
        return text.replace(_END_OF_MESSAGE, "")

    def _write(
        self,
        name: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        opens: bool = False,
    ) -> str:
        values = {**self._special_tokens, **variables}
        try:
            return self._templates[name].render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=opens, **values
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
            raise RequestError(f"the chat template refuses these messages: {_one_line(error)}") from error

    def _knows(self, name: str, role: str) -> bool:
        """Whether the template writes a message of ``role``; many drop one that they do not know without a word."""
        if role in ("user", "assistant"):  # no chat without them
            return True
        if (name, role) not in self._known:
            text = self._texts[name]
            named = role in _STANDARD_ROLES or f"'{role}'" in text or f'"{role}"' in text
            self._known[name, role] = named and self._writes(name, role)
        return self._known[name, role]

    def _writes(self, name: str, role: str) -> bool:
        probe = {"role": role, "content": _PROBE}
        messages = [*_BEFORE.get(role, [_QUESTION]), probe, *([_QUESTION] if role == "system" else [])]
        try:
            return _PROBE in self._write(name, messages, None, {})
        except RequestError:
            return True  # the template itself says what it does not take

    def end_of_turn(self) -> str:
        """What the template writes after an answer, ``<|im_end|>`` and a line end for Qwen; empty if it fails."""
        return self._end_of_turn

    def _compiled(self) -> dict[str, jinja2.Template]:
        return {name: _compile(text) for name, text in self._texts.items()}

    def _compile_and_probe(self) -> str:
        turn = [_QUESTION, {"role": "assistant", "content": _PROBE}]
        try:
            self._templates = self._compiled()
            return self.render(turn, add_generation_prompt=False).rpartition(_PROBE)[2]
        except QwenError as error:
            if isinstance(error.__cause__, MemoryError):
                raise error.__cause__ from None
            raise


@dataclass
class Conversation:
    """What was said so far: an optional system message, then turns of question and answer."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.turns]

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """Forget a question that got no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    @property
    def num_questions(self) -> int:
        return sum(message["role"] == "user" for message in self.turns)

    def without_oldest(self) -> Conversation:
        """This conversation from its second question on; the system message stays."""
        second = [index for index, message in enumerate(self.turns) if message["role"] == "user"][1]
        return Conversation(self.system, self.turns[second:])


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks an answer for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _variables_of(text: str) -> set[str]:
    environment = _environment()
    return jinja2.meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _compile(text: str) -> jinja2.Template:
    try:
        return _environment().from_string(text)
    except Exception as error:  # compiling computes what is constant, and may run out of stack or memory
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise EngineError(
            f"the chat template is not valid Jinja{line}: {_one_line(error)}; "
            "correct it in the checkpoint and build again, or use --raw"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _by_name(found: Any) -> dict[str, str]:
    """Templates by name from any of the forms checkpoints store them in."""
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else dict(found)
    except (KeyError, TypeError, ValueError):
        named = {}
    if not named or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise EngineError(f"chat_template in {CONFIG_FILE} is neither text nor a list of name and template")
    return named


def _content(token: Any) -> Any:
    """A special token, which a config holds as text or as an object around it."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode().replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}; build the engine again") from error
    except UnicodeDecodeError as error:
        raise EngineError(f"{path} is not UTF-8: {error}; build the engine again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an engine, which is there.

    Raises:
        EngineError: the file cannot be read, is not JSON, or holds something else.
    """
    return read_object(path, EngineError, "build the engine again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
