"""Reads a page of HTML."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Reads a page: checks that what is opened is closed in order, and keeps text, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not (self.open and self.open[-1] == "style"):
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def images(self):
        """The images, decoded from their data URIs."""
        for attributes in self.all("img"):
            head, data = attributes["src"].split(",", 1)
            assert head.startswith("data:image/")
            yield attributes, Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
