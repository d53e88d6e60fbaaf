"""``extents.json``: what lies where in the weights file, so that a part of it can be checked, or be there, alone.

Extents follow each other without a gap and cover the whole file: one for each decoder layer, and those of what is
before and behind them. The crc32 of the file follows from theirs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from qwen_engine import strict_json
from qwen_engine.errors import EngineError
from qwen_engine.json_files import read_object

EXTENTS_FILE = "extents.json"


@dataclass(frozen=True)
class Extent:
    """Bytes of the weights file up to ``end``, from where the one before ends.

    Attributes:
        holds: what lies there: a module such as ``model.layers.3``, or ``constants``.
        crc32: eight lower-case hexadecimal digits.
    """

    holds: str
    end: int
    crc32: str


@dataclass(frozen=True)
class Extents:
    """All of a weights file, in its order."""

    extents: tuple[Extent, ...]

    @property
    def stretches(self) -> list[tuple[int, int, Extent]]:
        """First byte and end of each, and itself."""
        edges = pairwise([0, *(extent.end for extent in self.extents)])
        return [(*edge, extent) for edge, extent in zip(edges, self.extents, strict=True)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, engine: Path, size_bytes: int) -> Extents:
        """Read the file of the directory ``engine``, whose weights file has ``size_bytes``.

        Raises:
            EngineError: the engine has none, or it is not of that file.
        """
        path = engine / EXTENTS_FILE
        advice = "build the engine again with the qwen-build of this installation"
        try:
            found = strict_json.parse(cls, read_object(path, EngineError, advice), str(path))
        except FileNotFoundError:
            raise EngineError(
                f"{engine} has no {EXTENTS_FILE}, which stages need to load a part of it; {advice}"
            ) from None
        except strict_json.MismatchError as error:
            raise EngineError(f"{error}; {advice}") from error
        assert isinstance(found, cls)
        ends = [0, *(extent.end for extent in found.extents)]
        if ends[-1] != size_bytes or any(end <= start for start, end in pairwise(ends)):
            raise EngineError(f"{path} does not divide the {size_bytes} bytes of the weights; {advice}")
        return found
