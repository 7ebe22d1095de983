"""Published files by address: the name to keep them by, their hash and license."""

from __future__ import annotations

from typing import NamedTuple


class File(NamedTuple):
    """A published file.

    Attributes:
        name: by which a folder of weights holds it. Where its address has no name, or that of
            another published file, it is called as the config that it belongs to.
        sha256: of its content, as its host states it; '' where it states none.
        license: one sentence on where the weights come from and what their license is.
    """

    name: str
    sha256: str
    license: str


_NVIDIA = 'weights of NVlabs/GCVit, CC BY-NC-SA 4.0: not for commercial use'
_TIMM = (
    'weights of NVlabs/GCVit of 2022, converted by timm, CC BY-NC-SA 4.0: not for commercial use'
)
_DAT = 'weights of LeapLabTHU/DAT, whose code is under Apache-2.0; nothing is said of the weights'
_DAT_COCO = 'weights of LeapLabTHU/DAT-Detection, which states no license'
_DAT_ADE20K = 'weights of LeapLabTHU/DAT-Segmentation, which states no license'
_QUADTREE = (
    'weights of Tangshitao/QuadTreeAttention, whose code is under MIT; '
    'nothing is said of the weights'
)
_MATCHING = (
    'weights of Tangshitao/QuadTreeAttention, whose matching code is under Apache-2.0; '
    'nothing is said of the weights'
)

# ImageNet classifiers of GC ViT, 2023: the file, and its hash.
_GCVIT = {
    'gcvit_1k_xxtiny': '',
    'gcvit_1k_xtiny': 'd7754bac609e72e3381d6c2455424ba266bd295924eaa787188a4be40f7d394f',
    'gcvit_1k_tiny': '30ac1c312765a6fea8fff75d7e15b18f675d923f8c1af041d226041865add8b7',
    'gcvit_1k_tiny2': 'aed13457a55f56a6f8107598ab255dc86576417361e6518553447438e136e4c5',
    'gcvit_1k_small': '',
    'gcvit_1k_small2': '2252d049e127dcbb4d97e641c6fc345c8304e0e0bff6e2243065554826e52f60',
    'gcvit_1k_base': '068b5af7c13234fe3cbee7f4e5a622d1545a706d92bdb6bf69cd0f922aa444ec',
    'gcvit_1k_large': '',
    'gcvit_21k_large_224': '59c5a785b45d9babc40eb818feebdc32a848ac62da13cb1716aacc8c66873956',
    'gcvit_21k_large_384': '9ee1f5e378e208f4ae41c4643da205d819879a1906d72fdd87771ad965e22ebd',
    'gcvit_21k_large_512': 'dbc633d63bd234ae32d5636fdbc860df3a445c3b22b4c41699dc780c812be890',
}
# The same of 2022, from timm; their hashes begin as their names say.
_GCVIT_TIMM = (
    'gcvit_xxtiny_224_nvidia-d1d86009.pth',
    'gcvit_xtiny_224_nvidia-274b92b7.pth',
    'gcvit_tiny_224_nvidia-ac783954.pth',
    'gcvit_small_224_nvidia-4e98afa2.pth',
    'gcvit_base_224_nvidia-f009139b.pth',
)
# Share links of DAT and DAT++, which have no file name.
_DAT_SHARES = {
    _DAT: {
        '1367349deefc48efa650': 'dat_tiny_in1k_224',
        'f04b18081e3e4606adb7': 'dat_small_in1k_224',
        'a8d2a9645d454120b635': 'dat_base_in1k_224',
        'cf6a6b543cd64e0d8e43': 'dat_base_in1k_384',
        '14c5ddae10b642e68089': 'dat_pp_tiny_in1k_224',
        '4c2a76360c964fbd81d5': 'dat_pp_small_in1k_224',
        '8e30492404d348d89f25': 'dat_pp_base_in1k_224',
        '032dc804cdf44bf18bb5': 'dat_pp_base_in1k_384',
    },
    _DAT_COCO: {
        '8e49b993adf242829ee1': 'retinanet_dat_tpp_1x_coco',
        'ff4e48c036cb4d9badca': 'retinanet_dat_tpp_3x_coco',
        'c1585651b3ec41fa9eb5': 'retinanet_dat_spp_1x_coco',
        '3687b77098a647adb54f': 'retinanet_dat_spp_3x_coco',
        '2b61106279ae488bbb45': 'mask_rcnn_dat_tpp_1x_coco',
        'a7db396a372449779347': 'mask_rcnn_dat_tpp_3x_coco',
        '8f3653c027974136a74a': 'mask_rcnn_dat_spp_1x_coco',
        '3bde5a98a0ca46d8b2ee': 'mask_rcnn_dat_spp_3x_coco',
        '35be35faa96044ee8561': 'cascade_mask_rcnn_dat_tpp_1x_coco',
        '1aa96891dda24451bbf8': 'cascade_mask_rcnn_dat_tpp_3x_coco',
        '17d84d4f5ae2457285af': 'cascade_mask_rcnn_dat_spp_3x_coco',
        '9ea06105dd394b8d97ac': 'cascade_mask_rcnn_dat_bpp_3x_coco',
    },
    _DAT_ADE20K: {
        '9a9df06dec1440a39bcb': 'fpn_dat_tpp_ade20k',
        'f4333e084ef74ca3b8f6': 'fpn_dat_spp_ade20k',
        '9df9eb212f154168aab7': 'fpn_dat_bpp_ade20k',
        'de75c7e1622847268f4f': 'upernet_dat_tpp_ade20k',
        '2f4a2be90a08477fa4b3': 'upernet_dat_spp_ade20k',
        '7c442d4371c4433aa428': 'upernet_dat_bpp_ade20k',
    },
}
# Releases of QuadTree: names of the files at their addresses, and here. Three are called b0.pth.
_QUADTREE_RELEASES = {
    'QuadTreeAttention': ('{}.pth', 'quadtree_{}_imagenet.pth'),
    'QuadTreeAttention_detection': ('{}.pth', 'retinanet_quadtree_{}_1x_coco.pth'),
    'QuadTreeAttention_maskrcnn': ('{}_1x.pth', 'mask_rcnn_quadtree_{}_1x_coco.pth'),
    'QuadTreeAttention_seg': ('{}.pth', 'fpn_quadtree_{}_ade20k.pth'),
}

_HUGGING_FACE = 'https://huggingface.co/nvidia/GCViT/resolve/main'
_TIMM_RELEASE = (
    'https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-morevit'
)
_SHARE = 'https://cloud.tsinghua.edu.cn/f/{}/?dl=1'
_QUADTREE_RELEASE = 'https://github.com/Tangshitao/QuadTreeAttention/releases/download'

PUBLISHED: dict[str, File] = {
    **{
        f'{_HUGGING_FACE}/{stem}.pth.tar': File(f'{stem}.pth.tar', sha256, _NVIDIA)
        for stem, sha256 in _GCVIT.items()
    },
    **{f'{_TIMM_RELEASE}/{name}': File(name, '', _TIMM) for name in _GCVIT_TIMM},
    **{
        _SHARE.format(share): File(f'{stem}.pth', '', license)
        for license, shares in _DAT_SHARES.items()
        for share, stem in shares.items()
    },
    **{
        f'{_QUADTREE_RELEASE}/{tag}/{there.format(size)}': File(here.format(size), '', _QUADTREE)
        for tag, (there, here) in _QUADTREE_RELEASES.items()
        for size in ('b0', 'b1', 'b2', 'b3', 'b4')
    },
    **{
        f'{_QUADTREE_RELEASE}/QuadTreeAttention_feature_match/{name}': File(name, '', _MATCHING)
        for name in ('indoor.ckpt', 'outdoor.ckpt')
    },
}
