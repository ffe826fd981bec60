"""Read problems from JSONL, a JSON list, parquet, CSV, or whatever the `datasets` library loads by name or folder.

Reads benchmarks in their published form: MATH and MATH-500, GSM8K, AIME, Minerva, OlympiadBench.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, nearest

Record = Mapping[str, Any]

# In order of preference, in any case. A final answer comes before a worked solution: benchmarks score by it
_QUESTIONS = ("prompt", "question", "problem")
_ANSWERS = ("answer", "final_answer", "solution")
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_OPTIONS = ("question", "answer", "subset", "split", "eval_split")
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{$]+))")
_EVAL_SPLITS = ("test", "validation")


class Line(NamedTuple):
    question: str
    answer: str


class Columns(NamedTuple):
    """Names of the columns to read; None: found by the usual names."""

    question: str | None = None
    answer: str | None = None


class Splits(NamedTuple):
    """`evaluation` is None if the source has only one split."""

    train: list[Line]
    evaluation: list[Line] | None


def read_problems(path: Path, options: tuple[str, ...] = ()) -> Splits:
    """Read the problems at `path`. `options` are key=value: question, answer (columns), subset, split, eval_split."""
    given = _parse(options)
    columns = Columns(given.get("question"), given.get("answer"))
    if path.suffix not in _BUILDERS and (path.is_file() or path.suffix in (".jsonl", ".json")):
        return Splits(read_jsonl(path, columns), None)
    return _read_dataset(path, columns, given)


def _parse(options: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise UserError(f"task.options: {option!r} is not of the form key=value")
        if key not in _OPTIONS:
            raise UserError(f"task.options: {key!r} is not one of {', '.join(_OPTIONS)}{nearest(key, _OPTIONS)}")
        values[key] = text
    return values


# ------------------------------------------------------------------ JSON


def read_jsonl(path: Path, columns: Columns = Columns()) -> list[Line]:  # noqa: B008 - immutable
    """Read problems from a file with one JSON object per line, or with one JSON list of objects.

    An unreadable problem raises a UserError with the file and the line (list: item) number. Blank lines are skipped.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"task.path: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.path: {path} cannot be read: {error}") from None
    lines = []
    for number, raw in _raw_records(path, text):
        try:
            lines.append(read_record(_object(raw), columns))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not lines:
        raise UserError(f"task.path: {path} holds no problem")
    return lines


def _raw_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, JSON text or value) for each line, or for each item of a .json file's list."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        yield from enumerate(items, start=1)
        return
    for number, raw in enumerate(text.split("\n"), start=1):
        if raw.strip():
            yield number, raw


def _object(raw: Any) -> Record:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"a {type(raw).__name__}, not an object")
    return raw


# ------------------------------------------------------------------ datasets


def _read_dataset(path: Path, columns: Columns, given: dict[str, str]) -> Splits:
    """Read a folder saved by `datasets`, a file that it reads, or a name on the hub (its local cache first)."""
    is_name = not path.exists() and not path.is_absolute() and len(path.parts) <= 2 and path.suffix not in _BUILDERS
    if not path.exists() and not is_name:
        raise UserError(f"task.path: {path} does not exist")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"task.path={path} needs the datasets library: pip install 'alp-kernels[datasets]'")
    import datasets

    datasets.disable_progress_bars()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.suffix in _BUILDERS:
            found = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path))
        else:
            found = datasets.load_dataset(str(path), given.get("subset"))
    except Exception as error:  # `datasets` has a hundred builders and uses the network: anything may be raised
        raise UserError(f"task.path={path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    name = given.get("split") or ("train" if "train" in splits else next(iter(splits)))
    others = [split for split in _EVAL_SPLITS if split in splits and split != name]
    held_out = given.get("eval_split") or (others[0] if others else None)
    for option, split in (("split", name), ("eval_split", held_out)):
        if split is not None and split not in splits:
            raise UserError(
                f"task.options: {option}={split}; {path} has {', '.join(splits)}{nearest(split, list(splits))}"
            )
    train = _read_rows(splits[name], f"{path}[{name}]", columns)
    return Splits(train, None if held_out is None else _read_rows(splits[held_out], f"{path}[{held_out}]", columns))


def _read_rows(rows: Any, where: str, columns: Columns) -> list[Line]:
    lines = []
    for number, record in enumerate(rows):
        try:
            lines.append(read_record(record, columns))
        except ValueError as error:
            raise UserError(f"{where}:{number}: {error}") from None
    if not lines:
        raise UserError(f"task.path: {where} holds no problem")
    return lines


# ------------------------------------------------------------------ one record


def read_record(record: Record, columns: Columns = Columns()) -> Line:  # noqa: B008 - immutable
    """Return a record's question and final answer; raises a ValueError that says what is wrong with it."""
    question_key = _column(record, columns.question, _QUESTIONS)
    answer_keys = _present(record, _ANSWERS) if columns.answer is None else [_column(record, columns.answer, ())]
    if question_key is None or not answer_keys:
        raise ValueError(
            f"has the keys {sorted(record)}; it needs {' or '.join(_QUESTIONS)}, and {' or '.join(_ANSWERS)} "
            "(or name them: task.options question=COLUMN answer=COLUMN)"
        )
    question = record[question_key]
    if not isinstance(question, str):
        raise ValueError(f"{question_key} must be text, not a {type(question).__name__}")
    if not question.strip():
        raise ValueError(f"{question_key} is empty")
    # an empty answer column does not hide a solution column
    filled = [key for key in answer_keys if not _is_empty(record[key])]
    if not filled:
        raise ValueError(f"{answer_keys[0]} is empty")
    answer = final_answer(record[filled[0]], filled[0])
    if not answer:
        raise ValueError(f"{filled[0]} is empty")
    return Line(question, answer)


def _is_empty(value: Any) -> bool:
    """Whether a value is missing: None, blank text, an empty list, or NaN, as in tables of numbers."""
    return value is None or value == [] or value != value or (isinstance(value, str) and not value.strip())


def _present(record: Record, names: tuple[str, ...]) -> list[Any]:
    """The record's keys that match `names` in any case, in the order of `names`."""
    by_name = {str(key).lower(): key for key in record}
    return [by_name[name] for name in names if name in by_name]


def _column(record: Record, given: str | None, names: tuple[str, ...]) -> Any:
    if given is None:
        return next(iter(_present(record, names)), None)
    if given not in record:
        raise ValueError(f"has no column {given!r}; it has {sorted(record)}{nearest(given, list(map(str, record)))}")
    return given


def final_answer(value: Any, key: str) -> str:
    """The answer for math-verify: a worked solution's box or the text after ####; all items of a list."""
    if isinstance(value, list | tuple):
        return ", ".join(final_answer(item, key) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, a number or a list of them, not a {type(value).__name__}")
    if "####" in value:  # GSM8K
        value = value.rsplit("####", 1)[1]
    elif _BOX.search(value) or key.lower() == "solution":  # MATH
        value = last_boxed(value)
    value = value.strip()
    dollars = re.fullmatch(r"\$+([^$]+)\$+", value)  # OlympiadBench writes its answers as formulas
    return dollars[1].strip() if dollars else value


def last_boxed(solution: str) -> str:
    """The content of a MATH solution's last \\boxed{...} or \\fbox{...}, braces balanced; for "\\boxed 4", the 4."""
    *_, last = [None, *_BOX.finditer(solution)]
    if last is None:
        raise ValueError("solution has no \\boxed{...}")
    if last[1] is not None:
        return last[1]
    depth, begin = 0, last.end() - 1
    for end in range(begin, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[begin + 1 : end]
    raise ValueError("the braces of \\boxed{...} do not close")
