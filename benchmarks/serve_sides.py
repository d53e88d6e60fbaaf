"""The servers that ``serve`` compares: what they read, how they are started, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.command import say
from benchmarks.peer_environments import ROOT
from qwen_engine.errors import RequestError
from qwen_run.bench.http_client import Address

OURS, LLAMA = "qwen-serve", "llama-server"
START_S = 600  # most seconds until a server answers
END_S = 60
SPECIAL = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}  # key of config.json -> its token
LETTERS = 5  # of a word of the vocabulary: 26**5 are enough


@dataclass(frozen=True)
class Shape:
    """How much a server may hold, the same for all.

    Attributes:
        streams: answers at once.
        length: most tokens of a prompt and its answer.
    """

    threads: int
    streams: int
    length: int


@dataclass
class Server:
    """A server that runs.

    Attributes:
        name: :data:`OURS` or :data:`LLAMA`.
        process: that answers at ``port`` of 127.0.0.1.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int

    @property
    def address(self) -> Address:
        return Address.of(f"http://127.0.0.1:{self.port}")

    def main_thread_cpu_s(self) -> float:
        """Seconds of processor time that its first thread has had; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/schedstat").read_text("ascii").split()
        except OSError:
            return 0.0
        return int(fields[0]) / 1e9


def our_command(engine: Path, shape: Shape, cache_bytes: int | None = None, more: Sequence[str] = ()) -> list[str]:
    """Of qwen-serve, without guessing ahead: a token is a step of the model on both sides."""
    options = ["--threads", shape.threads, "--max-batch-size", shape.streams, "--max-seq-len", shape.length]
    options += ["--draft-tokens", 0, "--no-access-log"]
    options += [] if cache_bytes is None else ["--kv-cache-memory", -(-cache_bytes >> 20)]
    return [sys.executable, "-P", "-m", "qwen_serve.cli", str(engine), *map(str, options), *more]


def llama_command(program: Path, model: Path, shape: Shape, more: Sequence[str]) -> list[str]:
    """Of llama-server: every slot has the whole length, and prompts are not kept in a second cache."""
    options = ["-t", shape.threads, "-np", shape.streams, "-c", shape.streams * shape.length]
    return [str(program), "-m", str(model), *map(str, options), "--cache-ram", "0", "--no-ui", *more]


@contextmanager
def started(name: str, command: Sequence[str], log: Path) -> Iterator[Server]:
    """A server that answers; it is ended at the end.

    Args:
        command: without ``--port``.
        log: takes what it prints.

    Raises:
        RequestError: it has ended, or does not answer in time; with its last words.
    """
    port = free_port()
    say(f"{name}: {' '.join(command)} --port {port}")
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment())
    try:
        wait_until_ready(Server(name, process, port), log)
        yield Server(name, process, port)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """In which this checkout's packages come first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(server: Server, log: Path) -> None:
    """
    Raises:
        RequestError: the server has ended, or is not ready in time.
    """
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if server.process.poll() is not None:
            words = log.read_text("utf-8", "replace").strip()[-500:]
            raise RequestError(f"{server.name} ended with {server.process.returncode}: {words}")
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=10) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise RequestError(f"{server.name} does not answer after {START_S} s; {log} has what it says")


def first_answer_s(command: Sequence[str], body: dict[str, Any], log: Path) -> float:
    """Seconds from the start of a server to its whole answer to one chat request, which is tried until it is taken.

    Raises:
        RequestError: the server has ended, or there is no answer in time.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with log.open("wb") as file:
        begun = time.perf_counter()
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment())
    try:
        while time.perf_counter() - begun < START_S and process.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=START_S) as answer:
                    answer.read()
                    return time.perf_counter() - begun
            except urllib.error.HTTPError as error:
                if error.code != 503:  # the engine is being loaded
                    raise RequestError(f"the server answers with status {error.code}: {error.read(300)!r}") from error
            except OSError:  # nobody listens yet
                pass
            time.sleep(0.01)
        raise RequestError(f"there is no answer; {log} has what the server says")
    finally:
        process.kill()
        process.wait()


def with_words(checkpoint: Path, directory: Path) -> Path:
    """``checkpoint`` with a tokenizer in which every token is a text, in the new or complete directory ``directory``.

    A prompt becomes its bytes, one token each. Answers are bytes and words of five letters: servers have something to
    send for each token of an answer, as with a real model.
    """
    if directory.exists():
        return directory
    unfinished = directory.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != "tokenizer.json":
            _link(path.resolve(), unfinished / path.name)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    special = {config[key]: token for key, token in SPECIAL.items() if isinstance(config.get(key), int)}
    word_tokenizer(config["vocab_size"], special).save(str(unfinished / "tokenizer.json"))
    unfinished.rename(directory)
    return directory


def _link(path: Path, target: Path) -> None:
    """The same file under another name, or a copy on another file system: a checkpoint may not link out of itself."""
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, target)


def word_tokenizer(vocab_size: int, special: Mapping[int, str]) -> Tokenizer:
    """Bytes, then words with a space before them; ``special`` tokens instead of some.

    >>> tokenizer = word_tokenizer(300, {299: "<|im_end|>"})
    >>> tokenizer.encode("ab ").ids, tokenizer.decode([256, 257]), tokenizer.get_vocab_size()
    ([64, 65, 220], ' aaaaa aaaab', 300)
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġ" + "".join(letters) for letters in product(ascii_lowercase, repeat=LETTERS))
    texts = [*alphabet, *islice(words, vocab_size - len(alphabet))]
    for index, token in special.items():
        texts[index] = token
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer
