"""``from_pretrained`` with a Hub id: offline, from a cache that is laid out as huggingface_hub does it."""

import json
import shutil

import pytest

from cases.processes import run_python

REPO, COMMIT, OLDER = "some/tiny-qwen", "a" * 40, "b" * 40
SCRIPT = """
import json, sys
from qwen_run import QwenForCausalLM
from qwen_run.torch_model.loading import EngineArguments
for options in json.loads(sys.argv[1]):
    try:
        model = QwenForCausalLM.from_pretrained(options.pop("repo"), export=True, **options)
        print(json.dumps([model.config.num_hidden_layers, model.engine.manifest.limits.max_seq_len]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def hub(tiny_checkpoint, tmp_path_factory):
    """A cache of the Hub: a model in its main branch and, other, at an older commit; one more in a folder of it."""
    home = tmp_path_factory.mktemp("hf")
    repo = home / "hub" / f"models--{REPO.replace('/', '--')}"
    for commit, family in ((COMMIT, "qwen3-tied"), (OLDER, "qwen2")):
        shutil.copytree(tiny_checkpoint(family).path, repo / "snapshots" / commit)
    shutil.copytree(tiny_checkpoint("qwen2-tied").path, repo / "snapshots" / COMMIT / "inner")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for commit, layers in ((OLDER, 2), (COMMIT, 3)):
        config = repo / "snapshots" / commit / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100 * layers}))
    return home


def opened(cases, tmp_path, home):
    """What a fresh process says of each model: (layers, most tokens), or (error, message)."""
    cases = [{"repo": REPO, "engine_quantization": "none"} | options for options in cases]
    env = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(home)}
    done = run_python(SCRIPT, json.dumps(cases), env=env)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()[-len(cases) :]]


def test_models_of_the_hub(hub, tmp_path):
    longest = [
        ({}, 300),
        ({"local_files_only": True}, 300),
        ({"revision": OLDER}, 200),
        ({"revision": "main", "token": False}, 300),
        ({"subfolder": "inner"}, 640),
    ]
    cases = [options for options, _ in longest]
    assert list(zip(cases, opened(cases, tmp_path, hub), strict=True)) == [(each, (3, most)) for each, most in longest]


def test_a_cache_somewhere_else(hub, tmp_path):
    assert opened([{"cache_dir": str(hub / "hub")}], tmp_path, tmp_path / "empty") == [(3, 300)]


def test_what_is_not_there_is_one_line(hub, tmp_path):
    messages = [
        ({"repo": "some/other"}, "cannot be reached nor is the whole model in its cache"),
        ({"repo": "some/other", "local_files_only": True}, "some/other cannot be had from the Hugging Face Hub: "),
        ({"revision": "c" * 40}, "some/tiny-qwen cannot be had from the Hugging Face Hub: "),
        ({"subfolder": "outer"}, "some/tiny-qwen has no folder outer on the Hugging Face Hub"),
    ]
    found = opened([options for options, _ in messages], tmp_path, hub)
    for (error, said), (_, message) in zip(found, messages, strict=True):
        assert error == "CheckpointError"
        assert message in said
        assert "\n" not in said
