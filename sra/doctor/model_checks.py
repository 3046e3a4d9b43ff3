"""The checks of `sra doctor` on templates, control tokens and model configurations."""

from __future__ import annotations

from typing import Any

from sra.doctor.checks import FEW, Finding, Level, Sample, Side
from sra.model import logit_scale

PROBE = "  two  spaces\n"


def templates(student: Side, teacher: Side, sample: Sample) -> list[Finding]:
    """Chat templates: missing, refusing, or rewriting what the rows say."""
    findings = []
    without = [side.name for side in (student, teacher) if not side.tokenizer.chat_template]
    if len(without) == 1:
        findings.append(
            Finding(
                "note", "chat template",
                f"the {without[0]} has none, so its prompts are plain text",
                f"If the {without[0]} should chat, give its tokenizer a chat_template.",
            )
        )  # fmt: skip
    elif without:
        findings.append(Finding("note", "chat template", "neither side has one: plain text"))
    total = len(sample.rows) + len(sample.refused)
    for side, renderings in ((student, sample.student), (teacher, sample.teacher)):
        topic = f"{side.name} template"
        if not side.tokenizer.chat_template:
            continue
        refused = [(number, why) for name, number, why in sample.refused if name == side.name]
        if refused:
            number, why = refused[0]
            reason = why.partition("this conversation: ")[2] or why
            findings.append(
                Finding(
                    "error" if len(refused) == total else "warning", topic,
                    f"refuses {len(refused)} of {total} rows, first row {number}: "
                    f"{reason.partition('. Change the row')[0]}",
                    "sra distill stops there. Change these rows, or mend the chat_template.",
                )
            )  # fmt: skip
        changed = [
            number
            for number, rendering in zip(sample.numbers, renderings, strict=True)
            if any(
                sum(m.end - m.start for m in piece.matches) < len(piece.text)
                for piece in rendering.pieces
            )
        ]
        does = _habits(side.tokenizer)
        if changed:
            level: Level = "warning" if len(changed) > 5 * FEW * len(renderings) else "note"
            findings.append(
                Finding(
                    level, topic,
                    f"rewrites what {len(changed)} of {len(renderings)} rows say, first row "
                    f"{changed[0]}" + (f"; it {', '.join(does)}" if does else ""),
                    "What was rewritten is in no span. Trim contents in the data, or use rows of "
                    "prompt and completion.",
                )
            )  # fmt: skip
        elif not refused:
            findings.append(Finding("ok", topic, "; ".join(does) or "writes contents as they are"))
    return findings


def _habits(tokenizer: Any) -> list[str]:
    """What a template does with conversations, tried out."""

    def write(*turns: tuple[str, str]) -> str | None:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template is a program and may raise anything
            return None

    question, answer = ("user", "Zq1"), ("assistant", "Zq2")
    said = []
    plain = write(question, answer)
    if plain is None:
        return ["refuses a user's question and an answer"]
    refused = [
        role
        for role, turns in (
            ("system", (("system", "Zq0"), question, answer)),
            ("tool", (question, answer, ("tool", "Zq3"), answer)),
        )
        if "Zq" not in (write(*turns) or "")
    ]
    if refused:
        said.append(f"refuses the role {' and '.join(refused)}")
    if (write(("system", "Zq0"), question, answer) or "Zq0").find("Zq0") < 0:
        said.append("drops the system message")
    if "system" in plain:
        said.append("writes a system message of its own")
    padded = write(question, ("assistant", PROBE))
    if padded is not None and PROBE not in padded:
        said.append("trims contents" if PROBE.strip() in padded else "rewrites contents")
    return said


def control_tokens(side: Side) -> list[Finding]:
    """Start, end and padding: who writes them, and whether model and tokenizer agree."""
    tokenizer = side.tokenizer
    topic = f"{side.name} tokens"
    bos, eos, pad = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    findings = []
    adds = bos is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    written, turn_end = None, None
    if tokenizer.chat_template:
        try:
            written = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Zq1"}, {"role": "assistant", "content": "Zq2"}],
                tokenize=False,
            )
        except Exception:  # reported with the template
            written = None
    if written is not None:
        turn_end = written.rpartition("Zq2")[2]
    text = [
        f"start {bos!r}" + (", put in front of every text" if adds else "") if bos else "no start"
    ]
    text.append(f"end {eos!r}" if eos else "no end")
    text.append("no padding token" if pad is None else f"padding {pad!r}")
    findings.append(Finding("ok", topic, "; ".join(text)))
    if adds and written is not None and bos not in written:
        findings.append(
            Finding(
                "note", topic,
                f"the tokenizer starts texts with {bos!r}, its chat template does not",
                f"If the {side.name} was trained with it, add {{{{ bos_token }}}} to the template.",
            )
        )  # fmt: skip
    if eos is None:
        findings.append(
            Finding(
                "warning" if side.name == "student" else "note", topic,
                "there is no end-of-sequence token"
                + (", so the student is never taught to stop" if side.name == "student" else ""),
                'Set it: tokenizer.eos_token = "..."',
            )
        )  # fmt: skip
    elif turn_end is not None and eos not in turn_end:
        findings.append(
            Finding(
                "note", topic,
                f"the template ends a turn with {turn_end.strip()!r}, not with {eos!r}",
                "Generation must stop at either: list both in generation_config.eos_token_id.",
            )
        )  # fmt: skip
    known = getattr(side.text_config, "eos_token_id", None)
    ends = known if isinstance(known, list) else [known]
    if eos is not None and known is not None and tokenizer.eos_token_id not in ends:
        findings.append(
            Finding(
                "note", topic,
                f"the tokenizer's end is id {tokenizer.eos_token_id}, the model's {known}",
                "Rows end with the tokenizer's; set config.eos_token_id to it.",
            )
        )  # fmt: skip
    return findings


def heads(side: Side) -> list[Finding]:
    """The output layer: its size, and what it does beside one product."""
    text, topic = side.text_config, f"{side.name} head"
    spare = side.rows - side.entries
    if spare < 0:
        return [
            Finding(
                "error", topic,
                f"has {side.rows:,} rows for {side.entries:,} entries of the tokenizer, so some "
                "ids have no row",
                "Take the tokenizer that belongs to the model, or call "
                f"model.resize_token_embeddings({side.entries}).",
            )
        ]  # fmt: skip
    said = [f"{side.rows:,} rows"]
    if spare:
        said.append(f"{spare:,} of them belong to no token and are never compared")
    if getattr(text, "tie_word_embeddings", False):
        said.append("tied to the embedding")
    if softcap := getattr(text, "final_logit_softcapping", None):
        said.append(f"logits capped at {softcap:g}")
    if (scale := logit_scale(text)) not in (None, 1, 1.0):
        said.append(f"logits times {scale:g}")
    return [Finding("ok", topic, "; ".join(said))]


def attention(side: Side) -> Finding:
    """Whether the attention mass can be read: one layer of the model runs on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    from sra.doctor.workload import quiet, shrunk
    from sra.states import model_states

    topic = f"{side.name} attention"
    try:
        with quiet(), FakeTensorMode():
            model: Any = AutoModelForCausalLM.from_config(
                shrunk(side.config, 1), dtype=torch.bfloat16
            )
            model_states(model.eval(), torch.zeros(1, 8, dtype=torch.int64))
    except (NotImplementedError, IndexError, TypeError) as error:
        return Finding(
            "error", topic, str(error),
            f"Choose another {side.name}, or --recipe respell, which reads no attention.",
        )  # fmt: skip
    except Exception as error:  # the model's own code, whatever it does
        return Finding(
            "note", topic,
            f"{type(side.config).__name__} cannot be tried without weights "
            f"({type(error).__name__})",
            "Try a few steps: --measure 2.",
        )  # fmt: skip
    return Finding("ok", topic, f"{type(side.config).__name__}: its queries and keys can be read")
