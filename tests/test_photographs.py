"""Pictures that are read while the model trains: the same images as in memory, each once, what may go wrong."""
import ast, json, multiprocessing, os, random, time, warnings
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from vit_nbdev import data, photographs, runs
from vit_nbdev.cli import vit_train
from vit_nbdev.data import describe, fact_lines, folder_dls, table_dls
from vit_nbdev.learner import ViTLearner, load_checkpoint, vit_learner
from vit_nbdev.photographs import (BadPicture, PictureCache, PictureFiles, PictureRows, RandomCrop, cropped,
                                   dataset_dls)
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.report import percent
from vit_nbdev.runs import predict, save_run, train

PREP = Preprocessing(24, [0.4]*3, [0.3]*3)

@pytest.fixture
def folder(tmp_path):
    "Two classes of 12 pictures, 80 x 60 pixels, no two alike; some are grey, transparent or on their side"
    rng = np.random.default_rng(0)
    for c, name in enumerate(('a', 'b')):
        (tmp_path/name).mkdir()
        for i in range(12):
            small = Image.fromarray(rng.integers(256, size=(6, 8, 3)).astype(np.uint8))
            im, file = small.resize((80, 60), Image.Resampling.BICUBIC), tmp_path/name/f'{i}.jpg'
            if i == 3: im.convert('L').save(file)
            elif i == 4: im.convert('RGBA').save(file.with_suffix('.png'))
            elif i == 5:
                exif = Image.Exif()
                exif[0x0112] = 6
                im.save(file, exif=exif)
            else: im.save(file)
    return tmp_path

def loaders(path, **kwargs):
    random.seed(0)
    return folder_dls(path, **dict(bs=4, augment=[], device='cpu', preprocessing=PREP, stream=True, workers=0) | kwargs)

@pytest.mark.parametrize('how', ['crop', 'squash', 'border'])
def test_validation_and_test_are_those_of_memory(folder, how):
    prep = Preprocessing((20, 24), [0.4]*3, [0.3]*3, resize=how, interpolation='bicubic')
    kept = folder_dls(folder, bs=4, augment=[], device='cpu', preprocessing=prep, stream=False)
    streamed = loaders(folder, preprocessing=prep)
    assert streamed.preprocessing == kept.preprocessing and list(streamed.vocab) == list(kept.vocab)
    for i in (1, 2):
        assert torch.equal(kept[i].dataset.x, streamed[i].dataset.x[:])
        for (x, y), (x2, y2) in zip(kept[i], streamed[i], strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)

def test_a_crop_has_the_filter_of_the_preprocessing():
    "Of the nearest pixels, or without an average over all of them, if validation images are read so"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    def cut(**kwargs):
        return photographs._cut_out(pixels, (0, 0, 60, 60), False, replace(PREP, img_size=(12, 12), **kwargs))
    nearest = cut(interpolation='nearest').permute(1, 2, 0).flatten(0, 1)
    assert {*map(tuple, nearest.tolist())} <= {*map(tuple, pixels.reshape(-1, 3).tolist())}
    plain = cut(backend='torch', antialias=False).float().std()
    assert plain > 2*cut(backend='torch').float().std()        # an average over 25 pixels of noise is nearly grey

def test_statistics_are_those_of_memory(folder):
    kept = folder_dls(folder, img_size=16, device='cpu').preprocessing
    assert loaders(folder, img_size=16, preprocessing=None).preprocessing == kept

def test_each_image_once_an_epoch(folder):
    dls = loaders(folder, augment=False, bs=5)
    dls.train.drop_last = False
    seen = torch.cat([xb for xb, _ in dls.train]).flatten(1)
    assert len(seen) == len(dls.train_ds) == len(seen.unique(dim=0))

@pytest.mark.parametrize('size, ratio', [((2000, 1500), 8), ((500, 400), 2), ((250, 200), 1)])
def test_no_more_is_decoded_than_needed(tmp_path, monkeypatch, size, ratio):
    "A crop of the whole picture to 200 x 160: the decoder is asked for the least that is still as large"
    Image.new('RGB', size).save(tmp_path/'x.jpg')
    decoded = []
    monkeypatch.setattr(Preprocessing, 'in_channels', lambda self, im: decoded.append(im.size) or im.convert('RGB'))
    crop = RandomCrop((1., 1.), (1.25, 1.33))
    cropped(tmp_path/'x.jpg', Preprocessing((160, 200), [0]*3, [1]*3), crop, 0)
    assert decoded == [tuple(-(-side//ratio) for side in size)]

@pytest.mark.parametrize('turned', range(1, 9))
def test_a_crop_of_a_picture_on_its_side(tmp_path, turned):
    "The left half of what one sees is red, however the camera was held"
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:, :30, 0] = 255
    back = {1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
            4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
            7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270]}[turned]
    im, exif = Image.fromarray(upright), Image.Exif()
    for step in back: im = im.transpose(step)
    exif[0x0112] = turned
    im.save(tmp_path/'x.png', exif=exif)

    class Left(RandomCrop):
        def draw(self, h, w, seed):
            assert (h, w) == (40, 60)
            return (0, 0, 24, 40), False

    x = cropped(tmp_path/'x.png', Preprocessing(8, [0]*3, [1]*3), Left(), 0)
    assert torch.equal(x, torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))

def test_flip(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 40, 3)).astype(np.uint8)).save(tmp_path/'x.png')
    flipped = 0
    for seed in range(20):
        plain, mirrored = (cropped(tmp_path/'x.png', PREP, RandomCrop(flip=f), seed) for f in (False, True))
        same, other = torch.equal(plain, mirrored), torch.equal(plain.flip(-1), mirrored)
        assert same != other
        flipped += other
    assert flipped == 12

def test_errors_are_one_sentence(folder):
    whole = (folder/'a'/'0.jpg').read_bytes()
    (folder/'a'/'0.jpg').write_bytes(whole[:300])
    with pytest.raises(BadPicture, match='0.jpg can.t be read as an image'): loaders(folder)    # without a header
    (folder/'a'/'0.jpg').write_bytes(whole[:-400])
    dls = loaders(folder, workers=1)
    with pytest.raises(BadPicture) as e:
        for dl in dls: list(dl)
    assert str(e.value) == f"{folder/'a'/'0.jpg'} can't be read as an image: replace it or take it away"
    skipped = loaders(folder, skip_bad=True)
    assert sum(len(dl.dataset) for dl in skipped.loaders) == 23
    assert describe(skipped)['left_out'] == {"can't be read as an image": 1}

@pytest.mark.parametrize('split', [1, 2])
def test_what_is_not_trained_on_is_read_before_training(split, folder):
    "A header is not enough: a run that is trained would end at its test, and could not go on"
    bad = loaders(folder)[split].dataset.x.file(0)
    bad.write_bytes(bad.read_bytes()[:-400])
    sentence = f"1 of 8 pictures can't be used: {bad} can't be read as an image.*; --skip_bad .* goes on without"
    with pytest.raises(ValueError, match=sentence): loaders(folder)
    assert sum(len(dl.dataset) for dl in loaders(folder, skip_bad=True).loaders) == 23

@pytest.mark.parametrize('workers', [0, 1])
def test_a_name_with_a_line_break_is_whole(folder, workers):
    dls = loaders(folder, workers=workers, bs=4)
    bad = folder/'a'/'one\ntwo.jpg'
    bad.write_text('none')
    dls.train_ds.x.names = np.array([os.fsencode(bad)]*len(dls.train_ds))
    with pytest.raises(BadPicture) as e: list(dls.train)
    assert str(e.value) == f"{bad} can't be read as an image: replace it or take it away"

def test_what_a_sample_shows_is_said_of_the_sample(folder, monkeypatch):
    monkeypatch.setattr(PictureFiles, 'sample', lambda self: torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    lines = fact_lines(describe(loaders(folder)))
    assert 'note: 5 of a sample of 5 training images show a single colour' in lines

@pytest.mark.parametrize('workers, augment', [(0, []), (2, []), (0, False)])
def test_a_picture_that_turns_unreadable(folder, workers, augment):
    "Its batch does without it, label and all, and says so; in validation it is an error as before"
    dls = loaders(folder, skip_bad=True, workers=workers, bs=5, augment=augment)
    dls.train.drop_last = False
    ds = dls.train_ds
    bad = ds.x.file(3)
    bad.write_bytes(bad.read_bytes()[:-400])
    dls.valid_ds.x.file(1).write_bytes(b'none')
    ds.y = torch.arange(len(ds))                                  # to know them again
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        batches = list(dls.train)
    found = {int(k): x for xb, yb in batches for x, k in zip(xb, yb, strict=True)}
    assert sorted(found) == [k for k in range(len(ds)) if k != 3]
    for k, x in found.items():
        assert torch.allclose(x, PREP.normalise(ds.x.take(k, ds.crop, ds.seed)), atol=1e-6)
    if not workers: assert [str(w.message) for w in said] == \
        [f"{bad} can't be read as an image: replace it or take it away; the training goes on without it"]
    with pytest.raises(BadPicture, match="can't be read as an image"): list(dls.valid)
    for k in range(len(ds)): ds.x.file(k).write_bytes(b'none')
    with pytest.raises(BadPicture, match="no picture of a whole batch can be read: .* can't be read"): list(dls.train)

def test_grey_sixteen_bit_and_crop_arguments(tmp_path):
    deep = np.linspace(0, 65535, 64*64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path/'x.png')
    prep = Preprocessing(64, [0.5], [0.5], in_chans=1)
    whole = cropped(tmp_path/'x.png', prep, RandomCrop((1., 1.), (1., 1.)), 0)
    assert torch.equal(whole, prep(tmp_path/'x.png')) and whole.shape == (1, 64, 64)
    for bad in (dict(scale=(0., 1.)), dict(scale=(0.5, 0.2)), dict(ratio=(1.,)), dict(ratio=(-1., 1.))):
        with pytest.raises(ValueError, match='of a RandomCrop must be two numbers'): RandomCrop(**bad)

def test_it_streams_by_itself_if_memory_is_short(folder, monkeypatch, capsys):
    need = 24*3*16*16
    monkeypatch.setattr(data, '_memory', lambda n, prep: (need, need*5))
    small = folder_dls(folder, img_size=16, device='cpu')
    assert isinstance(small.train_ds.x, torch.Tensor) and capsys.readouterr().out == ''
    monkeypatch.setattr(data, '_memory', lambda n, prep: (need, need*3))
    large = folder_dls(folder, img_size=16, device='cpu')
    assert isinstance(large.train_ds.x, PictureFiles)
    assert 'more than 25% of the free memory: they are read as they are needed' in capsys.readouterr().out
    assert isinstance(folder_dls(folder, img_size=16, device='cpu', stream=False).train_ds.x, torch.Tensor)
    monkeypatch.setattr(data, 'num_distrib', lambda: 2)
    monkeypatch.setattr(data, '_memory', lambda n, prep: (need, need*5))        # two processes keep two copies
    assert isinstance(folder_dls(folder, img_size=16, device='cpu').train_ds.x, PictureFiles)
    with pytest.raises(ValueError, match='workers is for pictures that are streamed: say stream=True'):
        folder_dls(folder, stream=False, workers=2)

def test_what_it_says_of_itself(folder):
    "As in memory; copies are found byte by byte"
    (folder/'train').mkdir()
    for name in ('a', 'b'): (folder/name).rename(folder/'train'/name)
    for name in ('a', 'b'):
        (folder/'test'/name).mkdir(parents=True)
        for i in (0, 1):
            file = folder/'test'/name/f'{i}.jpg'
            Image.new('RGB', (80, 60), (i*90, 10, 10)).save(file)
        (folder/'test'/name/'copy.jpg').write_bytes((folder/'train'/name/'7.jpg').read_bytes())
    kept, streamed = describe(folder_dls(folder, device='cpu', preprocessing=PREP)), describe(loaders(folder))
    said = streamed.pop('stream')
    assert streamed == kept and kept['splits']['test']['also_in_train'] >= 1
    assert 'by 0 worker processes; in training random crops of 8% to 100% of their area' in said
    assert said in fact_lines(streamed | dict(stream=said))

def test_digest(folder):
    ds = loaders(folder).train_ds
    before = ds.digest()
    assert ds.digest() == before == loaders(folder).train_ds.digest()
    ds.y[0] = 1 - ds.y[0]
    assert ds.digest() != before
    ds.y[0] = 1 - ds.y[0]
    with open(ds.x.file(0), 'ab') as f: f.write(b'more')
    assert ds.digest() != before

@pytest.mark.parametrize('stream', [True, False])
def test_pictures_without_labels_can_be_shown(folder, stream):
    import matplotlib.pyplot as plt
    dls = folder_dls(folder, bs=4, augment=[], device='cpu', preprocessing=PREP, stream=stream)
    plt.close('all')
    dls.test_dl(sorted((folder/'a').iterdir())[:3]).show_batch()
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 3
    plt.close('all')

def test_test_dl_streams_files_and_keeps_images(folder):
    dls = loaders(folder)
    files = sorted((folder/'a').iterdir())
    dl = dls.test_dl(files)
    assert isinstance(dl.dataset.x, PictureFiles)
    assert torch.equal(torch.cat([b[0] for b in dl]), torch.cat([b[0] for b in dls.test_dl([PREP(f) for f in files])]))
    with_labels = dls.test_dl([(f, 1) for f in files], with_labels=True)
    assert torch.cat([b[1] for b in with_labels]).tolist() == [1]*len(files)

def test_the_seed_decides(folder):
    def epoch(seed):
        set_seed(seed)
        return torch.cat([xb for xb, _ in folder_dls(folder, bs=4, augment=[], device='cpu', preprocessing=PREP,
                                                     stream=True, workers=0).train])
    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))

def test_a_worker_that_dies_while_the_step_is_computed(folder, tmp_path, monkeypatch):
    "torch breaks into the step; the run stays as it was, and says how to go on"
    step = ViTLearner._do_one_batch
    def killing(self):
        if self.epoch == 1: multiprocessing.active_children()[0].kill(), time.sleep(60)
        step(self)
    monkeypatch.setattr(ViTLearner, '_do_one_batch', killing)
    with pytest.raises(OSError, match='reads pictures has died.*fewer workers.*; go on with: vit_train --resume'):
        train(folder, model='digits', img_size=16, bs=4, epochs=2, workers=1, device='cpu', out=tmp_path/'run')
    assert load_checkpoint(tmp_path/'run.part'/'checkpoint.pt')['epoch'] == 1

# --- a table of names and labels ---

@pytest.fixture
def table(folder):
    "A CSV file that names the folder's pictures, in columns of its own and with stray spaces"
    file = folder/'labels.csv'
    rows = [f' {f.relative_to(folder)}, {f.parent.name} ' for f in sorted(folder.rglob('*.*'))]
    file.write_text('\n'.join(['file , kind', *rows]) + '\n')
    return file

def test_a_table_is_the_folder_that_it_describes(folder, table):
    "From a CSV file and from a DataFrame, in memory and streamed"
    files, how = sorted(folder.rglob('?/*')), dict(bs=4, augment=False, device='cpu', preprocessing=PREP)
    frame = pd.DataFrame(dict(name=files, label=[f.parent.name for f in files]))
    expected = folder_dls(folder, **how)
    for dls in (table_dls(table, name='file', label='kind', **how), table_dls(frame, stream=True, workers=0, **how)):
        assert dls.preprocessing == expected.preprocessing and list(dls.vocab) == ['a', 'b']
        for a, b in zip(dls, expected, strict=True):
            assert torch.equal(a.dataset.x[:], b.dataset.x) and torch.equal(a.dataset.y, b.dataset.y)

def test_a_table_names_its_splits(folder, table):
    "A column `split` is taken as it is, and what it lacks is set apart"
    rows = pd.read_csv(table).rename(columns=str.strip)
    rows['split'] = [' Val ' if i % 6 == 5 else 'training' for i in range(24)]
    dls = table_dls(rows, folder, 'file', 'kind', img_size=8, bs=4, device='cpu')
    names = [[' '.join(map(str, pair)) for pair in zip(dl.dataset.y.tolist(), dl.dataset.x)] for dl in dls]
    expected = torch.stack([dls.preprocessing(folder/f.strip()) for f in rows['file'][5::6]])
    assert torch.equal(dls.valid_ds.x, expected) and [len(n) for n in names] == [17, 4, 3]
    assert 'splits: train is what the table calls training, valid is what the table calls val, test set apart from ' \
           'the training images' in fact_lines(describe(dls))
    assert table_dls(rows.drop(columns='split'), folder, 'file', 'kind', img_size=8, device='cpu').valid_ds.c == 2

def broken(file, rows):
    file.write_text('\n'.join(rows) + '\n')
    return file

TABLES = {   # the rows, and what is said of them
    'empty': ([], "labels.csv can't be read as a CSV file"),
    'no row': (['name,label'], 'labels.csv holds no row$'),
    'columns': (['file,kind', 'a/0.jpg,a'], 'no column label, name: its columns are file, kind; .*--columns'),
    'one column': (['name;label', 'a/0.jpg;a'], 'its columns are name;label; there is one only, so write commas'),
    'comma': (['name,label', 'a/0.jpg,a', 'b/0.jpg,b,even'], 'some rows have more fields .* double quotes'),
    'commas': (['name,label', 'a/0.jpg,a,even', 'b/0.jpg,b,even'], 'some rows have more fields .* double quotes'),
    'quote': (['name,label', 'a/0.jpg,"a', 'b/0.jpg,b'], "can't be read as a CSV file: .*EOF inside string"),
    'missing': (['name,label', 'a/0.jpg,a', 'a/x.jpg,b', 'a/y.jpg,b'], '2 of 3 files are not there: .*x.*y.*--path'),
    'no label': (['name,label', 'a/0.jpg,a', 'a/1.jpg, '], "column 'label' is empty in row 2"),
    'twice': (['name,label', 'a/0.jpg,a', 'a/0.jpg,b'], 'names a/0.jpg twice'),
    'one class': (['name,label', 'a/0.jpg,a', 'a/1.jpg, a'], 'has a to train with: two classes or more'),
    'not trained': (['name,label,split', 'a/0.jpg,a,valid', 'b/1.jpg,b,test'], 'has no class to train with'),
    'one to train': (['name,label,split', 'a/0.jpg,a,train', 'b/1.jpg,b,test'], 'has a to train with'),
    'one split': (['name,label,split', 'a/0.jpg,a,train', 'b/1.jpg,b,train', 'b/2.jpg,c,valid'],
                  'labels.csv: valid has classes that train lacks: c'),
    'splits': (['name,label,split', 'a/0.jpg,a,train', 'b/1.jpg,b,later'], "column 'split' has later, expected train"),
    'few': (['name,label', 'a/0.jpg,a', 'b/1.jpg,b'], "class 'a' has too few images .* splits train, valid and test"),
}

@pytest.mark.parametrize('case', TABLES)
def test_a_table_that_cant_be_used(case, folder):
    rows, said = TABLES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        table_dls(broken(folder/'labels.csv', rows), bs=4, device='cpu')

def test_a_table_that_is_no_text(tmp_path):
    (tmp_path/'latin.csv').write_bytes('name,label\na.jpg,caf\xe9\n'.encode('latin1'))
    with pytest.raises(ValueError, match="latin.csv can't be read as a CSV file: save it anew in UTF-8"):
        table_dls(tmp_path/'latin.csv')

def test_a_class_that_only_training_has_is_said(folder):
    rows = [f'{c}/{i}.jpg,{c},{"valid" if i > 9 and c == "a" else "train"}' for c in 'ab' for i in range(6, 12)]
    dls = table_dls(broken(folder/'labels.csv', ['name,label,split', *rows]), img_size=8, bs=4, device='cpu')
    assert 'note: the valid split has no image of b' in fact_lines(describe(dls))

def test_vit_train_on_a_table(folder, table, tmp_path, monkeypatch, capsys, no_pictures):
    "The run says what was understood, predicts, and goes on where it was stopped"
    monkeypatch.chdir(tmp_path)
    table = table.rename(tmp_path.parent/f'{tmp_path.name}.csv')
    how = dict(path=str(folder), model='digits', img_size=16, bs=4, device='cpu', epochs=1, columns='file,kind')
    vit_train.__wrapped__(str(table), stream=True, workers=0, **how)
    run = tmp_path/'runs'/tmp_path.name
    config = json.loads((run/'config.json').read_text())
    assert config['settings']['path'] == str(table) and config['settings']['pictures'] == str(folder)
    out = capsys.readouterr().out
    assert config['n_test'] == 4 and '16 images to train' in out
    assert out.count('--pretrained') == out.count('hint    8 training images a class are few') == 1
    assert predict(run, folder/'a'/'0.jpg', device='cpu')[0]['class'] in ('a', 'b')
    with pytest.raises(SystemExit, match='vit_train: .*no column label, name: its columns are file, kind'):
        vit_train.__wrapped__(str(table), **how | dict(columns=None))
    with pytest.raises(SystemExit, match="columns is 'file', expected name,label or name,label,split"):
        vit_train.__wrapped__(str(table), **how | dict(columns='file'))
    with pytest.raises(SystemExit, match='--columns is for a CSV file'):
        vit_train.__wrapped__(str(folder), columns='file,kind', device='cpu')
    with pytest.raises(SystemExit, match='there is no table nowhere.csv'): vit_train.__wrapped__('nowhere.csv')

def test_a_run_on_a_table_goes_on(folder, table, tmp_path, no_pictures):
    "Also where the table and the pictures have moved"
    (folder/'here').mkdir()
    for name in 'ab': (folder/name).rename(folder/'here'/name)
    how = dict(path=folder/'here', model='digits', img_size=16, bs=4, device='cpu', columns='file,kind')
    whole = train(table, epochs=2, out=tmp_path/'whole', **how)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, '_finish', lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): train(table, epochs=2, out=tmp_path/'run', **how)
    table, there = table.rename(folder/'moved.csv'), (folder/'here').rename(folder/'there')
    with pytest.raises(FileNotFoundError, match='labels.csv: say with --data where'): train(resume=tmp_path/'run')
    again = train(table, path=there, resume=tmp_path/'run')
    assert (again/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes()

def test_vit_train_on_several_labels(folder, tmp_path, monkeypatch, capsys):
    "Trained with a loss for each label, tested by the right sets and by F1, drawn, and predicted"
    monkeypatch.chdir(tmp_path)
    truth = {f'{c}/{i}.{"png" if i == 4 else "jpg"}': ([c] if i % 4 else []) + ['even']*(i % 2 == 0) for c in 'ab'
             for i in range(12)}
    rows = [f'{f}, {"|".join(cs)} ,{"test" if i % 3 else "train"}' for i, (f, cs) in enumerate(truth.items())]
    table = broken(tmp_path/'some.csv', ['name,label,split', *rows])
    monkeypatch.setattr(runs, '_FEW', 2)
    vit_train.__wrapped__(str(table), path=str(folder), delim='|', model='digits', img_size=16, bs=4, device='cpu',
                          epochs=2, lr=1e-2, tta=True)
    run, out = tmp_path/'runs'/'some', capsys.readouterr().out
    config, test = json.loads((run/'config.json').read_text()), [row.split(',')[0] for row in rows if 'test' in row]
    found = predict(run, [folder/f for f in test], device='cpu')
    assert config['test_accuracy'] == np.mean([r['classes'] == truth[f] for f, r in zip(test, found)])
    sets = MultiLabelBinarizer(classes=['a', 'b', 'even'])
    y, said = (sets.fit_transform(x) for x in ([truth[f] for f in test], [r['classes'] for r in found]))
    assert config['mean_f1'] == pytest.approx(f1_score(y, said, average='macro', zero_division=0)) != 0
    assert [r['n'] for r in config['class_results']] == y.sum(0).tolist()
    assert [r['said'] for r in config['class_results']] == said.sum(0).tolist()
    assert 'tta_accuracy' in config and 'hint' not in out       # 8 images of 3 labels
    assert f"mean F1 of the labels {percent(config['mean_f1'])}" in out
    assert {p.stem for p in run.glob('*.png')} == {'curves', 'predictions', 'mistakes', 'augmented'}
    page = (run/'report.html').read_text()
    assert 'with all their labels and no other' in page
    assert 'in red, with the true labels.' in page and 'Accuracy of each class' not in page
    lines = pd.read_csv(run/'metrics.csv')
    best = lines.sort_values(['f1_score', 'valid_loss'], ascending=[False, True]).epoch.iloc[0] + 1
    assert list(lines)[3:] == ['f1_score', 'accuracy_multi'] and config.get('best_epoch', len(lines)) == best

def test_delim_is_for_tables_whose_images_have_several_labels(folder, table):
    with pytest.raises(SystemExit, match='--delim is for a CSV file'): vit_train.__wrapped__(str(folder), delim=';')
    with pytest.raises(SystemExit, match="labels.csv: no image has two labels with ';' between them"):
        vit_train.__wrapped__(str(table), path=str(folder), columns='file,kind', delim=';', device='cpu')
    rows = [f'{c}/{i}.jpg,{c};{i % 2}' for c in 'ab' for i in range(6, 12)]
    with pytest.raises(SystemExit, match='class_weights needs one class an image'):
        vit_train.__wrapped__(str(broken(table, ['name,label', *rows])), delim=';', class_weights=True, img_size=8,
                              model='digits', device='cpu')

def test_several_labels_an_image(folder, tmp_path):
    "In Python: the loaders, a fit, a run folder that predicts a probability for each label"
    rows = [f'{c}/{i}.jpg,{c}; {"even" if i % 2 == 0 else ""}' for c in 'ab' for i in range(6, 12)]
    dls = table_dls(broken(folder/'labels.csv', ['name,label', *rows]), delim=';', img_size=8, bs=4, augment=False,
                    device='cpu')
    assert list(dls.vocab) == ['a', 'b', 'even'] and dls.preprocessing.several
    assert sorted(map(tuple, torch.cat([dl.dataset.y for dl in dls]).tolist())) == sorted(
        (float(c == 'a'), float(c == 'b'), float(i % 2 == 0)) for c in 'ab' for i in range(6, 12))
    learn = vit_learner(dls, 'digits')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    found = predict(save_run(learn, tmp_path/'run'), folder/'a'/'6.jpg', device='cpu')[0]
    learn.model.eval()
    with torch.no_grad(): p = learn.model(dls.preprocessing.normalise(dls.preprocessing(folder/'a'/'6.jpg'))[None])
    assert found['probabilities'] == pytest.approx(p.sigmoid()[0].tolist(), abs=1e-6)
    dl = dls.train.new(shuffle=False, drop_last=False)
    with learn.no_bar(), learn.no_logging(): said, y = learn.get_preds(dl=dl)
    measured = dict(zip(learn.metrics.attrgot('name'), learn.validate(dl=dl)[1:]))
    assert measured['f1_score'] == f1_score(y, said > 0.5, average='macro', zero_division=0) > 0
    assert measured['accuracy_multi'] == pytest.approx(((said > 0.5) == y).float().mean().item())

# --- decoded pictures on disk ---

LARGE = Preprocessing(48, [0.4]*3, [0.3]*3)       # 80 x 60 pixels are kept whole

def epochs(dls, n=2): return [torch.cat([xb for xb, _ in dl]) for dl in [*[dls.train]*n, dls.valid, dls[2]]]

def kept(cache): return sorted(cache.rglob('*.safetensors'))

@pytest.mark.parametrize('workers', [0, 2])
def test_a_cache_changes_no_pixel(folder, tmp_path, monkeypatch, workers):
    "While it is written and when it is read; then no picture is decoded"
    cache, plain = tmp_path/'cache', epochs(loaders(folder, preprocessing=LARGE))
    for _ in range(2):
        dls = loaders(folder, preprocessing=LARGE, cache=cache, workers=workers)
        for a, b in zip(epochs(dls), plain, strict=True): assert torch.equal(a, b)
        assert f'what was decoded is kept in {cache}' in dls.stream
        monkeypatch.setattr(photographs, 'open_image', lambda *_, **__: 1/0)
        monkeypatch.setattr(Preprocessing, '__call__', lambda *_: 1/0)
    assert len(kept(cache)) == 24 and not list(cache.rglob('.*'))

def test_what_a_cache_keeps_of_a_large_picture(tmp_path):
    "One and a half times what the model wants; the whole of it differs by little from that of the file"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(6, 8, 3)).astype(np.uint8)) \
        .resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path/'x.jpg', quality=95)
    plain, files = (PictureFiles([tmp_path/'x.jpg'], PREP) for _ in range(2))
    files.cache, whole = PictureCache(tmp_path/'cache', PREP), RandomCrop((1., 1.), (1.3, 1.4))
    difference = files.take(0, whole).float() - plain.take(0, whole).float()
    assert 0 < difference.abs().mean() < 1 and difference.abs().max() < 12
    assert [load_file(f)['pixels'].shape for f in kept(tmp_path/'cache')] == [(36, 48, 3)]
    a, b, c = (files.take([0]*20, RandomCrop(), seed) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_a_cache_keeps_as_much_of_a_picture_on_its_side(tmp_path):
    "A camera's note turns height and width around, also where JPEG is decoded at a reduced scale"
    im, exif = Image.new('RGB', (1200, 400)), Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path/'turned.jpg', exif=exif)
    im.transpose(Image.Transpose.ROTATE_270).save(tmp_path/'upright.jpg')
    wide = PictureCache(tmp_path/'cache', replace(PREP, img_size=(40, 160)))
    turned, upright = (wide._reduced(tmp_path/f'{name}.jpg').shape for name in ('turned', 'upright'))
    assert turned == upright == (720, 240, 3)

def test_a_cache_follows_the_files(folder, tmp_path):
    "A damaged entry is made again, a changed picture is read anew"
    files = sorted((folder/'a').iterdir())
    x = PictureFiles(files, PREP)
    x.cache = PictureCache(tmp_path/'cache', PREP)
    before = x[:]
    for entry, rest in zip(kept(tmp_path/'cache'), (b'', b'none', None)):
        entry.write_bytes(entry.read_bytes()[:300] if rest is None else rest)
    assert torch.equal(x[:], before)
    for entry in kept(tmp_path/'cache'): assert load_file(entry)['pixels'].shape == (3, 24, 24)
    Image.new('RGB', (80, 60), 'red').save(files[0])
    assert torch.equal(x[0], PREP(files[0])) and not torch.equal(x[0], before[0])

def test_a_cache_without_shared_memory(folder, tmp_path, monkeypatch):
    def refused(self): raise RuntimeError('unable to open shared memory object')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', refused)
    PictureCache(tmp_path/'cache', PREP)

def test_a_cache_parses_no_python(folder, tmp_path, monkeypatch):
    "Its pictures are read in threads, two of which may not parse at once in Python 3.11 (python/cpython#106905)"
    x = PictureFiles(sorted((folder/'a').iterdir()), PREP)
    x.cache = PictureCache(tmp_path/'cache', PREP)
    before, crop = x[:], x.take([0], RandomCrop(), seed=1)
    def parse(*args, **kwargs): raise SystemError('AST constructor recursion depth mismatch')
    with monkeypatch.context() as m:        # pytest itself parses what it reports
        m.setattr(ast, 'parse', parse)
        m.setattr(Image, 'open', None)
        again = x[:], x.take([0], RandomCrop(), seed=1)
    assert torch.equal(again[0], before) and torch.equal(again[1], crop)

def test_a_disk_that_fills(folder, tmp_path):
    "One sentence, no half file, and the images that there would have been"
    resource = pytest.importorskip('resource', reason='no limits to files here')
    cache, plain = tmp_path/'cache', epochs(loaders(folder))
    dls, (soft, hard) = loaders(folder, cache=cache, skip_bad=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            found = epochs(dls)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [str(w.message) for w in said] == [f'the cache {cache} takes no more pictures (File too large): '
                                              'the others are decoded each time']
    for a, b in zip(found[2:], plain[2:], strict=True): assert torch.equal(a, b)
    assert [p.name for p in cache.rglob('*') if p.is_file()] == ['cache.json']

def test_what_is_no_cache(folder, tmp_path):
    cache = tmp_path/'cache'
    loaders(folder, cache=cache)
    loaders(folder, cache=cache, preprocessing=replace(PREP, mean=(0.1,)*3))        # no other pixels
    with pytest.raises(ValueError, match='cache is of other settings .img_size.: give another folder, or delete it'):
        loaders(folder, cache=cache, preprocessing=LARGE)
    border, bordered = replace(PREP, resize='border'), tmp_path/'bordered'
    loaders(folder, cache=bordered, preprocessing=border)
    with pytest.raises(ValueError, match='bordered is of other settings .mean.'):       # it is the grey of the border
        loaders(folder, cache=bordered, preprocessing=replace(border, mean=(0.1,)*3))
    loaders(folder, cache=tmp_path/'grey', preprocessing=replace(border, fill=128))
    loaders(folder, cache=tmp_path/'grey', preprocessing=replace(border, fill=128, mean=(0.1,)*3))
    (cache/'cache.json').write_text('{')
    with pytest.raises(ValueError, match='cache is of other settings'): loaders(folder, cache=cache)
    with pytest.raises(ValueError, match='holds other things than a cache: give an empty folder'):
        loaders(folder, cache=folder)
    with pytest.raises(OSError, match="can't write the cache .*0.jpg .*: give another folder"):
        loaders(folder, cache=folder/'a'/'0.jpg')
    with pytest.raises(ValueError, match='cache is for pictures that are streamed'):
        folder_dls(folder, stream=False, cache=cache)

def test_vit_train_with_a_cache(folder, tmp_path, monkeypatch, no_pictures):
    "A second run decodes no picture to train on"
    monkeypatch.chdir(tmp_path)
    how = dict(model='digits', img_size=48, bs=4, device='cpu', epochs=1, workers=0, cache='kept')
    (folder/'pictures').mkdir()
    for name in 'ab': (folder/name).rename(folder/'pictures'/name)
    vit_train.__wrapped__(str(folder/'pictures'), out='one', **how)
    n, settings = len(kept(tmp_path/'kept')), json.loads((tmp_path/'one'/'config.json').read_text())['settings']
    vit_train.__wrapped__(str(folder/'pictures'), out='two', **how)
    one, two = ((tmp_path/name/'metrics.csv').read_text() for name in ('one', 'two'))
    assert one == two and len(kept(tmp_path/'kept')) == n > 24 and settings['cache'] == str(tmp_path/'kept')

# --- a data set of Hugging Face ---

@pytest.fixture
def rows(folder):
    "The folder's pictures as a data set"
    datasets = pytest.importorskip('datasets', reason='the extra `datasets` is not installed')
    files = sorted(folder.rglob('?/*'))
    columns = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    return datasets.Dataset.from_dict(dict(image=list(map(str, files)), label=[f.parent.name for f in files]), columns)

@pytest.mark.parametrize('values', [[[0.5]*8]*8, [[300]*8]*8])
def test_rows_of_numbers_that_are_no_pixels(values):
    datasets = pytest.importorskip('datasets', reason='the extra `datasets` is not installed')
    columns = datasets.Features(image=datasets.Sequence(datasets.Sequence(datasets.Value('float32' if values[0][0] < 1
                                else 'int64'))), label=datasets.ClassLabel(names=['a', 'b']))
    rows = datasets.Dataset.from_dict(dict(image=[values]*24, label=['a', 'b']*12), columns)
    with pytest.raises(ValueError, match='expected whole numbers from 0 to 255'):
        dataset_dls(rows, img_size=8, in_chans=1, bs=4, device='cpu')
    with pytest.raises(ValueError, match="workers is for pictures that are read as they are needed: say stream=True"):
        dataset_dls(rows, img_size=8, bs=4, device='cpu', stream=False, workers=1)

def test_rows_of_black_and_white():
    datasets = pytest.importorskip('datasets', reason='the extra `datasets` is not installed')
    columns = datasets.Features(image=datasets.Sequence(datasets.Sequence(datasets.Value('bool'))))
    rows = datasets.Dataset.from_dict(dict(image=[[[True, False]]*2]), columns)
    prep = Preprocessing(2, [0.5], [0.5], in_chans=1)
    assert torch.equal(PictureRows(rows, 'image', [0], prep).read(0), prep(np.array([[True, False]]*2)))

def test_rows_are_the_folder(folder, rows):
    "In memory and streamed, in this process and in others"
    how = dict(bs=4, augment=False, device='cpu', preprocessing=PREP)
    expected = folder_dls(folder, **how)
    for more in (dict(stream=True, workers=0), dict(stream=True, workers=2), {}):
        dls = dataset_dls(rows, **how, **more)
        assert dls.preprocessing == expected.preprocessing and list(dls.vocab) == ['a', 'b']
        for i in (1, 2):
            for (x, y), (x2, y2) in zip(dls[i], expected[i], strict=True):
                assert torch.equal(x, x2) and torch.equal(y, y2)
        assert isinstance(dls.train_ds.x, PictureRows if more else torch.Tensor)

def test_rows_are_cropped_as_files(folder, rows):
    files, x = PictureFiles(sorted(folder.rglob('?/*')), LARGE), PictureRows(rows, 'image', range(24), LARGE)
    for i in range(24): assert torch.equal(files.take(i, RandomCrop(flip=True), 7), x.take(i, RandomCrop(flip=True), 7))
    assert x.sizes().tolist() == files.sizes().tolist()

def test_rows_with_splits_and_names(rows):
    "Splits of the data set are kept, labels may be words, and a summary can be given"
    import datasets
    words = rows.cast_column('label', datasets.Value('string'))
    words = words.map(lambda row: dict(label=' yes ' if row['label'] == '0' else 'no'))
    parts = datasets.DatasetDict(train=words.select(range(0, 24, 2)), validation=words.select(range(1, 24, 2)))
    dls = dataset_dls(parts, img_size=16, bs=4, device='cpu', stream=True, workers=0)
    assert list(dls.vocab) == ['no', 'yes'] and [len(dl.dataset) for dl in dls] == [10, 12, 2]
    for i in range(12): assert torch.equal(dls.valid_ds.x[i], dls.preprocessing(words[2*i + 1]['image']))
    assert dls.valid_ds.y.tolist() == [1]*6 + [0]*6
    assert describe(dls)['splits']['valid']['also_in_train'] == 0
    before = dls.train_ds.digest()
    dls.train_ds.y[0] = 1 - dls.train_ds.y[0]
    assert dls.train_ds.digest() != before

def test_a_stream_of_rows_is_read_once(rows, monkeypatch, tmp_path):
    "It gives the batches of the table that it came from, its pictures as they were stored"
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path/'cache'))
    how = dict(bs=4, augment=False, device='cpu', preprocessing=PREP)
    expected, passes = dataset_dls(rows, **how), []
    def seen():
        passes.append(1)
        yield from rows
    stream = datasets.IterableDataset.from_generator(seen, features=rows.features)
    nameless = datasets.IterableDataset.from_generator(lambda: iter(rows))
    for given, more in ((stream, dict(stream=True, workers=2)), (rows.to_iterable_dataset(), {}), (nameless, {})):
        dls = dataset_dls(given, **how, **more)
        assert list(dls.vocab) == (['0', '1'] if given is nameless else ['a', 'b'])
        for dl, other in zip(dls, expected, strict=True):
            assert torch.equal(dl.dataset.x[:], other.dataset.x) and torch.equal(dl.dataset.y, other.dataset.y)
    assert len(passes) == 1 and sum(1 for _ in (tmp_path/'cache').glob('streamed-*')) == 3
    stored = rows.cast_column('image', datasets.Image(decode=False))
    again = stored.to_iterable_dataset().cast(rows.features)
    kept = dataset_dls(again, stream=True, workers=0, **how).train_ds.x.dataset
    assert kept.cast_column('image', datasets.Image(decode=False))[:]['image'] == stored[:]['image']
    with pytest.raises(ValueError, match='train has no column label: its columns are image, kind'):
        dataset_dls(rows.rename_column('label', 'kind').to_iterable_dataset(), **how)
    def broken_off():
        yield rows[0]
        raise ConnectionError('no route to host')
    before = set((tmp_path/'cache').glob('streamed-*'))
    with pytest.raises(OSError, match=r'^the stream broke off before its end \(no route to host\): try again'):
        dataset_dls(datasets.IterableDataset.from_generator(broken_off, features=rows.features), **how)
    assert set((tmp_path/'cache').glob('streamed-*')) == before

def test_rows_that_cant_be_used(rows, folder):
    how = dict(bs=4, device='cpu', preprocessing=PREP, stream=True, workers=0)
    words = rows.remove_columns('label').add_column('label', ['a']*12 + ['b']*12)
    for bad, said in ((dict(train=words.select(range(12)), test=words), 'has labels that train lacks: b'),
                      (rows.rename_column('label', 'kind'), 'train has no column label: its columns are image, kind'),
                      (rows.map(lambda row: dict(label=-1)), 'train has 24 rows without a label: leave them out'),
                      (dict(train=rows, more=rows), 'has splits more, expected train'),
                      (dict(train=rows, dev=rows, validation=rows), 'dev, validation mean the same split'),
                      (dict(test=rows), 'has no split to train with: call it train')):
        with pytest.raises(ValueError, match=said): dataset_dls(bad, **how)
    with pytest.raises(ValueError, match='a cache is for files: leave it out'): dataset_dls(rows, cache='x', **how)
    (folder/'b'/'11.jpg').write_bytes((folder/'b'/'11.jpg').read_bytes()[:400])
    i = [f.name for f in sorted(folder.rglob('?/*'))].index('11.jpg', 12)
    with pytest.raises(BadPicture, match=f"^row {i}: it can't be read as an image"):
        PictureRows(rows, 'image', range(24), PREP)[i]

@pytest.mark.parametrize('backend', ['pillow', 'torch'])
def test_what_cant_be_read_is_left_out_of_a_stream(backend, folder):
    (folder/'a'/'bad.jpg').write_bytes(b'no image')
    dls = folder_dls(folder, preprocessing=replace(PREP, backend=backend), stream=True, skip_bad=True, bs=4,
                     workers=0, device='cpu')
    assert sum(len(dl.dataset) for dl in dls.loaders) == 24

# --- files that are turned, hidden or oddly named ---

@pytest.mark.parametrize('kind', ['tif', 'jpg', 'png'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_is_cropped_as_it_stands(kind, orientation, tmp_path):
    "The whole picture as a crop is what the preprocessing makes of it, and its size is that of the upright picture"
    x = np.zeros((60, 140, 3), np.uint8)
    x[:30, :70, 0], x[30:, 70:, 1], x[..., 2] = 250, 250, np.linspace(0, 250, 140)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path/f'picture.{kind}'
    Image.fromarray(x).save(file, exif=exif)
    h, w = (140, 60) if orientation > 4 else (60, 140)
    prep = Preprocessing((24, 24), [0.5]*3, [0.5]*3, resize='squash')
    whole = RandomCrop((1, 1), (w/h,)*2)
    assert PictureFiles([file], prep).sizes().tolist() == [[h, w]]
    assert (prep(file).float() - cropped(file, prep, whole, 0).float()).abs().mean() < 3

def test_hidden_folders_do_not_say_what_a_folder_holds(folder):
    for file in folder.rglob('1?.*'): file.unlink()          # what is hidden is the larger part
    for file in folder.glob('b/*'): file.unlink()
    for name in ('.thumbs', 'a/.thumbs'):
        (folder/name).mkdir()
        for i in range(30): Image.new('RGB', (8, 8)).save(folder/name/f'{i}.png')
    assert runs._side(folder, None, None) == 60

def test_a_name_that_is_no_utf8(folder, tmp_path_factory):
    "As an old archive unpacks it: streamed, cached, and told apart from another name"
    old = folder/'a'/'0.jpg'
    odd = folder/'a'/os.fsdecode(b'M\xe4dchen.jpg')
    try: old.rename(odd)
    except OSError: pytest.skip('this file system takes UTF-8 alone')
    cache = tmp_path_factory.mktemp('cache')
    dls = folder_dls(folder, img_size=24, bs=4, device='cpu', stream=True, workers=0, cache=cache)
    for dl in dls: assert len(list(dl)) > 0
    assert all(photographs.StreamedImages.digest(dl.dataset) for dl in dls)

def test_two_processes_that_begin_a_cache_at_once(tmp_path, monkeypatch):
    "The other has written its settings, and a picture, between the two questions of this one"
    listed, cache = type(tmp_path).iterdir, tmp_path/'cache'
    def late(folder):
        monkeypatch.setattr(type(tmp_path), 'iterdir', listed)
        PictureCache(cache, PREP)
        (cache/'00').mkdir()
        return listed(folder)
    monkeypatch.setattr(type(tmp_path), 'iterdir', late)
    PictureCache(cache, PREP)
    with pytest.raises(ValueError, match='holds other things than a cache'): PictureCache(tmp_path, PREP)
    cache = tmp_path/'other'
    monkeypatch.setattr(type(tmp_path), 'iterdir', late)
    with pytest.raises(ValueError, match='is of other settings'): PictureCache(cache, replace(PREP, resize='squash'))
    assert sorted(p.name for p in cache.iterdir()) == ['00', 'cache.json']

def test_batches_that_are_lost_on_their_way(folder, monkeypatch):
    "A reading process without shared memory prints what is wrong and goes on with the next batch"
    dls, whole = loaders(folder), photographs.TensorDL.__iter__
    assert len(list(dls.train)) == len(dls.train) > 2
    monkeypatch.setattr(photographs.TensorDL, '__iter__', lambda self: islice(whole(self), 1, None))
    with pytest.raises(OSError, match='1 of . batches were lost .*/dev/shm.*fewer --workers, or smaller batches'):
        list(dls.train)
    next(iter(dls.train))                                    # who stops by himself loses nothing

def test_reading_processes_that_give_nothing(folder, monkeypatch):
    monkeypatch.setattr(photographs, 'PATIENCE', 1)
    monkeypatch.setattr(PictureFiles, 'take', lambda *args, **kwargs: time.sleep(30))
    with pytest.raises(OSError, match='gave none for 1 seconds: try fewer .--workers, 0: none beside this one.'):
        list(loaders(folder, workers=1).valid)

def test_reading_processes_are_counted_as_they_are(folder, monkeypatch):
    "fastai has none on a Mac"
    assert 'by 2 worker processes' in loaders(folder, workers=2).stream
    monkeypatch.setattr('sys.platform', 'darwin')
    assert 'by 0 worker processes' in loaders(folder, workers=2).stream
