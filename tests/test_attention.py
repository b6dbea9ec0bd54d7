"""Attention against torch on random inputs: outputs, weights, gradients, masks, what is recorded beside the kernel."""
import ast, copy, gc, io, itertools, json, re, weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from vit_nbdev.attention import (FusedAttention, MultiHeadAttention, attention_weights, causal_mask, padding_mask,
                                 plot_attention, record_attention, scaled_dot_product_attention)

settings.register_profile('here', deadline=None, max_examples=40, derandomize=True)
settings.load_profile('here')

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
seeds, sizes = st.integers(0, 2**16), st.integers(1, 9)
dtypes = st.sampled_from(list(TOLERANCE))
masks = st.sampled_from([None, 'causal', 'padding', 'random', 'float', 'per head'])

def close(a, b, tol, what=''):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=lambda m: f'{what}: {m}')

def make_mask(kind, b, h, n, m, dtype):
    "A mask of each kind; every query may attend to one key at least"
    if kind is None: return None
    if kind == 'causal': return torch.ones(n, m, dtype=torch.bool).tril()
    if kind == 'padding': return padding_mask(torch.randint(1, m + 1, (b,)), m)
    if kind == 'float': return torch.randn(b, 1, n, m, dtype=dtype)
    mask = torch.rand(b, h if kind == 'per head' else 1, n, m) > 0.5
    mask[..., 0] = True
    return mask

def grads(out, inputs):
    factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out*factors).sum(), inputs)

@given(seeds, sizes, sizes, sizes, st.integers(1, 4), sizes, dtypes, masks)
def test_reference_equals_torch(seed, b, n, m, h, d, dtype, kind):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(b, h, length, d, dtype=dtype, requires_grad=True) for length in (n, m, m))
    mask = make_mask(kind, b, h, n, m, dtype)
    ours, weights = scaled_dot_product_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    tol = TOLERANCE[dtype]
    close(ours, theirs, tol, 'outputs')
    close(weights @ v, theirs, tol, 'weights')
    for name, a, b in zip('qkv', grads(ours, (q, k, v)), grads(theirs, (q, k, v))):
        close(a, b, 10*tol, f'gradient of {name}')
    close(FusedAttention()(q, k, v, mask), theirs, tol, 'fused')

@given(seeds, sizes, sizes, st.sampled_from([(4, 1), (4, 4), (12, 3), (8, 2)]), dtypes, masks, st.booleans(),
       st.booleans())
def test_module_equals_torch(seed, b, n, dim_heads, dtype, kind, bias, batch_first):
    "Self-attention on copied weights: output, weights, and the gradients of the input and of all parameters"
    (dim, h), tol = dim_heads, TOLERANCE[dtype]
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(dim, h, bias=bias, batch_first=batch_first, dtype=dtype)
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(b, n, dim, dtype=dtype, requires_grad=True)
    mask = make_mask(kind, b, h, n, n, dtype)
    other = mask if mask is None else (mask if mask.is_floating_point() else ~mask).expand(b, h, n, n).flatten(0, 1)
    y = x if batch_first else x.transpose(0, 1)
    with record_attention(ours) as recorded: out = ours(x, mask=mask)
    expected, weights = theirs(y, y, y, attn_mask=other, average_attn_weights=False)
    expected = expected if batch_first else expected.transpose(0, 1)
    close(out, expected, tol, 'outputs')
    close(recorded[''], weights, tol, 'weights')
    names = ['qkv.weight', 'proj.weight'] + (['qkv.bias', 'proj.bias'] if bias else [])
    mine = grads(out, [x, *(dict(ours.named_parameters())[k] for k in names)])
    biases = [theirs.in_proj_bias, theirs.out_proj.bias] if bias else []
    torchs = grads(expected, [x, theirs.in_proj_weight, theirs.out_proj.weight, *biases])
    assert len(dict(ours.named_parameters())) == len(names)
    for name, a, c in zip(['x', *names], mine, torchs): close(a, c, 20*tol, f'gradient of {name}')
    back = ours.to_torch(batch_first=batch_first)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items(): assert torch.equal(back.state_dict()[key], value), key

@given(seeds, sizes, sizes, sizes, st.sampled_from([8, 5, 3]), dtypes)
def test_cross_attention_equals_torch(seed, b, n, m, kv_dim, dtype):
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(8, 2, kdim=kv_dim, vdim=kv_dim, batch_first=True, dtype=dtype)
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(b, n, 8, dtype=dtype, requires_grad=True)
    context = torch.randn(b, m, kv_dim, dtype=dtype, requires_grad=True)
    out, expected = ours(x, context), theirs(x, context, context)[0]
    close(out, expected, TOLERANCE[dtype])
    for a, c in zip(grads(out, (x, context)), grads(expected, (x, context))): close(a, c, 10*TOLERANCE[dtype])
    back = ours.to_torch()
    for key, value in theirs.state_dict().items(): assert torch.equal(back.state_dict()[key], value), key

def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    attn = MultiHeadAttention(6, 2, kv_dim=4, qk_norm=True).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = make_mask('random', 2, 2, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x, c: attn(x, c, mask), (x, context))
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: scaled_dot_product_attention(*a, mask=zeros)[0], (q, k, v))

@pytest.mark.parametrize('kind', [None, 'causal', 'float'])
@pytest.mark.parametrize('autocast', [False, True])
def test_gradients_in_bfloat16_on_a_cpu_are_computed_in_float32(monkeypatch, kind, autocast):
    "torch's backward is slow there; with norms on queries and keys autocast gives them in float32, the values not"
    seen, kernel = [], F.scaled_dot_product_attention
    def watched(q, k, v, *args, **kwargs):
        seen.append((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled('cpu')))
        return kernel(q, k, v, *args, **kwargs)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    torch.manual_seed(0)
    exact = MultiHeadAttention(16, 4, qk_norm=True).double()
    model = copy.deepcopy(exact).float() if autocast else copy.deepcopy(exact).bfloat16()
    x = torch.randn(2, 5, 16).to(torch.float32 if autocast else torch.bfloat16)
    mask = make_mask(kind, 2, 4, 5, 5, torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): out = model(x, mask=mask)
    assert out.dtype == torch.bfloat16 and seen == [(torch.float32,)*3 + (False,)]
    want = exact(x.double(), mask=mask.double() if kind == 'float' else mask)
    close(out.double(), want, 0.02)
    got, right = (torch.autograd.grad(y.float().pow(2).sum(), m.qkv.weight)[0].double()
                  for y, m in ((out, model), (want, exact)))
    close(got, right, 0.03*right.abs().max().item())
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast): model(x, mask=mask)
    assert seen[-1][2] == torch.bfloat16

def test_bfloat16_is_no_worse_than_torch():
    "Errors against float64, over 20 draws: ours must not be larger than those of torch's own module"
    ours_err, torch_err = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        exact = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.float64)
        x = torch.randn(2, 33, 64, dtype=torch.float64)
        half, y = copy.deepcopy(exact).bfloat16(), x.bfloat16()
        expected = exact(x, x, x, need_weights=False)[0]
        ours_err.append((MultiHeadAttention.from_torch(half)(y).double() - expected).norm())
        torch_err.append((half(y, y, y, need_weights=False)[0].double() - expected).norm())
    assert torch.stack(ours_err).mean() <= 1.05*torch.stack(torch_err).mean()

def test_dropout_is_dropout_of_the_weights():
    "The mean over many draws is the output without dropout, and evaluation drops nothing"
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v)[0]
    many = [t.expand(4000, 1, 4, 8) for t in (q, k, v)]
    for attend in (lambda *a: scaled_dot_product_attention(*a, dropout=0.3)[0], FusedAttention(0.3)):
        draws = attend(*many)
        error = (draws.mean(0) - expected[0])/(draws.std(0)/4000**0.5)
        assert draws.std(0).min() > 0.01 and error.abs().max() < 5           # five standard errors
    close(FusedAttention(0.3).eval()(q, k, v), expected, 1e-12)

# --- masks ---

@given(seeds, st.integers(2, 12), st.data())
def test_the_future_is_not_seen(seed, n, data):
    "Change a token, and all outputs before it stay bit-equal, through the module and its fused kernel"
    t = data.draw(st.integers(1, n - 1))
    torch.manual_seed(seed)
    attn, x = MultiHeadAttention(8, 2), torch.randn(2, n, 8)
    changed = x.clone()
    changed[:, t] = 1000*torch.randn(2, 8)
    a, b = attn(x, mask=causal_mask(n)), attn(changed, mask=causal_mask(n))
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])

@given(seeds, st.integers(2, 12), st.data())
def test_padding_is_not_seen(seed, n, data):
    lengths = torch.tensor([data.draw(st.integers(0, n - 1)), n])
    torch.manual_seed(seed)
    attn, x = MultiHeadAttention(8, 2), torch.randn(2, n, 8)
    changed = x.clone()
    changed[0, lengths[0]:] = 1000.
    a, b = (attn(x, context, mask=padding_mask(lengths, n)) for context in (x, changed))
    assert torch.equal(a, b)

@pytest.mark.parametrize('mask_kind', ['bool', 'float'])
@pytest.mark.parametrize('backend', ['FLASH_ATTENTION', 'MATH'])
def test_blind_queries_get_zeros(backend, mask_kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[0, :, 1], mask[1] = False, False
    if mask_kind == 'float': mask = torch.zeros(2, 1, 4, 5).masked_fill(~mask, -torch.inf)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (4, 5, 5))
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        outs = [scaled_dot_product_attention(q, k, v, mask)[0], FusedAttention()(q, k, v, mask)]
    for out in outs:
        g = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
        assert out[0, :, 1].abs().max() == 0 and out[1].abs().max() == 0 and out[0, :, 0].abs().min() > 0
        assert g[0][0, :, 1].abs().max() == 0 and not any(t.isnan().any() for t in g)
    close(*outs, 1e-5)

@pytest.mark.parametrize('n, m', [(0, 3), (3, 0), (0, 0)])
def test_empty_sequences(n, m):
    "No query, no output; a query without keys gets the bias of the output projection"
    attn = MultiHeadAttention(8, 2, kv_dim=4)
    nn.init.normal_(attn.proj.bias)
    out = attn(torch.randn(2, n, 8), torch.randn(2, m, 4))
    assert out.shape == (2, n, 8) and torch.equal(out, attn.proj.bias.expand(2, n, 8))

@pytest.mark.parametrize('n, m', [(0, 3), (3, 0)])
def test_empty_sequences_in_the_reference(n, m):
    out, weights = scaled_dot_product_attention(torch.randn(1, n, 4), torch.randn(1, m, 4), torch.randn(1, m, 4))
    assert out.shape == (1, n, 4) and weights.shape == (1, n, m) and out.abs().sum() == 0

def test_causal_mask_of_a_cache():
    for n, m in ((1, 1), (2, 5), (5, 5)): assert torch.equal(causal_mask(n, m), causal_mask(m)[m - n:])

# --- recording ---

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = MultiHeadAttention(8, 2, dropout=0.4, qk_norm=True), MultiHeadAttention(8, 4)
    def forward(self, x): return self.b(self.a(x), x, causal_mask(x.shape[1]))

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grad', [True, False])
def test_recording_changes_no_bit(training, grad):
    torch.manual_seed(0)
    net, x = Net().train(training), torch.randn(2, 5, 8)
    def run():
        torch.manual_seed(1)                  # the dropout draws the same numbers
        with torch.set_grad_enabled(grad): out = net(x)
        return out, torch.autograd.grad(out.sum(), list(net.parameters())) if grad else ()
    out, g = run()
    with record_attention(net) as weights: out2, g2 = run()
    assert torch.equal(out, out2) and all(map(torch.equal, g, g2))
    assert {k: v.shape for k, v in weights.items()} == {'a': (2, 2, 5, 5), 'b': (2, 4, 5, 5)}
    assert not any(w.requires_grad for w in weights.values())
    for w in weights.values(): close(w.sum(-1), torch.ones(w.shape[:-1]), 1e-6)
    assert torch.equal(weights['b'] > 0, causal_mask(5).expand(2, 4, 5, 5))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mask', [None, causal_mask(6), torch.zeros(6, 6).masked_fill(~causal_mask(6), -torch.inf)])
def test_weights_are_exact_under_autocast(dtype, mask):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    expected = attention_weights(q.double(), k.double(), mask)
    attn, x = MultiHeadAttention(8, 2), torch.randn(2, 6, 8)
    with torch.no_grad(), torch.autocast('cpu', dtype), record_attention(attn) as recorded:
        weights = attention_weights(q, k, mask)
        attn(x, mask=mask)
    assert weights.dtype == recorded[''].dtype == torch.float32
    assert (weights - expected).abs().max() < 1e-6 and (recorded[''].sum(dim=-1) - 1).abs().max() < 1e-6

def test_recording_in_training_is_before_dropout():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 5, 8)
    with record_attention(net.train(), ['a']) as training: net(x)
    with record_attention(net.eval(), ['a']) as evaluation: net(x)
    assert torch.equal(training['a'], evaluation['a'])

def test_recording_lets_go():
    "After the block no hook is left, and the weights keep nothing else alive"
    net, x = Net(), torch.randn(2, 5, 8)
    with record_attention(net) as weights: activation = weakref.ref(net(x))
    assert not any(m._forward_hooks for m in net.modules())
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None and activation() is None and len(weights) == 2
    held = [weakref.ref(w) for w in weights.values()]
    del weights
    gc.collect()
    assert not any(h() is not None for h in held)

def test_recording_survives_an_error_and_nests():
    net, x = Net(), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match='expected'), record_attention(net): net(x[..., :4])
    assert not any(m._forward_hooks for m in net.modules())
    with record_attention(net) as outer:
        with record_attention(net, ['b']) as inner: net(x)
        first = outer['b']
        net(2*x)
    assert list(inner) == ['b'] and torch.equal(inner['b'], first) and not torch.equal(outer['b'], first)

def test_recording_nothing_is_not_silent():
    "A module that is there but never runs, and a compiled model, whose code was made without the hooks"
    net, x = Net().eval(), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match='no attention module ran'), record_attention(net): pass
    compiled = torch.compile(net, backend='eager')
    compiled(x)
    with record_attention(net) as expected: net(x)
    try:
        with record_attention(compiled) as weights: compiled(x)
    except RuntimeError as e: assert 'uncompiled' in str(e)                       # either it says so,
    else:                                                                         # or it is right
        assert len(weights) == 2
        assert all(torch.equal(a, b) for a, b in zip(weights.values(), expected.values()))

# --- bad input ---

def bad(error, match, f):
    with pytest.raises(error, match=match) as e: f()
    assert '\n' not in str(e.value)

def test_bad_input():
    attn, cross, x = MultiHeadAttention(8, 2), MultiHeadAttention(8, 2, kv_dim=6), torch.randn(2, 5, 8)
    bad(ValueError, r'dim=10 can.t be split into n_heads=4', lambda: MultiHeadAttention(10, 4))
    bad(ValueError, r'dim=8 can.t be split into n_heads=0', lambda: MultiHeadAttention(8, 0))
    bad(ValueError, r'x has shape \(2, 5, 7\), expected \(b, n, 8\)', lambda: attn(x[..., :7]))
    bad(ValueError, r'x has shape \(5, 8\)', lambda: attn(x[0]))
    bad(ValueError, r'context has shape \(2, 5, 8\), expected \(2, m, 6\)', lambda: cross(x, x))
    bad(ValueError, r'context has shape \(3, 4, 6\), expected \(2, m, 6\)', lambda: cross(x, torch.zeros(3, 4, 6)))
    bad(ValueError, 'context is missing', lambda: cross(x))
    bad(TypeError, 'x is torch.float32 but context is torch.float64', lambda: attn(x, x.double()))
    bad(ValueError, 'x is on cpu but context is on meta', lambda: attn(x, x.to('meta')))
    bad(ValueError, 'x is on cpu but mask is on meta', lambda: attn(x, mask=causal_mask(5, device='meta')))
    bad(TypeError, 'mask has dtype torch.int64', lambda: attn(x, mask=torch.ones(5, 5).long()))
    bad(TypeError, 'mask must be a tensor, got list', lambda: attn(x, mask=[True]))
    bad(ValueError, r'mask has shape \(4, 5\), which does not broadcast to the weights \(2, 2, 5, 5\)',
        lambda: attn(x, mask=torch.ones(4, 5, dtype=torch.bool)))
    for mask in (torch.ones(5).bool(), torch.zeros(())):
        bad(ValueError, r'mask has shape \(5?,?\), expected at least \(n, m\)', lambda: attn(x, mask=mask))
        bad(ValueError, r'expected at least \(n, m\)', lambda: attention_weights(x, x, mask))
    bad(ValueError, 'is its first size the batch or the heads',
        lambda: attn(x, mask=torch.ones(2, 5, 5, dtype=torch.bool)))
    for rows, width in ((6, 4), (5, 2)):
        bad(ValueError, r'rotary has shapes .*, expected \(m, 4\) twice, with m at most 5',
            lambda: attn(x, rotary=(torch.ones(rows, width),)*2))
    q, k = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    bad(ValueError, 'q has width 4 but k has 3', lambda: scaled_dot_product_attention(q, k[..., :3], k))
    bad(ValueError, '5 keys but 4 values', lambda: scaled_dot_product_attention(q, k, k[:, :4]))
    bad(ValueError, r'q has shape \(2, 3, 4\) but k has \(1, 5, 4\)', lambda: scaled_dot_product_attention(q, k[:1], k))
    bad(TypeError, 'q is torch.float32 but v is torch.float64', lambda: scaled_dot_product_attention(q, k, k.double()))
    bad(ValueError, 'q is on cpu but k is on meta', lambda: scaled_dot_product_attention(q, k.to('meta'), k))
    bad(ValueError, 'lengths must be a row of integers', lambda: padding_mask(torch.tensor([1.5]), 3))
    bad(ValueError, 'lengths run from -1 to 2', lambda: padding_mask([-1, 2], 3))
    bad(ValueError, 'lengths run from 2 to 9', lambda: padding_mask([2, 9], 4))
    bad(ValueError, "3 queries can't be the last of m=2 positions", lambda: causal_mask(3, 2))
    bad(ValueError, r'expected \(n, m\) or \(h, n, m\)', lambda: plot_attention(torch.zeros(1, 2, 3, 3)))
    bad(ValueError, 'q_labels holds 2 labels, expected 3', lambda: plot_attention(torch.zeros(3, 3), ['a', 'b']))

@pytest.mark.parametrize('kwargs, why', [(dict(add_bias_kv=True), 'add_bias_kv'),
                                         (dict(add_zero_attn=True), 'add_zero_attn'),
                                         (dict(kdim=3, vdim=5), 'kdim=3 and vdim=5')])
def test_what_cannot_be_converted(kwargs, why):
    bad(ValueError, why, lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, **kwargs)))

@pytest.mark.parametrize('kwargs', [dict(qk_norm=True), dict(proj_dropout=0.1), dict(qkv_bias=False)])
def test_what_torch_does_not_have(kwargs):
    bad(ValueError, next(iter(kwargs)), lambda: MultiHeadAttention(8, 2, **kwargs).to_torch())

def test_what_cannot_be_recorded():
    def record(model, names=None):
        with record_attention(model, names): pass
    bad(ValueError, 'Linear holds no MultiHeadAttention', lambda: record(nn.Linear(2, 2)))
    bad(ValueError, r'no attention module is called blocks\.0; there are: 0',
        lambda: record(nn.Sequential(MultiHeadAttention(8, 2)), ['blocks.0']))

def test_plot_attention():
    "A picture per head, the labels at their places, and the weights as they are"
    w = torch.rand(3, 2, 4).softmax(-1)
    fig = plot_attention(w, ['a', 'b'], ['w', 'x', 'y', 'z'], ncols=2)
    axes = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in axes] == ['head 0', 'head 1', 'head 2']
    for ax, head in zip(axes, w):
        close(torch.tensor(ax.images[0].get_array().data), head, 1e-6)
        assert [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b']
        assert [t.get_text() for t in ax.get_xticklabels()] == ['w', 'x', 'y', 'z']

def test_compiles_without_a_break():
    torch.manual_seed(0)
    attn, x = MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    out = torch.compile(attn, fullgraph=True, backend='aot_eager')(x, mask=causal_mask(5))
    close(out, attn(x, mask=causal_mask(5)), 1e-6)

# --- export ---

class Cross(nn.Module):
    "Cross-attention as an exporter takes it: one input asks, the other one is asked"
    def __init__(self, kv_dim):
        super().__init__()
        self.attn = MultiHeadAttention(8, 2, kv_dim=kv_dim)
    def forward(self, x, context): return self.attn(x, context)

class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = MultiHeadAttention(8, 2, qk_norm=True)
    def forward(self, x): return self.attn(x, mask=causal_mask(5))

@pytest.mark.parametrize('model, widths, lengths', [(MultiHeadAttention(8, 2), [8], [5, 7]), (Causal(), [8], [5]),
                                                    (Cross(8), [8, 8], [5, 7]), (Cross(6), [8, 6], [5, 7])],
                         ids=['self', 'causal', 'cross', 'cross of another width'])
def test_onnx_keeps_batch_and_length_free(model, widths, lengths):
    "Exported with two sequences, run with other batch sizes and lengths: the outputs are torch's"
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    names = ['x', 'context'][:len(widths)]
    free = {name: {0: 'batch', 1: f'length_of_{name}'} for name in names}
    file, inputs = io.BytesIO(), tuple(torch.randn(2, 5, width) for width in widths)
    torch.onnx.export(model.eval(), inputs, file, dynamo=False, input_names=names, dynamic_axes=free)
    session = onnxruntime.InferenceSession(file.getvalue())
    for b, n in itertools.product((1, 2, 3), lengths):
        inputs = [torch.randn(b, n + i, width) for i, width in enumerate(widths)]
        out, = session.run(None, {name: t.numpy() for name, t in zip(names, inputs)})
        close(torch.from_numpy(out), model(*inputs), 1e-5, f'batch {b}, length {n}')

# --- the exercises of the chapter ---

NOTEBOOK = Path(__file__).parent.parent/'nbs'/'00_attention.ipynb'
DATA = {'CUES', 'ambiguous', 'fillers', 'vocab', 'pairs', 'asking', 'vocab2'}

def definitions(cells):
    "What the cells import and define, and the small data of the tasks, without running any experiment"
    names = {}
    for cell in cells:
        if 'eval: false' in cell or '# TODO' in cell: continue
        for node in ast.parse(cell).body:
            wanted = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            if isinstance(node, ast.Assign):
                targets = {name for target in node.targets for name in ast.unparse(target).strip('()').split(', ')}
                wanted = targets <= DATA
            if wanted:
                exec(compile(ast.Module([node], []), NOTEBOOK.name, 'exec'), names)
    return names

def exercises():
    "Number, stub, check and solution of each exercise that has a cell to be filled in"
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    code = [s for s, cell in zip(sources, cells) if cell['cell_type'] == 'code']
    for i, source in enumerate(sources):
        if '# TODO' not in source or cells[i]['cell_type'] != 'code': continue
        number = re.search(r'### (\d+)\.', sources[i - 1])[1]
        yield pytest.param(code, source, sources[i + 1], sources[i + 2], id=number)

@pytest.mark.parametrize('code, stub, check, text', exercises())
def test_exercise(code, stub, check, text, slow):
    "The check fails on the stub, with a sentence, and passes on the solution that is printed below it"
    assert check.startswith('#| eval: false') and text.startswith('<details><summary>Solution</summary>')
    if 'compare(' in check and not slow: check = check.replace('compare(', 'compare_one(')
    names = definitions(code)
    # one seed in place of five, which would take half a minute: one with which the stub fails
    names['compare_one'] = lambda mixers, task, **kwargs: one_seed(names, mixers, task, steps=300, **kwargs)
    with pytest.raises(AssertionError) as failed: exec(stub + '\n' + check, names)
    assert str(failed.value), 'the check says nothing'
    solution = re.search(r'```python\n(.*?)```', text, re.S)
    if solution: solved = solution[1]
    else: solved = stub.replace('self.network = nn.Identity()  # TODO', re.search(r'`(self\.network = .*)`', text)[1])
    assert '# TODO' not in solved
    exec(solved + '\n' + check, names)

def one_seed(names, mixers, task, **kwargs):
    import pandas as pd
    model = names['train'](*mixers.values(), 2, task, **kwargs)
    found = names['accuracy'](model, 2, task)
    return model, pd.DataFrame([[found, found]], mixers, ['mean', 'seed 2'])

@pytest.mark.parametrize('n_heads', [2, 4])
def test_heads(n_heads):
    "Several heads look up two cues, with one seed and in fewer steps than in the chapter's slow cells"
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    names = definitions([''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'])
    task = dict(task=names['two_questions'], n_tokens=31, n_out=8, steps=300)
    model, table = one_seed(names, {n_heads: lambda: names['FirstAsks'](32, n_heads)}, **task)
    assert table.loc[n_heads, 'mean'] > 99
    names['x'] = names['two_questions'](100, torch.Generator().manual_seed(5))[0]
    close(names['shares'](model).sum(dim=1), torch.ones(n_heads), 1e-6)          # every token has one role
