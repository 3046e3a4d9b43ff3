"""A `SpanTable` as one page of HTML: both tokenizations, span over span, nothing from elsewhere."""

from __future__ import annotations

from html import escape

import numpy as np

from sra.span_table import Cell, SpanTable
from sra.token_bytes import TokenBytes

KINDS = {
    "one": "one token to one",
    "many": "several tokens",
    "none": "in no span",
}


def alignment_page(table: SpanTable, *, student: str = "student", teacher: str = "teacher") -> str:
    """The page, complete; whatever text and names hold, they are shown and never run.

    Args:
        student, teacher: names of the tokenizers.
    """
    found = list(table.cells())
    raw = table.student_text.encode(), table.teacher_text.encode()
    size = len(table.text.encode())
    count = {kind: sum(cell.kind == kind for cell in found) for kind in KINDS}
    tokens = (
        len(table.student_ids) - table.student_start,
        len(table.teacher_ids) - table.teacher_start,
    )
    spans = max(len(table), 1)
    mean = [float(np.diff(side).sum()) / spans for side in (table.student, table.teacher)]
    key = "".join(
        f'<li class="{kind}"><b>{count[kind]:,}</b> {name}</li>' for kind, name in KINDS.items()
    )
    body = "".join(_cell(number, cell, table, raw) for number, cell in enumerate(found))
    names = escape(student), escape(teacher)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names[0]} and {names[1]}, span by span</title>
<style>{STYLE}</style>
<header>
<h1>{names[0]} <small>above</small> {names[1]} <small>below</small></h1>
<p>{table.coverage:.1%} of {size:,} bytes lie in {len(table):,} spans; {tokens[0]:,} and \
{tokens[1]:,} tokens, {mean[0]:.2f} and {mean[1]:.2f} a span.</p>
<ul>{key}</ul>
</header>
<main>{body or "<p>There is no text.</p>"}</main>
<output id="info">Point at a span, or tap it, for ids and bytes. A dot is a space, ″ a further \
token of the same characters.</output>
<script>{SCRIPT}</script>
</html>
"""


def _cell(number: int, cell: Cell, table: SpanTable, raw: tuple[bytes, bytes]) -> str:
    sides, details = [], []
    where = f"bytes {cell.bytes[0]} to {cell.bytes[1]}, " if cell.bytes else ""
    breaks = False
    for name, tokens, indices, text in (
        ("student", table.student_tokens, cell.student, raw[0]),
        ("teacher", table.teacher_tokens, cell.teacher, raw[1]),
    ):
        shown, lines = [], []
        before = (-1, -1)
        for i in indices:
            place = int(tokens.starts[i]), int(tokens.ends[i])
            piece = text[max(place[0], 0) : place[1]]
            breaks |= piece.endswith(b"\n")
            shown.append(f"<i>{_shown(tokens, i, piece, repeated=place == before)}</i>")
            lines.append(f"id {tokens.ids[i]}  {_plain(piece)}  {piece.hex(' ') or 'no bytes'}")
            before = place
        sides.append(f"<span>{''.join(shown) or '&nbsp;'}</span>")
        details.append(f"{name}  " + "\n         ".join(lines or ["nothing"]))
    info = escape(f"{where}{KINDS[cell.kind]}\n" + "\n".join(details))
    end = "<br>" if breaks else ""
    return f'<span class="s {cell.kind}" data-info="{info}">{sides[0]}{sides[1]}</span>{end}'


def _shown(tokens: TokenBytes, i: int, piece: bytes, *, repeated: bool) -> str:
    """HTML of one token."""
    if not piece:
        return f"<u>⟨{tokens.ids[i]}⟩</u>"
    if repeated:
        return "<u>″</u>"
    out = []
    for char in piece.decode(errors="surrogateescape"):
        if char == " ":
            out.append("<u>·</u>")
        elif "\udc80" <= char <= "\udcff":  # a part of a character
            out.append(f"<u>{ord(char) - 0xDC00:02x}</u>")
        elif char.isprintable():
            out.append(escape(char))
        else:
            out.append(f"<u>{escape(_MARKS.get(char) or repr(char)[1:-1])}</u>")
    return "".join(out)


_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def _plain(piece: bytes) -> str:
    text = piece.decode(errors="backslashreplace")
    return "‘" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "’"


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #69727d; --edge: #d5dae1; --one: #f1f4f8;
  --many: #ffe7b8; --many-edge: #d99a1c; --none: #ffd7d3; --none-edge: #c8372d; --card: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e8eaed; --soft: #98a2ae; --edge: #363d48; --one: #1f242c;
    --many: #4a3710; --many-edge: #c58f26; --none: #571d19; --none-edge: #e2665d; --card: #1c2027;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px 20px 130px; max-width: 1200px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }
h1 small { color: var(--soft); font-weight: normal; font-size: .95rem; }
h1 small:first-of-type { margin-right: .5em; }
p { margin: 4px 0; color: var(--soft); }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0 18px; padding: 0; }
li { padding: 1px 10px; border: 1px solid var(--edge); border-radius: 4px; font-size: .9rem; }
main { font: 15px/1.35 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.s {
  display: inline-flex; flex-direction: column; vertical-align: top; max-width: 100%;
  margin: 0 2px 8px 0; border: 1px solid var(--edge); border-radius: 4px; overflow: hidden;
  cursor: default;
}
.s > span { padding: 1px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.s > span + span { border-top: 1px dashed var(--edge); }
.s i { font-style: normal; padding: 0 3px; unicode-bidi: isolate; }
.s i + i { border-left: 1px solid var(--soft); }
.s u { text-decoration: none; color: var(--soft); }
.one { background: var(--one); }
.many { background: var(--many); border-color: var(--many-edge); }
.none { background: var(--none); border-color: var(--none-edge); }
.s:hover, .s.on { outline: 2px solid var(--ink); outline-offset: -1px; }
output {
  position: fixed; inset: auto 0 0 0; min-height: 5.6em; max-height: 40vh; overflow: auto;
  padding: 10px 20px; border-top: 1px solid var(--edge); background: var(--card);
  font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
@media print { output { display: none; } .s { print-color-adjust: exact; } }
"""

SCRIPT = """
(() => {
  const info = document.getElementById("info");
  let held = null;
  const show = (s) => { info.textContent = s.dataset.info; };
  document.querySelector("main").addEventListener("pointerover", (e) => {
    const s = e.target.closest(".s");
    if (s && !held) show(s);
  });
  document.addEventListener("click", (e) => {
    const s = e.target.closest(".s");
    if (held) held.classList.remove("on");
    if (!s && e.target.closest("output")) { if (held) held.classList.add("on"); return; }
    held = s && s !== held ? s : null;
    if (held) { held.classList.add("on"); show(held); }
  });
})();
"""
