"""Exit with 1 if mmcv's operators are missing, fit another torch, or lack CUDA beside a GPU."""

import torch
from mmcv.ops import get_compiling_cuda_version

raise SystemExit(torch.cuda.is_available() and get_compiling_cuda_version() == 'not available')
