"""Runs of the tools inside the test process, and their logs."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.utils import ManagerMixin

TOOLS = Path(__file__).parents[2] / 'tools'


def run_tool(name, *arguments):
    """``python tools/NAME.py ARGUMENTS``, where NAME includes the folder, as in ``misc/...``."""
    forget_runs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(TOOLS / f'{name}.py'), *map(str, arguments)])
        try:
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        finally:
            forget_runs()


def forget_runs(kind=ManagerMixin):
    """Clear mmengine's default scopes, loggers, message hubs and visualizers.

    mmengine has no public call for that; each class keeps its instances by name.
    """
    for child in kind.__subclasses__():
        child._instance_dict.clear()
        forget_runs(child)


def scalars(work_dir):
    """Logged training steps and evaluations of the newest run."""
    newest = max(Path(work_dir).glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert all(math.isfinite(line['loss']) for line in steps)
    return steps, [line for line in lines if 'loss' not in line]
