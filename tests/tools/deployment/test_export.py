"""tools/deployment/export.py, one mechanism per test, as each stage of a model costs time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config

from mmattn.attention import WindowAttention
from mmattn.backbones.gcvit import ConvStem

ROOT = Path(__file__).parents[3]
SIZES = (2, 3, 97, 131), (1, 3, 32, 40), (3, 3, 224, 224)

GCVIT = dict(
    type='GCViT',
    arch=dict(embed_dims=16, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=2),
    out_indices=(0,),
)
DAT_DIMS = dict(dims=(16, 16, 16, 16), num_heads=(2, 2, 2, 2), groups=(1, 1, 1, 1))
DAT_CVPR = dict(type='DAT', arch=dict(blocks=('D', 'L', 'L', 'L'), **DAT_DIMS), out_indices=(0,))
DAT_PLUS_PLUS = dict(
    type='DAT',
    arch=dict(
        blocks=('ND', 'N', 'N', 'N'), strides=(8, 4, 2, 1), plus_plus=True, offset_range=None,
        **DAT_DIMS,
    ),
    out_indices=(0,),
)  # fmt: skip
QUADTREE = dict(
    type='QuadTree',
    arch=dict(
        embed_dims=(16,) * 4, depths=(1,) * 4, num_heads=(2,) * 4, mlp_ratios=(2,) * 4,
        num_levels=(2, 2, 2, 1),
    ),
    topks=8,
    out_indices=(0,),
)  # fmt: skip
# An export takes ten seconds, and both formats begin with one graph, so DAT's variants share them.
IN_ONNX = {'gcvit': GCVIT, 'dat++': DAT_PLUS_PLUS, 'quadtree': QUADTREE}
IN_PROGRAM = {'gcvit': GCVIT, 'dat': DAT_CVPR, 'quadtree': QUADTREE}


@pytest.fixture
def export(load_tool, monkeypatch, tmp_path):
    """Run the tool on a classifier with this backbone; return the file and the model's weights."""
    tool = load_tool('deployment/export')

    def run(backbone, name, *options):
        config = tmp_path / 'classifier.py'
        Config(
            dict(
                _base_=str(ROOT / 'configs/gcvit/gcvit_t_imagenet.py'),
                model=dict(
                    backbone=dict(_delete_=True, **backbone),
                    head=dict(in_channels=16, num_classes=10),
                ),
            )
        ).dump(config)
        networks = []
        build = tool.build
        monkeypatch.setattr(
            tool, 'build', lambda *args: networks.append(build(*args)) or networks[-1]
        )
        out = tmp_path / name
        monkeypatch.setattr(sys, 'argv', ['export.py', str(config), str(out), *options])
        tool.main()
        return out, networks[-1][0]

    return run


def compare(network, run, sizes=SIZES):
    for size in sizes:
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), network(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize('family', IN_ONNX)
def test_onnx_takes_any_size(export, family, capsys):
    out, network = export(IN_ONNX[family], 'out.onnx')
    model = onnx.load(out)
    assert {opset.domain: opset.version for opset in model.opset_import}[''] == 20
    assert not any('mmattn' in node.op_type + node.domain for node in model.graph.node)
    session = onnxruntime.InferenceSession(out)
    compare(
        network, lambda images: torch.tensor(session.run(['logits'], {'images': images.numpy()})[0])
    )
    assert 'images 2x3x97x131: greatest difference' in capsys.readouterr().out


def test_a_low_opset_takes_any_size_by_the_legacy_exporter(export, capsys):
    out, network = export(GCVIT, 'out.onnx', '--opset', '11')
    assert onnx.load(out).opset_import[0].version == 11
    session = onnxruntime.InferenceSession(out)
    compare(
        network, lambda images: torch.tensor(session.run(['logits'], {'images': images.numpy()})[0])
    )
    assert "torch's legacy exporter, opset 11" in capsys.readouterr().out


def test_an_opset_without_an_operator_stops_with_its_name(export, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(DAT_CVPR, 'out.onnx', '--opset', '15')
    message = capsys.readouterr().err
    assert 'grid_sampler' in message and 'version 16' in message and '--shape' not in message
    assert not (tmp_path / 'out.onnx').exists()


@pytest.mark.parametrize('family', IN_PROGRAM)
def test_program_takes_any_size(export, family):
    out, network = export(IN_PROGRAM[family], 'out.pt2')
    program = torch.export.load(out)
    assert not any('mmattn' in str(node.target) for node in program.graph.nodes)
    compare(network, program.module())


@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_a_fixed_size_is_the_only_one(export, suffix, capsys):
    out, network = export(GCVIT, f'out.{suffix}', '--shape', '40', '75', '--backbone')
    assert 'images 3x3x40x75' in capsys.readouterr().out
    if suffix == 'pt2':
        run = torch.export.load(out).module()
    else:
        session = onnxruntime.InferenceSession(out)

        def run(images):
            return tuple(map(torch.tensor, session.run(['stage0'], {'images': images.numpy()})))

    compare(network, run, [(2, 3, 40, 75)])
    with pytest.raises(Exception, match=r'75|shape'):
        run(torch.randn(1, 3, 40, 80))


def test_no_file_remains_that_differs(export, monkeypatch, tmp_path, capsys):
    zeros = SimpleNamespace(module=lambda: lambda images: torch.zeros(len(images), 10))
    monkeypatch.setattr('torch.export.load', lambda path: zeros)
    with pytest.raises(SystemExit):
        export(GCVIT, 'out.pt2', '--shape', '32', '32')
    assert 'out.pt2 differs from the model on images 1x3x32x32' in capsys.readouterr().err
    assert not (tmp_path / 'out.pt2').exists()


def test_a_part_that_needs_a_fixed_size_says_so(export, tmp_path, capsys, monkeypatch):
    """No part of ours does; a stem that reads the height as a number stands for one that does."""
    forward = ConvStem.forward
    monkeypatch.setattr(ConvStem, 'forward', lambda self, x: forward(self, x) + int(x.shape[1]))
    arch = dict(GCVIT['arch'], depths=(1, 1, 1, 1))
    with pytest.raises(SystemExit):
        export(dict(GCVIT, arch=arch), 'out.pt2')
    assert '--shape H W' in capsys.readouterr().err
    assert not (tmp_path / 'out.pt2').exists()


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('out.pth', [], 'must end with .onnx or .pt2'),
        ('classifier.py.onnx', ['--opset', '10'], 'at least 11'),
    ],
)
def test_wrong_arguments_stop_before_the_export(export, name, options, message, capsys):
    with pytest.raises(SystemExit):
        export(GCVIT, name, *options)
    assert message in capsys.readouterr().err


def test_exports_hold_the_reference(monkeypatch):
    """Or the operator, with MMATTN_OPS=compiled."""
    module, x = WindowAttention(16, 2, 7).eval(), torch.randn(1, 9, 20, 16)
    program = torch.export.export(module, (x,))
    assert 'mmattn' not in str(program.graph)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), module(x))
    monkeypatch.setenv('MMATTN_OPS', 'compiled')
    assert 'mmattn.window_attention' in str(torch.export.export(module, (x,)).graph)
