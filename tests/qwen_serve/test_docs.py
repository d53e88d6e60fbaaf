"""The Python of docs/server.md runs as it stands, against a server that answers from a script."""

import re

from cases import ROOT
from cases.scripted import last_question, scripted_model, write_text_files
from cases.serving import running

BLOCKS = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "server.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
# That of embeddings asks another kind of engine; test_pooled.py asks one so.
EXAMPLES = [block for block in BLOCKS if "embeddings" not in block]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def reply(prompt):
    if "<tool_response>" in prompt:
        return "It is 7 degrees."
    if "JSON" in last_question(prompt):
        return '{"city": "Bern"}'
    return CALL if "weather" in last_question(prompt) else "Paris"


def test_the_examples_run(tmp_path, capsys):
    model, _ = scripted_model(write_text_files(tmp_path, "qwen3"), reply)
    with running(model) as server:
        text = "\n".join(EXAMPLES).replace("http://127.0.0.1:8000", server.url)
        assert text.count(server.url) == 2
        scope = {}
        exec(compile(text, "docs/server.md", "exec"), scope)
        scope["client"].close()
    assert capsys.readouterr().out.split("\n")[:3] == ["ParisIt is 7 degrees.", '{"city": "Bern"}', "Paris"]
