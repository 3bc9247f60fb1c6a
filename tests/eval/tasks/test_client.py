import json

import httpx
import pytest
from fake_server import FakeServer, answer_to
from tasks.__main__ import main
from tasks.client import GIVE_UP_AFTER, Settings, ask_all
from tasks.items import Appender, Item, write_items
from tasks.results import summarize
from tqdm import tqdm


def items(count):
    # Right by the fake server's answers: all.
    return [
        Item(id=f"t-{n}", task="t", prompt=f"prompt {n}", answers=[answer_to(f"prompt {n}")], metric="any", max_tokens=9, prefix="So:")
        for n in range(count)
    ]


def run(server, out, count=4, sleep=lambda _: None, **settings):
    settings = {"timeout_s": 10, "attempts": 3, "mode": "sparse", "model": "m"} | settings
    return ask_all(items(count), out, Settings(server=getattr(server, "url", server), **settings), sleep)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(tmp_path, out, count=4):
    write_items(items(count), tmp_path / "items.jsonl")
    (row,) = summarize([tmp_path / "items.jsonl"], [out]).rows
    return row["n"], row["missing"], row["score"]


def test_chat(tmp_path):
    with FakeServer() as server:
        report = run(server, tmp_path / "out")
    assert report.complete and report.answered == 4
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m", "max_tokens": 9, "temperature": 0, "seed": 1, "stream": False,
        "messages": [{"role": "user", "content": "prompt 0"}],
    }  # fmt: skip
    line = lines(tmp_path / "out")[0]
    assert (line["id"], line["mode"], line["output"]) == ("t-0", "sparse", answer_to("prompt 0"))
    assert (line["prompt_tokens"], line["output_tokens"], line["complete"], line["attempts"]) == (7, 3, True, 1)


def test_completions_get_the_prefix(tmp_path):
    with FakeServer() as server:
        run(server, tmp_path / "out", api="completions", max_tokens=2)
    path, body = server.requests[1]
    assert path == "/v1/completions" and body["prompt"] == "prompt 1\nSo:" and body["max_tokens"] == 2


BAD = ["nested", "500", "503", "429", "garbage", "binary", "zip", "empty", "list", "null", "aborted", "cut", "short", "hang up"]


@pytest.mark.parametrize("bad", BAD)
def test_one_failure_is_healed_by_another_attempt(tmp_path, bad):
    with FakeServer(["good", bad]) as server:
        report = run(server, tmp_path / "out")
    assert report.complete and len(server.requests) == 5
    assert [line["attempts"] for line in lines(tmp_path / "out")] == [1, 2, 1, 1]
    assert summary(tmp_path, tmp_path / "out") == (4, 0, 1.0)


@pytest.mark.parametrize("bad", BAD)
def test_an_item_without_valid_answer_is_missing_and_asked_again(tmp_path, bad):
    with FakeServer([bad] * 3) as server:
        report = run(server, tmp_path / "out")
        assert (report.answered, report.failed, report.complete) == (3, 1, False)
        assert "error" in lines(tmp_path / "out")[0] and "output" not in lines(tmp_path / "out")[0]
        assert summary(tmp_path, tmp_path / "out") == (3, 1, 1.0)  # neither right nor wrong
        report = run(server, tmp_path / "out")
    assert (report.answered, report.had, report.complete) == (1, 3, True)
    assert summary(tmp_path, tmp_path / "out") == (4, 0, 1.0)
    assert len(server.requests) == 7


@pytest.mark.parametrize("bad", ["slow", "drip"])
def test_slow_answers_end_at_the_deadline(tmp_path, bad):
    with FakeServer([bad, "good", bad, bad, bad]) as server:
        report = run(server, tmp_path / "out", count=2, timeout_s=0.3)
    assert (report.answered, report.failed) == (1, 1)
    assert "within 0.3 s" in lines(tmp_path / "out")[1]["error"]


def test_pauses_grow_and_the_servers_wish_is_heard(tmp_path):
    pauses = []
    with FakeServer(["garbage"] * 4 + ["503"]) as server:
        run(server, tmp_path / "out", count=2, sleep=pauses.append, attempts=4, pause_s=2)
    assert pauses == [2, 4, 8, 7]  # the second item's 503 says retry-after: 7


def test_a_refusal_is_not_repeated(tmp_path):
    with FakeServer(["400"]) as server:
        report = run(server, tmp_path / "out")
    assert report.failed == 1 and len(server.requests) == 4
    assert lines(tmp_path / "out")[0]["error"] == "status 400: overloaded"


def test_server_dies_in_the_middle_and_comes_back(tmp_path):
    count, out = 20, tmp_path / "out"
    server = FakeServer()
    play = server.play

    def dying(handler, act, body):
        if len(server.requests) == 6:
            handler.close_connection = True
            server.stop()
            return
        play(handler, act, body)

    server.play = dying
    report = run(server, out, count=count)
    assert (report.answered, report.failed) == (5, GIVE_UP_AFTER)
    assert report.left == count - 5 - GIVE_UP_AFTER and not report.complete
    assert summary(tmp_path, out, count) == (5, count - 5, 1.0)
    # The run itself was killed while it wrote a line.
    with open(out, "a") as file:
        file.write('{"id": "t-9", "mode": "sparse", "outp')
    with FakeServer() as again:
        report = run(again, out, count=count)
    assert (report.had, report.answered, report.complete) == (5, 15, True)
    assert len(again.requests) == 15
    assert summary(tmp_path, out, count) == (20, 0, 1.0)
    with FakeServer() as idle:
        assert run(idle, out, count=count).had == 20
    assert idle.requests == []


def test_no_server_at_all(tmp_path, capsys):
    with FakeServer() as server:
        pass
    report = run(server, tmp_path / "out", count=10)
    assert (report.failed, report.left, report.answered) == (GIVE_UP_AFTER, 7, 0)
    assert "ConnectError: " in capsys.readouterr().err
    server.url = server.url.replace("http", "ftp")
    with pytest.raises(ValueError, match="must begin with http:// or https://"):
        run(server, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wish", ["nan", "inf", "-5", "soon"])
def test_wishes_that_are_none_are_not_heard(tmp_path, wish):
    pauses = []
    with FakeServer([f"503 {wish}"]) as server:
        assert run(server, tmp_path / "out", sleep=pauses.append, pause_s=2).complete
    assert pauses == [300 if wish == "inf" else 2]


def test_half_a_character_costs_one_letter(tmp_path):
    with FakeServer(["half"]) as server:
        assert run(server, tmp_path / "out").complete
    assert lines(tmp_path / "out")[0]["output"] == answer_to("prompt 0") + "?"


def test_an_address_without_a_machine_counts_as_no_connection(tmp_path, monkeypatch):
    def post(*_, **__):
        raise httpx.ConnectTimeout("")

    monkeypatch.setattr(httpx.Client, "stream", post)
    report = run("http://127.0.0.1:1/v1", tmp_path / "out", count=10)
    assert (report.failed, report.left) == (GIVE_UP_AFTER, 7)
    assert lines(tmp_path / "out")[0]["error"] == "no connection within 10 s"


def test_an_interruption_keeps_what_was_answered_and_asks_nothing_more(tmp_path, monkeypatch):
    class Bar(tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr("tasks.client.tqdm", Bar)
    out = tmp_path / "out"
    with FakeServer() as server:
        with pytest.raises(KeyboardInterrupt):
            run(server, out, count=500)
        asked = len(server.requests)
        assert asked < 500
        assert len(lines(out)) == asked
        monkeypatch.undo()
        assert run(server, out, count=500).had == asked


def test_workers_lose_nothing(tmp_path):
    with FakeServer(["good", "500", "garbage", "cut"] * 5) as server:
        report = run(server, tmp_path / "out", count=30, workers=4, attempts=8)
    assert report.complete
    assert sorted(line["id"] for line in lines(tmp_path / "out")) == sorted(item.id for item in items(30))
    assert summary(tmp_path, tmp_path / "out", 30) == (30, 0, 1.0)


def test_a_device_is_no_place_for_results(tmp_path):
    with FakeServer() as server:
        with pytest.raises(OSError, match="/dev/zero: it is there and no regular file"):
            run(server, "/dev/zero")
        assert not server.requests


def test_two_processes_do_not_answer_into_one_file(tmp_path):
    with FakeServer() as server, Appender(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process writes it"):
            run(server, tmp_path / "out")
        assert not server.requests


def test_results_of_another_setting_are_not_mixed(tmp_path):
    with FakeServer() as server:
        run(server, tmp_path / "out")
        with pytest.raises(ValueError, match="another text, model or setting"):
            run(server, tmp_path / "out", model="other")
        assert run(server, tmp_path / "out", model="other", mode="dense").answered == 4
        assert run(server, tmp_path / "out").had == 4


def test_the_command(tmp_path, capsys):
    made, out = str(tmp_path / "items.jsonl"), str(tmp_path / "out.jsonl")
    assert main(["make", "--tasks", "niah_single_1,vt", "--length", "600", "-n", "2", "-o", made]) == 0
    with FakeServer(["400"]) as server:
        ask = ["ask", "--items", made, "-o", out, "--server", server.url]
        assert main([*ask, "--mode", "dense"]) == 3  # one item has no answer
        assert main([*ask, "--mode", "dense"]) == 0
        assert main([*ask, "--mode", "sparse"]) == 0
    capsys.readouterr()
    assert main(["summary", "--items", made, out]) == 0
    shown = capsys.readouterr().out
    assert "| niah_single_1 | sparse | 2 | 2 | 0 | 1.000" in shown and "| vt | dense | 2 | 2 | 0 | 1.000" in shown
    assert main(["make", "--tasks", "best", "--length", "600", "-o", made]) == 1
    assert "task 'best' is none of" in capsys.readouterr().err
    assert main(["summary", "--items", str(tmp_path / "none"), out]) == 1
    capsys.readouterr()
    (tmp_path / "empty").touch()
    assert main(["summary", "--items", made, str(tmp_path / "empty")]) == 1
    assert "no results in" in capsys.readouterr().err
