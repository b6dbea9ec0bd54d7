"""What a run is told of its data and what it says of it: options, sentences, `config.json`, the report."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, set_seed
from PIL import Image

from vit_nbdev.cli import vit_predict, vit_train
from vit_nbdev.data import small_affine, tensor_dls
from vit_nbdev.learner import RECIPES
from vit_nbdev.report import percent

def paint(path, n=12, size=(28, 28)):
    "Two classes of noise, no two pictures alike"
    for c, name in enumerate(('few', 'many')):
        (path/name).mkdir(parents=True)
        for i in range(n if c else n//2):
            pixels = np.random.default_rng(100*c + i).integers(256, size=size[::-1]).astype(np.uint8)
            Image.fromarray(pixels).save(path/name/f'{i}.png')
    return path

QUICK = dict(model='mnist', img_size=28, epochs=1, bs=4, device='cpu')

def test_a_run_says_and_keeps_what_it_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'pictures'/'Training', n=24, size=(84, 28))
    paint(tmp_path/'pictures'/'testing', n=8, size=(84, 28))
    (tmp_path/'pictures'/'Training'/'few'/'notes.txt').write_text('no image')
    (tmp_path/'pictures'/'Training'/'few'/'0.png').write_text('broken')
    vit_train.__wrapped__('pictures', skip_bad=True, resize='pad', flip=True, class_weights=True, **QUICK)
    out, config = capsys.readouterr().out, json.loads(Path('runs/pictures/config.json').read_text())
    seen = config['data']
    assert seen['left_out'] == {'no image (.txt)': 1, "can't be read as an image": 1}
    assert [seen['splits'][s]['folder'] for s in ('train', 'valid', 'test')] == ['Training', None, 'testing']
    assert 'left out: 1 x no image (.txt), 1 x can' in out and 'test is the folder testing' in out
    assert 'typical picture: 84 x 28 pixels\n' in out                        # with a border, nothing is cut off
    assert config['preprocessing']['resize'] == 'border' and config['preprocessing']['fill'] == 128
    assert config['settings']['augment']['flip'] and config['settings']['class_weights']
    results = config['class_results']
    assert [(r['name'], r['n']) for r in results] == [('few', 4), ('many', 8)]
    balanced = sum(r['right']/r['n'] for r in results)/2
    assert config['balanced_accuracy'] == balanced and f'mean of the classes {percent(balanced)}' in out
    page = Path('runs/pictures/report.html').read_text()
    assert f"<td>{results[0]['right']} of 4</td>" in page and f'balanced over the classes {percent(balanced)}' in page

@pytest.mark.parametrize('name', ['digits', 'mnist', 'fashion_mnist'])
def test_a_name_that_means_two_things_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/name)
    with pytest.raises(SystemExit, match=f'{name} is a data set, and there is a folder .* ./{name} for the folder'):
        vit_train.__wrapped__(name, **QUICK)
    vit_train.__wrapped__(f'./{name}', out='run', **QUICK)
    assert json.loads(Path('run/config.json').read_text())['preprocessing']['labels'] == ['few', 'many']

@pytest.mark.parametrize('option', 'data path recipe model device precision out resume resize'.split())
def test_empty_words_are_refused(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f'^vit_train: {option} is empty'):
        vit_train.__wrapped__(**{'epochs': 1, 'device': 'cpu', option: ''})
    assert not list(tmp_path.iterdir())

def test_an_empty_word_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='an empty name is no run folder'): vit_predict.__wrapped__('', ['samples'])

BAD_READING = {
    'resize':      (dict(data='p', resize='stretch'), "resize='stretch' must be one of crop"),
    'value_range': (dict(data='p', value_range='dark,light'), "value_range is 'dark,light', expected black,white"),
    'white first': (dict(data='p', value_range='255,0'), r'value_range=\(255.0, 0.0\) must be two numbers'),
    'digits':      (dict(resize='pad'), '--resize is for a folder of images, not for digits'),
    'skip digits': (dict(data='digits', skip_bad=True), '--skip_bad is for a folder of images'),
}

@pytest.mark.parametrize('name', BAD_READING)
def test_bad_ways_of_reading(name, tmp_path, monkeypatch):
    kwargs, sentence = BAD_READING[name]
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'p')
    with pytest.raises(SystemExit, match=sentence): vit_train.__wrapped__(**{'epochs': 1, 'device': 'cpu'} | kwargs)
    assert [p.name for p in tmp_path.iterdir()] == ['p']

def test_nothing_is_mirrored_unless_asked_for():
    "Arrows and letters change their class; the two recipes that mirror were measured so"
    assert [name for name, r in RECIPES.items() if r.augment.get('flip')] == ['fashion_mnist', 'cifar10']
    x = TensorImage(torch.arange(64.).view(1, 1, 8, 8).expand(200, 1, 8, 8).contiguous())
    def mirrored(**kwargs):
        torch.manual_seed(0)
        y = small_affine(0, 0, 0, **kwargs)(x, split_idx=0)
        return int((y - x.flip(3)).abs().flatten(1).amax(1).lt(1e-2).sum())
    assert mirrored() == 0 and 70 < mirrored(flip=True) < 130

def test_class_weights_help_the_small_class(tmp_path):
    "190 and 10 of which 3 in 4 look alike: without weights the small class is never named"
    learned = {}
    for weighted in (False, True):
        rng = np.random.default_rng(0)
        y = torch.tensor([0]*190 + [1]*10)
        x = torch.from_numpy(rng.normal(100, 40, size=(200, 1, 8, 8)).clip(0, 255).astype(np.uint8))
        x[190:] += 20
        dls = tensor_dls(*3*[(x, y)], vocab=['many', 'few'], bs=50, augment=False, device='cpu')
        set_seed(0)
        recipe = replace(RECIPES['digits'], epochs=3, class_weights=weighted)
        learn = recipe.learner(dls)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(recipe.epochs, recipe.lr)
        learned[weighted] = int((learn.get_preds(dl=dls.valid)[0].argmax(1) == 1)[190:].sum())
    assert learned[False] == 0 and learned[True] >= 5
