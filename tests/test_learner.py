"""Loaders, callbacks and checkpoints of a `ViTLearner`."""
import os, pickle, re, time, warnings
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Recorder
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastai.vision.all import ImageDataLoaders, Normalize, Resize
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from vit_nbdev import learner
from vit_nbdev.data import digits_dls, folder_dls, tensor_dls
from vit_nbdev.learner import (EMA, RECIPES, Checkpoint, HeadFirst, KeepBest, Threads, _judge, _left_over,
                               _random_states, _set_random_states, adamw, head_groups, load_checkpoint, muon,
                               normalise_as, vit_groups, vit_learner, weighted_loss)
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained
from vit_nbdev.runs import load_model, predict, save_model, save_run
from vit_nbdev.vit import vit

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Grey pictures, a little darker or brighter than the middle, and the run folder of a model that tells them apart"
    path, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, n in dict(train=32, valid=24, test=24).items():
        for label, level in dict(bright=140, dark=115).items():
            (path/split/label).mkdir(parents=True)
            for i in range(n):
                pixels = (level + rng.normal(0, 4, (28, 28, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path/split/label/f'{i}.png')
    set_seed(0)
    dls = folder_dls(path, img_size=28, bs=16, augment=False, device='cpu')
    learn = vit_learner(dls, vit('mnist', in_chans=3, n_classes=2, depth=1))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 3e-3)
    assert learn.validate()[1] == 1.
    save_model(learn.model, path/'run', dls.preprocessing)
    return path

def fastai_dls(path, *batch_tfms):
    return ImageDataLoaders.from_folder(path, train='train', valid='valid', item_tfms=Resize(28), bs=16, num_workers=0,
                                        batch_tfms=batch_tfms, device='cpu')

WAYS = {
    'pretrained=': lambda dls, run: vit_learner(dls, pretrained=run),
    'load_pretrained': lambda dls, run: vit_learner(dls, load_pretrained(run, n_classes=2)),
    'load_model': lambda dls, run: vit_learner(dls, load_model(run)[0]),
}
LOADERS = {
    'without Normalize': lambda path: fastai_dls(path),
    'with another Normalize': lambda path: fastai_dls(path, Normalize.from_stats([0.1]*3, [0.9]*3, cuda=False)),
    'ours': lambda path: folder_dls(path, img_size=28, bs=16, augment=False, device='cpu'),
}

@pytest.mark.parametrize('loaders', LOADERS)
@pytest.mark.parametrize('way', WAYS)
def test_a_trained_model_is_right_by_every_way(way, loaders, trained, capsys):
    dls = LOADERS[loaders](trained)
    learn = WAYS[way](dls, trained/'run')
    said = capsys.readouterr().out
    with learn.no_bar(): assert learn.validate()[1] == 1.
    assert ('images are normalised as the model expects' in said) == (loaders != 'ours')

def test_it_says_what_it_changed(capsys):
    dls = digits_dls(device='cpu')
    # of a model that takes pixels up to 255
    normalise_as(dls, Preprocessing(8, [128.], [64.], in_chans=1, scale=1.))
    assert 'expects: mean 0.502, std 0.251 (before: mean 0.306, std 0.376)' in capsys.readouterr().out
    x = dls.valid.dataset.x[:180]
    torch.testing.assert_close(torch.Tensor(dls.valid.one_batch()[0]), (x - 128.)/64, atol=1e-5, rtol=1e-5)
    assert dls.preprocessing.scale == 1. and dls.preprocessing.mean == (128.,)

@pytest.mark.parametrize('before, now, what', [
    (('cat', 'dog'), ('cat', 'dog'), None), (('cat', 'dog'), ('apple', 'pear'), 'begins anew'),
    (('cat', 'dog'), ('dog', 'cat'), 'begins anew'), (('0', '1'), ('cat', 'dog'), 'stays'),
    (('tench', 'goldfish'), ('n01440764', 'n01443537'), 'stays'), (('cat', 'dog'), ('00', '01'), 'stays'),
    (('cat', 'dog'), ('0', '1'), 'stays'), (('cat', 'dog'), ('a', 'b', 'c'), None)])
def test_a_head_of_as_many_other_classes_begins_anew(before, now, what, capsys):
    model = vit('digits', depth=1, n_classes=len(now))
    nn.init.normal_(model.head.weight)
    weight = model.head.weight.detach().clone()
    model.preprocessing = Preprocessing(8, [0.5], [0.5], in_chans=1, labels=before)
    split = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % len(now)
    dls = tensor_dls(split, split, split, now, bs=4, device='cpu')
    learn = vit_learner(dls, model)
    assert learn.model.preprocessing.labels == now
    said = [line for line in capsys.readouterr().out.splitlines() if 'the head' in line]
    assert len(said) == (what is not None) and all(what in line for line in said)
    assert torch.equal(model.head.weight, 0*weight if what == 'begins anew' else weight)

def test_a_name_and_weights_are_one_too_many(trained):
    dls = digits_dls(device='cpu')
    with pytest.raises(ValueError, match="got a model .'S/16'. and pretrained weights: leave out one"):
        vit_learner(dls, 'S/16', pretrained=trained/'run')
    with pytest.raises(TypeError, match='pretrained is a model: pass it as `model`'):
        vit_learner(dls, pretrained=nn.Linear(2, 2))

def rates(learn): return np.array([h['lr'] for h in learn.opt.hypers])

def test_published_weights_are_fine_tuned(trained, capsys):
    "... at a rate and a decay of their own; a number for a fit is the head's rate, and the blocks keep their share"
    learn = vit_learner(folder_dls(trained, img_size=28, bs=16, device='cpu'), pretrained=trained/'run')
    depth = learn.model.config.depth
    share = 0.75**np.arange(depth + 1, -1, -1)
    learn.create_opt()
    np.testing.assert_allclose(rates(learn), 3e-4*share)
    highest = []
    class Note(Callback):
        def before_batch(self):
            if self.training: highest.append(rates(self.learn))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Note())
        np.testing.assert_allclose(highest, [1e-3*share]*len(highest))
        highest.clear()
        learn.fit_one_cycle(4, 2e-3, pct_start=0.5, cbs=Note())
        np.testing.assert_allclose(np.max(highest, 0), 2e-3*share, rtol=0.05)
        highest.clear()
        learn.fit(1, slice(1e-5, 1e-3), cbs=Note())              # fastai's own, as it was asked for
        np.testing.assert_allclose(highest[0][[0, -1]], [1e-5, 1e-3])
    for fit in (lambda: learn.fit_flat_cos(1, 1e-3, cbs=Note()), lambda: learn.fit_sgdr(1, 1, lr_max=1e-3, cbs=Note())):
        highest.clear()
        with learn.no_bar(), learn.no_logging(): fit()
        np.testing.assert_allclose(np.max(highest, 0), 1e-3*share)
    highest.clear()
    learn.add_cb(Note())
    with learn.no_bar(): learn.lr_find(1e-5, 1e-1, num_it=8, stop_div=False, show_plot=False)
    learn.remove_cb(Note)
    np.testing.assert_allclose(highest[1:], 1e-5*1e4**(np.arange(7)/8)[:, None]*share)   # noted a step late
    learn.lr = 2e-3
    learn.create_opt()
    np.testing.assert_allclose(rates(learn), 2e-3*share)
    learn.freeze()
    assert {n for n, p in learn.model.named_parameters() if p.requires_grad} == \
        {'encoder.norm.weight', 'encoder.norm.bias', 'head.weight', 'head.bias'}
    torchs = vit_learner(learn.dls, pretrained=trained/'run', opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    torchs.create_opt()
    np.testing.assert_allclose(rates(torchs), 3e-4*share)
    torchs.model = nn.DataParallel(torchs.model)
    assert torchs._rates(np.float32(1e-3)).stop == np.float32(1e-3)
    # groups of one's own: no decay unasked
    own = vit_learner(learn.dls, pretrained=trained/'run', splitter=vit_groups)
    own.create_opt()
    assert set(rates(own)) == {3e-4}
    plain = vit_learner(folder_dls(trained, img_size=28, bs=16, device='cpu'), pretrained=trained/'run', layer_decay=0)
    plain.create_opt()
    assert len(rates(plain)) == 3 and set(rates(plain)) == {3e-4}

def test_images_need_not_be_square(tmp_path):
    for label in 'ab':
        (tmp_path/label).mkdir()
        for i in range(6): Image.effect_noise((50, 30), 60).save(tmp_path/label/f'{i}.png')
    dls = folder_dls(tmp_path, img_size=(28, 56), in_chans=1, bs=4, device='cpu')
    learn = vit_learner(dls, 'mnist')
    assert learn.model.config.img_size == (28, 56) and dls.preprocessing.img_size == (28, 56)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.recorder.values) == 1

# --- callbacks that save (29), groups (30), parameters (11) ---

def quick(dls, *cbs, model=None, **kwargs):
    "A learner without a bar"
    learn = vit_learner(dls, model or 'digits', cbs=cbs, **kwargs)
    learn.remove_cbs([learn.progress])
    learn.logger = lambda *_: None
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.fixture(scope='module')
def some_digits():
    "A twelfth of the digits, so that an epoch takes a moment"
    dls = digits_dls(device='cpu')
    parts = [(dl.dataset.x[::12], dl.dataset.y[::12]) for dl in dls]
    return lambda: tensor_dls(*parts, vocab=[*'0123456789'], bs=32, augment=False, device='cpu')

@pytest.mark.parametrize('options', [{}, dict(monitor='accuracy'), dict(at_end=True)])
def test_what_is_saved_with_ema_is_what_was_judged(options, some_digits, tmp_path):
    set_seed(0)
    learn = quick(some_digits(), EMA(0.9), SaveModelCallback(fname='best', **options), path=tmp_path)
    learn.fit(4, 3e-3)
    values = torch.tensor(learn.recorder.values)           # training loss, validation loss, accuracy
    best = values[:, 2].argmax() if 'monitor' in options else -1 if options else values[:, 1].argmin()
    again = quick(some_digits(), path=tmp_path).load('best')
    assert torch.equal(weights(learn), weights(again))
    torch.testing.assert_close(torch.tensor(again.validate()), values[best, 1:], atol=0, rtol=0)

def test_ema_trains_as_if_nobody_looked(some_digits):
    "The weights that are trained are those of a run without an average"
    ends = []
    for cbs in ([], [EMA(0.9)]):
        set_seed(0)
        learn = quick(some_digits(), *cbs)
        learn.fit(3, 3e-3, cbs=[trained := Trained()])
        ends.append(trained.weights)
    assert torch.equal(*ends)

def test_a_look_within_a_fit_changes_no_average(some_digits):
    "Another validation after each epoch; afterwards the trained weights go on, and the average with them"
    class Look(Callback):
        def after_epoch(self):
            if not self.learn.validating: self.learn.validate(2)
    ends = []
    for cbs in ([EMA(0.9)], [EMA(0.9), Look()]):
        set_seed(0)
        learn = quick(some_digits(), *cbs)
        learn.fit(3, 3e-3)
        ends.append(weights(learn))
    assert torch.equal(*ends)

def test_a_look_within_a_fit_changes_no_record(some_digits, tmp_path):
    "Nor the epoch that is best, nor the checkpoint: stopped in the third epoch, it goes on"
    class Look(Callback):
        def after_epoch(self):
            if not self.learn.validating: self.learn.validate(2)
    class Third(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2: raise InterruptedError('stopped')
    found = []
    for i, look in enumerate(([], [Look()], [Look()])):
        set_seed(0)
        learn = quick(some_digits(), KeepBest(), Checkpoint(tmp_path/f'{min(i, 1)}.pt'), *look)
        if i == 1:
            with pytest.raises(InterruptedError): learn.fit(4, 3e-3, cbs=Third())
            assert load_checkpoint(tmp_path/'1.pt')['epoch'] == 2
            continue
        learn.fit(4, 3e-3)
        found.append((learn.recorder.values, learn.recorder.iters, learn.keep_best.best, learn.keep_best.last))
    assert found[0] == found[1] and found[0][3] == 3

@pytest.mark.parametrize('when', ['after_epoch', 'after_validate'])
def test_a_look_within_a_fit_is_seen_by_no_tracker_and_ends_no_bar(when, some_digits, tmp_path, capsys):
    class Look(Callback):
        def look(self):
            if not self.learn.validating: self.learn.validate(2)
    setattr(Look, when, Look.look)
    found = []
    for look in ([], [Look()]):
        set_seed(0)
        learn = vit_learner(some_digits(), 'digits', path=tmp_path, metrics=accuracy)
        best, log = SaveModelCallback(monitor='accuracy'), CSVLogger(tmp_path/'log.csv')
        learn.fit_one_cycle(3, 3e-3, cbs=[best, log, GradientAccumulation(64), *look])
        shown = re.findall(r'[\r\n](\d) +\d\.\d+', capsys.readouterr().out)
        found.append((best.best, [list(row[:3]) for row in learn.recorder.values], learn.recorder.hps['lr'], shown,
                      weights(learn).sum().item(), len((tmp_path/'log.csv').read_text().splitlines())))
    assert found[0] == found[1] and found[0][3] == [*'012'] and found[0][5] == 4

def test_loaders_are_on_the_gpu_by_themselves():
    "As fastai's own are; without a device they, and a model with them, would stay on the CPU"
    assert digits_dls().device == default_device()

def test_the_average_of_a_fit_that_was_cut_off_stays_there(some_digits, tmp_path):
    learn = quick(some_digits(), EMA(0.9), path=tmp_path)
    learn.save('before')
    before = weights(learn)
    with pytest.raises(InterruptedError): learn.fit(2, 3e-3, cbs=Stop(1, 1))
    learn.load('before')
    learn.get_preds()
    assert torch.equal(weights(learn), before)

def test_a_checkpoint_after_half_precision(some_digits, tmp_path):
    "The scaler of a fit in 16 bits is none of a later one in 32"
    learn = quick(some_digits())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                              # that there is no GPU
        learn.to_bf16().fit(1)
    learn.to_fp32().fit(1, cbs=Checkpoint(tmp_path/'checkpoint.pt'))
    assert load_checkpoint(tmp_path/'checkpoint.pt')['parts'] == {}

def test_a_model_of_other_classes_than_the_loaders(some_digits, tmp_path):
    for model in (vit('digits', n_classes=12), vit('digits', n_classes=3)):
        with pytest.raises(ValueError, match='classes, and the loaders have 10: make or load it with n_classes=10'):
            vit_learner(some_digits(), model)
    vit_learner(some_digits(), vit('digits', n_classes=12), loss_func=nn.CrossEntropyLoss())     # who knows better
    other = vit('digits', n_classes=12)
    other.head = nn.Linear(other.config.dim, 10)
    vit_learner(some_digits(), other)
    sets = [TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 2)]*2
    plain = DataLoaders.from_dsets(*sets, bs=4, device='cpu')
    with pytest.raises(ValueError, match="don't say how many classes there are: set dls.vocab or dls.c"):
        vit_learner(plain, 'digits')
    vit_learner(plain, vit('digits'))
    plain.c = 2
    learn = vit_learner(plain, 'digits')
    assert learn.model.config.n_classes == 2
    assert load_model(save_run(learn, tmp_path/'plain'))[0].preprocessing.labels == ('0', '1')

def test_a_model_of_other_classes_mirrors_none_of_them(some_digits):
    model = vit('digits').eval()
    model.preprocessing, model.mirrors = replace(some_digits().preprocessing, labels=tuple('abcdefghij')), True
    vit_learner(some_digits(), model)
    assert not model.mirrors

class Trained(Callback):
    "The weights after the last step"
    def after_batch(self):
        if self.training: self.weights = weights(self.learn)

class Stop(Callback):
    "An error in epoch `epoch` of fit number `fit`"
    def __init__(self, fit, epoch): self.at, self.fits = (fit, epoch), 0
    def before_fit(self): self.fits += 1
    def before_batch(self):
        if self.training and (self.fits, self.epoch) == self.at: raise InterruptedError('stopped')

@pytest.mark.parametrize('opt_func', [adamw, muon])
@pytest.mark.parametrize('at', [(1, 1), (2, 0), (2, 1)])
def test_fine_tune_survives(at, opt_func, some_digits, tmp_path):
    "Interrupted in its first fit or in its second: the same weights"
    def tune(file, *cbs):
        set_seed(0)
        learn = quick(some_digits(), EMA(0.9), Checkpoint(file), *cbs, opt_func=opt_func)
        learn.fine_tune(2, 3e-3, freeze_epochs=2)
        return learn
    whole = tune(tmp_path/'whole.pt')
    with pytest.raises(InterruptedError): tune(tmp_path/'cut.pt', Stop(*at))
    resumed = tune(tmp_path/'cut.pt')
    assert torch.equal(weights(whole), weights(resumed)) and whole.recorder.values == resumed.recorder.values

def test_a_second_fit_of_equal_length_trains(some_digits, tmp_path, capsys):
    set_seed(0)
    learn = quick(some_digits(), Checkpoint(tmp_path/'c.pt'))
    learn.fit(1)
    first = weights(learn)
    learn.fit(1)
    assert not torch.equal(first, weights(learn)) and load_checkpoint(tmp_path/'c.pt')['fits'] == [1, 1]
    second, _ = weights(learn), capsys.readouterr()
    again = quick(some_digits(), Checkpoint(tmp_path/'c.pt'))      # another process: both are there
    for _ in range(2):
        again.fit(1)
        assert 'c.pt has this fit of 1 epochs to its end: none is left to train; without' in capsys.readouterr().out
    assert torch.equal(second, weights(again))
    again.fit(1)                                                   # the third is new
    assert not torch.equal(second, weights(again))
    with pytest.raises(ValueError, match='c.pt belongs to a fit of 1 epochs, not 2'):
        quick(some_digits(), Checkpoint(tmp_path/'c.pt')).fit(2)

def test_an_interrupted_fit_goes_on_in_the_same_learner(some_digits, tmp_path):
    set_seed(0)
    whole = quick(some_digits(), Checkpoint(tmp_path/'whole.pt'))
    whole.fit(3)
    set_seed(0)
    learn = quick(some_digits(), Checkpoint(tmp_path/'cut.pt'))
    with pytest.raises(InterruptedError): learn.fit(3, cbs=Stop(1, 2))
    learn.fit(3)
    assert torch.equal(weights(whole), weights(learn)) and learn.first_epoch == 0

@pytest.mark.parametrize('change', [dict(lr=1e-3), dict(wd=0.2), dict(bs=16), dict(flat=True)], ids=str)
def test_another_schedule_is_no_continuation(change, some_digits, tmp_path):
    "Rates, decay or batches that were changed meanwhile would make one training of two"
    def fit(*cbs, lr=3e-3, wd=0.1, bs=32, flat=False):
        learn = quick(some_digits(), Checkpoint(tmp_path/'c.pt'), *cbs)
        if bs != 32: learn.dls[0].bs = bs
        (learn.fit_flat_cos if flat else learn.fit_one_cycle)(3, lr, wd=wd)
        return learn
    with pytest.raises(InterruptedError): fit(Stop(1, 1))
    with pytest.raises(ValueError, match=r'c.pt was written with another schedule \(.*give the same, or another file$'):
        fit(**change)
    learn = fit()
    assert len(learn.recorder.hps['lr']) == 3*len(learn.dls.train) and max(learn.recorder.hps['lr']) > 2.9e-3

def test_epochs_that_are_passed_over_leave_a_checkpoint_whole(some_digits, tmp_path):
    "fastai's `start_epoch` gives them rows without numbers"
    def fit(name, *cbs):
        set_seed(0)
        learn = quick(some_digits(), Checkpoint(tmp_path/name), *cbs)
        learn.fit_one_cycle(4, 3e-3, start_epoch=1)
        return learn
    whole = fit('whole.pt')
    with pytest.raises(InterruptedError): fit('cut.pt', Stop(1, 3))
    resumed = fit('cut.pt')
    assert torch.equal(weights(whole), weights(resumed)) and whole.recorder.values == resumed.recorder.values
    assert list(map(len, whole.recorder.values)) == [0, 3, 3, 3]

def test_an_average_counts_steps_and_not_batches(some_digits):
    learn = quick(some_digits(), EMA(0.9), GradientAccumulation(64))
    learn.fit(2)
    assert learn.ema.n == len(learn.dls.train)                # two batches a step, two epochs

def test_without_validation_images(tmp_path):
    "Checkpoint and saved run have no number for them; who judges by them says so before the training"
    x, y = torch.randn(8, 1, 28, 28), torch.arange(8) % 2
    dls = DataLoaders.from_dsets(TensorDataset(x, y), TensorDataset(x[:0], y[:0]), bs=4, device='cpu')
    model = vit('mnist', n_classes=2)
    with pytest.raises(ValueError, match='there are none: leave it out'): quick(dls, KeepBest(), model=model).fit(1)
    learn = quick(dls, Checkpoint(tmp_path/'c.pt'), model=model)
    learn.fit(1)
    values, = load_checkpoint(tmp_path/'c.pt')['recorder']['values']
    assert values[0] > 0 and values[1] != values[1] and values[2] != values[2]
    prep = Preprocessing(28, [0.5], [0.5], in_chans=1, labels=('a', 'b'))
    assert set(load_model(save_run(learn, tmp_path/'run', prep))[1]['metrics']) == {'train_loss'}

@pytest.mark.parametrize('look', [lambda learn: learn.validate(), lambda learn: learn.get_preds(),
                                  lambda learn: learn.tta(n=1)], ids=['validate', 'get_preds', 'tta'])
def test_who_validates_leaves_the_checkpoint_alone(look, some_digits, tmp_path):
    "Before the first fit, between two, after an interruption, and where another process has begun"
    def begin(name):
        set_seed(0)
        return quick(some_digits(), Checkpoint(tmp_path/name))
    def tune(learn, look, *cbs):
        look(learn)
        learn.fit(1)
        look(learn)
        learn.fit(3, cbs=cbs)
        return learn
    whole, learn = tune(begin('whole.pt'), lambda learn: None), begin('cut.pt')
    with pytest.raises(InterruptedError): tune(learn, look, Stop(1, 2))
    before = (tmp_path/'cut.pt').read_bytes()
    look(learn)
    assert (tmp_path/'cut.pt').read_bytes() == before and load_checkpoint(tmp_path/'cut.pt')['fits'] == [1, 3]
    (tmp_path/'other.pt').write_bytes(before)
    learn.fit(3)
    for resumed in (learn, tune(begin('other.pt'), look)):
        assert torch.equal(weights(whole), weights(resumed)) and whole.recorder.values == resumed.recorder.values

def test_a_summary_is_no_fit(some_digits, tmp_path):
    learn = quick(some_digits(), KeepBest(), Checkpoint(tmp_path/'c.pt'), EarlyStoppingCallback(patience=9))
    assert 'EarlyStoppingCallback' in learn.summary()
    assert not (tmp_path/'c.pt').exists()
    learn.fit(2)
    before = (tmp_path/'c.pt').read_bytes(), list(learn.recorder.values), learn.keep_best.best
    learn.summary()
    assert before == ((tmp_path/'c.pt').read_bytes(), learn.recorder.values, learn.keep_best.best)

def test_a_fit_that_went_on_leaves_no_trace_in_the_next(some_digits, tmp_path):
    "Interrupted twice; the fit after that has all its epochs"
    for epoch in (1, 2):
        learn = quick(some_digits())
        with pytest.raises(InterruptedError): learn.fit(3, cbs=[Checkpoint(tmp_path/'c.pt'), Stop(1, epoch)])
    learn.fit(2)
    assert len(learn.recorder.values) == 2

def test_freeze_leaves_the_head_of_any_model(some_digits):
    timm = pytest.importorskip('timm')
    models = {'fc': timm.create_model('resnet18', in_chans=1, num_classes=10),
              '1': nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
              'head': timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, in_chans=1, num_classes=10)}
    for head, model in models.items():
        learn = quick(some_digits(), model=model)
        if head == '1':
            with pytest.warns(UserWarning, match='one group of parameters, so nothing is frozen: pass a splitter'):
                learn.freeze()
            continue
        learn.freeze()
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        assert free == {f'{head}.weight', f'{head}.bias'}
        groups = head_groups(model)
        assert sorted(id(p) for g in groups for p in g) == sorted(map(id, model.parameters()))
        learn.unfreeze()
        assert all(p.requires_grad for p in model.parameters())

HEAD = {'encoder.norm.weight', 'encoder.norm.bias', 'head.weight', 'head.bias'}

@pytest.mark.parametrize('cbs', [[], [HeadFirst(1)]])
def test_a_frozen_batchnorm_keeps_its_statistics(cbs, some_digits):
    learn = quick(some_digits(), *cbs, model=vit('digits', stem='conv', depth=1))
    def moved():
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.fit(1)
        return {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    if not cbs: learn.freeze()
    assert moved() == HEAD
    learn.remove_cbs(cbs)
    learn.unfreeze()
    assert moved() >= {f'patch_embed.convs.0.1.{k}' for k in ('weight', 'running_mean', 'num_batches_tracked')}

def test_validating_freezes_nothing(some_digits):
    "Neither before there is an optimiser nor with one"
    learn = replace(RECIPES['digits'], freeze_epochs=1).learner(some_digits())
    for opt in (None, learn.create_opt):
        if opt: opt()
        with learn.no_bar(): learn.validate()
        assert all(p.requires_grad for p in learn.model.parameters())

def test_a_batchnorm_without_weights_has_statistics(some_digits):
    norm = nn.BatchNorm1d(64, affine=False)
    quick(some_digits(), model=nn.Sequential(nn.Flatten(), norm, nn.Linear(64, 10))).fit(1)
    assert norm.num_batches_tracked > 0

# --- callbacks of fastai that remember ---

class Worse(Callback):
    "A loss that is best in the first epoch, then in the fourth; and an accuracy that is best in the second"
    order = Recorder.order + 1
    def after_epoch(self):
        scores = [(0.3, 0.1), (0.9, 0.8), (0.8, 0.2), (0.2, 0.3), (0.5, 0.5), (0.6, 0.4)]
        for i, score in enumerate(scores[self.epoch], 1): self.recorder.values[-1][i] = score

@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_trackers_remember_what_they_saw(epoch, some_digits, tmp_path):
    "What is saved, when the rate is lowered and where a fit ends are those of one that was not interrupted"
    def fit(name, *cbs):
        set_seed(0)
        saves = SaveModelCallback(fname=f'{name}-loss'), SaveModelCallback(monitor='accuracy', fname=f'{name}-accuracy')
        trackers = ReduceLROnPlateau(patience=2), EarlyStoppingCallback(monitor='accuracy', patience=4)
        learn = quick(some_digits(), *saves, *trackers, Worse(), Checkpoint(tmp_path/f'{name}.pt'), *cbs, path=tmp_path)
        learn.fit(9, 3e-3)
        return learn
    whole = fit('whole')
    with pytest.raises(InterruptedError): fit('cut', Stop(1, epoch))
    resumed = fit('cut')
    assert whole.recorder.lrs == resumed.recorder.lrs and len(set(whole.recorder.lrs)) == 2
    assert len(whole.recorder.values) == len(resumed.recorder.values) == 6
    for what in ('loss', 'accuracy'):
        a, b = (weights(quick(some_digits(), path=tmp_path).load(f'{name}-{what}')) for name in ('whole', 'cut'))
        assert torch.equal(a, b)

@pytest.mark.parametrize('epoch', [1, 2])
def test_gradients_that_wait_for_a_step_are_kept(epoch, some_digits, tmp_path):
    "An epoch may end amid the batches that make one large one"
    def fit(name, *cbs):
        set_seed(0)
        learn = quick(some_digits(), GradientAccumulation(2*some_digits().train.bs), Checkpoint(tmp_path/name), *cbs)
        learn.fit(3, 3e-3)
        return learn
    whole = fit('whole.pt')
    assert load_checkpoint(tmp_path/'whole.pt')['parts']['GradientAccumulation']['count'] == 32     # one is left
    with pytest.raises(InterruptedError): fit('cut.pt', Stop(1, epoch))
    assert torch.equal(weights(whole), weights(fit('cut.pt')))

def test_a_batch_norm_that_is_always_trained_survives(some_digits, tmp_path):
    "fastai marks its parameters, and the others not"
    def fit(*cbs):
        set_seed(0)
        learn = vit_learner(some_digits(), vit('digits', stem='conv'), train_bn=True, cbs=[Checkpoint(file), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
        return weights(learn)
    file = tmp_path/'whole.pt'
    whole, file = fit(), tmp_path/'cut.pt'
    with pytest.raises(InterruptedError): fit(Stop(1, 1))
    assert torch.equal(whole, fit())

def test_a_fit_after_a_damaged_checkpoint_trains(some_digits, tmp_path):
    "The epoch at which it would have gone on is forgotten with it"
    quick(some_digits(), Checkpoint(tmp_path/'c.pt')).fit(1)
    state = torch.load(tmp_path/'c.pt')
    torch.save(state | dict(opt=[]), tmp_path/'c.pt')
    learn = quick(some_digits())
    with pytest.raises(ValueError, match='damaged'): learn.fit(1, cbs=Checkpoint(tmp_path/'c.pt'))
    learn.fit(1)
    assert len(learn.recorder.values) == 1

def test_a_fit_that_ended_before_it_began_leaves_no_epoch_behind(some_digits, tmp_path):
    class Refuses(Callback):
        order = 80                    # after the checkpoint has found its file
        def before_fit(self): raise ValueError('not today')
    quick(some_digits(), Checkpoint(tmp_path/'c.pt')).fit(1)
    learn = quick(some_digits())
    with pytest.raises(ValueError, match='not today'): learn.fit(1, cbs=[Checkpoint(tmp_path/'c.pt'), Refuses()])
    learn.fit(1)
    assert len(learn.recorder.values) == 1

# --- which epoch is the best ---

def perplexity(pred, y): return pred.mean()

class Rows(Callback):
    "Three epochs with a loss and a metric of our choice"
    order = Recorder.order + 1
    def after_epoch(self):
        row = self.recorder.values[-1]
        row[1], row[2] = [(0.3, 0.5), (0.9, 0.1), (0.2, 0.4)][self.epoch]

@pytest.mark.parametrize('metric, options, best', [
    (accuracy, {}, 0), (accuracy, dict(monitor='valid_loss'), 2), (accuracy, dict(comp=np.less), 1),
    (error_rate, {}, 2), (error_rate, dict(monitor='error_rate'), 1),
    (perplexity, {}, 2), (perplexity, dict(monitor='perplexity', comp=np.less), 1), (perplexity, dict(comp=np.less), 1),
    (perplexity, dict(monitor='perplexity', comp=np.greater), 0), ([], {}, 2)])
def test_the_best_epoch_by_whatever_is_asked(metric, options, best, some_digits):
    learn = quick(some_digits(), KeepBest(**options), Rows(), model=vit('digits', depth=1), metrics=metric)
    if metric == []: learn.rows.after_epoch = lambda: None
    learn.fit(3)
    losses = [row[1] for row in learn.recorder.values]
    assert learn.keep_best.best == (best if metric != [] else losses.index(min(losses)))

NAN = float('nan')

@pytest.mark.parametrize('scores, best', [([NAN, 0.2, 0.1], 1), ([NAN, NAN, -0.9], 2), ([0.2, NAN, 0.1], 0)])
def test_a_score_that_is_no_number_is_the_worst(scores, best, some_digits):
    "A correlation with an answer that is always the same, say"
    class Score(Rows):
        def after_epoch(self): self.recorder.values[-1][2] = scores[self.epoch]
    learn = quick(some_digits(), KeepBest(), Score(), model=vit('digits', depth=1))
    learn.fit(3)
    assert learn.keep_best.best == best

def test_the_best_epoch_is_judged_by_validation():
    assert _judge(['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy'], None, None) == ('valid_accuracy', 1)
    with pytest.raises(ValueError, match="can't see acc: choose one of train_loss, valid_loss, f1_score$"):
        _judge(['train_loss', 'valid_loss', 'f1_score', 'time'], 'acc', None)
    with pytest.raises(ValueError, match=r'tell KeepBest whether perplexity is better when higher \(comp=np.greater\)'):
        _judge(['train_loss', 'valid_loss', 'perplexity', 'time'], 'perplexity', None)

@pytest.mark.parametrize('mix', ['mixup', 'cutmix'])
def test_a_fit_that_stopped_early_is_at_its_end(mix, some_digits, tmp_path):
    "Also where images are mixed, and it is begun once more"
    recipe = replace(RECIPES['digits'], early_stop=1, **{mix: 0.4})
    for _ in range(2):
        learn = quick(some_digits(), *recipe.callbacks(), Checkpoint(tmp_path/'c.pt'))
        learn.fit(5, lr=0.)
        assert len(learn.recorder.values) == 2 and learn.keep_best.stopped

# --- what is refused before training ---

@pytest.mark.parametrize('value', [Path('here'), np.float32(0.5), [np.int64(1)], lambda: 0])
def test_facts_that_no_checkpoint_holds(value, some_digits, tmp_path):
    learn = quick(some_digits(), Checkpoint(tmp_path/'c.pt', facts=dict(fine=[1, 'a', None], where=value)))
    with pytest.raises(TypeError, match="the fact 'where' can't be kept in a checkpoint"): learn.fit(1)
    assert not list(tmp_path.iterdir()) and not learn.recorder.losses

def test_a_class_without_an_image_has_no_weight():
    images, y = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 2, 2, 2, 0])
    dls = tensor_dls(*3*[(images, y)], vocab=['a', 'b', 'c', 'd'], device='cpu')
    with pytest.raises(ValueError, match='none of b, d: add one, or leave the class out'): weighted_loss(dls)

@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_weights_of_classes_know_no_batches(smoothing):
    "The loss is the mean over the images, in whatever order they come"
    set_seed(0)
    images, y = torch.randint(256, (300, 1, 8, 8), dtype=torch.uint8), torch.tensor([0]*240 + [1]*60)
    for order in (torch.arange(300), torch.randperm(300)):       # batches of 256 and 44
        dls = tensor_dls((images, y), *2*[(images[order], y[order])], vocab=['a', 'b'], augment=False, device='cpu')
        learn = quick(dls, loss_func=weighted_loss(dls, smoothing), model=vit('digits', n_classes=2, depth=1))
        nn.init.normal_(learn.model.head.weight, generator=torch.Generator().manual_seed(0))
        _, _, each = learn.get_preds(with_loss=True)
        x = torch.cat([xb.as_subclass(torch.Tensor) for xb, _ in dls.valid])
        with torch.no_grad(): logits = learn.model.eval()(x)
        weight = torch.tensor([300/2/240, 300/2/60])
        expected = nn.functional.cross_entropy(logits, y[order], weight, reduction='none', label_smoothing=smoothing)
        torch.testing.assert_close(torch.Tensor(each), expected)
        assert learn.validate()[0] == pytest.approx(expected.mean().item(), rel=1e-5)

def test_the_optimiser_begins_anew_with_positions_of_another_shape():
    "Their step is that of a fresh optimiser; all others go on"
    model = vit('digits', depth=1)
    nn.init.normal_(model.head.weight)
    opt = adamw(vit_groups(model), lr=0.01)
    def step(model, opt, side):
        model(torch.linspace(-1, 1, 3*side*side).view(3, 1, side, side)).sin().sum().backward()
        opt.step()
        opt.zero_grad()
    for _ in range(2): step(model, opt, 8)
    model.set_resolution(16)
    other = deepcopy(model)
    step(other, adamw(vit_groups(other), lr=0.01), 16)
    step(model, opt, 16)
    assert torch.equal(model.pos_embed, other.pos_embed) and not torch.equal(model.head.weight, other.head.weight)
    assert opt.state[model.pos_embed]['step'] == 1 and opt.state[model.head.weight]['step'] == 3

# --- Muon ---

def test_a_step_of_muon_is_along_the_singular_directions():
    "In float64, by the decomposition: all directions of the average are moved about equally far, the weak ones, too"
    torch.manual_seed(0)
    model = vit('digits', depth=2, stem='conv', stem_depth=2, n_classes=10).double()
    opt, before = muon(vit_groups(model), lr=0.1, wd=0.), {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters(): p.grad = torch.randn_like(p)
    for matrix in (p for p in model.parameters() if p.ndim in (2, 4)): matrix.grad.flatten(1)[0] *= 20
    opt.step()
    n = 0
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        if not opt.state[p].get('muon'):                   # Adam's first step is the sign, but for its epsilon
            assert torch.allclose(step, 0.1*p.grad/(p.grad.abs() + 1e-5), rtol=1e-6), name
            continue
        pieces = 3 if name.endswith('qkv.weight') else 1
        for step, grad in zip(step.flatten(1).chunk(pieces), p.grad.flatten(1).chunk(pieces)):
            n += 1
            u, _, v = torch.linalg.svd(grad, full_matrices=False)
            values = torch.linalg.svdvals(step)/(0.1*0.2*max(step.shape)**0.5)
            assert 0.6 < values.quantile(0.05) and values.max() < 1.3, name      # but for one that is next to zero
            assert nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.96, name
    assert n == 2*(3 + 3) + 2                  # the blocks' matrices, and all kernels but the first

def test_muon_obeys_groups_and_rates(some_digits):
    "What is frozen stays; the rate of each group is its own; a matrix without a gradient is left out"
    learn = quick(some_digits(), opt_func=muon, layer_decay=0.5)
    model = learn.model
    learn.create_opt()
    learn.opt.set_hyper('wd', 0.)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    held = model.encoder.blocks[1].mlp.fc1.weight
    held.grad, before = None, [b.attn.proj.weight.detach().clone() for b in model.encoder.blocks]
    kept = held.detach().clone()
    learn.opt.step()
    steps = [(b.attn.proj.weight.detach() - x).norm().item() for b, x in zip(model.encoder.blocks, before)]
    assert steps == pytest.approx([steps[0]*2**i for i in range(len(steps))], rel=1e-3) and torch.equal(held, kept)
    learn.freeze()
    before = weights(learn)
    for p in model.parameters(): p.grad = torch.ones_like(p) if p.requires_grad else None
    learn.opt.step()
    head = sum(p.numel() for p in [*model.encoder.norm.parameters(), *model.head.parameters()])
    assert torch.equal(before[:-head], weights(learn)[:-head])

def test_muon_and_adamw_after_the_state_is_cleared(some_digits):
    "fastai clears an optimizer's state before a fit: who moves by which rule stays"
    learn = quick(some_digits(), opt_func=muon)
    learn.create_opt()
    marks = [learn.opt.state[p].get('muon') for p in learn.model.parameters()]
    learn.fit(1)
    learn.opt.clear_state()
    assert [learn.opt.state[p].get('muon') for p in learn.model.parameters()] == marks and sum(map(bool, marks)) == 16

@pytest.mark.parametrize('first, second', [(adamw, muon), (muon, adamw)])
def test_the_other_optimizer_does_not_go_on(first, second, some_digits, tmp_path):
    "A checkpoint is refused in one sentence, and fastai's own `load` leaves the optimizer out and says so"
    words = f'c.pt was written with the optimizer {first.__name__}, not {second.__name__}: give that one'
    learn = quick(some_digits(), Checkpoint(tmp_path/'c.pt'), Stop(1, 1), opt_func=first)
    with pytest.raises(InterruptedError): learn.fit(2)
    with pytest.raises(ValueError, match=words) as e:
        quick(some_digits(), Checkpoint(tmp_path/'c.pt'), opt_func=second).fit(2)
    assert 'damaged' not in str(e.value)
    learn.path, other = tmp_path, quick(some_digits(), opt_func=second, path=tmp_path)
    learn.save('whole', with_opt=True)
    other.create_opt()
    before = [dict(other.opt.state[p]) for p in other.model.parameters()]
    with pytest.raises(ValueError, match="the state is another optimizer's"):
        other.opt.load_state_dict(learn.opt.state_dict())
    with pytest.warns(UserWarning, match='Could not load the optimizer state'): other.load('whole', with_opt=True)
    assert [other.opt.state[p] for p in other.model.parameters()] == before
    assert torch.equal(weights(other), weights(learn))

def test_an_optimizer_that_there_is_not():
    with pytest.raises(ValueError, match="no optimizer 'sgd': choose from adamw, muon"):
        replace(RECIPES['digits'], opt='sgd').learner(digits_dls(device='cpu'))

@pytest.mark.parametrize('changes', [{}, dict(pool='map', n_registers=3), dict(layer_scale=1e-5, pool='cls')])
def test_summary_counts_every_parameter(changes, some_digits):
    learn = quick(some_digits(), model=vit('digits', **changes))
    n = sum(p.numel() for p in learn.model.parameters())
    learn.freeze()
    free = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    text = learn.summary()
    for words, value in {'params': n, 'trainable params': free, 'non-trainable params': n - free}.items():
        assert f'Total {words}: {value:,}\n' in text
    assert f'In no layer (tokens, positions): {n - in_layers(learn.model):,}\n' in text and 0 < free < n

def in_layers(model):
    "Parameters of layers with a weight, which is what fastai counts"
    return sum(p.numel() for m in model.modules() if hasattr(m, 'weight') for p in m.parameters())

# --- a checkpoint that is not what it says (39, 40) ---

@pytest.fixture(scope='module')
def checkpoint(some_digits, tmp_path_factory):
    "The state of a fit of three epochs after its second"
    file = tmp_path_factory.mktemp('checkpoint')/'c.pt'
    set_seed(0)
    with pytest.raises(InterruptedError): quick(some_digits(), EMA(0.9), Checkpoint(file), Stop(1, 2)).fit(3)
    return file

def places(x, at=()):
    "The path of each value in nested dicts and lists"
    yield at
    items = x.items() if isinstance(x, dict) else enumerate(x[:3]) if isinstance(x, (list, tuple)) else ()
    for k, v in items: yield from places(v, (*at, k))

def replaced(x, at, value):
    "A copy of `x` with `value` at a path"
    if not at: return value
    copy = dict(x) if isinstance(x, dict) else list(x)
    copy[at[0]] = replaced(x[at[0]], at[1:], value)
    return tuple(copy) if isinstance(x, tuple) else copy

ODD = [None, 'x', -1, 10**30, float('nan'), [], {}, [None], {'a': 1}, True, torch.zeros(3), torch.tensor(float('nan'))]
IGNORED = ('facts', 'seconds')      # not for the learner to judge

@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_a_checkpoint_of_odd_values(data, checkpoint, some_digits):
    "It goes on to the same weights, or one sentence names the file and the field"
    state = torch.load(checkpoint)
    field = data.draw(st.sampled_from(sorted(set(state) - set(IGNORED))))
    at = (field, *data.draw(st.sampled_from(list(places(state[field])))))
    # no averages at all is sound: those of a parameter that was never trained
    value = data.draw(st.sampled_from([v for v in ODD if field != 'opt' or v != {}]))
    file = checkpoint.with_name('odd.pt')
    torch.save(replaced(state, at, value), file)
    before = file.read_bytes()
    learn = quick(some_digits(), EMA(0.9), Checkpoint(file), OneStep())
    try: learn.fit(3)
    except ValueError as e:
        where, sentence = str(e).split('\n\t')                  # fastai's line, and ours
        assert str(file) in sentence and '\n' not in sentence
        assert field in sentence or field in ('format', 'parts')
        assert file.read_bytes() == before
    else: assert torch.equal(learn.one_step.weights, expected(checkpoint, some_digits)), (at, value)

class OneStep(Callback):
    "Stop after one step"
    def after_batch(self):
        if self.training:
            self.weights = weights(self.learn)
            raise CancelFitException

@cache
def expected(checkpoint, some_digits):
    "The weights after the first step that follows the checkpoint"
    learn = quick(some_digits(), EMA(0.9), Checkpoint(checkpoint), OneStep())
    learn.fit(3)
    return learn.one_step.weights

# --- a checkpoint on another machine, or one that can't be read just now ---

def test_a_checkpoint_goes_on_where_fewer_gpus_are_seen(some_digits, monkeypatch):
    "Written with three, restored where there are two, four or none"
    dls, seen = some_digits(), []
    states = _random_states(dls) | dict(cuda=[torch.tensor([i], dtype=torch.uint8) for i in range(3)])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda.random, 'set_rng_state', lambda state, device: seen.append((state.item(), device)))
    monkeypatch.setattr(torch.cuda, 'set_rng_state', torch.cuda.random.set_rng_state)
    for there, restored in ((2, [(0, 0), (1, 1)]), (4, [(0, 0), (1, 1), (2, 2)]), (0, [])):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: there)
        seen.clear()
        _set_random_states(states, dls)
        assert seen == restored

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"

@pytest.mark.parametrize('error, kind, sentence', [
    (PermissionError(13, 'Permission denied'), OSError, r"can't read .*c.pt \(Permission denied\): it may be whole"),
    (OSError(5, 'Input/output error'), OSError, r"can't read .*c.pt \(Input/output error\): it may be whole"),
    (MemoryError(), MemoryError, '^$'), (RuntimeError(NO_MEMORY), RuntimeError, "can't allocate memory"),
    (FileNotFoundError(2, 'No such file'), FileNotFoundError, 'there is no checkpoint .*c.pt$'),
    (RuntimeError('failed finding central directory'), ValueError, 'c.pt is damaged or no checkpoint'),
    (pickle.UnpicklingError('odd'), ValueError, 'damaged'), (EOFError(), ValueError, 'damaged')])
def test_only_what_is_damaged_is_called_so(error, kind, sentence, checkpoint, monkeypatch):
    "Of a file that can't be read nobody knows that; who begins anew would delete it"
    def fail(*_, **__): raise error
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(kind, match=sentence) as e: load_checkpoint(checkpoint)
    assert ('start the run again' in str(e.value)) == (kind is ValueError)

def test_a_folder_is_no_damaged_checkpoint(tmp_path):
    with pytest.raises(OSError, match="can't read .*Is a directory"): load_checkpoint(tmp_path)

# --- beside other programs ---

def test_threads_are_as_before_after_an_error(monkeypatch):
    "The other program takes a core at once; the fit breaks in the step after it was noticed"
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): monkeypatch.delenv(name, raising=False)
    now, seen = [0.], []
    class Break(Callback):
        def before_batch(self):
            seen.append(torch.get_num_threads())
            if len(seen) == 3: raise ValueError('broken')
            now[0] += 1
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    assert sum(isinstance(cb, Threads) for cb in learn.cbs) == 1
    learn.remove_cb(Threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with learn.no_bar(), pytest.raises(ValueError, match='broken'):
            learn.fit(1, cbs=[Threads(lambda: now[0], lambda: now[0]), Break()])
        assert seen == [2, 1, 1] and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)

def test_what_other_programs_leave(monkeypatch):
    "Idle cores, those of programs of low priority, and our own work; of the cores that we may use"
    cores = [SimpleNamespace(user=9., nice=1., system=2., idle=30., iowait=4.),
             SimpleNamespace(user=8., nice=0.5, system=1., idle=20., iowait=2.),
             SimpleNamespace(user=7., nice=0., system=1., idle=1000., iowait=0.)]
    monkeypatch.setattr(psutil, 'cpu_times', lambda percpu: cores)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(time, 'process_time', lambda: 5.)
    monkeypatch.setattr(os, 'PRIO_PROCESS', 0, raising=False)
    for linux, priority, ours in ((True, 0, 5), (True, -5, 5), (True, 10, 0), (False, 10, 5)):
        monkeypatch.setattr(psutil, 'LINUX', linux)
        monkeypatch.setattr(os, 'getpriority', lambda which, who: priority, raising=False)
        assert _left_over() == 30 + 4 + 1 + 20 + 2 + 0.5 + ours     # of low priority, ours are in `nice`
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {4, 5, 6}, raising=False)    # a container that numbers anew
    assert _left_over() == 30 + 4 + 1 + 20 + 2 + 0.5 + 1000 + 5

def test_memory_is_given_back_twice_a_minute(few_digits, monkeypatch):
    now, calls = [100.], []
    monkeypatch.setattr(learner.sys, 'platform', 'linux')
    monkeypatch.setattr(learner.ctypes, 'CDLL', lambda name: SimpleNamespace(malloc_trim=calls.append))
    assert learner._give_back(90., lambda: now[0]) == 90. and not calls
    assert learner._give_back(70., lambda: now[0]) == 100. and calls == [0]
    monkeypatch.setattr(learner.ctypes, 'CDLL', lambda name: SimpleNamespace())           # another C library
    assert learner._give_back(70., lambda: now[0]) == 100.
    monkeypatch.setattr(learner.sys, 'platform', 'win32')
    monkeypatch.setattr(learner.ctypes, 'CDLL', None)
    assert learner._give_back(70., lambda: now[0]) == 100.
    said = []
    monkeypatch.setattr(learner, '_give_back', lambda since: said.append(since) or 7.)
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert said[0] == 0. and set(said[1:]) == {7.} and len(said) == sum(map(len, learn.dls.loaders[:2]))

@pytest.mark.parametrize('opt_func', [adamw, muon])
def test_frozen_means_frozen_also_with_gradients_that_wait(opt_func, few_digits):
    "A batch of an epoch is left over for the next step; by then its parameters are frozen"
    learn = vit_learner(digits_dls(bs=64, device='cpu'), 'digits', opt_func=opt_func, cbs=GradientAccumulation(192))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.model.pos_embed.grad is not None               # it waits
        learn.freeze()
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.fit(1)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(('head', 'encoder.norm')) for k in moved)

def test_an_optimizer_keeps_the_weight_decay_that_it_was_given(some_digits):
    for wd, kwargs in ((0.3, dict(opt_func=partial(muon, wd=0.3))), (0.05, {}), (0.2, dict(wd=0.2)),
                       (0., dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=0.)))):
        learn = quick(some_digits(), **kwargs)
        learn.fit(1)
        assert learn.opt.hypers[-1]['wd'] == wd

def test_a_model_follows_the_size_of_the_images(trained, tmp_path):
    "A run at 28 pixels, trained on at 56: it can be saved, and predicts as it was trained"
    dls = folder_dls(trained, img_size=56, bs=16, augment=False, device='cpu')
    learn = vit_learner(dls, load_model(trained/'run')[0])
    assert learn.model.config.img_size == 56
    model, _ = load_model(save_run(learn, tmp_path/'run'))
    assert model.preprocessing.img_size == (56, 56)

def test_an_exported_learner_prepares_images_as_before(trained, tmp_path):
    "`learn.export()` keeps the data sets' preprocessing; it is that of the weights"
    from fastai.vision.all import load_learner
    model, _ = load_model(trained/'run')
    model.preprocessing = replace(model.preprocessing, mean=(0.1,)*3, std=(0.9,)*3)
    learn = vit_learner(folder_dls(trained, img_size=28, bs=16, augment=False, device='cpu'), model)
    learn.path, file = tmp_path, trained/'test'/'dark'/'0.png'
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    assert predict(again, file)[0]['probabilities'] == predict(learn, file)[0]['probabilities']

def test_the_random_numbers_of_a_mac_go_on(some_digits, monkeypatch):
    "As those of other GPUs do"
    kept = torch.arange(4, dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: kept)
    back = []
    monkeypatch.setattr(torch.mps, 'set_rng_state', back.append)
    dls = some_digits()
    _set_random_states(_random_states(dls), dls)
    assert len(back) == 1 and back[0] is kept
