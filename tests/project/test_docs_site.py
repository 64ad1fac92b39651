"""The documentation site: every page is in its menu, it builds without a warning, its mathematics is drawn."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers.project_files import ROOT

DOCS = Path(ROOT, "docs")


def leaves(menu):
    """The pages of a menu."""
    for entry in menu:
        for there in entry.values():
            yield from leaves(there) if isinstance(there, list) else [there]


def test_the_menu_has_every_page_once():
    listed = list(leaves(yaml.safe_load(Path(ROOT, "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_what_the_api_pages_document_is_there():
    for page in (DOCS / "api").glob("*.md"):
        names = re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
        assert names
        for name in names:
            assert Path(ROOT, f"{name.replace('.', '/')}.py").is_file(), f"{page.name} names {name}"


def test_formulas_of_docstrings_become_tex():
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    from docs_hooks import plain_to_tex

    for plain, tex in {
        "x = x0 + sigma n": r"x=x_{0}+\sigman",
        "D(x; sigma) = c_skip * x": r"D(x;\sigma)=c_{\text{skip}}\cdotx",
        "x_t = sqrt(alpha_bar_t) x0": r"x_{t}=\sqrt{\bar{\alpha}_{t}}x_{0}",
        "x0_hat <- t^(gamma + 1),": r"\hat{x}_{0}\leftarrowt^{\gamma+1}",
        "w = mean over views v": r"w=\;\text{mean}\;\text{over}\;\text{views}\;v",
    }.items():
        assert plain_to_tex(plain).replace(" ", "") == tex


class Links(HTMLParser):
    """What a page of HTML refers to, and the names that others may refer to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names.update(given[key] for key in ("id", "name") if given.get(key))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(given["href"])


@pytest.mark.slow
def test_the_site_builds_strictly_and_offline(tmp_path):
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING -" not in done.stderr
    pages = {path: Links(path.read_text()) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for target in [*page.links, *page.loaded]:
            where, _, anchor = target.partition("#")
            if target.startswith(("http:", "https:")):
                assert target not in page.loaded, f"{path.name} loads {target} from the internet"
                continue
            there = (path.parent / where).resolve() if where else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path.name} leads to {target}"
            assert not anchor or there not in pages or anchor in pages[there].names or anchor == "__top", target
    assert "<math" in (tmp_path / "concepts.html").read_text()
    assert "<math" in (tmp_path / "api/denoisers.html").read_text()
    assert "x0 + sigma n</code>" not in (tmp_path / "api/denoisers.html").read_text()
