"""Which tools a conversation has, and whether the model may, must or must not call one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_engine.errors import shown
from qwen_serve.common.errors import ServeError
from qwen_serve.openai.fields import Chat


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        shown: what the chat template writes; None for no tools.
        schemas: of their parameters, by name.
    """

    shown: list[dict[str, Any]] | None
    schemas: Mapping[str, Any]

    @property
    def may_call(self) -> bool:
        return self.shown is not None


def tools_of(body: Chat) -> Tools:
    """What ``tools`` and ``tool_choice`` of ``body`` say.

    Raises:
        ServeError: a tool has no name, or the choice is none of those there are.
    """
    tools = body.tools or []
    schemas = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            message = f"tools.{index} is {shown(tool)}, expected an object of type function with a name in it"
            raise ServeError("invalid_request", message, f"tools.{index}")
        assert isinstance(function, Mapping)
        schemas[name] = function.get("parameters")
    choice = body.tool_choice
    if choice in ("auto", None):
        return Tools(tools or None, schemas)
    if choice == "none":
        return Tools(None, schemas)
    if choice == "required" or isinstance(choice, Mapping):
        raise ServeError(
            "invalid_request",
            f"tool_choice is {shown(choice)}: this server does not force calls; expected auto or none",
            "tool_choice",
        )
    raise ServeError("invalid_request", f"tool_choice is {shown(choice)}, expected auto or none", "tool_choice")
