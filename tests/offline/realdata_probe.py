"""Collected only when named: tests/unit/test_offline.py runs it to see what the fixture `realdata` does."""

from pathlib import Path


def test_probe(realdata: Path) -> None:
    assert realdata.is_dir()
