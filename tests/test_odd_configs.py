"""Whatever stands in the .json files of a run or of published weights: an answer, or a sentence with file and field."""
import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained, to_timm
from vit_nbdev.runs import load_model, predict, save_model
from vit_nbdev.vit import vit

SMALL = dict(img_size=32, patch_size=16, dim=32, depth=1, n_heads=2, n_classes=3)
IMAGE = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
TIMM = dict(
    architecture='vit_tiny_patch16_224', num_classes=3, global_pool='token',
    model_args=dict(num_heads=2, img_size=32), label_names=['a', 'b', 'c'],
    pretrained_cfg=dict(input_size=[3, 32, 32], mean=[0.5]*3, std=[0.5]*3, crop_pct=1.0, crop_mode='center',
                        interpolation='bicubic', num_classes=3, label_names=['a', 'b', 'c']))
HF = dict(
    model_type='vit', hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=128, image_size=32,
    patch_size=16, num_channels=3, hidden_act='gelu', layer_norm_eps=1e-12, qkv_bias=True,
    id2label={'0': 'a', '1': 'b', '2': 'c'}, label2id=dict(a=0, b=1, c=2))
PROCESSOR = dict(
    image_processor_type='ViTImageProcessor', do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1/255,
    size=dict(height=32, width=32), resample=2, image_mean=[0.5]*3, image_std=[0.5]*3)

def hf_names(w):
    "Our weights under transformers' names"
    names = {'patch_embed.proj': 'embeddings.patch_embeddings.projection', 'cls_token': 'embeddings.cls_token',
             'pos_embed': 'embeddings.position_embeddings', 'encoder.norm': 'layernorm', 'norm1': 'layernorm_before',
             'norm2': 'layernorm_after', 'attn.proj': 'attention.output.dense', 'mlp.fc1': 'intermediate.dense',
             'mlp.fc2': 'output.dense', 'encoder.blocks.': 'encoder.layer.'}
    out = {}
    for name, x in w.items():
        for ours, theirs in names.items(): name = name.replace(ours, theirs)
        parts = zip(('query', 'key', 'value'), x.chunk(3)) if 'qkv' in name else [('', x)]
        for part, y in parts:
            new = name.replace('attn.qkv', f'attention.attention.{part}')
            out[new.replace('head.', 'classifier.')] = y.contiguous()
    return {name if name.startswith('classifier') else f'vit.{name}': x for name, x in out.items() if x.numel()}

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A run folder, and the same weights as timm and transformers publish them"
    path = tmp_path_factory.mktemp('folders')
    torch.manual_seed(0)
    model = vit('S/16', **SMALL)
    torch.nn.init.normal_(model.head.weight)
    save_model(model, path/'run', Preprocessing(32, [0.5]*3, [0.5]*3, labels=[*'abc']), settings=dict(seed=0))
    for name, weights, files in [('timm', to_timm(model), {'config.json': TIMM}),
                                 ('hf', hf_names(model.state_dict()), {'config.json': HF,
                                                                       'preprocessor_config.json': PROCESSOR})]:
        (path/name).mkdir()
        save_file(dict(weights), str(path/name/'model.safetensors'))
        for file, facts in files.items(): (path/name/file).write_text(json.dumps(facts))
    return path

def load(folder):
    "The model of a folder, in silence"
    if folder.name == 'run': return load_model(folder)[0]
    with redirect_stdout(StringIO()): return load_pretrained(folder)

def test_the_three_folders_answer(folders):
    said = [predict(load(folders/name), IMAGE)[0] for name in ('run', 'timm', 'hf')]
    assert [r['class'] for r in said] == [said[0]['class']]*3
    for r in said[1:]: assert np.allclose(r['probabilities'], said[0]['probabilities'], atol=1e-3)

def places(x, at=()):
    "The path of each value in nested dicts and lists"
    yield at
    items = x.items() if isinstance(x, dict) else enumerate(x[:2]) if isinstance(x, list) else ()
    for k, v in items: yield from places(v, (*at, k))

def replaced(x, at, value):
    "A copy of `x` with `value` at a path"
    if not at: return value
    copy = dict(x) if isinstance(x, dict) else list(x)
    copy[at[0]] = replaced(x[at[0]], at[1:], value)
    return copy

ODD = [None, '', 'x', -1, 0, 10**9, 10**400, 1e300, float('nan'), float('inf'), True, [], {}, [None], [1, 2, 3, 4],
       {'a': 1}]
FILES = [('run', 'config.json'), ('timm', 'config.json'), ('hf', 'config.json'), ('hf', 'preprocessor_config.json')]

def check(folders, name, file, at, value):
    "What a folder with an odd value says: None, or what is wrong with that"
    path = folders/name/file
    before = path.read_text()
    path.write_text(json.dumps(replaced(json.loads(before), at, value)))
    try: result, = predict(load(folders/name), IMAGE)
    except ValueError as e:
        said = str(e)
        if '\n' in said: return f'several lines: {said}'
        if value is None or not at or "don't tell the number of heads" in said: return None    # as if it were not there
        words = [*at, *(value if isinstance(value, (dict, str)) and value else [repr(value)])]
        if not any(str(word) in said for word in words): return f'no field: {said}'
        found = file in said or 'model.safetensors' in said or repr(value) in said or isinstance(value, dict)
        return None if found else f'no file: {said}'
    except Exception as e: return f'{type(e).__name__}: {e}'
    else:
        if 'error' in result: return f"the image is blamed: {result['error']}"
        return None if abs(sum(result['probabilities']) - 1) < 1e-4 else f"answers {result['probabilities']}"
    finally: path.write_text(before)

@settings(max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_odd_values(data, folders):
    name, file = data.draw(st.sampled_from(FILES))
    at = data.draw(st.sampled_from(list(places(json.loads((folders/name/file).read_text())))))
    value = data.draw(st.sampled_from(ODD))
    assert check(folders, name, file, at, value) is None, (name, file, at, value)
