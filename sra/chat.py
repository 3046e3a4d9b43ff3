"""How a row is written for a model, and where the row's own words stand in what was written.

Chat templates trim contents, move the system prompt into the first user turn, drop the thoughts of
earlier turns. So a content is never searched for in a rendering: the conversation is written a
second time with a placeholder in the content's place, and whatever is equal before and after it
belongs to the template.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, Literal, NamedTuple

from sra.token_bytes import clean_text

TrainTurns = Literal["assistant", "last", "all"]
TRAIN_TURNS = ("assistant", "last", "all")

_MARK = "7048193620581"  # digits: the same in capitals
_THOUGHT = re.compile(r"(?:<think>)?\s*(.*?)\s*</think>\s*(.*?)\s*$", re.DOTALL)


class Match(NamedTuple):
    """``piece.text[start:end]`` stands at character `at` of the rendering."""

    start: int
    end: int
    at: int

    @property
    def stop(self) -> int:
        """Where it ends in the rendering."""
        return self.at + self.end - self.start


class Piece(NamedTuple):
    """A text of the row that is learnt: the completion, the text, or a trained message's content.

    matches: the parts of it that the rendering holds letter for letter, in order. One that is the
        whole text, as a rule; less where the template trimmed it; none where it was rewritten.
    """

    text: str
    matches: tuple[Match, ...]


class Label(NamedTuple):
    """Characters that are learnt: ``[start, end)`` is said, ``[end, stop)`` ends the turn."""

    start: int
    end: int
    stop: int


class Rendering(NamedTuple):
    """A row as one model reads it, up to the last character that is learnt.

    text: with special tokens spelt out, so tokenise it with ``add_special_tokens=False``.
    pieces: the same pieces in the same order for each tokenizer; only their matches differ.
    labels: increasing and disjoint. A turn that calls tools is a label but no piece, because each
        template writes calls in its own way.
    """

    text: str
    pieces: tuple[Piece, ...]
    labels: tuple[Label, ...]

    @property
    def trained(self) -> list[tuple[int, int]]:
        """The character ranges that are learnt, without the ends of turns."""
        return [(label.start, label.end) for label in self.labels]


def render_prompt(tokenizer: Any, prompt: str, *, chat_template: bool = True) -> str:
    """The text that stands before a completion, in the way the tokenizer's model expects it.

    With a chat template: one user message and the opening of the assistant's turn. Without one (or
    with ``chat_template=False``): the prompt and a line break, after the start token's text if the
    tokenizer itself puts a start token in front of a text. In both cases the special tokens are
    part of the text, so tokenise it, and what is appended to it, with ``add_special_tokens=False``.

    Raises:
        ValueError: the chat template refuses the prompt.
    """
    if chat_template and tokenizer.chat_template:
        return _written(tokenizer, [{"role": "user", "content": prompt}], generation=True)
    return f"{_start(tokenizer)}{prompt}\n"


def turn_end(tokenizer: Any, *, chat_template: bool = True) -> str:
    """What ends the assistant's turn: the special token, and white space before it, that the chat
    template writes; without a template, or such a token, the end of a sequence."""
    eos = tokenizer.eos_token or ""
    if not (chat_template and tokenizer.chat_template):
        return eos
    return _written_end(tokenizer, len(tokenizer), str(tokenizer.chat_template)) or eos


def turn_end_id(tokenizer: Any) -> int | None:
    """The token of `turn_end`; None where there is none."""
    end = turn_end(tokenizer).strip()
    return tokenizer.convert_tokens_to_ids(end) if end else None


@functools.lru_cache(maxsize=16)
def _written_end(tokenizer: Any, size: int, template: str) -> str:
    """Empty if the template refuses an answer. `size` and `template` are there for the cache."""
    try:
        text = _written(tokenizer, [{"role": x, "content": _MARK} for x in ("user", "assistant")])
    except ValueError:
        return ""
    end = text.rfind(_MARK) + len(_MARK)
    return text[end : _turn_end(text, end, _turn_ends(tokenizer, size))[1]]


def render_question(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
    """A conversation and the opening of the assistant's turn, as the chat template writes them.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    asked = [_cleaned(message) for message in messages]
    return _written(tokenizer, asked, _tools(tools), generation=True)


def render(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    chat_template: bool = True,
    train_turns: TrainTurns = "assistant",
) -> Rendering:
    """Write a row for one model.

    - ``{"prompt", "completion"}``: `render_prompt`, the completion, `turn_end`.
    - ``{"messages", "tools"}``: as the chat template writes them. Without one (or with
      ``chat_template=False``): the tools as JSON and each message on a line; in place of the line
      break, the end-of-sequence token after what the assistant says. One user and one assistant
      message are then written like a prompt and a completion.
    - ``{"text"}``: the start token if the tokenizer has it there, the text, the end of sequence.

    A row with messages is read as messages, whatever else it holds.

    Args:
        tokenizer: of `transformers`.
        row: checked already (`sra.data.check_row`).
        train_turns: which messages are learnt: what the assistant says ("assistant"), only the
            last time it speaks ("last"), or everything ("all"). With each, the end of its turn.

    Raises:
        ValueError: the chat template refuses the row (with the template's own words), or an unknown
            `train_turns`.
    """
    if train_turns not in TRAIN_TURNS:
        raise ValueError(f"train_turns must be one of {TRAIN_TURNS}, got {train_turns!r}.")
    if row.get("messages") is not None:
        messages = [_cleaned(message) for message in row["messages"]]
        chosen = _trained(messages, train_turns)
        tools = _tools(row.get("tools"))
        if chat_template and tokenizer.chat_template:
            return _Templated(tokenizer, messages, tools).rendering(chosen)
        return _plain(tokenizer, messages, tools, chosen)
    if row.get("completion") is not None:
        said, prompt = clean_text(row["completion"]), clean_text(row["prompt"])
        before = render_prompt(tokenizer, prompt, chat_template=chat_template)
        after = turn_end(tokenizer, chat_template=chat_template)
    else:
        said, before, after = clean_text(row["text"]), _start(tokenizer), tokenizer.eos_token or ""
    start, end = len(before), len(before) + len(said)
    text = before + said + after
    piece = Piece(said, (Match(0, len(said), start),))
    return Rendering(text, (piece,), (Label(start, end, len(text)),))


def _start(tokenizer: Any) -> str:
    """The start token's text, if the tokenizer puts one in front of a text."""
    start = tokenizer.bos_token or ""
    return start if start and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that hold nothing, which tables of many rows are full of and templates trip
    over."""
    kept = {name: x for name, x in message.items() if x is not None and x != []}
    if isinstance(kept.get("content"), str):
        kept["content"] = clean_text(kept["content"])
    return kept


def _tools(tools: Any) -> Any:
    """A row's list of JSON schemas, which may be written as a string; None for none."""
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def _trained(messages: Sequence[Mapping[str, Any]], train_turns: TrainTurns) -> list[int]:
    if train_turns == "all":
        return list(range(len(messages)))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return turns[-1:] if train_turns == "last" else turns


def _written(
    tokenizer: Any, messages: Sequence[Any], tools: Any = None, *, generation: bool = False
) -> str:
    try:
        return clean_text(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generation, tokenize=False
            )
        )
    except Exception as error:  # a template is a program: whatever it raises, it cannot write this
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"The chat template of {name} cannot write this conversation: {error}. Change the row "
            "to what the template allows, or write both sides without templates "
            "(chat_template=False)."
        ) from error


def _json(value: Any) -> str:
    return clean_text(json.dumps(value, ensure_ascii=False))


def _plain(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, chosen: list[int]
) -> Rendering:
    text = _start(tokenizer)
    if tools:
        text += _json(tools) + "\n"
    pieces, labels = [], []
    for i, message in enumerate(messages):
        start, content = len(text), message.get("content", "")
        text += content
        if "tool_calls" in message:
            text += _json(message["tool_calls"])
        end = len(text)
        text += (tokenizer.eos_token or "") if message["role"] == "assistant" else "\n"
        if i in chosen:
            labels.append(Label(start, end, len(text)))
            if content:
                pieces.append(Piece(content, (Match(0, len(content), start),)))
    return Rendering(text[: labels[-1].stop] if labels else text, tuple(pieces), tuple(labels))


class _Region(NamedTuple):
    """Characters ``[start, stop)`` of a rendering.

    exact: whether all before and behind them is the template's, whatever the content; else the
        template changed with the content, and the region is only what changed.
    """

    start: int
    stop: int
    exact: bool


class _Templated:
    """A conversation as a chat template writes it, and what there is due to which message."""

    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> None:
        self.messages = messages
        self.write = functools.partial(_written, tokenizer, tools=tools)
        self.text = self.write(messages)
        self.ends = _turn_ends(tokenizer, len(tokenizer))
        self.mark = _MARK
        while self.mark in self.text:
            self.mark += "9"

    def rendering(self, chosen: list[int]) -> Rendering:
        pieces, labels = [], []
        for i in chosen:
            content = self.messages[i].get("content", "")
            region = self.region(i, content=self.mark)
            matches = self.matches(i, content, region)
            if content:
                pieces.append(Piece(content, tuple(matches)))
            if "tool_calls" in self.messages[i]:
                region = self.calling_turn(i)
            if region:
                start = min([region.start, *(match.at for match in matches)])
                end = max([region.stop, *(match.stop for match in matches)])
                labels.append(Label(start, *_turn_end(self.text, end, self.ends)))
        labels = _disjoint(labels)
        text = self.text[: labels[-1].stop] if labels else self.text
        return Rendering(text, tuple(pieces), tuple(labels))

    def region(self, i: int, **changed: Any) -> _Region | None:
        """What the part of message `i` became that the mark stands in place of; None if it is in
        no one place."""
        message = {**self.messages[i], **changed}
        message = {name: x for name, x in message.items() if x is not None}
        other = self.write([*self.messages[:i], message, *self.messages[i + 1 :]])
        if other.count(self.mark) != 1:
            return None
        text = self.text
        before, _, after = other.partition(self.mark)
        start, stop = len(before), len(text) - len(after)
        exact = text.startswith(before) and text.endswith(after)
        if not exact:
            start = len(commonprefix([text, before]))
            stop = len(text) - len(commonprefix([text[::-1], after[::-1]]))
        return _Region(start, stop, exact) if start <= stop else None

    def matches(self, i: int, content: str, region: _Region | None) -> list[Match]:
        matches = _matches(content, self.text, region)
        thought = _THOUGHT.match(content)
        if not matches and thought:
            # A template may write thoughts anew, yet leave their words and the answer alone.
            for part in (1, 2):
                low, high = thought.span(part)
                within = self.region(i, content=content[:low] + self.mark + content[high:])
                for start, end, at in _matches(content[low:high], self.text, within):
                    matches.append(Match(start + low, end + low, at))
        bounds = (region.start, region.stop) if region and region.exact else (0, len(self.text))
        return _widened(content, self.text, matches, *bounds)

    def calling_turn(self, i: int) -> _Region | None:
        """The whole of a turn that calls tools, without its end."""
        try:
            return self.region(i, content=self.mark, tool_calls=None)
        except ValueError:
            # Some templates allow tools' answers behind calls alone. The turn then lies between
            # what is written up to it and what is written up to its end.
            start = len(commonprefix([self.text, self.write(self.messages[:i], generation=True)]))
            through = commonprefix([self.text, self.write(self.messages[: i + 1])]).rstrip()
            stop = len(through)
            for end in self.ends.finditer(through, start):
                stop = end.start() if end.end() == len(through) else stop
            return _Region(start, stop, True) if start < stop else None


def _matches(content: str, text: str, region: _Region | None) -> list[Match]:
    """The part of the content that stands in this region of the text, if one does for certain."""
    written = text[region.start : region.stop] if region else ""
    if not region or not written.strip():
        return []
    if written in content:  # all of it, trimmed, or what follows its thoughts
        leading = content.lstrip().startswith(written)
        low = content.find(written) if leading else content.rfind(written)
        return [Match(low, low + len(written), region.start)]
    words = content.strip()
    if words and written.count(words) == 1:  # the template wrote something else beside it
        low = content.find(words)
        return [Match(low, low + len(words), region.start + written.find(words))]
    return []


def _widened(content: str, text: str, matches: list[Match], low: int, high: int) -> list[Match]:
    """Each match as wide as both texts stay equal, inside ``text[low:high]``; neighbours that then
    touch become one."""
    wide: list[Match] = []
    for k, (start, end, at) in enumerate(matches):
        floor, bottom = (wide[-1].end, wide[-1].stop) if wide else (0, low)
        while start > floor and at > bottom and content[start - 1] == text[at - 1]:
            start, at = start - 1, at - 1
        ceiling = matches[k + 1].start if k + 1 < len(matches) else len(content)
        stop = at + end - start
        while end < ceiling and stop < high and content[end] == text[stop]:
            end, stop = end + 1, stop + 1
        if wide and (start, at) == (floor, bottom):
            start, _, at = wide.pop()
        wide.append(Match(start, end, at))
    return wide


@functools.lru_cache(maxsize=16)
def _turn_ends(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Matches a special token, other than the start token. `size` is there for the cache: tokens
    may be added to a tokenizer."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names.discard(tokenizer.bos_token)
    if tokenizer.eos_token:  # some have one token for both
        names.add(tokenizer.eos_token)
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _turn_end(text: str, end: int, ends: re.Pattern[str]) -> tuple[int, int]:
    """``(end, stop)`` of a turn whose words end at `end`: behind the special token that follows,
    if white space at most stands between. An `end` inside a special token moves to its start."""
    for match in ends.finditer(text, max(0, end - 64)):
        if match.end() > end:
            if text[end : match.start()].strip():
                break
            return min(end, match.start()), match.end()
    return end, end


def _disjoint(labels: list[Label]) -> list[Label]:
    """Where a template merges turns, or moves them, a later label gives way to an earlier one."""
    kept: list[Label] = []
    for label in sorted(labels):
        start = max(label.start, kept[-1].stop if kept else 0)
        if label.stop > start:
            kept.append(Label(start, max(label.end, start), label.stop))
    return kept
