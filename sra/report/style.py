"""The look and the behaviour of the report's page: all of it inline, nothing from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --edge: #d9dde3; --ink: #1b1f24; --soft: #59626e;
  --line: #0072b2; --other: #c04f00; --start: #6b7280;
  --good: #00704f; --warning: #8a5a00; --bad: #b3261e;
  --heat1: #fdeedd; --heat2: #fbd3a5; --heat3: #f5ab66; --heat4: #e5792b; --heat5: #b94a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1c2027; --edge: #333a45; --ink: #e8eaed; --soft: #a3adba;
    --line: #56b4e9; --other: #f0a04b; --start: #8b949e;
    --good: #4cc79a; --warning: #e3b341; --bad: #ff8a80;
    --heat1: #2e241b; --heat2: #4a321c; --heat3: #6b4118; --heat4: #8c4d10; --heat5: #b85900;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 28px 20px 60px; max-width: 1160px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.5rem; margin: 0 0 2px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 22px 0 6px; }
p { margin: 6px 0; }
a { color: var(--line); }
.soft, figcaption span, th { color: var(--soft); }
.small { font-size: .875rem; }
.verdict {
  margin: 18px 0 0; padding: 14px 18px; border: 1px solid var(--edge);
  border-left: 6px solid var(--tone); border-radius: 8px; background: var(--card);
  font-size: 1.06rem;
}
.verdict b { color: var(--tone); }
.good { --tone: var(--good); } .warning { --tone: var(--warning); } .bad { --tone: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { padding: 6px 18px 6px 0; text-align: left; vertical-align: top; font-weight: normal; }
th { font-size: .875rem; }
tr + tr > *, thead + tbody tr:first-child > * { border-top: 1px solid var(--edge); }
td.figure { text-align: right; } th.figure { text-align: right; }
td.best { font-weight: 650; }
table.config td:first-child { white-space: nowrap; }
table.config td, table.worst td.text { overflow-wrap: anywhere; }
.charts {
  display: grid; gap: 16px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
}
figure {
  margin: 0; padding: 12px 12px 6px; border: 1px solid var(--edge); border-radius: 8px;
  background: var(--card); break-inside: avoid; min-width: 0;
}
figcaption { display: grid; grid-template-columns: 1fr auto; gap: 0 8px; font-weight: 600; }
figcaption span { grid-column: 1 / -1; font-weight: normal; font-size: .8rem; }
figcaption output { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--edge); stroke-width: 1; }
polyline { fill: none; stroke: var(--line); stroke-linejoin: round; stroke-linecap: round; }
polyline.line { stroke-width: 2; } polyline.raw { stroke-width: 1; opacity: .35; }
.dot { fill: var(--line); }
.level { stroke: var(--other); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg text.label { stroke: none; fill: var(--other); }
.cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.key { display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 10px 0; font-size: .875rem; }
.key i { font-style: normal; padding: 1px 8px; border-radius: 3px; border: 1px solid var(--edge); }
.sample { margin: 14px 0; padding: 12px 16px; border: 1px solid var(--edge); border-radius: 8px; }
.sample .head { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .875rem; }
.sample .context { color: var(--soft); font-size: .875rem; white-space: pre-wrap; }
.context, .spans { overflow-wrap: anywhere; }
.spans { white-space: pre-wrap; line-height: 1.75; margin-top: 8px; }
.spans span, .key i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.spans span { border-radius: 3px; cursor: default; }
.spans span:hover, .spans span.on { outline: 2px solid var(--line); }
.h1 { background: var(--heat1); } .h2 { background: var(--heat2); }
.h3 { background: var(--heat3); } .h4 { background: var(--heat4); }
.h5 { background: var(--heat5); color: #ffffff; }
.differ {
  text-decoration: underline dotted 2px; text-underline-offset: 4px;
  text-decoration-skip-ink: none;
}
.none { color: var(--soft); }
#tip {
  position: fixed; z-index: 9; max-width: min(320px, 92vw); padding: 8px 12px; display: none;
  background: var(--ink); color: var(--paper); border-radius: 6px; font-size: .875rem;
  pointer-events: none; white-space: pre-line; overflow-wrap: anywhere;
}
pre {
  margin: 8px 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; font: .85rem/1.5 ui-monospace, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
details { margin: 12px 0; } summary { cursor: pointer; }
ul { padding-left: 20px; margin: 8px 0; } li { margin: 4px 0; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  body { padding: 18px 14px 40px; }
  th, td { padding-right: 10px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  #tip, .cursor { display: none; }
  .charts { grid-template-columns: repeat(3, 1fr); }
  .sample { break-inside: avoid-page; }
}
"""

SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
function show(text, x, y) {
  tip.textContent = text;
  tip.style.display = "block";
  const box = tip.getBoundingClientRect(), edge = 8;
  const left = Math.min(Math.max(edge, x - box.width / 2), innerWidth - box.width - edge);
  const above = y - box.height - 14;
  tip.style.left = left + "px";
  tip.style.top = (above > edge ? above : y + 22) + "px";
}
let marked = null;
function hide() {
  tip.style.display = "none";
  if (marked) marked.classList.remove("on");
  marked = null;
}
function span(event) {
  const piece = event.target.closest("[data-bits]");
  if (!piece) { if (event.type === "click" || marked) hide(); return; }
  if (piece === marked) return;
  hide();
  marked = piece;
  piece.classList.add("on");
  const d = piece.dataset, box = piece.getClientRects()[0];
  show("What comes next?\\nteacher: " + d.teacher + "\\nstudent: " + d.student + "\\n" + d.bits +
       " bits apart", box.left + box.width / 2, box.top);
}
document.addEventListener("mouseover", span);
document.addEventListener("click", span);
document.addEventListener("scroll", hide, {passive: true});
for (const chart of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(chart.dataset.points), cursor = chart.querySelector(".cursor");
  const output = chart.parentElement.querySelector("output"), last = output.textContent;
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    let near = points[0];
    for (const point of points) if (Math.abs(point[2] - x) < Math.abs(near[2] - x)) near = point;
    cursor.setAttribute("x1", near[2]);
    cursor.setAttribute("x2", near[2]);
    cursor.style.visibility = "visible";
    output.textContent = near[1] + " at step " + near[0];
  });
  chart.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.textContent = last;
  });
}
"""
