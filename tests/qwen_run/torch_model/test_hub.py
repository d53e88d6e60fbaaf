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
try:
    model = QwenForCausalLM.from_pretrained(sys.argv[1], export=True, **json.loads(sys.argv[2]))
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


def opened(hub, tmp_path, *, environment=None, **options):
    """What a fresh process says of the model: (layers, most tokens), or (error, message)."""
    options = {"engine_quantization": "none"} | options
    env = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)} | (environment or {"HF_HOME": str(hub)})
    done = run_python(SCRIPT, options.pop("repo", REPO), json.dumps(options), env=env)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({}, 300),
        ({"local_files_only": True}, 300),
        ({"revision": OLDER}, 200),
        ({"revision": "main", "token": False}, 300),
        ({"subfolder": "inner"}, 640),
    ],
    ids=str,
)
def test_a_model_of_the_hub(hub, tmp_path, options, longest):
    assert opened(hub, tmp_path, **options) == (3, longest)


def test_a_cache_somewhere_else(hub, tmp_path):
    found = opened(hub, tmp_path, environment={"HF_HOME": str(tmp_path / "empty")}, cache_dir=str(hub / "hub"))
    assert found == (3, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "some/other"}, "cannot be reached nor is the whole model in its cache"),
        ({"repo": "some/other", "local_files_only": True}, "some/other cannot be had from the Hugging Face Hub: "),
        ({"revision": "c" * 40}, "some/tiny-qwen cannot be had from the Hugging Face Hub: "),
        ({"subfolder": "outer"}, "some/tiny-qwen has no folder outer on the Hugging Face Hub"),
    ],
    ids=str,
)
def test_what_is_not_there_is_one_line(hub, tmp_path, options, message):
    error, said = opened(hub, tmp_path, **options)
    assert error == "CheckpointError"
    assert message in said
    assert "\n" not in said
