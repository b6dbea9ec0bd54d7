"""Runs, checkpoints and commands under bad conditions: each fault of its kind with its value, and two neighbours."""
import errno, json, os, shutil, signal, stat, subprocess, sys
from contextlib import redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from programs import shell
from vit_nbdev import data as data_module, report, runs
from vit_nbdev.cli import plain_errors, vit_explain, vit_predict, vit_train
from vit_nbdev.data import digits_dls
from vit_nbdev.learner import load_checkpoint, save_atomic, vit_learner
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.report import plot_curves
from vit_nbdev.runs import explain, load_model, predict, save_model, train
from vit_nbdev.vit import vit

pytestmark = pytest.mark.usefixtures('few_digits_in_module')

class Killed(BaseException): "What a run dies of here: no error that anybody catches"

def die(*_, **__): raise Killed

def unfinished(out, monkeypatch, **kwargs):
    "A run of two epochs that died when all was trained, before it was tested"
    with monkeypatch.context() as m:
        m.setattr(runs, 'class_probabilities', die)
        with pytest.raises(Killed), redirect_stdout(StringIO()):
            train(**dict(epochs=2, device='cpu', out=out) | kwargs)
    return out.with_name(f'{out.name}.part')

def pictures(folder, n=9, **levels):
    "A folder per class, told apart by brightness"
    rng = np.random.default_rng(0)
    for name, level in (levels or dict(dark=60, light=190)).items():
        (folder/name).mkdir(parents=True)
        for i in range(n):
            pixels = (level + rng.normal(0, 9, (8, 8, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder/name/f'{i}.png')
    return folder

FOLDER = dict(model='digits', img_size=8, bs=4, device='cpu')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = vit('digits')
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp('runs')/'run'
    save_model(model, path, Preprocessing(8, [0.3], [0.4], in_chans=1, labels=[*'abcdefghij']))
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(path.parent/'a.png')
    return path

def contents(path): return {p: p.read_bytes() for p in path.rglob('*') if p.is_file()}

# --- the place of the data (15) ---

def test_a_run_resumes_from_anywhere(tmp_path, monkeypatch, no_pictures):
    "Begun with a relative --data; resumed from another folder, and after the pictures have moved"
    monkeypatch.chdir(pictures(tmp_path/'here'/'pictures').parent)
    part = unfinished(tmp_path/'run', monkeypatch, data='pictures', **FOLDER)
    shutil.copytree(part, tmp_path/'moved.part')
    monkeypatch.chdir(tmp_path)
    assert load_model(train(resume='run', device='cpu'))[1]['settings']['path'] == str(tmp_path/'here'/'pictures')

    (tmp_path/'here').rename(tmp_path/'there')
    with pytest.raises(FileNotFoundError, match='no longer in .*here/pictures: say with --data where'):
        train(resume='moved', device='cpu')
    pictures(tmp_path/'others', dark=80, light=190)
    with pytest.raises(ValueError, match='the images are not those that'):
        train('others', resume='moved', device='cpu')
    with pytest.raises(ValueError, match='was begun with --data folder, not digits'):
        train('digits', resume='moved', device='cpu')
    train('there/pictures', resume='moved', device='cpu')
    a, b = ((tmp_path/name/'model.safetensors').read_bytes() for name in ('run', 'moved'))
    assert a == b

def test_a_run_reads_its_pictures_as_it_began_to(tmp_path, monkeypatch, no_pictures):
    "Whether they fit in memory may be another matter when it goes on; the readers' number is nothing to hold on to"
    folder = str(pictures(tmp_path/'pictures'))
    with monkeypatch.context() as short:
        short.setattr(data_module, 'BUDGET', 0)
        part = unfinished(tmp_path/'streamed', monkeypatch, data=folder, **FOLDER)
    assert load_checkpoint(part/'checkpoint.pt')['facts']['stream'] is True
    settings = load_model(train(resume=tmp_path/'streamed', device='cpu', workers=0))[1]['settings']
    assert (settings['stream'], settings['workers']) == (True, 0)
    unfinished(tmp_path/'kept', monkeypatch, data=folder, **FOLDER)
    monkeypatch.setattr(data_module, 'BUDGET', 0)
    with pytest.raises(ValueError, match='was begun with --workers None, not 2'):
        train(resume=tmp_path/'kept', device='cpu', workers=2)
    assert load_model(train(resume=tmp_path/'kept', device='cpu'))[1]['settings']['stream'] is False

def test_a_table_whose_pictures_have_moved(tmp_path, monkeypatch, no_pictures):
    "They are found with --path, as the error says"
    files = sorted(pictures(tmp_path/'here').rglob('*.png'))
    rows = [f'{f.relative_to(tmp_path/"here")},{f.parent.name}' for f in files]
    (tmp_path/'t.csv').write_text('\n'.join(['name,label', *rows]))
    table = dict(data=str(tmp_path/'t.csv'), path=str(tmp_path/'here'))
    part = unfinished(tmp_path/'run', monkeypatch, **table, **FOLDER)
    shutil.copytree(part, tmp_path/'moved.part')
    (tmp_path/'here').rename(tmp_path/'there')
    with pytest.raises(OSError, match='18 of 18 files are not there.*say with path .--path.'):
        train(resume=tmp_path/'run', device='cpu')
    for name, given in (('run', {}), ('moved', dict(data=table['data']))):
        config = load_model(train(resume=tmp_path/name, path=tmp_path/'there', device='cpu', **given))[1]
        assert (config['settings']['path'], config['settings']['pictures']) == (table['data'], str(tmp_path/'there'))

def test_resume_from_within_the_folder(tmp_path, monkeypatch, no_pictures):
    part = unfinished(tmp_path/'run', monkeypatch)
    monkeypatch.chdir(part)
    assert load_model(train(resume='.', device='cpu'))[1]['settings']['epochs'] == 2

@pytest.mark.parametrize('found, other', [('fp32', 'bf16'), ('bf16', 'fp32')])
def test_a_trained_run_goes_on_to_its_test(tmp_path, monkeypatch, no_pictures, capsys, found, other):
    "With the precision that was found, if it is asked for again as it was; and nobody is told to delete anything"
    monkeypatch.setattr(runs, '_has_bf16', lambda _: found == 'bf16')
    monkeypatch.setattr(runs, '_bf16_ratio', lambda *_: 0.6)
    part = unfinished(tmp_path/'run', monkeypatch, precision='auto')
    with pytest.raises(ValueError, match=f'was begun with --precision {found}, not {other}'):
        train(resume=tmp_path/'run', precision=other, device='cpu')
    capsys.readouterr()
    train(resume=tmp_path/'run', precision='auto', device='cpu')
    said = capsys.readouterr().out
    assert f"{part/'checkpoint.pt'} has this fit of 2 epochs to its end: none is left to train" in said
    assert 'delete' not in said and 'test accuracy' in said

def test_a_finished_run_gets_no_more_epochs(run):
    for epochs in (None, 5):
        with pytest.raises(ValueError, match='is finished: .* for more epochs train anew with --epochs'):
            train(resume=run, epochs=epochs)

# --- arguments (20) and devices (9, 23) ---

BAD_NUMBERS = {
    'epochs': (dict(epochs=10**23), 'epochs is 1000.*, but must be above zero and below 2e.09'),
    'epochs, a hair too many': (dict(epochs=2**31), 'epochs is 2147483648'),
    'a text for epochs': (dict(epochs='3'), "epochs is '3', expected int"),
    'lr': (dict(lr=1e300), 'lr is 1e.300, but must be'),
    'an endless lr': (dict(lr=float('inf')), 'lr is inf'),
    'bs': (dict(bs=10**30), 'bs is 1000'),
    'seed': (dict(seed=2**64), 'seed is 18446744073709551616, but must be from 0 to 4294967295'),
    'seed below zero': (dict(seed=-1), 'seed is -1'),
    'True for bs': (dict(bs=True), 'bs is True, expected int'),
    'img_size': (dict(data='pictures', img_size=4*10**9), 'img_size=4000000000 must be a positive integer'),
    'img_size that no memory holds': (dict(data='pictures', img_size=4*10**4), 'take 86.4 GB at 40000 x 40000 pixels'),
}

@pytest.mark.parametrize('name', BAD_NUMBERS)
def test_numbers_out_of_range(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module.psutil, 'virtual_memory', lambda: SimpleNamespace(available=24e9))
    pictures(tmp_path/'pictures')
    kwargs, sentence = BAD_NUMBERS[name]
    with pytest.raises(SystemExit, match=sentence) as e: vit_train.__wrapped__(**dict(device='cpu') | kwargs)
    assert '\n' not in str(e.value) and not (tmp_path/'runs').exists() or not list((tmp_path/'runs').iterdir())

@pytest.mark.parametrize('name', ['meta', 'xla', 'vulkan', 'hpu', 'mkldnn', 'xpu', 'cuda:-1', '', 'gpu'])
def test_devices_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device '{name}' is not (known|supported)"): runs.get_device(name)

def test_apples_gpu_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for there, device in ((True, 'mps'), (False, 'cpu')):
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: there)
        assert runs.get_device().type == device
    with pytest.raises(ValueError, match="device 'mps' was asked for, but torch finds none"): runs.get_device('mps')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert runs.get_device().type == 'cuda'

def test_memory_that_is_not_there_is_a_sentence():
    for ask in (lambda: torch.empty(2**50), lambda: np.empty(2**50, np.uint8), lambda: torch.empty(2**62, 2**62)):
        with pytest.raises(SystemExit, match='vit_train: there is not enough memory: choose smaller batches'):
            with plain_errors('vit_train'): ask()
    with pytest.raises(RuntimeError, match='another'), plain_errors('vit_train'): raise RuntimeError('another')

# --- what is written (22, 41) ---

def test_files_are_as_open_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_model(vit('digits'), tmp_path/'run', Preprocessing(8, [0.3], [0.4], in_chans=1, labels=['x']*10))
        os.umask(0o027)
        save_atomic(dict(x=1), tmp_path/'x.pt')
        explain(tmp_path/'run', pictures(tmp_path/'p'), tmp_path/'page.html', device='cpu')
    finally: os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [*(tmp_path/'run').iterdir(), *tmp_path.glob('*.*')]}
    assert modes == {'model.safetensors': 0o644, 'config.json': 0o644, 'x.pt': 0o640, 'page.html': 0o640}

def full(path_of):
    "A disk that is full when a file of this name is put in its place"
    fsync = os.fsync
    def fail(handle):
        if path_of(Path(os.readlink(f'/proc/self/fd/{handle}'))): raise OSError(errno.ENOSPC, 'No space left on device')
        return fsync(handle)
    return fail

def curves_only(folder, model, values, *_, **__):
    "In place of `draw_pictures`, of which these tests need one"
    plot_curves(*zip(*values)).savefig(folder/'curves.png', dpi=110)
    return {}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs, 'draw_pictures', curves_only)
        return train(epochs=2, device='cpu', out=tmp_path_factory.mktemp('whole')/'run')

@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='no /proc here')
@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'metrics.csv', 'checkpoint.pt'])
def test_a_full_disk_costs_no_training(name, whole, tmp_path, monkeypatch):
    "The file is named, and so is --resume, which ends the run with the same bytes"
    monkeypatch.setattr(runs, 'draw_pictures', curves_only)
    epoch = dict(n=0)
    def hit(path):
        epoch['n'] += path.name == f'{name}.tmp'
        return path.name == f'{name}.tmp' and epoch['n'] > (name in ('metrics.csv', 'checkpoint.pt'))
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full(hit))
        with pytest.raises(SystemExit) as e: vit_train.__wrapped__(epochs=2, device='cpu', out=tmp_path/'run')
    assert f"can't write {tmp_path/'run.part'/name} (No space left on device)" in str(e.value)
    assert str(e.value).endswith(f"; go on with: vit_train --resume {tmp_path/'run'}")
    assert not list((tmp_path/'run.part').glob('*.tmp'))
    train(resume=tmp_path/'run', device='cpu')
    for file in ('model.safetensors', 'metrics.csv', 'curves.png'):
        assert (tmp_path/'run'/file).read_bytes() == (whole/file).read_bytes()

def test_a_disk_that_is_full_for_the_pictures(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    def fail(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Figure, 'savefig', fail)
        with pytest.raises(OSError, match="can't write .*run.part/curves.png .No space left on device.; go on"):
            train(epochs=1, device='cpu', out=tmp_path/'run')
    assert predict(tmp_path/'run.part', digits_dls(device='cpu')[2].dataset.x[0, 0].numpy(), device='cpu')
    assert (train(resume=tmp_path/'run', device='cpu')/'curves.png').is_file()

@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='no /proc here')
def test_half_a_page_never_replaces_a_whole_one(run, tmp_path, monkeypatch):
    page = explain(run, run.parent/'a.png', tmp_path/'page.html', device='cpu')
    before = contents(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full(lambda path: path.name == 'page.html.tmp'))
        with pytest.raises(SystemExit, match="can't write .*page.html .No space left on device"):
            vit_explain.__wrapped__(str(run), [str(run.parent/'a.png')], out=str(page), force=True)
    with monkeypatch.context() as m:
        m.setattr(runs, 'explore', die)
        with pytest.raises(Killed): explain(run, run.parent/'a.png', page, force=True, device='cpu')
    assert contents(tmp_path) == before

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full here')
def test_output_that_cant_be_written(run):
    code, _, err = shell('vit_predict', run, run.parent/'a.png', cwd=run.parent, stdout='/dev/full')
    assert (code, err) == (1, "vit_predict: can't write the output (No space left on device)\n")

def test_a_reader_that_has_seen_enough_is_no_error(capsys):
    "`vit_predict ... | head -1`"
    with pytest.raises(SystemExit) as e, plain_errors('vit_predict'): raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
    assert e.value.code == 1 and capsys.readouterr() == ('', '')

# --- one process at a time (42) ---

def test_a_run_that_another_process_is_at(tmp_path, monkeypatch, no_pictures):
    "Resume of a living run, a second --force on one --out, a new run of that name: each names the other process"
    part = unfinished(tmp_path/'run', monkeypatch)
    holder = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print('held', flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, '-c', holder, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    before, said = contents(tmp_path), r'another process is at this run \(.*run.part\): wait until it is done'
    try:
        for kwargs in (dict(resume=tmp_path/'run'), dict(out=tmp_path/'run', force=True), dict(out=tmp_path/'run')):
            with pytest.raises(OSError, match=said): train(device='cpu', epochs=2, **kwargs)
        assert contents(tmp_path) == before
    finally:
        other.kill()          # its lock dies with it
        other.wait()
    assert train(resume=tmp_path/'run', device='cpu').is_dir()

def test_a_living_run_is_locked(tmp_path, monkeypatch):
    "... from its first moment, in this very process"
    def second(*_): train(resume=tmp_path/'run', device='cpu')
    monkeypatch.setattr(runs, 'class_probabilities', second)
    with pytest.raises(OSError, match='another process is at this run'):
        train(epochs=1, device='cpu', out=tmp_path/'run')
    assert (tmp_path/'run.part'/'checkpoint.pt').is_file()

def test_force_begins_an_unfinished_run_anew(tmp_path, monkeypatch, no_pictures):
    part = unfinished(tmp_path/'run', monkeypatch)
    (part/'samples').mkdir()
    (part/'samples'/'old.png').write_text('x')
    run = train(epochs=1, seed=1, device='cpu', out=tmp_path/'run', force=True)
    assert load_model(run)[1]['settings']['seed'] == 1 and not (run/'samples'/'old.png').exists()
    assert [p.name for p in tmp_path.iterdir()] == ['run']

@pytest.mark.parametrize('out', ['run.part', 'deeper/run.part', '/', '/..'])
def test_names_that_are_none_for_a_run(out, tmp_path, monkeypatch):
    "`NAME.part` is that of the unfinished run NAME"
    monkeypatch.chdir(tmp_path)
    said = "(^/|run.part) can't be the name of a run: .*runs/mine$"
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    with pytest.raises(ValueError, match=said): train(device='cpu', epochs=1, out=out, force=True)
    with pytest.raises(ValueError, match=said): runs.save_run(learn, out, force=True)
    assert not list(tmp_path.iterdir())

def test_a_point_is_the_folder_that_it_means(tmp_path, monkeypatch):
    (tmp_path/'mine'/'deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'mine'/'deep')
    for out, name in (('.', 'mine/deep'), ('..', 'mine')):
        with pytest.raises(FileExistsError, match=f'{tmp_path/name} exists: choose another --out'):
            train(device='cpu', epochs=1, out=out)

def test_what_has_the_name_of_a_run_is_not_deleted(tmp_path, monkeypatch):
    "Neither beside an unfinished run that goes on, nor if it is made while one trains; --force is remembered"
    unfinished(tmp_path/'run', monkeypatch)
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='run exists beside its unfinished run .*give one of them another name'):
        train(resume=tmp_path/'run', device='cpu')
    (tmp_path/'run').rename(tmp_path/'notes')
    finish = runs._finish
    def late(*args):
        (tmp_path/'notes').rename(tmp_path/'run')
        return finish(*args)
    monkeypatch.setattr(runs, '_finish', late)
    with pytest.raises(FileExistsError, match='run was made meanwhile: give it another name, and finish with'):
        train(resume=tmp_path/'run', device='cpu')
    assert (tmp_path/'run'/'notes.txt').read_text() == 'mine' and (tmp_path/'run.part'/'checkpoint.pt').is_file()
    (tmp_path/'run').rename(tmp_path/'notes')
    monkeypatch.setattr(runs, '_finish', finish)
    run = train(resume=tmp_path/'run', device='cpu')
    unfinished(run, monkeypatch, force=True, seed=1)
    assert load_model(run)[1]['settings']['seed'] == 0
    train(resume=run, device='cpu')
    assert load_model(run)[1]['settings']['seed'] == 1 and not (run/'.replaces').exists()

def test_a_disk_is_not_replaced(tmp_path, monkeypatch):
    "A folder where one is mounted can't be renamed: said before the training"
    (tmp_path/'run').mkdir()
    monkeypatch.setattr(os.path, 'ismount', lambda path: path == tmp_path/'run')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='run is where a disk is mounted: name a folder in it .--out'):
            train(epochs=1, device='cpu', out=tmp_path/'run', force=force)

def test_a_run_that_cant_be_renamed_is_replaced(tmp_path, monkeypatch, no_pictures):
    "As in a container's own layers; and what fails can be done again"
    run, rename = train(epochs=1, device='cpu', out=tmp_path/'run'), os.rename
    def refused(a, b, **kwargs):
        if Path(a).name == 'run': raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(a), None, str(b))
        return rename(a, b, **kwargs)
    monkeypatch.setattr(os, 'rename', refused)
    train(epochs=1, seed=1, device='cpu', out=run, force=True)
    assert load_model(run)[1]['settings']['seed'] == 1 and [p.name for p in tmp_path.iterdir()] == ['run']
    copy = shutil.copytree
    def full(a, b, **kwargs):
        Path(b).mkdir(parents=True)
        (Path(b)/'half').touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(b))
    monkeypatch.setattr(shutil, 'copytree', full)
    with pytest.raises(OSError, match='No space left on device'):
        train(epochs=1, seed=2, device='cpu', out=run, force=True)
    assert load_model(run)[1]['settings']['seed'] == 1                          # and no half of a copy beside it
    assert {p.name for p in tmp_path.iterdir()} == {'run', 'run.part'}
    monkeypatch.setattr(shutil, 'copytree', copy)
    train(resume=run, device='cpu')
    assert load_model(run)[1]['settings']['seed'] == 2 and not (run/'.replaces').exists()

# --- Ctrl-C (43) ---

def press(): signal.raise_signal(signal.SIGINT)

def stopped(capsys, **kwargs):
    "What `vit_train` says when Ctrl-C ends it"
    with pytest.raises(SystemExit) as e: vit_train.__wrapped__(device='cpu', **kwargs)
    assert e.value.code == 130
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return capsys.readouterr().err

def test_ctrl_c_twice(tmp_path, monkeypatch, capsys):
    "The second comes while the first is dealt with: the message is that of the first, and it is true"
    epochs = runs._epochs
    def twice(part):
        press()
        return epochs(part)
    monkeypatch.setattr(runs, '_epochs', twice)
    monkeypatch.setattr(runs, 'class_probabilities', lambda *_: press())
    said = stopped(capsys, epochs=1, out=tmp_path/'run')
    assert said == f"vit_train: stopped by Ctrl-C after 1 epochs; go on with: vit_train --resume {tmp_path/'run'}\n"
    assert (tmp_path/'run.part'/'checkpoint.pt').is_file()

def test_ctrl_c_twice_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    rmtree = shutil.rmtree
    def twice(*args, **kwargs):
        press()
        rmtree(*args, **kwargs)
    monkeypatch.setattr(runs, '_prepare', lambda *_: press())
    monkeypatch.setattr(shutil, 'rmtree', twice)
    said = stopped(capsys, epochs=1, out=tmp_path/'run')
    assert said == "vit_train: stopped by Ctrl-C before the first epoch was complete: nothing was kept\n"
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('moment', ['before the rename', 'after the rename'])
def test_ctrl_c_while_a_run_gets_its_name(moment, tmp_path, monkeypatch, capsys, no_pictures):
    "The run is whole, and nothing says that it was lost"
    put = runs._put_in_place
    def pressed(part, out):
        if moment == 'before the rename': press()
        put(part, out)
        if moment == 'after the rename': press()
    monkeypatch.setattr(runs, '_put_in_place', pressed)
    assert stopped(capsys, epochs=1, out=tmp_path/'run') == "vit_train: stopped by Ctrl-C\n"
    assert [p.name for p in tmp_path.iterdir()] == ['run'] and not list((tmp_path/'run').glob('*.pt'))
    assert load_model(tmp_path/'run')[1]['settings']['epochs'] == 1

PROGRAM = """
import signal, sys
from vit_nbdev.cli import {command}
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}: signal.raise_signal(signal.SIGINT)
if __name__ == '__main__':
    sys.meta_path.insert(0, Press())
    try: {command}()
    finally: print(sorted(set(sys.modules) & {{'torch', 'fastai', 'numpy', 'matplotlib', 'PIL'}}))
"""

@pytest.mark.parametrize('module, command', [('torch', 'vit_train'), ('numpy', 'vit_predict'),
                                             ('fastai.learner', 'vit_explain')])
def test_ctrl_c_during_imports(module, command, tmp_path):
    (tmp_path/'program.py').write_text(PROGRAM.format(module=module, command=command))
    args = [] if command == 'vit_train' else ['run', 'a.png']
    done = subprocess.run([sys.executable, 'program.py', *args], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f'{command}: stopped by Ctrl-C\n')

# --- help comes at once (34) ---

@pytest.mark.parametrize('command', ['vit_train', 'vit_predict', 'vit_explain'])
def test_help_imports_nothing_heavy(command, tmp_path):
    (tmp_path/'program.py').write_text(PROGRAM.format(module='', command=command))
    done = subprocess.run([sys.executable, 'program.py', '--help'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '--device' in done.stdout and done.stderr == ''
    assert done.stdout.endswith('\n[]\n')        # the modules that were loaded

def test_the_library_is_imported_in_silence():
    "fastai's use of torch.jit.script is not the user's affair"
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONWARNINGS'}
    done = subprocess.run([sys.executable, '-W', 'error::FutureWarning', '-c', 'import vit_nbdev.runs'],
                          capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, '')

# --- a checkpoint that is not what it says (38, 39, 40) ---

def facts(**changes): return lambda state: state | dict(facts=state['facts'] | changes)

def nan(state):
    return state | dict(model={k: v*float('nan') if k == 'head.bias' else v for k, v in state['model'].items()})

CHECKPOINTS = {
    'a billion blocks': (facts(changes=dict(depth=10**9)),
                         'holds another model: it has 3 blocks, the configuration 1000000000'),
    'millions of registers': (facts(changes=dict(depth=3, n_registers=2*10**7)),
                              'holds another model: names or shapes differ'),
    'another width': (facts(changes=dict(depth=3, dim=128)), 'holds another model: names or shapes differ'),
    'no facts': (lambda s: s | dict(facts=None), 'damaged: facts is NoneType, expected dict'),
    'a text for epochs': (facts(epochs='x'), "its settings are no run's .epochs is 'x', expected int"),
    'an unknown recipe': (facts(recipe='x'), "its settings are no run's .there is no recipe 'x'"),
    'an unknown model': (facts(model='x'), "its settings are no run's .there is no model called 'x'"),
    'an odd augmentation': (facts(augment=dict(x=1)), "its settings are no run's .*unexpected keyword argument 'x'"),
    'an epoch too many': (lambda s: s | dict(epoch=3), 'damaged: epoch is 3, n_epoch 2'),
    'no epoch': (lambda s: s | dict(epoch=0), 'damaged: epoch is 0, n_epoch 2'),
    'not a number': (nan, "damaged: model can't be used .ValueError: head.bias is not finite"),
    'no weights': (lambda s: s | dict(model={}), 'holds another model: it has 0 blocks'),
    'other numbers for weights': (lambda s: s | dict(model=dict.fromkeys(s['model'], 3)), 'holds another model'),
    'no random numbers': (lambda s: s | dict(random=[{}]), "damaged: random can't be used .KeyError"),
    'lost averages': (lambda s: s | dict(opt=s['opt'][:-1]), "damaged: opt can't be used"),
    'another list': (lambda s: [s], 'is no checkpoint of vit_nbdev'),
}

@pytest.fixture(scope='module')
def died(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m: return unfinished(tmp_path_factory.mktemp('died')/'run', m)

def test_a_checkpoint_from_before_there_was_a_choice_of_optimizers(tmp_path, monkeypatch):
    part = unfinished(tmp_path/'run', monkeypatch, opt='adamw')
    state = torch.load(part/'checkpoint.pt')
    assert state['facts'].pop('opt') == 'adamw'
    torch.save(state, part/'checkpoint.pt')
    vit_train.__wrapped__(resume=str(tmp_path/'run'), device='cpu')
    assert json.loads((tmp_path/'run'/'config.json').read_text())['settings']['opt'] == 'adamw'

@pytest.mark.parametrize('name', CHECKPOINTS)
def test_nothing_that_was_given_is_deleted(name, died, tmp_path):
    "An odd checkpoint is one sentence with its file, and it is still there afterwards"
    change, sentence = CHECKPOINTS[name]
    part = shutil.copytree(died, tmp_path/'run.part')
    torch.save(change(torch.load(part/'checkpoint.pt')), part/'checkpoint.pt')
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=sentence) as e: vit_train.__wrapped__(resume=str(tmp_path/'run'), device='cpu')
    assert str(part/'checkpoint.pt') in str(e.value) and '\n' not in str(e.value) and contents(tmp_path) == before

def test_a_resumed_run_that_diverges_is_kept(died, tmp_path, monkeypatch):
    part = shutil.copytree(died, tmp_path/'run.part')
    def diverge(*_, **__): raise runs.Diverged('no longer a finite number')
    monkeypatch.setattr(runs, '_fit', diverge)
    before = contents(part)
    with pytest.raises(runs.Diverged): train(resume=tmp_path/'run', device='cpu')
    assert contents(part) == before

def test_a_run_that_diverges_late_keeps_what_it_was(tmp_path, monkeypatch, capsys, no_pictures):
    "Its numbers show where it went wrong; without an epoch there is nothing to keep"
    fit = runs._fit
    def diverge(*args, **kwargs):
        fit(*args, **kwargs)
        raise runs.Diverged('the loss is no longer a finite number: try a lower --lr than 1')
    monkeypatch.setattr(runs, '_fit', diverge)
    with pytest.raises(runs.Diverged, match='the epochs before it are in .*run.part: begin anew with --force$'):
        train(epochs=2, device='cpu', out=tmp_path/'run')
    assert len(pd.read_csv(tmp_path/'run.part'/'metrics.csv')) == 2
    monkeypatch.setattr(runs, '_fit', fit)
    train(epochs=1, device='cpu', out=tmp_path/'run', force=True)
    assert [p.name for p in tmp_path.iterdir()] == ['run']

# --- names in any script (19) ---

def test_names_that_are_no_utf8(run, tmp_path, monkeypatch, capsys):
    "A file and a class whose names are bytes that mean nothing: escaped, and nothing is lost"
    name = os.fsdecode(b'\xff\xfe.png')
    shutil.copy(run.parent/'a.png', tmp_path/name)
    vit_predict.__wrapped__(str(run), [str(tmp_path/name)], json=True, device='cpu')
    assert json.loads(capsys.readouterr().out)['file'] == str(tmp_path/name)
    page = explain(run, tmp_path/name, tmp_path/'page.html', device='cpu')
    assert 'udcff' in page.read_text(encoding='utf-8')
    odd = os.fsdecode(b'\xff')
    folder = train(str(pictures(tmp_path/'p', **{odd: 60, 'b': 190})), epochs=1, out=tmp_path/'run', **FOLDER)
    assert odd in load_model(folder)[0].preprocessing.labels
    assert {p.name for p in folder.iterdir()} >= {'report.html', 'predictions.png', 'samples', 'model.safetensors'}

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_what_is_said_in_any_encoding(encoding, monkeypatch):
    "A plus-minus sign, Chinese letters and a lone surrogate: no error, at most an escape"
    stream = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    with plain_errors('vit_train'): print('98.61 \u00b1 0.56 % \u6c49 \udcff')
    said = stream.buffer.getvalue().decode(encoding)
    assert said.startswith('98.61 ') and said.endswith('\\udcff' + os.linesep)
    assert ('\u00b1' in said) == (encoding != 'ascii') and ('\u6c49' in said) == (encoding == 'utf-8')

def test_samples_that_cant_be_written_cost_no_run(tmp_path, monkeypatch, capsys):
    "A name, say, that the file system can't encode"
    def save(*_): raise UnicodeEncodeError('ascii', '猫', 0, 1, 'ordinal not in range(128)')
    monkeypatch.setattr(report, 'save_samples', save)
    train(epochs=1, device='cpu', out=tmp_path/'run')
    assert (tmp_path/'run'/'report.html').exists() and 'samples' in capsys.readouterr().out

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_model_of_other_precision_predicts_and_is_explained(run, dtype, tmp_path):
    model, _ = load_model(run)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)*4)
    expected, = predict(model, image)
    image.save(tmp_path/'x.png')
    found, = predict(model.to(dtype), image, features=True)
    np.testing.assert_allclose(found['probabilities'], expected['probabilities'], atol=0.02)
    assert explain(model, tmp_path/'x.png', tmp_path/'x.html').exists() and model.head.weight.dtype == dtype
