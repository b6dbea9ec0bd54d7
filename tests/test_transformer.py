"""The blocks of vit_nbdev.transformer against torch's own, their masks, positions and generation, on random inputs"""
import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vit_nbdev.attention import causal_mask, padding_mask
from vit_nbdev.transformer import (Decoder, DecoderBlock, DropPath, Encoder, EncoderBlock, FeedForward, LayerScale,
                                   TokenEmbedding, Transformer, rotary_2d, sincos_2d, sinusoidal_positions)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MLP = [('mlp.fc1', 'linear1'), ('mlp.fc2', 'linear2')]
many = settings(max_examples=40, deadline=None, derandomize=True)
few = settings(max_examples=15, deadline=None, derandomize=True)

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Tensors as small as these gain nothing from a second one, and lose much where others use it, too"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@st.composite
def layers(draw):
    "The arguments of a torch layer, sizes of a batch, a type, a seed, and which masks there are"
    n_heads = draw(st.sampled_from([1, 2, 3]))
    dim = n_heads*draw(st.sampled_from([2, 4, 8]))
    args = dict(d_model=dim, nhead=n_heads, dim_feedforward=draw(st.integers(1, 40)), dropout=0.1, batch_first=True,
                activation=draw(st.sampled_from(['relu', 'gelu', F.relu, nn.GELU('tanh')])), bias=draw(st.booleans()),
                norm_first=draw(st.booleans()), layer_norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
                dtype=draw(st.sampled_from(list(TOLERANCE))))
    size = st.integers(1, 8)
    sizes = dict(b=draw(st.integers(1, 3)), n=draw(size), m=draw(size), seed=draw(st.integers(0, 2**16)))
    return args, sizes, draw(st.booleans()), draw(st.booleans())

def weighted_sum(out): return (out*torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

def grads(out, tensors): return torch.autograd.grad(weighted_sum(out), tensors, retain_graph=True)

def close(a, b, tol):
    "Equal within `tol` of the largest number, or of 1 if all are smaller"
    assert (a - b).abs().max() <= tol*max(1, b.abs().max())

def compare(ours, theirs, out, ref, inputs, pairs, tol):
    "Outputs, gradients of the inputs and of the weights"
    close(out, ref, tol)
    for a, b in zip(grads(out, inputs), grads(ref, inputs)): close(a, b, tol)
    mine = [p for a, _ in pairs for p in ours.get_submodule(a).parameters()]
    other = [p for _, b in pairs for p in ordered(theirs.get_submodule(b))]
    assert len(mine) == len(list(ours.parameters())) == len(other) == len(list(theirs.parameters()))
    for a, b in zip(grads(out, mine), grads(ref, other)): close(a, b, tol)

def ordered(m):
    "Parameters of a torch module in the order of ours"
    if not isinstance(m, nn.MultiheadAttention): return list(m.parameters())
    return [p for p in (m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias) if p is not None]

def lengths_of(b, m): return torch.randint(1, m + 1, (b,))

@many
@given(layers())
def test_encoder_block_is_torchs(case):
    args, s, causal, padded = case
    torch.manual_seed(s['seed'])
    theirs = nn.TransformerEncoderLayer(**args).eval()
    ours = EncoderBlock.from_torch(theirs)
    x = torch.randn(s['b'], s['n'], args['d_model'], dtype=args['dtype'], requires_grad=True)
    mask, key_mask = causal_mask(s['n']), padding_mask(lengths_of(s['b'], s['n']), s['n'])
    both = (mask if causal else torch.ones_like(mask)) & key_mask if padded else mask if causal else None
    # torch's polarity is the other one: True = may not attend
    ref = theirs(x, src_mask=~mask if causal else None, src_key_padding_mask=~key_mask[:, 0, 0] if padded else None)
    pairs = [('norm1', 'norm1'), ('attn', 'self_attn'), ('norm2', 'norm2'), *MLP]
    compare(ours, theirs, ours(x, both), ref, [x], pairs, TOLERANCE[args['dtype']])

@many
@given(layers())
def test_decoder_block_is_torchs(case):
    args, s, causal, padded = case
    torch.manual_seed(s['seed'])
    theirs = nn.TransformerDecoderLayer(**args).eval()
    ours = DecoderBlock.from_torch(theirs)
    x = torch.randn(s['b'], s['n'], args['d_model'], dtype=args['dtype'], requires_grad=True)
    memory = torch.randn(s['b'], s['m'], args['d_model'], dtype=args['dtype'], requires_grad=True)
    mask = causal_mask(s['n']) if causal else None
    memory_mask = padding_mask(lengths_of(s['b'], s['m']), s['m']) if padded else None
    ref = theirs(x, memory, tgt_mask=~mask if causal else None,
                 memory_key_padding_mask=~memory_mask[:, 0, 0] if padded else None)
    pairs = [('norm1', 'norm1'), ('attn', 'self_attn'), ('norm2', 'norm2'), ('cross', 'multihead_attn'),
             ('norm3', 'norm3'), *MLP]
    compare(ours, theirs, ours(x, memory, mask, memory_mask), ref, [x, memory], pairs, TOLERANCE[args['dtype']])

@pytest.mark.parametrize('norm_first', [True, False])
def test_stacks_are_torchs(norm_first):
    "Encoder and decoder of `nn.Transformer`, final norms, masks and padding included"
    torch.manual_seed(0)
    theirs = nn.Transformer(16, 4, 3, 3, 32, dropout=0., activation='gelu', norm_first=norm_first, batch_first=True,
                            dtype=torch.float64).eval()
    for p in theirs.parameters(): nn.init.normal_(p, std=0.3)
    kwargs = dict(dim=16, depth=3, n_heads=4, mlp_ratio=2, norm_first=norm_first)
    enc, dec = Encoder(**kwargs), Decoder(**kwargs)
    enc.blocks = nn.ModuleList(map(EncoderBlock.from_torch, theirs.encoder.layers))
    dec.blocks = nn.ModuleList(map(DecoderBlock.from_torch, theirs.decoder.layers))
    if norm_first: enc.norm, dec.norm = theirs.encoder.norm, theirs.decoder.norm
    else: theirs.encoder.norm = theirs.decoder.norm = None   # Vaswani 2017 has no norm after the last post-norm block
    src, tgt, mask = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double(), padding_mask([7, 4], 7)
    pad = ~mask[:, 0, 0]
    ref = theirs(src, tgt, tgt_mask=~causal_mask(5), src_key_padding_mask=pad, memory_key_padding_mask=pad)
    close(dec(tgt, enc(src, mask), mask), ref, 1e-10)

def test_from_torch_keeps_mode_rates_and_layout():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.3)      # batch second, in training
    block = DecoderBlock.from_torch(layer)
    assert block.training
    assert [block.attn.proj_drop.p, block.cross.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p] == [0.3]*4
    assert block.attn.attend.dropout == block.cross.attend.dropout == 0.3
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    close(block.eval()(x, memory), layer.eval()(x.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1), 1e-5)
    layer.linear1.weight.data.zero_()                              # a copy: the layer's later life is its own
    assert block.mlp.fc1.weight.abs().sum() > 0
    with pytest.raises(ValueError, match='activation=.*tanh.*only relu and gelu'):
        EncoderBlock.from_torch(nn.TransformerEncoderLayer(8, 2, 16, activation=torch.tanh))

def model_of(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Transformer(**dict(n_src=11, n_tgt=9, dim=16, depth=2, n_heads=2, max_len=12) | kwargs).eval()

def source(lengths, m, seed=0):
    ids = torch.randint(3, 11, (len(lengths), m), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(~padding_mask(lengths, m)[:, 0, 0], 0)

@few
@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.integers(2, 8), st.data())
def test_no_logit_sees_a_later_target(seed, norm_first, learned, n, data):
    model, src = model_of(seed, norm_first=norm_first, learned=learned), source([6, 3], 6, seed)
    t = data.draw(st.integers(1, n - 1))
    tgt = torch.randint(3, 9, (2, n))
    changed = tgt.clone()
    changed[:, t] = (tgt[:, t] - 3 + 1)%6 + 3
    before, after = model(src, tgt), model(src, changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])

@few
@given(st.integers(0, 2**16), st.booleans())
def test_padding_of_the_source_is_never_read(seed, norm_first):
    model, src, tgt = model_of(seed, norm_first=norm_first), source([6, 3], 6, seed), torch.randint(3, 9, (2, 4))
    before = model(src, tgt)
    with torch.no_grad(): model.src_embed.tokens.weight[model.pad] += 100.
    assert torch.equal(before, model(src, tgt))
    with torch.no_grad(): model.src_embed.tokens.weight[src[0, 0]] += 100.      # and a real token is
    assert not torch.equal(before[0], model(src, tgt)[0])
    longer = F.pad(src, (0, 4))
    close(model(longer, tgt), model(src, tgt), 1e-5)

@few
@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_cached_steps_are_the_whole(seed, norm_first, learned, two_at_once):
    model = model_of(seed, norm_first=norm_first, learned=learned).double()
    tgt = torch.randint(3, 9, (2, 8))
    memory, mask = model.encode(source([6, 3], 6, seed))
    caches = [{} for _ in model.decoder.blocks]
    parts = tgt.split(2 if two_at_once else 1, dim=1)
    steps = [model.decode(parts[0], memory, mask, caches)]
    read_once = [cache['cross'] for cache in caches]
    steps += [model.decode(part, memory, mask, caches) for part in parts[1:]]
    close(torch.cat(steps, dim=1), model.decode(tgt, memory, mask), 1e-10)
    assert all(cache['cross'] is kv for cache, kv in zip(caches, read_once))

@few
@given(st.integers(0, 2**16), st.integers(1, 12))
def test_generate(seed, max_len):
    "Cached = uncached = one at a time = argmax of the logits; `end` ends a row, `pad` follows it"
    model, src = model_of(seed, pad=0, start=1, end=2).double(), source([6, 3, 1, 5], 6, seed)
    with torch.no_grad():
        model.head.weight.mul_(5)
        model.head.bias[0] = -100     # no padding out of the model itself, so that what follows `end` is told apart
    out = model.generate(src, max_len)
    assert torch.equal(out, model.generate(src, max_len, use_cache=False))
    for row, ids in zip(out, src):
        alone = model.generate(ids[ids != 0][None], max_len)[0]
        assert torch.equal(row[:len(alone)], alone) and (row[len(alone):] == 0).all()
        n = (alone == 2).nonzero()[0].item() + 1 if (alone == 2).any() else len(alone)
        assert n == len(alone) == max_len or alone[-1] == 2
        logits = model(ids[None], torch.cat([torch.tensor([1]), alone[:-1]])[None])
        assert torch.equal(logits.argmax(-1)[0], alone)

def test_it_learns_to_reverse():
    "Twelve sequences of four tokens, reversed: learned by heart, told back by `generate`"
    model = model_of(n_src=11, n_tgt=11, dim=32).train()
    src = torch.randint(3, 11, (12, 4), generator=torch.Generator().manual_seed(0))
    full = F.pad(F.pad(src.flip(1), (1, 0), value=1), (0, 1), value=2)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = F.cross_entropy(model(src, full[:, :-1]).flatten(0, 1), full[:, 1:].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model.eval().generate(src, 12), full[:, 1:])

def test_share_is_one_matrix():
    model = model_of(n_src=9, share=True)
    assert model.head.weight is model.src_embed.tokens.weight is model.tgt_embed.tokens.weight
    separate = model_of(n_src=9)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(separate) - count(model) == 2*9*16
    embed = TokenEmbedding(500, 64, 8)    # drawn small for the output layer, scaled up to size 1 on the way in
    scaled = embed(torch.arange(500)[:, None]) - sinusoidal_positions(1, 64)
    assert abs(scaled.std() - 1) < 0.03 and abs(embed.tokens.weight.std()*8 - 1) < 0.03

@few
@given(st.integers(1, 50), st.integers(1, 16), st.integers(0, 20))
def test_sinusoids(n, half, shift):
    "The formula, number by number; and a shift turns each pair of channels by an angle that the place has no part in"
    table = sinusoidal_positions(n, 2*half).double()
    for p in range(n):
        for i in range(half):
            angle = p/10000**(2*i/(2*half))
            assert math.isclose(table[p, 2*i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[p, 2*i + 1], math.cos(angle), abs_tol=1e-6)
    later = sinusoidal_positions(n + shift, 2*half).double()[shift:]
    for i in range(half):
        a = shift/10000**(i/half)
        turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
        close(table[:, 2*i:2*i + 2] @ turn, later[:, 2*i:2*i + 2], 1e-6)

def test_sincos_2d_by_hand():
    "Rows first; the sines of x, the cosines of x, the sines of y, the cosines of y"
    table = sincos_2d(2, 3, 8)
    assert table.shape == (6, 8)
    for y in range(2):
        for x in range(3):
            want = [f(place/slow) for place in (x, y) for f in (math.sin, math.cos) for slow in (1, 100)]
            close(table[3*y + x], torch.tensor(want), 1e-6)

def test_sincos_2d_is_maes():
    mae = pytest.importorskip('transformers.models.vit_mae.modeling_vit_mae',
                              reason='needs transformers, whose MAE has these positions')
    embeddings = mae.ViTMAEEmbeddings(mae.ViTMAEConfig(hidden_size=32, image_size=32, patch_size=8))
    embeddings.initialize_weights()
    close(sincos_2d(4, 4, 32), embeddings.position_embeddings[0, 1:], 1e-5)

def test_sincos_2d_is_simple_vits_order():
    "SimpleViT has the same channels in the same order; only its frequencies end at 1/10000, ours just before it"
    simple_vit = pytest.importorskip('vit_pytorch.simple_vit', reason='needs vit-pytorch for its SimpleViT')
    ours, theirs = sincos_2d(3, 5, 32), simple_vit.posemb_sincos_2d(3, 5, 32)
    close(ours[:, ::8], theirs[:, ::8], 1e-5)                                   # frequency 1, in both

def test_sincos_2d_is_timms_in_another_order():
    timm = pytest.importorskip('timm.layers.pos_embed_sincos', reason='needs timm, which has such positions')
    x_sin, x_cos, y_sin, y_cos = sincos_2d(3, 5, 32).split(8, dim=1)
    close(torch.cat([y_sin, x_sin, y_cos, x_cos], dim=1), timm.build_sincos2d_pos_embed([3, 5], 32), 1e-5)

def test_drop_path_and_layer_scale():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 2) + 3
    out = DropPath(0.25)(x)
    dropped = (out == 0).all(dim=(1, 2))
    assert torch.equal(dropped, (out == 0).any(dim=2).any(dim=1))              # a sample is left out whole or not
    torch.testing.assert_close(out[~dropped], x[~dropped]/0.75)
    assert abs(dropped.float().mean() - 0.25) < 4*(0.25*0.75/4000)**0.5        # four standard errors
    assert torch.equal(DropPath(0.25).eval()(x), x)
    rates = [getattr(b.drop_path2, 'p', 0.) for b in Encoder(8, 5, 2, drop_path=0.4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(EncoderBlock(8, 2).drop_path1, nn.Identity) and isinstance(EncoderBlock(8, 2).ls1, nn.Identity)
    block, plain = EncoderBlock(8, 2, layer_scale=0.1).eval(), EncoderBlock(8, 2).eval()
    block.load_state_dict(plain.state_dict() | {'ls1.gamma': block.ls1.gamma, 'ls2.gamma': block.ls2.gamma})
    with torch.no_grad():
        for p in (*plain.attn.proj.parameters(), *plain.mlp.fc2.parameters()): p.mul_(0.1)
    close(block(x[:5].repeat(1, 1, 4)), plain(x[:5].repeat(1, 1, 4)), 1e-5)

def test_options_reach_the_attention():
    "With qk_norm the size of the queries has no effect, without it has; bias, epsilon and rates arrive, too"
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    for qk_norm in (True, False):
        block = EncoderBlock(16, 2, qk_norm=qk_norm, qkv_bias=False, norm_eps=1e-9)
        before = block(x)
        with torch.no_grad(): block.attn.qkv.weight[:16] *= 10
        assert torch.allclose(block(x), before, atol=1e-5) == qk_norm
    block = EncoderBlock(16, 2, mlp_ratio=2.5, norm_eps=1e-3, qk_norm=True, dropout=0.1, attn_dropout=0.2)
    assert {m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    assert (block.mlp.fc1.out_features, block.attn.proj_drop.p, block.attn.attend.dropout) == (40, 0.1, 0.2)
    assert Encoder(1408, 1, 16, mlp_ratio=6144/1408).blocks[0].mlp.fc1.out_features == 6144   # rounded, not cut

def test_checkpointing_from_outside():
    "Blocks are looped over by the user: the gradients stay the same"
    torch.manual_seed(0)
    encoder, x = Encoder(16, 3, 2, qk_norm=True, layer_scale=0.5), torch.randn(2, 5, 16, requires_grad=True)
    plain = grads(encoder(x), [x, *encoder.parameters()])
    out = x
    for block in encoder.blocks: out = checkpoint(block, out, use_reentrant=False)
    for a, b in zip(plain, grads(encoder.norm(out), [x, *encoder.parameters()])): assert torch.equal(a, b)

@pytest.mark.parametrize('norm_first', [True, False])
def test_compiles_in_one_graph(norm_first):
    torch.manual_seed(0)
    encoder, x = Encoder(16, 1, 2, norm_first=norm_first, layer_scale=0.1, qk_norm=True), torch.randn(2, 5, 16)
    close(torch.compile(encoder, fullgraph=True, backend='aot_eager')(x), encoder(x), 1e-5)
    noisy = Encoder(16, 2, 2, norm_first=norm_first, drop_path=0.2, dropout=0.1)
    torch.compile(noisy, fullgraph=True, backend='aot_eager')(x).sum().backward()
    model, src, tgt = model_of(norm_first=norm_first, depth=1), source([5, 3], 5), torch.randint(3, 9, (2, 4))
    close(torch.compile(model, fullgraph=True, backend='aot_eager')(src, tgt), model(src, tgt), 1e-5)

def test_bad_input_is_named():
    model = model_of()
    src, tgt = source([4], 4), torch.tensor([[1, 3]])
    for error, words, call in [
        (ValueError, 'dim=7 must be even', lambda: sinusoidal_positions(4, 7)),
        (ValueError, 'dim=6 must be divisible by 4', lambda: sincos_2d(2, 2, 6)),
        (ValueError, 'has 13 tokens.*max_len=12.*shorten', lambda: model(source([13], 13), tgt)),
        (ValueError, 'has 13 tokens.*max_len=12', lambda: model(src, source([13], 13).clamp(max=8))),
        (ValueError, 'ids run from 3 to 11: n_tokens=11 allows 0 to 10', lambda: model(torch.tensor([[3, 11]]), tgt)),
        (ValueError, 'ids run from -1 to 3', lambda: model(src, torch.tensor([[-1, 3]]))),
        (ValueError, r'float32 of shape \(1, 2\), expected integers', lambda: model(src.float()[:, :2], tgt)),
        (ValueError, r'shape \(2,\), expected integers \(b, n\)', lambda: model(src, tgt[0])),
        (ValueError, 'row 1 of src.*padding', lambda: model(torch.tensor([[3, 4], [0, 0]]), tgt.repeat(2, 1))),
        (ValueError, 'max_len=0 must lie between 1 and 12', lambda: model.generate(src, 0)),
        (ValueError, 'max_len=13 must lie between 1 and 12', lambda: model.generate(src, 13)),
        (RuntimeError, 'training mode.*eval', lambda: model_of().train().generate(src, 3)),
        (ValueError, 'n_src=11 and n_tgt=9', lambda: model_of(share=True)),
        (ValueError, 'depth=0', lambda: Encoder(8, 0, 2)),
        (ValueError, 'depth=0', lambda: Decoder(8, 0, 2)),
        (ValueError, 'drop_path=1', lambda: EncoderBlock(8, 2, drop_path=1.)),
        (ValueError, "act='swish'.*gelu, gelu_tanh, quick_gelu, relu", lambda: FeedForward(8, 16, act='swish')),
        (ValueError, "inner_norms=None.*none, mlp, both", lambda: EncoderBlock(8, 2, inner_norms=None)),
        (ValueError, "norm='batch'.*layer, rms", lambda: EncoderBlock(8, 2, norm='batch')),
        (ValueError, "kind='swirl'.*dinov3, eva02", lambda: rotary_2d(2, 2, 8, kind='swirl')),
        (TypeError, 'TransformerEncoderLayer is no DecoderBlock: use EncoderBlock.from_torch',
         lambda: DecoderBlock.from_torch(nn.TransformerEncoderLayer(8, 2))),
        (TypeError, 'TransformerDecoderLayer is no EncoderBlock: use DecoderBlock.from_torch',
         lambda: EncoderBlock.from_torch(nn.TransformerDecoderLayer(8, 2))),
        *((ValueError, 'there are 2 blocks: give as many caches', lambda caches=caches:
           model.decode(tgt, *model.encode(src), caches)) for caches in ([], [{}], [{}]*2, [{}, {}, {}])),
        (TypeError, 'n_head', lambda: Encoder(8, 1, 2, n_head=3)),
    ]:
        with pytest.raises(error, match=words): call()
    assert LayerScale(3, 0.5)(torch.ones(3)).tolist() == [0.5]*3
    assert TokenEmbedding(5, 4, 6)(torch.tensor([[0, 4]]), start=4).shape == (1, 2, 4)

@pytest.mark.parametrize('assign', [False, True])
def test_fixed_positions_of_a_model_made_without_memory(assign):
    "They are in no file: without a hook they are whatever happens to be there"
    model, src = model_of(), source([4, 3], 4)
    with torch.device('meta'): empty = model_of()
    if not assign:
        empty.to_empty(device='cpu')
        for x in empty.buffers(): x.fill_(77)
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(src, src.clamp(max=8)), model(src, src.clamp(max=8)))

def test_any_integers_are_ids():
    embed, ids = TokenEmbedding(5, 4, 6), torch.tensor([[1, 4]])
    for dtype in (torch.uint8, torch.int16, torch.int32): assert torch.equal(embed(ids.to(dtype)), embed(ids))

# --- the exercises of the chapter ---

NOTEBOOK = Path(__file__).parent.parent/'nbs'/'01_transformer.ipynb'

def definitions(cells):
    "What the cells import and define, without running any experiment"
    names = {}
    for cell in cells:
        if 'eval: false' in cell or '# TODO' in cell or '#| slow' in cell: continue
        for node in ast.parse(cell).body:
            wanted = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            if isinstance(node, ast.Assign): wanted = ast.unparse(node).startswith('PAD, START, END')
            if wanted: exec(compile(ast.Module([node], []), NOTEBOOK.name, 'exec'), names)
    return names

def exercises():
    "Number, stub, check and solution of each exercise that has a cell to be filled in"
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    code = [s for s, cell in zip(sources, cells) if cell['cell_type'] == 'code']
    for i, source in enumerate(sources):
        if '# TODO' not in source or cells[i]['cell_type'] != 'code': continue
        number = re.findall(r'### (\d+)\.', sources[i - 1])[-1]
        yield pytest.param(code, source, sources[i + 1], sources[i + 2], id=number)

@pytest.mark.parametrize('code, stub, check, text', exercises())
def test_exercise(code, stub, check, text):
    "The check fails on the stub, with a sentence, and passes on the solution that is printed below it"
    assert check.startswith('#| eval: false') and text.startswith('<details><summary>Solution</summary>')
    names = definitions(code)
    with pytest.raises(AssertionError) as failed: exec(stub + '\n' + check, names)
    assert str(failed.value), 'the check says nothing'
    solution = re.search(r'```python\n(.*?)```', text, re.S)[1]
    assert '# TODO' not in solution
    exec(solution + '\n' + check, names)

def test_there_are_exercises(): assert len(list(exercises())) == 3
