"""A damaged run folder says so; it does not answer."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.runs import load_model, predict, save_model
from vit_nbdev.vit import vit

LABELS = tuple('abcdefghij')

@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = vit('digits')
    torch.nn.init.normal_(model.head.weight)
    save_model(model, tmp_path/'run', Preprocessing(8, [0.3], [0.4], in_chans=1, labels=LABELS))
    return tmp_path/'run'

def edit(run, part, **changes):
    "Change entries of a part of `config.json`"
    config = json.loads((run/'config.json').read_text())
    config[part].update(changes)
    (run/'config.json').write_text(json.dumps(config))

def reweigh(run, name, f):
    w = load_file(run/'model.safetensors')
    w[name] = f(w[name])
    save_file(w, str(run/'model.safetensors'))

DAMAGE = {
    'two labels for ten classes':  (lambda r: edit(r, 'preprocessing', labels=['cat', 'dog']),
                                    'labels for 2, the model for 10'),
    'no labels':                   (lambda r: edit(r, 'preprocessing', labels=[]), 'labels for 0, the model for 10'),
    'labels that are no strings':  (lambda r: edit(r, 'preprocessing', labels=list(range(10))),
                                    'labels=.* must be a list of strings'),
    'a deviation of zero':         (lambda r: edit(r, 'preprocessing', std=[0.]), 'std=.* must be above zero'),
    'a mean that is none':         (lambda r: edit(r, 'preprocessing', mean=[float('nan')]),
                                    'mean=.* must be 1 finite'),
    'null for a list':             (lambda r: edit(r, 'preprocessing', mean=None), 'mean=None must be 1 finite'),
    'another size':                (lambda r: edit(r, 'preprocessing', img_size=[28, 28]),
                                    'img_size for 28, the model for 8'),
    'a text for the preprocessing': (lambda r: (r/'config.json').write_text('{"model": {}, "preprocessing": "x"}'),
                                     'damaged'),
    'a list for the whole':        (lambda r: (r/'config.json').write_text('[1]'), 'damaged'),
    'deep brackets':               (lambda r: (r/'config.json').write_text('['*100_000), 'damaged'),
    'a billion blocks':            (lambda r: edit(r, 'model', depth=10**9),
                                    'it has 4 blocks, the configuration 1000000000'),
    'twenty million registers':    (lambda r: edit(r, 'model', n_registers=20_000_000), 'names or shapes differ'),
    'another width':               (lambda r: edit(r, 'model', dim=128), 'names or shapes differ'),
    'weights that are no numbers': (lambda r: reweigh(r, 'head.bias', lambda w: w*float('nan')),
                                    'head.bias holds numbers that are not finite'),
    'an endless weight':           (lambda r: reweigh(r, 'pos_embed', lambda w: w + float('inf')),
                                    'pos_embed holds numbers that are not'),
    'integer weights':             (lambda r: reweigh(r, 'head.weight', lambda w: w.int()),
                                    'head.weight is torch.int32'),
    'weights without a name':      (lambda r: save_file({}, str(r/'model.safetensors')), 'it has 0 blocks'),
}

@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_run_does_not_answer(name, run):
    damage, sentence = DAMAGE[name]
    load_model(run)
    damage(run)
    with pytest.raises(ValueError, match=sentence) as e: load_model(run)
    assert str(run) in str(e.value) and 'restore the file' in str(e.value)

def test_two_classes_of_one_name_stay_two(run):
    "The faults page: crane, dog, fox, crane; the model says the second crane"
    edit(run, 'preprocessing', labels=['crane', 'dog', 'fox', 'crane', *'efghij'])
    image = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    model, _ = load_model(run)
    logits = model(model.preprocessing.normalise(model.preprocessing(image))[None])[0]
    found, = predict(run, image)
    assert found['index'] == logits.argmax() and found['class'] == model.preprocessing.labels[found['index']]
    assert len(found['probabilities']) == 10 and abs(sum(found['probabilities']) - 1) < 1e-5

def test_what_predict_takes_and_refuses(run, tmp_path, monkeypatch):
    "One string is one path: it is never read letter by letter, and no disk is walked"
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(1).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save('000.JPG', format='PNG')
    expected = predict(run, pixels)[0]['probabilities']
    for images in ('000.JPG', ['000.JPG'], tmp_path/'000.JPG', Image.fromarray(pixels)):
        results = predict(run, images)
        assert [r['probabilities'] for r in results] == [expected]
    assert predict(load_model(run)[0], pixels)[0]['probabilities'] == expected
    with pytest.raises(ValueError, match='an empty name is no image file'): predict(run, '')
    with pytest.raises(TypeError, match='got a Linear, expected a run folder'): predict(torch.nn.Linear(2, 2), pixels)
    with pytest.raises(ValueError, match='does not say how its images are prepared'): predict(vit('digits'), pixels)
