"""python -m report DIR [FILE...]: report.html (one file, pictures inside), report.md and PNG files in DIR, from DIR/*.jsonl and
the files given."""

import argparse
import base64
import glob
import html
import os
import sys

from part_file import replacing

from .pictures import PICTURES, png
from .rows import label, read_rows
from .tables import TABLES, markdown

STYLE = """body{font:15px/1.45 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:2px 8px;text-align:right}
td:first-child,th:first-child{text-align:left}"""


def html_table(cells):
    rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * len(cells), cells)]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def write(path, data):
    with replacing(path) as file:
        file.write(data)


def make(directory, files):
    """Returns the names of what was written."""
    rows = label(read_rows(sorted(glob.glob(os.path.join(directory, "*.jsonl"))) + files))
    models = ", ".join(dict.fromkeys(str(row["model"]) for row in rows if row.get("model") not in (None, "several")))
    title = f"Sparse decode attention: {models}"
    if rows:
        os.makedirs(directory, exist_ok=True)
    page, text, names = [f"<h1>{html.escape(title)}</h1>"], [f"# {title}"], []
    for name, heading, draw in PICTURES:
        figure = draw(rows)
        if figure is None:
            continue
        data = png(figure)
        write(os.path.join(directory, name + ".png"), data)
        names.append(name + ".png")
        page.append(f"<h2>{html.escape(heading)}</h2><img alt=\"{name}\" src=\"data:image/png;base64,{base64.b64encode(data).decode()}\">")
        text.append(f"## {heading}\n\n![{name}]({name}.png)")
    for heading, build in TABLES:
        cells = build(rows)
        if len(cells) < 2:
            continue
        page.append(f"<h2>{html.escape(heading)}</h2>" + html_table(cells))
        text.append(f"## {heading}\n\n{markdown(cells)}")
    if len(text) == 1:
        raise ValueError(f"nothing to report in {directory}/*.jsonl")
    head = f"<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write(os.path.join(directory, "report.html"), (head + "\n".join(page) + "</html>\n").encode())
    write(os.path.join(directory, "report.md"), ("\n\n".join(text) + "\n").encode())
    return ["report.html", "report.md"] + names


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("files", metavar="FILE", nargs="*", help="more JSON lines, as of tactic eval kl --json")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(os.path.join(options.directory, name) for name in make(options.directory, options.files)))
    except KeyError as error:
        print(f"report: a row has no field {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
