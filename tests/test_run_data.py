"""What a run is told of its data and what it says of it: options, sentences, `config.json`, the report."""
import json, os, re, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, set_seed
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from sklearn.metrics import f1_score

from vit_nbdev.cli import vit_predict, vit_train
from vit_nbdev.data import small_affine, tensor_dls
from vit_nbdev.learner import RECIPES
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.report import (all_right, balanced_accuracy, class_results, decided, draw_pictures, mean_f1, percent,
                              plot_augmented, plot_confusion, plot_mistakes, plot_predictions, surest_mistakes,
                              write_report)
from vit_nbdev import data, runs
from vit_nbdev.runs import predict, save_model
from vit_nbdev.vit import vit

def paint(path, n=12, size=(28, 28)):
    "Two classes of noise, no two pictures alike"
    for c, name in enumerate(('few', 'many')):
        (path/name).mkdir(parents=True)
        for i in range(n if c else n//2):
            pixels = np.random.default_rng(100*c + i).integers(256, size=size[::-1]).astype(np.uint8)
            Image.fromarray(pixels).save(path/name/f'{i}.png')
    return path

def test_the_size_of_pictures_is_not_that_of_a_runs_drawings(tmp_path):
    paint(tmp_path/'runs', 12, (640, 480))
    for name in ('config.json', 'model.safetensors'): (tmp_path/'runs'/name).write_text('')
    paint(tmp_path/'small', 2)
    assert runs._side(tmp_path, None, None) == 28

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
def test_a_name_that_means_two_things_is_refused(name, tmp_path, monkeypatch, no_pictures):
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
    'a word of Preprocessing': (dict(data='p', resize='border'), "'border' must be one of crop, squash, pad$"),
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

# --- the report ---

def a_font(file, name, characters):
    "A font that has these characters only, each drawn as a square"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)): pen.lineTo(point)
    pen.closePath()
    names = ['.notdef', *(f'uni{ord(c):04X}' for c in characters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): n for c, n in zip(characters, names[1:])})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable(dict(familyName=name, styleName='Regular'))
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(file)

@pytest.mark.parametrize('names', [['猫', '犬'], ['cat 猫', 'dog 犬'], ['ねこ', 'いぬ']])
def test_names_are_drawn_with_fonts_that_have_their_glyphs(names, tmp_path, monkeypatch):
    a_font(tmp_path/'a.ttf', 'A Test Font', sorted(set(''.join(names)) - set('catdog ')))
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path/'a.ttf')
    targets, probs = torch.tensor([0, 1]), torch.tensor([[.9, .1], [.8, .2]])
    for fig in (plot_confusion(targets, probs.argmax(1), names),
                plot_predictions(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), targets, probs, names)):
        with warnings.catch_warnings():
            warnings.simplefilter('error')                # "Glyph 29483 missing from font"
            fig.savefig(tmp_path/'a.png')

def test_names_that_no_font_has_are_said_once_and_drawn_all_the_same(tmp_path):
    prep = Preprocessing(8, [.5], [.5], in_chans=1, labels=['\U00012345', 'a'])
    targets, probs = torch.tensor([0, 1]), torch.tensor([[.9, .1], [.1, .9]])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        said = draw_pictures(tmp_path, None, [[1, 1, 1]], images, targets, probs, prep)
    assert said == {'the text \U00012345': 'no font here has it: install one, such as Noto Sans CJK'}
    assert (tmp_path/'confusion.png').stat().st_size > 1000

UNEVEN = dict(balanced=([0]*190 + [1]*10, [0]*200, 0.5, '190 of 190', '0 of 10'),
              half=([0]*30 + [1]*2, [0]*30 + [1, 0], 0.75, '30 of 30', '1 of 2'),
              absent=([0]*5, [0]*4 + [1], 0.8, '4 of 5', '0 of 0'))

@pytest.mark.parametrize('name', UNEVEN)
def test_the_page_has_each_class(name, tmp_path):
    targets, predictions, balanced, many, few = UNEVEN[name]
    results = class_results(torch.tensor(targets), torch.tensor(predictions), ['many', 'few'])
    assert balanced_accuracy(results) == balanced
    names = ('recipe model epochs bs lr wd label_smoothing ema mixup clip augment erase rand_augment seed precision '
             'compile').split()
    settings = dict.fromkeys(names, 1) | dict(data='d', changes={}, augment=dict(max_shift=0.1, flip=True))
    accuracy = np.mean(np.array(targets) == predictions)
    facts = dict(settings=settings, preprocessing=dict(labels=['many', 'few']), parameters=1, device='cpu', processes=1,
                 seconds=1, images_per_second=1, versions={})
    write_report(tmp_path, dict(**facts, test_accuracy=accuracy, n_test=len(targets), class_results=results))
    page = (tmp_path/'report.html').read_text()
    rows = re.findall('<tr><td>(many|few)</td><td>(.*?)</td>', page)
    assert sorted(rows) == [('few', few), ('many', many)]
    assert re.search(f'class="big">{percent(accuracy)}, balanced over the classes {percent(balanced)}', page)
    assert '<td>augmentation</td><td>max_shift=0.1, flip=True</td>' in page

SEVERAL = torch.tensor([[1., 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])     # labels x, y and z of four images
SAID = torch.tensor([[.9, .2, .7], [.1, .8, .6], [.4, .1, .3], [.2, .5, .1]])   # wrong: z of the second, x of the last

def test_results_of_several_labels():
    predictions = decided(SAID, SEVERAL)
    assert predictions.tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert all_right(SEVERAL, predictions).tolist() == [True, False, True, False]
    results = class_results(SEVERAL, predictions, ['x', 'y', 'z'])
    assert results == [dict(name=name, right=r, n=n, said=said)
                       for name, r, n, said in (('x', 1, 2, 1), ('y', 2, 2, 2), ('z', 1, 1, 2))]
    assert mean_f1(results) == pytest.approx(f1_score(SEVERAL, predictions, average='macro'))
    assert surest_mistakes(SEVERAL, SAID).tolist() == [3, 1]           # off by 0.8, and by 0.6

@pytest.mark.parametrize('extra, said, part', [(0, 0, 3), (0, 1, 4)])
def test_a_label_that_no_image_has_is_wrong_where_it_is_said(extra, said, part):
    "Macro F1 over the labels that occur or are said, as the metric of the training has it"
    y = torch.cat([SEVERAL, torch.full((4, 1), float(extra))], dim=1)
    p = torch.cat([SAID, torch.full((4, 1), 0.9*said)], dim=1)
    predictions = decided(p, y)
    results = class_results(y, predictions, [*'wxyz'])
    expected = f1_score(y, predictions, average='macro', zero_division=np.nan)
    assert mean_f1(results) == pytest.approx(expected)
    assert expected == pytest.approx(3/part*f1_score(SEVERAL, predictions[:, :3], average='macro'))

def test_pictures_of_several_labels():
    set_seed(0)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    prep = Preprocessing(8, [0.5], [0.5], in_chans=1, labels=tuple('xyz'))
    def titles(fig): return [ax.get_title() for ax in fig.axes if ax.get_title()]
    expected = ['y\ntrue: x, y', 'y, z\ntrue: y', 'x, z', '(none)']
    assert titles(plot_predictions(images, SEVERAL, SAID, 'xyz')) == expected
    model = vit('digits', in_chans=1, img_size=8, n_classes=3, depth=1).eval()
    worst = titles(plot_mistakes(model, images, SEVERAL, SAID, prep, n=2))
    assert worst == [*expected[:2], 'for x', 'for z']
    assert titles(plot_augmented(torch.zeros(4, 1, 8, 8), SEVERAL, prep)) == ['x, z', 'y', '(none)', 'x, y']

# --- what is switched off ---

class Seen(Exception): "The settings of a run, before anything is read"

def settings_of(begin, monkeypatch, **kwargs):
    def stop(settings, *_): raise Seen(settings)
    with monkeypatch.context() as m:
        m.setattr(runs, '_prepare', stop)
        with pytest.raises(Seen) as e: begin(device='cpu', out='run', **kwargs)
    return e.value.args[0]

def test_no_is_no_and_none_is_the_recipes(tmp_path, monkeypatch):
    "In Python; on the command line, an option that is not there is none"
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'p')
    program, tuned = vit_train.__wrapped__, dict(data='p', pretrained='weights', recipe='probe')
    for begin, flip, mirrored in ((runs.train, False, False), (runs.train, None, True), (program, False, True)):
        s = settings_of(begin, monkeypatch, data='fashion_mnist', flip=flip)
        assert s['flip'] == s['augment']['flip'] == mirrored
    for begin, freeze in ((runs.train, False), (program, True)):
        assert settings_of(begin, monkeypatch, freeze=False, **tuned)['freeze'] == freeze
    for begin, stream in ((runs.train, False), (program, None)):
        assert settings_of(begin, monkeypatch, data='p', stream=False, recipe='folder')['stream'] is stream
    for option in ('stream', 'skip_bad', 'class_weights', 'compile', 'tta', 'flip'):
        s = settings_of(runs.train, monkeypatch, data='digits', **{option: False})
        assert s == settings_of(runs.train, monkeypatch, data='digits') | {option: s[option]} and not s[option]

def test_a_folder_that_is_called_like_an_unfinished_run(tmp_path, monkeypatch):
    "Its run has another name, or it could not be resumed"
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'p.part')
    def stop(settings, device, part, *_): raise Seen(part)
    monkeypatch.setattr(runs, '_prepare', stop)
    with pytest.raises(Seen, match='^runs/p.part$'): runs.train('p.part', recipe='folder', device='cpu')

def test_what_is_said_of_memory_is_for_whoever_reads_it(tmp_path, monkeypatch, capsys):
    "stream=False is no option of the command line; in a notebook it is one, and does what it says"
    paint(tmp_path/'p')
    monkeypatch.setattr(data, 'BUDGET', 0)
    for notebook in (False, True):
        monkeypatch.setattr(data, 'in_notebook', lambda: notebook)
        data.folder_dls(tmp_path/'p', img_size=8, device='cpu')
        said = capsys.readouterr().out
        assert 'they are read as they are needed' in said and ('stream=False would keep them' in said) == notebook
    assert isinstance(data.folder_dls(tmp_path/'p', img_size=8, device='cpu', stream=False).train_ds.x, torch.Tensor)

# --- what is no ordinary file ---

def test_pipes_and_devices_do_not_hang(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'p')
    os.mkfifo('pipe')
    save_model(vit('digits', n_classes=2), 'run', Preprocessing(8, [.5], [.5], in_chans=1, labels=['a', 'b']))
    for kwargs, sentence in ((dict(data='pipe'), "no data set 'pipe'"),
                             (dict(data='/proc'), '/proc is no folder of images'),
                             (dict(data='/dev/zero'), 'no data set'), (dict(data='p', out='pipe'), 'pipe exists'),
                             (dict(data='p', out='pipe', force=True), 'pipe is not a run'),
                             (dict(data='p', out='/proc/run'), "can't write to /proc"),
                             (dict(data='mnist', path='pipe'), 'the path pipe is not a folder'),
                             (dict(resume='pipe'), 'there is no unfinished run')):
        with pytest.raises(SystemExit, match=sentence): vit_train.__wrapped__(**dict(epochs=1, device='cpu') | kwargs)
    for image in ('pipe', '/dev/zero', '/proc/kmsg', '/proc/self/mem'):
        assert 'is no ordinary file: give an image file' in predict('run', image, device='cpu')[0]['error']
    with pytest.raises(ValueError, match='/proc is no folder of images'): predict('run', '/proc', device='cpu')
    with pytest.raises(SystemExit, match='there is no run folder pipe'): vit_predict.__wrapped__('pipe', ['p'])
