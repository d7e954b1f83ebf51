"""The site's pages that lie elsewhere in the repository, and the links that lead to them.

The README is the first page, and ``benchmarks/README.md`` another. Links lead from file to file, as GitHub wants it;
here they are made to lead from page to page. Wherever that fails, a strict build stops.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md", "LICENSE": "license.md"}
"""Files outside of the folder of pages, and what they are there."""


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source == "LICENSE":
            text = f"# License\n\n```\n{text}\n```\n"
        files.append(File.generated(config, page, content=_linked(text, Path(source).parent)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of a page of ``docs`` lead to pages."""
    return markdown if page.file.src_uri in PAGES.values() else _linked(markdown, Path("docs"))


def _linked(text: str, folder: Path) -> str:
    """Text whose links are relative to the folder of pages, from text whose links are relative to ``folder``."""

    def link(match: re.Match[str]) -> str:
        path, hash_, part = match[1].partition("#")
        if not path or ":" in path:
            return match[0]
        found = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        return f"]({PAGES.get(found, found.removeprefix('docs/'))}{hash_}{part})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)
