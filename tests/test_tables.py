"""Tables of file names and labels: read as meant, or refused with all that is wrong."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vit_nbdev.data import describe, fact_lines, folder_dls, table_dls
from vit_nbdev.learner import vit_learner
from vit_nbdev.photographs import PictureFiles
from vit_nbdev.preprocessing import Preprocessing

PREP = Preprocessing(8, [0.5]*3, [0.5]*3)
HOW = dict(bs=4, augment=False, device='cpu', preprocessing=PREP)

@pytest.fixture
def table(tmp_path):
    "20 pictures, each of a grey of its own; the odd ones are 'b'"
    for i in range(20): Image.new('RGB', (12, 10), (10*i,)*3).save(tmp_path/f'{i}.png')
    return pd.DataFrame(dict(file=[f'{i}.png' for i in range(20)], kind=['a', 'b']*10))

def greys(dl): return [(int(x[0, 0, 0])//10, y.tolist()) for x, y in (dl.dataset[i] for i in range(len(dl.dataset)))]

@pytest.mark.parametrize('stream', [False, True])
def test_each_image_has_its_label(table, tmp_path, stream):
    how = HOW | (dict(workers=0) if stream else {})
    dls = table_dls(table, tmp_path, 'file', 'kind', stream=stream, **how)
    seen = sorted(pair for dl in dls.loaders for pair in greys(dl))
    assert seen == [(i, i % 2) for i in range(20)] and list(dls.vocab) == ['a', 'b']
    assert [len(dl.dataset) for dl in dls.loaders] == [14, 3, 3]
    assert isinstance(dls.train_ds.x, PictureFiles) == stream

def test_a_csv_with_stray_spaces_and_splits(table, tmp_path):
    lines = [f' {f} , {c}\t, {["train", "Valid", " test"][i % 3]}' for i, (f, c) in enumerate(table.values)]
    (tmp_path/'t.csv').write_text('\n'.join(['file, kind ,part', *lines]))
    dls = table_dls(tmp_path/'t.csv', tmp_path, 'file', 'kind', split='part', **HOW)
    assert [greys(dl) for dl in dls.loaders] == [[(i, i % 2) for i in range(k, 20, 3)] for k in range(3)]

@pytest.mark.parametrize('stream', [False, True])
def test_several_labels_an_image(table, tmp_path, stream):
    table['kind'] = [';'.join([*['a ']*(i % 2), *[' b']*(i % 3 == 0), *['c']*(i > 9)]) or 'd' for i in range(20)]
    how = HOW | (dict(workers=0) if stream else {})
    dls = table_dls(table, tmp_path, 'file', 'kind', delim=';', stream=stream, **how)
    assert list(dls.vocab) == ['a', 'b', 'c', 'd']
    for i, y in (pair for dl in dls.loaders for pair in greys(dl)):
        expected = [float(i % 2 == 1), float(i % 3 == 0), float(i > 9)]
        assert y == [*expected, float(not any(expected))]
    learn = vit_learner(dls, 'digits')
    assert type(learn.loss_func).__name__ == 'BCEWithLogitsLossFlat' and learn.model.config.n_classes == 4
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.isfinite(torch.tensor(learn.recorder.values[-1][:2])).all()

def test_images_without_a_label_and_labels_of_one_image(table, tmp_path):
    "The first are said, the second stay in training, whatever the seed"
    table['kind'] = ['a;b', '', ' ;', float('nan'), *['a', 'b', ' a ;; b ']*5, 'rare']
    for seed in range(5):
        dls = table_dls(table, tmp_path, 'file', 'kind', delim=';', seed=seed, **HOW)
        assert [len(dl.dataset) for dl in dls.loaders] == [14, 3, 3] and list(dls.vocab) == ['a', 'b', 'rare']
        seen = dict(pair for dl in dls.loaders for pair in greys(dl))
        assert [seen[i] for i in (0, 1, 2, 3, 6, 19)] == [[1, 1, 0], *[[0, 0, 0]]*3, [1, 1, 0], [0, 0, 1]]
        assert (19, [0., 0., 1.]) in greys(dls.train)
    lines = fact_lines(describe(dls))
    assert 'note: 3 images have no label, and are taken for images of none of the classes' in lines
    assert 'note: the classes differ much in size: look at the F1 of each label' in lines
    with pytest.raises(ValueError, match='3 images are too few to set 1 apart for test'):
        table_dls(table.iloc[[0, 4, 19]].replace({'a': 'c'}), tmp_path, 'file', 'kind', delim=';', **HOW)

BAD = {
    'missing': (lambda t: t.replace({'file': {'3.png': 'x.png', '5.png': 'y.png'}}), {},
                '2 of 20 files are not there: .*x.png, .*y.png'),
    'column': (lambda t: t, dict(label='class'), "has no column class: its columns are file, kind"),
    'empty': (lambda t: t.replace({'kind': {'b': ' '}}), {}, "'kind' is empty in row 10, 12, 14, 16, 18 and 5 more"),
    'no row': (lambda t: t[:0], {}, 'holds no row'),
    'two columns of a name': (lambda t: pd.concat([t, t[['kind']]], axis=1), {}, "has two columns kind: rename one"),
    'twice': (lambda t: pd.concat([t, t[:1]]), {}, 'names 0.png twice'),
    'one class': (lambda t: t.assign(kind='a'), {}, 'has a to train with: two classes or more'),
    'split': (lambda t: t.assign(part='tset'), dict(split='part'), "'part' has tset, expected train, valid and test"),
    'no split': (lambda t: t.assign(part=['train', 'test', ' ', 'valid', '']*4), dict(split='part'),
                 "the column 'part' is empty in row 10, 13, 15, 18, 20 and 3 more"),
    'no split, by its usual name': (lambda t: t.assign(split=['train']*19 + ['']), {}, "'split' is empty in row 20"),
    'class in test': (lambda t: t.assign(part=['train']*19 + ['test'], kind=[*t.kind[:-1], 'new']), dict(split='part'),
                      'test has classes that train lacks: new'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_tables(name, table, tmp_path):
    change, kwargs, sentence = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        table_dls(change(table), tmp_path, **dict(name='file', label='kind') | kwargs, **HOW)

def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no table nowhere.csv'): table_dls('nowhere.csv')

def test_as_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(256, size=(9, 9, 3)).astype(np.uint8)).save(tmp_path/c/f'{i}.png')
    files = sorted(tmp_path.rglob('*.png'))
    table = pd.DataFrame(dict(name=files, label=[f.parent.name for f in files]))
    for one, other in zip(folder_dls(tmp_path, **HOW).loaders, table_dls(table, **HOW).loaders, strict=True):
        assert torch.equal(one.dataset.x, other.dataset.x) and torch.equal(one.dataset.y, other.dataset.y)
