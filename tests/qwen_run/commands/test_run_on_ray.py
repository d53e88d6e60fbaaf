"""``qwen-run --ray``: the file that one process writes, while replicas and the driver are killed."""

import pytest

from cases.ray_cluster import missing, run_inside

WHY = missing()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]


def test_a_job_goes_on_when_replicas_and_the_driver_are_killed(chat_engine, tmp_path):
    code = "import sys; from pathlib import Path; from cases.ray_jobs import interrupted_job; "
    code += "print(interrupted_job(sys.argv[1], Path(sys.argv[2]), 600, 3.0))"
    assert run_inside(code, chat_engine, tmp_path).startswith("600 unique answers")


def test_too_few_processors_are_refused_at_once(chat_engine, tmp_path):
    (tmp_path / "in.txt").write_text("a prompt\n")
    code = "import sys; from qwen_run.commands.run import main\n"
    code += "try: main(sys.argv[1:])\nexcept SystemExit as error: print('exit', error.code)"
    found = run_inside(
        "import sys; sys.stderr = sys.stdout; " + code,
        *("--engine", chat_engine, "--input-file", "in.txt", "--ray", "local", "--replicas", "1000"),
        cwd=tmp_path,
    )
    assert "Error: 1000 replicas of 1 CPUs need 1000 CPUs, the cluster has" in found
    assert found.endswith("exit 1\n")
