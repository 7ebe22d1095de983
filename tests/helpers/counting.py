"""Parameters and multiply-adds of a model, counted as in the metafiles."""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def fused_attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


# torch's counter has no formula for scaled_dot_product_attention's fused CPU kernel.
FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_attention_flops,
}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Convolutions and linear layers.
LAYERS = {torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm}


def multiply_adds(model, size, layers_only=False):
    """Multiply-adds of a model for one image of ``size`` (height, width), on the meta device.

    A segmentor's auxiliary head is left out, as it is used in training only. Box heads get 1000
    proposals, as in testing, and mask heads 100 boxes, the most that testing keeps. With
    ``layers_only``, the products of attention are left out, too.
    """
    model.eval()
    with (
        torch.device('meta'),
        FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter,
    ):
        image = torch.empty(1, 3, *size)
        if not hasattr(model, 'bbox_head') and not hasattr(model, 'roi_head'):
            model(image, mode='tensor')
        elif not hasattr(model, 'roi_head'):
            model.bbox_head(model.extract_feat(image))
        else:
            model.rpn_head(model.extract_feat(image))
            for heads, number, side in (('bbox_head', 1000, 7), ('mask_head', 100, 14)):
                heads = getattr(model.roi_head, heads)
                regions = torch.empty(number, model.neck.out_channels, side, side)
                for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                    head(regions)
    found = counter.get_flop_counts()['Global']
    return sum(n for op, n in found.items() if not layers_only or op in LAYERS) // 2


def projections_of_padding(backbone, size):
    """Multiply-adds of projecting the tokens that complete windows, which mmattn saves."""
    added = []

    def count(attention, inputs, _):
        _, height, width, _ = inputs[0].shape
        side = attention.window_size
        padding = math.ceil(height / side) * math.ceil(width / side) * side**2 - height * width
        weights = attention.qkv.weight.numel() + attention.proj.weight.numel()
        added.append(padding * weights)

    for module in backbone.modules():
        if hasattr(module, 'window_size') and hasattr(module, 'qkv'):
            module.register_forward_hook(count)
    backbone(torch.empty(1, 3, *size, device='meta'))
    return sum(added)
