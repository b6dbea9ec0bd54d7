"""What fastai's documentation does with a Learner, done with ours."""
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.all import (CategoryBlock, CSVLogger, CutMix, DataBlock, EarlyStoppingCallback,
                               GradientAccumulation, ImageBlock, ImageDataLoaders, Interpretation, MixUp,
                               MultiCategoryBlock, PILImage, PILImageBW, RegressionBlock, Resize, SaveModelCallback,
                               load_learner)
from PIL import Image

from vit_nbdev.data import digits_dls, folder_dls
from vit_nbdev.learner import vit_learner
from vit_nbdev.runs import predict
from vit_nbdev.vit import vit

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder per class with twelve small pictures"
    path, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for label, level in dict(dark=60, light=190).items():
        (path/label).mkdir()
        for i in range(12):
            pixels = (level + rng.normal(0, 9, (28, 28, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path/label/f'{i}.png')
    return path

def fastai_dls(path):
    return ImageDataLoaders.from_folder(path, valid_pct=0.25, item_tfms=Resize(28), bs=8, num_workers=0, device='cpu')

LOADERS = {
    'digits': lambda path: digits_dls(device='cpu'),
    'folder': lambda path: folder_dls(path, img_size=28, bs=8, device='cpu'),
    'fastai': fastai_dls,
}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', LOADERS)
def test_the_vision_tutorial(name, pictures, tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    dls = LOADERS[name](pictures)
    h = dls.one_batch()[0].shape[-1]
    model = 'digits' if name == 'digits' else vit('mnist', in_chans=3, n_classes=2, depth=1)
    learn = vit_learner(dls, model, path=tmp_path)
    assert dls.c == len(dls.vocab)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)
        learn.fit_one_cycle(2, cbs=[CSVLogger(), SaveModelCallback(), EarlyStoppingCallback(patience=9)])
        for cb in (MixUp(), CutMix(), GradientAccumulation(16)): learn.fit(1, cbs=cb)
        probs, targets = learn.get_preds()
        assert abs((probs.argmax(1) == targets).float().mean() - learn.validate()[1]) < 1e-6
        assert learn.tta(n=2)[0].shape == probs.shape
        learn.lr_find(num_it=4)
        learn.show_results()
        dls.show_batch()
        Interpretation.from_learner(learn).plot_top_losses(3)
        assert 'Total params' in learn.summary()

        channels = dls.one_batch()[0].shape[1]
        shape = (h, h) if channels == 1 else (h, h, channels)
        pixels = np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels).save('new.png')
        image = (PILImageBW if channels == 1 else PILImage).create('new.png')
        label, index, p = learn.predict('new.png')
        assert label == dls.vocab[index] and torch.equal(learn.predict(image)[2], p)
        same = learn.get_preds(dl=dls.test_dl(['new.png', 'new.png']))[0]
        torch.testing.assert_close(same, torch.stack([p, p]), atol=1e-6, rtol=1e-5)
        if name != 'fastai':       # ours say how their images are prepared
            ours = predict(learn, 'new.png')[0]
            assert ours['class'] == label and np.allclose(ours['probabilities'], p, atol=1e-5)

        learn.save('model')
        learn.export('learner.pkl')
        again = load_learner('learner.pkl')
        with again.no_bar(): torch.testing.assert_close(again.predict('new.png')[2], p, atol=1e-6, rtol=1e-5)
        assert len(again.dls.valid_ds) == 0

def test_bf16_on_loaders_of_ours(few_digits):
    learn = vit_learner(digits_dls(device='cpu'), 'digits').to_bf16()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.losses[-1] < 3

@pytest.mark.parametrize('kind', ['several labels', 'numbers', 'one class'])
def test_the_loss_is_that_of_the_loaders(kind, pictures):
    "Binary cross-entropy for several labels an image, squared error for numbers"
    files = sorted(pictures.rglob('*.png'))
    table = pd.DataFrame(dict(file=files, light=[float(f.parent.name == 'light') for f in files]))
    block, get_y, c = {
        'several labels': (MultiCategoryBlock(vocab=['a', 'light', 'z']), lambda r: ['a', *['light']*int(r.light)], 3),
        'numbers': (RegressionBlock(n_out=1), lambda r: r.light, 1),
        'one class': (CategoryBlock, lambda r: str(r.light), 2)}[kind]
    data = DataBlock(blocks=(ImageBlock, block), get_x=lambda r: r.file, get_y=get_y, item_tfms=Resize(28))
    set_seed(0)
    dls = data.dataloaders(table, bs=8, num_workers=0, device='cpu')
    learn = vit_learner(dls, vit('mnist', in_chans=3, n_classes=c, depth=1))
    name = {'several labels': 'BCEWithLogits', 'numbers': 'MSE', 'one class': 'CrossEntropy'}[kind]
    assert name in type(learn.loss_func).__name__ or name in repr(learn.loss_func)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(16, 3e-3)
    assert learn.validate()[0] < 0.3      # untrained: 0.69 for labels, 0.5 for numbers
    if kind != 'one class':
        with pytest.raises(ValueError, match='label_smoothing needs one class an image'):
            vit_learner(dls, vit('mnist', in_chans=3, n_classes=c, depth=1), label_smoothing=0.1)
