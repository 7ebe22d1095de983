"""Small backbones of each kind."""

import torch

from mmattn.backbones import DAT, GCViT, QuadTree

KINDS = {
    'gcvit': (
        GCViT,
        dict(
            embed_dims=32,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 8),
            mlp_ratio=2,
            layer_scale=0.5,
        ),
        dict(window_size=(3, 3, 6, 3), resolution=96),
    ),
    'dat': (
        DAT,
        dict(
            dims=(16, 32, 64, 128),
            blocks=('LS', 'LD', 'LD', 'LD'),
            num_heads=(1, 2, 4, 8),
            groups=(0, 1, 2, 4),
        ),
        dict(img_size=96, window_size=3),
    ),
    'dat++': (
        DAT,
        dict(
            dims=(16, 32, 64, 128),
            blocks=('ND', 'ND', 'ND', 'DD'),
            num_heads=(1, 2, 4, 8),
            groups=(1, 1, 2, 4),
            strides=(8, 4, 2, 1),
            plus_plus=True,
            offset_range=None,
        ),
        dict(img_size=96),
    ),
    'quadtree': (
        QuadTree,
        dict(embed_dims=(16, 32, 40, 64), depths=(2, 1, 1, 2), mlp_ratios=(2, 2, 2, 2)),
        dict(topks=3),
    ),
}
KINDS['quadtree A'] = (*KINDS['quadtree'][:2], dict(topks=3, attn_type='A'))


def small(kind, seed=0, **options):
    """Build a backbone in evaluation mode, with random biases, as zeros would hide errors."""
    backbone, arch, defaults = KINDS[kind]
    torch.manual_seed(seed)
    model = backbone(**dict(arch=arch) | defaults | options)
    for name, parameter in model.named_parameters():
        if 'bias' in name and 'table' not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def channels(kind):
    """Channels of the four maps."""
    arch = KINDS[kind][1]
    return arch.get('dims') or ([32, 64, 128, 256] if kind == 'gcvit' else list(arch['embed_dims']))


def small_backbone(family):
    """Build a backbone with uneven attention weights, for pictures."""
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
        # Fresh weights attend to all tokens equally.
        if family == 'quadtree' and ('q_proj' in name or 'k_proj' in name):
            parameter.data *= 3
        elif 'qkv' in name or 'q_proj' in name:
            parameter.data *= 20
    return model.eval()


FAMILIES = ('gcvit', 'dat', 'dat++', 'quadtree')
