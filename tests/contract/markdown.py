"""Reads the documents: fenced blocks, links, anchors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the words after the fence, and the text inside."""

    info: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""


@dataclass(frozen=True, slots=True)
class Command:
    """One `$ ` line of a console block and the output that the document shows for it, empty where it shows none."""

    line: str
    shown: str


def blocks(text: str) -> list[Block]:
    return [Block(tuple(info.split()), body) for info, body in FENCE.findall(text)]


def commands(block: Block) -> list[Command]:
    """The commands of a console block; lines that begin with `> ` right below a command go on with it."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found and not found[-1][1] and line.startswith("> "):
            found[-1][0].append(line[2:])
        elif found:
            found[-1][1].append(line)
    return [Command("\n".join(lines), "\n".join(shown)) for lines, shown in found]


def links(text: str) -> list[str]:
    """Targets of all links outside fenced blocks and code spans."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def anchors(path: Path) -> set[str]:
    """What `#...` may name in a document: its headings as GitHub writes them, and explicit anchors."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"></a>', text))
