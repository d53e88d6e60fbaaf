"""The interactive chat: what each line does (:class:`Console`, no terminal needed) and the terminal around it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from qwen_engine.errors import EngineError, QwenError, RequestError
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import CompletionOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.commands.command import printable
from qwen_run.commands.terminal import TerminalText, visible
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.chat_template import Conversation

PROMPT = "> "

# the fields of SamplingParams that are one number, by what :conf calls them: the names of the command line
SETTINGS = {
    name: "max_tokens" if name == "max_new_tokens" else name
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "max_new_tokens",
    )
}

# what None is called
UNSET = {"seed": "drawn", "max_new_tokens": "open"}

_CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"


class Console:
    """An interactive chat without its terminal: a conversation, its settings, and what each line does to them.

    Args:
        llm: answers; without a template every line is a prompt of its own.
        params: settings to begin with and to go back to with ``:reset-conf``.
        system: system message, if any.
        variables: passed to the chat template.
        write: takes what is to be shown, as it comes.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self.conversation = Conversation(system)
        self._first_params = params
        self._variables = dict(variables or {})
        self._write = write or TerminalText(sys.stdout).write

    def handle(self, line: str) -> bool:
        """Do what ``line`` says, a command or a question; False to leave. A mistake is one line and changes nothing."""
        try:
            if re.match(r"\s*:[A-Za-z]", line):
                return self._command(line.strip())
            if line.strip():
                self._answer(line)
        except QwenError as error:
            self._write(f"Error: {printable(str(error))}\n")
        return True

    def _command(self, line: str) -> bool:
        name, *arguments = line[1:].split()
        if name not in COMMANDS:
            raise RequestError(f"there is no command :{name}; :help lists them")
        command = COMMANDS[name]
        if arguments and not command.arguments:
            raise RequestError(f":{name} takes nothing after it, found {' '.join(arguments)}")
        if command.action is None:
            return False
        command.action(self, arguments)
        return True

    def _answer(self, question: str) -> None:
        """Stream an answer; Ctrl-C ends it, and what came until then stays in the conversation."""
        answer = ""
        self.conversation.ask(question)
        try:
            with closing(self.llm.run([self._prepare(question)])) as outputs:
                for output in outputs:
                    piece = output.outputs[0].text[len(answer) :]
                    answer += piece
                    self._write(visible(piece))
                    if output.error is not None:
                        raise EngineError(output.error)
            self._write("\n")
            self._tell_end(output.outputs[0])
        except KeyboardInterrupt:
            self._write("\n(stopped)\n")
        finally:
            if answer:
                self.conversation.answer(answer)
            else:
                self.conversation.withdraw()

    def _tell_end(self, answer: CompletionOutput) -> None:
        """Say that an answer did not end by itself."""
        if answer.finish_reason == "length":
            self._write(f"(cut at {len(answer.token_ids)} tokens; :conf max_new_tokens=N sets another limit)\n")

    def _prepare(self, question: str) -> PendingRequest:
        if not self.llm.has_template:
            return self.llm.prepare(question, self.params)
        ids, dropped = self.llm.text.fit(self.conversation, self.params, **self._variables)
        pending = self.llm.prepare(ids, self.params)
        if dropped:
            self._write(f"(no room for the whole conversation: forgot its oldest {dropped} turns)\n")
        for _ in range(dropped):
            self.conversation = self.conversation.without_oldest()
        return pending

    def _help(self, arguments: list[str]) -> None:
        for command in dict.fromkeys(COMMANDS.values()):
            spelled = "/".join(f":{name}" for name, other in COMMANDS.items() if other is command)
            self._write(f"{f'{spelled} {command.arguments}'.rstrip():<32} {command.help}\n")

    def _clear(self, arguments: list[str]) -> None:
        self._write(_CLEAR_SCREEN)

    def _clear_history(self, arguments: list[str]) -> None:
        self.conversation.turns.clear()
        self._write("(history cleared)\n")

    def _history(self, arguments: list[str]) -> None:
        for message in self.conversation.messages:
            self._write(visible(f"{message['role']}: {message['content']}\n"))
        if not self.conversation.messages:
            self._write("(nothing yet)\n")

    def _seed(self, arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise RequestError(f":seed takes one number, found {' '.join(arguments)}")
        self.params = changed(self.params, [f"seed={number}" for number in arguments])
        self._write(f"{_setting(self.params, 'seed')}\n")

    def _conf(self, arguments: list[str]) -> None:
        self.params = changed(self.params, arguments)
        self._write(" ".join(_setting(self.params, key) for key in SETTINGS) + "\n")

    def _reset_conf(self, arguments: list[str]) -> None:
        self.params = self._first_params
        self._conf([])


def _setting(params: SamplingParams, key: str) -> str:
    value = getattr(params, SETTINGS[key])
    return f"{key}={UNSET[key] if value is None else value}"


class ConsoleCommand(NamedTuple):
    """``action`` None leaves the chat; ``arguments`` as the help shows them, empty for none."""

    action: Callable[[Console, list[str]], None] | None
    arguments: str
    help: str


def _commands(*rows: tuple[str, ConsoleCommand]) -> dict[str, ConsoleCommand]:
    return {name: command for names, command in rows for name in names.split()}


COMMANDS = _commands(
    ("help h", ConsoleCommand(Console._help, "", "show this list")),
    ("exit quit q", ConsoleCommand(None, "", "leave; so does Ctrl-D (Ctrl-C stops an answer)")),
    ("clear cl", ConsoleCommand(Console._clear, "", "clear the screen")),
    ("clear-history clh", ConsoleCommand(Console._clear_history, "", "forget the conversation")),
    ("history his", ConsoleCommand(Console._history, "", "show the conversation")),
    ("seed", ConsoleCommand(Console._seed, "[N]", "show or set the seed of sampling")),
    ("conf", ConsoleCommand(Console._conf, "[KEY=VALUE ...]", "show or change how answers are sampled")),
    ("reset-conf", ConsoleCommand(Console._reset_conf, "", "back to the settings of the start")),
)


def changed(params: SamplingParams, assignments: list[str]) -> SamplingParams:
    """``params`` with ``key=value`` texts applied, all or none.

    >>> changed(SamplingParams(), ["temperature=0.5", "max_new_tokens=9"]).max_tokens
    9

    Raises:
        RequestError: a key is unknown, or a value is not a number it may have.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in SETTINGS or not equals:
            raise RequestError(f"found {assignment}, expected KEY=VALUE with KEY one of {', '.join(SETTINGS)}")
        kind = int if key == "seed" else type(getattr(SamplingParams(), SETTINGS[key]))
        try:
            values[SETTINGS[key]] = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise RequestError(f"{key} is {text!r}, expected {expected}") from None
    return params.with_options(**values)


def completions(text: str) -> Iterator[str]:
    """What the last word of ``text`` may become: a command at the start of a line, a setting after ``:conf``."""
    words = text.split(" ")
    if len(words) == 1 and text.startswith(":"):
        yield from (f":{name}" for name in COMMANDS if f":{name}".startswith(text))
    elif words[0] == ":conf":
        yield from (f"{key}=" for key in SETTINGS if key.startswith(words[-1]))


def run(console: Console) -> None:
    """Read lines from the terminal until the user leaves."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            return (Completion(word, start_position=-len(text.split(" ")[-1])) for word in completions(text))

    session: PromptSession[str] = PromptSession(PROMPT, completer=CommandCompleter(), complete_while_typing=False)
    print("Type a message. :help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            print("(:quit or Ctrl-D leaves)")
            continue
        except EOFError:
            return
        try:
            if not console.handle(line):
                return
        except KeyboardInterrupt:
            print()
