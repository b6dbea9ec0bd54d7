"""What fastai's own tutorial does with a Learner works, with ours too, under the versions that constraints.txt pins."""
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from fastai.vision.all import ImageDataLoaders, Resize
from PIL import Image

from vit_nbdev.learner import vit_learner

CLASSES = {'blue': (20, 40, 230), 'green': (30, 220, 40), 'red': (230, 30, 20)}

def label(path): return path.parent.name

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder with a folder of sixteen small pictures for each colour"
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder/name).mkdir()
        for i in range(16):
            noisy = rng.normal(colour, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder/name/f'{i}.png')
    return folder

@pytest.fixture(scope='module')
def learn(pictures):
    dls = ImageDataLoaders.from_folder(pictures, valid_pct=0.25, seed=0, item_tfms=Resize(16), bs=8,
                                       num_workers=0, device=torch.device('cpu'))
    learn = vit_learner(dls, 'digits', lr=1e-3, path=pictures)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3)
    return learn

def test_export_and_load(learn, pictures, tmp_path):
    "export -> load_learner -> predict -> test_dl: the loaded Learner says what the trained one says"
    files = sorted(pictures.rglob('*.png'))
    learn.export(tmp_path/'export.pkl')
    loaded = load_learner(tmp_path/'export.pkl')
    assert list(loaded.dls.vocab) == sorted(CLASSES)

    with loaded.no_bar(): probs, _ = loaded.get_preds(dl=loaded.dls.test_dl(files, num_workers=0))
    with learn.no_bar(): before, _ = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))
    torch.testing.assert_close(probs, before)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(files)))
    truth = torch.tensor([sorted(CLASSES).index(label(f)) for f in files])
    assert (probs.argmax(1) == truth).float().mean() > 0.9

    for i in (0, 20, 40):
        with loaded.no_bar(): name, index, one = loaded.predict(files[i])
        assert name == loaded.dls.vocab[index] and index == one.argmax()
        torch.testing.assert_close(one, probs[i], atol=1e-5, rtol=1e-4)

def test_labels_in_a_table(pictures):
    "`from_df` and `from_csv` with their default columns: the first names the file, the second the label"
    files = sorted(pictures.rglob('*.png'))
    names = [f.relative_to(pictures).as_posix() for f in files]
    table = pd.DataFrame({'name': names, 'label': [label(f) for f in files]})
    table.to_csv(pictures/'labels.csv', index=False)
    options = dict(item_tfms=Resize(16), bs=8, num_workers=0, device=torch.device('cpu'))
    from_df = ImageDataLoaders.from_df(table, path=pictures, **options)
    from_csv = ImageDataLoaders.from_csv(pictures, 'labels.csv', **options)
    for dls in (from_df, from_csv):
        assert list(dls.vocab) == sorted(CLASSES) and len(dls.train_ds) + len(dls.valid_ds) == len(files)
        x, y = dls.one_batch()
        brightest = x.mean((2, 3)).argmax(1)                 # the channel of the colour
        assert [('red', 'green', 'blue')[c] for c in brightest] == [dls.vocab[k] for k in y]
