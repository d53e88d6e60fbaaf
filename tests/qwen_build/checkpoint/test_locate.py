"""Which directory a CHECKPOINT argument means, and what is said when it means none."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from cases.processes import run_python
from qwen_build.checkpoint import locate
from qwen_build.checkpoint.locate import Located, resolve_checkpoint
from qwen_engine.errors import CheckpointError
from qwen_engine.user_cache import user_cache

COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Downloads that succeed at once; each call's arguments."""
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def fail_with(monkeypatch, error):
    def snapshot_download(repo, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def error_of(argument):
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(argument)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_means_the_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "demo_checkpoint", lambda cache: cache / "Demo")
    expected = tmp_path.resolve() / "cache/Demo"
    assert resolve_checkpoint(None) == Located(expected, "Demo", None, str(expected))


@pytest.mark.parametrize("chosen", [None, "", "relative/path"])
def test_cache_is_in_the_home_directory_unless_told(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if chosen is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    assert user_cache() == tmp_path / ".cache"


@pytest.mark.parametrize("argument", ["Qwen/Tiny", "./Qwen/Tiny/", "~/Qwen/Tiny", "Qwen/Tiny/../Tiny", "{}/Qwen/Tiny"])
def test_directory_means_itself(tmp_path, monkeypatch, downloads, argument):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "Qwen/Tiny"
    path.mkdir(parents=True)
    path = path.resolve()
    assert resolve_checkpoint(argument.format(tmp_path)) == Located(path, "Tiny", None, str(path))
    assert downloads == []


def test_current_directory_has_a_name(tmp_path):
    assert resolve_checkpoint(".").name == tmp_path.resolve().name


@pytest.mark.parametrize(
    "argument",
    (
        "|Tiny|/no/where|./Qwen/Tiny|../Tiny|~/nowhere|~nobody/x|..\\Qwen|a/b/c|Qwen/|/Qwen|Qwen/..|Qwen/T iny|名/字"
        "|Qwen/Tiny@|a/b@c d|https://huggingface.co/Qwen/Tiny|" + "x" * 300
    ).split("|"),
)
def test_what_is_no_directory_and_no_hub_id_is_refused(downloads, argument):
    message = error_of(argument)
    assert message.startswith(
        f"no such directory: {argument!r}; give a Hugging Face directory, a .gguf file, or a Hub id"
    )
    assert downloads == []


def test_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert error_of("model.safetensors") == "model.safetensors is a file; give the directory it is in"
    assert error_of("Qwen/model.gguf").startswith(
        "no such file: 'Qwen/model.gguf'; give a Hugging Face directory, a .gguf"
    )


@pytest.mark.parametrize(
    ("argument", "repo", "revision"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", None),
        ("Qwen/Qwen2.5-0.5B-Instruct@main", "Qwen/Qwen2.5-0.5B-Instruct", "main"),
        ("some_one/x.y@refs/pr/3", "some_one/x.y", "refs/pr/3"),
    ],
)
def test_hub_id_is_downloaded(tmp_path, downloads, argument, repo, revision):
    name = repo.split("/")[1]
    assert resolve_checkpoint(argument) == Located(tmp_path / "snapshots" / COMMIT, name, COMMIT, repo)
    ((asked, options),) = downloads
    assert (asked, options["revision"]) == (repo, revision)


def test_only_what_the_builder_reads_is_downloaded(downloads):
    resolve_checkpoint("Qwen/Tiny")
    options = downloads[0][1]
    needed = [
        "1_Pooling/config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    others = ["README.md", "pytorch_model.bin", "q4.gguf", "onnx/model.onnx", "original/config.json"]
    others += [
        "original/model.safetensors",
        "model/model.safetensors",
        "consolidated.safetensors",
        "2_Dense/config.json",
    ]
    kept = filter_repo_objects(
        needed + others, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == needed


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError("404\nmore", response=RESPONSE),
            "no such model on the Hugging Face Hub; check",
        ),
        (errors.GatedRepoError("403\nmore", response=RESPONSE), "Qwen/Tiny is gated: .* run `hf auth login`"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "Qwen/Tiny has no revision 'old' on"),
        (errors.LocalEntryNotFoundError("offline\nmore"), "cannot be reached .*check the network and HF_HUB_OFFLINE"),
        (errors.HFValidationError("bad id"), "'Qwen/Tiny' is neither a directory nor a Hub id"),
        (errors.HfHubHTTPError("500 Server Error\nmore", response=RESPONSE), "downloaded .*: 500 Server Error; try"),
        (OSError(28, "No space left on device"), "downloaded .*: .*No space left on device; try again"),
        (ConnectionError(), "downloaded .*: ConnectionError; try again"),
    ],
)
def test_failed_download_is_one_line(monkeypatch, error, message):
    fail_with(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_checkpoint("Qwen/Tiny@old")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_interrupted_download_is_not_an_error_of_the_hub(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint("Qwen/Tiny")


def test_the_real_hub_client_offline(tmp_path):
    script = "from qwen_build.checkpoint.locate import resolve_checkpoint; resolve_checkpoint('Qwen/Tiny')"
    result = run_python(script, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "qwen_engine.errors.CheckpointError: no directory 'Qwen/Tiny' here, and the Hugging Face Hub"
    )


def test_hub_client_is_imported_only_when_needed(tmp_path):
    script = f"""
import sys
from qwen_build.checkpoint.locate import resolve_checkpoint
resolve_checkpoint({str(tmp_path)!r})
print([name for name in ("huggingface_hub", "gguf", "torch") if name in sys.modules])
"""
    assert run_python(script).stdout == "[]\n"
