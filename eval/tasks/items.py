"""Items and JSON lines. docs/tasks.md lists the fields."""

import fcntl
import json
import os
import re
import sys
import threading
from dataclasses import asdict, dataclass, field

from part_file import replacing

WHOLE_NUMBER = re.compile("[0-9]+")
METRICS = ("all", "any", "babilong", "last_number", "f1")


@dataclass
class Item:
    id: str
    task: str
    prompt: str  # what the user says
    answers: list  # of strings
    metric: str  # one of METRICS
    max_tokens: int
    prefix: str = ""  # how the answer begins, given to the model; for servers only by the completions API
    target: str = ""  # the right continuation of the prefix, whose log-probability is measured
    prompt_tokens: int = 0  # of prompt and prefix, without chat template
    haystack: str = ""  # items of one haystack vary together; none: the item has its own
    labels: list = field(default_factory=list)  # every possible answer, for `babilong`

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric '{self.metric}' is none of {', '.join(METRICS)}")
        if not (isinstance(self.answers, list) and self.answers and all(isinstance(a, str) for a in self.answers)):
            raise ValueError("answers must be a list of at least one string")
        for name in ("id", "task", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a string that is not empty")
        for name in ("prefix", "target", "haystack"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be a string")
        if not (isinstance(self.labels, list) and all(isinstance(label, str) for label in self.labels)):
            raise ValueError(f"labels ({self.labels!r}) must be a list of strings")
        for name, least in (("max_tokens", 1), ("prompt_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")
        if self.metric == "last_number" and not WHOLE_NUMBER.fullmatch(self.answers[0]):
            raise ValueError(f"answers[0] ({self.answers[0]!r}) must be a whole number for last_number")


def parse_item(record):
    names = Item.__dataclass_fields__
    missing = [n for n in ("id", "task", "prompt", "answers", "metric", "max_tokens") if n not in record]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}")
    return Item(**{name: record[name] for name in names if name in record})


def _require_unicode(record):
    """Raises ValueError for bytes that are no UTF-8, and for halves of characters that JSON spells out."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: {error.object[error.start : error.end]!r}") from None


def read_lines(path, parse, problems=None):
    """`parse(record)` of every JSON object of a file of JSON lines. A line that is broken or that `parse` refuses
    (ValueError, KeyError, TypeError) is named on stderr and skipped; its name goes into the list `problems`."""
    good = []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                _require_unicode(record)
                good.append(parse(record))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                what = "nested too deeply" if isinstance(error, RecursionError) else what
                problem = f"{path}:{number}: skipped: {what}"
                print(problem, file=sys.stderr)
                if problems is not None:
                    problems.append(problem)
    return good


def read_items(path, problems=None):
    seen = set()

    def parse(record):
        item = parse_item(record)
        if item.id in seen:
            raise ValueError(f"the id {item.id} stands there twice")
        seen.add(item.id)
        return item

    return read_lines(path, parse, problems)


def write_items(items, path):
    """Replaces `path` when all of them are written."""
    with replacing(path) as file:
        for item in items:
            file.write((json.dumps(asdict(item), ensure_ascii=False) + "\n").encode())


class Appender:
    """Appends JSON objects, one a line, each at once on disk's way. A last line that was cut short is closed first.
    Threads may write at the same time, processes not: ValueError if another one does."""

    def __init__(self, path):
        whole = True
        if os.path.exists(path) and os.path.getsize(path):
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                whole = file.read(1) == b"\n"
        self._lock = threading.Lock()
        self._file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"cannot write {path}: another process writes it") from None
        if not whole:
            self._file.write("\n")

    def write(self, record):
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
