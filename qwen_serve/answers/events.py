"""What an answer consists of, in the order in which it was written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reasoning:
    """A part of what the model thought."""

    text: str


@dataclass(frozen=True)
class Content:
    """A part of what the model said."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The model calls the tool ``name``; ``index`` counts its calls."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Reasoning | Content | CallBegin | CallArguments


@dataclass
class Call:
    """A whole call; ``arguments`` is JSON text as far as the model kept to it."""

    name: str
    arguments: str = ""


@dataclass
class Answer:
    """What events add up to."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Put ``event`` to what is there."""
        match event:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallBegin(_, name):
                self.calls.append(Call(name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
