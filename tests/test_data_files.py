"""Files of every kind: faults with file and line, other formats, renamed columns."""

from __future__ import annotations

import pytest
from tiny_data import TOK, config, source

from u2a.data import load_rows
from u2a.errors import DataError
from u2a.schemas import content_uid

GOOD = b'{"prompt": "p", "completion": "c"}'
BYTES = [
    (b"", "0 rows in "),
    (b"\n \n", "0 rows in "),
    (GOOD + b"\n" + GOOD[:-3], ":2: truncated last line"),
    (GOOD[:-3] + b"\n" + GOOD, ":1:32: not JSON"),
    (GOOD + b"\n" + GOOD.replace(b'"c"', b'"\xff"'), ":2:32: byte 0xff is not UTF-8"),
    (GOOD.replace(b'"c"', b'"\0"'), ":1:32: NUL byte"),
    (GOOD.replace(b'"c"', rb'"\ud800"'), ":1: completion: lone surrogate at character 0"),
    (GOOD.replace(b'"c"', b"NaN"), ":1: NaN, wanted finite numbers"),
    (GOOD.replace(b'"c"', b"null"), ":1: completion: None (NoneType), wanted a string"),
    (GOOD.replace(b'"c"', b"3"), ":1: completion: 3 (int), wanted a string"),
    (GOOD.replace(b'"c"', b'["x"]'), ":1: completion[0]: str, wanted {role, content}"),
    (GOOD + b'\n{"prompt": "p"}', ":2: column 'completion' missing, the row has 'prompt'"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', ":1: column given twice: prompt"),
    (b"[1]", ":1: list, wanted one JSON object a line"),
    (b'{"a": ' + b"[" * 100_000, ":1: nested too deeply"),
    (b'{"text": "a"}', "columns text fit no schema"),
    (GOOD[:-1] + b', "label": "x"}', ":1: label: 'x' (str), wanted true or false"),
]


@pytest.mark.parametrize(("data", "words"), BYTES)
def test_bad_jsonl_names_file_and_line(tmp_path, data, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_rows(source(path), TOK, config())
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_bom_and_crlf_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD + b"\r\n")
    assert [r.source for r in load_rows(source(path), TOK, config())] == [f"{path}:1", f"{path}:3"]


def test_the_first_ten_bad_rows_are_listed(jsonl):
    good = {"prompt": "p", "completion": "c"}
    with pytest.raises(DataError) as caught:
        load_rows(source(jsonl([good, *[good | {"prompt": 1}] * 30])), TOK, config())
    assert [f.split(":")[1] for f in caught.value.faults] == [str(n) for n in range(2, 12)]


def test_csv_and_parquet_equal_jsonl(tmp_path, jsonl):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": "a\nb", "completion": 'x "y"', "label": False},
        {"prompt": "c", "completion": "z", "label": True},
        {"prompt": "d", "completion": "w", "label": False},
    ]
    want = load_rows(source(jsonl(rows)), TOK, config())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    text = 'prompt,completion,label\r\n"a\nb","x ""y""",false\r\nc,z,True\r\nd,w,0\r\n'
    (tmp_path / "r.csv").write_bytes(text.encode())
    for name, lines in (("r.parquet", [1, 3]), ("r.csv", [2, 5])):
        path = tmp_path / name
        got = load_rows(source(path), TOK, config())
        assert [(r.uid, r.answer_ids) for r in got] == [(r.uid, r.answer_ids) for r in want]
        assert [r.source for r in got] == [f"{path}:{n}" for n in lines]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("r.csv", b"prompt,completion\n", "0 rows in"),
        ("r.csv", b"prompt,completion\na\n", "r.csv:2: wanted 2 fields as in the header"),
        ("r.csv", b"prompt,completion\na,b,c\n", "r.csv:2: wanted 2 fields as in the header"),
        ("r.parquet", b"PAR1 not really PAR1", "not readable as Parquet after row 0"),
        ("r.pkl", b"cos\nsystem\n", ".pkl refused"),
        ("r.py", b"", ".py refused"),
        ("r.txt", b"", "unknown file type"),
    ],
)
def test_other_files(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_rows(source(tmp_path / name), TOK, config())
    assert words in str(caught.value)


def test_columns_are_renamed(jsonl):
    path = jsonl([{"frage": "q", "antwort": "a", "id": 5}])
    columns = {"prompt": "frage", "completion": "antwort"}
    (row,) = load_rows(source(path, columns=columns), TOK, config())
    assert row.uid == content_uid("q", "a") and row.meta["id"] == 5
    with pytest.raises(DataError, match=":1: column 'nein' of `columns:` missing"):
        load_rows(source(path, columns={"prompt": "nein"}), TOK, config())


def test_a_datasets_folder_is_read_and_a_script_refused(tmp_path, jsonl):
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl([{"prompt": "p", "completion": "c"}], "set/train.jsonl")
    (row,) = load_rows(source(folder), TOK, config())
    assert row.source == f"{folder}[train]:1" and row.uid == content_uid("p", "c")
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    sentinel = tmp_path / "ran"
    (scripted / "scripted.py").write_text(f"open({str(sentinel)!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_rows(source(scripted), TOK, config())
    assert not sentinel.exists()
