"""Backbones in graphs that torch.jit.trace, TensorBoard and the legacy ONNX exporter record."""

import io
import warnings

import onnx
import onnxruntime
import pytest
import torch
from helpers.small_backbones import KINDS, channels, small
from mmdet.models.necks import FPN
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mmattn.backbones import DAT

# The second one is a single window in stage 2 of GC ViT and in stage 3 of GC ViT and DAT.
TRACED = (2, 3, 97, 131), (1, 3, 96, 96)
SIZES = (2, 3, 97, 131), (1, 3, 96, 96), (3, 3, 160, 224), (1, 3, 101, 33)
# torch writes bilinear sampling, DAT's, from opset 16 on; ONNX has none before.
FIRST_OPSET = {'gcvit': 11, 'dat': 16, 'dat++': 16, 'quadtree': 11, 'quadtree A': 11}

pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')


def compare(run, model, atol, sizes=SIZES):
    for size in sizes:
        images = torch.randn(size)
        # Without optimization: torch would optimize each traced graph for each size.
        with torch.no_grad(), torch.jit.optimized_execution(False):
            got, expected = run(images), model(images)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=atol * max(1, b.abs().max().item()), rtol=0)


def legacy_onnx(model, size, opset, num_outputs):
    """The model in ONNX, of any size, by the exporter that mmdeploy calls, as a function."""
    names = [f'stage{i}' for i in range(num_outputs)]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # DeprecationWarning, and the tracer's own
        torch.onnx.export(
            model,
            (torch.randn(size),),
            file,
            opset_version=opset,
            dynamo=False,
            input_names=['images'],
            output_names=names,
            dynamic_axes={'images': {0: 'batch', 2: 'height', 3: 'width'}},
        )
    graph = onnx.load_from_string(file.getvalue())
    assert graph.opset_import[0].version == opset
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    return lambda images: [torch.tensor(x) for x in session.run(names, {'images': images.numpy()})]


@pytest.mark.parametrize('traced', TRACED, ids=['odd', 'one window'])
@pytest.mark.parametrize('kind', KINDS)
def test_traced_graphs_take_any_size(kind, traced):
    model = small(kind)
    trace = torch.jit.trace(model, torch.randn(traced))
    compare(trace, model, atol=0)


@pytest.mark.no_backend
def test_traced_graphs_hold_the_operators():
    trace = torch.jit.trace(small('dat++'), torch.randn(TRACED[0]))
    graph = str(trace.inlined_graph)
    assert 'mmattn::neighborhood_attention' in graph and 'mmattn::deform_attention' in graph


@pytest.mark.no_backend
@pytest.mark.parametrize('kind', KINDS)
def test_legacy_onnx_takes_any_size(kind):
    """The lowest opset, recorded with a map of one window; the highest, with an odd size."""
    model = small(kind)
    for opset, size in ((FIRST_OPSET[kind], TRACED[1]), (20, TRACED[0])):
        compare(legacy_onnx(model, size, opset, 4), model, atol=1e-4)


@pytest.mark.no_backend
def test_legacy_onnx_of_bilinear_sampling_names_the_opset():
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match='added in version 16'):
        legacy_onnx(small('dat'), TRACED[0], 15, 4)


@pytest.mark.no_backend
def test_legacy_onnx_of_a_classifier():
    init_default_scope('mmpretrain')
    arch = dict(
        embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, layer_scale=0.5
    )
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='GCViT', arch=arch, out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=128),
        )
    ).eval()
    run = legacy_onnx(model, TRACED[0], 13, 1)
    compare(run, lambda images: (model(images),), atol=1e-4)


class BackboneAndNeck(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.backbone = small(kind)
        self.neck = FPN(list(channels(kind)), out_channels=16, num_outs=5)

    def forward(self, images):
        return self.neck(self.backbone(images))


@pytest.mark.no_backend
def test_legacy_onnx_of_a_detectors_backbone_and_neck():
    model = BackboneAndNeck('dat').eval()
    compare(legacy_onnx(model, TRACED[0], 17, 5), model, atol=1e-4)


@pytest.mark.no_backend
def test_tensorboard_draws_the_graph(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = DAT(KINDS['dat++'][1] | dict(blocks=('N', 'N', 'D', 'D')))
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(model.eval(), torch.randn(1, 3, 64, 64))
    events = EventAccumulator(str(tmp_path)).Reload()
    operators = {node.op for node in events.Graph().node}
    assert {'mmattn::neighborhood_attention', 'mmattn::deform_attention'} <= operators
