"""Fine-tuning from the command line: published weights, what is trained and how fast, streaming, what is refused."""
import json, re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_nbdev import runs
from vit_nbdev.cli import vit_train
from vit_nbdev.learner import RECIPES
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.report import settings_table
from vit_nbdev.runs import load_model, predict, save_model
from vit_nbdev.vit import vit

QUICK = dict(epochs=2, bs=8, device='cpu')
PREP = Preprocessing((16, 16), [0.3]*3, [0.6]*3, crop_pct=0.8, interpolation='bicubic', labels=('x', 'y', 'z'))

@pytest.fixture
def weights(tmp_path):
    "A run folder, whose model knows three other classes"
    torch.manual_seed(0)
    model = vit('digits', img_size=16, in_chans=3, n_classes=3, patch_size=4)
    save_model(model, tmp_path/'trained', PREP)
    return tmp_path/'trained'

@pytest.fixture
def pictures(tmp_path):
    "Two classes, dark and light, 60 x 40 pixels"
    for c, name in enumerate(('dark', 'light')):
        (tmp_path/'pictures'/name).mkdir(parents=True)
        for i in range(16):
            pixels = np.random.default_rng(100*c + i).integers(100, size=(40, 60, 3)) + 150*c
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'pictures'/name/f'{i}.jpg')
    return tmp_path/'pictures'

def trained(pictures, **kwargs):
    out = pictures.parent/'out'
    vit_train.__wrapped__(str(pictures), out=str(out), **QUICK | kwargs)
    model, config = load_model(out)
    return model.state_dict(), config

def test_finetune_trains_all_of_it(weights, pictures, capsys):
    before = load_model(weights)[0].state_dict()
    after, config = trained(pictures, pretrained=str(weights))
    s, out = config['settings'], capsys.readouterr().out
    assert (s['recipe'], s['model'], s['pretrained']) == ('finetune', 'trained', str(weights))
    assert 'hint' not in out and 'the head stays' not in out and s['layer_decay'] == RECIPES['finetune'].layer_decay
    assert f"layer decay {s['layer_decay']}, seed 0" in out
    assert all((before[k] != after[k]).any() for k in before if k.endswith('weight') and 'head' not in k)
    assert after['head.weight'].shape == (2, before['head.weight'].shape[1])
    prep = config['preprocessing']
    assert (prep['crop_pct'], prep['interpolation'], prep['mean']) == (0.8, 'bicubic', [0.3]*3)
    assert prep['labels'] == ['dark', 'light'] and (pictures.parent/'out'/'augmented.png').is_file()
    assert predict(pictures.parent/'out', pictures/'dark'/'0.jpg')[0]['class'] in prep['labels']
    # the whole path is in config.json; a report is for others, too
    assert re.search(r'pretrained</t[dh]><td>trained<', (pictures.parent/'out'/'report.html').read_text())

def test_freeze_trains_the_head_alone(weights, pictures, capsys, no_pictures):
    before = load_model(weights)[0].state_dict()
    after, config = trained(pictures, pretrained=str(weights), freeze=True, lr=0.03, epochs=6)
    assert config['settings']['recipe'] == 'probe' and ', the head alone, ' in capsys.readouterr().out
    moved = {k for k in after if after[k].shape != before[k].shape or (after[k] != before[k]).any()}
    assert moved == {'encoder.norm.weight', 'encoder.norm.bias', 'head.weight', 'head.bias'}

def test_the_head_first_and_then_all(weights, pictures, capsys, monkeypatch, no_pictures):
    "The body's weights as they were, up to the epoch from which all are trained; also with an interruption in between"
    before, bodies = load_model(weights)[0].state_dict(), []
    def body(state): return {k: v.clone() for k, v in state.items() if k.startswith(('patch_embed', 'encoder.blocks'))}
    monkeypatch.setattr(runs.EpochLines, 'after_epoch', lambda self: bodies.append(body(self.model.state_dict())))
    words = dict(pretrained=str(weights), freeze_epochs=2, epochs=3)
    trained(pictures, **words)
    still = [all(torch.equal(x, before[k]) for k, x in found.items()) for found in bodies]
    assert still == [True, True, False] and not any(torch.equal(x, before[k]) for k, x in bodies[2].items())
    assert ', the head alone in the first 2, ' in capsys.readouterr().out
    whole = load_model(pictures.parent/'out')[0].state_dict()
    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
    monkeypatch.setattr(runs.EpochLines, 'before_epoch', stop, raising=False)
    again = str(pictures.parent/'again')
    with pytest.raises(SystemExit): vit_train.__wrapped__(str(pictures), out=again, **QUICK | words)
    monkeypatch.undo()
    vit_train.__wrapped__(resume=again, device='cpu')
    assert all(torch.equal(x, whole[k]) for k, x in load_model(again)[0].state_dict().items())

def test_the_weights_bring_their_size_and_preprocessing(weights, pictures, no_pictures):
    "Nothing said of the pictures: size, crop, interpolation and statistics are those of the weights, not the recipe's"
    _, config = trained(pictures, pretrained=str(weights), epochs=1)
    expected = replace(PREP, labels=('dark', 'light')).to_dict()
    assert json.loads(json.dumps(expected)) == config['preprocessing']
    assert config['model']['img_size'] == 16 and RECIPES['finetune'].model == 'S/16'

def test_few_images_are_fine_tuned_for_a_number_of_steps(weights, pictures, monkeypatch, capsys):
    "Unless the epochs are named; the probe keeps those of its recipe"
    monkeypatch.setattr('vit_nbdev.runs.FEWEST_STEPS', 34)
    monkeypatch.setitem(RECIPES, 'probe', replace(RECIPES['probe'], epochs=1))
    for kwargs, expected in ((dict(epochs=None), 17), (dict(epochs=3), 3), (dict(epochs=None, freeze=True), 1)):
        _, config = trained(pictures, pretrained=str(weights), force=True, **kwargs)
        assert f'{expected} epochs of 2 batches of 8' in capsys.readouterr().out
        assert config['settings']['epochs'] == config['epochs_trained'] == expected

@pytest.mark.parametrize('recipe', ['folder', 'finetune', 'probe'])
def test_folders_end_with_the_best_epoch(recipe, weights, pictures, capsys):
    "... and each report says which it was; here the first is as good as any other, because nothing is learned"
    words = {} if recipe == 'folder' else dict(pretrained=str(weights))
    _, config = trained(pictures, lr=1e-12, recipe=recipe, **words)
    rows = [line.split(',') for line in (pictures.parent/'out'/'metrics.csv').read_text().splitlines()[1:]]
    scores = [[float(accuracy), -float(loss)] for *_, loss, accuracy in rows]
    best = scores.index(max(scores)) + 1
    assert config['settings']['keep_best'] and (config['best_epoch'], config['epochs_trained']) == (best, 2)
    assert f'kept    epoch {best} of 2, the best in validation' in capsys.readouterr().out
    assert f'Kept is epoch {best} of 2, the best in validation.' in (pictures.parent/'out'/'report.html').read_text()

def test_layer_decay_reaches_the_optimizer(weights, pictures, monkeypatch, no_pictures):
    seen, fit = [], runs._fit
    def watch(learn, r, sync_bn):
        seconds = fit(learn, r, sync_bn)
        seen.append([h['lr'] for h in learn.opt.hypers] + [h['wd'] for h in learn.opt.hypers][:1])
        return seconds
    monkeypatch.setattr(runs, '_fit', watch)
    trained(pictures, pretrained=str(weights), layer_decay=0.5, wd=0.25, lr=1e-3)
    *lrs, wd = seen[0]
    assert wd == 0.25 and np.allclose(np.array(lrs[:-1])/np.array(lrs[1:]), 0.5)
    assert len(lrs) == load_model(weights)[0].config.depth + 2

def test_published_weights_have_nothing_of_the_recipes_model(weights, pictures, no_pictures):
    _, config = trained(pictures, recipe='folder', pretrained=str(weights), epochs=1)
    assert RECIPES['folder'].changes and config['settings']['changes'] == {}
    assert settings_table(config)['changed in the model'] == 'nothing' and config['model']['stem'] == 'patch'

def test_a_size_and_a_way_of_resizing_of_ones_own(weights, pictures, no_pictures):
    _, config = trained(pictures, pretrained=str(weights), img_size=32, resize='squash')
    prep = config['preprocessing']
    assert (prep['img_size'], prep['resize'], prep['crop_pct'], prep['mean']) == ([32, 32], 'squash', 1., [0.3]*3)

def test_streamed_training_from_scratch(pictures, capsys):
    _, config = trained(pictures, model='digits', img_size=16, stream=True, workers=0, mixup=0.2, flip=True)
    s = config['settings']
    assert (s['stream'], s['workers'], s['mixup'], s['recipe']) == (True, 0, 0.2, 'folder')
    assert config['data']['stream'] in capsys.readouterr().out
    assert len(list((pictures.parent/'out'/'samples').iterdir())) == config['n_test'] == 5
    assert (pictures.parent/'out'/'predictions.png').is_file() and (pictures.parent/'out'/'augmented.png').is_file()

def test_a_file_that_turns_bad_in_training_is_named(pictures, capsys, no_pictures):
    file = pictures/'dark'/'3.jpg'
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(SystemExit, match=f"^vit_train: {file} can't be read as an image: replace it or take it away$"):
        trained(pictures, model='digits', img_size=16, workers=1)
    _, config = trained(pictures, model='digits', img_size=16, workers=1, skip_bad=True)
    assert config['data']['left_out'] == {"can't be read as an image": 1}

BAD = {
    'freeze': (dict(freeze=True), '--freeze needs trained weights: timm/vit_tiny.* and the hub can.t be reached'),
    'probe': (dict(recipe='probe'), "the recipe 'probe' needs trained weights: timm/vit_tiny"),
    'finetune': (dict(recipe='finetune'), "the recipe 'finetune' needs trained weights: timm/vit_tiny"),
    'freeze upon none': (dict(freeze=True, pretrained='none'),
                         '--freeze trains the head alone, upon trained weights: name them with --pretrained'),
    'finetune none': (dict(recipe='finetune', pretrained='none'), "the recipe 'finetune' needs trained weights"),
    'freeze a fresh one': (dict(freeze=True, model='digits'), '--freeze trains the head alone, upon trained weights'),
    'model': (dict(pretrained='trained', model='S/16'), '--pretrained brings its own model: leave out --model'),
    'digits': (dict(pretrained='trained', data=None), 'is for a folder of images, not for the digits'),
    'cifar10': (dict(pretrained='trained', data='cifar10'), 'is for a folder of images, not for cifar10'),
    'head first': (dict(freeze_epochs=1), '--freeze_epochs needs trained weights: timm/vit_tiny'),
    'head of a fresh one': (dict(freeze_epochs=1, model='digits', img_size=16),
                            '--freeze_epochs trains the head first, upon trained weights'),
    'head only': (dict(pretrained='trained', freeze_epochs=2), 'leaves no epoch for the rest of the model'),
    'head twice': (dict(pretrained='trained', freeze=True, freeze_epochs=1), 'choose fewer, or --freeze alone'),
    'head never': (dict(pretrained='trained', freeze_epochs=-1), 'freeze_epochs is -1, but must not be below zero'),
    'no weights': (dict(pretrained='nowhere/x.pth'), 'nowhere/x.pth'),
    'layer decay': (dict(pretrained='trained', layer_decay=1.5), 'layer_decay is 1.5, but must be from 0 to 1'),
    'wd': (dict(wd=-1.), 'wd is -1.0, but must not be below zero'),
    'workers': (dict(workers=-1), 'workers is -1, but must be from 0 to 256'),
    'stream': (dict(data='digits', stream=True), '--stream is for a folder of images, not for digits'),
    'no data': (dict(recipe='finetune', data=None, pretrained=None), "the recipe 'finetune' needs trained weights"),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_words(name, weights, pictures, monkeypatch):
    kwargs, sentence = BAD[name]
    if 'timm/' in sentence: pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    monkeypatch.chdir(pictures.parent)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(SystemExit, match=sentence): vit_train.__wrapped__(**{'data': 'pictures'} | QUICK | kwargs)
    assert not Path('runs').exists() or not list(Path('runs').iterdir())

def test_an_old_hub_library_is_a_sentence(monkeypatch):
    hub = pytest.importorskip('huggingface_hub.errors', reason='huggingface_hub is not installed')
    monkeypatch.delattr(hub, 'GatedRepoError')
    from vit_nbdev.pretrained import load_pretrained
    with pytest.raises(ImportError, match='pip install -U huggingface_hub'): load_pretrained('timm/vit_x')

def test_weights_that_are_not_here_without_a_network(pictures, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    before = set(pictures.parent.rglob('*'))
    sentence = ("^vit_train: nobody/nothing is not here yet, and the hub can't be reached: try again with a network, "
                "or give a local file$")
    with pytest.raises(SystemExit, match=sentence): trained(pictures, pretrained='nobody/nothing')
    assert set(pictures.parent.rglob('*')) == before

BEGIN = {    # what is asked for -> recipe, whether with published weights, and what is said
    'nothing': (dict(), 'finetune', True, 'published weights'),
    'the head alone': (dict(freeze=True), 'probe', True, 'published weights'),
    'a recipe that needs weights': (dict(recipe='probe'), 'probe', True, 'published weights'),
    'one that does not': (dict(recipe='folder'), 'folder', False, ''),
    'a size that is large enough': (dict(img_size=64), 'finetune', True, 'published weights'),
    'a small one': (dict(img_size=16), 'folder', False, ''),
    'a model': (dict(model='digits', img_size=16), 'folder', False, ''),
    'no weights': (dict(pretrained='none'), 'photos', False, 'from scratch, as asked'),
    'the head first': (dict(freeze_epochs=1), 'finetune', True, 'published weights'),
    'two sides': (dict(img_size=(64, 48)), 'finetune', True, 'published weights'),
    'two sides, one of them small': (dict(img_size=(64, 32)), 'folder', False, ''),
}

@pytest.mark.parametrize('table', [False, True])
@pytest.mark.parametrize('name', BEGIN)
def test_what_photographs_begin_with(name, table, weights, pictures, monkeypatch):
    asked, recipe, published, sentence = BEGIN[name]
    monkeypatch.setattr(runs, 'WEIGHTS', dict(cpu=str(weights), gpu='nowhere'))
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 40)             # they are 60 x 40
    data = str(pictures)
    if table:
        rows = [f'{f.relative_to(pictures)},{f.parent.name}' for f in sorted(pictures.rglob('*.jpg'))]
        (pictures/'table.csv').write_text('\n'.join(['name,label', *rows]))
        data = str(pictures/'table.csv')
    seen = {}
    def stop(settings, *_):
        seen.update(settings)
        raise InterruptedError
    monkeypatch.setattr(runs, '_prepare', stop)
    said = []
    monkeypatch.setattr(runs, 'print', lambda text, flush: said.append(text), raising=False)
    with pytest.raises(InterruptedError): runs.train(data, out=pictures.parent/'out', device='cpu', **asked)
    assert (seen['recipe'], seen['pretrained']) == (recipe, str(weights) if published else '')
    assert len(said) == bool(sentence) and all(f'start   {sentence}' in text for text in said)

def test_the_first_pictures_may_be_of_a_kind_that_is_not_read(weights, pictures, monkeypatch):
    "Those of a phone, say, that `skip_bad` leaves out: the others say whether they are photographs"
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 40)
    files = sorted(pictures.rglob('*.jpg'))
    for i in range(20): (files[0].parent/f'000{i:02}.heic').write_bytes(b'of a kind that pillow lacks')
    rows = [f'{f.relative_to(pictures)},{f.parent.name}' for f in sorted(files[0].parent.glob('*.heic')) + files]
    (pictures/'heic.csv').write_text('\n'.join(['name,label', *rows]))
    assert runs._side(str(pictures/'heic.csv'), None, None) == 40

def test_photographs_without_a_network(pictures, monkeypatch, capsys):
    "From scratch, at a size of their own, and it says why; smaller pictures are not worth a try"
    hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 40)
    _, config = trained(pictures, epochs=1)
    s, out = config['settings'], capsys.readouterr().out
    assert (s['recipe'], s['img_size'], s['pretrained']) == ('photos', 128, '') and 'hint' not in out
    assert f"start   from scratch: {runs.WEIGHTS['cpu']} is not here yet, and the hub can't be reached" in out
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 41)
    _, config = trained(pictures, epochs=1, force=True)
    assert config['settings']['recipe'] == 'folder' and 'start' not in capsys.readouterr().out

class Broken(Exception): "As httpx's errors are: none of Python's own"

def test_photographs_with_a_network_that_fails(pictures, monkeypatch, capsys):
    hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    def snapshot_download(*args, **kwargs): raise Broken('the proxy is silent')
    monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 40)
    given = dict(data=str(pictures), recipe=None, model=None, pretrained=None, freeze=None, freeze_epochs=None,
                 img_size=None, pictures=None, columns=None)
    monkeypatch.setattr(runs, '_settings', lambda **given: given)
    settings, said = runs._begin(given, torch.device('cpu'))
    name = runs.WEIGHTS['cpu']
    assert settings == given | dict(recipe='photos')
    assert said == (f"from scratch: {name} can't be fetched (Broken: the proxy is silent): "
                    "try again, or give a local file")
    with pytest.raises(ValueError, match=f'^--freeze_epochs needs trained weights: {name} can.t be fetched'):
        runs._begin(given | dict(freeze_epochs=1), torch.device('cpu'))

def test_what_is_wrong_is_said_before_anything_is_fetched(pictures, monkeypatch):
    monkeypatch.setattr(runs, 'PHOTOGRAPH', 40)
    monkeypatch.setattr(runs, '_place', lambda name: pytest.fail('fetched'))
    with pytest.raises(ValueError, match='epochs is 0'): runs.train(pictures, epochs=0, device='cpu')

def test_none_is_no_folder(pictures, monkeypatch):
    "... and no run is begun with weights that nobody meant"
    (pictures.parent/'none').mkdir()
    monkeypatch.chdir(pictures.parent)
    for none in ('none', 'None', Path('none')): assert runs._where(none) == 'none'
    assert runs._where('./none') == str(pictures.parent/'none') and runs._where(None) is None

def test_resume_of_a_run_from_scratch(weights, pictures, monkeypatch, no_pictures):
    "It may be said once more that it has no weights, but not that it has some"
    out, run = str(pictures.parent/'out'), runs.EpochLines
    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(run, 'before_epoch', stop, raising=False)
        with pytest.raises(SystemExit): trained(pictures, pretrained='none', img_size=16, model='digits')
    with pytest.raises(SystemExit, match=f'was begun with --pretrained none, not {weights}: leave it out'):
        vit_train.__wrapped__(resume=out, pretrained=str(weights), device='cpu')
    vit_train.__wrapped__(resume=out, pretrained='none', device='cpu')
    assert json.loads((pictures.parent/'out'/'config.json').read_text())['settings']['pretrained'] == ''

def test_no_hint_at_what_is_done(weights, pictures, capsys, no_pictures):
    trained(pictures, recipe='folder', pretrained=str(weights), epochs=1)
    assert 'hint    ' not in capsys.readouterr().out

def test_a_finetuned_run_is_resumed(weights, pictures, monkeypatch, no_pictures):
    whole, _ = trained(pictures, pretrained=str(weights), workers=0)
    part = pictures.parent/'again'
    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
    monkeypatch.setattr(runs.EpochLines, 'before_epoch', stop, raising=False)
    with pytest.raises(SystemExit):
        vit_train.__wrapped__(str(pictures), out=str(part), **QUICK | dict(pretrained=str(weights), workers=0))
    monkeypatch.undo()
    vit_train.__wrapped__(resume=str(part), device='cpu')
    resumed = load_model(part)[0].state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert json.loads((part/'config.json').read_text())['settings']['pretrained'] == str(weights)
