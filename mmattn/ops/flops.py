"""A FLOP formula that torch's counter lacks."""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count


def count_fused_attention_on_cpu():
    """Let ``torch.utils.flop_counter`` count scaled_dot_product_attention's fused CPU kernel, which it leaves out."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    if kernel not in flop_registry:

        @register_flop_formula(kernel)
        def flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
            return sdpa_flop_count(query_shape, key_shape, value_shape)
