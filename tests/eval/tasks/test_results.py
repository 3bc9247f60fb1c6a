import json

import pytest
from tasks.__main__ import main
from tasks.items import Item, write_items
from tasks.results import summarize


def write(tmp_path, count, answers, metric="any", right=("yes",), haystack=lambda n: ""):
    items = [
        Item(id=f"i{n}", task="t", prompt="p", answers=list(right), metric=metric, max_tokens=4, haystack=haystack(n))
        for n in range(count)
    ]
    write_items(items, tmp_path / "items")
    with open(tmp_path / "results", "w") as file:
        for answer in answers:
            file.write((answer if isinstance(answer, str) else json.dumps(answer)) + "\n")
    return summarize([tmp_path / "items"], [tmp_path / "results"], "dense")


def line(n, mode, output, **more):
    return {"id": f"i{n}", "mode": mode, "output": output, **more}


def test_scores_and_paired_test(tmp_path):
    # Dense is right on 0-5, sparse on 0-3 and 6-9; item 10 is missing in sparse, 11 in both.
    answers = [line(n, "dense", "yes" if n < 6 else "no") for n in range(11)]
    answers += [line(n, "sparse", "yes" if n < 4 or n > 5 else "no") for n in range(10)]
    answers += [{"id": "i10", "mode": "sparse", "error": "status 500"}]
    dense, sparse = write(tmp_path, 12, answers).rows
    assert (dense["mode"], dense["n"], dense["missing"], dense["score"]) == ("dense", 11, 1, pytest.approx(6 / 11))
    assert (sparse["n"], sparse["missing"], sparse["score"]) == (10, 2, 0.8)
    assert (sparse["pairs"], sparse["only_mode"], sparse["only_baseline"]) == (10, 4, 2)
    assert sparse["score_minus"] == pytest.approx(0.2)
    assert sparse["p"] == pytest.approx(2 * (1 + 6 + 15) / 64)
    assert sparse["score_minus_95"][0] < 0 < sparse["score_minus_95"][1]
    assert "score_minus" not in dense


def test_haystacks_are_counted_of_all_answers_and_of_the_pairs(tmp_path):
    answers = [line(n, "sparse", "yes") for n in range(6)] + [line(n, "dense", "yes") for n in range(2)]
    _, sparse = write(tmp_path, 6, answers, haystack=lambda n: f"h{n // 2}").rows
    assert (sparse["n"], sparse["haystacks"], sparse["pairs"], sparse["pair_haystacks"]) == (6, 3, 2, 1)


def test_a_baseline_that_is_not_there_is_refused(tmp_path):
    write(tmp_path, 1, [line(0, "dense", "yes"), line(0, "sparse", "yes")])
    with pytest.raises(ValueError, match="baseline, 'dens'; the modes are dense, sparse"):
        summarize([tmp_path / "items"], [tmp_path / "results"], "dens")
    write_items([Item(id="i0", task="t", prompt="p", answers=["yes"], metric="any", max_tokens=4)], tmp_path / "items")
    (tmp_path / "results").write_text(json.dumps(line(0, "sparse", "yes")) + "\n")
    (row,) = summarize([tmp_path / "items"], [tmp_path / "results"]).rows
    assert row["pairs"] == 0 and row["n"] == 1


def test_log_probabilities(tmp_path):
    answers = []
    for n, difference in enumerate([0.1, 0.2, 0.3, 0.4, 0.5]):
        answers.append(line(n, "dense", "yes", answer_logprob=-2.0 - n, kl=0.0))
        answers.append(line(n, "sparse", "yes", answer_logprob=-2.0 - n + difference, kl=0.01 * n, read_fraction=0.25))
    _, sparse = write(tmp_path, 5, answers).rows
    assert sparse["logprob"] == pytest.approx(-3.7) and sparse["kl"] == pytest.approx(0.02)
    assert sparse["read_fraction"] == 0.25 and sparse["logprob_minus"] == pytest.approx(0.3)
    assert sparse["logprob_minus_95"] == pytest.approx([0.3 - 0.196324, 0.3 + 0.196324], rel=1e-5)


def test_partial_scores_are_compared_by_their_means(tmp_path):
    answers = [line(n, "dense", "a b") for n in range(4)] + [line(n, "sparse", "a b" if n else "a") for n in range(4)]
    _, sparse = write(tmp_path, 4, answers, "all", ("a", "b")).rows
    assert sparse["score_minus"] == pytest.approx(-0.125) and "p" not in sparse
    half = 3.18245 * 0.25 / 2
    assert sparse["score_minus_95"] == pytest.approx([-0.125 - half, -0.125 + half], rel=1e-5)


def test_equal_partial_scores_are_not_certain_after_a_few_items(tmp_path):
    for count, room in ((1, 0.7935), (54, 0.0664)):
        answers = [line(n, mode, "a") for n in range(count) for mode in ("dense", "sparse")]
        _, sparse = write(tmp_path, count, answers, "all", ("a", "b")).rows
        assert sparse["score_minus_95"] == pytest.approx([-room, room], abs=1e-4)


@pytest.mark.parametrize("right", [("yes",), ("yes", "no")])
def test_copies_of_items_on_one_haystack_make_nothing_more_certain(tmp_path, right):
    def table(copies):
        answers = []
        for n in range(12 * copies):
            item = n // copies
            answers.append(line(n, "dense", "yes" if item < 7 else "no", answer_logprob=-1.0 - item % 3))
            answers.append(line(n, "sparse", "yes" if item < 5 or item > 9 else "nothing", answer_logprob=-1.0 - item % 4))
        metric = "any" if len(right) == 1 else "all"
        return write(tmp_path, 12 * copies, answers, metric, right, lambda n: f"h{n // copies}").rows

    for one, several in zip(table(1), table(3)):
        assert (one["n"], several["n"], one["haystacks"], several["haystacks"]) == (12, 36, 12, 12)
        for name in set(one) & {"score_95", "score_minus_95", "logprob_minus_95", "p"}:
            assert several[name] == pytest.approx(one[name]), name
    assert "score_minus_95" in several and "logprob_minus_95" in several


def test_one_log_probability_has_no_interval(tmp_path):
    answers = [line(0, mode, "yes", answer_logprob=-1.0) for mode in ("dense", "sparse")]
    _, sparse = write(tmp_path, 1, answers).rows
    assert sparse["logprob_minus"] == 0 and "logprob_minus_95" not in sparse


def test_a_later_answer_heals_an_error_and_no_error_undoes_an_answer(tmp_path):
    error = {"id": "i0", "mode": "dense", "error": "x"}
    for order in ([error, line(0, "dense", "yes")], [line(0, "dense", "yes"), error]):
        (row,) = write(tmp_path, 1, order).rows
        assert (row["n"], row["missing"], row["score"]) == (1, 0, 1)


def test_broken_lines_are_named_skipped_and_counted(tmp_path, capsys):
    answers = [line(0, "dense", "yes"), '{"id": "i1", "mo', {"id": "i1", "mode": "dense"}, line(1, "dense", 5)]
    answers += [line(1, "dense", "yes", answer_logprob="high"), line(7, "dense", "yes")]
    table = write(tmp_path, 2, answers)
    assert (table.rows[0]["n"], table.rows[0]["missing"]) == (1, 1)
    assert table.notes == ["4 broken line(s) skipped", "1 result(s) of items that are not in the item files"]
    shown = capsys.readouterr().err
    assert "results:2: skipped" in shown and "no field 'output'" in shown and "answer_logprob ('high')" in shown
    assert "4 broken" in table.markdown()


def test_a_table_without_a_row_is_no_success(tmp_path, capsys):
    write(tmp_path, 1, ['{"broken'])
    assert main(["summary", "--items", str(tmp_path / "items"), str(tmp_path / "results")]) == 1
    assert "1 broken line(s) skipped" in capsys.readouterr().out
    write(tmp_path, 1, [line(0, "dense", "yes")])
    assert main(["summary", "--items", str(tmp_path / "items"), str(tmp_path / "results")]) == 0


def test_no_answer_at_all_is_no_score(tmp_path):
    (row,) = write(tmp_path, 3, [{"id": "i0", "mode": "dense", "error": "x"}]).rows
    assert (row["n"], row["missing"], row["score"]) == (0, 3, None)
    assert "| t | dense | 0 | 0 | 3 | - |" in summarize([tmp_path / "items"], [tmp_path / "results"], "dense").markdown()
    assert json.loads(summarize([tmp_path / "items"], [tmp_path / "results"], "dense").json())["missing"] == 3


def test_two_files_with_different_items_of_one_id_are_refused(tmp_path):
    write(tmp_path, 1, [])
    write_items([Item(id="i0", task="t", prompt="other", answers=["a"], metric="any", max_tokens=4)], tmp_path / "more")
    with pytest.raises(ValueError, match="two different items have the id i0"):
        summarize([tmp_path / "items", tmp_path / "more"], [], "dense")


def test_the_worst_task_is_named(tmp_path):
    items = [Item(id=f"{task}{n}", task=task, prompt="p", answers=["yes"], metric="any", max_tokens=4) for task in "ab" for n in range(10)]
    write_items(items, tmp_path / "items")
    with open(tmp_path / "results", "w") as file:
        for task, right, loss in (("a", 10, 0.5), ("b", 2, 0.0)):
            for n in range(10):
                jitter = 0.01 * (n % 2) - 0.005
                for mode, output, logprob in (("dense", "yes", -1.0), ("sparse", "yes" if n < right else "no", -1.0 - loss + jitter)):
                    file.write(json.dumps({"id": f"{task}{n}", "mode": mode, "output": output, "answer_logprob": logprob}) + "\n")
    (note,) = summarize([tmp_path / "items"], [tmp_path / "results"], "dense").notes
    assert note == "sparse: worst score b -0.800, 1 of 2 intervals without 0; worst log-probability a -0.500, 1 of 2 intervals without 0"


def test_a_figure_that_is_no_number_is_named(tmp_path, capsys):
    table = write(tmp_path, 1, [line(0, "dense", "yes", read_fraction="0.2"), '{"id": "i0", "mode": "dense", "output": "yes", "kl": 1e400}'])
    shown = capsys.readouterr().err
    assert "read_fraction ('0.2') must be a finite number" in shown and "kl (inf) must be a finite number" in shown
    assert table.rows == []


def test_thousands_of_digits_are_a_wrong_answer(tmp_path):
    (row,) = write(tmp_path, 2, [line(0, "dense", "9" * 5000), line(1, "dense", "7")], metric="last_number", right=("7",)).rows
    assert row["score"] == 0.5
