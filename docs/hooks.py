"""MkDocs hooks: formulas as MathML, pages for the repository's files that are linked to, and docstrings' examples.

Links are written for a reader of the repository, relative to the file they stand in. One that leaves ``docs/`` gets a
page of its own in the site, with the file's text, so that the site needs nothing but itself.
"""

from __future__ import annotations

import html
import os.path
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)
LEXERS = {".py": "python", ".sh": "bash", ".toml": "toml", ".json": "json"}
FOLDER = "repository"  # of the pages for files outside docs/


def _links(source: Path, text: str) -> set[Path]:
    """The repository's files outside docs/ that a file's Markdown links to."""
    prose = "".join(CODE.split(text)[::2])
    targets = {Path(os.path.normpath(source.parent / target)) for target in LINK.findall(prose)}
    return {path for path in targets if not path.is_relative_to(ROOT / "docs") and path.is_file()}


def _page(path: Path) -> str:
    """Where a file is in the site, relative to docs/."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    name = path.relative_to(ROOT).as_posix()
    return f"{FOLDER}/{name.removesuffix('.md')}.md"


def _source(page: str) -> Path:
    """The file that a page of the site shows."""
    if not page.startswith(FOLDER + "/"):
        return ROOT / "docs" / page
    name = page.removeprefix(FOLDER + "/").removesuffix(".md")
    return next(path for path in (ROOT / name, ROOT / f"{name}.md") if path.is_file())


def _text(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".md":
        return text
    return f"# {path.relative_to(ROOT).as_posix()}\n\n````{LEXERS.get(path.suffix, 'text')}\n{text}````\n"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds a page for every file outside docs/ that is linked to, and for those that these link to."""
    added: set[Path] = set()
    due = {Path(file.abs_src_path) for file in files.documentation_pages()}
    due |= {ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"}
    while due:
        path = due.pop()
        if not path.is_relative_to(ROOT / "docs"):
            added.add(path)
            files.append(File.generated(config, _page(path), content=_text(path)))
        if path.suffix == ".md":
            due |= _links(path, path.read_text()) - added
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns links between files into links between pages."""
    source, own = _source(page.file.src_uri), page.file.src_uri

    def target(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[1]))
        return os.path.relpath(_page(path), Path(own).parent) if path.is_file() else match[1]

    parts = CODE.split(markdown)
    return "".join(LINK.sub(target, part) if i % 2 == 0 else part for i, part in enumerate(parts))


def on_page_content(content: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns formulas into MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(drawn, content)


class Examples(griffe.Extension):
    """Google's style calls the section ``Example:``, griffe ``Examples:``; anything else is text to it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section before the docstring is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
