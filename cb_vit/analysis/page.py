"""One HTML page that needs nothing else: no script, no request, and nothing of others' words but as text."""
from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from cb_vit.texts import printable

# Allows nothing but the styles and pictures that the page itself holds, whatever else might have come into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
GENERATOR = '<meta name="generator" content="cb_vit report">'  # by which a page of ours is known again
LARGEST = 8 * 2**20  # bytes of a picture
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: #fff; color: #2b2f36;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #d5d9de; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 48rem; }
.lead { color: #5b626c; margin: 0 0 1.6rem; }
nav { border: 1px solid #d5d9de; padding: .7rem 1.2rem; }
nav ol { margin: 0; padding-left: 1.2rem; columns: 2; }
a { color: inherit; text-decoration-color: #8a9099; }
figure { margin: 1rem 0; }
figcaption, .note { color: #5b626c; font-size: .875rem; }
img { max-width: 100%; height: auto; display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair figure { flex: 1 1 20rem; margin: .4rem 0; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .875rem; }
caption { text-align: left; color: #5b626c; padding-bottom: .3rem; white-space: nowrap; }
th, td { padding: .22rem .8rem .22rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word; }
thead th { border-bottom: 1px solid #2b2f36; font-weight: 600; }
tbody tr { border-bottom: 1px solid #e8eaed; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: #f5f6f7; padding: .6rem .8rem; margin: .4rem 0; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  figure, tr, nav, pre { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  pre { border: 1px solid #d5d9de; background: none; }
}
@page { margin: 16mm; }
"""


def text(words: Any) -> str:
    """Words of anybody as HTML shows them."""
    return html.escape(printable(words), quote=True)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: name of the anchor: letters alone.
        title: the heading.
        body: HTML of what stands below it.
    """

    name: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: the heading, as text.
        lead: a line below it, as text.
        sections: the parts, in their order; a table of contents leads to them.
    """
    contents = "".join(f'<li><a href="#{part.name}">{text(part.title)}</a></li>' for part in sections)
    body = "".join(f'<section id="{part.name}"><h2>{text(part.title)}</h2>{part.body}</section>\n' for part in sections)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n{GENERATOR}\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body><header><h1>{text(title)}</h1>"
            f'<p class="lead">{text(lead)}</p></header>\n<nav aria-label="Contents"><ol>{contents}</ol></nav>\n'
            f"<main>{body}</main></body></html>\n")


def paragraph(words: Any, kind: str = "") -> str:
    """A paragraph of text; `kind` is its class."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{text(words)}</p>"


def bullets(items: Iterable[Any]) -> str:
    """A list of texts; nothing, where there are none."""
    listed = "".join(f"<li>{text(item)}</li>" for item in items)
    return f"<ul>{listed}</ul>" if listed else ""


def code(words: Any) -> str:
    """A command or the like, letter by letter."""
    return f"<pre>{text(words)}</pre>"


def table(rows: Sequence[Sequence[Any]], caption: str = "", left: int = 1) -> str:
    """A table of texts.

    Args:
        rows: the heading and the rows.
        caption: a line above.
        left: number of the first columns that hold words; the others hold numbers.
    """
    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = ("" if at < left else ' class="number"' for at in range(len(cells)))
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    head, *body = rows
    above = f"<caption>{text(caption)}</caption>" if caption else ""
    listed = "".join(f"<tr>{line(row, 'td')}</tr>" for row in body)
    return (f'<div class="wide"><table>{above}<thead><tr>{line(head, "th")}</tr></thead>'
            f"<tbody>{listed}</tbody></table></div>")


def picture(png: bytes, description: str, caption: str = "") -> str:
    """A picture within the page.

    Args:
        png: the bytes of a PNG.
        description: what it shows, for those who do not see it.
        caption: a line below.

    Raises:
        ValueError: it is none, or too large.
    """
    if len(png) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    try:
        with Image.open(BytesIO(png), formats=["PNG"]) as image:
            width, height = image.size
            image.verify()
    except Exception as error:  # of Pillow's own kinds
        raise ValueError(f"it is no PNG ({error})") from None
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" width="{width}" '
            f'height="{height}" alt="{text(description)}">{below}</figure>')


def side_by_side(figures: Sequence[str]) -> str:
    """Pictures beside each other, as far as there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'
