"""Commands on the pages name tools, options, configs and targets that exist."""

import argparse
import importlib.util
import re
import shlex
import sys

import pytest
from helpers.pages import PAGES, ROOT, blocks, prose, read

# (page, line of the block, command)
COMMANDS = [
    (page, block.line, command)
    for page in PAGES
    for block in blocks(page)
    if not block.language or block.language in ('console', 'bash', 'sh')
    for command in re.sub(r'\\\n\s*', '', block.text).splitlines()
]
TOOL = re.compile(r'(?:^|\s)(?:python )?(tools/[\w/]+\.(?:py|sh))((?:\s.*)?)$')


TOOL_COMMANDS = [
    pytest.param(match[1], shlex.split(match[2], comments=True), id=f'{page}:{line}:{match[1]}')
    for page, line, command in COMMANDS
    if (match := TOOL.search(command))
]


@pytest.fixture
def parse(monkeypatch):
    """Let a tool's own parser read arguments, and nothing happen afterwards."""

    def run(tool, words):
        class Parsed(Exception):
            pass

        original = argparse.ArgumentParser.parse_args

        def parse_args(parser, *arguments, **options):
            original(parser, *arguments, **options)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        monkeypatch.setattr(sys, 'argv', [tool, *words])
        spec = importlib.util.spec_from_file_location('tool_of_the_docs', ROOT / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(Parsed):
            module.main()

    return run


@pytest.mark.parametrize(('tool', 'words'), TOOL_COMMANDS)
def test_tools_exist_and_take_these_arguments(tool, words, parse):
    assert (ROOT / tool).is_file()
    if tool.endswith('.sh'):
        # CONFIG NPROC [options of train.py]
        config, processes, *options = words
        assert processes.isdigit()
        tool, words = 'tools/train.py', [config, *options]
    parse(tool, words)


def test_commands_are_seen_and_wrong_ones_refused(parse):
    tools = {param.values[0] for param in TOOL_COMMANDS}
    known = {'tools/train.py', 'tools/test.py', 'tools/dist_train.sh'}
    assert known | {'tools/analysis_tools/benchmark.py'} <= tools
    with pytest.raises(SystemExit):
        parse('tools/train.py', ['config.py', '--no-such-option'])


@pytest.mark.parametrize('page', PAGES)
def test_paths_of_the_repository_exist(page):
    """Files that the text or a command names; `*` and `{a,b}` are patterns."""
    pattern = (
        r'(?<![\w./-])((?:benchmarks|configs|tools|tests|mmattn|docs)/'
        r'[\w./*{},-]*?\.(?:py|sh|yml|md|h|so))\b'
    )
    for name in re.findall(pattern, read(page)):
        braces = re.search(r'\{(.*)\}', name)
        names = (
            [name.replace(braces[0], part) for part in braces[1].split(',')] if braces else [name]
        )
        for name in names:
            # Libraries are built, not kept.
            assert name.endswith('.so') or list(ROOT.glob(name)), name
    for name in re.findall(r'mmattn::([\w/]+\.py)', read(page)):
        assert (ROOT / 'configs' / name).is_file(), name


@pytest.mark.parametrize('page', PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    commands = [command for p, _, command in COMMANDS if p == page]
    spans = re.findall(r'`(make [^`]+)`', prose(page))
    for command in [*commands, *spans]:
        if match := re.match(r'make((?: [a-z-]+)+)(?: [A-Z]+=\S+)*\s*(?:#.*)?$', command):
            assert set(match[1].split()) <= targets, command
