"""The files that run the server as a service: what they start is what the command takes, and a sick one is noticed."""

import configparser
import json
import re
import shlex
import socket
import subprocess
import sys

from cases import ROOT
from cases.scripted import scripted_model, write_text_files
from cases.serving import running
from qwen_serve.cli import main

EXAMPLES = ROOT / "examples" / "qwen"
CONTAINERFILE = (EXAMPLES / "Containerfile").read_text("utf-8")


def listed(instruction):
    """The words of an instruction of the Containerfile that is written as a list."""
    return json.loads(re.search(rf"^ *{instruction} (\[.*\])$", CONTAINERFILE, re.MULTILINE)[1])


def taken(words):
    """What ``qwen-serve`` makes of a command line."""
    program, *arguments = words
    assert program.rpartition("/")[2] == "qwen-serve"
    return main.make_context("qwen-serve", arguments).params


def test_what_the_container_starts():
    found = taken(listed("ENTRYPOINT"))
    assert (found["model"], found["host"], found["port"]) == ("/engine", "0.0.0.0", 8000)
    assert re.search(r"^EXPOSE 8000$", CONTAINERFILE, re.MULTILINE)
    users = re.findall(r"^USER (\S+)$", CONTAINERFILE, re.MULTILINE)
    assert users == re.findall(r"--uid (\S+)", CONTAINERFILE)
    assert users[-1] not in ("root", "0")


def test_a_server_that_does_not_answer_is_sick(tmp_path):
    python, *arguments = listed("CMD")
    assert python == "python"
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model) as server:
        assert probe(arguments, server.port) == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert probe(arguments, port) == 1


def probe(arguments, port):
    arguments = [each.replace(":8000/", f":{port}/") for each in arguments]
    return subprocess.run([sys.executable, *arguments], stderr=subprocess.DEVNULL, timeout=60).returncode


def test_what_systemd_starts():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(EXAMPLES / "qwen-serve.service")
    service = unit["Service"]
    found = taken(shlex.split(service["ExecStart"]))
    assert int(service["TimeoutStopSec"]) > found["drain_timeout"]
