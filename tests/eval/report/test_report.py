"""The report from rows as the command writes them."""

import json
import math
import re

import pytest

from report import pictures, rows, tables
from report.__main__ import main, make


def error_row(setting, fraction, error, text="prose"):
    return {"verb": "eval trace", "trace": text, "model": "m", "setting": setting, "tokens_per_kv_head": 8000 * fraction, "read_fraction": fraction,
            "mean_error": error, "median_error": error, "p99_error": 4 * error, "max_error": 9 * error,
            "max_at": {"layer": 1, "head": 2, "position": 8100}, "worst_head": {"layer": 3, "head": 4, "mean_error": 2 * error},
            "error_by_layer": [error, 2 * error, error]}


def kl_row(mode, fraction, kl, taken=True, error=None, depth=7168):
    row = {"verb": "eval kl", "text": "prose", "model": "m", "mode": mode, "depth": depth, "taken": taken, "read_fraction": fraction,
           "tokens_per_kv_head": 700, "mean_kl": kl, "mean_kl_95": [kl / 2, kl * 2], "p99_kl": 4 * kl, "max_kl": 9 * kl, "same_top": 0.9}
    return row | ({"attention_error": error} if error else {})


def task_row(mode, **more):
    return {"task": "vt", "mode": mode, "n": 40, "haystacks": 20, "missing": 0, "score": 0.5, "score_95": [0.3, 0.7], "kl": None} | more


PAPER = [
    {"table": "table1", "model": "m", "text": "prose", "target_mass": 0.9, "oracle": 400.4, "clusters": 600, "fit": 700, "achieved_mass": 0.93,
     "success": 0.71, "paper": {"model": "Llama", "oracle": 895, "clusters": 1723, "fit": 1975, "achieved_mass": 0.91, "success": 0.86}},
    {"table": "table1", "model": "m", "text": "prose", "target_mass": 0.95, "oracle": 800, "clusters": 900, "fit": 1000, "achieved_mass": 0.96, "success": 0.7},
    {"table": "value_norms", "text": "prose", "layer": 0, "quantiles": [[0, 0.1], [0.5, 1], [1, 3]]},
    {"table": "sparsity_head", "text": "prose", "layer": 0, "head": 0, "tokens": 12, "median": 3},
    {"table": "sparsity_query", "text": "prose", "position": 8000, "tokens": 12},
    {"table": "distance", "text": "prose", "order": "quest", "mass": 0.525, "error": 0.4, "cases": 10},
    {"table": "curves", "text": "prose", "curve": "a/x+b", "target_mass": 0.9, "tokens": 700, "achieved_mass": 0.93, "success": 0.71},
    {"table": "clusters", "text": "prose", "cluster_tokens": 32, "iterations": 10, "wcss_share": 0.3, "tokens": 600},
    {"table": "union", "text": "prose", "rows_own": 500, "rows_union": 900, "error_own": 0.07, "error_union": 0.04, "loads_per_row": 1.6,
     "paper": {"model": "Llama", "loads_per_row_at_most": 1.65}},
]
MEASURED = [error_row("sample,error=0.01", 0.1, 0.04), error_row("sample,error=0.02", 0.05, 0.08), error_row("quest,budget=512", 0.2, 0.2),
            error_row("sample,error=0.01", 0.1, 0.04, "all traces") | {"model": "several"},
            task_row("dense", kl=0.0),
            task_row("quality=high", kl=0.002, read_fraction=0.25, score_minus=-0.025, score_minus_95=[-0.075, 0.025], logprob_minus=-0.2,
                     logprob_minus_95=[-0.3, -0.1]),
            kl_row("quality=high", 0.16, 0.004), kl_row("quest,budget=512", 0.2, 0.05, error=0.2), kl_row("stock", 1, 0.006, taken=False)]


def write_rows(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))


def test_report_is_one_page_with_pictures_inside_and_a_markdown_table(tmp_path):
    write_rows(tmp_path / "paper.jsonl", PAPER)
    write_rows(tmp_path / "more.rows", MEASURED)
    names = make(str(tmp_path), [str(tmp_path / "more.rows")])
    assert names == ["report.html", "report.md"] + [name + ".png" for name, _, _ in pictures.PICTURES]
    for name in names[2:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures.PICTURES)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    text = (tmp_path / "report.md").read_text()
    assert "| m | prose | 90.0% | 400 | 600 | 700 | 93.0% | 71.0% | Llama | 895 | 1723 | 1975 | 91.0% | 86.0% |" in text
    assert "| m | prose | 95.0% | 800 | 900 | 1000 | 96.0% | 70.0% | - | - | - | - | - | - |" in text
    assert "| prose | quest,budget=512 | 1600 | 0.200 | 0.2000 | 0.800 | 3, 4: 0.400 | 8100: 1.80 |" in text
    assert "| prose | 7168 | quality=high | 700 | 0.160 | 0.0040 | 0.0020-0.0080 | 0.016 | 0.036 | 90.0% |" in text
    assert "| vt | quality=high | 40 | 20 | 0.500 | -0.025 (-0.075 to +0.025) | -0.200 (-0.300 to -0.100) * | 0.0020 | 0.250 |" in text
    assert "| vt | dense" not in text
    assert "stock" not in text and "all traces" not in text


def test_tasks_without_an_interval_have_no_point_and_are_counted(tmp_path):
    bare = task_row("quality=high", kl=0.002, score_minus=-0.025, logprob_minus=-0.2)
    assert pictures.score_against_kl([bare]) is None
    write_rows(tmp_path / "tasks.rows", [task_row("dense", kl=0.0), bare])
    assert make(str(tmp_path), [str(tmp_path / "tasks.rows")]) == ["report.html", "report.md"]
    assert "| vt | quality=high | 40 | 20 | 0.500 | -0.025 | -0.200 | 0.0020 | - |" in (tmp_path / "report.md").read_text()
    scored = bare | {"task": "cwe", "score_minus_95": [-0.1, 0.1]}
    assert [axis.get_title() for axis in pictures.score_against_kl([bare, scored]).axes] == ["1 of 2 without an interval left out"]
    both = scored | {"task": "fwe", "logprob_minus_95": [-0.3, -0.1]}
    titles = [axis.get_title() for axis in pictures.score_against_kl([scored, both]).axes]
    assert titles == ["", "1 of 2 without an interval left out"]


def test_methods_are_compared_at_equal_reading():
    assert tables.at_fraction([(0.4, 0.01), (0.1, 0.04)], 0.2) == pytest.approx(0.02)
    assert tables.at_fraction([(0.4, 0.01), (0.1, 0.04)], 0.05) is None
    cells = tables.equal_read([error_row("quest,budget=1", 0.1, 0.04), error_row("quest,budget=4", 0.4, 0.01), error_row("topk,budget=1", 0.1, 0.02)])
    assert cells[1:] == [["mean error", "prose", "quest", "0.0400", "0.0267", "0.0200", "0.0133"]]


def test_depths_are_not_mixed():
    two = [kl_row("topk,budget=1", 0.1, 0.04), kl_row("topk,budget=4", 0.4, 0.01), kl_row("topk,budget=4", 0.2, 0.5, depth=16000)]
    assert tables.equal_read(two)[1:] == [["mean KL", "prose after 7168", "topk", "0.0400", "0.0267", "0.0200", "0.0133"]]
    assert len(pictures.frontier(two).axes) == 2
    assert [line[1] for line in tables.kl(two)[1:]] == ["7168", "7168", "16000"]


def test_many_texts_stand_in_rows_of_three():
    axes = pictures.frontier([error_row("topk,budget=1", 0.1, 0.02) | {"trace": str(n)} for n in range(7)]).axes
    assert len(axes) == 7 and {axis.get_subplotspec().get_gridspec().get_geometry() for axis in axes} == {(3, 3)}


def test_a_row_of_too_few_tokens_has_no_interval():
    row = kl_row("topk,budget=1", 0.1, 0.04)
    assert tables.kl([row | {"steps": 24, "windows": 4}])[1][6] == "0.0200-0.0800"
    assert tables.kl([row | {"steps": 112, "windows": 1}])[1][6] == "-"  # 7 blocks of 16, in an old row
    del row["mean_kl_95"]
    assert tables.kl([row])[1][6] == "-"


def test_models_have_places_of_their_own(tmp_path):
    def sparsity(model, layers):
        return [{"table": "sparsity_head", "model": model, "text": "prose", "layer": layer, "head": 0, "tokens": 12, "median": 3} for layer in range(layers)]

    write_rows(tmp_path / "rows.jsonl", [*MEASURED, *sparsity("m", 2), *sparsity("other", 3), error_row("sample,error=0.01", 0.3, 0.02) | {"model": "other"}])
    assert "sparsity.png" in make(str(tmp_path), [])
    text = (tmp_path / "report.md").read_text()
    assert "| prose, m | sample,error=0.01 |" in text and "| prose, other | sample,error=0.01 |" in text


def test_cache_types_are_not_mixed():
    mixed = [kl_row("quality=high", 0.16, 0.004) | {"cache_type": t} for t in ("f16", "q8_0")]
    assert rows.places(rows.kl_rows(mixed)) == ["prose after 7168, f16", "prose after 7168, q8_0"]


def test_a_method_that_was_not_measured_is_left_out(tmp_path):
    assert rows.error_rows([error_row("quest,budget=512", 0, 0)]) == []


def test_layers_that_were_not_measured_are_left_out_of_the_picture():
    row = error_row("quest,budget=512", 0.2, 0.2) | {"error_by_layer": [0.1, None, 0, 0.2]}  # null; 0 in old rows
    line = pictures.by_layer([row]).axes[0].lines[0]
    assert [y for y in line.get_ydata() if not math.isnan(y)] == [0.1, 0.2] and len(line.get_ydata()) == 4


def test_a_repeated_run_replaces_its_rows():
    twice = [error_row("quest,budget=512", 0.2, 0.2), error_row("quest,budget=512", 0.2, 0.3)]
    assert [row["mean_error"] for row in rows.error_rows(twice)] == [0.3]


def test_only_what_is_there_is_shown(tmp_path):
    write_rows(tmp_path / "x.jsonl", MEASURED[:3])
    assert make(str(tmp_path), []) == ["report.html", "report.md", "frontier.png", "error_by_layer.png"]
    assert tables.kl(MEASURED[:3]) == tables.kl([])


def test_presets_are_points_of_sample_and_other_options_make_another_method():
    assert rows.method_of("magicpig,k=8,l=75") == "magicpig,k=8"
    assert rows.method_of("topk") == "topk"
    assert rows.method_of("quality=high") == "sample"
    assert rows.method_of("sample,error=0.02") == "sample"
    assert rows.method_of("quest,budget=512") == "quest"
    assert rows.method_of("sample,mass=0.9,error=0.02") == rows.method_of("quality=high,mass=0.9") == "sample,mass=0.9"
    assert rows.method_of("fit,mass=0.9") == "fit"


@pytest.mark.parametrize("line, what", [("{\"table\": ", ""), ("[1]", "not an object"), ("[" * 100000, "nested too deeply"),
                                        ('{"read_fraction": "0.2"}', r'read_fraction \("0.2"\) must be a number'),
                                        ('{"mean_kl": null}', r"mean_kl \(null\) must be a number")])
def test_a_broken_line_is_named(tmp_path, line, what):
    (tmp_path / "x.jsonl").write_text('{"task": "t", "read_fraction": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: " + what):
        make(str(tmp_path), [])


def test_the_folder_is_made_and_a_field_that_is_missing_named(tmp_path, capsys):
    write_rows(tmp_path / "rows", MEASURED[:3])
    assert main([str(tmp_path / "new" / "folder"), str(tmp_path / "rows")]) == 0
    assert (tmp_path / "new" / "folder" / "report.md").exists()
    row = dict(MEASURED[0])
    del row["mean_error"]
    write_rows(tmp_path / "rows", [row])
    assert main([str(tmp_path), str(tmp_path / "rows")]) == 1
    assert "report: a row has no field 'mean_error'" in capsys.readouterr().err


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        make(str(tmp_path), [])
