"""A page as one who reads it sees it."""

from __future__ import annotations

from html.parser import HTMLParser


class Reader(HTMLParser):
    """The page's visible text; tags has every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._hidden = [], [], 0
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)
