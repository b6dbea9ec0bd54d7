"""Neighbours of faults that were cured: other inputs of the same kind."""
import json
import random
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.all import load_learner
from PIL import Image
from torch import nn

from vit_nbdev.data import digits_dls, folder_dls
from vit_nbdev.diagnose import diagnose
from vit_nbdev.learner import RECIPES, vit_learner
from vit_nbdev.preprocessing import Preprocessing, open_image
from vit_nbdev.report import class_results, draw_pictures, figure, plain
from vit_nbdev.runs import EpochLines, explain, load_model, predict, save_model, train, trained_model
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
    "`Module.compile` without the minute that the compiler takes, and without a C++ compiler"
    monkeypatch.setattr('vit_nbdev.runs._check_compiler', lambda device: None)
    monkeypatch.setattr(nn.Module, 'compile', partialmethod(nn.Module.compile, backend='eager'))
    monkeypatch.setenv('TORCHDYNAMO_DISABLE', '0')

def test_a_compiled_run_is_a_run_like_any_other(compiled, tmp_path, monkeypatch, few_digits):
    "It ends, with all its pictures, and its folder gives what the same run gives without"
    monkeypatch.setitem(RECIPES, 'digits', replace(RECIPES['digits'], changes=dict(stem='conv', depth=1)))
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

# ---- names that can't be drawn, or be files (14, 45) ----

@pytest.mark.parametrize('name', ['$x^$', r'\$5$', '$$ $$', r'\alpha', '100 %', '{0}', '_a_'])
def test_a_name_is_drawn_letter_by_letter(name):
    "What matplotlib gets starts no formula, and what it draws is the name"
    text = figure().text(0, 0, plain(name))
    drawn, is_math = text._preprocess_math(text.get_text())
    assert is_math is False and drawn == name

@pytest.mark.parametrize('labels', [('../up', '/etc/x', 'a\0b'), ('a\nb', '..', 'x'*300), ('$x^$', r'\$5$', '')],
                         ids=repr)
def test_names_that_lead_out_of_a_folder(labels, tmp_path):
    "All pictures are drawn; the samples stay in their folder"
    torch.manual_seed(0)
    model = vit('digits', n_classes=3, depth=1).eval()
    nn.init.normal_(model.head.weight)
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    prep = Preprocessing(8, [0.3], [0.4], in_chans=1, labels=labels)
    probs = model(prep.normalise(images)).softmax(1).detach()
    run = tmp_path/'deep'/'run'
    run.mkdir(parents=True)
    failed = draw_pictures(run, model, [(1., 1., 0.)]*2, images, torch.tensor([0, 1, 2]*2), probs, prep)
    assert failed == {}
    drawn = {'curves.png', 'confusion.png', 'predictions.png', 'mistakes.png', 'samples'}
    assert {p.name for p in run.iterdir()} == drawn
    assert sorted(p.name[:2] for p in (run/'samples').iterdir()) == [f'{i}-' for i in range(6)]
    assert [p.name for p in tmp_path.iterdir()] == ['deep'] and [p.name for p in run.parent.iterdir()] == ['run']

# ---- an ordinary Learner (17, 28) ----

@pytest.fixture(scope='module')
def two_colours(tmp_path_factory):
    "Two classes of grey pictures of two sizes"
    path, rng = tmp_path_factory.mktemp('colours'), np.random.default_rng(0)
    for label, level in dict(dark=60, light=190).items():
        (path/label).mkdir()
        for i in range(12):
            pixels = (level + rng.normal(0, 9, (12 + i % 2, 20, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path/label/f'{i}.png')
    return path

@pytest.fixture
def oblong(two_colours):
    "A Learner on pictures of 8 x 16 pixels, with random weights"
    set_seed(0)
    dls = folder_dls(two_colours, img_size=(8, 16), bs=8, device='cpu')
    learn = vit_learner(dls, vit('digits', img_size=(8, 16), in_chans=3, n_classes=2, depth=1))
    for p in learn.model.parameters(): nn.init.normal_(p, std=0.2)
    learn.no_bar().__enter__()
    return learn

def test_a_learner_takes_every_kind_of_image(oblong, two_colours):
    "`predict` of a text, a path, an array and a picture is `get_preds` of the file, and so is `predict` of runs"
    file = two_colours/'dark'/'1.png'
    (expected,), _ = oblong.get_preds(dl=oblong.dls.test_dl([file]))
    for image in (str(file), file, np.array(Image.open(file)), Image.open(file)):
        label, index, p = oblong.predict(image)
        torch.testing.assert_close(p, expected)
        assert label == oblong.dls.vocab[int(expected.argmax())] and int(index) == int(expected.argmax())
    found, = predict(oblong, file, device='cpu')
    assert found['probabilities'] == pytest.approx(expected.tolist(), abs=1e-6)

def test_an_exported_learner_answers_alike(oblong, two_colours, tmp_path):
    "Oblong pictures, in another folder, for one file and for many"
    files = sorted(two_colours.rglob('*.png'))[:5]
    expected, _ = oblong.get_preds(dl=oblong.dls.test_dl(files))
    oblong.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar():
        torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(files))[0], expected)
        torch.testing.assert_close(again.predict(files[3])[2], expected[3])

def test_an_exported_learner_of_the_digits(tmp_path):
    set_seed(0)
    learn = vit_learner(digits_dls(device='cpu'), vit('digits', depth=1))
    nn.init.normal_(learn.model.head.weight)
    image = learn.dls.valid_ds[3][0]
    with learn.no_bar(): expected = learn.predict(image)[2]
    learn.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(): torch.testing.assert_close(again.predict(image)[2], expected)

# ---- sizes and channels (18) ----

@pytest.mark.parametrize('size', [(8, 20), (16, 4), (4, 4)], ids=str)
def test_oblong_models_predict_and_explain(size, tmp_path, picture):
    torch.manual_seed(0)
    model = vit('digits', img_size=size, n_classes=3, depth=1).eval()
    nn.init.normal_(model.head.weight)
    prep = Preprocessing(size, [0.3], [0.4], in_chans=1, labels=list('abc'))
    save_model(model, tmp_path/'run', prep)
    found, = predict(tmp_path/'run', picture, device='cpu')
    expected = model(prep.normalise(prep(picture))[None]).softmax(1)[0]
    assert prep(picture).shape == (1, *size) and found['probabilities'] == pytest.approx(expected.tolist(), abs=1e-6)
    assert explain(tmp_path/'run', picture, tmp_path/'page.html', device='cpu').stat().st_size > 10_000

@pytest.mark.parametrize('in_chans', [0, 2, 5])
def test_channels_that_no_picture_has(in_chans, two_colours):
    with pytest.raises(ValueError, match=f'in_chans={in_chans}') as e:
        folder_dls(two_colours, img_size=8, in_chans=in_chans, device='cpu')
    assert '\n' not in str(e.value)

# ---- any batch (21) ----

@pytest.mark.parametrize('changes', [dict(pool='map'), dict(pool='cls', n_registers=2), dict(rotary='eva02')], ids=str)
def test_other_models_are_exported_for_any_batch(changes, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = vit('digits', n_classes=3, depth=1, **changes).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.2)
    file, axes = str(tmp_path/'m.onnx'), {'x': {0: 'b'}}
    torch.onnx.export(model, (torch.randn(2, 1, 8, 8),), file, input_names=['x'], dynamic_axes=axes, dynamo=False)
    session = onnxruntime.InferenceSession(file)
    for n in (1, 2, 7):
        x = torch.randn(n, 1, 8, 8)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {'x': x.numpy()})[0]), model(x).detach(),
                                   rtol=1e-4, atol=1e-5)

# ---- a log (24) ----

def test_a_log_of_a_fit_without_metrics_and_of_two_fits(capsys):
    "A line per epoch, counted anew in each fit"
    set_seed(0)
    learn = vit_learner(digits_dls(device='cpu', bs=512), vit('digits', depth=1), metrics=[], cbs=EpochLines())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        learn.fit(1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['epoch 1/2', 'epoch 2/2', 'epoch 1/1']
    assert all(line.split('  ')[1].startswith('train_loss ') and 's left' in line for line in lines)

# ---- what explain and predict take (25, 27) ----

def test_explain_takes_a_folder_and_a_learner(oblong, two_colours, tmp_path):
    "A page of every picture in a folder; of one picture by a Learner"
    page = explain(oblong, two_colours/'dark', tmp_path/'all.html', device='cpu').read_text()
    assert all(f'{i}.png' in page for i in range(12))
    page = explain(oblong, str(two_colours/'dark'/'3.png'), tmp_path/'one.html', device='cpu').read_text()
    assert '3.png' in page and '4.png' not in page

def test_explain_without_a_picture_leaves_no_page(oblong, tmp_path):
    (tmp_path/'empty').mkdir()
    for images in (tmp_path/'empty', [], tmp_path/'nowhere.png', ''):
        with pytest.raises((ValueError, OSError)) as e: explain(oblong, images, tmp_path/'page.html', device='cpu')
        assert any(word in str(e.value) for word in ('image', 'picture', 'file'))
        assert '\n' not in str(e.value) and not (tmp_path/'page.html').exists()

@pytest.mark.parametrize('images', [None, 3, b'x.png', {'a': 1}, [None], [3], [['x.png']], np.float64(1)], ids=repr)
def test_what_is_no_image_is_refused_by_its_type(images, tmp_path):
    with pytest.raises(TypeError, match='expected') as e: predict(labelled_run(tmp_path/'run', list('abc')), images)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('array', [np.zeros((0, 4), np.uint8), np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8),
                                   np.zeros((2, 4, 4, 3), np.uint8)], ids=lambda a: f'{a.dtype} {a.shape}')
def test_arrays_that_are_no_image(array, tmp_path):
    "Refused by a sentence, which may be that of the one picture"
    try: found, = predict(labelled_run(tmp_path/'run', list('abc')), array, device='cpu')
    except (TypeError, ValueError) as e: said = str(e)
    else: said = found['error']
    assert 'array' in said and '\n' not in said

# ---- diagnose (44) ----

class Draws(nn.Module):
    "A model that draws from all three random states"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        random.random()
        np.random.rand()
        torch.rand(1)
        return self.layer(x)

@pytest.mark.parametrize('inside', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_diagnose_leaves_all_random_states_where_they_were(inside):
    torch.manual_seed(0)
    model, x = Draws(), torch.randn(4, 4)
    def states():
        _, keys, used, *_ = np.random.get_state()        # most draws move only how many of the keys are used
        return random.getstate(), keys.tolist(), used, torch.get_rng_state().tolist()
    before = states()
    with inside(): report = diagnose(model, x, show=False)
    assert states() == before
    assert not [f for f in report if f.check == 'gradient']

def test_a_model_whose_head_is_its_embedding():
    "Tied weights are no finding, and each check is made"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight
        def forward(self, tokens): return self.head(self.embed(tokens))
    torch.manual_seed(0)
    report = diagnose(Tied(), torch.randint(7, (4, 6)), show=False)
    assert [f.check for f in report] == ['positions']      # it has none

# ---- one file, one picture ----

@pytest.mark.parametrize('suffix', ['.gif', '.tiff', '.webp', '.png'])
def test_a_file_of_several_pictures_is_refused(tmp_path, suffix):
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('black', 'white')]
    frames[0].save(tmp_path/f'two{suffix}', save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f'two{suffix} holds several pictures'): open_image(tmp_path/f'two{suffix}')
    frames[1].save(tmp_path/f'one{suffix}')
    assert np.asarray(open_image(tmp_path/f'one{suffix}').convert('RGB')).min() == 255

def test_a_camera_may_keep_a_preview_behind_its_picture(tmp_path):
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('black', 'white')]
    frames[0].save(tmp_path/'two.mpo', save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(tmp_path/'two.mpo')).max() == 0
