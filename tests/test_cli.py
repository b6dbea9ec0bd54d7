"""vit_train and vit_predict as a user runs them, the good way and the bad ways."""
import csv, io, json, os, random, re, shutil, signal, socket, subprocess, sys, time, warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

from programs import Program, shell
from vit_nbdev import cli
from vit_nbdev.cli import plain_errors, vit_predict, vit_train
from vit_nbdev.experiments import read_trials
from vit_nbdev.learner import FINETUNE, RECIPES, Recipe
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.runs import explain, load_model, predict, save_model, train
from vit_nbdev.vit import vit

ROOT = Path(__file__).parent.parent

RUN_FILES = {'augmented.png', 'config.json', 'confusion.png', 'curves.png', 'metrics.csv',
             'mistakes.png', 'model.safetensors', 'predictions.png', 'report.html', 'samples'}

def command(name): return [str(Path(sys.executable).parent/name)]    # the program that pip installed

def installed(name, *args, cwd):
    "A command as it comes from a shell; `shell` is the same without the seconds of its imports"
    done = subprocess.run([*command(name), *map(str, args)], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

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
    assert config['test_accuracy'] > 0.85 and config['settings']['epochs'] == 8
    assert f"test accuracy: {config['test_accuracy']:.2%}".replace('%', ' %') + ' (n=360)' in out
    assert '1,257 images to train, 180 to validate, 360 to test' in out and '107,082 parameters' in out
    for name in ('curves', 'confusion', 'predictions'):
        # something is drawn
        with Image.open(run/f'{name}.png') as im: assert min(im.size) > 200 and np.asarray(im.convert('L')).std() > 10

def test_a_warning_of_ours_is_a_line(capsys, monkeypatch):
    "... without the place in our files; those of other libraries are shown as ever"
    seen = []
    def show(message, *_, **__): seen.append(str(message))
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        monkeypatch.setattr(warnings, 'showwarning', show)
        with plain_errors('vit_train'):
            warnings.warn_explicit('slow here', UserWarning, cli.__file__, 1)
            warnings.warn_explicit('old', UserWarning, np.__file__, 1)
        assert warnings.showwarning is show
    assert (capsys.readouterr().err, seen) == ('vit_train: slow here\n', ['old'])

def study(name): return read_trials(ROOT/'nbs'/'studies'/f'{name}.jsonl')

def ours(recipe):
    "How many parameters the model of a recipe has"
    return sum(p.numel() for p in vit(RECIPES[recipe].model, **RECIPES[recipe].changes).parameters())

def beside(recipe):
    "What the ledgers have for the cheapest methods on the same images"
    cheap, small = study('other_images').rename(columns=dict(test='accuracy')), study('fine_tuning')
    machine, net = 'support vector machine (RBF)', 'a small CNN'
    rows = {'digits': [('baselines', f'digits, {machine}'), ('baselines', 'digits, Muon, CNN')],
            'mnist-quick': [('baselines', f'mnist, {machine}'), ('baselines', 'mnist, four epochs, CNN')],
            'mnist': [('baselines', f'mnist, {machine}'), ('record', 'record, deeper stem, no block')]}
    rows |= {data: [('other', f'{data}, {method}') for method in (machine, 'CNN')]
             for data in ('fashion_mnist', 'cifar10')}
    for data in ('fashion_mnist', 'cifar10'): rows[data] += [('other', f'{data}, no block')]
    rows |= dict.fromkeys(('folder', 'photos', 'finetune', 'probe'),
                          [('few', 'support vector machine on pixels, 100'), ('few', 'CNN, 100, 32 epochs')])
    ledgers, parts = dict(baselines=study('baselines'), other=cheap, few=small), []
    ledgers['record'] = study('mnist_record').assign(accuracy=lambda r: r.test)
    for ledger, name in rows[recipe]:
        found = ledgers[ledger][lambda r: r.name == name].accuracy
        spread = f' ± {found.std():.2f}' if len(found) > 1 else ''
        what = 'a support vector machine' if 'support vector machine' in name else net
        part = ' (10,000 of the images)' if name == f'cifar10, {machine}' else ''
        if 'no block' in name:
            what = 'the same without blocks' + ' (AdamW)'*(ledger == 'record')
            share = ledgers[ledger].set_index('name').params[name].iloc[0]/ours(recipe)
            part = f' ({100*share:.0f} % of the parameters)'
        if recipe in ('mnist-quick', 'fashion_mnist', 'cifar10') and 'CNN' in name:
            size = 'parameters' if ledger == 'baselines' else 'params'
            share = ledgers[ledger].set_index('name')[size][name].iloc[0]/ours(recipe)
            part = f" ({100*share:.0f} % of the parameters{', ten epochs' if recipe == 'cifar10' else ''})"
        if recipe in ('folder', 'photos') and 'CNN' in name: part = ' (both on other draws)'
        parts.append(f'{what} {found.mean():.2f}{spread} %{part}')
    return '; beside it ' + ', '.join(parts)

def test_recipes_say_what_was_measured():
    "The figures in `RECIPES` are those that a study wrote down"
    quick, recipe = study('baselines').query('name == "mnist, four epochs, ViT of vit_train"'), RECIPES['mnist-quick']
    assert sorted(quick.seed) == list(range(5)) and all(f'epochs: {recipe.epochs}' in s for s in quick.setting)
    accuracy, seconds = f'{quick.accuracy.mean():.2f} ± {quick.accuracy.std():.2f} %', quick.seconds.median()
    assert recipe.measured == f'{accuracy} (5 seeds), {seconds:.0f} s of one CPU thread' + beside('mnist-quick')
    digits = study('baselines').query('name == "digits, Muon, ViT of vit_train"')
    trained = '{bs: 64, changes: {depth: 3, stem: conv}, data: digits, epochs: 60, lr: 0.006, model: digits, opt: muon}'
    assert sorted(digits.seed) == list(range(10)) and all(trained in s for s in digits.setting)
    recipe = RECIPES['digits']
    wanted = Recipe('digits', 'digits', 60, 64, 6e-3, dict(stem='conv', depth=3), opt='muon')
    assert replace(recipe, measured='') == wanted
    accuracy = f'{digits.accuracy.mean():.2f} ± {digits.accuracy.std():.2f} %'
    seconds = f'{digits.seconds.median():.0f} s of one CPU thread'
    assert RECIPES['digits'].measured == f'{accuracy} (10 splits), {seconds}' + beside('digits')
    alone = study('mnist_record').set_index('name').seconds['an epoch alone, Muon'].median()
    studies = [('mnist', 'mnist_record', 'record, deeper stem, Muon', '', 5, 'one CPU core'),
               ('fashion_mnist', 'other_images', 'fashion_mnist', '', 5, 'one CPU core'),
               ('cifar10', 'other_images', 'cifar10', '; JPEG images', 5, 'one CPU core')]
    for recipe, ledger, row, note, n, cores in studies:
        rows = study(ledger)[lambda r: r.name == row]
        test, seconds, epochs, threads = (rows[c].to_numpy() for c in ('test', 'seconds', 'epochs', 'threads'))
        assert len(test) == n and set(epochs) == {RECIPES[recipe].epochs}
        assert set(threads) == {2 if cores.startswith('two') else 1}
        if recipe == 'mnist': seconds = RECIPES[recipe].epochs*alone     # the trainings shared their core
        accuracy, minutes = f'{test.mean():.2f} ± {test.std(ddof=1):.2f} %', np.nanmedian(seconds)/60    # some unknown
        said = f'{accuracy} ({n} seeds{note}), {minutes:.0f} min on {cores}'
        assert RECIPES[recipe].measured == said + beside(recipe)

def test_recipes_for_a_folder_say_what_was_measured():
    few, tuned = study('other_images'), study('fine_tuning').rename(columns=dict(accuracy='test'))
    def figures(runs, name):
        rows = runs[runs.name == name]
        assert sorted(rows.seed) == list(range(5))
        accuracy = f'{rows.test.mean():.2f} ± {rows.test.std():.2f} %'
        return accuracy, f'{rows.seconds.median():.0f} s of one CPU thread', rows
    for recipe, name, words in (('folder', 'folder', 'CIFAR-10, 100 a class and 100 to choose the epoch'),
                                ('photos', 'photos, enlarged', 'the same, enlarged')):
        accuracy, seconds, rows = figures(few, name)
        assert set(rows.epochs) == {RECIPES[recipe].epochs} and set(rows.labels) == {100}
        assert RECIPES[recipe].measured == f'{accuracy} (5 seeds; {words}), {seconds}' + beside(recipe)
    accuracy, _, rows = figures(tuned, 'fine-tuned, 120 steps, 100')
    lr, decay = FINETUNE.values()
    assert all(s == f'{{epochs: 2, labels: 100, lr: {lr}}}' for s in rows.setting) and decay == 0.75    # its default
    words = '5 seeds; 100 a class, as a study fine-tunes: a ViT-S/14 at 56 pixels, head from a probe, two epochs'
    assert RECIPES['finetune'].measured == f'{accuracy} ({words})' + beside('finetune')
    accuracy, _, rows = figures(tuned, 'probe, 100')
    assert all(s.endswith(f"value: {RECIPES['probe'].lr}}}") for s in rows.setting)
    assert RECIPES['probe'].measured == f'{accuracy} (5 seeds; 100 a class, a ViT-S/14 at 56 pixels)' + beside('probe')

def test_a_recipe_as_it_stands_says_what_to_expect(tmp_path, capsys, monkeypatch, no_pictures, few_digits):
    "... and one with a change does not; here a recipe that is quick"
    monkeypatch.setitem(RECIPES, 'digits', replace(RECIPES['digits'], epochs=1))
    train(device='cpu', out=tmp_path/'as it stands')
    assert f"expect  {RECIPES['digits'].measured}" in capsys.readouterr().out
    assert 'measured' not in json.loads((tmp_path/'as it stands'/'config.json').read_text())['settings']
    train(device='cpu', bs=65, out=tmp_path/'changed')
    assert 'expect' not in capsys.readouterr().out

def test_predict_agrees_with_the_test_accuracy(trained, capsys):
    "The files of the whole test split, predicted one by one, give the accuracy that training reported"
    cwd, _ = trained
    from vit_nbdev.data import digits_dls
    test = digits_dls(device='cpu')[2].dataset
    (cwd/'all').mkdir()
    for i, x in enumerate(test.x): Image.fromarray(x[0].numpy()).save(cwd/'all'/f'{i:03}.png')
    vit_predict.__wrapped__(str(cwd/'runs'/'digits'), sorted(map(str, (cwd/'all').iterdir())), json=True, device='cpu')
    results = list(map(json.loads, capsys.readouterr().out.splitlines()))
    right = np.mean([r['class'] == test.vocab[y] for r, y in zip(results, test.y)])
    assert right == json.loads((cwd/'runs'/'digits'/'config.json').read_text())['test_accuracy']
    for r in results:
        assert abs(sum(r['probabilities']) - 1) < 1e-5
        assert r['probability'] == max(r['probabilities']) == r['probabilities'][r['index']]

def test_predict_names_a_bad_file_and_reads_the_others(trained):
    cwd, _ = trained
    (cwd/'note.png').write_text('no image')
    code, out, err = shell('vit_predict', 'runs/digits', 'note.png', 'runs/digits/samples/0-5.png', 'nowhere.png',
                           cwd=cwd)
    assert code == 1 and out.startswith('runs/digits/samples/0-5.png: ') and len(out.splitlines()) == 1
    assert err.splitlines() == ["vit_predict: note.png can't be read as an image: replace it or take it away",
                                'vit_predict: there is no file nowhere.png',
                                'vit_predict: 2 of 3 files could not be read']

def test_predict_reads_folders_and_names_the_likeliest(trained, capsys):
    cwd, _ = trained
    run = cwd/'runs'/'digits'
    vit_predict.__wrapped__(str(run), [str(run/'samples')], top=3, device='cpu')
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(': ')[0] for line in lines] == sorted(map(str, (run/'samples').iterdir()))
    for line in lines:
        p = [float(x) for x in re.findall(r'\(([0-9.]+) %\)', line)]
        assert len(p) == 3 and p == sorted(p, reverse=True) and sum(p) <= 100.1
    (cwd/'empty').mkdir()
    with pytest.raises(SystemExit, match='there is no image in the folder'):
        vit_predict.__wrapped__(str(run), [str(cwd/'empty')])
    with pytest.raises(SystemExit, match='top is 0, but must be above zero'):
        vit_predict.__wrapped__(str(run), [str(run/'samples')], top=0)

def test_predict_with_published_weights(trained, capsys, tmp_path):
    "Weights with their configuration beside them say what the run says; weights alone ask for what they can't know"
    run = trained[0]/'runs'/'digits'
    said = []
    for source, pretrained in ((run, False), (run/'model.safetensors', True)):
        vit_predict.__wrapped__(str(source), [str(run/'samples')], json=True, pretrained=pretrained, device='cpu')
        said.append(list(map(json.loads, capsys.readouterr().out.splitlines())))
    assert [r['class'] for r in said[0]] == [r['class'] for r in said[1]]
    for a, b in zip(*said): assert abs(a['probability'] - b['probability']) < 1e-4
    shutil.copy(run/'model.safetensors', tmp_path/'bare.safetensors')
    with pytest.raises(SystemExit, match="the weights don't tell the number of heads"):
        vit_predict.__wrapped__(str(tmp_path/'bare.safetensors'), [str(run/'samples')], pretrained=True)

def test_a_folder_is_prepared_as_its_run_says(tmp_path, monkeypatch):
    "Crop and interpolation of the loaders are those of a prediction"
    from vit_nbdev.data import folder_dls
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(6): Image.effect_noise((40, 30), 80).save(tmp_path/name/f'{i}.png')
    prep = Preprocessing((16, 24), [0.2], [0.3], in_chans=1, interpolation='bicubic', crop_pct=0.8, resize='squash')
    dls = folder_dls(tmp_path, preprocessing=prep, bs=2, augment=False, device='cpu')
    assert dls.preprocessing == replace(prep, labels=('a', 'b'))
    prepared = {bytes(prep(f).numpy()) for f in tmp_path.rglob('*.png')}
    assert {bytes(x.numpy()) for dl in dls for x in dl.dataset.x} == prepared

def test_same_seed_same_run(tmp_path, no_pictures, few_digits):
    for name in 'ab': vit_train.__wrapped__(epochs=2, seed=3, device='cpu', out=tmp_path/name)
    assert (tmp_path/'a'/'model.safetensors').read_bytes() == (tmp_path/'b'/'model.safetensors').read_bytes()

def test_force_replaces_a_run_and_nothing_else(tmp_path, capsys, no_pictures, few_digits):
    vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'run')
    first = (tmp_path/'run'/'config.json').read_text()
    with pytest.raises(SystemExit, match='--force to replace'):
        vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'run')
    assert (tmp_path/'run'/'config.json').read_text() == first
    vit_train.__wrapped__(epochs=1, seed=1, device='cpu', out=tmp_path/'run', force=True)
    assert json.loads((tmp_path/'run'/'config.json').read_text())['settings']['seed'] == 1
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('three years')
    with pytest.raises(SystemExit, match='not a run of vit_train'):
        vit_train.__wrapped__(epochs=1, device='cpu', out=tmp_path/'mine', force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'run'] and (tmp_path/'mine'/'thesis.txt').exists()

def fake_mnist(path, n=130):
    "A small data set in the layout of MNIST"
    raw = path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        for name, x in (('images-idx3', np.random.default_rng(0).integers(256, size=(n, 28, 28))),
                        ('labels-idx1', np.arange(n) % 10)):
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
    # the test set's well-known beginning
    assert dls[2].dataset.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert abs(dls.preprocessing.mean[0] - 0.1307) < 5e-4 and abs(dls.preprocessing.std[0] - 0.3081) < 5e-4

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
    'folder size':       (dict(data='broken', model='cifar', img_size=30),
                          'img_size=30 is not divisible by patch_size=4: .* 28 and 32'),
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
    'unknown recipe':    (dict(recipe='mnist-quik'), 'the nearest: mnist-quick, mnist'),
    'recipe and data':   (dict(recipe='mnist', data='digits'), "the recipe 'mnist' is for mnist, not digits"),
    'recipe of a folder': (dict(recipe='folder'), "the recipe 'folder' needs --data"),
    'precision':         (dict(precision='fp8'), "precision 'fp8' is not known: use fp32, bf16, fp16 or auto"),
    'optimizer':         (dict(opt='sgd'), "no optimizer 'sgd': choose from adamw, muon"),
    'fp16 on a CPU':     (dict(precision='fp16'), 'fp16 needs a GPU, the device is cpu: use fp32, bf16 or auto'),
    'resume nothing':    (dict(resume='nowhere'), 'there is no unfinished run nowhere.part'),
    'loss explodes':     (dict(lr=1e30),
                          'the loss is no longer a finite number in epoch 1.* try a lower --lr than 1e.30'),
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
    monkeypatch.setattr(MNIST, 'mirrors', [])                    # also where there is a network
    before = contents(traps)
    with pytest.raises(SystemExit, match=sentence) as e:
        vit_train.__wrapped__(**{'epochs': 1, 'device': 'cpu'} | kwargs)
    assert str(e.value).startswith('vit_train: ') and '\n' not in str(e.value)
    assert contents(traps) == before
    assert not list(traps.rglob('.*'))                           # no hidden folder is left

def test_nobody_listens(traps):
    "A command whose output is closed from the start does its work, or ends with its code, and breaks nowhere"
    for code, command in ((0, 'vit_train --epochs 1 --device cpu --out run'), (1, 'vit_predict nowhere x.png')):
        program, *args = command.split()
        done = subprocess.run(['sh', '-c', 'exec "$0" "$@" >&-', Path(sys.executable).with_name(program), *args],
                              cwd=traps, capture_output=True, text=True)
        assert done.returncode == code and 'Traceback' not in done.stderr
    assert done.stderr.startswith('vit_predict: there is no run folder nowhere')
    shutil.rmtree(traps/'run')

def test_labels_that_stratify_refuses_are_no_traceback(traps, monkeypatch, tmp_path):
    "A class with too few images to be split"
    for name, n in (('many', 9), ('few', 2)):
        (tmp_path/'p'/name).mkdir(parents=True)
        for i in range(n): Image.new('L', (8, 8)).save(tmp_path/'p'/name/f'{i}.png')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="class 'few' has too few images"):
        vit_train.__wrapped__('p', epochs=1, device='cpu')

BAD_RUNS = {
    'no folder':       (lambda run: shutil.rmtree(run), 'there is no run folder'),
    'no weights':      (lambda run: (run/'model.safetensors').unlink(), 'lacks model.safetensors'),
    'no config':       (lambda run: (run/'config.json').unlink(), 'lacks config.json'),
    'bad json':        (lambda run: (run/'config.json').write_text('{'), 'config.json is damaged'),
    'other config':    (lambda run: (run/'config.json').write_text('{"model": {"depth": "deep"}}'),
                        'config.json is damaged'),
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
    assert code == 1 and out == ''
    assert err.strip() == ("vit_train: there is no data set 'minst' and no folder of that name; "
                           "did you mean mnist or fashion_mnist?")
    code, out, _ = installed('vit_predict', '--help', cwd=tmp_path)
    assert code == 0 and 'a run folder that vit_train made' in out and 'images [images ...]' in out

def test_help_has_groups_and_examples(tmp_path):
    "Each option once, in the group that `TRAIN_GROUPS` says; no default is said twice; examples below"
    code, said, err = shell('vit_train', '--help', cwd=tmp_path, COLUMNS='200')
    assert (code, err) == (0, '') and not re.search(r'\(default[^)]*\) \(default', said)
    usage, *parts = re.split(r'^(\S[^\n]*):\n', said, flags=re.M)
    found = {title: re.findall(r'^  --(\w+)', body, flags=re.M) for title, body in zip(parts[::2], parts[1::2])}
    assert {title: names for title, names in found.items() if names} == \
           {title: names.split() for title, names in cli.TRAIN_GROUPS.items()}
    assert set(sum(found.values(), [])) == set(re.findall(r'\[--(\w+)', usage))
    assert re.findall(r'^  (vit_train.*?)(?:   .*)?$', said, flags=re.M) == [
        'vit_train', 'vit_train --data pictures',
        'vit_train --data pictures --pretrained timm/vit_base_patch16_224.augreg_in21k_ft_in1k',
        'vit_train --data pictures --pretrained none',
        'vit_train --resume runs/pictures']

PROGRAM = """
from fastcore.script import store_true
from vit_nbdev.cli import command
@command()
def vit_example(a: str, n: int = 3, loud: store_true = False): print(a, n, loud)
vit_example()
vit_example('y')
def inside(): vit_example()
inside()
"""

def test_a_program_reads_its_words_and_a_function_its_arguments(tmp_path):
    (tmp_path/'example.py').write_text(PROGRAM)
    code, out, err = shell('example.py', 'x', '--n', 5, '--loud', cwd=tmp_path)
    assert out == 'x 5 True\ny 3 False\n' and code == 1
    assert "missing 1 required positional argument: 'a'" in err

# --- Ctrl-C ---

def interrupt(cwd, ready, timeout=240):
    "Start a long training, press Ctrl-C as soon as `ready()`, and give what it printed"
    process = Program('vit_train', '--epochs', 2000, '--device', 'cpu', cwd=cwd)
    until = time.time() + timeout
    while not ready() and process.poll() is None and time.time() < until: time.sleep(0.02)
    try:
        for _ in range(3):      # Python now and then swallows an interrupt; a user would press again
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=timeout/2)
                return process.returncode, out, err
    finally: process.kill()
    pytest.fail('three presses of Ctrl-C did not stop it')

def epochs_of(path):
    "How many epochs `metrics.csv` tells of; 0 if there is none yet"
    try: return len(path.read_text().splitlines()) - 1
    except FileNotFoundError: return 0

def test_interrupt_can_be_resumed(tmp_path):
    code, out, err = interrupt(tmp_path, lambda: epochs_of(tmp_path/'runs'/'digits.part'/'metrics.csv') >= 2)
    assert code == 130 and 'Traceback' not in out + err
    assert re.search(r'stopped by Ctrl-C after [0-9]+ epochs; go on with: vit_train --resume runs/digits', err)
    assert [p.name for p in (tmp_path/'runs').iterdir()] == ['digits.part']
    code, _, err = shell('vit_train', '--epochs', 1, '--out', 'runs/digits', cwd=tmp_path)
    said = 'runs/digits.part is an unfinished run: go on with --resume runs/digits, or --force to begin anew'
    assert code == 1 and said in err

def test_interrupt_before_anything_was_learned(tmp_path):
    code, out, err = interrupt(tmp_path, lambda: (tmp_path/'runs'/'digits.part').exists())
    assert code == 130 and 'Traceback' not in out + err and 'nothing was kept' in err
    assert list((tmp_path/'runs').iterdir()) == []

# --- runs that survive ---

FAST = dict(data='digits', recipe='digits', epochs=8, bs=128, seed=5, device='cpu')

def flags(**kwargs): return [str(x) for k, v in kwargs.items() for x in (f'--{k}', v)]

def same_run(a, b):
    for name in ('model.safetensors', 'metrics.csv', 'confusion.png', 'predictions.png', 'curves.png', 'mistakes.png'):
        assert (a/name).read_bytes() == (b/name).read_bytes(), name

def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    "kill -9 at random moments, resume each time; weights, metrics and pictures agree to the last byte"
    code, _, err = shell('vit_train', *flags(**FAST, out='whole'), cwd=tmp_path)
    assert code == 0, err
    rng, kills, at = random.Random(time.time_ns()), 0, []
    args = flags(**FAST, out='killed')
    for attempt in range(4):
        process = Program('vit_train', *args, cwd=tmp_path)
        before, wait = epochs_of(tmp_path/'killed.part'/'metrics.csv'), rng.uniform(0, 1.5)
        while process.poll() is None and epochs_of(tmp_path/'killed.part'/'metrics.csv') <= before: time.sleep(0.005)
        # it comes after the metrics
        while process.poll() is None and not (tmp_path/'killed.part'/'checkpoint.pt').exists(): time.sleep(0.005)
        time.sleep(wait if attempt else 0.)          # anywhere in the epochs that follow; the first time early
        process.kill()
        process.communicate()
        if process.returncode == 0: break
        kills, at = kills + 1, at + [epochs_of(tmp_path/'killed.part'/'metrics.csv')]
        args = flags(resume='killed', device='cpu')
    if process.returncode != 0:
        code, _, err = shell('vit_train', *args, cwd=tmp_path)
        assert code == 0, err
    print(f'killed {kills} times, after epochs {at}')
    assert kills >= 1
    same_run(tmp_path/'whole', tmp_path/'killed')
    assert {p.name for p in (tmp_path/'killed').iterdir()} == RUN_FILES
    config = json.loads((tmp_path/'killed'/'config.json').read_text())
    epochs = epochs_of(tmp_path/'killed'/'metrics.csv')
    seconds = 1257*epochs/config['images_per_second']         # of all epochs, those before the kills too
    assert epochs == config['settings']['epochs'] and abs(seconds - config['seconds']) < 0.06

@pytest.fixture(scope='module')
def unfinished(tmp_path_factory):
    "A run that was killed after three epochs, and the folder it lies in"
    cwd = tmp_path_factory.mktemp('unfinished')
    process = Program('vit_train', *flags(**FAST | dict(epochs=500), out='run'), cwd=cwd)
    while process.poll() is None and epochs_of(cwd/'run.part'/'metrics.csv') < 3: time.sleep(0.02)
    process.kill()
    process.communicate()
    return cwd

def edit(name, **changes):
    "Change entries of a checkpoint's facts"
    state = torch.load(name, weights_only=True)
    state['facts'].update(changes)
    torch.save(state, name)

BAD_RESUMES = {
    'other data':    (lambda f: None, dict(data='mnist'), 'was begun with --data digits, not mnist'),
    'other model':   (lambda f: None, dict(model='mnist'), 'was begun with --model digits, not mnist'),
    'other epochs':  (lambda f: None, dict(epochs=7), 'was begun with --epochs 500, not 7'),
    'with out':      (lambda f: None, dict(out='elsewhere'), 'leave out --out and --force'),
    'other images':  (lambda f: edit(f, images='0123'), {}, 'the images are not those'),
    'newer format':  (lambda f: torch.save(torch.load(f, weights_only=True) | {'format': 99}, f), {},
                      'format 99, .* update vit_nbdev'),
    'other weights': (lambda f: edit(f, changes=dict(depth=3)), {}, 'holds another model'),
    'truncated':     (lambda f: f.write_bytes(f.read_bytes()[:-500]), {}, 'is damaged or no checkpoint'),
    'no checkpoint': (lambda f: f.write_bytes(b'hello'), {}, 'is damaged or no checkpoint'),
    'none at all':   (lambda f: f.unlink(), {}, 'has no checkpoint yet'),
}

@pytest.mark.parametrize('name', BAD_RESUMES)
def test_bad_resume(name, unfinished, tmp_path):
    damage, kwargs, sentence = BAD_RESUMES[name]
    part = shutil.copytree(unfinished/'run.part', tmp_path/'run.part')
    damage(part/'checkpoint.pt')
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=sentence) as e:
        vit_train.__wrapped__(resume=str(tmp_path/'run'), device='cpu', **kwargs)
    assert '\n' not in str(e.value) and 'Exception occured' not in str(e.value)
    assert contents(tmp_path) == before or name == 'other weights'     # what could be of use is still there

def test_finished_runs_are_not_resumed(trained):
    with pytest.raises(SystemExit, match='is finished: there is nothing to resume'):
        vit_train.__wrapped__(resume=str(trained[0]/'runs'/'digits'))

def test_a_checkpoint_that_cant_be_written_leaves_the_last_one(tmp_path):
    "The disk is full: one sentence, and the good file is still there"
    from vit_nbdev.learner import save_atomic
    if not Path('/dev/full').exists(): pytest.skip('no /dev/full here')
    file = tmp_path/'checkpoint.pt'
    save_atomic(dict(epoch=3), file)
    (tmp_path/'checkpoint.pt.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError,
                       match="can't write .*checkpoint.pt .*; .*checkpoint.pt, which was written before, is whole"):
        save_atomic(dict(epoch=4, x=torch.zeros(100_000)), file)
    assert torch.load(file)['epoch'] == 3 and [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']

def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path):
    "At whatever moment it comes, it is no 'disk full', and the file is whole"
    from vit_nbdev.learner import save_atomic
    file, weights = tmp_path/'checkpoint.pt', {str(i): torch.zeros(3000) for i in range(200)}
    save_atomic(dict(epoch=1), file)
    def pressed(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, pressed)
    try:
        for i in range(40):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-3 + 2e-4*i)
                for _ in range(50): save_atomic(dict(epoch=1, weights=weights), file)
                # Python swallows one that comes while it tidies up: rare, and then there is nothing to see
                raise KeyboardInterrupt
            assert torch.load(file)['epoch'] == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

# --- several processes ---

TWO = """
import sys, torch
from pathlib import Path
from fastai.torch_core import set_seed, num_distrib, rank_distrib
from fastai.callback.core import Callback
from vit_nbdev.data import digits_dls, tensor_dls
from vit_nbdev.learner import deal, vit_learner
from vit_nbdev.runs import MetricsFile, _join_processes
from vit_nbdev.vit import vit
torch.set_num_threads(1)
class Seen(Callback):
    "Which images came in an epoch, told apart by their bytes"
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training and self.epoch == 0: self.seen.append([x.numpy().tobytes() for x in self.x])
set_seed(0)
_join_processes(torch.device('cpu'))
dls = deal(digits_dls(bs=60, augment=False, device='cpu'))
learn = vit_learner(dls, 'digits', cbs=Seen())
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False): learn.fit_one_cycle(2, 3e-3)
weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
result = dict(weights=weights, seen=learn.seen.seen)

# nine validation images, which two processes can't share evenly, and weights that stay as they are
set_seed(1)
train, valid = (dl.dataset for dl in dls.loaders[:2])
model = vit('digits')
torch.nn.init.normal_(model.head.weight)
x, y = valid.x[:9], valid.y[:9]
splits, vocab = ((train.x, train.y), (x, y), (x, y)), list('0123456789')
nine = deal(tensor_dls(*splits, vocab, bs=60, augment=False, device='cpu'))
learn = vit_learner(nine, model, cbs=MetricsFile(Path(f'{sys.argv[1]}.csv')))
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False): learn.fit(1, 0.)
with torch.no_grad(): logits = model.eval()(nine.preprocessing.normalise(x))
loss, right = torch.nn.functional.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
result |= dict(values=list(learn.recorder.values[-1][1:]), by_hand=[loss.item(), right.item()])
torch.save(result, f'{sys.argv[1]}-{rank_distrib()}.pt')
"""

def two(name, *args, cwd):
    "Exit codes and error streams of a program in two processes, with the environment that torchrun gives to each"
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    both = [Program(name, *args, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **common) for rank in '01']
    errors = [process.communicate()[1] for process in both]
    return [process.returncode for process in both], errors

def test_two_processes_train_as_one(tmp_path):
    "The same global batches give the same weights up to rounding, and each image is seen by one process only"
    (tmp_path/'two.py').write_text(TWO)
    code, _, err = shell('two.py', 'one', cwd=tmp_path)
    assert code == 0, err
    codes, errors = two('two.py', 'two', cwd=tmp_path)
    assert codes == [0, 0], errors
    one, a, b = (torch.load(tmp_path/f, weights_only=False) for f in ('one-0.pt', 'two-0.pt', 'two-1.pt'))
    assert torch.equal(a['weights'], b['weights'])
    change = (one['weights'] - a['weights']).abs().max()
    assert change < 2e-4, change                       # rounding; the weights have moved by about 0.1
    assert len(one['seen']) == len(a['seen']) == len(b['seen'])
    for whole, x, y in zip(one['seen'], a['seen'], b['seen']):
        assert sorted(whole) == sorted(x + y) and len(x) == len(y) == 30

    # each validation image counts once: the figures are those of one process, and by hand
    assert one['values'] == a['values'] == b['values']
    torch.testing.assert_close(torch.tensor(a['values']), torch.tensor(a['by_hand']), atol=1e-6, rtol=1e-6)
    tables = [(tmp_path/f'{name}.csv').read_text().splitlines() for name in ('one', 'two')]
    columns = [[line.split(',')[2:] for line in table] for table in tables]
    assert columns[0] == columns[1] and columns[0][0] == ['valid_loss', 'accuracy']

def test_vit_train_in_two_processes(tmp_path):
    "One run folder, written by the first process; a batch that can't be dealt is refused"
    here = ('--standalone', '--local_addr=localhost')         # the machine's own name may lead nowhere
    code, out, err = installed('torchrun', *here, '--nproc_per_node=2', '--no_python', *command('vit_train'),
                               *flags(epochs=1, bs=64, device='cpu', out='run'), cwd=tmp_path)
    assert code == 0, err
    assert out.count('test accuracy') == 1 and 'processes: 2' in out
    assert {p.name for p in (tmp_path/'run').iterdir()} == RUN_FILES and [p.name for p in tmp_path.iterdir()] == ['run']
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['processes'] == 2 and config['n_test'] == 360       # the first process tests on all images
    codes, errors = two('vit_train', *flags(epochs=1, bs=63, device='cpu', out='odd'), cwd=tmp_path)
    assert codes == [1, 1]
    for err in errors: assert "a batch of 63 can't be dealt to 2 processes" in err
    assert [p.name for p in tmp_path.iterdir()] == ['run']

PHOTOS = """
import sys, torch
from fastai.torch_core import rank_distrib
from vit_nbdev import runs
from vit_nbdev.learner import Checkpoint
runs.WEIGHTS, runs.PHOTOGRAPH, seen = dict(cpu=sys.argv[2]), 20, []
def before_batch(self):
    if self.training: seen.extend(x.numpy().tobytes() for x in self.x)
Checkpoint.before_batch = before_batch
runs.train(sys.argv[1], epochs=1, bs=8, device='cpu', stream=True, workers=0, out='run')
torch.save(seen, f'seen-{rank_distrib()}.pt')
"""

def test_two_processes_begin_with_the_same_weights(tmp_path, pictures):
    "The first fetches them and decides for both; and each streamed picture is seen by one of them only"
    from vit_nbdev.vit import vit
    (tmp_path/'photos.py').write_text(PHOTOS)
    prep = Preprocessing(16, [0.3]*3, [0.6]*3, labels=('x', 'y', 'z'))
    save_model(vit('digits', img_size=16, in_chans=3, n_classes=3, patch_size=4), tmp_path/'trained', prep)
    codes, errors = two('photos.py', pictures, tmp_path/'trained', cwd=tmp_path)
    assert codes == [0, 0], errors
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['processes'] == 2 and config['settings']['pretrained'] == str(tmp_path/'trained')
    assert config['preprocessing']['mean'] == [0.3]*3
    a, b = (torch.load(tmp_path/f'seen-{rank}.pt', weights_only=False) for rank in (0, 1))
    assert len(a) == len(b) > 0 and len(set(a + b)) == len(a + b)

# --- what is predicted and what is explained are the same pixels ---

def test_predict_and_explain_see_identical_inputs(tmp_path, monkeypatch):
    "An oblong photograph, a crop of its own, another interpolation: bit for bit the same tensor"
    from vit_nbdev.vit import vit
    model = vit('mnist', in_chans=3, img_size=(28, 56)).eval()
    torch.nn.init.normal_(model.head.weight)
    prep = Preprocessing((28, 56), [0.4]*3, [0.2, 0.3, 0.4], crop_pct=0.4, interpolation='bicubic',
                         labels=list('abcdefghij'))
    save_model(model, tmp_path/'run', prep)
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(300, 100, 3), (40, 90, 3), (7, 7)]):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(tmp_path/f'{i}.png')
    files, seen = sorted(tmp_path.glob('*.png')), []
    embed = type(model).embed
    monkeypatch.setattr(type(model), 'embed', lambda self, x: (seen.append(x), embed(self, x))[1])
    predicted = predict(tmp_path/'run', files, device='cpu')
    explain(tmp_path/'run', files, tmp_path/'page.html', device='cpu')
    first, *others = seen
    assert first.shape == (3, 3, 28, 56) and others and all(torch.equal(first, x) for x in others)
    assert len({r['probability'] for r in predicted}) == 3

# --- results first, pictures after ---

def test_a_picture_that_fails_costs_no_run(tmp_path, monkeypatch, capsys, few_digits):
    "The run is whole, the picture is named, and the page shows the others"
    import vit_nbdev.report as report
    def broken(*args): raise RuntimeError('no font for this')
    monkeypatch.setattr(report, 'plot_confusion', broken)
    train(epochs=1, device='cpu', out=tmp_path/'run')
    assert 'confusion could not be drawn and is left out (RuntimeError: no font for this)' in capsys.readouterr().out
    assert {p.name for p in (tmp_path/'run').iterdir()} == RUN_FILES - {'confusion.png'}
    assert (tmp_path/'run'/'report.html').read_text().count('data:image/png') == 4
    assert predict(tmp_path/'run', tmp_path/'run'/'samples')[0]['class']

def test_a_run_that_died_while_it_was_drawn_is_finished_without_training(tmp_path, monkeypatch, few_digits):
    import vit_nbdev.runs as runs
    def killed(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(runs, 'draw_pictures', killed)
        with pytest.raises(KeyboardInterrupt, match='stopped by Ctrl-C after 2 epochs'):
            train(epochs=2, device='cpu', out=tmp_path/'run')
    weights = (tmp_path/'run.part'/'model.safetensors').read_bytes()
    run = train(resume=tmp_path/'run', device='cpu')
    assert {p.name for p in run.iterdir()} == RUN_FILES and (run/'model.safetensors').read_bytes() == weights

@pytest.mark.parametrize('name', ['$', '$5_$10', r'\frac', 'x'*200, '汉字'])
def test_any_class_name_is_drawn(name, tmp_path):
    for label in (name, 'other'):
        (tmp_path/'pictures'/label).mkdir(parents=True)
        for i in range(6): Image.effect_noise((8, 8), 60).save(tmp_path/'pictures'/label/f'{i}.png')
    run = train(str(tmp_path/'pictures'), model='digits', img_size=8, epochs=1, bs=4, device='cpu', out=tmp_path/'run')
    assert RUN_FILES - {'mistakes.png'} <= {p.name for p in run.iterdir()}
    assert name in load_model(run)[0].preprocessing.labels

def test_a_log_that_nobody_watches_has_a_line_per_epoch(tmp_path):
    code, out, err = shell('vit_train', '--epochs', 3, '--device', 'cpu', cwd=tmp_path)
    lines = [line for line in out.splitlines() if line.startswith('epoch ')]
    assert code == 0 and len(lines) == 3 and len(out) < 2500 and '\r' not in out
    assert re.match(r'epoch 3/3  train_loss [\d.]+  valid_loss [\d.]+  accuracy [\d.]+  [\d.]+ s an epoch, 0 s left',
                    lines[-1])

def test_names_that_the_terminal_lacks(tmp_path, monkeypatch):
    "A class in Chinese letters on a terminal of western Europe: escaped, no traceback"
    from vit_nbdev.vit import vit
    save_model(vit('digits'), tmp_path/'run', Preprocessing(8, [0.5], [0.5], in_chans=1, labels=['汉字']*10))
    Image.new('L', (8, 8)).save(tmp_path/'a.png')
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
    monkeypatch.setattr(sys, 'stdout', terminal)
    vit_predict.__wrapped__(str(tmp_path/'run'), [str(tmp_path/'a.png')], device='cpu')
    assert b'\\u6c49\\u5b57 (10.0 %)' in terminal.buffer.getvalue()
