"""A page of HTML that asks no host for anything: its frame, its tables and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deploy.plots import Plot, to_svg


def page(title: str, sections: Sequence[str]) -> str:
    """The whole page; `title` is text, `sections` are HTML."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *sections])
    return PAGE.format(title=escape(title), style=CSS, body=body)


def figure(plot: Plot, prefix: str) -> str:
    """A plot under its title; `prefix` keeps its ids apart from those of the page's other figures."""
    svg = to_svg(plot.figure, prefix)
    return f"<figure><h2>{escape(plot.title)}</h2>{svg}<figcaption>{escape(plot.note)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table; `head` is text, the cells of `rows` are HTML."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# The policy holds the page to its word: a browser refuses whatever would be fetched from anywhere.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title} \u00b7 Carryover</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --dim: #5b5b5b; --page: #f6f6f4; --card: #fff;
        --edge: #dcdcd8; --bad: #b00020; --note: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e6; --dim: #a3a3a0; --page: #161616; --card: #212121;
          --edge: #3a3a3a; --bad: #ff8a80; --note: #3a3116; }
}
body { max-width: 1040px; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--page);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
h1, h2, dt, dd { overflow-wrap: anywhere; } figure, dl, .wide, pre { margin: 0 0 1.5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: .6rem; }
dl div, .wide, pre { background: var(--card); border: 1px solid var(--edge); padding: .5rem .75rem; }
dl div, .wide, pre, .note, svg { border-radius: 6px; } .wide, pre { overflow-x: auto; }
dt, th, figcaption { color: var(--dim); font-size: .8rem; } dd { margin: 0; font-size: 1.1rem; }
figure svg { width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; } td, pre, code { font-size: .8rem; } .bad { color: var(--bad); }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; white-space: nowrap; }
.note { background: var(--note); padding: .5rem .75rem; }
"""
