"""python -m tasks make|load|ask|summary: see docs/tasks.md."""

import argparse
import os
import sys

from part_file import check_apart, check_replaceable

from . import client, files, results, ruler
from .items import read_items, write_items
from .tokens import ServerTokens, estimate
from .words import Haystack

import httpx
from tqdm import tqdm

MOST = 1 << 24  # of anything that is counted


def counter(server, model):
    """The server's tokenizer, or the estimate where there is none."""
    if not server:
        print("note: no --server: tokens are estimated", file=sys.stderr)
        return estimate
    count = ServerTokens(server, model)
    try:
        count("probe")
    except httpx.TransportError as error:
        raise ValueError(f"no connection to {server}: {error}") from None
    except (httpx.HTTPStatusError, ValueError) as error:
        print(f"note: no tokenizer ({error}): tokens are estimated", file=sys.stderr)
        return estimate
    return count


def read_haystack(path):
    with open(path, encoding="utf-8") as file:
        return Haystack(file.read())


def read_form(path, read):
    """`read(path)`; what its form lacks is said with the file's name."""
    try:
        return read(path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else error
        what = "nested too deeply" if isinstance(error, RecursionError) else what
        raise ValueError(f"{path} is not of the form that is asked for: {what}") from None


def make(options):
    check_replaceable(options.out)  # before minutes of counting tokens
    check_apart(options.out, [options.haystack, *(getattr(options, form) for form in files.QUESTIONS)])
    names = list(ruler.TASKS) if options.tasks == "all" else options.tasks.split(",")
    for name in names:
        if name not in ruler.TASKS:
            raise ValueError(f"task '{name}' is none of {', '.join(ruler.TASKS)}")
    haystack = None
    if options.haystack:
        haystack = read_form(options.haystack, read_haystack)
    sources = {form: read_form(path, read) for form, read in files.QUESTIONS.items() if (path := getattr(options, form))}
    if options.tasks == "all":
        names = [n for n in names if n not in ("qa_1", "qa_2") or {"qa_1": "squad", "qa_2": "hotpotqa"}[n] in sources]
        if len(names) < len(ruler.TASKS):
            print("note: qa_1 needs --squad, qa_2 --hotpotqa: left out", file=sys.stderr)
    context = ruler.Context(haystack, sources, counter(options.server, options.model))
    wanted = [(name, i) for i in range(options.count) for name in names]
    made = []
    for name, i in tqdm(wanted, unit="haystack"):
        made += ruler.make_items(name, i, options.length, options.seed, context, options.questions)
    write_items(made, options.out)


def load(options):
    check_replaceable(options.out)
    check_apart(options.out, options.files)
    count = counter(options.server, options.model)
    problems, items = [], []
    names = [os.path.splitext(os.path.basename(path))[0] for path in options.files]
    if len(set(names)) < len(names):  # qa1/4k.jsonl, qa2/4k.jsonl
        names = ["-".join([os.path.basename(os.path.dirname(os.path.abspath(path))), name]) for path, name in zip(options.files, names)]
    if len(set(names)) < len(names):
        raise ValueError(f"files of one name in folders of one name cannot be told apart: {', '.join(options.files)}")
    for path, name in zip(options.files, names):
        name = name if options.form == "longbench" else f"{options.form}-{name}"
        extra = {"length": options.length} if options.form == "longbench" else {}
        loaded = files.LOADERS[options.form](path, name, count, problems, **extra)
        items.append(loaded[: options.count or None])
    if not any(items):
        raise ValueError(f"no items in {', '.join(options.files)}")
    # Item by item from every file, so that the first n are a fair sample of all.
    longest = max(map(len, items))
    mixed = [part[i] for i in range(longest) for part in items if i < len(part)]
    write_items(mixed, options.out)
    print(f"{len(mixed)} items, {len(problems)} broken line(s) skipped", file=sys.stderr)


def ask(options):
    problems = []
    items = read_items(options.items, problems)
    check_apart(options.out, [options.items])
    settings = client.Settings(
        server=options.server, model=options.model, mode=options.mode, api=options.api, seed=options.seed,
        timeout_s=options.timeout, attempts=options.attempts, workers=options.workers, max_tokens=options.max_tokens,
    )
    report = client.ask_all(items[: options.count or None], options.out, settings)
    print(f"{report}; {len(problems)} broken line(s) skipped", file=sys.stderr)
    return 0 if report.complete else 3


def summary(options):
    table = results.summarize(options.items, options.results, options.baseline)
    if not table.rows and not table.notes:
        raise ValueError(f"no results in {', '.join(map(str, options.results))}")
    print(table.json() if options.json else table.markdown())
    return 0 if table.rows else 1  # notes alone: no line was a result


def positive(text):
    return at_least(1, text)


def not_negative(text):
    return at_least(0, text)


def at_least(least, text):
    value = int(text)
    if not least <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{value} must be in {least}..{MOST}")
    return value


def parser():
    top = argparse.ArgumentParser(prog="eval_tasks.sh", description="Long-context tasks: make items, ask servers, sum up.")
    verbs = top.add_subparsers(dest="verb", required=True)

    def tokenizer(verb):
        verb.add_argument("--server", help="counts tokens by its /tokenize; without: an estimate")
        verb.add_argument("--model", default="", help="name of the model, if the server wants one")
        verb.add_argument("-o", "--out", required=True, help="file of items")

    verb = verbs.add_parser("make", help="generate items of RULER's tasks")
    verb.add_argument("--tasks", default="all", help=f"all, or some of {','.join(ruler.TASKS)}")
    verb.add_argument("--length", type=positive, required=True, help="tokens of a prompt")
    verb.add_argument("-n", "--count", type=positive, default=20, help="haystacks of each task")
    verb.add_argument("--questions", type=positive, default=1, help="items from each haystack, where it has so many keys")
    verb.add_argument("--seed", type=int, default=1)
    verb.add_argument("--haystack", help="text file; without: generated sentences")
    verb.add_argument("--squad", help="questions for qa_1, in the form of SQuAD")
    verb.add_argument("--hotpotqa", help="questions for qa_2, in the form of HotpotQA")
    tokenizer(verb)
    verb.set_defaults(run=make)

    verb = verbs.add_parser("load", help="items from published files")
    verb.add_argument("form", choices=files.LOADERS)
    verb.add_argument("files", nargs="+")
    verb.add_argument("-n", "--count", type=not_negative, default=0, help="items of each file; 0: all")
    verb.add_argument("--length", type=positive, help="longbench: tokens of a prompt at most")
    tokenizer(verb)
    verb.set_defaults(run=load)

    verb = verbs.add_parser("ask", help="let a server answer")
    verb.add_argument("--items", required=True)
    verb.add_argument("-o", "--out", required=True, help="results; what it has is not asked again")
    verb.add_argument("--server", required=True, help="such as http://localhost:8080/v1")
    verb.add_argument("--model", default="default")
    verb.add_argument("--mode", required=True, help="what the results are called: dense, sparse, ...")
    verb.add_argument("--api", choices=("chat", "completions"), default="chat")
    verb.add_argument("-n", "--count", type=not_negative, default=0, help="only the first items; 0: all")
    verb.add_argument("--seed", type=int, default=1)
    verb.add_argument("--timeout", type=float, default=600, help="seconds for a whole answer")
    verb.add_argument("--attempts", type=positive, default=5)
    verb.add_argument("--workers", type=positive, default=1, help="requests at a time")
    verb.add_argument("--max-tokens", type=not_negative, default=0, help="no answer is longer; 0: as the item says")
    verb.set_defaults(run=ask)

    verb = verbs.add_parser("summary", help="scores, intervals, each mode against the baseline")
    verb.add_argument("results", nargs="+")
    verb.add_argument("--items", required=True, action="append", help="may be repeated")
    verb.add_argument("--baseline", help="the mode that others are compared with; else dense, if it is there")
    verb.add_argument("--json", action="store_true", help="JSON lines instead of a Markdown table")
    verb.set_defaults(run=summary)
    return top


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, ValueError, KeyError, httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"eval_tasks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval_tasks: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
