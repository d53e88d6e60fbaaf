"""A headless browser on the chat page, and the model behind the page: it answers by the first word of a question."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases.scripted import Script, last_question, scripted_model, write_text_files
from cases.serving import Running, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "no browser is found; apt-get install chromium"
    if CHROMIUM is None
    else "playwright is not installed; pip install playwright"
    if find_spec("playwright") is None
    else None
)
PATIENCE_MS = 60_000
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
LONG = " ".join(f"word{index}" for index in range(100))
ANSWERS = {
    "think": "<think>\nTwo and two.\n</think>\n\nIt is **four**.",
    "tool": CALL,
    "long": LONG,
}


def reply(prompt: str) -> str:
    """What the model says; it goes on where an answer that it is shown ends."""
    question = last_question(prompt)
    kind, _, rest = question.partition(" ")
    whole = rest if kind == "say" else ANSWERS.get(kind, question.upper())
    said = prompt.rpartition("<|im_start|>assistant\n")[2].rpartition("</think>\n\n")[2]
    return whole.removeprefix(said)


@dataclass
class Served:
    """The server of a page.

    Attributes:
        server: the server.
        script: its model; ``seen`` lists the requests.
        pause_s: how long each run of the model takes at least.
    """

    server: Running
    script: Script
    pause_s: float = 0.0


@contextmanager
def served(directory: Path, raw: bool = False, **settings: Any) -> Iterator[Served]:
    files = write_text_files(directory, "qwen3", do_sample=True, temperature=0.7)
    model, script = scripted_model(files, reply, max_seq_len=1000, raw=raw)
    stack = ExitStack()
    found, run = Served(stack.enter_context(running(model, **settings)), script), script.run

    def slowly(batch: Any) -> Any:
        time.sleep(found.pause_s)
        return run(batch)

    script.run = slowly  # type: ignore[method-assign]
    try:
        yield found
        found.server.wait_until_idle()
    finally:
        with ThreadPoolExecutor(1) as beside:  # in this thread runs the loop of playwright
            beside.submit(stack.close).result(PATIENCE_MS / 1000)


@dataclass
class Tab:
    """One tab of a browser on the chat page.

    Attributes:
        page: playwright's.
        requests: the addresses it has asked for.
        bodies: what it has sent.
        complaints: errors of scripts, and what the content policy has forbidden.
        typed: what is written where a dialog asks for a text.
    """

    page: Any
    served: Served
    requests: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    typed: str = ""

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("dialog", lambda dialog: dialog.accept(self.typed))

    def _note_request(self, request: Any) -> None:
        self.requests.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def _note(self, message: Any) -> None:
        if message.type == "error" and "the server responded with a status" not in message.text:
            self.complaints.append(message.text)

    def open(self, waits: bool = True) -> None:
        """Load the page; ``waits`` until it has the model's name."""
        self.page.goto(self.served.server.url)
        if not waits:
            return
        self.until("document.querySelector('#model').textContent !== ''")

    def until(self, expression: str) -> None:
        """Wait until an expression is true; playwright's own way needs eval, which the page's policy forbids."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(10)

    def ask(self, text: str) -> None:
        """Write a question and send it; the answer has not come yet."""
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")

    def settle(self) -> None:
        """Until no answer is being given."""
        self.page.wait_for_selector(".message.running", state="detached")

    def chat(self, text: str) -> str:
        """The answer to a question, as it is shown."""
        self.ask(text)
        self.page.wait_for_selector(".message.assistant:last-child")
        self.settle()
        return self.last()

    def last(self) -> str:
        shown: str = self.page.locator(".message.assistant .body").last.inner_text()
        return shown

    def texts(self, role: str) -> list[str]:
        found: list[str] = self.page.locator(f".message.{role} .body").all_inner_texts()
        return found

    def press(self, name: str, role: str = "assistant") -> None:
        """A button of the last message of ``role``."""
        self.page.locator(f".message.{role}").last.get_by_role("button", name=name, exact=True).click()
