"""What a person does with pictures around a training: predictions in a stream, a page to drop pictures on."""
import csv, importlib.machinery, json, re, shutil, socket, struct, sys, threading, time, types
import urllib.error, urllib.request
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from PIL import Image

from vit_nbdev import runs, serve
from vit_nbdev.cli import vit_explain, vit_predict, vit_serve
from vit_nbdev.data import digits_dls, folder_dls
from vit_nbdev.learner import Checkpoint, KeepBest, vit_learner
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained
from vit_nbdev.runs import (class_probabilities, explain, load_model, predict, predictions, save_model, train,
                            views)
from vit_nbdev.serve import server
from vit_nbdev.vit import vit

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder of a tiny model with random weights, whose head says something"
    torch.manual_seed(0)
    model = vit('mnist', in_chans=3, n_classes=2, depth=1)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    prep = Preprocessing(28, [0.4]*3, [0.2]*3, labels=('dark', 'light'))
    path = tmp_path_factory.mktemp('runs')/'tiny'
    save_model(model, path, prep, settings=dict(model='mnist', data='folder'), parameters=1)
    return path

# --- predictions in a stream ---

def test_threads_and_batches_change_nothing(run, pictures):
    "The plain loop, and any number of threads and images at a time: the same results in the same order"
    model, _ = load_model(run)
    files = sorted(pictures.rglob('*.png'))
    x = torch.stack([model.preprocessing(f) for f in files])
    with torch.no_grad(): expected = model(model.preprocessing.normalise(x)).softmax(1)
    assert expected[:, 0].std() > 0.01
    for bs, workers in ((64, 1), (5, 3), (1, 2)):
        found = list(predictions(run, pictures, bs=bs, workers=workers, device='cpu'))
        assert [r['file'] for r in found] == list(map(str, files))
        assert np.allclose([r['probabilities'] for r in found], expected, atol=1e-6)
        assert [r['index'] for r in found] == expected.argmax(1).tolist()

def test_results_come_before_the_rest_is_read(run, pictures, monkeypatch):
    "The first result asks for no more than three batches, and whoever stops there has nothing else read"
    seen, call = [], Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, '__call__', lambda self, image: seen.append(image) or call(self, image))
    stream = predictions(run, [pictures]*10, bs=4, workers=2, device='cpu')
    first = next(stream)
    assert first['file'] == str(seen[0]) and len(seen) <= 3*4 + 2
    list(islice(stream, 11))
    stream.close()
    assert len(seen) <= 5*4 + 2

def test_features_are_what_the_head_reads(run, pictures, tmp_path):
    model, _ = load_model(run)
    files = sorted(pictures.rglob('*.png'))
    vit_predict.__wrapped__(str(run), [str(pictures)], features=str(tmp_path/'x.npz'), bs=7, device='cpu')
    saved = np.load(tmp_path/'x.npz')
    assert saved['files'].tolist() == list(map(str, files)) and saved['features'].dtype == np.float32
    x = model.preprocessing.normalise(torch.stack([model.preprocessing(f) for f in files]))
    with torch.no_grad():
        features = model.pool(model.forward_features(x))
        logits = model(x)
    assert np.allclose(saved['features'], features, atol=1e-5)
    assert np.allclose(saved['features'] @ model.head.weight.detach().numpy().T + model.head.bias.detach().numpy(),
                       logits, atol=1e-4)

def test_a_model_without_classes_gives_features(pictures, tmp_path):
    model = vit('mnist', in_chans=3, n_classes=0, depth=1).eval()
    model.preprocessing = Preprocessing(28, [0.4]*3, [0.2]*3)
    with pytest.raises(ValueError, match='names no classes: ask for them'): predict(model, pictures)
    found = predict(model, pictures, features=True, device='cpu')
    assert len(found) == 24 and set(found[0]) == {'file', 'features'}
    assert found[0]['features'].shape == (model.config.dim,)
    explain(model, sorted(pictures.rglob('*.png'))[:2], tmp_path/'page.html', overview=True, device='cpu')
    page = (tmp_path/'page.html').read_text()
    assert 'Beside each image: attention, rollout.' in page and 'Relevance' not in page
    save_model(model, tmp_path/'run', model.preprocessing)
    (tmp_path/'a.csv').write_text('the old one')
    with pytest.raises(SystemExit, match='names no classes for a table: leave out --csv'):
        vit_predict.__wrapped__(str(tmp_path/'run'), [str(pictures)], features=str(tmp_path/'a.npz'), device='cpu',
                                csv=str(tmp_path/'a.csv'), force=True)
    assert (tmp_path/'a.csv').read_text() == 'the old one' and not (tmp_path/'a.npz').exists()

def test_lines_tables_and_files_that_cant_be_read(run, pictures, tmp_path, capsys):
    "One JSON object a line and one row a picture, the same as `predict`; a bad file is named, and costs no other"
    (tmp_path/'bad.png').write_text('no image')
    args = [str(pictures/'dark'), str(tmp_path/'bad.png'), str(pictures/'light')]
    with pytest.raises(SystemExit) as e:
        vit_predict.__wrapped__(str(run), args, json=True, csv=str(tmp_path/'a.csv'), features=str(tmp_path/'a.npz'),
                                device='cpu')
    assert e.value.code == 1
    out, err = capsys.readouterr()
    expected = [r for r in predict(run, args, device='cpu') if 'error' not in r]
    assert [json.loads(line) for line in out.splitlines()] == expected and len(expected) == 24
    rows = list(csv.DictReader((tmp_path/'a.csv').open()))
    assert [[r['file'], r['class'], int(r['index']), float(r['probability'])] for r in rows] == \
           [[r['file'], r['class'], r['index'], r['probability']] for r in expected]
    assert np.load(tmp_path/'a.npz')['files'].tolist() == [r['file'] for r in expected]
    assert f"{tmp_path/'bad.png'} can't be read" in err and '1 of 25 files could not be read' in err

def test_what_exists_is_not_overwritten(run, pictures, tmp_path, capsys):
    table = tmp_path/'a.csv'
    table.write_text('mine')
    with pytest.raises(SystemExit, match='a.csv exists: choose another name, or --force to replace it'):
        vit_predict.__wrapped__(str(run), [str(pictures)], csv=str(table), device='cpu')
    assert table.read_text() == 'mine'
    vit_predict.__wrapped__(str(run), [str(pictures)], csv=str(table), force=True, device='cpu')
    assert len(table.read_text().splitlines()) == 25 and capsys.readouterr().out == ''
    for option, words in dict(csv='must end in .csv', features='must end in .npz').items():
        with pytest.raises(SystemExit, match=words):
            vit_predict.__wrapped__(str(run), [str(pictures)], **{option: str(tmp_path/'x.txt')}, device='cpu')
    with pytest.raises(SystemExit, match='there is no folder .*nowhere for a.csv'):
        vit_predict.__wrapped__(str(run), [str(pictures)], csv=str(tmp_path/'nowhere'/'a.csv'), device='cpu')
    with pytest.raises(SystemExit, match='workers is 0, but must be above zero'):
        vit_predict.__wrapped__(str(run), [str(pictures)], workers=0, device='cpu')

def test_an_image_may_have_several_labels(run, pictures):
    "Then each class has a probability of its own"
    model, _ = load_model(run)
    model.preprocessing = replace(model.preprocessing, several=True)
    found = predict(model, pictures, device='cpu')
    x = torch.stack([model.preprocessing(f) for f in sorted(pictures.rglob('*.png'))])
    with torch.no_grad(): p = model(model.preprocessing.normalise(x)).sigmoid()
    assert np.allclose([r['probabilities'] for r in found], p, atol=1e-6)
    assert [r['classes'] for r in found] == [[c for c, q in zip(('dark', 'light'), row) if q >= 0.5] for row in p]
    assert len({tuple(r['classes']) for r in found}) > 1
    with pytest.raises(ValueError, match="several='yes' must be True or False"):
        Preprocessing(28, [0.], [1.], in_chans=1, several='yes')

# --- a page to drop pictures on ---

@contextmanager
def serving(run, **kwargs):
    "The address at which a run is served"
    with server(run, port=0, device='cpu', **kwargs) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{web.server_port}'
        finally: web.shutdown()

def post(url, data=None, **headers):
    "Status and answer"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))     # this machine needs no proxy
    try: reply = direct.open(urllib.request.Request(url, data, headers))
    except urllib.error.HTTPError as e: reply = e
    with reply: return reply.status, json.loads(reply.read())

def test_the_page_answers_as_vit_predict_does(run, pictures):
    with serving(run) as at:
        for file in sorted(pictures.rglob('*.png'))[10:14]:
            p = predict(run, file, device='cpu')[0]['probabilities']
            status, found = post(f'{at}/predict', file.read_bytes())
            assert status == 200 and dict(found['top']) == dict(zip(('dark', 'light'), p))
            assert found['top'][0][1] == max(p)

def test_a_learner_answers(pictures):
    "What its loaders say of an image is what is served"
    learn = vit_learner(folder_dls(pictures, img_size=28, bs=8, device='cpu'), vit('mnist', in_chans=3, n_classes=2))
    torch.nn.init.normal_(learn.model.head.weight)
    file = pictures/'dark'/'01.png'
    with serving(learn) as at: status, found = post(f'{at}/predict', file.read_bytes())
    p = predict(learn, file, device='cpu')[0]['probabilities']
    assert status == 200 and dict(found['top']) == dict(zip(('dark', 'light'), p))

def test_the_second_gpu_stays_the_second(monkeypatch):
    weight = types.SimpleNamespace(device=torch.device('cuda:1'))
    model = types.SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(serve, 'trained_model', lambda run: (model, None))
    monkeypatch.setattr(serve, 'predict', lambda run, file, device: [dict(error=device, file='a file')])
    assert serve.answer(model, b'') == dict(error='cuda:1')

def test_a_given_model_stays_where_it_is(run, monkeypatch):
    "Unless a device is named; a GPU is for one that is read from a folder"
    (model, _), moved = load_model(run), []
    for module in (runs, serve):
        monkeypatch.setattr(module, 'get_device', lambda name=None: torch.device(name or 'meta'), raising=False)
    def handler(run, *_): moved.append(next(run.parameters()).device.type)
    monkeypatch.setattr(serve, '_handler', handler)
    for source, device in ((model, None), (run, None), (model, 'meta')):
        with server(source, port=0, device=device): pass
    assert moved == ['cpu', 'meta', 'meta']

def test_what_a_server_refuses(run, pictures, capfd):
    with serving(run, max_mb=0.01) as at:
        assert post(f'{at}/predict', b'no picture') == \
               (400, dict(error="the picture can't be read as an image: replace it or take it away"))
        assert post(f'{at}/predict', b'')[1]['error'].startswith('the picture is empty')
        assert post(f'{at}/predict', bytes(10_001)) == \
               (413, dict(error='the picture has more than 0.01 MB: make it smaller'))
        assert post(f'{at}/predict', bytes(39_000))[0] == 413          # all of it is taken, or who sends hears nothing
        assert post(f'{at}/predict', b'x', **{'Content-Length': '1'*5000})[0] == 411
        for asked in ('GET / HTTP/1.1', *(f'POST /predict HTTP/1.1\r\nContent-Length: {n}' for n in (99, 20_000))):
            with socket.create_connection(('127.0.0.1', int(at.split(':')[2]))) as gone:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))      # leaves with a reset
                gone.sendall(f'{asked}\r\n\r\na part'.encode())
                time.sleep(0.05)       # it is waited for
        assert post(f'{at}/../config.json')[0] == 404 and post(f'{at}/', b'x')[0] == 404
        assert post(f'{at}/predict', (pictures/'dark'/'01.png').read_bytes())[0] == 200     # it goes on
        assert capfd.readouterr().err == ''
        with pytest.raises(OSError, match=r'port \d+ is taken: choose another'): server(run, port=int(at.split(':')[2]))
    with pytest.raises(ValueError, match='port is 70000'): server(run, port=70000)
    with pytest.raises(SystemExit, match='vit_serve: there is no run folder nowhere'):
        vit_serve.__wrapped__('nowhere')

def test_what_is_no_fault_of_the_picture_is_answered(run, pictures, monkeypatch, capfd):
    def full(*_, **__): raise MemoryError('no room')
    monkeypatch.setattr(serve, 'predict', full)
    with serving(run) as at:
        assert post(f'{at}/predict', (pictures/'dark'/'01.png').read_bytes()) == \
               (500, dict(error='the picture could not be looked at here (MemoryError: no room)'))
    assert capfd.readouterr().err == ''

def test_the_page_in_a_browser(run, pictures, tmp_path):
    "Pictures are dropped and answered; names that look like HTML are text, and nothing asks for another address"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if path is None: pytest.skip('no chromium on the PATH')
    model, _ = load_model(run)
    evil = '<img src=x onerror="document.title=1">'
    model.preprocessing = replace(model.preprocessing, labels=(evil, f'{evil}2'))
    data = (pictures/'dark'/'01.png').read_bytes()
    files = [dict(name=f'{evil}.png', mimeType='image/png', buffer=data), dict(name='b', mimeType='', buffer=b'none')]
    p = predict(model, pictures/'dark'/'01.png', device='cpu')[0]
    troubles, asked = [], []
    with serving(model) as at, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=['--no-sandbox'])
        tab = browser.new_page()
        tab.on('pageerror', lambda e: troubles.append(str(e)))
        tab.on('request', lambda r: asked.append(r.url))
        tab.goto(at)
        tab.set_input_files('#files', files)
        for i in (0, 1): tab.locator('.said', has_not_text='looking').nth(i).wait_for()     # the policy forbids `eval`
        said = tab.eval_on_selector_all('.said', 'ps => ps.map(p => p.textContent)')
        assert said == [f"{p['class']} ({100*p['probability']:.1f} %)",
                        "the picture can't be read as an image: replace it or take it away"]
        assert tab.eval_on_selector_all('h2', 'hs => hs.map(h => h.textContent)') == [f'{evil}.png', 'b']
        assert tab.eval_on_selector_all('img', 'ims => ims.length') == 2 and tab.title() == 'What does the model see?'
        assert tab.locator('td').first.text_content() == p['class']
        browser.close()
    assert troubles == [] and all(url.startswith((at, 'blob:', 'data:')) for url in asked)

# --- the best epoch, and images that are mixed ---

class Spoils(Callback):
    "The last epochs are worse, whatever the earlier ones are"
    def before_epoch(self):
        if self.epoch >= 5: self.opt.set_hyper('lr', 1.)

def fitted(*cbs, epochs=7):
    set_seed(0)
    learn = vit_learner(digits_dls(device='cpu'), 'digits', cbs=[Spoils(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr=0.02)
    return learn

class Died(Exception): pass

class Dies(Callback):
    order = 80
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch == self.at: raise Died('here')

def test_the_best_epoch_is_kept(tmp_path, few_digits):
    "Also by a training that was interrupted after its best epoch; patience ends it, the same way both times"
    plain = fitted()
    scores = [[acc, -loss] for _, loss, acc in plain.recorder.values]
    best = scores.index(max(scores))
    learn = fitted(KeepBest())
    assert learn.recorder.values == plain.recorder.values and learn.keep_best.best == best < 5
    assert learn.validate()[1] == scores[best][0] != plain.validate()[1]
    with pytest.raises(Died): fitted(KeepBest(), Checkpoint(tmp_path/'c.pt'), Dies(best))
    again = fitted(KeepBest(), Checkpoint(tmp_path/'c.pt'))
    for a, b in zip(again.model.parameters(), learn.model.parameters()): assert torch.equal(a, b)
    stopped = fitted(KeepBest(patience=1))
    first = next(i for i in range(1, 7) if scores[i] < max(scores[:i]))
    assert len(stopped.recorder.values) == first + 1 and stopped.keep_best.stopped
    assert stopped.validate()[1] == max(scores[:first])[0]

def test_a_run_that_stops_early_says_so(tmp_path, capsys, few_digits, no_pictures):
    out = train(epochs=8, lr=0.05, opt='adamw', early_stop=1, cutmix=0.5, rand_augment=3, seed=0, device='cpu',
                out=tmp_path/'run')
    config = json.loads((out/'config.json').read_text())
    rows = [[float(r['accuracy']), -float(r['valid_loss'])] for r in csv.DictReader((out/'metrics.csv').open())]
    assert config['epochs_trained'] == len(rows) and config['best_epoch'] == rows.index(max(rows)) + 1
    assert f"kept    epoch {config['best_epoch']} of {len(rows)}, the best" in capsys.readouterr().out
    assert {k: config['settings'][k] for k in ('cutmix', 'rand_augment', 'early_stop')} == \
           dict(cutmix=0.5, rand_augment=3, early_stop=1)
    assert len(rows) < 8                                    # images a second are those of the epochs that there were
    n = config['data']['splits']['train']['images']
    assert abs(n*len(rows)/config['images_per_second'] - config['seconds']) < 0.06     # which are rounded to 0.1
    page = re.sub(r'(\s*<[^>]+>\s*)+', ' ', (out/'report.html').read_text())
    assert all(words in page for words in ('cutmix 0.5', 'early stop 1', 'img size 8'))

def test_options_that_cant_be(tmp_path):
    for options, words in ((dict(mixup=1., cutmix=1.), 'choose one of them'), (dict(early_stop=-1), 'early_stop is -1'),
                           (dict(rand_augment=31), 'must be from 1 to 30'), (dict(cutmix=-1.), 'cutmix is -1'),
                           (dict(bs=1, mixup=0.2), 'mix the images of a batch: choose a --bs of 2 or more'),
                           (dict(bs=1, cutmix=0.2), 'mix the images of a batch: choose a --bs of 2 or more')):
        with pytest.raises(ValueError, match=words): train(device='cpu', out=tmp_path/'run', **options)

# --- several views of each image ---

def test_views_are_averaged_and_said_beside_the_plain_figure(tmp_path, pictures, monkeypatch, capsys):
    "By hand from the run's own model, in `vit_train` and in `vit_predict`; mirrored only where the training mirrored"
    for flip in (False, True):
        out = tmp_path/f'flip {flip}'
        train(str(pictures), model='mnist', img_size=28, epochs=1, bs=8, flip=flip, tta=True,
              device='cpu', out=out)
        model, config = load_model(out)
        assert model.mirrors == flip and config['tta_views'] == (10 if flip else 5)
        said = f"{config['tta_views']} views of each: {100*config['tta_accuracy']:.2f} %"
        assert said in capsys.readouterr().out and 'views of each image: ' in (out/'report.html').read_text()
    files = sorted((out/'samples').iterdir())                    # these are all test images
    assert len(files) == config['n_test']
    found = predict(out, files, tta=True, device='cpu')
    x = model.preprocessing.normalise(torch.stack([model.preprocessing(f) for f in files]))
    with torch.no_grad(): p = sum(model(v).softmax(1) for v in views(x, mirror=True))/10
    assert np.allclose([r['probabilities'] for r in found], p, atol=1e-6)
    by_weights = predict(load_pretrained(out), files, tta=True)                # another way to the same run
    assert np.allclose([r['probabilities'] for r in by_weights], p, atol=1e-6)
    plain = predict(out, files, device='cpu')
    assert max(abs(a['probability'] - b['probability']) for a, b in zip(found, plain)) > 1e-4
    for figure, results in dict(test_accuracy=plain, tta_accuracy=found).items():
        right = [r['class'] == f.stem.split('-')[1] for r, f in zip(results, files)]
        assert config[figure] == np.mean(right)
    vit_predict.__wrapped__(str(out), list(map(str, files)), tta=True, json=True, features=str(tmp_path/'f.npz'),
                            device='cpu')
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert np.allclose([r['probabilities'] for r in lines], p, atol=1e-6)
    with torch.no_grad(): features = model.pool(model.forward_features(x))
    assert np.allclose(np.load(tmp_path/'f.npz')['features'], features, atol=1e-5)        # of the image as it is

@pytest.mark.parametrize('several', [False, True])
def test_the_probabilities_of_a_loader_are_means_of_the_views(run, several):
    torch.manual_seed(0)
    model, x = load_model(run)[0], torch.randn(6, 3, 28, 28)
    y = torch.eye(2)[[0, 1, 1, 0, 0, 1]] if several else torch.tensor([0, 1, 1, 0, 0, 1])
    with torch.no_grad(): said = torch.stack([model(v) for v in views(x, mirror=True)])
    expected = (said.sigmoid() if several else said.softmax(-1)).mean(0)
    look = partial(views, mirror=True)
    probs, targets = class_probabilities(model, [(x[:4], y[:4]), (x[4:], y[4:])], look)
    assert torch.allclose(probs, expected, atol=1e-6) and torch.equal(targets, y)
    model.train(), model.head.eval()                       # each part is in its mode afterwards
    plain, _ = class_probabilities(model, [(x, y)])
    assert model.training and model.encoder.training and not model.head.training
    assert (plain - expected).abs().max() > 1e-4

def test_without_tta_nothing_is_said_of_it(tmp_path, capsys, few_digits):
    config = load_model(train(epochs=1, device='cpu', out=tmp_path/'run'))[1]
    assert 'tta_accuracy' not in config and 'views of each' not in capsys.readouterr().out
    assert 'views of each' not in (tmp_path/'run'/'report.html').read_text()

# --- logs to watch ---

def test_tensorboard_has_the_metrics(tmp_path):
    "The same numbers as metrics.csv, also of a run that was interrupted, at the steps of training"
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    seen, flushed, flush = [], [], SummaryWriter.flush
    def stop(self):
        if self.epoch == 0: return
        assert len(flushed) == 1     # here tensorboard writes at once, with TensorFlow at hand it waits for this
        seen.extend(EventAccumulator(str(tmp_path/'run.part'/'tensorboard')).Reload().Tags()['scalars'])
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(SummaryWriter, 'flush', lambda self: flushed.append(flush(self)))
        m.setattr(runs.EpochLines, 'before_epoch', stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(epochs=2, bs=128, log='tensorboard', device='cpu', out=tmp_path/'run')
    assert 'accuracy' in seen        # on disk after each epoch, for whoever watches
    train(resume=tmp_path/'run', device='cpu')
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload()
    rows = list(csv.DictReader((tmp_path/'run'/'metrics.csv').open()))
    points = [(p.step, p.value) for p in events.Scalars('accuracy')]
    assert points == [(9*(i + 1), pytest.approx(float(r['accuracy']))) for i, r in enumerate(rows)] and len(rows) == 2

class FakeWandb(types.ModuleType):
    "What fastai's callback asks of wandb"
    Error = type('Error', (Exception,), {})
    def __init__(self):
        super().__init__('wandb')
        self.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
        self.run, self.config, self.logged = types.SimpleNamespace(step=0, summary={}), mock.MagicMock(), []
    def init(self, **facts): self.facts = facts
    def log(self, values, step=None): self.logged.append(values)

@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    yield fake
    sys.modules.pop('fastai.callback.wandb', None)

def test_wandb_hears_the_metrics_and_the_settings(wandb, tmp_path, few_digits, no_pictures, monkeypatch):
    "Ours: fastai's list of its own holds what no log can take, and its 2.8.12 fails on a number"
    importlib.import_module('fastai.callback.wandb')
    monkeypatch.setattr(Learner, 'gather_args', None)
    train(epochs=2, bs=128, log='wandb', device='cpu', out=tmp_path/'run')
    rows = list(csv.DictReader((tmp_path/'run'/'metrics.csv').open()))
    assert [v['accuracy'] for v in wandb.logged if 'accuracy' in v] == [float(r['accuracy']) for r in rows]
    assert (wandb.facts['name'], wandb.facts['config']['bs']) == ('run', 128)

def test_logs_that_cant_be(wandb, tmp_path, monkeypatch):
    "A package that is missing, a name that is unknown, nobody logged in: a sentence, and nothing is left"
    def refuse(**_): raise wandb.Error('api_key not configured')
    monkeypatch.setattr(wandb, 'init', refuse)
    with pytest.raises(OSError, match='wandb: api_key not configured; log in with `wandb login`, or set WANDB_'):
        train(log='wandb', device='cpu', out=tmp_path/'run')
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    for name in ('tensorboard', 'wandb'):
        with pytest.raises(ImportError, match=rf"--log {name} needs {name}: pip install 'vit_nbdev\[{name}\]'"):
            train(log=name, device='cpu', out=tmp_path/'run')
    with pytest.raises(ValueError, match="log 'csw' is not known: use csv, tensorboard, wandb"):
        train(log='csw', device='cpu', out=tmp_path/'run')
    assert list(tmp_path.iterdir()) == []

def test_what_is_in_the_way_is_said_before_weights_are_fetched(pictures, tmp_path, monkeypatch):
    def begin(*_): raise AssertionError('it looked at the pictures first')
    monkeypatch.setattr(runs, '_begin', begin)
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    (tmp_path/'there').mkdir()
    (tmp_path/'begun.part').mkdir()
    for error, said, options in (
            (FileExistsError, 'there exists: choose another --out', dict(out=tmp_path/'there')),
            (FileExistsError, 'begun.part is an unfinished run', dict(out=tmp_path/'begun')),
            (ImportError, '--log wandb needs wandb', dict(log='wandb')),
            (ValueError, 'precision fp16 needs a GPU', dict(precision='fp16'))):
        with pytest.raises(error, match=said): train(str(pictures), device='cpu', **options)

# --- a page for many pictures ---

def test_an_overview_of_a_folder_for_the_class_asked_for(run, pictures, tmp_path, capsys):
    "Each picture with its maps; a class is the same by name and index, and relevance depends on it"
    few, pages = tmp_path/'few', {}
    for f in sorted(pictures.rglob('*.png'))[::6]:
        (few/f.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, few/f.parent.name)
    for target in ('dark', '0', 'light', None):
        vit_explain.__wrapped__(str(run), [str(few)], out=str(tmp_path/f'{target}.html'), target=target,
                                overview=True, device='cpu')
        pages[target] = (tmp_path/f'{target}.html').read_text()
        assert 'shows 4 images: open it in a browser' in capsys.readouterr().out
    page = pages['dark']
    assert re.findall(r'<h2>(.*?)</h2>', page) == [f.name for f in sorted(few.rglob('*.png'))]
    shown = {target: re.findall('data:image/jpeg;base64,([^"]+)', page) for target, page in pages.items()}
    assert shown['dark'] == shown['0'] and {len(found) for found in shown.values()} == {4}
    assert not set(shown['dark']) & set(shown['light'])
    said = [r['index'] for r in predict(run, few, device='cpu')]
    assert shown[None] == [shown[('dark', 'light')[i]][k] for k, i in enumerate(said)]
    for target, words in {'drak': 'there is no class .drak.; did you mean dark', '2': "there is no class '2'"}.items():
        with pytest.raises(ValueError, match=words): explain(run, few, tmp_path/'x.html', target=target)
    model, _ = load_model(run)
    model.preprocessing = replace(model.preprocessing, labels=('dark', 'dark'))
    with pytest.raises(ValueError, match="2 classes are called 'dark': give the index of one"):
        explain(model, few, tmp_path/'x.html', target='dark')
    assert not (tmp_path/'x.html').exists()

def test_the_size_of_a_page_is_bounded(tmp_path):
    "Noise, which no format makes smaller: every head where that fits, an overview where it doesn't, or a sentence"
    torch.manual_seed(0)
    model = vit('Ti/16', img_size=224, n_classes=3, depth=2).eval()
    torch.nn.init.normal_(model.head.weight)
    model.preprocessing = Preprocessing(224, [0.5]*3, [0.2]*3, labels=('a', 'b', 'c'))
    pixels = np.random.default_rng(0).integers(256, size=(3, 224, 224, 3), dtype=np.uint8)
    for i, p in enumerate(pixels): Image.fromarray(p).save(tmp_path/f'{i}.png')
    n_bytes = {}
    for max_mb in (4, 0.7):
        page = explain(model, tmp_path, tmp_path/f'{max_mb}.html', max_mb=max_mb, device='cpu')
        n_bytes[max_mb] = page.stat().st_size
        assert ('<h2>0.png</h2>' in page.read_text()) == (max_mb == 0.7)
        page.unlink()
    assert 3e5 < n_bytes[4] <= runs._page_bytes(model, 3, False) + 4e4 < 4e6
    assert 5e4 < n_bytes[0.7] <= runs._page_bytes(model, 3, True) + 4e3 < 7e5
    with pytest.raises(ValueError, match=r'3 images would make a page of over 0.5 MB: give 2 at most, or raise'):
        explain(model, tmp_path, tmp_path/'x.html', max_mb=0.5, device='cpu')
    with pytest.raises(SystemExit, match='max_mb is -1.0, but must be above zero'):
        vit_explain.__wrapped__('nowhere', ['x.png'], max_mb=-1.)
