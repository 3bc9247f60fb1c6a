"""Asks an OpenAI-compatible server for answers, and loses nothing when the server fails.

An answer counts only if it is whole and of the API's form. What is not is asked again with growing pauses; an item that
stays without an answer gets a line with `error`, is asked again by the next run, and is missing in the summary: neither
right nor wrong."""

import hashlib
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import httpx
from part_file import check_replaceable
from tqdm import tqdm

from .items import Appender, read_lines

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 529}
GIVE_UP_AFTER = 3  # items in a row to which the server could not be reached


@dataclass
class Settings:
    server: str
    model: str
    mode: str
    api: str = "chat"
    seed: int = 1
    timeout_s: float = 600
    attempts: int = 5
    pause_s: float = 1.0  # before the second attempt; doubles up to a minute
    workers: int = 1
    max_tokens: int = 0


@dataclass
class Report:
    answered: int = 0
    had: int = 0
    failed: int = 0
    left: int = 0

    @property
    def complete(self):
        return self.failed == 0 and self.left == 0

    def __str__(self):
        text = f"{self.answered} answered, {self.had} had been before, {self.failed} without a valid answer"
        return text + (f", {self.left} not asked: the server is gone" if self.left else "")


class NoAnswer(Exception):
    """Why an attempt failed; whether another may do better; the pause that the server asks for."""

    def __init__(self, reason, again=True, unreachable=False, pause_s=0.0):
        super().__init__(reason)
        self.again, self.unreachable, self.pause_s = again, unreachable, pause_s


def request(item, settings):
    """Path and body of the request for an item."""
    limit = min(item.max_tokens, settings.max_tokens) if settings.max_tokens else item.max_tokens
    body = {"model": settings.model, "max_tokens": limit, "temperature": 0, "seed": settings.seed, "stream": False}
    if settings.api == "chat":
        return "/chat/completions", body | {"messages": [{"role": "user", "content": item.prompt}]}
    return "/completions", body | {"prompt": f"{item.prompt}\n{item.prefix}" if item.prefix else item.prompt}


def fingerprint(item, settings):
    """Of everything that decides the answer."""
    text = json.dumps([item.id, item.task, *request(item, settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(client, path, body, deadline_s):
    """Status, headers and bytes of the reply. The deadline covers all of it: a server that drips is slow, too."""
    deadline = time.monotonic() + deadline_s
    with client.stream("POST", path, json=body) as reply:
        parts = []
        for part in reply.iter_bytes():
            parts.append(part)
            if time.monotonic() > deadline:
                raise NoAnswer(f"no whole answer within {deadline_s:g} s")
        return reply.status_code, reply.headers, b"".join(parts)


def _choice(content, api):
    """The answer in the reply's bytes. Raises NoAnswer for anything that is not a whole answer."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"] if api == "chat" else choice["text"]
        finish = choice.get("finish_reason")
        usage = reply.get("usage") or {}
        figures = {"prompt_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise NoAnswer(f"rubbish instead of an answer ({type(error).__name__}): {content[:80]!r}") from error
    if not isinstance(text, str):
        raise NoAnswer(f"the answer's text is no string: {text!r}")
    if finish not in ("stop", "length", "eos", None):
        raise NoAnswer(f"the answer ended with '{finish}'")
    # Half a character that JSON spells out (an answer cut inside an emoji) cannot be written.
    return {"output": text.encode("utf-8", "replace").decode(), "complete": finish != "length", **figures}


def connect_s(settings):
    return min(10.0, settings.timeout_s)


def attempt(client, item, settings):
    path, body = request(item, settings)
    try:
        status, headers, content = _read(client, path, body, settings.timeout_s)
    except httpx.ConnectTimeout as error:
        raise NoAnswer(f"no connection within {connect_s(settings):g} s", unreachable=True) from error
    except httpx.TimeoutException as error:
        raise NoAnswer(f"{type(error).__name__} within {settings.timeout_s:g} s") from error
    except httpx.TransportError as error:
        raise NoAnswer(f"{type(error).__name__}: {error}", unreachable=True) from error
    except httpx.DecodingError as error:
        raise NoAnswer(f"rubbish instead of an answer: {error}") from error
    if status != 200:
        try:
            pause_s = min(float(headers.get("retry-after", 0)), 300.0)
        except ValueError:
            pause_s = 0.0
        pause_s = pause_s if math.isfinite(pause_s) else 0.0
        reason = f"status {status}: {content[:200].decode(errors='replace')}"
        raise NoAnswer(reason, again=status in RETRIED, pause_s=pause_s)
    return _choice(content, settings.api)


def ask(client, item, settings, sleep=time.sleep, stops=lambda: False):
    """Fields of the item's result line: an answer, or `error` and whether the server was `unreachable` to the last. When
    it `stops()`, an attempt that failed is the last."""
    line = {"id": item.id, "task": item.task, "mode": settings.mode, "model": settings.model}
    line["fingerprint"] = fingerprint(item, settings)
    begin = time.monotonic()
    for count in range(1, settings.attempts + 1):
        try:
            answer = attempt(client, item, settings)
            return line | answer | {"attempts": count, "seconds": round(time.monotonic() - begin, 3)}
        except NoAnswer as error:
            failure = error
        if not failure.again or count == settings.attempts or stops():
            break
        sleep(max(failure.pause_s, min(settings.pause_s * 2 ** (count - 1), 60.0)))
    return line | {"error": str(failure), "attempts": count, "unreachable": failure.unreachable}


def read_done(path, items, settings):
    """Items that the results have a valid answer to. Raises ValueError when they come from other items or settings."""
    prints = {item.id: fingerprint(item, settings) for item in items}
    done = set()

    def parse(record):
        if record["mode"] != settings.mode or record["id"] not in prints:
            return
        if record["fingerprint"] != prints[record["id"]]:
            raise RuntimeError(f"{path} has item {record['id']} with another text, model or setting; give another --out")
        if "error" not in record:
            done.add(record["id"])

    try:
        read_lines(path, parse)
    except FileNotFoundError:
        pass
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return done


class _Lost:
    """Whether the server is gone for good. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._in_a_row = 0
        self.is_final = False

    def note(self, line):
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if line.pop("unreachable", False) else 0
            self.is_final = self.is_final or self._in_a_row >= GIVE_UP_AFTER
        return line


def ask_all(items, out, settings, sleep=time.sleep):
    """Appends a line for every item that `out` has no valid answer to. Returns a Report. Interrupted, it waits for the
    requests under way, writes their answers and asks nothing more."""
    check_replaceable(out)  # a device would be read without end
    if httpx.URL(settings.server).scheme not in ("http", "https"):
        raise ValueError(f"the server ({settings.server}) must begin with http:// or https://")
    with Appender(out) as lines:  # alone, before it is read
        done = read_done(out, items, settings)
        todo = [item for item in items if item.id not in done]
        return _ask_each(todo, lines, settings, Report(had=len(items) - len(todo)), sleep)


def _ask_each(todo, lines, settings, report, sleep):
    lost = _Lost()
    timeout = httpx.Timeout(settings.timeout_s, connect=connect_s(settings), pool=None)

    with (
        httpx.Client(base_url=settings.server.rstrip("/"), timeout=timeout) as client,
        ThreadPoolExecutor(settings.workers) as pool,
        tqdm(total=report.had + len(todo), initial=report.had, unit="item") as bar,
    ):

        def work(item):
            if lost.is_final:
                return None
            line = lost.note(ask(client, item, settings, sleep, lambda: lost.is_final))
            lines.write(line)
            return line

        try:
            for future in as_completed([pool.submit(work, item) for item in todo]):
                line = future.result()
                if line is None:
                    report.left += 1
                    continue
                if "error" in line:
                    report.failed += 1
                    bar.write(f"{line['id']}: {line['error']}", file=sys.stderr)
                else:
                    report.answered += 1
                bar.update()
        except BaseException:
            lost.is_final = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return report
