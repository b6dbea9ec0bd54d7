"""Neighbours of faults that were cured: other inputs of the same kind."""
import json
from functools import partialmethod

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.report import class_results
from vit_nbdev.runs import explain, load_model, predict, save_model, train, trained_model
from vit_nbdev.vit import vit

def labelled_run(folder, labels, **preprocessing):
    "A run folder of a small model with random weights"
    torch.manual_seed(0)
    model = vit('digits', n_classes=len(labels), img_size=8, depth=1)
    for p in model.parameters(): nn.init.normal_(p, std=0.3)
    folder.mkdir()
    prep = Preprocessing(8, [0.3], [0.4], in_chans=1, labels=labels, **preprocessing)
    save_model(model.eval(), folder, prep)
    return folder

@pytest.fixture
def picture(tmp_path):
    "A file of 16 x 24 pixels"
    file = tmp_path/'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 24), dtype=np.uint8)).save(file)
    return file

# ---- names are no keys ----

def test_the_classes_of_a_report_are_told_by_index():
    "Of two classes with one name, one is always right and the other never"
    rows = class_results(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 2, 2, 2]), ['crane', 'crane', 'fox'])
    assert len(rows) == 3
    right = [row['right'] if isinstance(row, dict) else row.right for row in rows]
    assert right == [2, 0, 1]

def test_a_model_whose_classes_all_have_one_name(tmp_path, picture):
    run = labelled_run(tmp_path/'run', ['x']*4)
    found, = predict(run, picture, device='cpu')
    assert found['class'] == 'x' and len(found['probabilities']) == 4
    assert found['probability'] == found['probabilities'][found['index']] == max(found['probabilities'])

# ---- pixels ----

@pytest.mark.parametrize('how', [dict(resize='squash'), dict(resize='border'), dict(crop_pct=0.5),
                                 dict(interpolation='nearest'), dict(interpolation='bicubic', crop_pct=0.7)], ids=str)
def test_a_run_sees_what_its_preprocessing_says(how, tmp_path, picture, monkeypatch):
    "In `predict` and in `explain` the model gets the same tensor, which is that of the preprocessing"
    run, seen = labelled_run(tmp_path/'run', list('abc'), **how), []
    model, prep = trained_model(run)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    predict(model, picture, device='cpu')
    explain(model, picture, out=tmp_path/'page.html', device='cpu')
    expected = prep.normalise(prep(picture))[None]
    assert len(seen) >= 2 and all(torch.equal(x, expected) for x in seen)
    other = Preprocessing(8, [0.3], [0.4], in_chans=1)
    assert not torch.equal(other.normalise(other(picture))[None], expected)

# ---- a compiled model ----

@pytest.fixture
def compiled(monkeypatch):
    "`Module.compile` without the minute that the compiler takes"
    monkeypatch.setattr(nn.Module, 'compile', partialmethod(nn.Module.compile, backend='eager'))
    monkeypatch.setenv('TORCHDYNAMO_DISABLE', '0')

def test_a_compiled_run_is_a_run_like_any_other(compiled, tmp_path):
    "It ends, with all its pictures, and its folder gives what the same run gives without"
    runs = [train(epochs=1, compile=c, out=tmp_path/str(c), device='cpu') for c in (False, True)]
    plain, fast = ({p.name for p in run.iterdir()} for run in runs)
    assert plain == fast and 'report.html' in plain
    accuracies = [json.loads((run/'config.json').read_text())['test_accuracy'] for run in runs]
    assert abs(accuracies[0] - accuracies[1]) < 0.02
    states = [load_model(run)[0].state_dict() for run in runs]
    assert states[0].keys() == states[1].keys()

def test_a_compiled_model_is_explained(compiled, tmp_path, picture):
    model, _ = load_model(labelled_run(tmp_path/'run', list('abc')))
    expected = explain(model, picture, out=tmp_path/'plain.html', device='cpu').read_text()
    model.compile()
    assert explain(model, picture, out=tmp_path/'compiled.html', device='cpu').read_text() == expected
