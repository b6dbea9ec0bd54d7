"""Pictures that are read while the model trains: the same images as in memory, each once, what may go wrong."""
import random

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image

from vit_nbdev import data
from vit_nbdev.data import describe, fact_lines, folder_dls
from vit_nbdev.photographs import BadPicture, PictureFiles, RandomCrop, cropped
from vit_nbdev.preprocessing import Preprocessing

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
