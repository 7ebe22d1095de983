"""Code blocks, prose, anchors and links of the Markdown pages."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    'README.md',
    *(
        str(path.relative_to(ROOT))
        for pattern in ('configs/*/README.md', 'docs/[!_]*.md')
        for path in sorted(ROOT.glob(pattern))
    ),
]
NOT_RUN = '<!-- Not run:'


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    text: str
    language: str  # of a fence; empty for an indented block
    is_run: bool  # false if the line above the fence starts with NOT_RUN


def read(page):
    return (ROOT / page).read_text()


def blocks(page):
    """Code blocks: fenced, or indented by four spaces after an empty line."""
    lines = read(page).splitlines()
    found, i = [], 0
    while i < len(lines):
        if fence := re.match(r'```(\w*)$', lines[i]):
            end = lines.index('```', i + 1)
            is_run = not (i and lines[i - 1].startswith(NOT_RUN))
            found.append(Block(i + 2, '\n'.join(lines[i + 1 : end]), fence[1], is_run))
            i = end
        elif lines[i].startswith('    ') and not lines[i - 1].strip():
            end = next(
                (k for k in range(i, len(lines)) if not lines[k].startswith('    ')), len(lines)
            )
            text = '\n'.join(line[4:] for line in lines[i:end])
            found.append(Block(i + 1, text, '', True))
            i = end
        i += 1
    return found


def prose(page):
    """Text of a page, with its lines of code emptied."""
    lines = read(page).splitlines()
    for block in blocks(page):
        for i in range(block.line - 1, block.line - 1 + block.text.count('\n') + 1):
            lines[i] = ''
    return '\n'.join(lines)


def anchors(page):
    """Anchors of a page's headings, by GitHub's rule."""
    found = []
    for heading in re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE):
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        repeated = found.count(slug)
        found.append(f'{slug}-{repeated}' if repeated else slug)
    return found


def links(page):
    """Targets of links and pictures outside of code."""
    text = re.sub(r'`[^`\n]*`', '', prose(page))
    return re.findall(r'\]\(([^)\s]+)\)', text)
