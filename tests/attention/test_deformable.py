import pytest
import torch
import torch.nn.functional as F

from mmattn.attention import DeformableAttention


def randomize(module, std=0.3):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.double().eval()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(plus_plus=False, stride=1, groups=2, **options):
    if plus_plus:
        options.setdefault('offset_range', None)
    return randomize(
        DeformableAttention(16, 4, groups, 6, stride, 5, plus_plus=plus_plus, **options)
    )


def first(linear, maps):
    """Apply a linear layer to channel-first maps."""
    return linear(maps.movedim(1, -1)).movedim(-1, 1)


def weigh(details, values, x):
    """Weights times values (B, heads, d, H_k, W_k) -> (B, C, H, W) for a map like x."""
    out = torch.einsum('bhnij,bhcij->bhcn', details.weights, values)
    return out.flatten(1, 2).unflatten(2, x.shape[1:3])


def sample(x, positions):
    """A map (B, H, W, 16) at the positions of two groups, (B, 16, H_k, W_k)."""
    groups = x.permute(0, 3, 1, 2).chunk(2, dim=1)
    grids = positions.flip(-1).unbind(1)
    sampled = (
        F.grid_sample(group, grid, align_corners=True)
        for group, grid in zip(groups, grids, strict=True)
    )
    return torch.cat(list(sampled), dim=1)


@pytest.mark.parametrize('plus_plus', [False, True])
@pytest.mark.parametrize('stride', [1, 2, 4])
def test_definition_query_by_query(plus_plus, stride):
    """Equations 3 to 8 of the DAT paper, one query and one key at a time."""
    module, x = make(plus_plus, stride), draw(1, 5, 9, 16)
    details, out = module.details(x), module(x)
    height_k, width_k = details.references.shape[:2]
    assert (height_k, width_k) == (-(-5 // stride), -(-9 // stride))
    maps = x.permute(0, 3, 1, 2)
    sampled = sample(x, details.positions)
    q, k, v = (
        first(module.q_proj, maps),
        first(module.k_proj, sampled),
        first(module.v_proj, sampled),
    )
    side = 2 * 6 - 1
    expected = torch.empty_like(maps)
    for head in range(4):
        channels = slice(4 * head, 4 * head + 4)
        for y, x_ in torch.cartesian_prod(torch.arange(5), torch.arange(9)).tolist():
            if plus_plus:
                place = torch.tensor([y / 4 * 2 - 1, x_ / 8 * 2 - 1], dtype=torch.float64)
            else:
                place = torch.tensor(
                    [(y + 0.5) / 5 * 2 - 1, (x_ + 0.5) / 9 * 2 - 1], dtype=torch.float64
                )
            apart = (place - details.positions[0, head // 2]) / 2
            cell = (apart + 1) / 2 * (side - 1)
            bias = torch.zeros(height_k, width_k, dtype=torch.float64)
            for row, column in torch.cartesian_prod(
                torch.arange(side), torch.arange(side)
            ).tolist():
                weight = (1 - (cell[..., 0] - row).abs()).clamp(0) * (
                    1 - (cell[..., 1] - column).abs()
                ).clamp(0)
                bias += weight * module.position_bias.table[head, row, column]
            scores = torch.einsum('c,cij->ij', q[0, channels, y, x_], k[0, channels]) / 2 + bias
            weights = scores.flatten().softmax(0).view_as(scores)
            torch.testing.assert_close(details.weights[0, head, 9 * y + x_], weights)
            expected[0, channels, y, x_] = torch.einsum('ij,cij->c', weights, v[0, channels])
    torch.testing.assert_close(out, module.proj(expected.permute(0, 2, 3, 1)))


def test_positions_are_the_references_plus_bounded_offsets():
    details = make(offset_range=2.0).details(draw(2, 6, 8, 16))
    steps = (details.positions - details.references) * torch.tensor([6, 8])
    assert details.references[0, 0].tolist() == pytest.approx([1 / 6 - 1, 1 / 8 - 1])
    assert 0.1 < steps.abs().max() <= 2


def test_plus_plus_clamps_to_the_map():
    module = make(plus_plus=True, stride=2)
    module.offsets.proj.weight.data *= 1e3
    positions = module.details(draw(1, 7, 8, 16)).positions
    assert positions.abs().max() == 1 and (positions.abs() == 1).double().mean() > 0.5


@pytest.mark.parametrize('stride', [1, 2])
def test_without_offsets_attention_is_plain(stride):
    module = make(offsets=False, position_bias='none', plus_plus=True, stride=stride)
    x = draw(1, 5, 9, 16)
    references = module.details(x).references
    # The reference points lie between cells: the keys are a fixed blend of neighboring ones.
    maps = x.permute(0, 3, 1, 2)
    sampled = F.grid_sample(maps, references.flip(-1)[None], align_corners=True)
    q, k, v = (
        t.flatten(2).unflatten(1, (4, 4)).transpose(2, 3)
        for t in (
            first(module.q_proj, maps),
            first(module.k_proj, sampled),
            first(module.v_proj, sampled),
        )
    )
    plain = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(1, 16, 5, 9)
    torch.testing.assert_close(module(x), module.proj(plain.permute(0, 2, 3, 1)))


@pytest.mark.parametrize('position_bias', ['none', 'table'])
def test_zero_offsets_are_plain_strided_attention(position_bias):
    """On 5 x 7 cells, stride 3 puts the reference points on centers of every second cell."""
    module, x = make(stride=3, position_bias=position_bias), draw(2, 5, 7, 16)
    with torch.no_grad():
        module.offsets.proj.weight.zero_()
        if position_bias == 'table':
            # One value for all displacements of a head: softmax cancels it.
            table = module.position_bias.table
            table.copy_(draw(4, 1, 1).expand_as(table))
    maps = x.permute(0, 3, 1, 2)
    strided = maps[:, :, 1::2, 1::2]
    assert strided.shape[2:] == module.details(x).references.shape[:2] == (2, 3)
    q, k, v = (
        t.flatten(2).unflatten(1, (4, 4)).transpose(2, 3)
        for t in (
            first(module.q_proj, maps),
            first(module.k_proj, strided),
            first(module.v_proj, strided),
        )
    )
    plain = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 16, 5, 7)
    torch.testing.assert_close(module(x), module.proj(plain.permute(0, 2, 3, 1)))


def test_groups_have_their_own_offsets():
    module, x = make(groups=4), draw(1, 6, 6, 16)
    before = module.details(x)
    with torch.no_grad():
        module.q_proj.weight[:4] += 1  # the first group's queries
    after = module.details(x)
    assert not torch.equal(before.positions[:, 0], after.positions[:, 0])
    assert torch.equal(before.positions[:, 1:], after.positions[:, 1:])


def test_permuting_groups_permutes_the_output():
    module, x = make(groups=4), draw(1, 6, 6, 16)
    order = torch.tensor([2, 0, 3, 1])
    channels = (4 * order[:, None] + torch.arange(4)).flatten()
    twin = make(groups=4)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        for ours, theirs in (
            (twin.q_proj, module.q_proj),
            (twin.k_proj, module.k_proj),
            (twin.v_proj, module.v_proj),
        ):
            ours.weight.copy_(theirs.weight[channels][:, channels])
            ours.bias.copy_(theirs.bias[channels])
        twin.proj.weight.copy_(module.proj.weight[channels][:, channels])
        twin.proj.bias.copy_(module.proj.bias[channels])
        twin.position_bias.table.copy_(module.position_bias.table[order])
    torch.testing.assert_close(twin(x[..., channels]), module(x)[..., channels])


def test_details_are_what_the_output_is_made_of():
    module, x = make(), draw(2, 5, 4, 16)
    details = module.details(x)
    torch.testing.assert_close(
        details.weights.sum((-2, -1)), torch.ones(2, 4, 20, dtype=torch.float64)
    )
    sampled = sample(x, details.positions)
    values = first(module.v_proj, sampled).unflatten(1, (4, 4))
    out = weigh(details, values, x)
    torch.testing.assert_close(module.proj(out.permute(0, 2, 3, 1)), module(x))


@pytest.mark.parametrize('position_bias', ['fixed', 'log_cpb', 'depthwise', 'none'])
def test_ablations_of_the_position_bias(position_bias):
    module = make(position_bias=position_bias, stride=2)
    for size in ((6, 6), (5, 9)):  # the size of the fixed bias, and another
        x = draw(2, *size, 16).requires_grad_()
        details, out = module.details(x), module(x)
        values = first(module.v_proj, sample(x, details.positions)).unflatten(1, (4, 4))
        expected = weigh(details, values, x)
        if position_bias == 'depthwise':
            expected = expected + module.position_bias.conv(module.q_proj(x).permute(0, 3, 1, 2))
        torch.testing.assert_close(out, module.proj(expected.permute(0, 2, 3, 1)))
        out.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_positions_keep_float32_under_autocast(dtype):
    module = make().float()
    x = draw(1, 50, 84, 16).float()
    exact = module.details(x)
    with torch.autocast('cpu', dtype):
        low = module.details(x)
    assert low.positions.dtype == torch.float32 and torch.equal(low.references, exact.references)
    # Offsets carry the queries' rounding, but positions are not rounded: in bfloat16, positions at
    # the end of 84 columns would be multiples of a third of a pixel.
    pixels = (low.positions - exact.positions).abs() * torch.tensor([25, 42])
    assert pixels.max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_samples_under_autocast_differ_by_rounding_only(dtype):
    """One sample per group, returned unchanged: positions in ``dtype`` would err far more."""
    module = randomize(
        DeformableAttention(16, 4, 4, 6, 84, kernel_size=1, offset_range=1.0)
    ).float()
    with torch.no_grad():
        module.offsets.norm.weight.fill_(1)
        for bias in (module.offsets.dwconv.bias, module.offsets.norm.bias):
            bias.zero_()
        module.offsets.proj.weight.copy_(draw(2, 4))
        for projection in (module.v_proj, module.proj):
            projection.weight.copy_(torch.eye(16))
            projection.bias.zero_()
    x = draw(32, 50, 84, 16).float()
    with torch.autocast('cpu', dtype):
        out, positions = module(x), module.details(x).positions
    assert positions.shape == (32, 4, 1, 1, 2) and positions.dtype == torch.float32
    assert positions.abs().max() < 1 and positions.std() > 0.3
    maps = x.double().permute(0, 3, 1, 2).reshape(128, 4, 50, 84)

    def sampled(positions):
        grid = positions.double().flip(-1).reshape(128, 1, 1, 2)
        return F.grid_sample(maps, grid, align_corners=True).view(32, 1, 1, 16)

    def spread(x):
        return x.square().mean().sqrt()

    exact = sampled(positions)
    rounding = torch.finfo(dtype).eps * spread(exact)
    assert spread(out - exact) < rounding
    if dtype == torch.bfloat16:
        assert spread(sampled(positions.to(dtype)) - exact) > 8 * rounding


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'arguments, name',
    [
        ((30, 4, 2, 6), 'num_heads'),
        ((32, 4, 3, 6), 'groups'),
        ((32, 4, 0, 6), 'groups'),
        ((32, 4, 2, 0), 'table_size'),
        ((32, 4, 2, 6, 0), 'stride'),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        DeformableAttention(*arguments)
