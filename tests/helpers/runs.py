"""Run the tools in this process, which has imported everything already, and read their output."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin

TOOLS = Path(__file__).parents[2] / 'tools'


def run_tool(name, *arguments):
    """``python tools/NAME.py ARGUMENTS``, where NAME includes the folder, as in ``misc/...``."""
    # Loggers, message hubs and visualizers outlive a Runner.
    for kind in ManagerMixin.__subclasses__():
        _forget(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(TOOLS / f'{name}.py'), *map(str, arguments)])
        try:
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        finally:
            DefaultScope._instance_dict.clear()


def _forget(kind):
    kind._instance_dict.clear()
    for child in kind.__subclasses__():
        _forget(child)


def scalars(work_dir):
    """What was logged in the newest run: training steps, evaluations."""
    newest = max(Path(work_dir).glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert all(math.isfinite(line['loss']) for line in steps)
    return steps, [line for line in lines if 'loss' not in line]
