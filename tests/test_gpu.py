"""What a GPU must do as a CPU does; skipped where there is none.

`VIT_NBDEV_TEST_DEVICE=cpu` runs them on a CPU, for whoever changes these tests without a GPU at hand.
"""
import os

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastcore.test import test_close as close
from vit_nbdev import runs
from vit_nbdev.data import digits_dls
from vit_nbdev.interpret import METHODS, deletion_insertion, embedding_map, heat_map
from vit_nbdev.learner import Checkpoint, adamw, muon, vit_groups, vit_learner
from vit_nbdev.runs import load_model, predict, train
from vit_nbdev.vit import vit

DEVICE = os.environ.get('VIT_NBDEV_TEST_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='needs a GPU')
HALVES = ('bf16', 'fp16') if DEVICE == 'cuda' else ('bf16',)

@pytest.mark.filterwarnings('ignore:precision bf16')
@pytest.mark.parametrize('precision', ('fp32', 'auto', *HALVES))
def test_a_run(precision, tmp_path, no_pictures):
    "It learns, says where, and its folder gives the same probabilities on either device"
    run = train(epochs=8, precision=precision, device=DEVICE, out=tmp_path/'run')
    model, config = load_model(run)
    assert torch.device(config['device']).type == DEVICE
    assert config['settings']['precision'] in (('fp32', 'bf16') if precision == 'auto' else (precision,))
    assert config['test_accuracy'] > 0.85 and {p.dtype for p in model.parameters()} == {torch.float32}
    pixels = digits_dls(device='cpu')[2].dataset.x[:8, 0].numpy()
    here, there = ([r['probabilities'] for r in predict(run, list(pixels), device=d)] for d in ('cpu', DEVICE))
    close(here, there, eps=1e-3)

def test_a_compiled_run(tmp_path, no_pictures, few_digits):
    run = train(epochs=1, compile=True, device=DEVICE, out=tmp_path/'run')
    assert load_model(run)[1]['settings']['compile'] is True

@pytest.mark.parametrize('opt_func', (adamw, muon))
def test_optimizers_step_as_on_a_cpu(opt_func):
    "Ten steps on the same gradients, with decay and moving rates"
    def trained(device):
        torch.manual_seed(0)
        model = vit('digits', stem='conv', depth=2).to(device)
        opt = opt_func(vit_groups(model), slice(1e-4, 1e-2), wd=0.05)
        for i in range(10):
            opt.set_hypers(mom=0.95 - 0.005*i)
            for p in model.parameters(): p.grad = torch.randn(p.shape).to(device)
            opt.step()
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    close(trained('cpu'), trained(DEVICE), eps=1e-3)

def test_maps_as_on_a_cpu():
    torch.manual_seed(0)
    model, x = vit('digits', pool='cls').eval(), torch.randn(3, 1, 8, 8)
    torch.nn.init.normal_(model.head.weight)
    here = {method: heat_map(model, x, method, target=torch.tensor([1, 2, 3])) for method in METHODS}
    model, x = model.to(DEVICE), x.to(DEVICE)
    for method, map_ in here.items():
        there = heat_map(model, x, method, target=torch.tensor([1, 2, 3], device=DEVICE))
        assert there.device.type == DEVICE
        close(map_, there.cpu(), eps=1e-4)

@pytest.mark.parametrize('half', ('', *HALVES))
def test_a_training_goes_on_where_it_was_stopped(half, tmp_path, few_digits):
    "The second of two epochs after a restart, the scaler of fp16 included"
    def learner(file):
        set_seed(0)
        learn = vit_learner(digits_dls(device=DEVICE), 'digits', opt_func=muon, cbs=Checkpoint(file))
        if half and DEVICE == 'cuda': learn = getattr(learn, f'to_{half}')()
        elif half: learn.add_cb(runs.CPUBF16())
        return learn
    def fit(learn, stop=False):
        def before_batch(_):
            if stop and learn.epoch == 1: raise KeyboardInterrupt
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2, 3e-3, cbs=Callback(before_batch=before_batch))
        return learn.recorder.values
    whole = fit(learner(tmp_path/'whole.pt'))
    with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path/'stopped.pt'), stop=True)
    again = learner(tmp_path/'stopped.pt')
    rest = fit(again)
    assert len(rest) == 2 and again.model.head.weight.device.type == DEVICE
    close(whole[1], rest[1], eps=2e-2)      # sums on a GPU have no fixed order

def test_scores_and_classes_of_a_cpu():
    "What is drawn by hand lies there; the images need not"
    torch.manual_seed(0)
    model = vit('digits', dim=16, depth=1).to(DEVICE)
    torch.nn.init.normal_(model.head.weight)
    x = torch.rand(4, 1, 8, 8)
    scores = torch.rand(4, 4, 4)
    expected = deletion_insertion(model.cpu(), x, scores)
    found = deletion_insertion(model.to(DEVICE), x.to(DEVICE), scores)
    for a, b in zip(expected, found): close(a, b.cpu(), eps=1e-4)
    embedding_map(model, x.to(DEVICE), torch.arange(4))

def test_loaders_are_on_the_gpu_by_themselves():
    if DEVICE == 'cuda': assert digits_dls().one_batch()[0].is_cuda
