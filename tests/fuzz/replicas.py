"""Replicas on a Ray cluster of this machine, killed while they answer; the tests have small forms of both.

    PYTHONPATH=tests python -m fuzz.replicas streams --engine DIR    # 64 streams, 8 kills: none breaks
    PYTHONPATH=tests python -m fuzz.replicas job --engine DIR        # 1,000 lines, a kill every 20 s, the driver once

Both run in a network namespace of their own. Exit code 1 where an answer was another than without the kills, or none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from cases.ray_cluster import missing, run_inside

STREAMS = """
import sys
from cases.ray_jobs import killed_under_streams
print(killed_under_streams(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
"""
JOB = """
import sys
from pathlib import Path
from cases.ray_jobs import interrupted_job
print(interrupted_job(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
"""
_PATIENCE = 24  # times what a test has


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["streams", "job"])
    parser.add_argument("--engine", required=True, type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--every-s", type=float, default=20.0)
    asked = parser.parse_args()
    if why := missing():
        sys.exit(f"Error: {why}")
    engine = asked.engine.resolve()
    try:
        if asked.what == "streams":
            arguments = (engine, asked.streams, asked.max_tokens, asked.kills)
            print(run_inside(STREAMS, *arguments, patience=_PATIENCE).strip())
            return
        with tempfile.TemporaryDirectory() as folder:
            print(run_inside(JOB, engine, folder, asked.lines, asked.every_s, patience=_PATIENCE).strip())
    except AssertionError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
