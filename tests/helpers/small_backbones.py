"""A backbone of each family, small enough that a forward pass takes no time."""

import torch

from mmattn.backbones import DAT, GCViT, QuadTree


def small_backbone(family):
    torch.manual_seed(0)
    if family == 'gcvit':
        arch = dict(embed_dims=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2)
        model = GCViT(arch, window_size=(4, 4, 4, 4), resolution=64)
    elif family == 'dat':
        arch = dict(
            dims=(16, 32, 32, 32),
            blocks=('L', 'LS', 'LD', 'D'),
            num_heads=(1, 2, 4, 4),
            groups=(0, 0, 2, 4),
        )
        model = DAT(arch, img_size=64, window_size=4)
    elif family == 'dat++':
        arch = dict(
            dims=(16, 32, 32, 32),
            blocks=('D', 'ND', 'N', 'D'),
            num_heads=(1, 2, 4, 4),
            groups=(1, 1, 0, 4),
            strides=(8, 4, 2, 1),
            plus_plus=True,
            offset_range=None,
        )
        model = DAT(arch, img_size=64)
    else:
        arch = dict(embed_dims=(16, 32, 40, 64), depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2))
        model = QuadTree(arch, topks=4)
    for name, parameter in model.named_parameters():
        if 'qkv' in name or 'proj_q' in name:
            parameter.data *= 20  # fresh weights attend to all alike
        if 'q_proj' in name or 'k_proj' in name:
            parameter.data *= 3
    return model.eval()


FAMILIES = ('gcvit', 'dat', 'dat++', 'quadtree')
