import pytest
from tasks.items import Item
from tasks.scores import score


def item(metric, *answers, prompt="p", labels=()):
    return Item(id="i", task="t", prompt=prompt, answers=list(answers), metric=metric, max_tokens=8, labels=list(labels))


@pytest.mark.parametrize(
    "output, value",
    [("the numbers are 123 and 456.", 1), ("123", 0.5), ("It is 123456", 1), ("", 0), ("12 3", 0)],
)
def test_all(output, value):
    assert score(output, item("all", "123", "456")) == value


def test_all_ignores_case():
    assert score("calm, LUCID", item("all", "Calm", "Lucid", "Eager")) == pytest.approx(2 / 3)


def test_any():
    question = item("any", "New York", "NYC")
    assert score("It is in nyc, I think", question) == 1
    assert score("Boston", question) == 0


PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


@pytest.mark.parametrize(
    "output, value",
    [
        ("bathroom", 1),
        ("The most recent location of Mary is the Bathroom.", 1),
        ("bathroom. Later perhaps the garden", 1),  # only the first sentence counts
        ("bathroom or kitchen", 0),
        ("the kitchen", 0),
        ("somewhere", 0),
        ("", 0),
        ("bathroom\nkitchen", 0),
    ],
)
def test_babilong(output, value):
    assert score(output, item("babilong", "bathroom", prompt="text\n\nQuestion: Where is Mary?", labels=PLACES)) == value


def test_babilongs_way_of_two_steps_is_one_label():
    ways = ["e,s", "n,n", "s,w"]
    question = item("babilong", "s,w", prompt="Question: How do you go from the hall to the garden?", labels=ways)
    assert score("s,w", question) == 1
    assert score("w,s", question) == 0
    assert score("n,n", question) == 0


def test_babilong_labels_of_the_question_do_not_count():
    question = item("babilong", "kitchen", prompt="text\n\nQuestion: What is north of the garden?", labels=PLACES)
    assert score("The kitchen is north of the garden", question) == 1
    assert score("The garden", question) == 0


def test_babilong_several_targets():
    question = item("babilong", "milk,apple", prompt="text\n\nQuestion: What is Mary carrying?", labels=["milk", "apple", "football"])
    assert score("The apple and the milk", question) == 1
    assert score("The apple", question) == 0
    assert score("The apple, the milk and the football", question) == 0


@pytest.mark.parametrize(
    "output, value", [("<2416>", 1), ("I said 7, but it is 2416", 1), ("2416 or 7", 0), ("none", 0), ("02416", 1), ("24160", 0), ("9" * 5000, 0)]
)
def test_last_number(output, value):
    assert score(output, item("last_number", "2416")) == value


@pytest.mark.parametrize(
    "output, answers, value",
    [
        ("The Eiffel Tower", ["eiffel tower"], 1),
        ("tower", ["Eiffel Tower!"], 2 / 3),
        ("a b c d", ["c d e f"], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # "a" is an article
        ("x", ["y", "x z"], 2 / 3),
        ("", ["y"], 0),
        ("red red", ["red"], 2 / 3),
    ],
)
def test_f1(output, answers, value):
    assert score(output, item("f1", *answers)) == pytest.approx(value)
