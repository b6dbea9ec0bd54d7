"""Attention maps, what is made of them, and the page: against explicit attention in float64, on every kind of model."""
import base64, html, json, math, re, shutil, subprocess, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from programs import shell
from vit_nbdev import interpret
from vit_nbdev.interpret import (METHODS, area, attention_distance, attention_entropy, attention_maps,
                                 attention_rollout, deletion_insertion, embedding_map, explore, fill_page,
                                 head_similarity, heat_map, plot_attention_distance, plot_patch_filters,
                                 plot_position_similarity, randomization_check, rank_correlation, relevance,
                                 show_attention, show_heads)
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.vit import vit

KINDS = {
    'class token': dict(pool='cls'),
    'class token, registers': dict(pool='cls', n_registers=2),
    'mean': dict(pool='mean'),
    'mean, with class token and register': dict(pool='mean', cls_token=True, n_registers=1),
    'attention pool': dict(pool='map'),
    'attention pool, registers': dict(pool='map', n_registers=2),
    'not square': dict(pool='cls', img_size=(8, 12)),
    'not square, mean': dict(pool='mean', img_size=(12, 8)),
    'conv stem': dict(pool='mean', stem='conv'),
    'conv stem, odd side': dict(pool='mean', stem='conv', img_size=(7, 8)),
    'norms and scales': dict(pool='cls', qk_norm=True, layer_scale=0.5, embed_norm=True, norm_after_pool=True),
    'waves': dict(pool='mean', positions='sincos2d', in_chans=3),
    'no positions': dict(pool='cls', positions='none', dropout=0.2, drop_path=0.3),
}

def make(seed=0, **changes):
    "A small model whose attention is far from even and whose head is not zero"
    torch.manual_seed(seed)
    model = vit('digits', **dict(dim=16, depth=3, n_heads=2) | changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('qkv.weight') or '.kv.' in name or '.q.' in name: p.mul_(2)
            if p.numel() and not p.any(): p.normal_(std=0.3)
    return model.eval()

def images(model, n=3, seed=1):
    c = model.config
    return torch.randn(n, c.in_chans, *c._sides,
                       generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)

def prep_of(x, labels, mean=0., std=1.):
    "How the images `x` were prepared"
    c = x.shape[1]
    return Preprocessing(tuple(x.shape[2:]), (mean,)*c, (std,)*c, in_chans=c, labels=tuple(labels))

@pytest.fixture(params=KINDS, ids=lambda k: k.replace(' ', '_'))
def model(request): return make(**KINDS[request.param])

def explicit(model, x):
    "Logits and all attention weights, by matrix products that autograd sees: no fused kernel, no hook"
    maps = []
    def attend(attn, q, k, v):
        q, k = attn.q_norm(q), attn.k_norm(k)
        maps.append((q @ k.transpose(-1, -2)/q.shape[-1]**0.5).softmax(-1))
        out = maps[-1] @ v
        return attn.proj(out.transpose(1, 2).flatten(2))
    def heads(t, attn): return t.unflatten(2, (attn.n_heads, -1)).transpose(1, 2)
    def self_attention(attn, x):
        q, k, v = (F.linear(x, w, b) for w, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)))
        return attend(attn, heads(q, attn), heads(k, attn), heads(v, attn))
    c, x = model.config, model.embed(x)
    for b in model.encoder.blocks:
        x = x + b.ls1(self_attention(b.attn, b.norm1(x)))
        x = x + b.ls2(b.mlp(b.norm2(x)))
    x = model.encoder.norm(x)
    if c.pool == 'cls': pooled = x[:, 0]
    elif c.pool == 'mean': pooled = x[:, model.n_prefix:].mean(1)
    else:
        pool, seen = model.attn_pool, x[:, model.n_prefix:]
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((pool.probe.expand(len(x), -1, -1), seen, seen),
                                                        pool.attn.qkv.weight.chunk(3), pool.attn.qkv.bias.chunk(3)))
        y = attend(pool.attn, heads(q, pool.attn), heads(k, pool.attn), heads(v, pool.attn))
        pooled = (y + pool.mlp(pool.norm(y)))[:, 0]
    return model.head(model.pool_norm(pooled)), maps

# --- maps, rollout, relevance ---

def test_maps_agree_with_explicit_attention(model):
    x = images(model)
    logits, maps = explicit(model, x)
    torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)         # the reference is the same model
    ours, depth = attention_maps(model, x), model.config.depth
    torch.testing.assert_close(ours, torch.stack(maps[:depth], 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]), atol=1e-5, rtol=0)
    assert ours.std() > 0.02 and not ours.requires_grad                        # even attention would agree too easily

def test_fused_kernel_stays_on(monkeypatch):
    "Every block's output comes from torch's fused function, in relevance as well"
    model, calls, fused = make(pool='map'), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, **k: calls.append(1) or fused(*a, **k))
    attention_maps(model, images(model))
    assert len(calls) == model.config.depth + 1
    relevance(model, images(model))
    assert len(calls) == 2*(model.config.depth + 1)
    assert not any(m._forward_hooks for m in model.modules())                  # and no hook is left behind

def test_mode_is_restored():
    "A model in training, with one part frozen in eval mode, is explained without dropout and left as it was"
    model = make(pool='cls', dropout=0.5, drop_path=0.5).train()
    model.encoder.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    x = images(model)
    for f in (attention_maps, relevance, heat_map): torch.testing.assert_close(f(model, x), f(model, x), atol=0, rtol=0)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError): attention_maps(model, x[0])
    assert [m.training for m in model.modules()] == modes

def test_batch_size_does_not_matter(model):
    x = images(model, 5)
    one = lambda f: torch.cat([f(model, x[i:i + 1]) for i in range(5)])
    for f in (attention_maps, lambda m, t: attention_rollout(attention_maps(m, t)), relevance):
        torch.testing.assert_close(f(model, x), one(f), atol=1e-5, rtol=1e-4)
    for method in METHODS:
        torch.testing.assert_close(heat_map(model, x, method, target=torch.arange(5), bs=2),
                                   heat_map(model, x, method, target=torch.arange(5)), atol=1e-5, rtol=1e-4)

def test_rollout_is_a_sum_over_all_paths():
    "Independent of any matrix product: a token's share is summed over every way through the blocks, by loops"
    maps = attention_maps(make(img_size=4, depth=3, pool='cls'), torch.randn(2, 1, 4, 4)).double()
    steps, n = ((maps.mean(2) + torch.eye(5))/2).numpy(), 5
    ours = attention_rollout(maps)
    for image in range(2):
        for a in range(n):
            for b in range(n):
                two = sum(steps[image, 1, a, i]*steps[image, 0, i, b] for i in range(n))
                three = sum(steps[image, 2, a, i]*steps[image, 1, i, j]*steps[image, 0, j, b]
                            for i in range(n) for j in range(n))
                assert ours[image, 0, a, b] == pytest.approx(steps[image, 0, a, b], abs=1e-12)
                assert ours[image, 1, a, b] == pytest.approx(two, abs=1e-12)
                assert ours[image, 2, a, b] == pytest.approx(three, abs=1e-12)

def test_rollout_rows_sum_to_one(model):
    maps = attention_maps(model, images(model))
    rolled = attention_rollout(maps)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(rolled.shape[:-1]), atol=1e-5, rtol=0)
    _, reference = explicit(model, images(model))
    r = torch.eye(maps.shape[-1])
    for w in reference[:model.config.depth]: r = (0.5*w.mean(1) + 0.5*torch.eye(maps.shape[-1])) @ r
    torch.testing.assert_close(rolled[:, -1], r, atol=1e-5, rtol=0)

def reference_relevance(model, x, target):
    "Chefer 2021 from the explicit attention: autograd gives the gradient of the weights themselves"
    logits, maps = explicit(model, x.detach().requires_grad_())
    target = logits.argmax(1) if target is None else torch.as_tensor(target).expand(len(x))
    out, p = [], model.n_prefix
    grads = torch.autograd.grad(sum(row[t] for row, t in zip(logits, target)), maps)
    for i in range(len(x)):
        steps = [(w[i]*g[i]).clamp(min=0).mean(0).detach() for w, g in zip(maps, grads)]
        r = torch.eye(steps[0].shape[-1], dtype=x.dtype)
        for s in steps[:model.config.depth]: r = r + s @ r
        if model.config.pool == 'map': out.append((steps[-1] @ r[p:])[0])
        elif model.config.pool == 'mean': out.append(r[p:].mean(0) - torch.eye(len(r), dtype=x.dtype)[p:].mean(0))
        else: out.append(r[0] - torch.eye(len(r), dtype=x.dtype)[0])
    return torch.stack(out)

@pytest.mark.parametrize('target', [None, 3, 'each'])
def test_relevance_agrees_with_autograd(model, target):
    model = model.double()
    x = images(model)
    target = torch.tensor([1, 9, 0]) if target == 'each' else target
    ours, reference = relevance(model, x, target), reference_relevance(model, x, target)
    torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-7)
    assert reference.std() > 1e-4

def test_relevance_of_frozen_and_checkpointed_models():
    "No parameter needs a gradient, none gets one, and recomputed blocks give the same"
    model = make(pool='cls')
    x = images(model)
    expected = relevance(model, x)
    model.checkpointing = True
    torch.testing.assert_close(relevance(model, x), expected)
    model.requires_grad_(False)
    with torch.no_grad(): torch.testing.assert_close(relevance(model, x), expected)
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad

def test_relevance_without_gradients_around_it():
    "`torch.inference_mode`, whose tensors nothing can be derived from: the same maps, and the model stays as it is"
    model = make(pool='cls', depth=1)
    x, target = images(model), torch.tensor([1, 9, 0])
    expected = heat_map(model, x), relevance(model, x, target), randomization_check(model, x)['embedding']
    with torch.inference_mode():
        x, target = x + 0, target + 0
        found = heat_map(model, x), relevance(model, x, target), randomization_check(model, x)['embedding']
    for a, b in zip(found, expected): torch.testing.assert_close(a, b)

def test_relevance_depends_on_the_class_and_the_others_do_not():
    model = make(pool='cls')
    x = images(model)
    a, b = (heat_map(model, x, target=t) for t in (2, 7))
    assert rank_correlation(a.flatten(1), b.flatten(1)).max() < 0.999
    for method in ('attention', 'rollout'):
        assert torch.equal(heat_map(model, x, method, target=2), heat_map(model, x, method, target=7))

def test_heat_map_reads_what_the_head_reads(model):
    x = images(model)
    _, maps = explicit(model, x)
    c, p = model.config, model.n_prefix
    n = maps[0].shape[-1]
    read = torch.zeros(3, n)
    if c.pool == 'cls': read[:, 0] = 1
    elif c.pool == 'mean': read[:, p:] = 1/(n - p)
    else: read[:, p:] = maps[-1].mean(1)[:, 0]
    expected = (read[:, None] @ maps[1][:, 0])[:, 0, p:].reshape(3, *c.grid)
    torch.testing.assert_close(heat_map(model, x, 'attention', layer=1, head=0), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(heat_map(model, x, 'attention', layer=-2, head=-2), expected, atol=1e-5, rtol=0)
    mean = (read[:, None] @ maps[c.depth - 1].mean(1))[:, 0, p:].reshape(3, *c.grid)
    torch.testing.assert_close(heat_map(model, x, 'attention'), mean, atol=1e-5, rtol=0)

def test_pools_of_several_tokens():
    "Class token and mean of the patches count half each, tokens in front alike; an attention pool may read them, too"
    model = make(pool='cls+mean')
    x = images(model)
    maps = attention_maps(model, x)[:, -1].mean(dim=1)
    expected = (maps[:, 0, 1:] + maps[:, 1:, 1:].mean(dim=1))/2
    torch.testing.assert_close(heat_map(model, x, 'attention').flatten(1), expected, atol=1e-5, rtol=0)
    model = make(pool='prefix', cls_token=True, n_registers=2)
    maps = attention_maps(model, x)[:, -1].mean(dim=1)
    torch.testing.assert_close(heat_map(model, x, 'attention').flatten(1), maps[:, :3, 3:].mean(dim=1))
    for changes in (dict(pool='cls+mean'), dict(pool='prefix', n_registers=2)):
        model = make(**changes).double()
        half = relevance(model, x.double())
        assert half.std() > 1e-4 and half.shape == (3, model.n_prefix + 16)
    model = make(pool='map', pool_prefix=True, n_registers=2)
    read, = data_of(explore(model, x[:1]))['images']
    assert min(read['read'][:2]) > 0 and sum(read['read']) == pytest.approx(1, abs=1e-5)

def test_another_resolution():
    "Images of another size than the model was made for, as the model itself takes them"
    model = make(pool='cls')
    x = torch.randn(2, 1, 12, 16)
    assert heat_map(model, x).shape == (2, 6, 8) and attention_maps(model, x).shape == (2, 3, 2, 49, 49)
    assert '"grid": [6, 8]' in explore(model, x)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = make(pool='cls')
    x = images(model)
    for method in METHODS:
        full, half = heat_map(model, x, method), heat_map(make(pool='cls').to(dtype), x.to(dtype), method)
        assert half.isfinite().all() and rank_correlation(full.flatten(1), half.flatten(1).float()).min() > 0.9

# --- measures of heads ---

def test_distance_entropy_and_similarity_by_hand():
    n = 6                                                                      # 2 x 3 patches and no token in front
    even, own = torch.full((n, n), 1/n), torch.eye(n)
    right = torch.zeros(n, n)
    right[torch.arange(n), torch.tensor([2, 1, 0, 5, 4, 3])] = 1               # mirrored: 2, 0, 2 patches away
    maps = torch.stack([own, even, right])[None, None]
    places = [(r, c) for r in range(2) for c in range(3)]
    mean = sum(math.dist(a, b) for a in places for b in places)/36
    torch.testing.assert_close(attention_distance(maps, (2, 3), 10), torch.tensor([[[0., 10*mean, 40/3]]]),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(attention_entropy(maps), torch.tensor([[[0., math.log2(6), 0.]]]), atol=1e-5, rtol=0)
    with_prefix = F.pad(maps*0.5, (2, 0, 2, 0), value=0.25)                    # tokens in front change no distance
    torch.testing.assert_close(attention_distance(with_prefix, (2, 3), 10), attention_distance(maps, (2, 3), 10),
                               atol=1e-4, rtol=0)
    maps = attention_maps(make(), images(make()))
    heads = maps.permute(1, 2, 0, 3, 4).reshape(6, -1)
    np.testing.assert_allclose(head_similarity(maps), np.corrcoef(heads.numpy()), atol=1e-4)

# --- are the maps right? ---

@pytest.mark.parametrize('changes', [dict(pool='cls', img_size=(8, 12)),
                                     dict(pool='mean', stem='conv', img_size=(7, 11))], ids=['patches', 'conv_stem'])
def test_deletion_and_insertion_step_by_step(changes):
    "Against a loop over patches with slices, not on a square; the stem's last row and column are half outside"
    model = make(**changes)
    x, scores = images(model), torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    deletion, insertion = deletion_insertion(model, x, scores, fill=-0.4)
    for i in range(3):
        gone, back = x[i].clone(), torch.full_like(x[i], -0.4)
        target = model(x[i:i + 1]).argmax()
        order = sorted(((r, c) for r in range(4) for c in range(6)), key=lambda rc: -scores[i][rc])
        for k in range(25):
            for image, curve in ((gone, deletion), (back, insertion)):
                assert model(image[None]).softmax(1)[0, target].item() == pytest.approx(curve[i, k].item(), abs=1e-5)
            if k == 24: break
            r, c = order[k]
            gone[:, 2*r:2*r + 2, 2*c:2*c + 2] = -0.4
            back[:, 2*r:2*r + 2, 2*c:2*c + 2] = x[i, :, 2*r:2*r + 2, 2*c:2*c + 2]
    assert deletion.std() > 0.01
    torch.testing.assert_close(deletion_insertion(model, x, scores, fill=-0.4, bs=2)[0], deletion, atol=1e-5, rtol=0)
    torch.testing.assert_close(deletion_insertion(model, x, scores, target=4)[0][:, 0], model(x).softmax(1)[:, 4],
                               atol=1e-5, rtol=0)
    coarse = deletion_insertion(model, x, scores, fill=-0.4, step=4)
    torch.testing.assert_close(coarse, (deletion[:, ::4], insertion[:, ::4]), atol=1e-5, rtol=0)
    labels = deletion_insertion(model, x, scores, target=4, sigmoid=True)
    torch.testing.assert_close(labels[0][:, 0], model(x).sigmoid()[:, 4], atol=1e-5, rtol=0)

def test_area():
    line = torch.linspace(1, 0, 17)[None]
    torch.testing.assert_close(area(torch.cat([line, torch.full_like(line, 0.3)])), torch.tensor([0.5, 0.3]))

def test_rank_correlation_with_ties():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(6, (20, 16), generator=g).float() for _ in range(2))
    np.testing.assert_allclose(rank_correlation(a, b), [spearmanr(r, s).statistic for r, s in zip(a, b)], atol=1e-6)

def test_randomization_check():
    model = make(pool='map', n_registers=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(model, 40)
    out = {m: randomization_check(model, x, m) for m in METHODS}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(out['rollout']) == ['head', 'block 2', 'block 1', 'block 0', 'embedding']
    for m in METHODS:
        assert all(v.shape == (40,) and v.abs().max() < 1 + 1e-6 for v in out[m].values())
        assert out[m]['embedding'].mean().abs() < 0.5
    cls = make(pool='cls')
    # the head has no part in it
    assert (randomization_check(cls, images(cls), 'rollout')['head'] > 1 - 1e-6).all()
    assert (randomization_check(cls, images(cls), 'relevance')['head'] < 1 - 1e-3).any()

def test_a_model_without_a_head_a_single_head_and_numbers_of_numpy():
    "What needs no class runs without one; one head has a table, too; an index may be numpy's"
    bare = make(n_classes=0)
    assert (randomization_check(bare, images(bare), 'rollout')['head'] > 1 - 1e-6).all()
    lone = make(depth=1, n_heads=1)
    assert head_similarity(attention_maps(lone, images(lone))).shape == (1, 1)
    place = np.unravel_index(6, lone.config.grid)
    assert isinstance(place[0], np.integer)
    a, b = (show_heads(lone, images(lone)[0], query=q) for q in (place, tuple(map(int, place))))
    maps = [[im.get_array().tolist() for ax in fig.axes for im in ax.images] for fig in (a, b)]
    assert maps[0] == maps[1]

@pytest.mark.parametrize('label, shown', [('caf\udce9 $x$', 'caf\\udce9 $x$'), ('a'*200, 'a'*23 + '…')])
def test_names_that_are_no_text_or_very_long_are_drawn(label, shown):
    model = make(n_classes=1)
    fig = show_attention(model, images(model)[0], 'rollout', preprocessing=prep_of(images(model), [label]))
    fig.canvas.draw()
    assert fig.axes[0].get_title() == f'{shown}: 100.0%'

# --- figures ---

def figures(model):
    x = images(model, 24)
    yield show_attention(model, x[0])
    yield show_attention(model, x[0], ('attention', 'rollout'), layer=0, head=1)
    yield show_heads(model, x[0], query=(1, 2))
    if model.config.stem == 'patch': yield plot_patch_filters(model, 10)
    if model.config.positions != 'none': yield plot_position_similarity(model)
    yield plot_attention_distance(model, x)
    yield embedding_map(model, x, torch.arange(24) % 10)

def clipped(fig):
    "Texts that reach over the edge of the figure"
    from matplotlib.text import Text
    fig.draw_without_rendering()                                               # which lays the figure out
    w, h = fig.bbox.size
    boxes = {t.get_text(): t.get_window_extent() for t in fig.findobj(Text) if t.get_text() and t.get_visible()
             and t.axes is not None and t.axes.axison | (t is t.axes.title)}
    return [text for text, b in boxes.items() if b.x0 < -1 or b.y0 < -1 or b.x1 > w + 1 or b.y1 > h + 1]

def look(kind): return KINDS[kind].get('img_size'), KINDS[kind].get('in_chans'), KINDS[kind].get('stem')

# the first kind whose figures have other shapes than those before
LOOKS = {look(kind): kind for kind in reversed(KINDS)}

@pytest.mark.parametrize('kind', KINDS)
def test_figures_of_every_model(kind):
    "Each is drawn, nothing is clipped (a layout takes long: once for each shape), and none is left open"
    import matplotlib.pyplot as plt
    before = plt.get_fignums()                                                 # of other tests
    for fig in figures(make(**KINDS[kind])):
        assert any(ax.has_data() for ax in fig.axes)
        if kind in LOOKS.values(): assert clipped(fig) == []
    assert plt.get_fignums() == before

def test_figures_as_vectors(tmp_path):
    "Every kind of figure, of a model that has all that they show"
    for i, fig in enumerate(figures(make(pool='cls', n_registers=2, img_size=(8, 12)))):
        fig.savefig(tmp_path/f'{i}.pdf')
        fig.savefig(tmp_path/f'{i}.svg')
        assert (tmp_path/f'{i}.pdf').read_bytes().startswith(b'%PDF') and '<path' in (tmp_path/f'{i}.svg').read_text()

def test_clipped_finds_clipped_text():
    from matplotlib.figure import Figure
    fig = Figure(figsize=(1, 1))
    fig.subplots().set_title('far too long for an inch of width')
    assert clipped(fig)

def test_show_attention_says_what_it_shows():
    model = make(pool='cls')
    x = images(model)
    prep = prep_of(x, 'abcdefghij', mean=0.5, std=0.25)
    p = model(x).softmax(1)[0]
    fig = show_attention(model, x[0], preprocessing=prep)
    assert fig.axes[0].get_title() == f'{"abcdefghij"[p.argmax()]}: {p.max():.1%}'
    np.testing.assert_allclose(fig.axes[0].images[0].get_array(), (x[0, 0]*0.25 + 0.5).clamp(0, 1), atol=1e-6)
    for ax, method in zip(fig.axes[1:], METHODS):
        np.testing.assert_allclose(ax.images[0].get_array(), heat_map(model, x[:1], method)[0], atol=1e-6)
    assert show_attention(model, x[0], 'relevance', target=4).axes[0].get_title().startswith('4: ')

def test_several_labels_are_independent():
    "Above the image and on the page: each label's own probability, not its share among them"
    model = make(pool='cls')
    x = images(model, 1)
    prep = replace(prep_of(x, 'abcdefghij'), several=True)
    p, first = model(x).sigmoid()[0].max(0)
    for said in (prep, prep.to_dict()):
        title = show_attention(model, x[0], 'attention', preprocessing=said).axes[0].get_title()
        assert title == f'{"abcdefghij"[first]}: {p:.1%}'
        label, part = data_of(explore(model, x, preprocessing=said))['images'][0]['probs'][0]
        assert label == 'abcdefghij'[first] and part == pytest.approx(p.item(), abs=1e-4)

def test_colours_are_those_of_the_bar():
    "What is seen of a map is the colour that the bar gives its number: nothing shines through"
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    model = make(pool='cls', img_size=(32, 32), patch_size=8)
    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    image[:, 8:24] = 0                                                          # no outline runs through the middle
    fig = show_attention(model, image, 'attention', size=4)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    ax, bar = fig.axes[1:]
    seen, heat = np.asarray(canvas.buffer_rgba()), heat_map(model, image[None], 'attention')[0]
    for row, col in ((1, 0), (2, 3)):
        x, y = ax.transData.transform((8*col + 4, 8*row + 4)).astype(int)
        expected = colormaps['inferno'](heat[row, col].item()/bar.get_ylim()[1], bytes=True)
        assert np.abs(seen[seen.shape[0] - 1 - y, x].astype(int) - expected).max() <= 3

def test_preprocessing_as_dict_and_as_object():
    "The dict in a run's config.json is understood; one that lacks a field says which"
    model = make(pool='cls')
    x = images(model)
    prep = prep_of(x, 'abcdefghij', mean=0.5, std=0.25)
    as_read = json.loads(json.dumps(prep.to_dict()))
    assert explore(model, x, None, prep) == explore(model, x, None, as_read)
    with pytest.raises(ValueError, match='preprocessing lacks img_size'):
        show_attention(model, x[0], preprocessing=dict(mean=[0.], std=[1.]))

def test_the_frame_is_where_the_map_is():
    "... also where the stem's grid is rounded up, so that a token has fewer pixels than `patch_size`"
    model = vit('mnist', img_size=28, patch_size=8, stem='conv')
    assert model.config.grid == (4, 4)
    ax = show_heads(model.eval(), torch.randn(1, 28, 28), query=(1, 3)).axes[0]
    (frame,) = ax.patches
    assert frame.get_bbox().bounds == (21, 7, 7, 7) and ax.images[0].get_extent() == [0, 28, 28, 0]

def test_show_heads_of_a_patch():
    model = make(pool='cls', n_registers=1, img_size=(8, 12))
    x = images(model)
    fig, w = show_heads(model, x[0], query=(1, 3)), attention_maps(model, x[:1])[0]
    for i, ax in enumerate(fig.axes[:6]):
        np.testing.assert_allclose(ax.images[0].get_array(), w[i//2, i % 2, 2 + 1*6 + 3, 2:].view(4, 6), atol=1e-6)

def test_attention_distance_figure_has_the_values():
    model = make(pool='cls')
    x = images(model)
    ax = plot_attention_distance(model, x).axes[0]
    drawn = np.array([line.get_ydata() for line in ax.lines[:2]])
    np.testing.assert_allclose(drawn.T, attention_distance(attention_maps(model, x), (4, 4), 2).mean(0), atol=1e-5)

def test_embedding_map_marks_the_mistakes():
    model = make(pool='mean')
    x = images(model, 30)
    y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % 10
    ax = embedding_map(model, x, y, prep_of(x, 'abcdefghij')).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['mistakes: 4 of 30']
    assert len(ax.collections[-1].get_offsets()) == 4
    assert {t.get_text() for t in ax.texts} == {'abcdefghij'[i] for i in y.unique()}

def test_embedding_map_of_a_model_without_a_head():
    "The classes are those in y, and nothing is called a mistake"
    model = make(pool='mean', n_classes=0)
    x, y = images(model, 12), torch.arange(12) % 3
    for prep, names in ((None, '012'), (prep_of(x, 'abc'), 'abc')):
        ax = embedding_map(model, x, y, prep).axes[0]
        assert {t.get_text() for t in ax.texts} == set(names) and ax.get_legend() is None
        assert sum(len(c.get_offsets()) for c in ax.collections) == 12
    clip = make(n_classes=3)
    clip.head.bias.data.zero_()                  # and no names: it leads to no classes
    assert embedding_map(clip, x, y, prep_of(x, ())).axes[0].get_legend() is None

def test_class_names_that_are_no_text_are_drawn_among_embeddings():
    model = make(pool='mean', n_classes=3)
    x = images(model, 12)
    fig = embedding_map(model, x, torch.arange(12) % 3, prep_of(x, ['caf\udce9', 'b', 'c']))
    fig.canvas.draw()
    assert 'caf\\udce9' in {t.get_text() for t in fig.axes[0].texts}

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_whole_numbers(dtype):
    model = make()
    x = images(model, 2)
    found, expected = (relevance(model, x, torch.tensor([1, 2], dtype=d)) for d in (dtype, torch.int64))
    assert torch.equal(found, expected)

def test_a_model_that_was_compiled_in_place():
    "Maps and relevance are those of the model as written, and it stays compiled"
    model = make().eval()
    x = images(model, 2)
    maps, speaks = attention_maps(model, x), relevance(model, x)
    model.compile(backend='aot_eager')
    with torch.no_grad(): model(x)
    model(x.clone().requires_grad_())
    compiled = model._compiled_call_impl
    assert torch.equal(attention_maps(model, x), maps) and torch.equal(relevance(model, x), speaks)
    assert model._compiled_call_impl is compiled is not None

# --- bad input: one sentence each ---

def bad(f, message, kind=ValueError, **changes):
    return pytest.param(f, message, kind, changes, id=re.sub(r'\W+', '_', message)[:50])

X = torch.zeros(2, 1, 8, 8)
BAD = [
    bad(lambda m: attention_maps(nn.Linear(2, 2), X), 'model is a Linear, expected a ViT', TypeError),
    bad(lambda m: relevance(nn.Conv2d(1, 2, 3), X), 'model is a Conv2d, expected a ViT', TypeError),
    bad(lambda m: explore('vit', X), 'model is a str, expected a ViT', TypeError),
    bad(lambda m: attention_maps(m, torch.zeros(2, 1, 8, 9)), 'image width=9 is not divisible by patch_size=2'),
    bad(lambda m: heat_map(m, torch.zeros(2, 1, 7, 8)), 'image height=7 is not divisible'),
    bad(lambda m: heat_map(m, torch.zeros(2, 3, 8, 8)), 'this model has in_chans=1'),
    bad(lambda m: attention_maps(m, X.byte()), 'images are torch.uint8: convert them', TypeError),
    bad(lambda m: attention_maps(m, np.zeros((1, 1, 8, 8))), 'images are a ndarray, expected a tensor', TypeError),
    bad(lambda m: attention_maps(m, X[0]), 'got one image of shape (1, 8, 8), expected a batch'),
    bad(lambda m: show_attention(m, X), 'image has shape (2, 1, 8, 8), expected one image (c, h, w)'),
    bad(lambda m: show_heads(m, X), 'image has shape (2, 1, 8, 8), expected one image'),
    bad(lambda m: show_attention(m, X[0], 'attention', layer=3), 'layer=3, but there are 3 blocks: 0 to 2'),
    bad(lambda m: heat_map(m, X, 'attention', layer=-4), 'layer=-4, but there are 3 blocks'),
    bad(lambda m: heat_map(m, X, 'attention', head=2), 'head=2, but there are 2 heads: 0 to 1'),
    bad(lambda m: heat_map(m, X, 'attention', head='first'), "head='first', but there are 2 heads"),
    bad(lambda m: show_heads(m, X[0], query=(4, 0)), 'query[0]=4, but there are 4 rows of patches'),
    bad(lambda m: show_heads(m, X[0], query=(0, 9)), 'query[1]=9, but there are 4 columns of patches'),
    bad(lambda m: heat_map(m, X, 'gradcam'), "method='gradcam' must be one of attention, rollout, relevance"),
    bad(lambda m: relevance(m, X, 10), 'target=10, but the model has 10 classes: 0 to 9'),
    bad(lambda m: relevance(m, X, torch.tensor([0, -1])), 'target=-1, but the model has 10 classes'),
    bad(lambda m: show_attention(m, X[0], target=11), 'target=11, but the model has 10 classes'),
    bad(lambda m: relevance(m, X, torch.zeros(3).long()), 'expected a class index, or 2 of them'),
    bad(lambda m: relevance(m, X, 1.5), 'target is torch.float32 of shape (), expected a class index'),
    bad(lambda m: heat_map(m, X, target=torch.tensor([1]), bs=1),
        'target is torch.int64 of shape (1,), expected a class index, or 2 of them'),
    bad(lambda m: deletion_insertion(m, X, torch.rand(2, 4, 4), target=10), 'target=10, but the model has 10 classes'),
    bad(lambda m: relevance(m, X), 'the model has no head (n_classes=0)', n_classes=0),
    bad(lambda m: deletion_insertion(m, X, torch.rand(2, 3, 3)),
        'scores have shape (2, 3, 3), expected a number per patch: (2, 4, 4)'),
    bad(lambda m: deletion_insertion(m, X, torch.rand(2, 4, 4), step=5), 'step=5 must divide the 16 patches'),
    bad(lambda m: explore(m, X, titles=['a']), 'there are 1 titles but 2 images'),
    bad(lambda m: explore(m, X[:0]), 'images are empty'),
    bad(lambda m: heat_map(m, X[:0]), 'images are empty: give one or more'),
    bad(lambda m: attention_maps(m, X[:0]), 'images are empty'),
    bad(lambda m: explore(m, X[0]), 'got one image of shape'),
    bad(lambda m: embedding_map(m, X, torch.zeros(2)), 'there are 2 images and 2 classes'),
    bad(lambda m: embedding_map(m, X.repeat(2, 1, 1, 1), torch.zeros(4, 10)), 'y is torch.float32 of shape (4, 10)'),
    bad(lambda m: embedding_map(m, X.repeat(2, 1, 1, 1), torch.tensor([0, 1, 2, 10])),
        'y is from 0 to 10, but there are 10'),
    bad(lambda m: show_attention(m, X[0], preprocessing=prep_of(X, 'abc')), 'preprocessing has 3 labels, but'),
    bad(lambda m: explore(m, X, preprocessing=prep_of(X, 'abc')), 'preprocessing has 3 labels, but the model has 10'),
    bad(lambda m: plot_patch_filters(m), "stem='conv'", stem='conv'),
    bad(lambda m: plot_position_similarity(m), "positions='none'", positions='none'),
]

@pytest.mark.parametrize('f, message, kind, changes', BAD)
def test_bad_input(f, message, kind, changes):
    model = make(**dict(pool='cls') | changes)
    with pytest.raises(kind, match=re.escape(message)) as e: f(model)
    assert '\n' not in str(e.value) and not any(m._forward_hooks for m in model.modules())

# --- the page ---

def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])

def steps(n): return 255 if n <= 128 else 63

def weights_of(entry, name, scale, n):
    levels = np.frombuffer(zlib.decompress(base64.b64decode(entry[name])), np.uint8).reshape(-1, n, n)
    return (levels/steps(n))**2*np.array(entry[scale])[:, None, None]

def half_a_step(true):
    "How far a weight may be off: half of a step in the root of its part of the map's largest `(m n n)`"
    largest = true.amax(dim=(1, 2), keepdim=True)
    n = steps(true.shape[-1])
    return 1.001*((true*largest).sqrt()/n + largest/(2*n)**2).numpy() + 1e-7

def test_page_holds_the_weights(model):
    "Within half a step of the quantisation, and the readout and the prediction as they are"
    x = images(model)
    facts, maps = data_of(explore(model, x)), attention_maps(model, x)
    rolled, n = attention_rollout(maps), maps.shape[-1]
    assert facts['grid'] == list(model.config.grid) and len(facts['prefix']) == model.n_prefix
    for entry, w, r, p in zip(facts['images'], maps, rolled, model(x).softmax(1)):
        for true, name, scale in ((w.flatten(0, 1), 'maps', 'scale'), (r, 'rollout', 'rollout_scale')):
            assert (np.abs(weights_of(entry, name, scale, n) - true.numpy()) <= half_a_step(true)).all()
        assert [label for label, _ in entry['probs']] == [str(i) for i in p.topk(5).indices.tolist()]
        assert entry['probs'][0][1] == pytest.approx(p.max().item(), abs=1e-4)
        assert sum(entry['read']) == pytest.approx(1, abs=1e-5)

def test_large_maps_are_kept_in_fewer_steps():
    "More than 128 tokens: 63 steps of the root, which the page is told"
    model = vit('mnist', patch_size=2, depth=1).eval()
    x = images(model, 1)
    facts, maps = data_of(explore(model, x)), attention_maps(model, x)[0].flatten(0, 1)
    kept = weights_of(facts['images'][0], 'maps', 'scale', 196)
    assert facts['steps'] == 63 and data_of(explore(vit('mnist').eval(), images(model, 1)))['steps'] == 255
    assert (np.abs(kept - maps.numpy()) <= half_a_step(maps)).all()

def test_page_is_small_and_needs_no_network(tmp_path):
    "Eight images of an MNIST model, also with patches finer than the preset's; all of it is noise, which packs badly"
    for patch_size, size in (7, 150e3), (4, 500e3):
        model = vit('mnist', patch_size=patch_size)
        page = explore(model, images(model, 8), tmp_path/'page.html')
        assert (tmp_path/'page.html').stat().st_size < size
        assert (tmp_path/'page.html').read_text(encoding='utf-8') == page
        assert not re.search(r'https?:|//cdn|@import|url\(|fetch\(|XMLHttp|import\s', page)

def test_page_in_jupyter():
    page = explore(make(pool='cls'), images(make(pool='cls')))
    frame = page._repr_html_()
    assert frame.startswith('<iframe srcdoc="') and frame.count('"') == 6 and '&lt;canvas&gt;' in frame
    assert html.unescape(re.search('srcdoc="(.*?)"', frame, re.S)[1]) == page

def test_hostile_names():
    "Titles and labels can't end the data or become tags"
    model, evil = make(pool='cls'), '</script><img src=x onerror=alert(1)>'
    x = images(model)
    page = explore(model, x, None, prep_of(x, [evil]*10), titles=[evil]*3)
    first = data_of(page)['images'][0]
    assert evil not in page and first['title'] == evil and first['probs'][0][0] == evil

def test_a_page_of_a_photograph_is_small():
    "Ti/16 at 224 pixels: 1.4 MB of weights, 0.5 MB of rollout; and the pixels as JPEG, which a small image is not"
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(1, 3, 14, 14), (224, 224), mode='bicubic')
    model = vit('Ti/16')                                                      # without training: what packs badly
    page = explore(model, smooth)
    assert len(page) < 0.76*len(explore(model, smooth, compress=False))
    assert data_of(page)['images'][0]['src'].startswith('data:image/jpeg')
    assert data_of(explore(make(), images(make())))['images'][0]['src'].startswith('data:image/png')

def test_pages_are_filled_safely():
    "Text is text; a missing part is an error; and nothing in a file of the package ends the element it goes into"
    parts = dict(title='a < b & "c"', headline='1', summary='2', settings={'<i>': '</table>'},
                 pictures=[dict(title='"><script>', note='<b>', src='data:,')], classes=[('<b>', '<i>')],
                 about_classes='<b>')
    page = fill_page('report.html', **parts)
    for evil in ('<script', '<i>', '<b>', '&lt;/table></td>'): assert evil not in page
    assert html.unescape(page).count('a < b & "c"') == 2 and '<td>&lt;/table&gt;</td>' in page
    import jinja2
    with pytest.raises(jinja2.UndefinedError, match='settings'):
        fill_page('report.html', **parts | dict(settings=jinja2.StrictUndefined(name='settings')))
    del parts['headline']
    with pytest.raises(jinja2.UndefinedError, match="'headline' is undefined"): fill_page('report.html', **parts)
    for path in ASSETS.iterdir():
        if path.suffix != '.html':
            assert not re.search(r'</(script|style)|<!--', path.read_text(encoding='utf-8'), re.I), path.name

ASSETS = Path(interpret.__file__).parent/'assets'

@pytest.mark.parametrize('path', ASSETS.glob('*.js'), ids=lambda p: p.name)
def test_script_is_javascript(path):
    node = shutil.which('node')
    if node is None: pytest.skip('node is not here: it checks the syntax of the scripts')
    done = subprocess.run([node, '--check', path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_no_page_in_python():
    "Markup, styles and scripts live in files of their own"
    source = Path(interpret.__file__).read_text(encoding='utf-8')
    assert not re.search(r'</|<!DOCTYPE|<iframe|<script|document\.', source)

@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api',
                                     reason='playwright is not installed: pip install playwright')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if path is None: pytest.skip('no chromium on the PATH')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture
def open_page(browser, tmp_path):
    "A function that opens the page of a model; whatever goes wrong in it, or asks the network, fails the test"
    troubles, contexts = [], []
    def open_page(model, x, width=1100, compress=True, before=None, **kwargs):
        context = browser.new_context(viewport=dict(width=width, height=900), **kwargs)
        contexts.append(context)
        tab = context.new_page()
        labels = [f'class {i}' for i in range(model.config.n_classes)]
        explore(model, x, tmp_path/'page.html', prep_of(x, labels), compress=compress)
        tab.on('pageerror', lambda e: troubles.append(str(e)))
        # advice for a test that reads pixels
        tab.on('console', lambda m: 'willReadFrequently' in m.text or troubles.append(m.text))
        tab.on('request', lambda r: r.url.startswith(('file:', 'data:')) or troubles.append(r.url))
        if before: tab.add_init_script(before)
        tab.goto((tmp_path/'page.html').as_uri())
        tab.wait_for_function('before => before || D.images.every(im => im.loaded)', arg=before)
        tab.wait_for_timeout(100)
        return tab
    yield open_page
    for context in contexts: context.close()
    assert troubles == []

def point(tab, where, row, col, rows=4, cols=4, click=False):
    box = tab.locator(where).bounding_box()
    xy = box['x'] + (col + 0.5)*box['width']/cols, box['y'] + (row + 0.5)*box['height']/rows
    (tab.mouse.click if click else tab.mouse.move)(*xy)

def shown(tab):
    "The numbers of the table under the large picture, in the order of the tokens"
    cells = tab.eval_on_selector_all('td[data-token]',
                                     'cells => cells.map(c => [c.dataset.token, c.dataset.value, c.textContent])')
    values = {int(t): float(v) for t, v, _ in cells}
    assert all(text == f'{100*float(v):.1f} %' or abs(float(text[:-2]) - 100*float(v)) < 0.051 for _, v, text in cells)
    return np.array([values[t] for t in range(len(values))])

def pixels(tab, where): return tab.eval_on_selector(f'{where} canvas', 'c => c.toDataURL()')

def close_to(values, maps, query):
    "Within half a step of each map's quantisation; of several maps, their mean"
    maps = maps.reshape(-1, *maps.shape[-2:])
    return (np.abs(values - maps.mean(0)[query].numpy()) <= half_a_step(maps).mean(0)[query]).all()

def test_hovering(open_page):
    "Another patch, other pictures, and its own row of the model's weights"
    model = make(pool='cls', n_registers=1)
    x = images(model)
    tab, w = open_page(model, x), attention_maps(model, x)[0]
    point(tab, '#picture', 0, 1)
    before = pixels(tab, '#map'), pixels(tab, '#picture'), pixels(tab, '#heads')
    assert close_to(shown(tab), w[2, 0], 2 + 1) and 'row 0, column 1 attends most' in tab.inner_text('#said')
    point(tab, '#picture', 2, 3)
    assert all(a != b for a, b in zip(before, (pixels(tab, '#map'), pixels(tab, '#picture'), pixels(tab, '#heads'))))
    assert close_to(shown(tab), w[2, 0], 2 + 2*4 + 3) and not close_to(shown(tab), w[2, 0], 2 + 1)
    # held: the pointer may leave without changing anything
    point(tab, '#picture', 1, 1, click=True)
    point(tab, '#picture', 3, 3)
    assert close_to(shown(tab), w[2, 0], 2 + 5) and '(held)' in tab.inner_text('#said')
    point(tab, '#map', 2, 0)
    assert tab.inner_text('#read') == f'row 2, column 0: {100*shown(tab)[2 + 8]:.1f} %'

def test_uncompressed_and_old_browsers(open_page):
    "A browser that can't unpack says so, and one page for it shows the same weights"
    model, no_stream = make(pool='cls'), 'delete window.DecompressionStream'
    x = images(model)
    tab = open_page(model, x, before=no_stream)
    assert 'explore(..., compress=False)' in tab.inner_text('#said')
    tab = open_page(model, x, before=no_stream, compress=False)
    assert close_to(shown(tab), attention_maps(model, x)[0, 2, 0], 0)

def test_photograph(open_page):
    "196 patches, and an image that is stored as JPEG"
    torch.manual_seed(0)
    model = vit('Ti/16', depth=2)
    x = F.interpolate(torch.randn(1, 3, 14, 14), (224, 224), mode='bicubic')
    tab = open_page(model, x)
    point(tab, '#picture', 3, 5, 14, 14)
    assert close_to(shown(tab), attention_maps(model, x)[0, 1, 0], model.n_prefix + 3*14 + 5)

def test_every_view(open_page):
    "One head, mean of heads and rollout; every block; the class token and what the head reads"
    for kind in (dict(pool='cls'), dict(pool='mean', cls_token=True), dict(pool='map', img_size=(8, 12))):
        model = make(**kind)
        x = images(model)
        tab, (maps, read, _) = open_page(model, x), interpret._record(model, x)
        maps, rolled, read = maps[1], attention_rollout(maps)[1], read[1]
        tab.keyboard.press('i')
        if kind['pool'] == 'cls': assert close_to(shown(tab), maps[2, 0], 0)           # it starts at the class token
        else: assert np.abs(shown(tab) - (read @ maps[2, 0]).numpy()).max() < 0.004    # or at what the head reads
        point(tab, '#picture', 1, 2, *model.config.grid)
        q = model.n_prefix + model.config.grid[1] + 2
        for block in (2, 0):
            tab.locator('#block').fill(str(block))
            tab.get_by_role('button', name='one head').click()
            tab.locator('#numbers button').nth(1).click()
            assert close_to(shown(tab), maps[block, 1], q)
            tab.get_by_role('button', name='mean of heads').click()
            assert close_to(shown(tab), maps[block], q)
            tab.get_by_role('button', name='rollout').click()
            assert close_to(shown(tab), rolled[block], q)
        tab.get_by_role('button', name='block 1, head 0').click()
        assert close_to(shown(tab), maps[1, 0], q) and tab.get_attribute('#views button', 'aria-pressed') == 'true'

def test_scale_of_the_heads(open_page):
    "On its own scale the largest weight of a head is yellow; on the common one that of the largest head only"
    model = make(pool='mean')
    x = images(model)
    tab, maps = open_page(model, x), attention_maps(model, x[:1])[0]
    point(tab, '#picture', 0, 0)
    cell = """([k, i]) => { const c = document.querySelectorAll('#heads canvas')[k];
        const x = (i % 4 + .5)*c.width/4, y = (Math.floor(i/4) + .5)*c.height/4;
        return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3) }"""
    yellow = lambda k: tab.evaluate(cell, [k, maps[k//2, k % 2, 0].argmax().item()]) == [253, 231, 36]
    largest = maps[:, :, 0].amax(dim=-1).flatten().argmax().item()
    assert [k for k in range(6) if yellow(k)] == [largest] and 'Colours of all: 0 to' in tab.inner_text('#range')
    tab.get_by_label('each head on its own scale').check()
    assert all(yellow(k) for k in range(6)) and 'Colours of each' in tab.inner_text('#range')

def test_keyboard(open_page):
    model = make(pool='cls', n_registers=1)
    x = images(model)
    tab, w = open_page(model, x), attention_maps(model, x)
    point(tab, '#picture', 1, 1, click=True)
    place = lambda: re.search(r'head \d\. (.*?)( \(held\))? attends', tab.inner_text('#said'))[1]
    assert place() == 'row 1, column 1'
    for key, expected in dict(ArrowRight='row 1, column 2', ArrowDown='row 2, column 2', ArrowLeft='row 2, column 1',
                              ArrowUp='row 1, column 1').items():
        tab.keyboard.press(key)
        assert place() == expected
    for _ in range(5): tab.keyboard.press('ArrowUp')
    assert place() == 'row 0, column 1'                            # it stays in the image
    assert close_to(shown(tab), w[0, 2, 0], 2 + 1)
    for key, said in {'[': 'Block 1, head 0', 'h': 'Block 1, head 1', ']': 'Block 2, head 1',
                      'v': 'Block 2, mean of heads', 't': 'class token'}.items():
        tab.keyboard.press(key)
        assert said in tab.inner_text('#said')
    tab.keyboard.press('t')
    assert 'register 1 (held)' in tab.inner_text('#said')
    tab.keyboard.press('Escape')
    assert '(held)' not in tab.inner_text('#said')
    for key in ('h', 'i'): tab.keyboard.press(key)
    assert close_to(shown(tab), w[1, 2, 0], 1)
    tab.evaluate('document.activeElement.blur()')
    tab.keyboard.press('ArrowDown')                                # without the focus the arrows scroll, as everywhere
    assert 'register 1' in tab.inner_text('#said')

def test_prediction_and_images(open_page):
    model = make(pool='mean')
    x = images(model)
    tab, p = open_page(model, x), model(x).softmax(1)
    for i in range(3):
        tab.locator('#images button').nth(i).click()
        best = p[i].topk(5)
        rows = [(f'class {k}', f'{100*round(v.item(), 4):.1f} %') for k, v in zip(best.indices, best.values)]
        assert tab.locator('#probs').inner_text().split('\n') == [text for row in rows for text in row]

@pytest.mark.parametrize('width', [320, 375])
@pytest.mark.parametrize('kind', ['class token, registers', 'not square', 'twelve heads'])
def test_phone(open_page, width, kind):
    "Nothing reaches over the edge, even with the table open"
    model = make(dim=48, n_heads=12, pool='mean') if kind == 'twelve heads' else make(**KINDS[kind])
    tab = open_page(model, images(model, 8), width=width, has_touch=True)
    tab.locator('summary').click()
    assert tab.evaluate('document.documentElement.scrollWidth') == width
    assert tab.evaluate('[...document.querySelectorAll("button, canvas, .card")]'
                        '.every(e => e.getBoundingClientRect().right <= innerWidth)')
    tab.locator('#picture').tap()
    assert '(held)' in tab.inner_text('#said')

def contrast(a, b):
    "Of two colours of CSS, as WCAG 2 defines it"
    def light(c):
        rgb = [int(v)/255 for v in re.findall(r'\d+', c)[:3]]
        linear = [v/12.92 if v <= 0.04045 else ((v + 0.055)/1.055)**2.4 for v in rgb]
        return sum(w*v for w, v in zip((0.2126, 0.7152, 0.0722), linear))
    return (max(light(a), light(b)) + 0.05)/(min(light(a), light(b)) + 0.05)

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_light_and_dark(open_page, scheme):
    model = make(pool='cls')
    tab = open_page(model, images(model), color_scheme=scheme)
    style = lambda where, name: tab.eval_on_selector(where, f'e => getComputedStyle(e)["{name}"]')
    back, card = style('body', 'backgroundColor'), style('.card', 'backgroundColor')
    assert (contrast(back, 'rgb(0,0,0)') > 10) == (scheme == 'light')
    for where in ('#said', 'figcaption', '#range', 'h2', 'dd', 'button', '#depth'):
        assert contrast(style(where, 'color'), card) > 4.5, where

def test_everything_has_a_name(open_page):
    "What a screen reader would say: no button, picture or slider without a name; labels that point somewhere"
    model = make(pool='mean', cls_token=True)
    tab = open_page(model, images(model))
    nameless = """[...document.querySelectorAll('button, [role], input')].filter(e => !(
        e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim() ||
        document.getElementById(e.getAttribute('aria-labelledby')))).map(e => e.outerHTML)"""
    assert tab.evaluate(nameless) == []
    pointers = """[...document.querySelectorAll('[aria-describedby], [aria-labelledby], [for]')]
        .flatMap(e => ['aria-describedby', 'aria-labelledby', 'for'].map(a => e.getAttribute(a) || ''))
        .flatMap(ids => ids.split(' ').filter(Boolean)).filter(id => !document.getElementById(id))"""
    assert tab.evaluate(pointers) == [] and tab.get_attribute('html', 'lang') == 'en'

# --- published models, converted ---

def timm_maps(x):
    "A timm model with random weights, and the weights after its softmax where it is told not to fuse"
    timm = pytest.importorskip('timm')
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=3, num_heads=3,
                                          num_classes=10, reg_tokens=2).eval()
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    model(x)
    return model, maps

def torchvision_maps(x):
    "The same of torchvision, whose attention can be asked for its weights"
    from torchvision.models.vision_transformer import VisionTransformer
    model, maps = VisionTransformer(32, 8, 3, 3, 192, 384, num_classes=10).eval(), []
    nn.init.normal_(model.heads.head.weight)                                   # torchvision starts it with zeros
    inputs = []
    for layer in model.encoder.layers: layer.ln_1.register_forward_hook(lambda m, args, out: inputs.append(out))
    model(x)
    for layer, t in zip(model.encoder.layers, inputs):
        maps.append(layer.self_attention(t, t, t, need_weights=True, average_attn_weights=False)[1])
    return model, maps

def transformers_maps(x):
    "The same of transformers, which returns them in its slow mode"
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=3, num_attention_heads=3, intermediate_size=384,
                                    image_size=32, patch_size=8,
                                    num_labels=10, attn_implementation='eager')
    model = transformers.ViTForImageClassification(config).eval()
    return model, model(x, output_attentions=True).attentions

@pytest.mark.parametrize('published', [timm_maps, torchvision_maps, transformers_maps])
def test_converted_models(published, tmp_path):
    "What we show of a converted model is what the original attends to"
    from vit_nbdev.pretrained import load_pretrained
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): theirs, maps = published(x)
    model = load_pretrained(theirs.state_dict())
    torch.testing.assert_close(attention_maps(model, x), torch.stack(list(maps), 1), atol=1e-5, rtol=0)
    assert model.config.n_registers == (2 if published is timm_maps else 0)
    for method in METHODS: assert heat_map(model, x, method).shape == (2, 4, 4) and heat_map(model, x, method).std() > 0
    double = model.double()
    torch.testing.assert_close(relevance(double, x.double()), reference_relevance(double, x.double(), None),
                               atol=1e-9, rtol=1e-7)
    assert data_of(explore(model.float(), x))['prefix'][0] == 'class token'
    with pytest.raises(TypeError, match='vit_nbdev.pretrained converts published models'): attention_maps(theirs, x)

# --- vit_explain ---

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    from vit_nbdev.preprocessing import Preprocessing
    from vit_nbdev.runs import save_model
    run = tmp_path_factory.mktemp('run')
    labels = [f'digit {i}' for i in range(10)]
    save_model(make(pool='cls', n_registers=1), run, Preprocessing(8, [0.3], [0.4], in_chans=1, labels=labels))
    return run

@pytest.fixture
def folder(tmp_path, monkeypatch, run_folder):
    "A folder with a run, some images, and the command as pip would install it"
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, tmp_path/'run')
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(8, 8), (8, 8), (40, 30, 3)]):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(f'{i}.png')
    Path('note.png').write_text('no image')
    Path('vit_explain.py').write_text('from vit_nbdev.cli import vit_explain\n'
                                      'if __name__ == "__main__": vit_explain()\n')
    return tmp_path

def vit_explain(*args): return shell('vit_explain.py', *args, cwd='.')

def test_vit_explain(folder):
    "The page shows what the model attends to in these very pixels"
    from vit_nbdev.runs import load_model
    code, out, err = vit_explain('run', '0.png', '2.png', '--out', 'page.html')
    assert code == 0, err
    assert out.strip().endswith('shows 2 images: open it in a browser') and out.startswith('page.html (')
    facts, model = data_of(Path('page.html').read_text(encoding='utf-8')), load_model('run')[0]
    for entry, name in zip(facts['images'], ('0.png', '2.png'), strict=True):
        x = model.preprocessing.normalise(model.preprocessing(name))[None]
        maps = attention_maps(model, x)[0].flatten(0, 1)
        assert entry['title'] == name and entry['probs'][0][0] == f'digit {model(x).argmax()}'
        assert (np.abs(weights_of(entry, 'maps', 'scale', 18) - maps.numpy()) <= half_a_step(maps)).all()
    code, out, _ = vit_explain('run', '1.png')
    assert code == 0 and 'shows 1 image:' in out and Path('attention.html').exists()

BAD_EXPLAIN = {
    'a page that exists': (dict(out='note.png'), 'note.png exists: choose another --out, or --force'),
    'a folder as page': (dict(out='run', force=True), 'run exists: choose another --out'),
    'no such folder': (dict(out='no/page.html'), 'there is no folder no for page.html'),
    'no such run': (dict(run='runs'), 'there is no run folder runs'),
    'no such image': (dict(images=['0.png', '9.png']), 'there is no file 9.png'),
    'not an image': (dict(images=['note.png']), "note.png can't be read as an image"),
}

@pytest.mark.parametrize('name', BAD_EXPLAIN)
def test_vit_explain_says_what_is_wrong(name, folder):
    from vit_nbdev import cli
    changes, message = BAD_EXPLAIN[name]
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    with pytest.raises(SystemExit) as e: cli.vit_explain.__wrapped__(**dict(run='run', images=['0.png']) | changes)
    assert str(e.value).startswith('vit_explain: ') and message in str(e.value) and '\n' not in str(e.value)
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before

def test_vit_explain_replaces_a_page_when_told(folder):
    from vit_nbdev.runs import explain
    explain('run', ['0.png'], 'page.html')
    explain('run', ['1.png'], 'page.html', force=True)
    assert data_of(Path('page.html').read_text(encoding='utf-8'))['images'][0]['title'] == '1.png'

@pytest.mark.parametrize('pool', ['cls', 'map'])
def test_one_map_does_not_hold_the_weights_of_all_blocks(pool, monkeypatch):
    "The values are those of all the maps; when weights are made, the others are gone, but for the one block asked for"
    import weakref

    from vit_nbdev import attention
    model = vit('digits', pool=pool).eval()
    x = torch.randn(3, 1, 8, 8)
    maps = attention_maps(model, x)
    read = interpret._record(model, x)[1]
    steps = dict(rollout=attention_rollout(maps)[:, -1], attention=maps[:, 1].mean(dim=1))
    found, made = [], attention.attention_weights
    def watched(*args):
        assert sum(ref() is not None for ref in found) <= (method == 'attention')
        weights = made(*args)
        found.append(weakref.ref(weights))
        return weights
    monkeypatch.setattr(attention, 'attention_weights', watched)
    for method, step in steps.items():
        found.clear()
        heat = heat_map(model, x, method, layer=1).flatten(1)
        expected = torch.einsum('bn,bnm->bm', read, step)[:, model.n_prefix:]
        torch.testing.assert_close(heat, expected, rtol=1e-6, atol=1e-7)
        blocks = model.config.depth if method == 'rollout' else 1
        assert len(found) == blocks + (pool == 'map')

# --- what is held in memory ---

def test_rollout_is_the_product_of_all_maps():
    "... whether it is made as they come or afterwards, to the last bit"
    for changes in (dict(), dict(pool='cls', n_registers=2), dict(pool='map', pool_prefix=True, cls_token=True)):
        torch.manual_seed(0)
        model, x = vit('digits', **changes).eval(), torch.randn(2, 1, 8, 8)
        rolled, read, logits = interpret._record(model, x, rollout=True)
        maps, wanted, _ = interpret._record(model, x)
        assert torch.equal(rolled, interpret.attention_rollout(maps)[:, -1]) and torch.equal(read, wanted)
        assert torch.equal(logits, interpret._logits(model, x))

def test_a_picture_of_one_block_records_no_other(monkeypatch):
    "Nor does the trial by shuffling, which asks for the class that is predicted"
    seen, record = [], interpret.record_attention
    def watch(model, names=None, *args): return seen.append(names) or record(model, names, *args)
    monkeypatch.setattr(interpret, 'record_attention', watch)
    model, x = vit('digits').eval(), torch.randn(1, 1, 8, 8)
    show_attention(model, x[0], 'attention', layer=1)
    assert seen == [['encoder.blocks.1.attn']]
    seen.clear()
    randomization_check(model, x, 'relevance')
    assert seen == []
