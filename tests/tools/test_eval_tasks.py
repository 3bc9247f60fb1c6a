"""`tactic eval tasks` on a real model: TACTIC_TEST_MODEL names it, TACTIC_TEST_COMMAND the command."""

import json
import os
import shutil
import subprocess

import pytest
from tasks import ruler
from tasks.items import Appender, Item, write_items
from tasks.results import summarize

MODEL, COMMAND = os.environ.get("TACTIC_TEST_MODEL"), os.environ.get("TACTIC_TEST_COMMAND")
if not (MODEL and COMMAND):  # of the whole file, so that ctest, too, sees that nothing was tested
    pytest.skip("TACTIC_TEST_MODEL or TACTIC_TEST_COMMAND is not set", allow_module_level=True)
MODES = "stock;sample,error=0.02,min_context=256"


def run(items, out, *more, modes=MODES, code=0, model=MODEL):
    command = [COMMAND, "eval", "tasks", "-m", model, "--items", items, "-o", out, "--modes", modes, "--max-tokens", "6", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    items = ruler.make_items("niah_multikey_1", 0, 700, 1, ruler.Context(), questions=2)  # one haystack
    bare = Item(id="bare", task="hello", prompt=items[0].prompt, answers=["x"], metric="any", max_tokens=2)
    write_items([*items, bare], path)
    with open(path, "a") as file:
        file.write('{"id": "broken", "task": "t"}\n{"id": "cut\n')
    return path


def test_lines_resume_and_summary(made, tmp_path):
    out = tmp_path / "out.jsonl"
    first = run(made, out, "--limit", "1", code=3)  # of the broken lines
    assert "items.jsonl:4: skipped" in first.stderr and "items.jsonl:5: skipped" in first.stderr
    assert "1 of 1 items" in first.stdout and "2 broken line(s)" in first.stdout
    names = ["dense", "stock", "sample,error=0.02,min_context=256"]
    dense, stock, sparse = lines(out)
    assert [line["mode"] for line in (dense, stock, sparse)] == names
    assert dense["kl"] == 0 and dense["same_top"] == dense["answer_tokens"] >= 7 and dense["read_fraction"] == 1
    assert dense["answer_logprob"] < 0
    for line in (stock, sparse):
        assert 0 < line["kl"] <= line["kl_max"] < 1
        assert abs(line["answer_logprob"] - dense["answer_logprob"]) < 2
        assert line["output_tokens"] <= 6 and line["prompt_tokens"] == dense["prompt_tokens"] > 650
    assert not stock["taken"] and sparse["taken"] and sparse["read_fraction"] < 1

    # The process was killed in the middle of a line: what is missing is done, what is there is not done again.
    whole = out.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:2]) + whole[2][:40])
    done = run(made, out, code=3)
    assert "3 of 3 items" in done.stdout and "not every line of" in done.stderr
    good = [line for line in out.read_text().splitlines() if line.endswith("}")]
    assert good[:2] == [line.rstrip("\n") for line in whole[:2]]
    again = {(r["id"], r["mode"]): r for r in map(json.loads, good)}
    assert len(good) == len(again) == 9
    assert again[sparse["id"], sparse["mode"]] == sparse  # same item, same mode: same bits

    # An item whose first batch comes from the item before has the bits of one that is prefilled alone.
    alone = tmp_path / "alone.jsonl"
    (tmp_path / "second.jsonl").write_text(made.read_text().splitlines(keepends=True)[1])
    run(tmp_path / "second.jsonl", alone)
    assert [again[r["id"], r["mode"]] for r in lines(alone)] == lines(alone)
    assert "answer_logprob" not in again["bare", "dense"]

    rows = summarize([made], [out], "dense").rows
    assert {(r["task"], r["mode"]): r["n"] for r in rows} == {(t, m): n for t, n in (("niah_multikey_1", 2), ("hello", 1)) for m in names}
    assert "another text, model or setting" in run(made, out, "--yarn", "2", code=1).stderr
    assert run(made, out, code=3).stdout.startswith("3 of 3 items") and len(out.read_text().splitlines()) == 10


def test_a_mode_that_is_never_sparse_is_named(made, tmp_path):
    done = run(made, tmp_path / "out.jsonl", "--limit", "1", modes="quality=high;stock;sample,error=0.02,min_context=256", code=3)
    assert done.stderr.count("read everything") == 1 and "quality=high read everything" in done.stderr


def test_two_processes_do_not_answer_into_one_file(made, tmp_path):
    with Appender(tmp_path / "out.jsonl"):
        done = run(made, tmp_path / "out.jsonl", code=1)
    assert "another process writes it" in done.stderr


def test_other_items_are_not_mixed(made, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"id": "bare", "mode": "dense", "output": "", "fingerprint": "of another text"}) + "\n")
    assert "item bare with another text, model or setting" in run(made, out, code=1).stderr
    assert len(lines(out)) == 1


def test_models_of_one_name_are_not_mixed(tmp_path):
    write_items([Item(id="bare", task="t", prompt="A word or two.", answers=["x"], metric="any", max_tokens=2)], tmp_path / "items")
    run(tmp_path / "items", tmp_path / "out", modes="stock")
    other = tmp_path / os.path.basename(MODEL)
    shutil.copy(MODEL, other)
    with open(other, "ab") as file:
        file.write(b"\0" * 32)
    assert "another text, model or setting" in run(tmp_path / "items", tmp_path / "out", modes="stock", model=other, code=1).stderr
    assert len(lines(tmp_path / "out")) == 2


def test_no_exact_answers_of_a_cache_that_is_left_to_llama(tmp_path):
    write_items([Item(id="bare", task="t", prompt="A word or two.", answers=["x"], metric="any", max_tokens=2)], tmp_path / "items")
    assert "no exact reference" in run(tmp_path / "items", tmp_path / "out", "--cache-type", "f32", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_zero_byte_does_not_end_the_prompt(tmp_path):
    prompt = "word " * 60 + "\0" + "word " * 60
    write_items([Item(id="zero", task="t", prompt=prompt, answers=["x"], metric="any", max_tokens=2)], tmp_path / "items")
    done = run(tmp_path / "items", tmp_path / "out", modes="stock;dense; stock")
    assert "item zero: zero bytes are replaced" in done.stderr
    assert lines(tmp_path / "out")[0]["prompt_tokens"] > 120
    assert [line["mode"] for line in lines(tmp_path / "out")] == ["dense", "stock"]  # one of a mode that is named twice


def test_a_field_of_another_kind_is_named(tmp_path):
    good = {"id": "a", "task": "t", "prompt": "A word or two.", "max_tokens": 2, "answers": ["x"], "metric": "any"}
    broken = [good | {"max_tokens": "two"}, good | {"max_tokens": 1.5}, good | {"prefix": None}, {"id": "a", "task": "t", "max_tokens": 2}]
    broken += [good | {"metric": "some"}, good | {"answers": []}, good | {"answers": ["x", 5]},
               good | {"metric": "last_number", "answers": ["4."]}]
    (tmp_path / "items").write_text("".join(json.dumps(record) + "\n" for record in broken) + "[1]\n" + json.dumps(good) + "\n")
    said = run(tmp_path / "items", tmp_path / "out", modes="stock", code=3).stderr
    for number, text in enumerate(('max_tokens ("two") must be a whole number', "max_tokens (1.5) must be a whole number",
                                   "prefix (null) must be a string", "no field prompt", "metric 'some' is none of", "answers must be a list",
                                   "answers must be a list", "answers[0] ('4.') must be a whole number", "not a JSON object"), 1):
        assert f"items:{number}: skipped: {text}" in said


def test_too_long_items_and_bad_arguments(made, tmp_path):
    out = tmp_path / "out.jsonl"
    write_items([Item(id="long", task="t", prompt="word " * 9000, answers=["x"], metric="any", max_tokens=2)], tmp_path / "long")
    done = run(tmp_path / "long", out, code=3)
    assert "long: skipped: it needs a context of" in done.stderr and "0 of 1 items are answered; " in done.stdout and "1 unfit" in done.stdout
    assert "cannot read the items" in run(tmp_path / "none", out, code=1).stderr
    assert "mode 'best=1'" in run(made, out, modes="best=1", code=1).stderr
