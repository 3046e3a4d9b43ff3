"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from sra.report.charts import draw, number
from sra.report.run import SIDES, Report, SampleSpans, curves, verdict
from sra.report.style import SCRIPT, STYLE

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)  # bits, from which a piece has the next colour
FIGURES = (  # key, name, how it is written, whether less is better
    ("bits_per_byte", "Bits per byte", "{:.4f}", True),
    ("agreement", "Agreement with the teacher", "{:.1%}", False),
    ("divergence", "Bits of divergence a span", "{:.3f}", True),
)
SAID = {"good": "It worked.", "warning": "With a reservation.", "bad": "It did not work."}
TOLD = (  # of the configuration, what a reader asks first
    "recipe", "alpha", "gamma", "temperature", "logit_state", "outside", "normaliser",
    "vocabulary_match", "granularity", "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed", "bf16",
)  # fmt: skip
# The page may load nothing, from anywhere, whatever texts it shows.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(report: Report) -> str:
    """The whole page."""
    name = _model(report.run.get("student") or report.folder.resolve())
    of = [_model(teacher) for teacher in report.run.get("teachers") or []]
    title = f"{name} ← {', '.join(of)}" if of else name
    level, said = verdict(report)
    parts = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="soft small">{_e(_about(report))}</p>',
        f'<p class="verdict {level}"><b>{SAID[level]}</b> {_e(said)}</p>',
        _figures(report),
        _charts(report),
        _samples(report),
        _origin(report),
        _missing(report.missing),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_e(title)}</title><style>{STYLE}</style></head>\n'
        f'<body>\n{chr(10).join(filter(None, parts))}\n<div id="tip" role="status"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def heat(bits: float) -> int:
    """The colour of a piece: 0 for none, 5 for the hottest."""
    return sum(bits >= level for level in LEVELS)


def _e(text: Any) -> str:
    return escape(str(text), quote=True)


def _model(name: Any) -> str:
    """A folder's last part; a hub id as it is."""
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def _about(report: Report) -> str:
    steps = f"{report.step:,} steps"
    if report.max_steps and not report.finished:
        steps = f"step {report.step:,} of {report.max_steps:,}"
    parts = [f"Run {report.folder}", steps]
    if report.run.get("started"):
        parts.append(f"started {str(report.run['started'])[:16].replace('T', ' ')}")
    if isinstance(report.run.get("coverage"), int | float):
        parts.append(f"spans cover {report.run['coverage']:.1%} of the trained bytes")
    if report.run.get("left_out"):
        parts.append(f"{report.run['left_out']:,} rows left out, their prompts fill max_length")
    parts.append(f"report of {datetime.now():%Y-%m-%d %H:%M}")
    return " · ".join(parts)


def _figures(report: Report) -> str:
    known = {side: report.figures.get(side, {}) for side in SIDES}
    rows = []
    for key, name, form, less in FIGURES:
        values = [known[side].get(key) for side in SIDES]
        if all(value is None for value in values):
            continue
        sides = [value for value in values[:2] if value is not None]
        best = (min if less else max)(sides) if len(sides) == 2 else None
        cells = "".join(
            f'<td class="figure{" best" if value is not None and value == best else ""}">'
            f"{form.format(value) if value is not None else '–'}</td>"
            for value in values
        )
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    if not rows:
        return (
            "<h2>Before and after</h2><p>Not measured. Give held-out rows: sra distill --eval-data "
            f"held_out.jsonl, or now sra report {_e(shlex.quote(str(report.folder)))} --data "
            "held_out.jsonl.</p>"
        )
    head = "".join(f'<th class="figure">{side.capitalize()}</th>' for side in SIDES)
    return (
        f"<h2>Before and after</h2><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        f'<p class="soft small">{_e(report.source)} Bits per byte compare across tokenizers; lower '
        "is better.</p>"
    )


def _charts(report: Report) -> str:
    drawn = curves(report)
    if not drawn:
        return "<h2>Curves</h2><p>Fewer than two steps were logged.</p>"
    figures = "".join(
        f"<figure><figcaption>{_e(curve.title)}<output>{number(curve.points[-1][1])}</output>"
        f"<span>{_e(curve.note) or '&nbsp;'}</span></figcaption>{draw(curve)}</figure>"
        for curve in drawn
    )
    return (
        '<h2>Curves</h2><p class="soft small">By step; the number is the last one. A faint line is '
        f'what was logged, the strong one its moving mean.</p><div class="charts">{figures}</div>'
    )


def _samples(report: Report) -> str:
    if not report.samples:
        folder = _e(shlex.quote(str(report.folder)))
        return (
            "<h2>Where the student differs from its teacher</h2><p>Not measured: this needs both "
            f"models and held-out rows, sra report {folder} --data held_out.jsonl.</p>"
        )
    bounds = [f"under {LEVELS[0]:g}", *(f"from {level:g}" for level in LEVELS)]
    key = "".join(f'<i class="h{i}">{text}</i>' for i, text in enumerate(bounds))
    ranked = list(report.samples)
    worst = ranked[:5]
    rest = ranked[5:]
    shown = [("The worst rows", worst)]
    if rest:
        middle = max(0, len(rest) // 2 - 1)
        chosen = rest[middle : middle + 3]
        shown.append(("Rows in the middle", chosen))
        shown.append(("The best rows", [row for row in rest[-2:] if row not in chosen]))
    rows = "".join(
        f'<tr><td class="figure"><a href="#row{s.row}">{s.row}</a></td>'
        f'<td class="figure">{s.divergence:.2f}</td><td class="figure">{s.agreement:.0%}</td>'
        f'<td class="text">{_e(_short(s.context or "".join(p[0] for p in s.pieces), 90))}</td></tr>'
        for s in worst
    )
    return (
        "<h2>Where the student differs from its teacher</h2>"
        "<p>Each piece of text is coloured by how far apart the two models are, right after it, "
        "about what comes next (KL divergence, in bits). Underlined: their likeliest next tokens "
        "differ. Point at a piece to see both. Rows are counted from 0, as by sra doctor.</p>"
        f'<div class="key"><span>bits</span>{key}<i class="differ">other top token</i>'
        '<i class="none">in no span</i></div>'
        '<table class="worst"><thead><tr><th class="figure">Row</th><th class="figure">Bits a span'
        '</th><th class="figure">Agree</th><th>Text</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        + "".join(
            f"<h3>{title}</h3>{''.join(map(_sample, samples))}"
            for title, samples in shown
            if samples
        )
    )


def _sample(sample: SampleSpans) -> str:
    context = (
        f'<div class="context">{_e(_short(sample.context, 300))}</div>' if sample.context else ""
    )
    return (
        f'<div class="sample" id="row{sample.row}"><div class="head soft">'
        f"<span>row {sample.row}</span>"
        f"<span>{sample.divergence:.2f} bits a span</span>"
        f"<span>agreement {sample.agreement:.0%}</span></div>{context}"
        f'<div class="spans">{"".join(map(_piece, sample.pieces))}</div></div>'
    )


def _piece(piece: tuple[str, float | None, str | None, str | None]) -> str:
    text, bits, student, teacher = piece
    if bits is None:
        return f'<span class="none">{_e(text)}</span>'
    differ = " differ" if student != teacher else ""
    return (
        f'<span class="h{heat(bits)}{differ}" data-bits="{bits:.2f}" data-student="{_e(student)}" '
        f'data-teacher="{_e(teacher)}">{_e(text)}</span>'
    )


def _origin(report: Report) -> str:
    run = report.run
    parts = ["<h2>How it was made</h2>"]
    if run.get("command"):
        parts.append(f"<pre>{_e(_command(run['command']))}</pre>")
    config = run.get("config") or {}
    told = {name: config[name] for name in TOLD if config.get(name) is not None}
    models = {name: run[name] for name in ("student", "teachers") if run.get(name)}
    for title, known in (
        ("Models", models),
        ("Configuration", told),
        ("Versions", run.get("versions") or {}),
        ("Machine", run.get("machine") or {}),
    ):
        if known:
            parts.append(f"<h3>{title}</h3>{_table(known.items())}")
    if len(config) > len(told):
        every = _table(sorted(config.items()))
        parts.append(f"<details><summary>All {len(config)} settings</summary>{every}</details>")
    if len(parts) == 1:
        parts.append("<p>The run left no record of its command and configuration.</p>")
    parts.append(
        f'<p class="soft small">This page was written with Python {platform.python_version()} on '
        f"{_e(platform.system())} and needs no network.</p>"
    )
    return "".join(parts)


def _command(argv: Sequence[Any]) -> str:
    """What to type: `sra` for the program that the shell found under that name."""
    program, *rest = map(str, argv)
    ours = Path(program).name == "sra" or program.endswith(("sra/cli.py", "sra/__main__.py"))
    return shlex.join(["sra", *rest] if ours else ["python", program, *rest])


def _table(items: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="soft">{_e(name)}</td><td>{_e(_plain(value))}</td></tr>'
        for name, value in items
    )
    return f'<table class="config small"><tbody>{rows}</tbody></table>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f"<h2>What is not here</h2><ul>{''.join(f'<li>{_e(x)}</li>' for x in missing)}</ul>"


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
