"""The page: one template, one stylesheet and scripts, put together with a report's data into a single file.

The data is gzip in base64, whose alphabet has no ``<``, so no name from a model can end the element that holds it; the
scripts write names as text, never as markup. A policy names the script and the stylesheet by their hash and
allows nothing else: no other code runs, and nothing is asked of a network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

from zgraph.config import Config
from zgraph.plans import show_bytes, written
from zgraph.report.runs import runs, unrolled

SCRIPTS = (
    "words.js", "program.js", "tree.js", "layout.js", "state.js", "passes.js", "graph.js", "text.js", "decisions.js",
    "inspector.js", "time.js", "start.js",
)  # fmt: skip
"""In the order in which they stand in the page, as one."""


def page(document: Mapping[str, Any]) -> str:
    """The HTML of a report's document."""
    style, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": html.escape(policy),
        "TITLE": html.escape(f"{document['plan']['model']}: zgraph report"),
        "STYLE": style,
        "DATA": _packed(document),
        "SCRIPT": script,
    }
    pieces = _file("page.html").split("@@")  # every other one is a name
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _packed(document: Mapping[str, Any]) -> str:
    """Without what the script works out itself: when each call runs, and what a pass left as it was."""
    programs = [
        {name: value for name, value in each.items() if name != "events"} | {"passes": _told_once(each["passes"])}
        for each in document["programs"]
    ]
    text = json.dumps({**document, **_shown(document), "programs": programs}, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _told_once(passes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What passes left, each by what it changed: ``order`` as numbers of places in the order before, and behind these
    of rows that were not there; without the memory that stayed as it was.
    """
    found = [dict(passes[0])]
    before = list(unrolled(passes[0]["order"]))
    for last, each in pairwise(passes):
        place, after = {row: i for i, row in enumerate(before)}, list(unrolled(each["order"]))
        found.append({**each, "order": runs([place.get(row, len(before) + row) for row in after])})
        if each["memory"] == last["memory"]:
            del found[-1]["memory"]
        before = after
    return found


def _shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """The plan and all options, as a person reads them: as they are written in a call, and none that is nothing."""

    def of(estimate: Mapping[str, Any]) -> dict[str, Any]:
        return {**estimate, "options": written(_set(estimate["options"]))}

    plan = document["plan"]
    rejected = [{**each, "estimate": of(each["estimate"])} for each in plan["rejected"]]
    options = _set(document["options"])
    if isinstance(options.get("bucket_bytes"), int):
        options["bucket_bytes"] = show_bytes(options["bucket_bytes"])
    return {"plan": {**plan, "chosen": of(plan["chosen"]), "rejected": rejected}, "options": options}


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None or empty by default."""
    return {
        name: value for name, value in options.items() if value not in (None, [], {}) or getattr(Config, name, None)
    }


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _file(name: str) -> str:
    return resources.files("zgraph.report").joinpath("assets", name).read_text(encoding="utf-8")
