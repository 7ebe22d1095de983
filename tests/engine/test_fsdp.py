"""Units that FSDP shards; tests/tools/test_main_job.py trains with them on two processes."""

import pytest
import torch

from mmattn.backbones import DAT, GCViT, QuadTree
from mmattn.engine.fsdp import wrap_blocks


@pytest.mark.parametrize(
    ('backbone', 'arguments', 'count'),
    [
        (GCViT, dict(arch='xxtiny'), 2 + 2 + 6 + 2),
        (DAT, dict(arch='tiny'), 2 + 2 + 6 + 2),
        (QuadTree, dict(arch='b0'), 2 + 2 + 2 + 2),
    ],
)
def test_units_hold_nearly_all_and_not_each_other(backbone, arguments, count):
    """Parameters of a unit are gathered for its forward alone, so no two units may share one."""
    with torch.device('meta'):
        model = backbone(**arguments)
    assert all(wrap_blocks(module, True, 0) for module in model.modules())
    units = [module for module in model.modules() if wrap_blocks(module, False, 0)]
    held = [p for unit in units for p in unit.parameters()]
    assert len(units) == count
    assert len({id(p) for p in held}) == len(held)
    assert sum(p.numel() for p in held) > 0.6 * sum(p.numel() for p in model.parameters())
