import json
import re
from pathlib import Path

import pytest
from tasks import files, ruler
from tasks.tokens import estimate, largest_size
from tasks.words import Haystack, keys, plain_words

import random

SAMPLES = Path(ruler.__file__).parent / "samples"
NAMES = [name for name in ruler.TASKS if not name.startswith("qa_")]
# Tokens of one unit of filler by the estimate, at most: how far below the length an item may stay.
UNIT = {"niah_multikey_2": 40, "niah_multikey_3": 140, "cwe": 60}


def make(task, index=0, length=3000, seed=1, **context):
    (item,) = ruler.make_items(task, index, length, seed, ruler.Context(**context))
    return item


@pytest.fixture
def squad_file(tmp_path):
    paragraphs = [
        {
            "context": f"Passage {i} says that the town of Place{i} lies {i} miles from the sea and has a mill.",
            "qas": [
                {"question": f"How far from the sea is Place{i}?", "answers": [{"text": f"{i} miles"}, {"text": f"{i} miles"}]},
                {"question": "Impossible?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(100, 300)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture
def hotpotqa_file(tmp_path):
    entries = [
        {
            "question": f"Who paints the harbor of Town{i}?",
            "answer": f"Painter{i}",
            "supporting_facts": [[f"Town{i}", 0], [f"Harbor{i}", 1]],
            "context": [[f"{kind}{i}", [f"{kind} {i} stands here.", f" It was painted by Painter{i}."]] for kind in ("Town", "Other", "Harbor")],
        }
        for i in range(100, 200)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("length", [2500, 6000])
def test_length_is_met_and_never_exceeded(task, length):
    for index in range(3):
        item = make(task, index, length)
        assert item.prompt_tokens == estimate(item.prompt + "\n" + item.prefix)
        assert length - UNIT.get(task, 25) <= item.prompt_tokens <= length


@pytest.mark.parametrize("task", NAMES)
def test_same_arguments_same_item(task):
    assert make(task, 3) == make(task, 3)
    assert make(task, 3).prompt != make(task, 4).prompt
    assert make(task, 3).prompt != make(task, 3, seed=2).prompt


@pytest.mark.parametrize(
    "task, needles, values, value",
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
        ("niah_multikey_2", None, 1, r"\d{7}"),
        ("niah_multikey_3", None, 1, r"[0-9a-f-]{36}"),
    ],
)
def test_needles(task, needles, values, value):
    for index in range(20):
        item = make(task, index)
        found = re.findall(rf"The secret (?:number|uuid) of (\S+) is ({value})\.", item.prompt)
        assert len(found) == needles if needles else len(found) > 20
        assert len({v for _, v in found}) == len(found)
        assert len(item.answers) == values == len(set(item.answers))
        for answer in item.answers:
            assert re.fullmatch(value, answer)
            assert item.prompt.count(answer) == 1
        asked = [k for k, v in found if v in item.answers]
        keys_asked = list(dict.fromkeys(asked))
        assert all(key in item.prompt.rsplit("\n", 1)[1] and key in item.prefix for key in keys_asked)
        assert len(keys_asked) == (4 if task == "niah_multiquery" else 1)
        assert [v for k, v in found if k in keys_asked] == [a for _, v in found for a in item.answers if a == v]
        assert item.target == " " + ", ".join(item.answers)


def test_multiquery_answers_stand_in_the_order_asked():
    item = make("niah_multiquery", 7)
    asked = re.findall(r"[a-z]+-[a-z]+", item.prefix)
    owner = dict(re.findall(r"of (\S+) is (\d{7})\.", item.prompt))
    assert [owner[key] for key in asked] == item.answers


@pytest.mark.parametrize("task, questions", [("niah_multikey_1", 4), ("niah_multikey_2", 7), ("niah_single_2", 1), ("vt", 1)])
def test_several_questions_to_one_haystack(task, questions):
    items = ruler.make_items(task, 0, 2000, 1, ruler.Context(), questions=7)
    assert len(items) == questions == len({i.id for i in items}) == len({i.answers[0] for i in items})
    assert max(i.prompt_tokens for i in items) <= 2000 and min(i.prompt_tokens for i in items) > 1940
    haystacks = {item.prompt.rsplit("\n\n", 1)[0] for item in items}
    assert len(haystacks) == 1
    assert {item.haystack for item in items} == {items[0].id}
    if task != "vt":
        for item in items:
            key = re.search(r"secret number of (\S+) is$", item.prefix).group(1)
            assert f"The secret number of {key} is {item.answers[0]}." in item.prompt


def test_needles_lie_anywhere():
    places = [item.prompt.index(item.answers[0]) / len(item.prompt) for item in (make("niah_single_2", i) for i in range(60))]
    assert min(places) < 0.15 and max(places) > 0.85 and 0.35 < sum(places) / 60 < 0.65


def test_variable_tracking_chain():
    for index in range(20):
        item = make("vt", index)
        example, task = item.prompt.split("\n\nFollow the assignments", 1)
        steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", task)
        assert [name for name, _ in steps] == item.answers and len(steps) == 5
        assert [right for _, right in steps[1:]] == item.answers[:-1]
        assert task.count(steps[0][1]) == 2  # assigned, and asked for
        assert not any(name in example for name in item.answers)


def test_common_words_counts():
    for index in range(10):
        item = make("cwe", index)
        task = item.prompt.rsplit("Here is a numbered list", 1)[1]
        words = re.findall(r"\d+\. (\w+)", task)
        counts = {word: words.count(word) for word in set(words)}
        assert {counts[word] for word in item.answers} == {30} and len(set(item.answers)) == 10
        assert {n for word, n in counts.items() if word not in item.answers} == {3}


def test_frequent_words_are_the_three_after_the_dots():
    for index in range(10):
        item = make("fwe", index)
        words = item.prompt.split("\n")[1].split()
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert counts[0][1] == "..."
        assert [word for _, word in counts[1:4]] == item.answers
        assert counts[3][0] > counts[4][0]
        # Counts fall as rank ** -2: rank 2 to rank 4 as 4 to 1.
        assert counts[1][0] / counts[3][0] == pytest.approx(4, rel=0.15)


def test_squad_questions(squad_file):
    data = files.squad(squad_file)
    assert len(data.questions) == 200
    for index in range(5):
        item = make("qa_1", index, questions={"squad": data})
        own = item.prompt.rsplit("Place", 1)[1].split("?")[0]
        assert item.answers == [f"{own} miles"] and item.prompt.count(f"Passage {own} says") == 1
        assert item.prompt.count("Document ") > 20 and item.prompt_tokens > 2900


def test_hotpotqa_questions_have_all_their_passages(hotpotqa_file):
    item = make("qa_2", 2, questions={"hotpotqa": files.hotpotqa(hotpotqa_file)})
    own = re.search(r"harbor of Town(\d+)", item.prompt).group(1)
    assert item.answers == [f"Painter{own}"] and item.metric == "any"
    assert item.prompt.count(f"Town{own}\n") == 1 and item.prompt.count(f"Harbor{own}\n") == 1


@pytest.mark.parametrize("task, source, number", [("qa_1", "squad", 69), ("qa_2", "hotpotqa", 60)])
def test_each_question_of_a_file_is_asked_once_before_one_is_asked_again(task, source, number):
    data = files.QUESTIONS[source](SAMPLES / f"{source}.json")
    assert len(data.questions) == number
    items = [make(task, index, length=1500, questions={source: data}) for index in range(number + 1)]
    asked = [item.prompt.rsplit("Question: ", 1)[1] for item in items]
    assert len(set(asked)) == number and asked[number] == asked[0]
    assert all(item.answers[0] in item.prompt for item in items)


def test_questions_that_cannot_be_made_say_why(squad_file):
    with pytest.raises(ValueError, match="needs a file of the form of squad"):
        make("qa_1")
    with pytest.raises(ValueError, match="all 200 passages make fewer than the 90000 tokens"):
        make("qa_1", length=90000, questions={"squad": files.squad(squad_file)})
    with pytest.raises(ValueError, match=r"niah_single_1: length \(20\) is below the \d+ tokens"):
        make("niah_single_1", length=20)


def test_a_users_text_is_the_haystack():
    text = "One fish swims. Two birds fly! Did three cats sleep? Four dogs bark."
    item = make("niah_single_2", haystack=Haystack(text))
    assert item.prompt.count("Two birds fly!") > 50
    with pytest.raises(ValueError, match="empty"):
        Haystack(" \n")


def test_values_are_not_those_of_the_users_text():
    # Every number that the first draw of any of these items would take stands in the text.
    plain = [make("niah_single_2", i).answers[0] for i in range(5)]
    haystack = Haystack(" ".join(f"The number {v} is old." for v in plain))
    assert not {make("niah_single_2", i, haystack=haystack).answers[0] for i in range(5)} & set(plain)


def test_many_keys_and_words_are_distinct():
    rng = random.Random(1)
    for count in (10, 5000, 20000):
        assert len(set(keys(rng, count))) == count
    assert len(set(plain_words(rng, 3000))) == 3000


def test_largest_size():
    assert [largest_size(lambda n: 10 + 3 * n, length) for length in (10, 12, 13, 100, 1000)] == [0, 0, 1, 30, 330]
    assert largest_size(lambda n: 10 + 3 * n, 1000, largest=20) == 20
    with pytest.raises(ValueError, match="length \\(9\\)"):
        largest_size(lambda n: 10 + n, 9)
