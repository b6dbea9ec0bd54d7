"""A trained model gets the pixels it expects, by whatever way it comes to its loaders."""
import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.all import ImageDataLoaders, Normalize, Resize
from PIL import Image
from torch import nn

from vit_nbdev.data import digits_dls, folder_dls
from vit_nbdev.learner import normalise_as, vit_learner
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained
from vit_nbdev.runs import load_model, save_model
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

def test_a_name_and_weights_are_one_too_many(trained):
    dls = digits_dls(device='cpu')
    with pytest.raises(ValueError, match="got a model .'S/16'. and pretrained weights: leave out one"):
        vit_learner(dls, 'S/16', pretrained=trained/'run')
    with pytest.raises(TypeError, match='pretrained is a model: pass it as `model`'):
        vit_learner(dls, pretrained=nn.Linear(2, 2))

def test_images_need_not_be_square(tmp_path):
    for label in 'ab':
        (tmp_path/label).mkdir()
        for i in range(6): Image.effect_noise((50, 30), 60).save(tmp_path/label/f'{i}.png')
    dls = folder_dls(tmp_path, img_size=(28, 56), in_chans=1, bs=4, device='cpu')
    learn = vit_learner(dls, 'mnist')
    assert learn.model.config.img_size == (28, 56) and dls.preprocessing.img_size == (28, 56)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.recorder.values) == 1
