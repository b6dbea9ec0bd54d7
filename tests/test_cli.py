"""vit_train and vit_predict as a user runs them, the good way and the bad ways."""
import csv, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_nbdev.cli import vit_predict, vit_train

RUN_FILES = {'config.json', 'confusion.png', 'curves.png', 'metrics.csv', 'model.safetensors', 'predictions.png', 'samples'}

def command(name): return [str(Path(sys.executable).parent/name)]    # the program that pip installed

def start(name, *args, cwd):
    return subprocess.Popen([*command(name), *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {'PYTHONUNBUFFERED': '1'},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a shell's background jobs ignore it

def shell(name, *args, cwd):
    process = start(name, *args, cwd=cwd)
    out, err = process.communicate()
    return process.returncode, out, err

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder in which `vit_train` ran as a program, and what it printed"
    cwd = tmp_path_factory.mktemp('work')
    code, out, err = shell('vit_train', '--epochs', 8, '--device', 'cpu', cwd=cwd)
    assert code == 0, err
    return cwd, out

def test_train_leaves_a_whole_run(trained):
    cwd, out = trained
    run = cwd/'runs'/'digits'
    assert {p.name for p in run.iterdir()} == RUN_FILES
    assert [p.name for p in (cwd/'runs').iterdir()] == ['digits']     # no half-written folder beside it
    config = json.loads((run/'config.json').read_text())
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    assert [int(r['epoch']) for r in rows] == list(range(8))
    assert config['test_accuracy'] > 0.85 and config['epochs_done'] == 8 and not config['interrupted']
    assert f"test accuracy: {config['test_accuracy']:.2%}".replace('%', ' %') + ' (n=360)' in out
    assert '1,257 images to train, 180 to validate, 360 to test' in out and '136,010 parameters' in out
    for name in ('curves', 'confusion', 'predictions'):
        with Image.open(run/f'{name}.png') as im: assert min(im.size) > 200 and np.asarray(im.convert('L')).std() > 10   # something is drawn

def test_predict_agrees_with_the_test_accuracy(trained, capsys):
    "The files of the whole test split, predicted one by one, give the accuracy that training reported"
    cwd, _ = trained
    from vit_nbdev.data import digits_dls
    test = digits_dls(device='cpu')[2].dataset
    (cwd/'all').mkdir()
    for i, x in enumerate(test.x): Image.fromarray(x[0].numpy()).save(cwd/'all'/f'{i:03}.png')
    vit_predict.__wrapped__(str(cwd/'runs'/'digits'), sorted(map(str, (cwd/'all').iterdir())), json=True, device='cpu')
    results = json.loads(capsys.readouterr().out)
    right = np.mean([r['class'] == test.vocab[y] for r, y in zip(results, test.y)])
    assert right == json.loads((cwd/'runs'/'digits'/'config.json').read_text())['test_accuracy']
    assert all(abs(sum(r['probabilities'].values()) - 1) < 1e-5 and r['probability'] == max(r['probabilities'].values()) for r in results)

def test_predict_names_a_bad_file_and_reads_the_others(trained):
    cwd, _ = trained
    (cwd/'note.png').write_text('no image')
    code, out, err = shell('vit_predict', 'runs/digits', 'note.png', 'runs/digits/samples/0-5.png', 'nowhere.png', cwd=cwd)
    assert code == 1 and out.startswith('runs/digits/samples/0-5.png: ') and len(out.splitlines()) == 1
    assert err.splitlines() == ["vit_predict: note.png can't be read as an image: replace it or take it away", 'vit_predict: there is no file nowhere.png']

def test_same_seed_same_run(tmp_path):
    for name in 'ab': vit_train.__wrapped__(epochs=2, seed=3, device='cpu', out=tmp_path/name)
    assert (tmp_path/'a'/'model.safetensors').read_bytes() == (tmp_path/'b'/'model.safetensors').read_bytes()

def test_force_replaces_a_run_and_nothing_else(tmp_path, capsys):
    vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'run')
    first = (tmp_path/'run'/'config.json').read_text()
    with pytest.raises(SystemExit, match='--force to replace'): vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'run')
    assert (tmp_path/'run'/'config.json').read_text() == first
    vit_train.__wrapped__(epochs=1, seed=1, device='cpu', out=tmp_path/'run', force=True)
    assert json.loads((tmp_path/'run'/'config.json').read_text())['seed'] == 1
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('three years')
    with pytest.raises(SystemExit, match='not a run of vit_train'): vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'mine', force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'run'] and (tmp_path/'mine'/'thesis.txt').exists()

def fake_mnist(path, n=130):
    "A small data set in the layout of MNIST"
    raw = path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        for name, x in (('images-idx3', np.random.default_rng(0).integers(256, size=(n, 28, 28))), ('labels-idx1', np.arange(n) % 10)):
            head = bytes([0, 0, 8, x.ndim]) + b''.join(s.to_bytes(4, 'big') for s in x.shape)
            (raw/f'{part}-{name}-ubyte').write_bytes(head + x.astype(np.uint8).tobytes())
    return raw

def test_mnist_and_a_folder(tmp_path, monkeypatch):
    "Both through the whole way, and the run of a folder knows its classes"
    monkeypatch.chdir(tmp_path)
    fake_mnist(tmp_path/'data')
    vit_train.__wrapped__('mnist', path='data', epochs=1, bs=32, device='cpu')
    for name, colour in (('red', 'crimson'), ('blue', 'navy')):
        (tmp_path/'pictures'/name).mkdir(parents=True)
        for i in range(12): Image.new('RGB', (40 + i, 30), colour).save(tmp_path/'pictures'/name/f'{i}.jpg')
    vit_train.__wrapped__('pictures', epochs=1, bs=4, device='cpu')
    assert sorted(p.name for p in Path('runs').iterdir()) == ['mnist', 'pictures']
    assert json.loads(Path('runs/pictures/config.json').read_text())['preprocessing']['labels'] == ['blue', 'red']

@pytest.mark.skipif('VIT_NBDEV_DATA' not in os.environ or not (Path(os.environ['VIT_NBDEV_DATA'])/'MNIST').is_dir(),
                    reason='VIT_NBDEV_DATA names no folder that holds MNIST')
def test_real_mnist():
    from vit_nbdev.data import mnist_dls
    dls = mnist_dls(device='cpu')
    assert [len(dl.dataset) for dl in dls] == [55_000, 5_000, 10_000]
    assert dls[2].dataset.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]              # the test set's well-known beginning
    assert abs(dls.preprocessing['mean'][0] - 0.1307) < 5e-4 and abs(dls.preprocessing['std'][0] - 0.3081) < 5e-4

# --- bad input: one sentence, exit code not zero, no traceback, nothing left behind ---

BAD_TRAIN = {
    'unknown data':      (dict(data='mnits'), "no data set 'mnits'.* did you mean mnist"),
    'unknown model':     (dict(model='B16'), 'nearest names: B/16'),
    'no such path':      (dict(data='mnist', path='nowhere'), 'path nowhere does not exist'),
    'path is a file':    (dict(data='mnist', path='file.txt'), 'path file.txt is not a folder'),
    'something else':    (dict(data='mnist', path='other'), "MNIST is not in other .* can't be downloaded"),
    'truncated MNIST':   (dict(data='mnist', path='cut'), 'train-images-idx3-ubyte is truncated or corrupt'),
    'corrupt MNIST':     (dict(data='mnist', path='corrupt'), 't10k-labels-idx1-ubyte is truncated or corrupt'),
    'MNIST lacks files': (dict(data='mnist', path='partial'), 'partial/MNIST does not hold MNIST'),
    'labels too large':  (dict(data='mnist', path='labels'), 'labels run from 0 to 77, but there are 10 classes'),
    'one class':         (dict(data='oneclass'), r'one class only \(cat\)'),
    'no images':         (dict(data='other'), 'no folders with image files'),
    'unreadable image':  (dict(data='broken'), r"broken/dog/3.jpg can't be read as an image"),
    'size and patch':    (dict(model='S/16'), 'img_size=8 is not divisible by patch_size=16'),
    'folder size':       (dict(data='broken', img_size=30), 'img_size=30 is not divisible by patch_size=4: .* 28 and 32'),
    'size of MNIST':     (dict(data='mnist', img_size=32), 'leave out --img_size'),
    'no epochs':         (dict(epochs=0), 'epochs is 0, but must be above zero'),
    'negative batch':    (dict(bs=-4), 'bs is -4, but must be above zero'),
    'zero rate':         (dict(lr=0.), 'lr is 0.0, but must be above zero'),
    'rate not a number': (dict(lr=float('nan')), 'lr is nan'),
    'no GPU':            (dict(device='cuda'), 'torch finds no GPU: use cpu'),
    'unknown device':    (dict(device='abacus'), "device 'abacus' is not known"),
    'out is a file':     (dict(out='file.txt'), 'file.txt exists'),
    'out below a file':  (dict(out='file.txt/run'), r"can't write to file.txt \(.*\): choose another --out"),
    'path for digits':   (dict(path='other'), 'leave out --path'),
    'loss explodes':     (dict(lr=1e30), 'the loss is no longer a finite number in epoch 1.* try a lower --lr than 1e.30'),
}

@pytest.fixture(scope='module')
def traps(tmp_path_factory):
    path = tmp_path_factory.mktemp('traps')
    (path/'file.txt').write_text('a file')
    (path/'other').mkdir()
    (path/'other'/'readme.md').write_text('something else')
    for name in ('cut', 'corrupt', 'partial', 'labels'): fake_mnist(path/name)
    images, labels = path/'cut/MNIST/raw/train-images-idx3-ubyte', path/'corrupt/MNIST/raw/t10k-labels-idx1-ubyte'
    images.write_bytes(images.read_bytes()[:-1])
    labels.write_bytes(b'\x1f\x8b' + labels.read_bytes()[2:])
    (path/'partial/MNIST/raw/t10k-images-idx3-ubyte').unlink()
    bad = path/'labels/MNIST/raw/train-labels-idx1-ubyte'
    bad.write_bytes(bad.read_bytes()[:-2] + bytes([77, 77]))
    for folder, classes in dict(oneclass=['cat'], broken=['cat', 'dog']).items():
        for name in classes:
            (path/folder/name).mkdir(parents=True)
            for i in range(6): Image.effect_noise((20, 20), 50).save(path/folder/name/f'{i}.jpg')
    jpg = path/'broken/dog/3.jpg'
    jpg.write_bytes(jpg.read_bytes()[:150])
    return path

def contents(path): return {p: p.read_bytes() for p in path.rglob('*') if p.is_file()}

@pytest.mark.parametrize('name', BAD_TRAIN)
def test_bad_training(name, traps, monkeypatch):
    kwargs, sentence = BAD_TRAIN[name]
    if kwargs.get('device') == 'cuda' and torch.cuda.is_available(): pytest.skip('there is a GPU here')
    monkeypatch.chdir(traps)
    before = contents(traps)
    with pytest.raises(SystemExit, match=sentence) as e: vit_train.__wrapped__(**{'epochs': 1, 'device': 'cpu'} | kwargs)
    assert str(e.value).startswith('vit_train: ') and '\n' not in str(e.value)
    assert contents(traps) == before
    assert not list(traps.rglob('.*'))                           # no hidden folder is left

def test_labels_that_stratify_refuses_are_no_traceback(traps, monkeypatch, tmp_path):
    "A class with too few images to be split"
    for name, n in (('many', 9), ('few', 2)):
        (tmp_path/'p'/name).mkdir(parents=True)
        for i in range(n): Image.new('L', (8, 8)).save(tmp_path/'p'/name/f'{i}.png')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="class 'few' has too few images"): vit_train.__wrapped__('p', epochs=1, device='cpu')

BAD_RUNS = {
    'no folder':       (lambda run: shutil.rmtree(run), 'there is no run folder'),
    'no weights':      (lambda run: (run/'model.safetensors').unlink(), 'lacks model.safetensors'),
    'no config':       (lambda run: (run/'config.json').unlink(), 'lacks config.json'),
    'bad json':        (lambda run: (run/'config.json').write_text('{'), 'config.json is damaged'),
    'other config':    (lambda run: (run/'config.json').write_text('{"model": {"depth": "deep"}}'), 'config.json is damaged'),
    'cut weights':     (lambda run: (run/'model.safetensors').write_bytes(b'12345678'), 'model.safetensors is damaged'),
}

@pytest.mark.parametrize('name', BAD_RUNS)
def test_bad_run(name, trained, tmp_path):
    damage, sentence = BAD_RUNS[name]
    run = shutil.copytree(trained[0]/'runs'/'digits', tmp_path/'run')
    image = trained[0]/'runs'/'digits'/'samples'/'0-5.png'
    damage(run)
    with pytest.raises(SystemExit, match=sentence) as e: vit_predict.__wrapped__(str(run), [str(image)])
    assert str(e.value).startswith('vit_predict: ') and '\n' not in str(e.value)

def test_sentence_on_the_terminal(tmp_path):
    code, out, err = shell('vit_train', '--data', 'minst', cwd=tmp_path)
    assert code == 1 and out == '' and err.strip() == "vit_train: there is no data set 'minst' and no folder of that name; did you mean mnist or fashion_mnist?"
    code, out, _ = shell('vit_predict', '--help', cwd=tmp_path)
    assert code == 0 and 'a run folder that vit_train made' in out and 'images [images ...]' in out

# --- Ctrl-C ---

def interrupt(cwd, ready, timeout=240):
    "Start a long training, press Ctrl-C as soon as `ready()`, and give what it printed"
    process = start('vit_train', '--epochs', 2000, '--device', 'cpu', cwd=cwd)
    until = time.time() + timeout
    while not ready() and process.poll() is None and time.time() < until: time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try: out, err = process.communicate(timeout=timeout)
    finally: process.kill()
    return process.returncode, out, err

def test_interrupt_keeps_what_was_learned(tmp_path):
    def two_epochs(): return any(len(f.read_text().splitlines()) > 2 for f in (tmp_path/'runs').glob('.digits-*/metrics.csv'))
    code, out, err = interrupt(tmp_path, two_epochs)
    assert code == 130 and 'Traceback' not in out + err
    assert 'stopped by Ctrl-C; the run is in runs/digits' in err
    run = tmp_path/'runs'/'digits'
    assert {p.name for p in run.iterdir()} == RUN_FILES
    config = json.loads((run/'config.json').read_text())
    assert config['interrupted'] and 2 <= config['epochs_done'] < 2000
    assert shell('vit_predict', run, run/'samples'/'0-5.png', cwd=tmp_path)[0] == 0

def test_interrupt_before_anything_was_learned(tmp_path):
    code, out, err = interrupt(tmp_path, lambda: any((tmp_path/'runs').glob('.digits-*')) if (tmp_path/'runs').exists() else False)
    assert code == 130 and 'Traceback' not in out + err and 'nothing was kept' in err
    assert list((tmp_path/'runs').iterdir()) == []
