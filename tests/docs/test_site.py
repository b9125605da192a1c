"""The documentation: links lead somewhere, and the site is built without a warning and without network."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

import timemix
from tests.helpers.browser import open_browser
from timemix.cli.main import VERBS
from timemix.errors import NotFinite

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ABOVE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted([*ABOVE, *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
MARKDOWN = MarkdownIt("commonmark").enable("table")
HTML_TAGS = {"a", "br", "details", "div", "img", "p", "picture", "source", "span", "sub", "summary", "sup"}
OUTSIDE = re.compile(r"\w[\w+.-]*:|//")

WITHOUT_NETWORK = """
import socket, sys

def refuse(*arguments, **options):
    raise OSError("the site needs no network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


def names(pages):
    return [page.relative_to(ROOT).as_posix() for page in pages]


def tokens(page):
    """Yield the tokens of a Markdown file, those within paragraphs too."""
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def links(page):
    """Yield the relative targets of links and pictures."""
    for token in tokens(page):
        found = [token.attrs[name] for name in ("href", "src") if name in token.attrs]
        if token.type in ("html_block", "html_inline"):
            found = re.findall(r'\b(?:href|src|srcset)="([^"]+)"', token.content)
        yield from (unquote(each) for each in found if not OUTSIDE.match(each))


def anchors(page):
    """Return the anchors of headings as GitHub derives them, and those set in HTML."""
    is_heading, found = False, set()
    for token in tokens(page):
        if is_heading and token.type == "inline":
            text = "".join(each.content for each in token.children if each.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
        if token.type in ("html_block", "html_inline"):
            found |= set(re.findall(r'\b(?:id|name)="([^"]+)"', token.content))
        is_heading = token.type == "heading_open"
    return found


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_a_file_and_an_anchor(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert not target.is_relative_to(DOCS / "reference"), f"{link}: the reference is in the site only"
        assert target.exists(), link
        if DOCS in page.parents:
            assert DOCS in (target, *target.parents) or target in ABOVE, f"{link}: the site has no such page"
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_tags_are_those_of_html(page):
    found = [token.content for token in tokens(page) if token.type in ("html_block", "html_inline")]
    tags = set(re.findall(r"</?([A-Za-z][\w-]*)", re.sub(r"<!--.*?-->", "", "".join(found), flags=re.DOTALL)))
    assert tags <= HTML_TAGS, "any other <name> belongs in code: no page shows it"


def test_the_index_names_each_page():
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "index.md")}
    pages = {page for page in DOCS.rglob("*.md") if "log" not in page.parts} - {DOCS / "index.md"}
    assert names(sorted(pages - linked)) == []


class Html(HTMLParser):
    """What a page loads, where it links to, its anchors, and its text outside code."""

    VERBATIM = ("code", "pre", "script", "style")

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors = set(), set(), {""}
        self.text, self._verbatim = [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self._verbatim += tag in self.VERBATIM
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a":
            self.links |= {found["href"]} if found.get("href") else set()
            return
        self.loads |= {found[name] for name in ("src", "srcset", "href", "data", "poster") if found.get(name)}

    def handle_endtag(self, tag):
        self._verbatim -= tag in self.VERBATIM

    def handle_data(self, data):
        self.text += [] if self._verbatim else [data]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the pages of the built site by their path."""
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed; `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", WITHOUT_NETWORK, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(folder).as_posix(): Html(path) for path in sorted(folder.rglob("*.html"))}, folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_outside(site):
    pages, folder = site
    assert len(pages) > len(VERBS) + len(PAGES) / 2
    for name, page in pages.items():
        assert [each for each in page.loads if OUTSIDE.match(each) and not each.startswith("data:")] == [], name
    for style in folder.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    pages, folder = site
    for name, page in pages.items():
        # A web server shows 404.html at any path, so its links begin at the root of the site.
        for link in {each for each in page.links | page.loads if not OUTSIDE.match(each)} if name != "404.html" else ():
            path, _, anchor = unquote(link).partition("#")
            target = (folder / name).parent / path if path else folder / name
            assert target.exists(), (name, link)
            if target.suffix == ".html":
                assert anchor in pages[target.resolve().relative_to(folder.resolve()).as_posix()].anchors, (name, link)


@pytest.mark.slow
def test_the_reference_has_all_public_names_and_verbs(site):
    pages, folder = site
    api = set().union(*(page.anchors for name, page in pages.items() if name.startswith("reference/api/")))
    assert {f"timemix.{name}" for name in timemix.__all__} - {"timemix.__version__", "timemix.errors"} <= api
    assert f"timemix.errors.{NotFinite.__name__}" in api
    for verb in VERBS:
        assert f"usage: timemix {verb}" in (folder / f"reference/cli/{verb}.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_first_page_links_the_reference_instead_of_building_it(site):
    pages, folder = site
    assert "reference/index.html" in pages["index.html"].links
    assert "make docs" not in (folder / "index.html").read_text(encoding="utf-8")
    assert "`make docs`" in (DOCS / "index.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_rows_of_the_index_are_sections(site):
    pages, _ = site
    for title in ("Train on my own text", "Do a long run safely", "Do a comparison", "Use a trained model"):
        assert any(title == text.strip() for text in pages["howto/serve.html"].text), title
    assert "Understand the models" in {text.strip() for text in pages["explanation/math.html"].text}


@pytest.mark.slow
def test_options_are_code_that_stays_on_one_line(site):
    pages, folder = site
    assert [text for text in pages["reference/settings.html"].text if "--" in text] == []
    settings = (folder / "reference/settings.html").read_text(encoding="utf-8")
    for word in ("--data.valid-fraction", '"character"'):
        assert f'<span class="unbroken">{word}</span>' in settings
    assert ".unbroken { white-space: nowrap" in (folder / "assets/extra.css").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tables_of_messages_fit_into_a_window(site, tmp_path):
    pages, folder = site
    with open_browser(tmp_path / "browser") as browser:
        browser.set_window_size(1300, 900)
        for name in sorted(name for name in pages if name.startswith("howto/")):
            browser.get((folder / name).as_uri())
            # A table of measured values may be wider.
            wide = browser.execute_script(
                "return [...document.querySelectorAll('.md-typeset__scrollwrap')]"
                ".filter(box => box.innerText.startsWith('message') && box.scrollWidth > box.clientWidth)"
                ".map(box => box.innerText)"
            )
            assert wide == [], name


@pytest.mark.slow
def test_formulas_links_and_lists_are_rendered(site):
    pages, folder = site
    assert "<math" in (folder / "explanation/math.html").read_text(encoding="utf-8")
    for name, page in pages.items():
        # Each is Markdown that became no formula, link or list. A dollar of another kind belongs in code, and a list
        # begins after an empty line.
        raw = [text.strip() for text in page.text if re.search(r"\$|\\[(\[a-z]|\]\(|\n- ", text)]
        assert raw == [], name
