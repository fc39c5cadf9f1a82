"""Indexes of annotations: made once, taken while they fit, never half, shared by processes."""

import fcntl
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit import data_sets
from utils.data import index
from utils.data.errors import DataError
from utils.data.index import ParseNotes, RecordIndex, open_index
from utils.data.readers import json_stream
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.json_stream import iterate_json_list
from utils.data.readers.registry import build_reader
from utils.data.samples import Sample

INDEXED = {
    "MultiReasonSeg": data_sets.write_muse,
    "refcoco": data_sets.write_refer_seg,
    "llava_instruct_150k": data_sets.write_vqa,
    "llava_v1_5_mix665k": data_sets.write_mixed,
    "pascal_part": data_sets.write_parts,
    "paco_lvis": lambda root: data_sets.write_parts(root, "paco_lvis"),
    "partimagenet": lambda root: data_sets.write_parts(root, "partimagenet"),
}


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of small files lie on the disk too, where no variable or home of the machine is found."""
    monkeypatch.setattr(index, "_SMALL", 0)
    monkeypatch.delenv(index.INDEX_FOLDER, raising=False)


def counting(parsed: list[int]) -> Callable[[ParseNotes], Iterator[Any]]:
    """Three records; `parsed` grows with every parsing."""

    def parse(gathered: ParseNotes) -> Iterator[Any]:
        parsed.append(1)
        gathered.skipped["of no use"] += 2
        gathered.facts["names"] = ["a", "b"]
        yield from [("first", 1.5, b"\x00\xff"), ["second"], {"third": None}]

    return parse


def made(root: Path, parsed: list[int], layout: str = "1", **more: Any) -> RecordIndex:
    return open_index("a|set-train", layout, str(root), "", [str(root / "a.json")], counting(parsed), **more)


@pytest.fixture
def root(tmp_path: Path, on_disk: None) -> Path:
    (tmp_path / "a.json").write_text("[1]", encoding="utf-8")
    return tmp_path


def test_records_come_back_as_they_were(root: Path) -> None:
    parsed: list[int] = []
    for _ in range(2):
        found = made(root, parsed)
        assert list(found) == [("first", 1.5, b"\x00\xff"), ["second"], {"third": None}]
        assert found.gathered.skipped == {"of no use": 2} and found.gathered.facts == {"names": ["a", "b"]}
        assert found.path.startswith(str(root / ".index")) and found.is_sound()
        with pytest.raises(IndexError, match="record 3 of 3"):
            found[3]
    assert len(parsed) == 1, "the second time nothing is parsed"
    assert not list(root.glob(".index/*.draft"))


def test_it_is_made_again_when_it_does_not_fit(root: Path) -> None:
    parsed: list[int] = []
    first = made(root, parsed)
    stat = (root / "a.json").stat()
    os.utime(root / "a.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    made(root, parsed)
    assert len(parsed) == 2, "another time of change"
    (root / "a.json").write_text("[1, 2]", encoding="utf-8")
    second = made(root, parsed)
    assert len(parsed) == 3 and first.fingerprint != second.fingerprint
    made(root, parsed, layout="2")
    assert len(parsed) == 4, "another layout of the records"
    assert list(first)[1] == ["second"], "who has the old one open goes on reading it"


def test_the_same_size_and_time_with_other_content_is_found_when_asked(root: Path) -> None:
    parsed: list[int] = []
    made(root, parsed)
    stat = (root / "a.json").stat()
    (root / "a.json").write_text("[2]", encoding="utf-8")
    os.utime(root / "a.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    made(root, parsed)
    assert len(parsed) == 1, "size and time are all that is looked at in general"
    made(root, parsed, thorough=True)
    assert len(parsed) == 2
    made(root, parsed, thorough=True)
    assert len(parsed) == 2


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_part_of_an_index_is_none(root: Path, keep: int) -> None:
    parsed: list[int] = []
    path = Path(made(root, parsed).path)
    path.write_bytes(path.read_bytes()[:keep])
    assert len(made(root, parsed)) == 3 and len(parsed) == 2


def test_a_damaged_record_is_named_and_found_by_a_thorough_look(root: Path) -> None:
    parsed: list[int] = []
    path = Path(made(root, parsed).path)
    content = bytearray(path.read_bytes())
    place = content.index(b"second")
    content[place - 6 : place] = b"\xff" * 6
    path.write_bytes(bytes(content))
    damaged = made(root, parsed)
    assert damaged[0][0] == "first"
    with pytest.raises(DataError, match=r"record 1 of the index .* is damaged; delete the file"):
        damaged[1]
    assert not damaged.is_sound()
    assert made(root, parsed, thorough=True)[1] == ["second"] and len(parsed) == 2


def test_an_index_runs_no_code(root: Path) -> None:
    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("this must never be said",)

    found = open_index("x", "1", str(root), "", [str(root / "a.json")], lambda gathered: [RunsCode()])
    with pytest.raises(DataError, match=r"record 0 of the index .* is damaged"):
        found[0]


def test_a_failed_parsing_leaves_nothing_and_the_old_one_stays(root: Path) -> None:
    made(root, [])
    (root / "a.json").write_text("[1, 2]", encoding="utf-8")

    def broken(gathered: ParseNotes) -> Iterator[Any]:
        yield "one"
        raise DataError("a bad record")

    with pytest.raises(DataError, match="a bad record"):
        open_index("a|set-train", "1", str(root), "", [str(root / "a.json")], broken)
    assert [path.suffix for path in sorted((root / ".index").iterdir())] == [".index", ".lock"]


def test_a_file_that_changes_while_it_is_parsed_is_refused(root: Path) -> None:
    def meanwhile(gathered: ParseNotes) -> Iterator[Any]:
        (root / "a.json").write_text("[1, 2, 3]", encoding="utf-8")
        yield "one"

    with pytest.raises(DataError, match="was changed while it was read"):
        open_index("x", "1", str(root), "", [str(root / "a.json")], meanwhile)


def test_where_it_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    source = [str(root / "a.json")]

    def kept(chosen: str = "") -> Path:
        return Path(open_index("x", "1", str(root), chosen, source, counting([])).path)

    assert kept(str(root / "flag")).is_relative_to(root / "flag")
    monkeypatch.setenv(index.INDEX_FOLDER, str(root / "variable"))
    assert kept().is_relative_to(root / "variable")
    assert kept(str(root / "flag")).is_relative_to(root / "flag"), "the flag wins"
    monkeypatch.delenv(index.INDEX_FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    assert kept().parent == root / ".index"

    def read_only(path: Any, *rest: Any, **more: Any) -> None:
        if str(path).startswith(refused):
            raise PermissionError(13, "Permission denied", path)
        make(path, *rest, **more)

    make = os.makedirs
    monkeypatch.setattr(os, "makedirs", read_only)
    refused = str(root / ".index")
    assert kept().parent == root / ".index", "an index that is there is read from a root that cannot be written"
    source.append(str(data_sets.write_json(root / "b.json", [])))
    assert kept().is_relative_to(root / "cache" / "pixellm" / "index")
    assert "is kept in" in capsys.readouterr().err, "with a word"
    refused = str(root)
    source.append(source[0])
    with pytest.raises(DataError, match=r"cannot be kept in .*\.index \(Permission denied\) nor in .* set --index_dir"):
        kept()


def test_small_files_are_kept_in_memory(tmp_path: Path) -> None:
    reader = build_reader("MultiReasonSeg", data_sets.write_muse(tmp_path), "train")
    assert not (tmp_path / ".index").exists()
    revived = pickle.loads(pickle.dumps(reader))
    assert all_samples(revived) == all_samples(reader)


def all_samples(reader: Reader) -> list[Sample]:
    return [reader.read_all(number, np.random.default_rng(number)) for number in range(len(reader))]


@pytest.mark.parametrize("name", INDEXED)
def test_a_reader_gives_the_same_from_its_index(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sets_root = INDEXED[name](tmp_path)
    in_memory = build_reader(name, data_sets_root, "train")
    monkeypatch.setattr(index, "_SMALL", 0)
    monkeypatch.delenv(index.INDEX_FOLDER, raising=False)
    built = build_reader(name, data_sets_root, "train")
    monkeypatch.setattr(index, "_write", None)
    opened = build_reader(name, data_sets_root, "train")
    again = pickle.loads(pickle.dumps(opened))
    for reader in (built, opened, again):
        assert all_samples(reader) == all_samples(in_memory)
        assert reader.skipped == in_memory.skipped and reader.noted == in_memory.noted
        assert reader.fingerprint == in_memory.fingerprint
        assert list(map(reader.image_path, range(len(reader)))) == list(map(in_memory.image_path, range(len(reader))))
    turns = [turn for sample in all_samples(opened) for conversation in sample.conversations for turn in conversation]
    assert all((target.decode() == 1).any() for turn in turns for target in turn.targets)


def test_leaving_out_held_out_images_has_an_index_of_its_own(tmp_path: Path, on_disk: None) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    refs = [data_sets.ref(1, 1, 11, "cup", split="val")]
    data_sets.write_refer_seg(root, "refcoco+", found=refs)
    for _ in range(2):
        assert len(build_reader("refcoco", root, "train")) == 2
        assert len(build_reader("refcoco", root, "train", ReaderOptions(exclude_val=True))) == 1
    data_sets.write_refer_seg(root, "refcoco+", found=[data_sets.ref(1, 3, 32, "cup", split="val")])
    assert len(build_reader("refcoco", root, "train", ReaderOptions(exclude_val=True))) == 2, "the other set counts too"


def test_a_full_check_compares_contents(tmp_path: Path, on_disk: None) -> None:
    root = data_sets.write_muse(tmp_path)
    file = root / "muse" / "muse_train.json"
    build_reader("MultiReasonSeg", root, "train")
    stat = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("What burns?", "What melts?"), encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def asked(options: ReaderOptions) -> str:
        reader = build_reader("MultiReasonSeg", root, "train", options)
        return reader.read_all(1, np.random.default_rng(0)).conversations[1][0].question

    assert asked(ReaderOptions()) == "What burns?"
    assert asked(ReaderOptions(check_index=True)) == "What melts?" == asked(ReaderOptions())


ONE_RANK = """
import sys, numpy as np
from utils.data import index
from utils.data.readers.registry import build_reader
index._SMALL = 0
write = index._write
index._write = lambda *given: (print("parsed"), write(*given))
reader = build_reader("MultiReasonSeg", sys.argv[1], "train")
print(len(reader), len(reader.read_all(0, np.random.default_rng(0)).conversations))
"""


def test_two_ranks_make_one_index(tmp_path: Path, child_env: dict[str, str], on_disk: None) -> None:
    records = [{**data_sets.muse_records()[0], "id": number} for number in range(400)]
    root = data_sets.write_muse(tmp_path, records)
    command = [sys.executable, "-c", ONE_RANK, str(root)]
    child_env.pop(index.INDEX_FOLDER, None)
    ranks = [subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert all("400 2" in one for one in said) and sum("parsed" in one for one in said) == 1


def test_a_file_system_without_locks_is_no_obstacle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(made(root, [])) == 3


def read_in_child(reader: Reader, queue: Any) -> None:
    queue.put(reader.read_all(0, np.random.default_rng(0)).sample_id)


@pytest.mark.parametrize("gone", [False, True])
def test_a_process_that_is_started_afresh_opens_it_again(tmp_path: Path, on_disk: None, gone: bool) -> None:
    reader = build_reader("MultiReasonSeg", data_sets.write_muse(tmp_path), "train")
    packed = pickle.dumps(reader)
    assert len(packed) < 4000, "the records are not in it"
    if gone:
        for path in (tmp_path / ".index").glob("*.index"):
            path.unlink()
        with pytest.raises(DataError, match="is gone while it is needed"):
            pickle.loads(packed)
        return
    spawning = multiprocessing.get_context("spawn")
    queue = spawning.Queue()
    child = spawning.Process(target=read_in_child, args=(reader, queue))
    child.start()
    assert queue.get(timeout=120) == reader.read_all(0, np.random.default_rng(0)).sample_id
    child.join()


LISTS = ("[]", " [ ] ", "[1]", '\n[{"a": [1, {"b": "é]"}]} , 2.5e3,\t"x,]" , null,true]\n', "[12345, -6]", '["ab\\"c"]')


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_a_long_list_is_read_item_by_item(
    text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    for mark in ("", "\ufeff"):
        (tmp_path / "a.json").write_text(mark + text, encoding="utf-8")
        assert list(iterate_json_list(str(tmp_path / "a.json"))) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON at line 1, column 1"),
        ('[1,\n{"a": }]', "not valid JSON at line 2, column 7"),
        ("[1, 2", "not valid JSON"),
        ("[1 2]", "not valid JSON at line 1, column 4"),
        ("[1,]", "not valid JSON"),
        ("[1] x", "not valid JSON"),
        ('{"a": 1}', "is an object; expected a list"),
        ("[" * 100_000, "nests deeper"),
    ],
)
@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_what_is_no_list_is_told_by_its_place(
    text: str, said: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        list(iterate_json_list(str(tmp_path / "a.json")))
