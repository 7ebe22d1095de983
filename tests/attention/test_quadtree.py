import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from torch.utils.flop_counter import FlopCounterMode

from mmattn.attention import QuadTreeAttention, quadtree_attention
from mmattn.attention.pyramid import attend_pyramids


def draw(*shape, seed):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def pyramid(x, levels):
    maps = [x]
    for _ in range(levels - 1):
        maps.append(F.avg_pool2d(maps[-1], 2))
    return maps


def make(levels, height=8, width=8, key_height=8, key_width=8, batch=1, channels=4):
    """Independent maps at every level, so that an error in one of them shows."""
    return [
        [draw(batch, channels, h >> i, w >> i, seed=10 * n + i) for i in range(levels)]
        for n, (h, w) in enumerate(((height, width), *[(key_height, key_width)] * 2))
    ]


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.double()


def pixel_by_pixel(queries, keys, values, num_heads, topks, attn_type, weights=None, extent=None):
    """The paper's definition, for one query pixel and one head at a time."""
    levels = len(queries)
    batch, channels, height, width = queries[0].shape
    d = channels // num_heads
    out = queries[0].new_zeros(batch, height * width, num_heads, d)
    mix = [1.0] * levels if weights is None else weights.softmax(0)
    extent = keys[0].shape[2:] if extent is None else extent
    ranges = map(torch.arange, (batch, num_heads, height, width))
    for b, h, y, x in torch.cartesian_prod(*ranges).tolist():
        own = slice(h * d, (h + 1) * d)
        kept, message = None, 0
        for i, topk in enumerate(topks):
            level = levels - 1 - i

            def inside(place, level=level):
                return place[0] << level < extent[0] and place[1] << level < extent[1]

            q = queries[level][b, own, y >> level, x >> level]
            if kept is None:
                key_height, key_width = keys[level].shape[2:]
                places = [(r, c) for r in range(key_height) for c in range(key_width)]
                groups = [(1.0, places)]
            else:
                groups = [
                    (score, [(2 * r + n // 2, 2 * c + n % 2) for n in range(4)])
                    for (r, c), score in kept
                ]
                places = [place for _, group in groups for place in group]
                if attn_type == 'B':
                    groups = [(1.0, places)]
            p = {}
            for score, group in groups:
                s = {
                    n: (q @ keys[level][b, own, n[0], n[1]] / d**0.5).exp()
                    for n in group
                    if inside(n)
                }
                total = sum(s.values())
                p |= {
                    n: score * s[n] / total if n in s else torch.zeros(()).double() for n in group
                }
            ranked = sorted(
                range(len(places)), key=lambda n: (not inside(places[n]), -p[places[n]].item(), n)
            )
            chooses = level > 0 or (attn_type == 'A' and levels == 1)
            kept = [(places[n], p[places[n]]) for n in ranked[:topk]] if chooses else []
            refined = {place for place, _ in kept} if attn_type == 'A' else ()
            message = message + mix[i] * sum(
                p[n] * values[level][b, own, n[0], n[1]] for n in places if n not in refined
            )
        out[b, y * width + x, h] = message
    return out


@pytest.mark.parametrize(
    'attn_type, levels, sizes, topks, extent',
    [
        ('B', 1, (3, 2, 2, 3), (2,), None),
        ('A', 1, (3, 2, 2, 3), (2,), None),
        ('B', 2, (4, 2, 6, 4), (2, 1), None),
        ('A', 2, (4, 2, 6, 4), (2, 1), None),
        ('B', 3, (8, 4, 4, 8), (1, 3, 1), None),
        ('A', 3, (8, 4, 4, 8), (1, 3, 1), None),
        ('B', 3, (4, 4, 8, 8), (9, 9, 9), (5, 7)),
        ('A', 3, (4, 4, 8, 8), (2, 9, 9), (5, 6)),
        ('B', 3, (4, 4, 8, 8), (2, 3, 1), (1, 5)),
    ],
)
def test_definition_pixel_by_pixel(attn_type, levels, sizes, topks, extent):
    inputs = make(levels, *sizes)
    weights = draw(levels, seed=99) if attn_type == 'B' else None
    leaves = [x for maps in inputs for x in maps] + ([] if weights is None else [weights])
    results = []
    for attention in (quadtree_attention, pixel_by_pixel):
        out = attention(*inputs, 2, topks, attn_type, weights, extent)
        loss = (out * draw(*out.shape, seed=100)).sum()
        results.append((out, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_cross_attention_is_the_published_one():
    case = golden.Case('quadtree_cross_b')
    query_map, context = (golden.image((2, 256, 32, 40), seed) for seed in (0, 1))
    maps = [pyramid(x, 3) for x in (query_map, context, 0.5 * context)]
    weights = golden.tensor('a.weight', (3,))
    out = quadtree_attention(*maps, 8, 16, 'B', weights)
    assert case.output_error('message', out) < 1e-9


@pytest.mark.parametrize('attn_type', 'AB')
def test_gradcheck(attn_type):
    inputs = [x for maps in make(2, 2, 4, 4, 4) for x in maps]

    def function(*maps):
        return quadtree_attention(maps[:2], maps[2:4], maps[4:], 2, 2, attn_type)

    assert torch.autograd.gradcheck(function, inputs)


def heads_first(x, num_heads):
    return x.unflatten(1, (num_heads, -1)).flatten(3).transpose(2, 3)


def test_one_level_with_all_keys_is_plain_attention():
    (q,), (k,), (v,) = inputs = make(1, 5, 7, 4, 3, batch=2, channels=12)
    out = quadtree_attention(*inputs, 3, 12)
    plain = F.scaled_dot_product_attention(*(heads_first(x, 3) for x in (q, k, v)))
    torch.testing.assert_close(out, plain.transpose(1, 2))


def test_type_a_with_all_keys_is_a_product_of_softmaxes():
    """p(key): softmax over the coarsest keys, times softmax over 4 children per finer level."""
    inputs = make(3, 8, 12, 12, 4, batch=2, channels=6)
    queries, keys, values = inputs
    p = None
    for level in (2, 1, 0):
        q, k = heads_first(queries[level], 2), heads_first(keys[level], 2)
        scores = (q @ k.transpose(2, 3) / 3**0.5).unflatten(2, queries[level].shape[2:])
        scores = scores.unflatten(4, keys[level].shape[2:])  # (B, heads, H, W, H', W')
        if p is None:
            p = scores.flatten(4).softmax(-1).view_as(scores)
        else:
            cells = scores.unflatten(5, (-1, 2)).unflatten(4, (-1, 2)).transpose(5, 6)
            cells = cells.flatten(6).softmax(-1).unflatten(6, (2, 2)).transpose(5, 6)
            for dim in (2, 3, 4, 5):
                p = p.repeat_interleave(2, dim)
            p = p * cells.flatten(6, 7).flatten(4, 5)
    direct = p.flatten(4).flatten(2, 3) @ heads_first(values[0], 2)
    out = quadtree_attention(*inputs, 2, 48, 'A')
    torch.testing.assert_close(out, direct.transpose(1, 2), rtol=0, atol=1e-12)


def test_larger_k_approaches_full_attention():
    torch.manual_seed(0)
    smooth = [3 * F.avg_pool2d(torch.randn(1, 64, 34, 34), 3, 1) for _ in 'qk']
    q, k = (pyramid(x, 3) for x in smooth)
    v = [
        torch.randn(1, 64, 32, 32),
        torch.zeros(1, 64, 16, 16),
        torch.zeros(1, 64, 8, 8),
    ]  # the finest message alone
    full = F.scaled_dot_product_attention(*(heads_first(x[0], 4) for x in (q, k, v)))
    errors = [
        (quadtree_attention(q, k, v, 4, topk) - full.transpose(1, 2)).norm() / full.norm()
        for topk in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5 and errors[-1] < 1e-5


@pytest.mark.parametrize('attn_type', 'AB')
@pytest.mark.parametrize('levels', [1, 2, 3, 4, 5])
def test_images_and_heads_do_not_mix(attn_type, levels):
    inputs = make(levels, 16, 32, 32, 16, batch=3, channels=6)
    out = quadtree_attention(*inputs, 3, 3, attn_type)
    images, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    permuted = [
        [x[images].unflatten(1, (3, 2))[:, heads].flatten(1, 2) for x in maps] for maps in inputs
    ]
    again = quadtree_attention(*permuted, 3, 3, attn_type)
    torch.testing.assert_close(again, out[images][:, :, heads], rtol=0, atol=1e-12)


def test_weights_of_the_levels_sum_to_one():
    queries, keys, values = make(3, 8, 12, 12, 8)
    values = [torch.ones_like(x) for x in values]
    out = quadtree_attention(queries, keys, values, 2, 2, 'B', 5 * draw(3, seed=0))
    torch.testing.assert_close(out, torch.ones_like(out))
    out = quadtree_attention(queries, keys, values, 2, 2, 'B')
    torch.testing.assert_close(out, torch.full_like(out, 3))
    out = quadtree_attention(queries, keys, values, 2, 2, 'A')
    torch.testing.assert_close(out, torch.ones_like(out))


def test_weights_are_coarsest_first():
    queries, keys, values = make(3)
    values = [torch.full_like(x, i) for i, x in enumerate(values)]  # 2 at the coarsest
    weights = torch.tensor([50.0, 0, 0], dtype=torch.float64)
    out = quadtree_attention(queries, keys, values, 2, 2, 'B', weights)
    torch.testing.assert_close(out, torch.full_like(out, 2))


@pytest.mark.parametrize('attn_type', 'AB')
def test_kept_keys_are_reported(attn_type):
    inputs = make(3, 8, 12, 12, 8, batch=2)
    queries, keys, _ = inputs
    out, kept = attend_pyramids(*inputs, 2, (5, 3, 1), attn_type, inspect=True)
    assert torch.equal(out, quadtree_attention(*inputs, 2, (5, 3, 1), attn_type))
    coarse, fine = kept
    assert (coarse.query_size, coarse.key_size) == ((2, 3), (3, 2))
    assert (fine.query_size, fine.key_size) == ((4, 6), (6, 4))
    p = (heads_first(queries[2], 2) @ heads_first(keys[2], 2).transpose(2, 3) / 2**0.5).softmax(-1)
    best = p.topk(5)
    assert torch.equal(coarse.indices, best.indices.transpose(1, 2).transpose(2, 3))
    torch.testing.assert_close(coarse.scores, best.values.transpose(1, 2).transpose(2, 3))
    assert fine.indices.shape == fine.scores.shape == (2, 24, 3, 2)
    # Keys of each fine query are children of those that its parent has kept.
    y, x = torch.arange(24) // 6, torch.arange(24) % 6
    parents = coarse.indices[:, y // 2 * 3 + x // 2]
    own = fine.indices // 4 // 2 * 2 + fine.indices % 4 // 2
    assert (own.unsqueeze(3) == parents.unsqueeze(2)).any(3).all()
    assert not coarse.scores.requires_grad
    assert (fine.scores.diff(dim=2) <= 0).all()


@pytest.mark.parametrize('attn_type', 'AB')
def test_padding_is_never_attended(attn_type):
    inputs = make(3, 8, 8, 16, 8)
    out = quadtree_attention(*inputs, 2, 3, attn_type, key_extent=(9, 5))
    with torch.no_grad():
        for level in range(3):
            for maps in inputs[1:]:
                maps[level][:, :, -(-9 // 2**level) :] = 1e3
                maps[level][:, :, :, -(-5 // 2**level) :] = -1e3
    again = quadtree_attention(*inputs, 2, 3, attn_type, key_extent=(9, 5))
    assert torch.equal(again, out)
    assert not torch.allclose(quadtree_attention(*inputs, 2, 3, attn_type), out)


def test_an_extent_of_all_keys_changes_nothing():
    inputs = make(3, batch=2)
    out = quadtree_attention(*inputs, 2, 3)
    torch.testing.assert_close(quadtree_attention(*inputs, 2, 3, key_extent=(8, 8)), out)


@pytest.mark.parametrize('attn_type', 'AB')
@pytest.mark.parametrize(
    'size, context_size', [((7, 10), None), ((3, 5), (9, 1)), ((8, 4), (13, 8))]
)
def test_module_pads_by_repeating_and_crops(attn_type, size, context_size):
    """Compare with the function on maps padded by indexing."""
    module = randomize(QuadTreeAttention(12, 3, 3, 4, attn_type, level_weights=attn_type == 'B'))
    x = draw(2, *size, 12, seed=0)
    context = x if context_size is None else draw(2, *context_size, 12, seed=1)

    def padded(x):
        rows, columns = (
            torch.arange(-(-side // 4) * 4).clamp(max=side - 1) for side in x.shape[1:3]
        )
        return x[:, rows][:, :, columns].permute(0, 3, 1, 2)

    q, k, v = (
        pyramid(padded(project(source)), 3)
        for project, source in (
            (module.q_proj, x),
            (module.k_proj, context),
            (module.v_proj, context),
        )
    )
    extent = tuple(context.shape[1:3])
    out = quadtree_attention(q, k, v, 3, 4, attn_type, module.level_weights, extent)
    out = out.flatten(2).unflatten(1, q[0].shape[2:])[:, : size[0], : size[1]]
    expected = module.proj(out)
    actual = module(x) if context_size is None else module(x, context)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected)


def test_self_attention_is_cross_attention_to_itself():
    module, x = randomize(QuadTreeAttention(8, 2, 2, 3)), draw(2, 5, 6, 8, seed=0)
    assert torch.equal(module(x), module(x, x))
    other = draw(2, 5, 6, 8, seed=1)
    assert not torch.allclose(module(x, other), module(x))


PUBLISHED_B = dict(value_act='ReLU', lepe=True, level_weights=True)


def test_lepe_is_added_to_each_level_before_the_mix():
    module = randomize(QuadTreeAttention(6, 2, 3, 2, **PUBLISHED_B))
    x = draw(1, 8, 12, 6, seed=0)
    values = [module.v_proj(x).permute(0, 3, 1, 2)]
    for branch in module.value_branches:
        values.append(branch(values[-1]))
    zeros = [torch.zeros_like(value) for value in values]
    queries, keys = (
        pyramid(project(x).permute(0, 3, 1, 2), 3) for project in (module.q_proj, module.k_proj)
    )
    weights = module.level_weights.softmax(0)
    out = 0
    for level in range(3):
        one = [*zeros[:level], values[level], *zeros[level + 1 :]]
        message = quadtree_attention(queries, keys, one, 2, 2).reshape(x.shape)
        lepe = module.lepe[2 - level](values[level]).permute(0, 2, 3, 1)
        lepe = lepe.repeat_interleave(2**level, 1).repeat_interleave(2**level, 2)
        out = out + weights[2 - level] * (message + lepe)
    torch.testing.assert_close(module(x), module.proj(out))


def test_options():
    def parts(**options):
        module = randomize(QuadTreeAttention(8, 2, 3, 2, **options))
        x = draw(1, 8, 8, 8, seed=0)
        module(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
        names = {name.split('.')[0] for name, _ in module.named_parameters()}
        return names - {'q_proj', 'k_proj', 'v_proj', 'proj'}

    assert parts(**PUBLISHED_B) == {'value_branches', 'lepe', 'level_weights'}
    assert parts() == parts(attn_type='A') == set()
    assert parts(level_weights=True) == {'level_weights'}
    assert parts(lepe=True) == {'lepe'}
    assert parts(value_act='GELU') == {'value_branches'}
    relu, gelu = (
        randomize(QuadTreeAttention(8, 2, 3, 2, value_act=act)) for act in ('ReLU', 'GELU')
    )
    x = draw(1, 8, 8, 8, seed=0)
    assert not torch.allclose(relu(x), gelu(x))


@pytest.mark.parametrize('attn_type', 'AB')
@pytest.mark.parametrize('heads, d', [(1, 8), (3, 16), (12, 32), (2, 48), (7, 64), (1, 128)])
def test_any_heads_and_any_k(attn_type, heads, d):
    torch.manual_seed(0)
    module = QuadTreeAttention(heads * d, heads, 3, 1000, attn_type)
    x = torch.randn(1, 9, 6, heads * d)
    out = module(x)
    assert out.shape == x.shape and out.isfinite().all()
    module.topks = (1, 10**6, 3)
    assert module(x).isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('attn_type', 'AB')
def test_autocast(dtype, attn_type):
    torch.manual_seed(0)
    module = QuadTreeAttention(64, 2, 3, 1000, attn_type)
    x, context = 3 * torch.randn(2, 11, 14, 64), 3 * torch.randn(2, 7, 8, 64)
    exact = module(x, context)
    with torch.autocast('cpu', dtype):
        out = module(x, context)
    assert (out.float() - exact).norm() < 0.03 * exact.norm()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_empty_batch():
    assert QuadTreeAttention(8, 2, 3, 4)(torch.zeros(0, 7, 9, 8)).shape == (0, 7, 9, 8)


@pytest.mark.parametrize('attn_type', 'AB')
def test_cost_is_linear_in_the_tokens(attn_type):
    """Each finer token attends to 4K candidates; only the coarsest level is quadratic."""
    topk, channels = 4, 16

    def flops(side, levels):
        maps = [
            torch.empty(1, channels, side >> i, side >> i, device='meta') for i in range(levels)
        ]
        with FlopCounterMode(display=False) as counter:
            quadtree_attention(maps, maps, maps, 2, topk, attn_type)
        return counter.get_total_flops()

    for levels, side in ((2, 16), (3, 16), (3, 64), (4, 64), (5, 128)):
        root = (side >> levels - 1) ** 2
        finer = sum((side >> i) ** 2 for i in range(levels - 1))
        assert flops(side, levels) == 4 * channels * (root * root + 4 * topk * finer)
    # With one size of the coarsest map, work per token does not grow.
    work = [flops(8 << n, n + 1) / (8 << n) ** 2 for n in range(1, 5)]
    assert work == sorted(work, reverse=True)


@pytest.mark.no_backend
def test_compiles_to_one_graph():
    torch.manual_seed(0)
    for attn_type in 'AB':
        options = PUBLISHED_B if attn_type == 'B' else {}
        module, x = QuadTreeAttention(16, 2, 3, 4, attn_type, **options), torch.randn(1, 7, 12, 16)
        compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
        out, expected = compiled(x), module(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [
            torch.autograd.grad(o.square().sum(), list(module.parameters()))
            for o in (out, expected)
        ]
        for actual, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_heads=3), 'channels of queries .* 4 channels at level 0 and num_heads 3'),
        (dict(num_heads=0), 'num_heads 0'),
        (dict(topks=0), 'topks .* got 0 for every level'),
        (dict(topks=(2, 0, 2)), 'topks .* got 0 for level 1'),
        (dict(topks=(0, 2, 2)), 'topks .* got 0 for level 2'),
        (dict(topks=(2, 2)), r'topks must be an integer or 3 .* got \(2, 2\)'),
        (dict(topks=2.5), 'topks .* got 2.5'),
        (dict(attn_type='C'), "attn_type must be one of A, B, got 'C'"),
        (dict(attn_type='A', level_weights=torch.zeros(3)), "level_weights are type B's"),
        (dict(level_weights=torch.zeros(2)), r'level_weights must be \(3,\).* got \(2,\)'),
        (dict(key_extent=(9, 8)), r'key_extent .*\(8, 8\), got \(9, 8\)'),
        (dict(key_extent=(0, 8)), r'key_extent .* got \(0, 8\)'),
    ],
)
def test_errors_name_the_argument(change, message):
    queries, keys, values = make(3)
    arguments = dict(queries=queries, keys=keys, values=values, num_heads=2, topks=2)
    with pytest.raises(ValueError, match=message):
        quadtree_attention(**(arguments | change))


@pytest.mark.no_backend
def test_errors_name_the_level():
    queries, keys, values = make(3)
    with pytest.raises(ValueError, match=r'equal length, .* got 3, 2 and 3 maps'):
        quadtree_attention(queries, keys[:2], values, 2, 2)
    with pytest.raises(ValueError, match='got 0, 0 and 0 maps'):
        quadtree_attention([], [], [], 2, 2)
    for name, position in (('queries', 0), ('keys', 1), ('values', 2)):
        maps = [list(x) for x in (queries, keys, values)]
        maps[position][1] = torch.zeros(1, 4, 3, 4)
        shapes = r'got \(1, 4, 3, 4\) at level 1 after \(1, 4, 8, 8\)'
        with pytest.raises(ValueError, match=rf'level of {name} must halve .* {shapes}'):
            quadtree_attention(*maps, 2, 2)
    odd = [torch.zeros(1, 4, 7, 8), torch.zeros(1, 4, 3, 4)]
    with pytest.raises(ValueError, match=r'halve .* at level 1 after \(1, 4, 7, 8\)'):
        quadtree_attention(odd, odd, odd, 2, 2)
    with pytest.raises(ValueError, match=r'values must be maps .* \(4, 8, 8\) at level 0'):
        quadtree_attention(queries, keys, [x[0] for x in values], 2, 2)
    two = [x.repeat(2, 1, 1, 1) for x in keys]
    with pytest.raises(ValueError, match=r'agree in batch and channels.* at level 0'):
        quadtree_attention(queries, two, two, 2, 2)


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'arguments, message',
    [
        ((30, 4, 3, 8), 'dim 30 and num_heads 4'),
        ((32, 0, 3, 8), 'num_heads 0'),
        ((32, 4, 0, 8), 'num_levels .* got 0'),
        ((32, 4, 6, 8), 'num_levels .* got 6'),
        ((32, 4, 3, 0), 'topks .* got 0'),
        ((32, 4, 3, (8, 8)), 'topks'),
        ((32, 4, 3, 8, 'b'), "attn_type .* got 'b'"),
        ((32, 4, 3, 8, 'A', None, True), "for attn_type B, got .*'lepe': True"),
        ((32, 4, 3, 8, 'B', 'Tanh'), "value_act must be one of ReLU, GELU or None, got 'Tanh'"),
    ],
)
def test_constructor_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuadTreeAttention(*arguments)


@pytest.mark.no_backend
def test_map_errors_give_the_shape():
    module = QuadTreeAttention(8, 2, 2, 4, lepe=True)
    x = torch.zeros(1, 4, 4, 8)
    with pytest.raises(
        ValueError, match=r'query_map must be \(B, H, W, 8\), got shape \(1, 4, 4, 6\)'
    ):
        module(x[..., :6])
    with pytest.raises(
        ValueError, match=r'context_map must be \(B, H, W, 8\), got shape \(4, 4, 8\)'
    ):
        module(x, x[0])
    with pytest.raises(ValueError, match=r'with lepe, context_map .* got \(1, 4, 3, 8\)'):
        module(x, x[:, :, :3])
