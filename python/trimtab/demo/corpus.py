"""Real text that every Python installation has: documentation and source of its library.

Two domains. *Prose* is what the library says about itself: the language reference topics behind
`help()` and every docstring. *Code* is the source with docstrings and comment lines taken out. A
file's prose and its code always fall into the same split, so nothing held out is seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

DOMAINS = ("prose", "code")
SPLITS = ("train", "validation", "tasks")
END = "<|end|>"

# Of every 15 files in random order, what one is for; the validation text makes the NLL matrix.
_TURNS = ("validation", *3 * ("tasks",), *11 * ("train",))
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # tables of characters
        "idlelib",
        "pydoc_data",  # read as prose
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# A BPE piece is within a word, a number, one bracket, an indented line start, or other signs.
_PIECES = r" ?[A-Za-z_]+| ?[0-9]{1,3}|[()\[\]{}]|\n+ *| ?[^\sA-Za-z_0-9()\[\]{}]+| +|\s"


class DemoError(RuntimeError):
    """The demo can't run here; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Corpus:
    """Documents as text, `documents[split][domain]`."""

    documents: dict[str, dict[str, list[str]]]
    n_files: int

    def n_characters(self, split: str, domain: str) -> int:
        """Number of characters in one split of one domain."""
        return sum(map(len, self.documents[split][domain]))


@dataclass(frozen=True)
class Tokens:
    """One split of one domain as a flat run of token ids, documents ending in `END`."""

    ids: np.ndarray  # (N,) int64
    whole: np.ndarray  # (N,) bool, the token is a whole piece: a word, a name, a bracket


@dataclass(frozen=True)
class EncodedCorpus:
    """The corpus in token ids, `splits[split][domain]`, and the tokenizer that made them."""

    tokenizer: object
    splits: dict[str, dict[str, Tokens]]
    pieces: list[str]  # (V,) the text of every token id
    n_files: int
    n_characters: dict[str, int]  # per domain, all splits together

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self.pieces)


def read_corpus(
    seed: int = 0,
    *,
    root: Path | None = None,
    max_files: int | None = None,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> Corpus:
    """Reads the standard library's documentation and source.

    Args:
        seed: which files are held out, through a hash of seed and file name.
        root: folder of the library; by default this interpreter's own.
        max_files: take only the first so many files in hash order (a small run).
        progress: wraps the list of files, as `tqdm` does.

    Raises:
        DemoError: the installation has no library source.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(_library_files(root), key=lambda path: _hash(seed, path.relative_to(root)))
    documents: dict[str, dict[str, list[str]]] = {s: {d: [] for d in DOMAINS} for s in SPLITS}
    seen: set[str] = set()
    n_files = 0
    for path in progress(files[:max_files]):
        parsed = _parse(path)
        if parsed is None:
            continue
        docstrings, code = parsed
        split = documents[_TURNS[n_files % len(_TURNS)]]
        n_files += 1
        fresh = [text for text in map(_clean_prose, docstrings) if text and text not in seen]
        seen.update(fresh)
        if fresh:
            split["prose"].append("\n\n".join(fresh) + "\n")
        if len(code) > 200:
            split["code"].append(code)
    topics = sorted(_topics(), key=lambda topic: _hash(seed, topic[0]))
    for index, (_, text) in enumerate(topics):
        documents[_TURNS[index % len(_TURNS)]]["prose"].append(_clean_prose(text) + "\n")
    if any(not documents[s][d] for s in SPLITS for d in DOMAINS):
        raise DemoError(
            f"the standard library's source is not in {root} ({n_files} files could be read); run "
            "the demo with a Python that was installed with its .py files."
        )
    return Corpus(documents, n_files)


def train_tokenizer(corpus: Corpus, vocabulary: int) -> object:
    """Trains a byte-level BPE tokenizer on the training split, as much prose as code.

    Args:
        corpus: the documents.
        vocabulary: number of token ids, the end-of-document token among them.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    size = min(corpus.n_characters("train", domain) for domain in DOMAINS)
    texts = (text for d in DOMAINS for text in _head(corpus.documents["train"][d], size))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(corpus: Corpus, tokenizer: object) -> EncodedCorpus:
    """Turns every split of every domain into one flat run of token ids."""
    splits = {
        split: {domain: _encode(texts, tokenizer) for domain, texts in domains.items()}
        for split, domains in corpus.documents.items()
    }
    size = tokenizer.get_vocab_size()  # type: ignore[attr-defined]
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]  # type: ignore[attr-defined]
    n_characters = {d: sum(corpus.n_characters(s, d) for s in SPLITS) for d in DOMAINS}
    return EncodedCorpus(tokenizer, splits, pieces, corpus.n_files, n_characters)


def windows(ids: np.ndarray, length: int) -> np.ndarray:
    """Cuts a flat run into the rows `(n, length)` that fit, without overlap."""
    n = len(ids) // length
    return ids[: n * length].reshape(n, length)


def _encode(texts: list[str], tokenizer: object) -> Tokens:
    ids: list[np.ndarray] = []
    whole: list[np.ndarray] = []
    end = tokenizer.token_to_id(END)  # type: ignore[attr-defined]
    for encoding in tokenizer.encode_batch(texts):  # type: ignore[attr-defined]
        ids.append(np.array([*encoding.ids, end], dtype=np.int64))
        piece = np.array(encoding.word_ids, dtype=np.int64)
        counts = np.bincount(piece, minlength=1)
        whole.append(np.append(counts[piece] == 1, False))
    return Tokens(np.concatenate(ids), np.concatenate(whole))


def _library_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        # `_sysconfigdata*` lists the paths and compiler flags of one machine: not text.
        if _SKIPPED_FOLDERS.isdisjoint(folders) and not path.name.startswith("_sysconfigdata"):
            yield path


def _parse(path: Path) -> tuple[list[str], str] | None:
    """Docstrings and the remaining source of one file; None where it isn't valid UTF-8 Python."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    docstrings: list[str] = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            docstrings.append(text)
            first = node.body[0]
            if len(node.body) > 1:  # a lone docstring is the body: without it the code has a hole
                dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return docstrings, _code_lines(source, dropped)


def _code_lines(source: str, dropped: set[int]) -> str:
    kept: list[str] = []
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.rstrip()
        if number in dropped or text.lstrip().startswith("#"):
            continue
        if text or (kept and kept[-1]):
            kept.append(text)
    return "\n".join(kept).strip("\n") + "\n"


def _clean_prose(text: str) -> str:
    """Without doctests, from the prompt to the blank line after the output; "" if hardly a text."""
    kept: list[str] = []
    in_doctest = False
    for line in inspect.cleandoc(text).splitlines():
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest and (line.strip() or (kept and kept[-1])):
            kept.append(line.rstrip())
    cleaned = "\n".join(kept).strip()
    return cleaned if len(cleaned.split()) >= 6 else ""


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings are the larger part
        return []
    return list(topics.items())


def _head(texts: list[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        yield text[:size]
        size -= len(text)


def _hash(seed: int, name: PurePath | str) -> bytes:
    """A place in a random order that depends on nothing but its arguments."""
    text = name.as_posix() if isinstance(name, PurePath) else name
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()
