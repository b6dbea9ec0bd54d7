"""Data sets as people keep them: what counts, what is understood, what is said, what is refused."""
import gzip, mimetypes, os, pickle, re, shutil, zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from vit_nbdev import data
from vit_nbdev.data import (cifar10_dls, describe, fact_lines, find_images, folder_dls, left_out_line, mnist_dls,
                            tensor_dls)

@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    "Six files of 24 images; their checksums are other than the real ones', so none is asked for"
    monkeypatch.setattr(CIFAR10, 'train_list', [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, 'test_list', [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': None})
    folder, rng = tmp_path/CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {'data': rng.integers(256, size=(24, 3072), dtype=np.uint8), 'labels': [i % 2 for i in range(24)]}
        (folder/name).write_bytes(pickle.dumps(batch))
    (folder/'batches.meta').write_bytes(pickle.dumps({'label_names': ['aeroplane', 'car']}))
    return folder

def test_cifar10(fake_cifar):
    "Every image of the test file arrives, channels first, with its label"
    dls = cifar10_dls(fake_cifar.parent, bs=8, device='cpu')
    assert [len(dl.dataset) for dl in dls] == [110, 10, 24]
    raw = pickle.loads((fake_cifar/'test_batch').read_bytes())
    assert torch.equal(dls[2].dataset.x, torch.from_numpy(raw['data']).view(24, 3, 32, 32))
    assert dls[2].dataset.y.tolist() == raw['labels'] and dls.vocab[1] == 'car'
    assert dls.one_batch()[0].shape == (8, 3, 32, 32)

def test_damaged_cifar10(fake_cifar):
    (fake_cifar/'data_batch_3').write_bytes(b'cut off')
    with pytest.raises(ValueError, match='does not hold CIFAR10 .*: delete the folder to fetch it again'):
        cifar10_dls(fake_cifar.parent)

# --- the files of MNIST ---

def write_mnist(path, n=130, side=(28, 28), classes=10, packed=False):
    "A small data set in the layout of MNIST"
    raw = path/'MNIST'/'raw'
    raw.mkdir(parents=True, exist_ok=True)
    for part in ('train', 't10k'):
        for name, x in (('images-idx3', np.random.default_rng(0).integers(256, size=(n, *side))),
                        ('labels-idx1', np.arange(n) % classes)):
            head = bytes([0, 0, 8, x.ndim]) + b''.join(s.to_bytes(4, 'big') for s in x.shape)
            content = head + x.astype(np.uint8).tobytes()
            file = raw/f'{part}-{name}-ubyte'
            if packed: Path(f'{file}.gz').write_bytes(gzip.compress(content))
            else: file.write_bytes(content)
    return path

def fewer_labels(path):
    file = write_mnist(path)/'MNIST'/'raw'/'train-labels-idx1-ubyte'
    file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 99]) + file.read_bytes()[8:107])

def a_pipe(path):
    write_mnist(path)
    (path/'MNIST'/'raw'/'t10k-labels-idx1-ubyte').unlink()
    os.mkfifo(path/'MNIST'/'raw'/'t10k-labels-idx1-ubyte')

ODD_MNIST = {
    'fewer labels': (fewer_labels, 'training there are 130 images but 99 labels'),
    'one class':    (lambda path: write_mnist(path, classes=1), 'training images lack the classes 1, 2, 3'),
    'nine classes': (lambda path: write_mnist(path, classes=9), 'training images lack the classes 9'),
    '32 x 32':      (lambda path: write_mnist(path, side=(32, 32)), r'images are \(32, 32\) pixels, expected \(28'),
    '28 x 30':      (lambda path: write_mnist(path, side=(28, 30)), r'images are \(28, 30\) pixels, expected \(28'),
    '1 x 1':        (lambda path: write_mnist(path, side=(1, 1)), r'images are \(1, 1\) pixels, expected \(28'),
    'ten images':   (lambda path: write_mnist(path, n=10), '10 images of 10 classes are too few to set 1 apart'),
    'a pipe':       (a_pipe, 't10k-labels-idx1-ubyte is no ordinary file'),
}

@pytest.mark.parametrize('name', ODD_MNIST)
def test_counts_shapes_and_classes_of_mnist(name, tmp_path):
    make, sentence = ODD_MNIST[name]
    make(tmp_path)
    with pytest.raises(ValueError, match=sentence): mnist_dls(tmp_path, device='cpu')

def test_packed_mnist_is_unpacked(tmp_path):
    dls = mnist_dls(write_mnist(tmp_path/'a', packed=True), bs=10, device='cpu')
    same = mnist_dls(write_mnist(tmp_path/'b'), bs=10, device='cpu')
    assert all(torch.equal(x.dataset.x, y.dataset.x) for x, y in zip(dls, same))
    packed = write_mnist(tmp_path/'c', packed=True)/'MNIST'/'raw'/'train-images-idx3-ubyte.gz'
    packed.write_bytes(packed.read_bytes()[:-900])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz can't be unpacked"): mnist_dls(tmp_path/'c')
    assert not list(packed.parent.glob('*.tmp')) and not (packed.parent/'train-images-idx3-ubyte').exists()

def test_labels_and_classes_of_cifar10(fake_cifar):
    for name, _ in CIFAR10.train_list:
        batch = pickle.loads((fake_cifar/name).read_bytes())
        (fake_cifar/name).write_bytes(pickle.dumps(batch | {'labels': [0]*24}))
    with pytest.raises(ValueError, match='does not hold CIFAR10: training images lack the classes car'):
        cifar10_dls(fake_cifar.parent)
    for name, _ in CIFAR10.train_list:
        (fake_cifar/name).write_bytes(pickle.dumps(batch | {'labels': [0]*23}))
    with pytest.raises(ValueError, match='training there are 120 images but 115 labels'):
        cifar10_dls(fake_cifar.parent)

# --- a folder of images: what counts, what is a class, what is said ---

def paint(path, *names, n=6, size=(12, 12), kind='png'):
    "A folder per class with `n` small pictures, no two of them alike"
    for c, name in enumerate(names):
        (path/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            rng = np.random.default_rng(zlib.crc32(f'{path.name}{name}{i}'.encode()))
            pixels = rng.integers(256, size=(*size[::-1], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path/name/f'{i}.{kind}')

def load(path, **kwargs): return folder_dls(path, **dict(img_size=8, bs=4, augment=False, device='cpu') | kwargs)

def facts(path, **kwargs): return describe(load(path, **kwargs))

def images(f): return {name: s['images'] for name, s in f['splits'].items()}

SPLIT_NAMES = [('train', 'validation', 'test'), ('Training', 'val', 'Testing'), ('TRAIN', 'Dev', 'test')]

@pytest.mark.parametrize('names', SPLIT_NAMES)
def test_splits_by_their_usual_names(names, tmp_path):
    for name, n in zip(names, (9, 4, 3)): paint(tmp_path/name, 'bus', 'car', n=n)
    f = facts(tmp_path)
    assert images(f) == dict(train=18, valid=8, test=6)
    assert [s['folder'] for s in f['splits'].values()] == list(names)
    assert [c['name'] for c in f['classes']] == ['bus', 'car'] and f['classes'][1]['valid'] == 4
    assert f"splits: train is the folder {names[0]}" in '\n'.join(fact_lines(f))

def test_a_split_that_is_missing_is_set_apart_and_said(tmp_path):
    for name, n in (('Train', 10), ('Test', 3)): paint(tmp_path/name, 'a', 'b', n=n)
    f = facts(tmp_path)
    assert images(f) == dict(train=17, valid=3, test=6)      # 15 % of the 20
    assert 'valid set apart from the training images' in '\n'.join(fact_lines(f))

AMBIGUOUS = {
    'train beside classes': (['bus/0', 'car/0', 'train/day/0', 'train/night/0'],
                             'train can be a split or a class beside bus, car'),
    'test beside classes':  (['a/0', 'b/0', 'Test/x/0'], 'Test can be a split or a class beside a, b'),
    'val twice':            (['train/a/0', 'val/a/0', 'valid/a/0'], 'val, valid mean the same split'),
    'no train':             (['valid/a/0', 'valid/b/0', 'test/a/0'], 'no split to train with'),
    'no classes':           (['train/0', 'test/0'], 'test, train can be splits or classes'),
    'flat test':            (['train/a/0', 'train/b/0', 'test/0'], 'test holds images, but no folders of classes'),
    'names like splits':    (['train_set/a/0', 'train_set/b/0', 'testset/a/0'], 'testset, train_set can be a split or'),
    'years':                (['train2017/a/0', 'val2017/a/0'], 'train2017, val2017 can be a split or a class'),
    'more than splits':     (['train/a/0', 'train/b/0', 'test/a/0', 'extra/0'], 'a split or a class beside extra'),
}

@pytest.mark.parametrize('name', AMBIGUOUS)
def test_two_readings_are_refused(name, tmp_path):
    files, sentence = AMBIGUOUS[name]
    for file in files:
        (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (8, 8)).save(tmp_path/f'{file}.png')
    with pytest.raises(ValueError, match=sentence): load(tmp_path)

@pytest.mark.parametrize('names', [('bus', 'car', 'train'), ('dev', 'ops', 'test'), ('valid', 'void')])
def test_classes_may_be_called_like_splits(names, tmp_path):
    paint(tmp_path, *names)
    assert [c['name'] for c in facts(tmp_path)['classes']] == list(names)

def test_a_split_without_images_is_refused(tmp_path):
    paint(tmp_path/'train', 'a', 'b')
    (tmp_path/'val'/'a').mkdir(parents=True)
    (tmp_path/'val'/'a'/'0.npy').write_text('pixels')
    with pytest.raises(ValueError, match=r'val holds no images \(left out: 1 x no image \(.npy\)'): load(tmp_path)

def test_images_are_known_by_name_or_content(tmp_path, monkeypatch):
    "Whatever the machine's table of file types says; every file is counted, or left out for a reason"
    monkeypatch.setattr(mimetypes, 'types_map', {})
    paint(tmp_path, 'a', kind='webp')
    paint(tmp_path, 'b', kind='jpg')
    paint(tmp_path, 'c', kind='JPEG')
    (tmp_path/'a'/'0.webp').rename(tmp_path/'a'/'no_extension')
    (tmp_path/'a'/'1.webp').rename(tmp_path/'a'/'2024.01.17')
    (tmp_path/'b'/'0.jpg').rename(tmp_path/'b'/'0.jpg_large')
    for name in ('a/notes.txt', 'b/labels.json', 'c/README', '.DS_Store', 'a/.cache', 'movie.mp4'):
        (tmp_path/name).write_text('no image')
    (tmp_path/'docs').mkdir()
    paint(tmp_path/'b', 'deeper', n=2)
    Image.new('L', (8, 8)).save(tmp_path/'cover.png')
    f = facts(tmp_path)
    assert sum(images(f).values()) == 20 and [c['name'] for c in f['classes']] == ['a', 'b', 'c']
    assert [sum(c[s] for s in f['splits']) for c in f['classes']] == [6, 8, 6]
    assert f['left_out'] == {'no image (.txt)': 1, 'no image (.json)': 1, 'no image (no extension)': 1, 'hidden': 2,
                             'no image (.mp4)': 1, 'in no folder of a class': 1, 'a folder without images': 1}
    assert left_out_line(f['left_out']) in fact_lines(f)

def test_runs_among_the_images_are_no_class(tmp_path):
    "`vit_train --data .` writes to `runs/`: its drawings are not trained on; a run that is asked for is read"
    paint(tmp_path, 'a', 'b')
    for run, file in (('one', 'model.safetensors'), ('two.part', 'checkpoint.pt')):
        paint(tmp_path/'runs'/run, 'samples', n=3)
        for name in ('config.json', file): (tmp_path/'runs'/run/name).write_text('')
    paint(tmp_path/'a', 'x.part', n=1)
    files, left_out = find_images(tmp_path)
    assert Counter(f.relative_to(tmp_path).parts[0] for f in files) == dict(a=7, b=6)
    assert left_out == {'a run of vit_train': [tmp_path/'runs'/'one', tmp_path/'runs'/'two.part']}
    assert [c['name'] for c in facts(tmp_path)['classes']] == ['a', 'b']
    assert len(find_images(tmp_path/'runs'/'one')[0]) == 3

def test_links_count_once(tmp_path):
    "In a circle, upwards, to another class, to nothing; a linked folder or file elsewhere counts"
    data, store = tmp_path/'data', tmp_path/'store'
    paint(data, 'red', 'blue')
    paint(store, 'green')
    paint(store/'single', 'x', n=1)
    for link, target in (('red/again', '.'), ('red/up', '../..'), ('blue/other', '../red'), ('blue/gone', 'nowhere'),
                         ('blue/twice.png', '0.png'), ('blue/loop', 'loop'), ('green', store/'green'),
                         ('blue/from_afar.png', store/'single'/'x'/'0.png'), ('red/zero.png', '/dev/zero')):
        (data/link).symlink_to(target)
    files, left_out = find_images(data)
    assert Counter(f.relative_to(data).parts[0] for f in files) == dict(red=6, blue=7, green=6)
    assert {why: len(paths) for why, paths in left_out.items()} == {
        'a link to what counts already': 4, 'a link that leads nowhere': 2, 'no ordinary file': 1}

def test_special_files_and_folders_do_not_hang(tmp_path):
    paint(tmp_path, 'a', 'b')
    os.mkfifo(tmp_path/'a'/'pipe.png')
    os.mkfifo(tmp_path/'b'/'pipe')
    (tmp_path/'b'/'proc').symlink_to('/proc')
    assert facts(tmp_path)['left_out'] == {'no ordinary file': 3}
    for folder in ('/proc', '/sys/kernel', '/dev', '/'):
        with pytest.raises(ValueError, match=f'{folder} is no folder of images'): load(folder)
    with pytest.raises(FileNotFoundError, match='there is no folder .*pipe.png'): load(tmp_path/'a'/'pipe.png')

def test_all_bad_pictures_are_named_at_once(tmp_path, monkeypatch):
    paint(tmp_path, 'a', 'b', n=8)
    (tmp_path/'a'/'0.png').write_bytes((tmp_path/'a'/'0.png').read_bytes()[:90])
    (tmp_path/'b'/'1.png').write_bytes(b'')
    (tmp_path/'b'/'x.HEIC').write_bytes(b'....ftypheic')
    (tmp_path/'b'/'y.svg').write_text('<svg/>')
    Image.new('L', (400, 400)).save(tmp_path/'a'/'vast.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
    with pytest.raises(ValueError) as e: load(tmp_path)
    text = str(e.value)
    assert text.startswith("5 of 19 pictures can't be used: ") and '\n' not in text and '--skip_bad' in text
    for words in (f"{tmp_path/'a'/'0.png'} can't be read as an image", f"{tmp_path/'b'/'1.png'} is empty",
                  'vast.png has too many pixels',
                  f"{tmp_path/'b'/'x.HEIC'}, {tmp_path/'b'/'y.svg'} is of a format that pillow can't read here"):
        assert words in text
    f = facts(tmp_path, skip_bad=True)
    assert sum(images(f).values()) == 14 and sum(f['left_out'].values()) == 5
    assert f['left_out']["is of a format that pillow can't read here"] == 2

@pytest.mark.parametrize('stream', [False, True])
def test_a_class_that_is_all_bad_is_no_class(tmp_path, capsys, stream):
    paint(tmp_path, 'a', 'b', 'c')
    for file in (tmp_path/'c').iterdir(): file.write_text('broken')
    assert [c['name'] for c in facts(tmp_path, skip_bad=True, stream=stream)['classes']] == ['a', 'b']
    assert capsys.readouterr().out == 'classes without a picture that can be read are left out: c\n'
    for file in (tmp_path/'b').iterdir(): file.write_text('broken')
    with pytest.raises(ValueError, match=r"one class only \(a\) \(left out: 12 x can't be read as an image"):
        load(tmp_path, skip_bad=True)

def test_pixels_labels_and_names_stay_together(tmp_path):
    "Pictures that fall out leave no gap: each that is left has its own label"
    for c, name in enumerate('ab'):
        (tmp_path/name).mkdir()
        for i in range(10): Image.new('L', (8, 8), 100*c + i).save(tmp_path/name/f'{i}.png')
    for file in ('a/3', 'b/0', 'b/7'): (tmp_path/f'{file}.png').write_text('broken')
    dls = load(tmp_path, in_chans=1, skip_bad=True)
    seen = sorted((int(x[0, 0, 0]), int(y)) for dl in dls for x, y in zip(dl.dataset.x, dl.dataset.y))
    assert seen == [(i, 0) for i in range(10) if i != 3] + [(100 + i, 1) for i in range(10) if i not in (0, 7)]

# --- depth and contrast ---

@pytest.mark.parametrize('kind', ['float 0..1', 'float 0..65535', 'int 0..255'])
def test_depths_that_are_not_known_are_asked_for(kind, tmp_path):
    paint(tmp_path, 'a', 'b')
    known = load(tmp_path, in_chans=1).train_ds.x.int()
    for file in tmp_path.rglob('*.png'):
        pixels = np.asarray(Image.open(file).convert('L'))
        pixels = {'float 0..1': np.float32(pixels/255), 'float 0..65535': np.float32(pixels)*257,
                  'int 0..255': np.int32(pixels)}[kind]
        Image.fromarray(pixels).save(file.with_suffix('.tif'))
        file.unlink()
    with pytest.raises(ValueError, match='12 of 12 pictures .* black and white are not known.*--value_range'):
        load(tmp_path)
    white = {'float 0..1': 1, 'float 0..65535': 65535, 'int 0..255': 255}[kind]
    assert (load(tmp_path, in_chans=1, value_range=(0, white)).train_ds.x.int() - known).abs().max() <= 1

@pytest.mark.parametrize('top, note', [(4095, True), (1, True), (65535, False)])
def test_little_contrast_is_said(top, note, tmp_path):
    "12-bit data in files of 16 bits"
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(top + 1, size=(8, 8)).astype(np.uint16)).save(tmp_path/name/f'{i}.png')
    f = facts(tmp_path)
    assert f['contrast']['bright'] == round(top/257)
    assert any('little contrast' in line for line in fact_lines(f)) == note
    if top < 65535: assert facts(tmp_path, value_range=(0, top))['contrast']['bright'] == 255

def test_pictures_of_one_colour_are_counted(tmp_path):
    for split in ('train', 'valid', 'test'): paint(tmp_path/split, 'a', 'b')
    for i in range(2): Image.new('RGB', (9, 9), (0, i, 0)).save(tmp_path/'train'/'a'/f'{i}.png')
    f = facts(tmp_path)
    assert f['contrast']['one_colour'] == 2
    assert 'note: 2 of 12 training images show a single colour' in fact_lines(f)

# --- duplicates, sizes, balance ---

def test_duplicates_are_found_by_their_pixels(tmp_path):
    for split, n in (('train', 8), ('valid', 4), ('test', 4)): paint(tmp_path/split, 'a', 'b', n=n)
    shutil.copy(tmp_path/'train'/'a'/'0.png', tmp_path/'test'/'a'/'copy.png')
    Image.open(tmp_path/'train'/'b'/'1.png').save(tmp_path/'test'/'b'/'other_format.bmp')
    shutil.copy(tmp_path/'train'/'a'/'2.png', tmp_path/'valid'/'b'/'wrong_class.png')
    f = facts(tmp_path)
    assert {s: x['also_in_train'] for s, x in f['splits'].items()} == dict(train=0, valid=1, test=2)
    assert any(line.startswith('note: 2 of 10 test images are among the training images') for line in fact_lines(f))

@pytest.mark.parametrize('size, kept', [((300, 100), 1/3), ((100, 200), 1/2), ((64, 64), 1)])
def test_it_is_said_how_much_a_crop_cuts_off(size, kept, tmp_path):
    paint(tmp_path, 'a', 'b', size=size)
    f = facts(tmp_path)
    assert abs(f['kept']['typical'] - kept) < 1e-3 and f['sizes']['typical'] == list(size[::-1])
    assert any(f'the middle {100*kept:.0f} % is used;' in line for line in fact_lines(f)) == (kept < 1)
    assert facts(tmp_path, resize='squash')['kept'] == facts(tmp_path, resize='pad')['kept'] == dict(typical=1, least=1)

@pytest.mark.parametrize('resize, seen', [('crop', {0}), ('squash', {0, 250}), ('pad', {0, 128, 250})])
def test_resize_reaches_training_and_prediction_alike(resize, seen, tmp_path):
    "A mark at the far end of a long picture; the border has one grey in both"
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(6):
            pixels = np.zeros((8, 32), np.uint8)
            pixels[:, :8] = 250
            Image.fromarray(pixels).save(tmp_path/name/f'{i}.png')
    dls = load(tmp_path, in_chans=1, resize=resize)
    x = dls.train_ds.x[0]
    assert seen <= set(x.unique().tolist()) and (250 in x) == (250 in seen) and (128 in x) == (128 in seen)
    assert torch.equal(dls.preprocessing(tmp_path/'a'/'0.png'), x)

def test_imbalance_is_said(tmp_path):
    paint(tmp_path, 'many', n=40)
    paint(tmp_path, 'few', n=5)
    assert any('--class_weights' in line for line in fact_lines(facts(tmp_path)))
    paint(tmp_path, 'few', n=20)
    assert not any('--class_weights' in line for line in fact_lines(facts(tmp_path)))

def test_standard_sets_say_what_they_hold(fake_cifar):
    f = describe(cifar10_dls(fake_cifar.parent, bs=8, device='cpu'))
    assert images(f) == dict(train=110, valid=10, test=24) and [c['train'] for c in f['classes']] == [55, 55]
    assert fact_lines(f) == ['training images in each class: aeroplane 55, car 55']

# --- memory ---

def test_more_than_fits_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    paint(tmp_path, 'a', 'b')
    monkeypatch.setattr(data, 'read_pictures', lambda *args: pytest.fail('it was read'))
    monkeypatch.setattr(data.psutil, 'virtual_memory', lambda: SimpleNamespace(available=2e9))
    with pytest.raises(ValueError, match='12 images take 2.3 GB at 8000 x 8000 pixels, and 2.0 GB .*--stream'):
        load(tmp_path, img_size=8000, stream=False)
    monkeypatch.setattr(data.psutil, 'virtual_memory', lambda: SimpleNamespace(available=0.5e9))
    with pytest.raises(ValueError, match='4 images take 0.8 GB at 8000 x 8000 pixels, .* smaller batches'):
        load(tmp_path, img_size=8000)

def test_free_memory_is_what_a_container_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(data.psutil, 'virtual_memory', lambda: SimpleNamespace(available=64e9))
    monkeypatch.setattr(data, '_CGROUP', tmp_path)
    prep = SimpleNamespace(img_size=(8, 8), in_chans=1)
    assert data._memory(2, prep) == (128, 64e9)
    files = {'memory.max': '8000\n', 'memory.current': '7000\n', 'memory.stat': 'anon 6000\ninactive_file 500\n'}
    for name, text in files.items(): (tmp_path/name).write_text(text)
    assert data._memory(2, prep)[1] == 8000 - 7000 + 500
    (tmp_path/'memory.current').write_text('9000\n')
    assert data._memory(2, prep)[1] == 0
    (tmp_path/'memory.max').write_text('max\n')
    assert data._memory(2, prep)[1] == 64e9

GROUPS = {'of a job, version 2': ('0::/slurm/job7\n', 'slurm/job7', 'memory.max', 'memory.current', 'inactive_file'),
          'around the job, version 2': ('0::/slurm/job7\n', 'slurm', 'memory.max', 'memory.current', 'inactive_file'),
          'seen from within': ('0::/../../x\n', '', 'memory.max', 'memory.current', 'inactive_file'),
          'version 1': ('5:cpu:/a\n4:memory,x:/docker/ab\n', 'memory/docker/ab', 'memory.limit_in_bytes',
                        'memory.usage_in_bytes', 'total_inactive_file'),
          'version 1, from within': ('4:memory:/docker/ab\n', 'memory', 'memory.limit_in_bytes',
                                     'memory.usage_in_bytes', 'total_inactive_file')}

@pytest.mark.parametrize('name', GROUPS)
def test_free_memory_is_what_a_group_has_left(name, tmp_path, monkeypatch):
    lines, folder, limit, used, cache = GROUPS[name]
    monkeypatch.setattr(data.psutil, 'virtual_memory', lambda: SimpleNamespace(available=64e9))
    monkeypatch.setattr(data, '_CGROUP', tmp_path/'cgroup')
    monkeypatch.setattr(data, '_GROUPS', tmp_path/'groups')
    (tmp_path/'groups').write_text(lines)
    prep, folder = SimpleNamespace(img_size=(8, 8), in_chans=1), tmp_path/'cgroup'/folder
    assert data._memory(2, prep)[1] == 64e9
    folder.mkdir(parents=True)
    for file, text in {limit: '8000\n', used: '7000\n', 'memory.stat': f'anon 6000\n{cache} 500\n'}.items():
        (folder/file).write_text(text)
    assert data._memory(2, prep)[1] == 8000 - 7000 + 500

def test_cores_that_are_ours(monkeypatch):
    for ours, n in (({3}, 1), (set(range(64)), 8)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: ours, raising=False)
        assert data._cores() == n
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert data._cores() == 1

def test_nobody_is_at_home(monkeypatch):
    monkeypatch.delenv('VIT_NBDEV_DATA', raising=False)
    def lost(name): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(data, 'fastai_path', lost)
    with pytest.raises(OSError, match='no folder for data sets .Could not.*: name one with VIT_NBDEV_DATA.*--path'):
        mnist_dls()

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='only Linux tells the peak')
def test_memory_is_little_more_than_the_pixels(tmp_path):
    paint(tmp_path, 'a', 'b', n=100)
    def status(name): return int(re.search(rf'{name}:\s+(\d+)', Path('/proc/self/status').read_text())[1])*1024
    def peak(side):
        before = status('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')        # the peak so far is forgotten
        dls = load(tmp_path, img_size=side)
        pixels = sum(dl.dataset.x.numel() for dl in dls)
        return (status('VmHWM') - before)/pixels
    peak(64)                                                 # what is loaded once
    assert peak(640) < 1.5                                   # 246 MB; a second copy would make it 2

@pytest.mark.parametrize('names', [('Cat', 'cat'), ('a\u0301', '\u00e1'), ('dog', 'dog ')])
def test_names_that_are_nearly_one_are_said(names, tmp_path):
    paint(tmp_path, *names, 'other')
    assert any('have nearly the same name' in line and names[0] in line for line in fact_lines(facts(tmp_path)))
    shutil.rmtree(tmp_path/names[0])
    assert not any('nearly the same name' in line for line in fact_lines(facts(tmp_path)))

def test_one_folder_too_high(tmp_path):
    paint(tmp_path/'pets', 'cat', 'dog')
    with pytest.raises(ValueError, match=r'one class only \(pets\).*; if the folders in .*pets are the classes'):
        load(tmp_path)
    assert len(facts(tmp_path/'pets')['classes']) == 2

def test_arrays_that_are_no_images_are_said_to_be_none():
    x, y = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8), torch.arange(8) % 2
    good = (x, y)
    for bad in (x[:, 0], x/255):
        for splits in (((bad, y), good, good), (good, (bad, y), good)):
            with pytest.raises(ValueError, match=r'expected uint8 \(n, c, h, w\)'): tensor_dls(*splits, ['a', 'b'])
    with pytest.raises(ValueError, match='the test split has no labels'): tensor_dls(good, good, (x, None), ['a', 'b'])

def test_two_processes_that_unpack_or_fetch_at_once(tmp_path, monkeypatch):
    "The second is done while the first is at it: neither gets in the other's way"
    raw = write_mnist(tmp_path, packed=True)/'MNIST'/'raw'
    copy, pid, calls = shutil.copyfileobj, os.getpid(), []
    def slow(*files):
        if not calls:
            calls.append(1)
            monkeypatch.setattr(os, 'getpid', lambda: pid + 1)
            data._unpack(raw)
            monkeypatch.setattr(os, 'getpid', lambda: pid)
        copy(*files)
    monkeypatch.setattr(shutil, 'copyfileobj', slow)
    data._unpack(raw)
    assert calls and sorted(p.name for p in raw.iterdir() if p.suffix != '.gz') == \
        [f'{part}-{name}-ubyte' for part in ('t10k', 'train') for name in ('images-idx3', 'labels-idx1')]
    class MNIST:
        def __init__(self, path, download):
            (path/'MNIST').mkdir()
            (path/'MNIST'/'whole').touch()
    for _ in range(3): data._download(MNIST, tmp_path/'new', tmp_path/'new'/'MNIST')
    assert [p.name for p in (tmp_path/'new').rglob('*')] == ['MNIST', 'whole']
