"""The Vision Transformer against timm's on copied weights, its options on random inputs, and what torch does with it"""
import json
import re
from copy import deepcopy
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import our_names
from vit_nbdev.vit import CONFIGS, RESIZE, ViT, ViTConfig, resize_positions, vit, vit_config

some = settings(max_examples=25, deadline=None, derandomize=True)
SMALL = dict(img_size=32, patch_size=8, n_classes=5, dim=24, depth=2, n_heads=3)
OPTIONS = {    # each is a change to SMALL; together they touch every field
    'plain': {},
    'mean': dict(pool='mean'),
    'map': dict(pool='map'),
    'registers': dict(n_registers=3),
    'no place in front': dict(n_registers=2, prefix_positions=False),
    'cls beside mean': dict(pool='mean', cls_token=True),
    'registers only': dict(pool='mean', n_registers=2),
    'sincos2d': dict(positions='sincos2d'),
    'no positions': dict(positions='none'),
    'conv stem': dict(stem='conv'),
    'deeper conv stem': dict(stem='conv', stem_depth=2),
    'norms': dict(embed_norm=True, norm_after_pool=True, qk_norm=True, norm_eps=1e-5),
    'layer scale': dict(layer_scale=0.1, act='gelu_tanh', mlp_ratio=2.5),
    'no biases': dict(qkv_bias=False, patch_bias=False, act='quick_gelu'),
    'drops': dict(dropout=0.1, drop_path=0.2),
    'one channel, no head': dict(in_chans=1, n_classes=0),
    'oblong': dict(img_size=(16, 40), pos_resize='bilinear_corners', pos_std=1.),
}

def fill(model, seed=0):
    "Random numbers in every parameter and in BatchNorm's statistics, so that nothing hides behind a zero or a one"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point() or (name == 'pos_embed' and not isinstance(p, nn.Parameter)): continue
            noise = torch.randn(p.shape, generator=g).to(p)
            scale = 0.5/max(p[:1].numel(), 1)**0.5 if p.dim() > 1 else 0.3
            p.copy_(1 + 0.1*noise.abs() if 'running_var' in name else 0.5*p + scale*noise)
    return model.eval()

def build(option, seed=0, **changes):
    torch.manual_seed(seed)
    return fill(ViT(ViTConfig(**SMALL | OPTIONS[option] | changes)), seed)

def images(config, b=2, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    h, w = config.grid
    shape = (b, config.in_chans, h*config.patch_size, w*config.patch_size)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

def close(a, b, tol):
    "Equal within `tol` of the largest number, or of 1 if all are smaller"
    assert (a - b).abs().max() <= tol*max(1, b.abs().max())

every_option = pytest.mark.parametrize('option', OPTIONS)

# ---- against timm

def from_timm(sd, ours):
    "timm's state dict under our names, and our tokens that are off, which have no rows"
    return our_names(sd, 'timm') | {k: v for k, v in ours.state_dict().items() if not v.numel()}

PUBLISHED = {   # timm's name: our name and what differs from it
    'vit_tiny_patch16_224': ('Ti/16', {}),
    'vit_small_patch16_224': ('S/16', {}),
    'vit_base_patch16_224': ('B/16', {}),
    'vit_base_patch32_224': ('B/32', {}),
    'deit3_small_patch16_224': ('S/16', dict(prefix_positions=False, layer_scale=1e-6)),
    'vit_small_patch14_dinov2 at 112': ('S/14', dict(img_size=112, layer_scale=1e-5, n_classes=0)),
    'vit_small_patch14_reg4_dinov2': ('S/14', dict(img_size=224, layer_scale=1e-5, n_classes=0, n_registers=4,
                                                   prefix_positions=False)),
    'vit_base_patch16_clip_224': ('B/16', dict(embed_norm=True, norm_eps=1e-5, patch_bias=False)),
    'vit_base_patch16_clip_quickgelu_224': ('B/16', dict(embed_norm=True, norm_eps=1e-5, patch_bias=False,
                                                         act='quick_gelu', n_classes=512)),
    'vit_medium_patch16_gap_256': ('S/16', dict(img_size=256, dim=512, n_heads=8, layer_scale=1e-6, pool='mean',
                                                qkv_bias=False)),
    'vit_base_patch16_siglip_224': ('B/16', dict(pool='map', n_classes=0)),
    'vit_base_patch16_siglip_gap_224': ('B/16', dict(pool='mean', n_classes=0)),
    'vit_little_patch16_reg4_gap_256': ('S/16', dict(img_size=256, dim=320, n_heads=5, mlp_ratio=5.6, depth=14,
                                                     layer_scale=1e-5, pool='mean', norm_after_pool=True,
                                                     prefix_positions=False, n_registers=4)),
    'vit_small_patch16_224 at 96 x 160': ('S/16', dict(img_size=(96, 160))),
    'vit_tiny_patch16_224 with qk_norm': ('Ti/16', dict(qk_norm=True)),
    'vit_tiny_patch16_224 with gelu_tanh': ('Ti/16', dict(act='gelu_tanh')),
}

@lru_cache(maxsize=1)
def built(name, **kwargs):
    "Our model and timm's with the same weights, in float32: built once for both precisions, which follow one another"
    timm = pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    ours, changes = PUBLISHED[name]
    extra = {dict(act='act_layer').get(k, k): v for k, v in changes.items() if k in ('img_size', 'qk_norm', 'act')}
    name = name.split()[0]
    theirs = fill(timm.create_model(name, **extra, **kwargs))
    config = vit_config(ours, **changes | {k: v for k, v in kwargs.items() if k == 'depth'})
    mine = ViT(config).eval()
    mine.load_state_dict(from_timm(theirs.state_dict(), mine))
    return mine, theirs

def pair(name, dtype, **kwargs): return [model.to(dtype) for model in built(name, **kwargs)]

@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('name', PUBLISHED)
def test_logits_are_timms(name, dtype, tol):
    whole = name in ('vit_tiny_patch16_224', 'vit_small_patch16_224', 'vit_small_patch16_224 at 96 x 160')
    mine, theirs = pair(name, dtype, **{} if whole else dict(depth=2))
    with torch.no_grad():
        x = images(mine.config, 1, dtype)
        out, ref = mine(x), theirs(x)
        assert ref.std() > 0.1
        close(out, ref, tol)
        close(mine.forward_features(x), theirs.forward_features(x), tol)

@pytest.mark.parametrize('name', PUBLISHED)
def test_gradients_are_timms(name):
    mine, theirs = pair(name, torch.float64, depth=1)
    x = images(mine.config, 1, torch.float64)
    for m in (mine, theirs): m(x).sin().sum().backward()
    grads = from_timm({k: p.grad for k, p in theirs.named_parameters()}, mine)
    for k, p in mine.named_parameters():
        if p.numel(): close(p.grad, grads[k], 1e-10)

def test_training_step_with_drops_is_timms():
    timm = pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    theirs = fill(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3, drop_path_rate=0.5)).double().train()
    mine = ViT(vit_config('Ti/16', img_size=32, depth=3, drop_path=0.5)).double().train()
    mine.load_state_dict(from_timm(theirs.state_dict(), mine))
    x = images(mine.config, 4, torch.float64)
    outs = []
    for m in (mine, theirs):
        torch.manual_seed(3)
        outs.append(m(x))
    close(*outs, 1e-10)
    assert (outs[0] - mine.eval()(x)).abs().max() > 0.1

def test_call_at_another_resolution_is_timms():
    timm = pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    theirs = fill(timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2, dynamic_img_size=True))
    mine = ViT(vit_config('Ti/16', img_size=64, depth=2)).eval()
    mine.load_state_dict(from_timm(theirs.state_dict(), mine))
    for h, w in ((96, 160), (32, 64), (64, 64)):
        x = torch.randn(1, 3, h, w, generator=torch.Generator().manual_seed(h))
        close(mine(x), theirs(x), 1e-5)

def test_numbers_of_parameters_are_timms():
    timm = pytest.importorskip('timm', reason='needs timm, with which the numbers are compared')
    names = {'Ti/16': 'tiny_patch16', 'S/8': 'small_patch8', 'S/16': 'small_patch16', 'S/32': 'small_patch32',
             'B/8': 'base_patch8', 'B/16': 'base_patch16', 'B/32': 'base_patch32',
             'L/14': 'large_patch14', 'L/16': 'large_patch16', 'L/32': 'large_patch32',
             'H/14': 'huge_patch14', 'g/14': 'giant_patch14'}
    with torch.device('meta'):
        for mine, theirs in names.items():
            a, b = vit(mine), timm.create_model(f'vit_{theirs}_224', num_classes=1000)
            assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters()), mine

@pytest.mark.parametrize('method', ['bicubic_antialias', 'bilinear'])
def test_resized_positions_are_timms(method):
    layers = pytest.importorskip('timm.layers', reason='needs timm, with which the results are compared')
    pos = torch.randn(1, 35, 6)
    bicubic, bilinear = dict(interpolation='bicubic'), dict(interpolation='bilinear', antialias=False)
    kw = bicubic if method == 'bicubic_antialias' else bilinear
    theirs = layers.resample_abs_pos_embed(pos, (9, 4), (5, 7), num_prefix_tokens=0, **kw)
    assert torch.equal(resize_positions(pos, (5, 7), (9, 4), method), theirs)

def test_resized_positions_are_googles():
    zoom = pytest.importorskip('scipy.ndimage', reason='needs scipy, which Google\'s code uses').zoom
    pos = torch.randn(1, 49, 6)
    theirs = torch.tensor(zoom(pos.view(7, 7, 6).numpy(), (12/7, 12/7, 1), order=1)).view(1, 144, 6)
    close(resize_positions(pos, (7, 7), (12, 12), 'bilinear_corners'), theirs, 1e-5)

# ---- what must hold for any configuration

@every_option
def test_an_image_is_judged_by_itself(option):
    model = build(option)
    x = images(model.config, 3)
    with torch.no_grad(): close(model(x)[1:2], model(x[1:2]), 1e-5)

@every_option
def test_every_parameter_gets_a_gradient(option):
    model = build(option).train()
    model(images(model.config, 4)).sin().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (not p.numel() or p.grad.abs().max() > 0), name

@every_option
def test_intermediates_are_forwards(option):
    model = build(option)
    x = images(model.config)
    out = model.intermediates(x)
    assert list(out) == ['embed', 'block0', 'block1', 'norm', 'pooled', 'logits']
    for name, ref in dict(logits=model(x), norm=model.forward_features(x), embed=model.embed(x)).items():
        assert torch.equal(out[name], ref)
    assert torch.equal(model.head(model.pool(out['norm'])), out['logits'])

@every_option
def test_checkpointing_changes_no_number(option):
    a = build(option).train()
    b = deepcopy(a)
    b.checkpointing = True
    x = images(a.config, 4)
    for m in (a, b):
        torch.manual_seed(0)
        m(x).sin().sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters()): assert torch.equal(p.grad, q.grad), name

def test_checkpointing_runs_each_block_again():
    model, runs = build('plain').train(), []
    for block in model.encoder.blocks: block.register_forward_pre_hook(lambda *_: runs.append(1))
    for on, n in ((False, 2), (True, 4)):
        model.checkpointing = on
        runs.clear()
        model(images(model.config)).sum().backward()
        assert len(runs) == n

@every_option
def test_json_and_state_dict_bring_it_back(option):
    a = build(option)
    b = ViT(ViTConfig.from_json(a.config.to_json())).eval()
    b.load_state_dict(a.state_dict())
    x = images(a.config)
    assert a.config == b.config == ViTConfig(**asdict(a.config))
    assert torch.equal(a(x), b(x)) and torch.equal(a(x), deepcopy(a)(x))

@every_option
def test_resolution_for_good_is_resolution_at_call_time(option):
    model = build(option)
    x = torch.randn(2, model.config.in_chans, 24, 48)
    before = model(x)
    places = model.pos_embed
    assert model.set_resolution((24, 48)) is model and model.pos_embed is places and model.config.img_size == (24, 48)
    assert torch.equal(model(x), before)
    again = ViT(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), before)

@every_option
@pytest.mark.parametrize('assign', [False, True])
def test_weights_that_are_loaded_into_an_empty_model(option, assign):
    "Built without memory, then filled from a file: fixed positions are in no file"
    model = build(option)
    with torch.device('meta'): empty = ViT(model.config).eval()
    if not assign:
        empty.to_empty(device='cpu')
        for x in empty.buffers(): x.fill_(77)          # what happens to be there
    nn.Sequential(empty).load_state_dict(nn.Sequential(model).state_dict(), assign=assign)
    x = images(model.config)
    assert torch.equal(empty(x), model(x)) and torch.equal(deepcopy(empty)(x), model(x))

@pytest.mark.parametrize('option', ['sincos2d', 'no positions'])
def test_an_empty_model_gets_its_first_weights(option):
    model = build(option)
    places = model.pos_embed.clone()
    model.to_empty(device='cpu').pos_embed.fill_(77)
    model.init_weights()
    assert torch.equal(model.pos_embed, places)

@pytest.mark.parametrize('option', OPTIONS)
def test_first_weights_replace_whatever_is_there(option):
    "Norms, factors and BatchNorm's statistics, too: as `to_empty` leaves them, or a training"
    fresh, used = ViT(ViTConfig(**SMALL | OPTIONS[option])), ViT(ViTConfig(**SMALL | OPTIONS[option]))
    for x in (*used.parameters(), *used.buffers()): x.data.fill_(9)
    for model in (fresh, used):
        torch.manual_seed(0)
        model.init_weights()
    for (name, a), b in zip(fresh.state_dict().items(), used.state_dict().values()): assert torch.equal(a, b), name

@pytest.mark.parametrize('size', [None, (40, 36)])
def test_resolution_of_the_preprocessing(size):
    model = build('plain')
    model.preprocessing = prep = Preprocessing(32, [0.5]*3, [0.5]*3, resize_size=size, labels=[*'abcde'])
    model.set_resolution((64, 48))
    expected = replace(prep, img_size=(64, 48), resize_size=size and (80, 54))
    assert model.preprocessing == expected and not hasattr(build('plain').set_resolution(64), 'preprocessing')

def test_resolution_keeps_the_optimiser_at_work():
    model = build('plain').train()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.set_resolution(48)
    before = model.pos_embed.detach().clone()
    model(images(model.config)).sin().sum().backward()
    opt.step()
    assert before.shape == (1, 37, 24) and (model.pos_embed != before).all()

@some
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.sampled_from(list(RESIZE)))
def test_resized_positions(h, w, h2, w2, method):
    pos = torch.randn(1, h*w, 4)
    out = resize_positions(pos, (h, w), (h2, w2), method)
    assert out.shape == (1, h2*w2, 4) and out.isfinite().all()
    # a constant stays
    close(resize_positions(torch.ones(1, h*w, 4), (h, w), (h2, w2), method), torch.ones(1, h2*w2, 4), 1e-5)
    # equal size: nothing changes
    close(resize_positions(pos, (h, w), (h, w), method), pos, 1e-5)
    a, b = torch.randn(2, 1, h*w, 4, dtype=torch.float64)
    one, two, both = (resize_positions(p, (h, w), (h2, w2), method) for p in (a, b, a + b))
    # linear, in float64 too
    close(one + two, both, 1e-12)
    if method.endswith('corners') and min(h, w, h2, w2) > 1:
        a, b = pos.view(h, w, 4), out.view(h2, w2, 4)
        for i in (0, -1):
            for j in (0, -1): close(b[i, j], a[i, j], 1e-5)

@pytest.mark.parametrize('option', ['no positions', 'sincos2d', 'mean', 'plain'])
def test_only_positions_know_the_order_of_patches(option):
    model = build(option)
    x = images(model.config, 1)
    tiles = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)                                 # b c n p q
    mixed = tiles[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    mixed = mixed.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    change = (model(mixed) - model(x)).abs().max().item()
    assert change < 1e-5 if option == 'no positions' else change > 1e-4

def test_nobody_reads_the_registers():
    model = build('registers')
    x = model.forward_features(images(model.config))
    y = x.clone()
    y[:, 1:4] = 7.
    assert torch.equal(model.pool(x), model.pool(y))
    for pool in ('mean', 'map'):
        model = build('registers', pool=pool)
        y = (x := model.forward_features(images(model.config))).clone()
        y[:, :3] = 7.
        assert torch.equal(model.pool(x), model.pool(y))
        y[:, 3] = 7.
        assert not torch.equal(model.pool(x), model.pool(y))

def test_registers_start_apart():
    "Equal tokens with equal places would stay equal for ever"
    for prefix_positions in (True, False):
        model = ViT(ViTConfig(**SMALL, n_registers=3, prefix_positions=prefix_positions))
        x = model.embed(torch.zeros(1, 3, 32, 32))[0, :4]
        assert torch.pdist(x).min() > 0.01
        torch.testing.assert_close(x.std().item(), 0.02, rtol=0.3, atol=0)

def test_conv_stem_is_off_unless_asked_for():
    with pytest.raises(ValueError, match="patch_size=7 must be a power of two for stem='conv'"):
        vit('mnist', stem='conv')
    with pytest.raises(ValueError, match="stem_depth=2 needs stem='conv'"): vit('cifar', stem_depth=2)
    with pytest.raises(ValueError, match='stem_depth=0 must be a positive integer'):
        vit('cifar', stem='conv', stem_depth=0)
    a, b = vit('cifar'), vit('cifar', stem='conv')
    assert a.embed(torch.zeros(2, 3, 32, 32)).shape == b.embed(torch.zeros(2, 3, 32, 32)).shape
    assert not [m for m in a.modules() if isinstance(m, nn.BatchNorm2d)]

def test_conv_stem_takes_any_size():
    "An odd side is rounded up at each halving, and so is the grid"
    model = vit('mnist', stem='conv', patch_size=8).eval()
    assert model.config.grid == (4, 4) and model.config.n_patches == 16
    for h, w, rows, cols in ((28, 28, 4, 4), (32, 25, 4, 4), (33, 17, 5, 3), (5, 8, 1, 1)):
        assert model.embed(torch.zeros(2, 1, h, w)).shape == (2, rows*cols, 64)
        assert model(torch.zeros(2, 1, h, w)).isfinite().all()
    assert model.set_resolution((20, 28)).config.grid == (3, 4)
    for positions in ('sincos2d', 'none'):
        model = vit('mnist', stem='conv', patch_size=8, positions=positions)
        assert model.forward_features(torch.zeros(1, 1, 28, 28)).shape == (1, 16, 64)
    with pytest.raises(ValueError, match='image height=28 is not divisible by patch_size=8'):
        vit('mnist', img_size=32, patch_size=8)(torch.zeros(1, 1, 28, 28))

def test_drops_are_identities_when_off_and_random_when_on():
    assert not [m for m in build('plain').modules() if isinstance(m, nn.Dropout) or type(m).__name__ == 'DropPath']
    model = build('drops').train()
    x = images(model.config)
    assert not torch.equal(model(x), model(x)) and not torch.equal(model.embed(x), model.embed(x))
    assert torch.equal(model.eval()(x), model(x)) and torch.equal(model.embed(x), model.embed(x))

# ---- initialisation

def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = vit('S/16')
    for name, p in model.named_parameters():
        if name.endswith('bias') or name in ('cls_token', 'head.weight'): assert (p == 0).all(), name
        elif 'norm' in name: assert (p == 1).all(), name
        elif not p.numel(): continue
        else:
            out, fan_in = p.shape[0], p[0].numel()
            if name == 'pos_embed': std = 0.02
            elif name == 'patch_embed.proj.weight': std = fan_in**-0.5
            else: std = (2/((out//3 if 'qkv' in name else out) + fan_in))**0.5
            torch.testing.assert_close(p.std().item(), std, rtol=0.02, atol=0, msg=name)
            assert abs(p.mean().item()) < 5*std/p.numel()**0.5, name

def test_only_gated_layers_start_as_two():
    "The pool's network has no gate, also where those of the blocks have one"
    torch.manual_seed(0)
    model = vit('S/16', depth=1, gated=True, pool='map')
    for mlp in (model.encoder.blocks[0].mlp, model.attn_pool.mlp):
        std = (2/(4*384 + 384))**0.5
        torch.testing.assert_close(mlp.fc1.weight.std().item(), std, rtol=0.02, atol=0)

def test_presets_start_with_large_positions():
    torch.manual_seed(0)
    assert abs(vit('mnist').pos_embed.std() - 1) < 0.1
    assert abs(vit('mnist', pos_std=0.02).pos_embed.std() - 0.02) < 0.002

# ---- what torch can do with it

@pytest.mark.parametrize('stem', ['patch', 'conv'])
def test_hooks_see_every_linear_layer_and_convolution(stem):
    model, seen = vit('digits', stem=stem, pool='map'), []
    for name, m in model.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)): m.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.randn(2, 1, 8, 8))
    assert set(seen) == {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {'patch_embed.proj', 'attn_pool.attn.qkv', 'head'} <= set(seen)

@pytest.mark.parametrize('name', ['patch_embed.proj', 'attn_pool.attn.qkv', 'encoder.blocks.1.mlp.fc1'])
def test_pruned_layers_train(name):
    model = build('map').train()
    layer = model.get_submodule(name)
    prune.l1_unstructured(layer, 'weight', 0.5)
    opt, x = torch.optim.SGD(model.parameters(), lr=0.1), images(model.config, 4)
    mask, start = layer.weight_mask.bool(), layer.weight_orig.detach().clone()
    for _ in range(2):
        model(x).sin().sum().backward()
        opt.step()
        opt.zero_grad()
    assert mask.float().mean() == 0.5
    assert torch.equal(layer.weight_orig[~mask], start[~mask]) and (layer.weight_orig[mask] != start[mask]).any()

def test_a_module_in_place_of_the_pools_projection_is_called():
    "As LoRA does it: another module computes what `qkv` computed, and more"
    class Plus(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)
        def forward(self, x): return self.layer(x) + self.more(x)
    model = build('map')
    x = images(model.config)
    before = model(x)
    plus = model.attn_pool.attn.qkv = Plus(model.attn_pool.attn.qkv)
    assert (model(x) - before).abs().max() > 1e-3
    nn.init.zeros_(plus.more.weight)
    nn.init.zeros_(plus.more.bias)
    close(model(x), before, 1e-6)
    model(x).sin().sum().backward()
    assert plus.more.weight.grad.abs().max() > 0

def test_a_hook_changes_no_number():
    model = build('map')
    x = images(model.config)
    before = model(x)
    model.attn_pool.attn.qkv.register_forward_hook(lambda *_: None)
    close(model(x), before, 1e-6)

def test_the_patch_convolution_is_torchs():
    model = build('plain').double()
    ours, x = model.patch_embed.proj, images(model.config, 3, torch.float64).requires_grad_()
    theirs = nn.Conv2d(3, 24, 8, stride=8).double()
    theirs.load_state_dict(ours.state_dict())
    a, b = ours(x), theirs(x)
    assert a.shape == b.shape == (3, 24, 4, 4)
    close(a, b, 1e-12)
    for one, other in zip(torch.autograd.grad(a.sin().sum(), [x, *ours.parameters()]),
                          torch.autograd.grad(b.sin().sum(), [x, *theirs.parameters()])): close(one, other, 1e-12)

@every_option
def test_exports(option):
    model = build(option)
    x = images(model.config, 3)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for b in (1, 5):
        x = images(model.config, b, seed=b)
        close(program.module()(x), model(x), 1e-5)

# the plain model, and two with all the parts that a compiler or an exporter sees
PARTS = pytest.mark.parametrize('parts', [('plain', 'plain'), ('map', 'sincos2d'), ('norms', 'conv stem')],
                                ids=' and '.join)

def build_of(parts): return fill(ViT(ViTConfig(**SMALL | OPTIONS[parts[0]] | OPTIONS[parts[1]])))

@PARTS
def test_compiles_without_a_break(parts):
    model = build_of(parts)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(model.config)
    close(compiled(x), model(x), 1e-5)
    compiled(x).sin().sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model(x).sin().sum().backward()
    for k, p in model.named_parameters():
        if p.numel(): close(grads[k], p.grad, 1e-5)

def test_compiles_with_the_default_backend():
    model = build('plain')
    x = images(model.config)
    torch._dynamo.reset()
    try: out = torch.compile(model, fullgraph=True)(x)
    except Exception as e:
        if 'compiler' in str(e).lower() or 'Python.h' in str(e):
            pytest.skip(f'needs a C++ compiler: {str(e).splitlines()[0][:120]}')
        raise
    close(out, model(x), 1e-5)

@PARTS
def test_onnx_gives_the_same_logits(parts, tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason=f'needs {name}, to write and run ONNX')
    import onnxruntime
    model = build_of(parts)
    x = images(model.config)
    torch.onnx.export(model, (x,), tmp_path/'vit.onnx', dynamo=True)
    session = onnxruntime.InferenceSession(str(tmp_path/'vit.onnx'))
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.tensor(out), model(x).detach(), 1e-5)

@every_option
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(option, dtype):
    model = build(option)
    x = images(model.config)
    with torch.no_grad():
        ref = model(x)
        out = deepcopy(model).to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert (out - ref).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)*ref.abs().max()
        with torch.autocast('cpu', dtype): assert (model(x) - ref).abs().max() < 0.1*ref.abs().max()
        other = torch.randn(1, x.shape[1], 48, 24).to(dtype)
        assert deepcopy(model).to(dtype)(other).isfinite().all()

@pytest.mark.parametrize('option', [o for o in OPTIONS if o != 'conv stem'])   # BatchNorm mixes the samples
def test_gradients_of_each_sample(option):
    model = build(option).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    def loss(params, x): return torch.func.functional_call(model, (params, buffers), (x[None],)).sin().sum()
    x = images(model.config, 3, torch.float64)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        model.zero_grad()
        model(x[i:i + 1]).sin().sum().backward()
        for k, p in model.named_parameters():
            if p.numel(): close(grads[k][i], p.grad, 1e-10)

def test_finite_differences():
    model = ViT(ViTConfig(img_size=4, patch_size=2, in_chans=1, n_classes=2, dim=4, depth=1, n_heads=2, pool='map',
                          n_registers=1, qk_norm=True)).double()
    fill(model)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradcheck(model, (torch.randn(1, 1, 4, 6, dtype=torch.float64, requires_grad=True),))

def test_it_learns():
    "A few steps on one batch bring the loss near zero, with each kind of pooling"
    for option in ('plain', 'mean', 'map', 'registers', 'conv stem'):
        torch.manual_seed(0)
        model = ViT(ViTConfig(**SMALL | OPTIONS[option]))
        x, y = images(model.config, 10), torch.arange(10) % 5
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert loss < 0.1, (option, loss)

# ---- wrong input

@pytest.mark.parametrize('shape, dtype, error, message', [
    ((3, 32, 32), torch.float32, ValueError, r'use x\[None\]'),
    ((32, 32), torch.float32, ValueError, 'expected a batch'),
    ((1, 1, 32, 32), torch.float32, ValueError, 'expected .b, 3, h, w.: this model has in_chans=3'),
    ((1, 32, 32, 3), torch.float32, ValueError, r'x.permute\(0, 3, 1, 2\)'),
    ((1, 3, 32, 32), torch.uint8, TypeError, r'x.float\(\)/255'),
    ((1, 3, 30, 32), torch.float32, ValueError,
     'image height=30 .* patch_size=8: the nearest sizes that are: 24 and 32'),
    ((1, 3, 32, 35), torch.float32, ValueError, 'image width=35 .*: the nearest sizes that are: 32 and 40'),
    ((1, 3, 5, 32), torch.float32, ValueError, 'image height=5 .*: the nearest sizes that are: 8$'),
])
def test_wrong_images(shape, dtype, error, message):
    with pytest.raises(error, match=message): build('plain')(torch.zeros(shape, dtype=dtype))

@pytest.mark.parametrize('changes, message', [
    (dict(img_size=30), 'img_size=30 is not divisible by patch_size=8: the nearest sizes that are: 24 and 32'),
    (dict(img_size=(32, 30)), 'img_size=30 is not divisible'),
    (dict(img_size=4), 'img_size=4 is not divisible by patch_size=8: the nearest sizes that are: 8$'),
    (dict(img_size=(32, 32, 32)), 'img_size=.32, 32, 32. must be'),
    (dict(img_size='32'), "img_size='32' must be"),
    (dict(patch_size=0), 'patch_size=0 must be a positive integer'),
    (dict(in_chans=0), 'in_chans=0 must be'), (dict(n_classes=-1), 'n_classes=-1 must be'),
    (dict(depth=1.5), 'depth=1.5 must be'), (dict(depth=True), 'depth=True must be'),
    (dict(stem='conv', patch_norm=True), "stem='conv' has norms and biases of its own"),
    (dict(stem='conv', patch_bias=False), "stem='conv' has norms and biases of its own"),
    (dict(rotary='dinov3', rotary_size=4), "rotary='dinov3' stretches nothing: leave rotary_size out"),
    (dict(n_heads=5), 'dim=24 is not divisible by n_heads=5'), (dict(dim=-24), 'dim=-24 must be'),
    (dict(n_registers=-1), 'n_registers=-1 must be an integer, 0 or more'),
    (dict(mlp_ratio=0), 'mlp_ratio=0 must be a positive number'),
    (dict(mlp_ratio=float('nan')), 'mlp_ratio=nan must be'), (dict(pos_std=-1), 'pos_std=-1 must be'),
    (dict(norm_eps=0.), 'norm_eps=0.0 must be'),
    (dict(pool='max'), "pool='max' must be one of cls, mean, map"),
    (dict(positions='rope'), "positions='rope' must be one of learned"),
    (dict(stem='resnet'), "stem='resnet' must be"), (dict(act='swish'), "act='swish' must be"),
    (dict(pos_resize='nearest'), "pos_resize='nearest' must be"),
    (dict(dropout=1.), r'dropout=1.0 must be a number in \[0, 1\)'), (dict(drop_path=-0.1), 'drop_path=-0.1 must be'),
    (dict(dropout=None), 'dropout=None must be'),
    (dict(layer_scale='1e-5'), "layer_scale='1e-5' must be a number or None"),
    (dict(qk_norm=1), 'qk_norm=1 must be True or False'),
    (dict(cls_token=0), 'cls_token=0 must be'),
    (dict(cls_token=False), "pool='cls' reads the class token, but cls_token=False"),
    (dict(dim=30, positions='sincos2d'), "dim=30 must be divisible by 4 for positions='sincos2d'"),
])
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message): ViTConfig(**SMALL | changes)

def test_numbers_of_numpy():
    config = ViTConfig(**SMALL | dict(n_classes=np.arange(5).max() + 1, depth=np.int32(2)))
    assert config == ViTConfig(**SMALL) == ViTConfig.from_json(config.to_json()) and type(config.n_classes) is int

def test_grey_images_without_their_channel():
    for shape, message in (((16, 28, 28), r'grey images without their channel, .* use x\[:, None\]'),
                           ((1, 28, 28), r'one image .* use x\[None\]')):
        with pytest.raises(ValueError, match=message): vit('mnist')(torch.zeros(shape))

def test_wrong_names():
    with pytest.raises(ValueError, match="there is no model called 'S16'; the nearest names: S/16"): vit('S16')
    with pytest.raises(TypeError, match='no field n_class, widht; its fields: img_size, patch_size'):
        vit('S/16', widht=3, n_class=2)
    with pytest.raises(TypeError, match='no field foo'): ViTConfig.from_json('{"foo": 1}')
    with pytest.raises(ValueError, match='img_size=101 is not divisible'): vit('digits').set_resolution(101)

@pytest.mark.parametrize('name', CONFIGS)
def test_every_name_builds(name):
    with torch.device('meta'): model = vit(name)
    assert vit_config(name) == model.config and ViTConfig.from_json(model.config.to_json()) == model.config

# ---- the exercises of the chapter

NOTEBOOK = Path(__file__).parent.parent/'nbs'/'02_vit.ipynb'
NEEDED = ('import os', 'pixels =', 'class Block', 'class SimpleViT', 'data = load_digits', 'order = ',
          'x_train, y_train', 'def fit', '@torch.no_grad()\ndef accuracy')

@pytest.mark.parametrize('number', [1, 2, 3])
def test_exercise(number):
    "The check fails on the stub, with a hint, and passes on the solution that is printed below it"
    pytest.importorskip('IPython', reason='needs IPython, with which the chapter shows its pictures')
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    names = {}
    for start in NEEDED:
        cell, = [source for source in sources if source.startswith(start)]
        exec(cell, names)
    stub, = [source for source in sources if f'# exercise {number}\n' in source]
    check, = [source for source in sources if f'# check {number}\n' in source]
    solution, = [found for found in re.findall(r'```python\n(.*?)```', '\n'.join(sources), re.S)
                 if f'# solution {number}\n' in found]
    assert stub.startswith('#| eval: false') and check.startswith('#| eval: false')
    with pytest.raises(AssertionError, match='returns nothing yet'): exec(stub + '\n' + check, names)
    exec(solution + '\n' + check, names)

# ---- rotary positions, gated feed-forward networks, norms inside

TURNED = dict(positions='none', rotary='dinov3', gated=True, act='silu', inner_norms='both', cls_token=True,
              n_registers=2, pool='prefix', img_size=16, patch_size=4, dim=16, n_heads=2, depth=2, n_classes=3)

@pytest.mark.parametrize('kind', ['dinov3', 'eva02', 'pe', 'rope_vit'])
def test_scores_depend_on_the_distance_alone(kind):
    from vit_nbdev.attention import rotate
    from vit_nbdev.transformer import rotary_2d
    cos, sin = (a.double() for a in rotary_2d(4, 6, 16, kind))
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(a.expand(1, 1, 24, 16), cos, sin)[0, 0].unflatten(0, (4, 6)) for a in (q, k))
    close(q.norm(dim=-1), q[0, 0].norm().expand(4, 6), 1e-6)
    for dy, dx in ((0, 1), (1, 0), (2, 3)):
        scores = torch.stack([q[y, x] @ k[y + dy, x + dx] for y in range(4 - dy) for x in range(6 - dx)])
        close(scores, scores[0].expand(len(scores)), 2e-6)
        assert (scores[0] - q[0, 0] @ k[0, 0]).abs() > 1e-3

def test_rotary_gradients_checkpointing_and_recording():
    from vit_nbdev.attention import record_attention
    model = fill(ViT(ViTConfig(**TURNED))).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,), atol=1e-6, fast_mode=True)
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad(), record_attention(model) as maps: plain = model(x)
    assert {m.shape for m in maps.values()} == {(2, 2, 15, 15)}
    model.checkpointing = True
    close(model(x), plain, 1e-12)
    close(model.intermediates(x)['logits'], plain, 1e-12)
    moved = model(x.roll(4, dims=2))                    # without rotary positions, the mean of patches would not notice
    assert (moved - plain).abs().max() > 1e-3

def test_rotary_models_compile_and_export(tmp_path):
    model = fill(ViT(ViTConfig(**TURNED)))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        close(exported(x), model(x), 1e-5)

@pytest.mark.parametrize('shape', [(1, 1, 0, 8), (1, 1, 8, 0)])
def test_images_without_pixels(shape):
    with pytest.raises(ValueError, match='they have no pixels'):
        vit('digits', positions='sincos2d')(torch.zeros(shape))
