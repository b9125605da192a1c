"""Steps of the site builder: pages of the reference, files from above docs/, navigation, links and formulas."""

import html
import logging
import math
import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from docs_reference import pages
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
    "CITATION.cff": "citation.txt",
}
"""Files of the repository outside docs/ that the site has too, and their paths in the site."""

SECTIONS = {
    "api": "Python",
    "cli": "Command line",
    "explanation": "Explanation",
    "howto": "How-to",
    "log": "Log",
    "reference": "Reference",
}
"""Titles of folders."""

FENCED = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2[`~]*\s*?$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[(?P<text>[^][]+)\]\((?P<path>[^\s:#)]+)[^\s)]*\)")
TARGET = re.compile(r"""(?P<before>\]\(|(?P<html>\b(?:src|srcset|href)="))(?P<path>[^\s":#)]+)(?=[\s#")])""")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\(?P<kind>[([])(?P<tex>.*?)\\[])]</\1>(?P<after>[^\s<]*)', re.DOTALL
)
ONLY_IN_SITE = re.compile(r"<!-- site: (.*?) -->", re.DOTALL)
"""Markdown that GitHub hides and the site shows."""
ONLY_IN_REPOSITORY = re.compile(r"<!-- repository: -->.*?<!-- end -->", re.DOTALL)
"""Markdown that GitHub shows and the site hides."""
INLINE_CODE = re.compile(r"(?<!<pre>)(?<!<pre><span></span>)<code>(?P<text>[^<]+)</code>")
LONGEST_WORD = 40
"""Number of characters up to which a browser keeps a word of inline code on one line."""

log = logging.getLogger("mkdocs.hooks.timemix")
"""With --strict each of its warnings ends the build."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and write the navigation out."""
    added = pages() | {path: (ROOT / name).read_text(encoding="utf-8") for name, path in ABOVE.items()}
    added |= {f"assets/{each.name}": each.read_text() for each in (ROOT / "tools" / "site").iterdir()}
    for path, content in added.items():
        files.append(File.generated(config, path, content=content))
    paths = sorted((file.src_uri for file in files.documentation_pages()), key=_place)
    for folder in sorted({posixpath.dirname(path) for path in paths} - {""}):
        if f"{folder}/index.md" not in paths and folder in SECTIONS:
            below = {path: _heading(files, path) for path in paths if posixpath.dirname(path) == folder}
            paths.append(f"{folder}/index.md")
            files.append(File.generated(config, paths[-1], content=_folder_page(folder, below)))
    config.nav = [_expanded(item, paths) for item in config.nav or []]
    return files


def _place(path: str) -> float:
    """Return where a page stands among those of its folder: as the folder's index.md, or that of docs/, links it."""
    for index, link in ((f"{posixpath.dirname(path)}/index.md", posixpath.basename(path)), ("index.md", path)):
        file = ROOT / "docs" / index
        place = file.read_text(encoding="utf-8").find(f"]({link}") if file.exists() else -1
        if place >= 0:
            return place
    return math.inf


def _section(path: str) -> str | None:
    """Return the title of the section of a page: the first cell of the row of docs/index.md that links the page."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| (?P<title>[^|]+) \|.*\]\({re.escape(path)}\)", index, re.MULTILINE)
    return found["title"].replace("**", "").capitalize() if found and not path.endswith("/index.md") else None


def _heading(files: Files, path: str) -> str:
    """Return the first heading of a page."""
    file = files.get_file_from_path(path)
    found = re.search(r"^# (.+)$", file.content_string if file else "", re.MULTILINE)
    return found[1].strip() if found else path


def _folder_page(folder: str, titles: dict[str, str]) -> str:
    """Return the page of a folder without an index of its own: its pages."""
    lines = [f"# {SECTIONS[folder]}\n"]
    for path, title in titles.items():
        name = posixpath.basename(path)
        date = re.match(r"\d{4}-\d\d-\d\d", name)
        lines.append(f"- {f'{date[0]}: ' if date else ''}[{title}]({name})")
    return "\n".join([*lines, ""])


def _expanded(item: Any, paths: list[str]) -> Any:
    """Return an item of the navigation with the pages of each folder in place of `folder/`."""
    if isinstance(item, dict):
        return {title: _expanded(below, paths) for title, below in item.items()}
    if isinstance(item, list):
        return [_expanded(each, paths) for each in item]
    return list(_folder_items(item, paths)) if item.endswith("/") else item


def _folder_items(folder: str, paths: list[str]) -> Iterator[Any]:
    """Yield the items of a folder: its index, its other pages in sections, its folders."""
    below = [path for path in paths if path.startswith(folder)]
    direct = [path for path in below if "/" not in path.removeprefix(folder)]
    for title, group in groupby(sorted(direct, key=lambda path: not path.endswith("/index.md")), _section):
        members = list(group)
        yield from [{title: members}] if title else members
    for name in dict.fromkeys(path.removeprefix(folder).split("/")[0] for path in below if path not in direct):
        yield {SECTIONS.get(name, name): list(_folder_items(f"{folder}{name}/", paths))}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the links of a page, which are right in the repository, by those of the site."""
    own = page.file.src_uri
    source = {path: name for name, path in ABOVE.items()}.get(own, f"docs/{own}")
    if own == "index.md":
        page.meta["hide"] = ["navigation"]
    # In turn: a text, a code block, the mark of the block.
    parts = FENCED.split(ONLY_IN_SITE.sub(r"\1", ONLY_IN_REPOSITORY.sub("", markdown)))
    parts[::3] = [_with_site_links(part, source, own) for part in parts[::3]]
    del parts[2::3]
    return "".join(parts)


def _with_site_links(markdown: str, source: str, own: str) -> str:
    """Return Markdown of the file `source` of the repository with links for `own`, its path in the site."""

    def without_link(match: re.Match[str]) -> str:
        return match["text"] if _site_path(source, match["path"]) is None else match[0]

    def moved(match: re.Match[str]) -> str:
        target = _site_path(source, match["path"])
        if target is None:
            return match[0]
        path = posixpath.relpath(target, posixpath.dirname(own) or ".")
        return match["before"] + (re.sub(r"\.md$", ".html", path) if match["html"] else path)

    return TARGET.sub(moved, LINK.sub(without_link, markdown))


def _site_path(source: str, link: str) -> str | None:
    """Return the path in the site for a link of the file `source`; None for a file that only the repository has."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in ABOVE:
        return ABOVE[target]
    if f"{target}/".startswith("docs/"):
        below = target.removeprefix("docs").removeprefix("/")
        return posixpath.join(below, "index.md") if (ROOT / target).is_dir() else below
    return None if (ROOT / target).exists() else target


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each formula by MathML, which browsers show without a script, and keep words of inline code whole."""

    def code(match: re.Match[str]) -> str:
        words = re.sub(r"\S+", word, match["text"])
        return f"<code>{words}</code>"

    def word(match: re.Match[str]) -> str:
        # A browser may end a line after each hyphen of --data.valid-fraction.
        short = len(html.unescape(match[0])) <= LONGEST_WORD
        return f'<span class="unbroken">{match[0]}</span>' if short else match[0]

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        shown = _mathml(tex, "block" if match["kind"] == "[" else "inline")
        # An unknown command or environment is copied into the text.
        if re.search(r"\\[A-Za-z]|>&<", shown):
            log.warning("%s: latex2mathml cannot convert all of the formula %s", page.file.src_uri, tex)
        # Browsers may begin a line between a formula and its comma.
        return f'<span class="unbroken">{shown}{match["after"]}</span>' if match["after"] else shown

    return FORMULA.sub(formula, INLINE_CODE.sub(code, content))


def _mathml(tex: str, display: str) -> str:
    # latex2mathml has `aligned` by another name, and copies the backslash of an escape within \text.
    tex = re.sub(r"(\\(?:begin|end)\{)aligned\}", r"\1split}", tex)
    tex = re.sub(r"\\text\{[^{}]*\}", lambda text: re.sub(r"\\([_%#$])", r"\1", text[0]), tex)
    shown: str = convert(tex, display=display)
    return shown
