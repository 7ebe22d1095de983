"""Rules of the package's structure: directions of imports, and lengths of files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmattn'
LONG = 400

# Parts by floor; a part imports only parts below it.
FLOORS = (
    ('__init__',),
    ('engine',),
    ('visualization',),
    ('backbones',),
    ('attention', 'checkpoint'),
    ('layers',),
    ('ops',),
)


def modules():
    return {
        '.'.join(file.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix(
            '.__init__'
        ): file
        for file in PACKAGE.rglob('*.py')
    }


def imports(name, file, known):
    """Modules of the package that a file imports, in functions too."""
    package = name if file.name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split('.')
            base = '.'.join(parts[: len(parts) - node.level + 1]) if node.level else ''
            base = '.'.join(part for part in (base, node.module) if part)
            targets = [base, *(f'{base}.{alias.name}' for alias in node.names)]
        else:
            continue
        found |= {target for target in targets if target in known and target != name}
    # The package of a module is no dependency of it.
    return {target for target in found if not name.startswith(f'{target}.')}


@pytest.fixture(scope='module')
def graph():
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def test_no_module_imports_itself_in_a_circle(graph):
    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    assert [name for name in graph if name in reachable(name)] == []


def test_imports_point_downwards(graph):
    floor = {part: i for i, parts in enumerate(FLOORS) for part in parts}

    def part(name):
        return name.split('.')[1] if '.' in name else '__init__'

    upward = [
        f'{name} imports {target}'
        for name, targets in graph.items()
        for target in targets
        if part(name) != part(target)
        and part(name) in floor
        and floor.get(part(target), len(FLOORS)) <= floor[part(name)]
    ]
    assert upward == []


def test_long_files_give_their_reason():
    """The word 'lines' is in the first 1500 characters of each."""
    long = [
        file
        for pattern in ('*.py', '*.cpp', '*.cu', '*.h')
        for file in PACKAGE.rglob(pattern)
        if len(file.read_text().splitlines()) > LONG
    ]
    silent = [file.name for file in long if ' lines' not in file.read_text()[:1500]]
    assert silent == []
