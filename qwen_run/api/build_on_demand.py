"""Engines built where one is asked for.

What is built from a checkpoint is kept in the user's cache directory, under a key of everything it depends on: the
content of the checkpoint's files, the options, the builder's version. A process that asks while another builds waits.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_engine import __version__
from qwen_engine.errors import BuildError, EngineError
from qwen_engine.manifest import ENGINES, FORMAT_VERSION, MANIFEST_FILE, Manifest
from qwen_engine.user_cache import FOLDER, lock_file, user_cache
from qwen_engine.whole_files import locked_file, whole_file
from qwen_plugin import OPERATORS

if TYPE_CHECKING:
    from qwen_build.checkpoint.locate import Located
    from qwen_build.plan.options import BuildOptions

KEY_LENGTH = 16  # hexadecimal digits of a key in a directory's name
READ_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".gguf", ".tiktoken")  # of the files a build reads


def is_engine(path: str | Path) -> bool:
    """Whether ``path`` is an engine directory, as opposed to a checkpoint."""
    return (Path(path) / MANIFEST_FILE).is_file()


def engine_of(source: str | Path, options: Mapping[str, Any], cache: Path | None = None) -> Path:
    """The engine directory ``source`` stands for: itself, or what is built from it once and then found again.

    Args:
        source: an engine directory, a checkpoint directory or a Hub id.
        options: fields of ``qwen_build.plan.options.BuildOptions``; none for an engine.
        cache: where engines are kept; ``qwen-engine/engines`` in the user's cache directory if None.

    Raises:
        EngineError: build options were given for an engine, or there is no such engine.
        BuildError: an option is unknown, or the engine cannot be built.
    """
    if is_engine(source):
        if options:
            raise EngineError(
                f"{source} is an engine, {', '.join(options)} cannot change it any more; give the checkpoint instead"
            )
        return Path(source)
    if Path(source).parent == ENGINES and not Path(source).exists():  # not an owner's model on the Hub
        raise EngineError(f"there is no engine {source}; make it with qwen-build, whose --output names it")
    from qwen_build.checkpoint.locate import resolve_checkpoint

    chosen = build_options(options)
    located = resolve_checkpoint(str(source))
    kept = cache or user_cache() / FOLDER / "engines"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        engine = kept / f"{located.name}-{_quant(located, chosen)}-{_key(_digests(located.path, kept), chosen)}"
        with locked_file(lock_file(engine)):
            if not _is_whole(engine):
                _build(located, engine, chosen, replace=is_engine(engine))
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(f"{kept} cannot be written: {reason}; set XDG_CACHE_HOME to another place") from error
    return engine


def build_engine(checkpoint: Path, engine: Path, options: Mapping[str, Any]) -> None:
    """Build ``checkpoint`` into the directory ``engine``, which must not exist and appears whole or not at all.

    Args:
        options: fields of ``qwen_build.plan.options.BuildOptions``.

    Raises:
        BuildError: an option is unknown, or the engine cannot be built.
    """
    from qwen_build.checkpoint.locate import resolve_checkpoint

    _build(resolve_checkpoint(str(checkpoint)), engine, build_options(options), replace=False)


def _build(located: Located, engine: Path, options: BuildOptions, replace: bool) -> None:
    from qwen_build.checkpoint.weights import Checkpoint
    from qwen_build.engine_build import plan_build, write_engine

    with Checkpoint.open(located.path, options.lora) as weights:
        plan = plan_build(weights, located, options)
        for note in plan.notes:
            warnings.warn(note, stacklevel=4)
        write_engine(plan, weights, engine, replace)


def build_options(options: Mapping[str, Any]) -> BuildOptions:
    """``exclude`` may be one pattern, ``quant_config`` and ``calibration`` paths, as on the command line.

    ``rope_scaling`` may be an object or its JSON text.
    """
    from qwen_build.checkpoint.adapters import LoraChoice
    from qwen_build.plan.options import BuildOptions
    from qwen_build.plan.rules import read_rules

    if unknown := sorted(options.keys() - BuildOptions.__dataclass_fields__.keys()):
        raise BuildError(f"unknown option {unknown[0]}, expected {', '.join(BuildOptions.__dataclass_fields__)}")
    given = dict(options)
    for name in ("exclude", "ignore_tensors"):
        if isinstance(patterns := given.get(name), str | list):
            given[name] = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if (adapters := given.get("lora")) is not None:
        several = [adapters] if isinstance(adapters, str | Path) else adapters
        if not isinstance(several, list | tuple) or not all(isinstance(one, str | Path) for one in several):
            raise BuildError(f"lora is {adapters!r}, expected the folder of an adapter or several")
        given["lora"] = tuple(LoraChoice.parse(str(one)) for one in several)
    if isinstance(given.get("quant_config"), (str, Path)):
        given["quant_config"] = read_rules(Path(given["quant_config"]))
    if isinstance(given.get("rope_scaling"), Mapping):
        given["rope_scaling"] = json.dumps(given["rope_scaling"])
    if isinstance(given.get("calibration"), str):
        given["calibration"] = Path(given["calibration"])
    return BuildOptions(**given)


def build_option_names() -> tuple[str, ...]:
    """What a checkpoint can be built with."""
    from qwen_build.plan.options import BuildOptions

    return tuple(BuildOptions.__dataclass_fields__)


def _quant(located: Located, options: BuildOptions) -> str | None:
    """What an engine's directory is called by: the scheme of most linears, or the format they have already."""
    from qwen_build.checkpoint.formats.table import quantization_config

    stored = quantization_config(located.path)
    return str(stored["quant_method"]) if stored and options.quant is None else options.resolved().quant


def _key(digests: Mapping[str, str], options: BuildOptions) -> str:
    """What an engine depends on, in short."""
    from qwen_build.checkpoint.adapters import adapter_files
    from qwen_build.checkpoint.files import digest_files

    fields = vars(options.resolved())
    if options.calibration is not None:
        fields |= {"calibration": digest_files([options.calibration])}
    if options.lora:
        paths = [path for choice in options.lora for path in adapter_files(choice.directory)]
        fields |= {"lora": [[choice.weight for choice in options.lora], *(digest_files([path]) for path in paths)]}
    operators = sorted((domain, name, version) for (domain, name), version in OPERATORS.items())
    return _hash([digests, fields, __version__, FORMAT_VERSION, operators])


def _digests(checkpoint: Path, kept: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint, by name; read again only when one of them has changed.

    What was computed lies in ``kept`` under a hash of the files' names, sizes, inodes and times, where a change of
    content always shows in the last: no program can set ``st_ctime``.
    """
    from qwen_build.checkpoint.endings import SOURCES
    from qwen_build.checkpoint.files import digest_files

    shards = {path for path in checkpoint.rglob("*.safetensors") if path.is_file()}
    named = [*checkpoint.iterdir(), *(checkpoint / name for name in SOURCES)]
    others = {path for path in named if path.suffix in READ_SUFFIXES and path.is_file()}
    files = sorted(shards | others)
    known = kept / f".digests-{_hash([_state(path) for path in files])}.json"
    with suppress(OSError, ValueError):
        digests = json.loads(known.read_text(encoding="utf-8"))
        if isinstance(digests, dict) and len(digests) == len(files):
            return digests
    digests = digest_files(files, directory=checkpoint)
    with whole_file(known) as file:
        file.write(json.dumps(digests).encode())
    return digests


def _state(file: Path) -> tuple[str | int, ...]:
    stat = file.stat()
    return str(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def _is_whole(engine: Path) -> bool:
    """Whether every part of ``engine`` is there in its size; loading it checks what they hold."""
    try:
        parts = Manifest.read(engine).parts
        return all((engine / name).stat().st_size == part.size_bytes for name, part in parts.items())
    except (EngineError, OSError):
        return False
