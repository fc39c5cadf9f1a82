"""The golden tests notice every change that `mutate.py` makes to a copy of the set."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import mutate, test_whole_set


@pytest.mark.long
@pytest.mark.parametrize("tests", sorted({group.test for group in mutate.GROUPS}))
def test_every_mutation_is_noticed(tests: str, child_env: dict[str, str], repository: Path) -> None:
    command = [sys.executable, "-m", "tests.golden.mutate", tests]
    done = subprocess.run(command, cwd=repository, env=child_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_group_is_spared() -> None:
    noticed = {group.file for group in mutate.GROUPS}
    facts_alone = {f"{group}.json" for group in test_whole_set.FACT_GROUPS}
    both = {f"{group}.{kind}" for group in test_whole_set.TENSOR_GROUPS for kind in ("json", "safetensors")}
    assert facts_alone | both <= noticed
