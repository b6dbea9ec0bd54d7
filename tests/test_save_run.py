"""A run folder of any fitted Learner, whatever its loaders."""
import json

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import (AffineCoordTfm, ImageDataLoaders, MultiCategoryBlock, Normalize,
                               RandomResizedCrop, Resize, ResizeMethod, aug_transforms, load_learner)
from torch import nn
from torch.utils.data import TensorDataset

from vit_nbdev import runs
from vit_nbdev.cli import vit_predict
from vit_nbdev.data import digits_dls
from vit_nbdev.learner import KeepBest, vit_learner
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.runs import explain, load_model, predict, save_run
from vit_nbdev.vit import vit

def fastai_learner(path, resize, *batch_tfms):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(path, valid_pct=0.25, item_tfms=resize, batch_tfms=list(batch_tfms), bs=8,
                                       num_workers=0, device='cpu')
    learn = vit_learner(dls, vit('mnist', in_chans=3, n_classes=2, depth=1))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
    return learn

STATS = Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], cuda=False)
WAYS = {   # item transforms, batch transforms, what the folder must say, and how far oblong pictures may be off
    'crop': (Resize(28), [], dict(resize='crop', mean=(0., 0., 0.), std=(1., 1., 1.)), 0.02),
    'squash': (Resize(28, ResizeMethod.Squish), [STATS], dict(resize='squash', std=(0.2, 0.3, 0.4)), 1e-5),
    'augmented': (Resize(28), [*aug_transforms(), STATS], dict(resize='crop', mean=(0.4, 0.5, 0.6)), 0.02),
}

@pytest.mark.parametrize('name', WAYS)
def test_what_the_learner_says_the_folder_says(name, pictures, tmp_path, capsys):
    resize, batch_tfms, said, close = WAYS[name]
    learn = fastai_learner(pictures, resize, *batch_tfms)
    run = save_run(learn, tmp_path/'run')
    assert {p.name for p in run.iterdir()} == {'config.json', 'model.safetensors'}
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    model, config = load_model(run)
    for field, value in said.items(): assert getattr(model.preprocessing, field) == pytest.approx(value)
    assert model.preprocessing.labels == ('dark', 'light') and config['epochs'] == 2
    assert set(config['metrics']) == {'train_loss', 'valid_loss', 'accuracy'}
    for i in (0, 1):                                   # an oblong one, and a square one
        file = pictures/'light'/f'{i:02}.png'
        with learn.no_bar(): label, index, p = learn.predict(file)
        for found in (predict(run, file)[0], predict(learn, file)[0]):
            assert (found['class'], found['index']) == (label, index)
            assert np.allclose(found['probabilities'], p, atol=close if i == 0 else 1e-5)
    vit_predict.__wrapped__(str(run), [str(file)], json=True, device='cpu')
    assert json.loads(capsys.readouterr().out)['class'] == label
    assert explain(run, file, tmp_path/'page.html', device='cpu').is_file()

def test_an_exported_learner(pictures, tmp_path):
    learn = fastai_learner(pictures, Resize(28), STATS)
    learn.export(tmp_path/'learn.pkl')
    before = predict(save_run(learn, tmp_path/'a'), pictures)
    assert predict(save_run(load_learner(tmp_path/'learn.pkl'), tmp_path/'b'), pictures) == before

def test_loaders_of_ours(tmp_path):
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    run = save_run(learn, tmp_path/'run')
    assert load_model(run)[0].preprocessing == learn.dls.preprocessing

class Scores(Callback):
    "An accuracy for each epoch, as it were"
    order = 55
    def __init__(self, scores): self.scores = scores
    def after_epoch(self):
        if len(self.recorder.values[-1]) == 3: self.recorder.values[-1][2] = self.scores[self.epoch]

def recorded(learn, path): return load_model(save_run(learn, path, force=True))[1]

def test_the_numbers_are_those_of_the_weights(tmp_path, few_digits):
    "Of the last epoch, or of the one that `KeepBest` kept; whatever was validated or predicted in between"
    dls = digits_dls(device='cpu')
    learn = vit_learner(dls, vit('digits', depth=1), cbs=[KeepBest(), Scores([0.3, 0.9, 0.6])])
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
        row, before = learn.recorder.values[1], recorded(learn, tmp_path/'run')
        assert before['metrics'] == dict(zip(('train_loss', 'valid_loss', 'accuracy'), row)) and row[2] == 0.9
        assert (before['epochs'], before['best_epoch']) == (3, 2)
        learn.validate()
        learn.get_preds()
        assert recorded(learn, tmp_path/'run') == before and learn.keep_best.best == 1
    for best in (KeepBest(), SaveModelCallback(monitor='accuracy')):          # of this fit alone; after another, none
        learn = vit_learner(dls, vit('digits', depth=1), path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, cbs=[best, Scores([0.3, 0.9, 0.6])])
            found = recorded(learn, tmp_path/'run')
            assert (found['metrics']['accuracy'], found['best_epoch']) == (0.9, 2)
            learn.tta(n=1)
            assert recorded(learn, tmp_path/'run') == found
            learn.fit(1)
        assert 'best_epoch' not in recorded(learn, tmp_path/'run')
    plain = Learner(dls, vit('digits', depth=1), learn.loss_func, metrics=accuracy)
    with plain.no_bar(), plain.no_logging():
        plain.fit(1)
        found = recorded(plain, tmp_path/'run')
        assert found['metrics']['accuracy'] == plain.recorder.values[0][2] and 'best_epoch' not in found
        plain.validate()
    found = recorded(plain, tmp_path/'run')
    assert (found['epochs'], found['metrics']) == (0, {})       # fastai's own has forgotten them: nothing is said

class CtrlC(Callback):
    "In the middle of the third epoch"
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 1): raise KeyboardInterrupt

@pytest.mark.parametrize('cbs', [[], [KeepBest]])
@pytest.mark.parametrize('kind', [vit_learner, Learner])
def test_an_interrupted_fit_has_no_numbers(kind, cbs, tmp_path, few_digits):
    "The weights are those of no epoch that was judged; the next fit has numbers again"
    options = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[cb() for cb in cbs])
    learn = kind(digits_dls(device='cpu'), vit('digits', depth=1), **options)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=CtrlC())
        found = recorded(learn, tmp_path/'run')
        assert (found['epochs'], found['metrics']) == (2, {}) and 'best_epoch' not in found
        learn.fit(2)
    found = recorded(learn, tmp_path/'run')
    assert found['epochs'] == 2 and set(found['metrics']) == {'train_loss', 'valid_loss', 'accuracy'}
    assert ('best_epoch' in found) == bool(cbs)

def test_the_best_weights_were_never_put_back(tmp_path, few_digits):
    "Interrupted between two epochs: the numbers are those of the last"
    class Between(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    learn = vit_learner(digits_dls(device='cpu'), vit('digits', depth=1), cbs=[KeepBest(), Scores([0.9, 0.3])])
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Between())
    found = recorded(learn, tmp_path/'run')
    assert found['metrics']['accuracy'] == 0.3 and 'best_epoch' not in found

REFUSED = {
    'a border': (Resize(28, ResizeMethod.Pad), [], "can't hold what Resize does"),
    'another transform': (RandomResizedCrop(28), [], "can't hold what RandomResizedCrop does"),
    'resized in the batch': (Resize(40), [AffineCoordTfm(size=28)], "can't hold what Resize does"),
}

@pytest.mark.parametrize('name', REFUSED)
def test_what_a_folder_cant_hold_is_refused(name, pictures, tmp_path):
    resize, batch_tfms, sentence = REFUSED[name]
    learn = fastai_learner(pictures, resize, *batch_tfms)
    with pytest.raises(ValueError, match=sentence + '.*: give preprocessing=Preprocessing'):
        save_run(learn, tmp_path/'run')
    assert not list(tmp_path.iterdir())
    prep = Preprocessing(28, [0.]*3, [1.]*3)
    assert load_model(save_run(learn, tmp_path/'run', prep))[0].preprocessing.labels == ('dark', 'light')

def test_models_and_losses_that_it_is_not_for(pictures, tmp_path):
    dls = digits_dls(device='cpu')
    with pytest.raises(TypeError, match='the model is a Sequential, expected a `ViT`'):
        save_run(vit_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), tmp_path/'run')
    learn = vit_learner(dls, vit('digits', n_classes=7), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='preprocessing has labels for 10, the model for 7'):
        save_run(learn, tmp_path/'run')
    files = sorted(pictures.rglob('*.png'))
    several = ImageDataLoaders.from_lists(pictures, files, [['light', 'big'], ['dark']]*12, y_block=MultiCategoryBlock,
                                          item_tfms=Resize(28), bs=8, num_workers=0, device='cpu')
    learn = vit_learner(several, vit('mnist', in_chans=3, n_classes=3, depth=1))
    with pytest.raises(ValueError, match='one class an image, but these loaders ask for BCEWithLogitsLossFlat'):
        save_run(learn, tmp_path/'run')
    assert not list(tmp_path.iterdir())

def test_whole_or_not_at_all(tmp_path, monkeypatch):
    "An error in between leaves nothing, or what was there before; what is no run is never replaced"
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    def fail(*_, **__): raise OSError('the disk is full')
    with monkeypatch.context() as m:
        m.setattr(runs, 'save', fail)
        with pytest.raises(OSError, match='the disk is full'): save_run(learn, tmp_path/'run')
    assert not list(tmp_path.iterdir())
    save_run(learn, tmp_path/'run')
    before = (tmp_path/'run'/'model.safetensors').read_bytes()
    nn.init.normal_(learn.model.head.weight)
    with pytest.raises(FileExistsError, match='--force to replace'): save_run(learn, tmp_path/'run')
    with monkeypatch.context() as m:
        m.setattr(runs, 'save', fail)
        with pytest.raises(OSError): save_run(learn, tmp_path/'run', force=True)
    assert (tmp_path/'run'/'model.safetensors').read_bytes() == before
    save_run(learn, tmp_path/'run', force=True)
    assert torch.equal(load_model(tmp_path/'run')[0].head.weight, learn.model.head.weight)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('three years')
    with pytest.raises(FileExistsError, match='is not a run'): save_run(learn, tmp_path/'mine', force=True)

def test_a_folder_that_is_made_while_a_run_is_saved(tmp_path, few_digits, monkeypatch):
    "It stays, and nothing else is left"
    learn, save = vit_learner(digits_dls(device='cpu'), vit('digits', depth=1)), runs.save_model
    def late(*args, **kwargs):
        (tmp_path/'run').mkdir()
        return save(*args, **kwargs)
    monkeypatch.setattr(runs, 'save_model', late)
    with pytest.raises(FileExistsError, match='run was made meanwhile: save the run under another name'):
        save_run(learn, tmp_path/'run')
    assert [p.name for p in tmp_path.iterdir()] == ['run']

def test_heads_that_were_put_in_by_hand(tmp_path, few_digits):
    "A linear one comes back and names classes; of another, that it could not come back, before anything is written"
    for n_classes in (0, 12):
        model = vit('digits', depth=1, n_classes=n_classes)
        model.head = nn.Linear(model.config.pooled_dim, 10)
        learn = vit_learner(digits_dls(device='cpu'), model, loss_func=nn.CrossEntropyLoss())
        again, _ = load_model(save_run(learn, tmp_path/f'{n_classes}'))
        image = np.zeros((8, 8), dtype=np.uint8)
        assert predict(again, image)[0]['probabilities'] == predict(learn, image)[0]['probabilities']
    model.head = nn.Sequential(nn.Linear(model.config.pooled_dim, 10), nn.ReLU())
    with pytest.raises(ValueError, match='load_model could not read this model back .*a part put in by hand'):
        save_run(vit_learner(digits_dls(device='cpu'), model), tmp_path/'other')
    assert not (tmp_path/'other').exists()

def test_the_weights_are_those_of_the_callback_that_comes_last(tmp_path, few_digits):
    "`KeepBest` after fastai's own, which has another judge; and fastai's in a plain Learner that has it for good"
    class Losses(Callback):
        order = 55
        def after_epoch(self):
            row = self.recorder.values[-1]
            if len(row) == 3: row[1], row[2] = [[1., .3], [2., .9], [3., .6]][self.epoch]
    dls = digits_dls(device='cpu')
    learn = vit_learner(dls, vit('digits', depth=1), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=[KeepBest(), SaveModelCallback(), Losses()])
    assert recorded(learn, tmp_path/'run')['best_epoch'] == 2
    plain = Learner(dls, vit('digits', depth=1), learn.loss_func, metrics=accuracy, path=tmp_path,
                    cbs=[SaveModelCallback(), Losses()])
    with plain.no_bar(), plain.no_logging(): plain.fit(3)
    assert recorded(plain, tmp_path/'run')['best_epoch'] == 1
    with plain.no_bar(), plain.no_logging():
        plain.get_preds()
        assert recorded(plain, tmp_path/'run')['metrics'] == {}
        plain.lr_find(num_it=25, show_plot=False)
    vit_learner(dls, vit('digits', depth=1), path=tmp_path, cbs=SaveModelCallback()).lr_find(num_it=25, show_plot=False)

def test_names_of_classes_in_an_array(tmp_path):
    sets = [TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 2)]*2
    dls = DataLoaders.from_dsets(*sets, bs=4, device='cpu')
    dls.vocab = np.array(['a', 'b'])
    learn = vit_learner(dls, 'digits')
    assert load_model(save_run(learn, tmp_path/'run'))[0].preprocessing.labels == ('a', 'b')
    dls = DataLoaders.from_dsets(sets[0], [], bs=4, device='cpu')                     # and nothing to validate with
    dls.vocab = np.array(['c', 'd'])
    assert vit_learner(dls, load_model(tmp_path/'run')[0]).model.preprocessing.labels == ('c', 'd')
