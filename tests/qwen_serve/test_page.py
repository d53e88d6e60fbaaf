"""The chat page as it is served: to whom, with which headers, and what its files hold."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from cases import ROOT
from cases.processes import run_python
from cases.scripted import scripted_model, write_text_files
from cases.serving import running
from qwen_serve.cli import main

FILES = ROOT / "qwen_serve" / "page" / "files"
NAMES = sorted(path.name for path in FILES.iterdir())
ADDRESSES = ["/", *(f"/page/{name}" for name in NAMES if name != "index.html")]
MOST_BYTES = 30 << 10  # of all files together, as they are sent
POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
    "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'", "trusted-types": "'none'",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model, _ = scripted_model(write_text_files(tmp_path_factory.mktemp("scripted")), str.upper)
    with running(model, api_keys=("right",)) as found:
        yield found


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_page_needs_no_key_and_may_load_nothing_from_elsewhere(server, address):
    response = server.client.get(address)
    assert response.status_code == 200
    name = "index.html" if address == "/" else address.rpartition("/")[2]
    assert response.content == (FILES / name).read_bytes()
    policy = dict(each.split(maxsplit=1) for each in response.headers["content-security-policy"].split("; "))
    assert policy == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    kind = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kind[name.rpartition(".")[2]])


def test_a_file_that_the_browser_has_is_not_sent_again(server):
    first = server.client.get("/page/chat.js")
    again = server.client.get("/page/chat.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = server.client.get("/page/chat.js", headers={"if-none-match": '"another"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize(
    "address", ["/page/", "/page/none.js", "/page/../../responses.py", "/page/%2e%2e/responses.py"]
)
def test_nothing_else_is_served_without_a_key(server, address):
    assert server.client.get(address).status_code == 401
    assert server.client.get(address, headers={"authorization": "Bearer right"}).status_code == 404


def test_another_name_of_this_machine_gets_no_page(server):
    assert server.client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_a_server_without_the_page(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model, page=False, api_keys=("right",)) as server:
        for address in ADDRESSES:
            assert server.client.get(address).status_code == 401
            assert server.client.get(address, headers={"authorization": "Bearer right"}).status_code == 404


def test_the_option_turns_the_page_off(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("qwen_serve.http.program.serve", lambda settings, say: seen.append(settings.page))
    for arguments in ([], ["--no-page"]):
        assert CliRunner().invoke(main, [str(tmp_path), *arguments]).exit_code == 0
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("template", "knows"),
    [("qwen3", {"tools": True, "thinking": True}), (None, None)],
)
def test_the_page_is_told_what_the_template_knows(tmp_path, template, knows):
    directory = write_text_files(tmp_path, template or "qwen2_5")
    with running(scripted_model(directory, str.upper, raw=template is None)[0]) as server:
        assert server.client.get("/v1/models").json()["data"][0]["meta"]["chat_template"] == knows


def test_what_is_sent_is_small(server):
    lengths = [int(server.client.get(address).headers["content-length"]) for address in ADDRESSES]
    assert 0 < sum(lengths) <= MOST_BYTES
    plain = server.client.get("/page/chat.js", headers={"accept-encoding": "identity"})
    assert plain.headers["content-length"] == str((FILES / "chat.js").stat().st_size)


def test_the_files_hold_everything():
    for name in NAMES:
        text = (FILES / name).read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r"""(src|href)="(?!page/)|url\(|@import|from "(?!\./)|import\(""", text), name
        assert max(map(len, text.splitlines())) <= 120 or name.endswith(".svg"), name
        assert len(text.splitlines()) < 400, name


def test_every_part_is_served_and_used():
    used = {"index.html", *re.findall(r'"page/([\w.]+)"', (FILES / "index.html").read_text("utf-8"))}
    for name in NAMES:
        used |= set(re.findall(r'from "\./([\w.]+)"', (FILES / name).read_text("utf-8")))
    assert used == set(NAMES)


def test_every_word_is_there_in_both_languages_and_is_said():
    table = (FILES / "words.js").read_text("utf-8").partition("const WORDS = {")[2].partition("\n};")[0]
    words = dict(re.findall(r"^  (\w+): (\[.*?\]),$", table, re.MULTILINE | re.DOTALL))
    assert len(words) > 80
    text = "\n".join((FILES / name).read_text("utf-8") for name in NAMES if name != "words.js")
    for name, value in words.items():
        english, chinese = json.loads(re.sub(r",\s*\]$", "]", value))
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", chinese)), name
        assert not re.search(r"[一-鿿]", english), name
        if not name.startswith("error_"):
            assert re.search(rf"\b{name}\b", text), f"{name} is never said"
    said = set(re.findall(r'\bsay\("(\w+)"', text)) | set(re.findall(r'data-(?:say|label|placeholder)="(\w+)"', text))
    assert said - words.keys() == set()


CONTENTS = """
from setuptools import Distribution
found = Distribution()
found.parse_config_files()
build = found.get_command_obj("build_py")
build.ensure_finalized()
print("\\n".join(f"{folder}/{name}" for _, folder, _, names in build.data_files for name in names))
"""


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed")
def test_a_wheel_carries_the_files():
    done = run_python(CONTENTS)
    assert done.returncode == 0, done.stderr
    carried = {Path(line).relative_to("qwen_serve/page/files").as_posix() for line in done.stdout.splitlines()
               if line.startswith("qwen_serve/page/files/")}  # fmt: skip
    assert carried == set(NAMES)
