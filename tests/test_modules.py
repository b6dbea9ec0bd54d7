"""Every weight is used by a call of its module, so whoever hooks, wraps, prunes or quantises a module reaches it."""
import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune

from vit_nbdev.data import digits_dls
from vit_nbdev.learner import vit_learner
from vit_nbdev.vit import vit

KINDS = {   # a little of everything that has weights
    'plain': {}, 'class token': dict(pool='cls', n_registers=2), 'attention pool': dict(pool='map'),
    'convolutional stem': dict(stem='conv'), 'deeper stem': dict(stem='conv', stem_depth=2),
    'gated': dict(gated=True, act='silu', layer_scale=0.1, qk_norm=True),
}

def model_of(kind):
    torch.manual_seed(0)
    model = vit('digits', depth=2, **KINDS[kind]).eval()
    nn.init.normal_(model.head.weight)
    return model

def layers(model): return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('kind', KINDS)
def test_hooks_count_the_multiplications_of_every_layer(kind):
    "As a counter like fvcore's does: with what each layer gets and gives, added up by hand"
    model, called, counted = model_of(kind), set(), 0
    def count(name):
        def hook(m, args, out):
            nonlocal counted
            called.add(name)
            each = m.in_features if isinstance(m, nn.Linear) else m.weight[0].numel()
            counted += out.numel()*each
        return hook
    for name, m in layers(model).items(): m.register_forward_hook(count(name))
    model(X)
    assert called == set(layers(model))
    c = model.config
    n, d, b, hidden = c.n_patches + c.n_prefix, c.dim, len(X), int(c.mlp_ratio*c.dim)
    block = n*d*3*d + n*d*d + n*d*hidden*(3 if c.gated else 2)
    sides = {'patch': [4], 'conv': [8]*(c.stem_depth - 1) + [4, 4]}[c.stem]
    stem = sum(m.weight[0].numel()*m.out_channels*side**2 for m, side in zip(
        [m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)], sides, strict=True))
    pool = (1 + c.n_patches)*d*3*d + d*d + 2*d*hidden if c.pool == 'map' else 0
    assert counted == b*(c.depth*block + stem + pool + d*c.n_classes)

@pytest.mark.parametrize('kind', KINDS)
def test_a_wrapper_changes_what_the_model_says(kind):
    "A layer in whose place another one stands, as LoRA puts it there"
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
        def forward(self, x): return 2*self.layer(x)
    before = model_of(kind)(X)
    for name in layers(model_of(kind)):
        model = model_of(kind)
        parent, _, last = name.rpartition('.')
        setattr(model.get_submodule(parent), last, Twice(model.get_submodule(name)))
        assert (model(X) - before).abs().max() > 1e-4, name

@pytest.mark.parametrize('name', ['patch_embed.proj', 'encoder.blocks.1.attn.qkv', 'head'])
def test_pruned_layers_train(name):
    "The pruned weights stay zero, the others move"
    torch.manual_seed(0)
    learn = vit_learner(digits_dls(device='cpu'), vit('digits', depth=2))
    nn.init.normal_(learn.model.head.weight)
    layer = learn.model.get_submodule(name)
    prune.l1_unstructured(layer, 'weight', 0.5)
    zero, before = layer.weight_mask == 0, layer.weight_orig.detach().clone()
    assert abs(zero.float().mean() - 0.5) < 0.01
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert (layer.weight[zero] == 0).all() and not torch.equal(layer.weight_orig[~zero], before[~zero])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', KINDS)
def test_quantised_layers_answer_alike(kind):
    model = model_of(kind)
    small = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not [name for name, m in layers(small).items() if isinstance(m, nn.Linear)]
    with torch.no_grad(): expected, found = model(X), small(X)
    assert 0 < (found - expected).norm()/expected.norm() < 0.05

@pytest.mark.parametrize('target', ['patch_embed.proj', 'qkv', 'mlp.fc1'])
def test_lora(target):
    "peft: only its matrices train, a merged model says the same"
    peft = pytest.importorskip('peft')
    base = model_of('plain')
    before = base(X)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=rf'.*{target}'))
    torch.testing.assert_close(model(X), before)
    assert all('lora' in name for name, p in model.named_parameters() if p.requires_grad)
    for name, p in model.named_parameters():
        if 'lora_B' in name: nn.init.normal_(p, std=0.1)
    changed = model(X)
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(X), changed, atol=1e-4, rtol=1e-4)
