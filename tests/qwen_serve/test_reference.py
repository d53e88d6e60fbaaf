"""The page at ``/docs``: it names every field of every request, and loads nothing from elsewhere."""

import re
from html import unescape

from cases.scripted import scripted_model, write_text_files
from cases.serving import running
from qwen_serve.http.reference import reference_page, type_words

ELSEWHERE = re.compile(r"https?:|src=|<script|<link|@import|url\(")


def test_every_field_of_every_request(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), str.upper)
    with running(model) as server:
        page = server.client.get("/docs")
        described = server.client.get("/openapi.json").json()
        assert server.client.get("/redoc").status_code == 404
    assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert not ELSEWHERE.search(page.text)
    text = unescape(re.sub("<[^>]+>", "|", page.text))
    fields = 0
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert f"|{method.upper()} {path}|" in text
            body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
            for name, field in body["content"]["application/json"]["schema"].get("properties", {}).items():
                assert f"|{name}|{type_words(field)}|" in text
                fields += 1
    assert fields > 150


def test_what_is_described_stays_text():
    described = {"info": {"title": "<b>"}, "paths": {"/<i>": {"get": {"description": "<script>1</script>"}}}}
    text = reference_page(described).body.decode()
    assert not re.search("<b>|<i>|<script", text)
    assert "&lt;script&gt;1" in text


def test_the_words_of_a_type():
    assert type_words({}) == "any value"
    assert type_words({"enum": ["a", 1]}) == "'a' or 1"
    assert type_words({"type": "array", "maxItems": 3}) == "array, at most 3"
