"""Files of a checkpoint: JSON objects, digests, and links that may not leave it."""

from __future__ import annotations

import hashlib
import os

import pytest

from qwen_build.checkpoint import files
from qwen_build.checkpoint.files import check_inside, digest_files, read_json
from qwen_engine.errors import CheckpointError


def test_json_object_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "名": 1}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"model_type": "qwen2", "名": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a list, expected an object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_digests_are_sha256_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DIGEST_BYTES", 5)
    contents = {"abc": b"abc", "empty": b"", "long": bytes(range(23))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pieces = []
    digests = digest_files([tmp_path / name for name in contents], pieces.append)
    assert digests["abc"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert sum(pieces) == 26
    assert max(pieces) == 5


def test_digest_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        digest_files([tmp_path / "gone"])


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: it is no regular file; download it again"):
        read_json(tmp_path / "config.json")


def test_a_file_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_engine.json_files.MOST_BYTES", 10)
    (tmp_path / "config.json").write_text('{"a": 123456}')
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: it has 13 bytes, expected at most 10"):
        read_json(tmp_path / "config.json")


def test_a_link_may_not_leave_the_checkpoint(tmp_path):
    checkpoint, private = tmp_path / "ckpt", tmp_path / "home" / "id_rsa"
    for directory in (checkpoint, private.parent):
        directory.mkdir()
    private.write_text("{}")
    for name, target in (("relative", "../home/id_rsa"), ("absolute", str(private)), ("outward", "sideways")):
        (checkpoint / name).symlink_to(target)
    (checkpoint / "sideways").symlink_to(tmp_path / "home" / "id_rsa")
    for name in ("relative", "absolute", "outward"):
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .*id_rsa, outside the checkpoint"):
            check_inside(checkpoint / name)
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            read_json(checkpoint / name)
    (checkpoint / "file").write_text("{}")
    (checkpoint / "own").symlink_to("file")
    (tmp_path / "alias").symlink_to(checkpoint)
    for path in (checkpoint / "own", checkpoint / "file", tmp_path / "alias" / "own"):
        check_inside(path)


def test_a_snapshot_of_the_hub_links_to_its_blobs_and_nowhere_else(tmp_path):
    model, other = tmp_path / "models--Org--Name", tmp_path / "models--Org--Other"
    snapshot = model / "snapshots" / "abc"
    for directory in (snapshot, model / "blobs", other / "blobs"):
        directory.mkdir(parents=True)
    (model / "blobs" / "1").write_text("{}")
    (other / "blobs" / "2").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "foreign.json").symlink_to("../../../models--Org--Other/blobs/2")
    check_inside(snapshot / "config.json")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        check_inside(snapshot / "foreign.json")
