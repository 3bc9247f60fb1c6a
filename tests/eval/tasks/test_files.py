import json
import os

import pytest
from tasks import files
from tasks.__main__ import main
from tasks.items import Appender, Item, read_items, write_items
from tasks.tokens import estimate


def lines(tmp_path, *records):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_babilong(tmp_path, capsys):
    good = {"input": "Mary went to the garden.", "question": "Where is Mary? ", "target": "garden"}
    other = {"input": "John went to the office.", "question": "Where is John? ", "target": "office"}
    problems = []
    path = lines(tmp_path, good, '{"input": "cut sh', {"input": "x", "question": "y"}, "[1]", other)
    items = files.babilong(path, "babilong-qa1", problems=problems)
    assert [i.answers for i in items] == [["garden"], ["office"]]
    assert items[0].labels == ["garden", "office"] and items[0].target == " garden"
    assert items[0].prompt.count(good["input"]) == 1 and items[0].prompt.endswith("Question: Where is Mary?")
    assert len(problems) == 3
    shown = capsys.readouterr().err
    assert "set.jsonl:2: skipped" in shown and ":3: skipped: no field 'target'" in shown and ":4: skipped" in shown


def test_what_is_no_unicode_is_named_and_skipped(tmp_path, capsys):
    path = tmp_path / "set.jsonl"
    good = json.dumps({"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}).encode()
    path.write_bytes(b"\n".join([good.replace(b"Mary", b"M\xe4ry"), good.replace(b"Mary", b"M\\ud83dry"), good]) + b"\n")
    problems = []
    (item,) = files.babilong(path, "babilong-qa1", problems=problems)
    assert item.id == "babilong-qa1-0" and len(problems) == 2
    write_items([item], tmp_path / "items.jsonl")
    shown = capsys.readouterr().err
    assert "set.jsonl:1: skipped: not UTF-8" in shown and "set.jsonl:2: skipped: not UTF-8" in shown


def test_babilongs_ways_are_one_label(tmp_path):
    ways = [{"input": "x", "question": "How do you go from a to b?", "target": t} for t in ("s,w", "n,n", "e,s")]
    items = files.babilong(lines(tmp_path, *ways), "babilong-qa19")
    assert items[0].labels == ["e,s", "n,n", "s,w"]
    several = {"input": "x", "question": "What is Mary carrying?", "target": "apple,milk"}
    assert files.babilong(lines(tmp_path, several), "babilong-qa8")[0].labels == ["apple", "milk"]


def test_files_of_one_name_do_not_take_each_others_ids(tmp_path, capsys):
    record = json.dumps({"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"})
    paths = []
    for folder in ("qa1", "qa2", "more/qa2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "4k.jsonl").write_text(record)
        paths.append(str(tmp_path / folder / "4k.jsonl"))
    out = str(tmp_path / "items.jsonl")
    assert main(["load", "babilong", *paths[:2], "-o", out]) == 0
    assert [item.id for item in read_items(out)] == ["babilong-qa1-4k-0", "babilong-qa2-4k-0"]
    assert main(["load", "babilong", *paths, "-o", out]) == 1
    assert "cannot be told apart" in capsys.readouterr().err


def test_what_is_read_is_not_written(tmp_path, capsys):
    path = tmp_path / "text"
    make = ["make", "--tasks", "niah_single_2", "--length", "500", "-n", "1"]
    for arguments in ([*make, "--haystack", path], [*make, "--squad", path], [*make, "--hotpotqa", path], ["load", "babilong", path]):
        path.write_text("What the user has.")
        assert main([*map(str, arguments), "-o", str(tmp_path / "." / "text")]) == 1
        assert "text: it is a file that is read" in capsys.readouterr().err
        assert path.read_text() == "What the user has."


def test_longeval(tmp_path):
    record = {"random_idx": ["torpid-kid", 7], "expected_number": 2416, "prompt": "lines ... I need the number. "}
    items = files.longeval(lines(tmp_path, record, {**record, "expected_number": "x"}), "longeval")
    assert len(items) == 1 and items[0].answers == ["2416"] and items[0].metric == "last_number"
    assert items[0].prefix + items[0].target == "The <REGISTER_CONTENT> in line torpid-kid is <2416>"


# A sample in the published form, written for this test.
LONGBENCH = [
    {"input": "Who keeps the light?", "context": "A tower stands on the cape. Old Marten keeps the light. " * 30, "answers": ["Old Marten", "Marten"],
     "length": 330, "dataset": dataset, "language": "en", "all_classes": None, "_id": f"{n:04x}"}
    for n, dataset in enumerate(["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"])
]  # fmt: skip


def test_longbench_sets(tmp_path):
    items = files.longbench(lines(tmp_path, *LONGBENCH, {**LONGBENCH[0], "dataset": "gov_report"}), "longbench")
    assert [i.task for i in items] == list(files.LONGBENCH)
    assert {i.metric for i in items} == {"f1"} and items[0].answers == ["Old Marten", "Marten"]
    assert [i.max_tokens for i in items] == [128, 128, 64, 32, 32, 32]


def test_longbench_context_loses_its_middle(tmp_path):
    context = "".join(f"Sentence number {i}. " for i in range(400))
    item = files.longbench(lines(tmp_path, {**LONGBENCH[0], "context": context}), "longbench", length=500)[0]
    assert 490 <= item.prompt_tokens <= 500
    assert "Sentence number 0." in item.prompt and "Sentence number 399." in item.prompt
    assert "Sentence number 200." not in item.prompt and item.prompt_tokens == estimate(item.prompt + "\nAnswer:")


def test_items_are_read_as_written_and_broken_ones_named(tmp_path, capsys):
    items = [Item(id=f"i{n}", task="t", prompt="p\n\"q\" ü", answers=["a"], metric="any", max_tokens=4) for n in range(3)]
    path = tmp_path / "items.jsonl"
    write_items(items, path)
    with open(path, "a") as file:
        file.write('{"id": "i0", "task": "t", "prompt": "p", "answers": ["a"], "metric": "any", "max_tokens": 4}\n')
        file.write('{"id": "i9", "task": "t", "prompt": "p", "answers": ["a"], "metric": "best", "max_tokens": 4}\n')
        file.write('{"id": "i9", "task": "t", "prompt": "p", "answers": [], "metric": "any", "max_tokens": 4}\n')
        file.write('{"id": "i9", "prompt": "p", "answers": ["a"], "metric": "any", "max_tokens": "4"}\n\n\x00\xff\n')
    problems = []
    assert read_items(path, problems) == items
    assert len(problems) == 5
    shown = capsys.readouterr().err
    for part in ("the id i0 stands there twice", "metric 'best' is none of", "at least one string", "no field task"):
        assert part in shown


def test_a_line_cut_short_spoils_no_other(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with Appender(path) as out:
        out.write({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": \n{"a": 2}\n'


@pytest.mark.parametrize("bad", [
    {"prompt": ""}, {"max_tokens": 0}, {"max_tokens": True}, {"answers": "a"}, {"answers": [1]}, {"labels": None}, {"labels": [1]}, {"haystack": []},
    {"prefix": None}, {"target": 1}, {"prompt_tokens": "9"},
])  # fmt: skip
def test_bad_items_are_refused(bad):
    good = {"id": "i", "task": "t", "prompt": "p", "answers": ["a"], "metric": "any", "max_tokens": 4}
    with pytest.raises(ValueError, match=next(iter(bad))):
        Item(**{**good, **bad})


def test_the_last_number_is_compared_with_a_number(capsys, tmp_path):
    good = {"id": "i", "task": "t", "prompt": "p", "answers": ["24"], "metric": "last_number", "max_tokens": 4}
    (item,) = read_items(lines(tmp_path, good, {**good, "id": "j", "answers": ["<24>"]}))
    assert item.id == "i" and "answers[0] ('<24>') must be a whole number" in capsys.readouterr().err


def test_numbers_and_lists_of_published_files_are_named(capsys, tmp_path):
    record = {"random_idx": ["torpid-kid", 7], "expected_number": 2416, "prompt": "lines"}
    path = tmp_path / "set.jsonl"
    path.write_text("".join(line + "\n" for line in (
        json.dumps(record).replace("2416", "1e400"), json.dumps(record | {"random_idx": []}), '{"a":' * 100000, json.dumps(record))))  # fmt: skip
    assert len(files.longeval(path, "longeval")) == 1
    shown = capsys.readouterr().err
    for number, what in enumerate(("expected_number (inf) must be a whole number", "random_idx ([]) must be a list", "nested too deeply"), 1):
        assert f"set.jsonl:{number}: skipped: {what}" in shown


def test_items_replace_a_file_when_they_are_whole(tmp_path):
    path, link = tmp_path / "items", tmp_path / "link"
    path.write_text("earlier")
    link.symlink_to(path)
    item = Item(id="i", task="t", prompt="p", answers=["a"], metric="any", max_tokens=4)

    def broken():
        yield item
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_items(broken(), path)
    assert path.read_text() == "earlier" and sorted(os.listdir(tmp_path)) == ["items", "link"]
    mask = os.umask(0o027)
    write_items([item], link)
    os.umask(mask)
    assert read_items(path) == [item] and link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["items", "link"]


def test_bad_files_and_numbers_are_named(tmp_path, capsys):
    out, bad, binary = str(tmp_path / "items.jsonl"), tmp_path / "bad.json", tmp_path / "binary"
    bad.write_text('{"data": [{"title": "no paragraphs"}]}')
    binary.write_bytes(b"\xff\xfe\0")

    def refused(code, what, *arguments):
        (tmp_path / "items.jsonl").write_text("earlier")
        try:
            status = main([*arguments, "-o", out])
        except SystemExit as error:
            status = error.code
        shown = capsys.readouterr().err
        assert status == code and what in shown, shown
        assert (tmp_path / "items.jsonl").read_text() == "earlier"

    make = ["make", "--length", "600", "--tasks"]
    for form, task in (("squad", "qa_1"), ("hotpotqa", "qa_2")):
        refused(1, f"{bad} is not of the form", *make, task, f"--{form}", str(bad))
    refused(1, f"{binary} is not of the form", *make, "niah_single_2", "--haystack", str(binary))
    refused(1, "no connection to http://127.0.0.1:9/v1", *make, "vt", "--server", "http://127.0.0.1:9/v1")
    refused(1, f"no items in {lines(tmp_path, 'broken')}", "load", "babilong", str(tmp_path / "set.jsonl"))
    bad.write_text("[" * 100000)
    refused(1, f"{bad} is not of the form that is asked for: nested too deeply", *make, "qa_1", "--squad", str(bad))
    refused(2, "0 must be in 1..", *make, "vt", "-n", "0")
    for device, what in (("/dev/full", "no regular file"), (str(tmp_path), "is a directory"), (str(tmp_path / "no" / "items"), "no folder")):
        assert main([*make, "vt", "-o", device]) == 1 and what in capsys.readouterr().err
    refused(2, "0 must be in 1..", *make, "vt", "--questions", "0")
    refused(2, "-2 must be in 0..", "load", "babilong", str(bad), "-n", "-2")
