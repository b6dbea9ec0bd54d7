"""A damaged run folder says so; it does not answer."""
import json, re, sys, warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastcore.foundation import L
from PIL import Image
from safetensors.torch import load_file, save_file

from vit_nbdev import runs
from vit_nbdev.data import digits_dls, folder_dls, table_dls
from vit_nbdev.learner import vit_learner
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.runs import explain, load_model, predict, save_model, save_run
from vit_nbdev.vit import vit

LABELS = tuple('abcdefghij')

@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = vit('digits')
    torch.nn.init.normal_(model.head.weight)
    save_model(model, tmp_path/'run', Preprocessing(8, [0.3], [0.4], in_chans=1, labels=LABELS))
    return tmp_path/'run'

def edit(run, part, **changes):
    "Change entries of a part of `config.json`"
    config = json.loads((run/'config.json').read_text())
    config[part].update(changes)
    (run/'config.json').write_text(json.dumps(config))

def reweigh(run, name, f):
    w = load_file(run/'model.safetensors')
    w[name] = f(w[name])
    save_file(w, str(run/'model.safetensors'))

DAMAGE = {
    'two labels for ten classes':  (lambda r: edit(r, 'preprocessing', labels=['cat', 'dog']),
                                    'labels for 2, the model for 10'),
    'no labels':                   (lambda r: edit(r, 'preprocessing', labels=[]), 'labels for 0, the model for 10'),
    'labels that are no strings':  (lambda r: edit(r, 'preprocessing', labels=list(range(10))),
                                    'labels=.* must be a list of strings'),
    'a deviation of zero':         (lambda r: edit(r, 'preprocessing', std=[0.]), 'std=.* must be above zero'),
    'a mean that is none':         (lambda r: edit(r, 'preprocessing', mean=[float('nan')]),
                                    'mean=.* must be 1 finite'),
    'null for a list':             (lambda r: edit(r, 'preprocessing', mean=None), 'mean=None must be 1 finite'),
    'another size':                (lambda r: edit(r, 'preprocessing', img_size=[28, 28]),
                                    'img_size for 28, the model for 8'),
    'a text for the preprocessing': (lambda r: (r/'config.json').write_text('{"model": {}, "preprocessing": "x"}'),
                                     'damaged'),
    'a list for the whole':        (lambda r: (r/'config.json').write_text('[1]'), 'damaged'),
    'deep brackets':               (lambda r: (r/'config.json').write_text('['*100_000), 'damaged'),
    'a billion blocks':            (lambda r: edit(r, 'model', depth=10**9),
                                    'it has 4 blocks, the configuration 1000000000'),
    'twenty million registers':    (lambda r: edit(r, 'model', n_registers=20_000_000), 'names or shapes differ'),
    'another width':               (lambda r: edit(r, 'model', dim=128), 'names or shapes differ'),
    'weights that are no numbers': (lambda r: reweigh(r, 'head.bias', lambda w: w*float('nan')),
                                    'head.bias holds numbers that are not finite'),
    'an endless weight':           (lambda r: reweigh(r, 'pos_embed', lambda w: w + float('inf')),
                                    'pos_embed holds numbers that are not'),
    'integer weights':             (lambda r: reweigh(r, 'head.weight', lambda w: w.int()),
                                    'head.weight is torch.int32'),
    'weights without a name':      (lambda r: save_file({}, str(r/'model.safetensors')), 'it has 0 blocks'),
}

@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_run_does_not_answer(name, run):
    damage, sentence = DAMAGE[name]
    load_model(run)
    damage(run)
    with pytest.raises(ValueError, match=sentence) as e: load_model(run)
    assert str(run) in str(e.value) and 'restore the file' in str(e.value)

def test_two_classes_of_one_name_stay_two(run):
    "The faults page: crane, dog, fox, crane; the model says the second crane"
    edit(run, 'preprocessing', labels=['crane', 'dog', 'fox', 'crane', *'efghij'])
    image = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    model, _ = load_model(run)
    logits = model(model.preprocessing.normalise(model.preprocessing(image))[None])[0]
    found, = predict(run, image)
    assert found['index'] == logits.argmax() and found['class'] == model.preprocessing.labels[found['index']]
    assert len(found['probabilities']) == 10 and abs(sum(found['probabilities']) - 1) < 1e-5

def test_what_predict_takes_and_refuses(run, tmp_path, monkeypatch):
    "One string is one path: it is never read letter by letter, and no disk is walked"
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(1).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save('000.JPG', format='PNG')
    expected = predict(run, pixels)[0]['probabilities']
    for images in ('000.JPG', ['000.JPG'], tmp_path/'000.JPG', Image.fromarray(pixels)):
        results = predict(run, images)
        assert [r['probabilities'] for r in results] == [expected]
    assert predict(load_model(run)[0], pixels)[0]['probabilities'] == expected
    with pytest.raises(ValueError, match='an empty name is no image file'): predict(run, '')
    with pytest.raises(TypeError, match='got a Linear, expected a run folder'): predict(torch.nn.Linear(2, 2), pixels)
    with pytest.raises(ValueError, match='does not say how its images are prepared'): predict(vit('digits'), pixels)

def test_predict_leaves_the_model_as_it_is(run, tmp_path, monkeypatch):
    "Its modes, also each part's own, and its device: a GPU is for a model that was not given; dropout is off"
    model, _ = load_model(run)
    pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    expected = predict(run, pixels, device='cpu')
    Image.fromarray(pixels).save(tmp_path/'a.png')
    for block in model.encoder.blocks: block.drop_path1 = torch.nn.Dropout(0.9)
    model.train()
    model.encoder.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert predict(model, pixels) == expected
    explain(model, tmp_path/'a.png', tmp_path/'page.html')
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(Exception, match='CUDA|NVIDIA'): predict(run, pixels)

# --- what is written while a model trains ---

def test_an_epoch_of_validation_is_no_row(tmp_path, capsys, few_digits):
    learn = vit_learner(digits_dls(device='cpu'), 'digits', cbs=[runs.MetricsFile(tmp_path/'m.csv'), runs.EpochLines()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        before = (tmp_path/'m.csv').read_text()
        assert len(before.splitlines()) == 3 and len(capsys.readouterr().out.splitlines()) == 2
        learn.validate()
        learn.get_preds()
    assert (tmp_path/'m.csv').read_text() == before and capsys.readouterr().out == ''

# --- precision and compiling ---

def test_auto_is_bf16_only_where_it_is_faster(monkeypatch):
    "Instructions for it, and a trial that they win"
    cpu, model = torch.device('cpu'), vit('digits')
    for has, ratio, chosen in ((True, 0.6, 'bf16'), (True, 1.2, 'fp32'), (False, 0.6, 'fp32')):
        monkeypatch.setattr(runs, '_has_bf16', lambda _: has)
        monkeypatch.setattr(runs, '_bf16_ratio', lambda *_: ratio)
        assert runs._precision('auto', model, 4, cpu) == chosen
        assert runs._precision('fp32', model, 4, cpu) == 'fp32'
    monkeypatch.setattr(runs, '_bf16_ratio', lambda *_: 2.53)
    with pytest.warns(UserWarning, match='bf16 takes 2.53 times as long as fp32 on this processor: use fp32, or auto'):
        assert runs._precision('bf16', model, 4, cpu) == 'bf16'

def test_what_an_apple_computes_in(tmp_path, monkeypatch):
    "In fp32: fastai's mixed precision would do nothing there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    for name in ('bf16', 'fp16'):
        with pytest.raises(ValueError, match=f'precision {name} is not for the device mps: use fp32 or auto'):
            runs.train(device='mps', precision=name)
    assert runs._precision('auto', vit('digits'), 4, torch.device('mps')) == 'fp32' and not list(tmp_path.iterdir())

def test_the_trial_leaves_no_trace():
    "Four steps of each kind, the first two of them warm-ups; weights, gradients and random numbers are as before"
    model = vit('digits', dropout=0.1)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    times = iter([0., 9., 0., 9., *[0., 4., 0., 2.]*2, 0., 5., 0., 1.])
    assert runs._bf16_ratio(model, 4, torch.device('cpu'), clock=lambda: next(times)) == 1/4
    assert next(times, None) is None and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

def test_the_trial_is_on_the_device(monkeypatch):
    "The model is still on the CPU when it begins: fastai moves it in a fit"
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())      # there is none for this device
    model = vit('digits')
    assert runs._bf16_ratio(model, 2, torch.device('meta')) > 0
    assert {p.device.type for p in model.parameters()} == {'cpu'}

def test_a_run_in_bf16_on_a_cpu(tmp_path, monkeypatch, capsys, no_pictures, few_digits):
    "It computes in bfloat16 when it trains, and says so in its settings"
    seen, forward = set(), torch.nn.Linear.forward
    def watch(self, x):
        out = forward(self, x)
        if torch.is_grad_enabled(): seen.add(out.dtype)
        return out
    monkeypatch.setattr(runs, '_bf16_ratio', lambda *_: 0.9)
    monkeypatch.setattr(runs, '_has_bf16', lambda _: True)
    monkeypatch.setattr(torch.nn.Linear, 'forward', watch)
    model, config = load_model(runs.train(epochs=1, precision='auto', device='cpu', out=tmp_path/'run'))
    assert seen >= {torch.bfloat16} and config['settings']['precision'] == 'bf16'
    assert re.search(r'^device  cpu.*, precision bf16$', capsys.readouterr().out, flags=re.M)
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}

def test_an_interruption_ends_bf16(few_digits):
    "What is computed afterwards is computed in fp32"
    def stop(_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        vit_learner(digits_dls(device='cpu'), 'digits', cbs=[runs.CPUBF16(), Callback(after_pred=stop)]).fit(1)
    assert not torch.is_autocast_enabled('cpu')

def test_an_interruption_ends_mixed_precision_of_a_gpu(few_digits):
    "Counted as torch counts it, also where there is no GPU"
    def stop(_): raise KeyboardInterrupt
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        warnings.simplefilter('ignore')                              # that there is no GPU
        vit_learner(digits_dls(device='cpu'), 'digits', cbs=[runs.Mixed('bf16'), Callback(after_pred=stop)]).fit(1)
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert depth == 1

def test_test_images_without_any_label(tmp_path):
    "A label of which no image is left for the test counts for nothing, and the run is whole"
    for i in range(20): Image.fromarray(np.full((8, 8), 12*i, np.uint8)).save(tmp_path/f'{i}.png')
    rows = ['0.png,a;b', *(f'{i}.png,' for i in range(1, 20))]
    (tmp_path/'labels.csv').write_text('name,label\n' + '\n'.join(rows))
    run = runs.train(tmp_path/'labels.csv', delim=';', epochs=1, model='digits', img_size=8, device='cpu',
                     out=tmp_path/'run')
    assert load_model(run)[1]['mean_f1'] == 0

def test_compiling_without_a_compiler_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(OSError, match=r'--compile needs a C\+\+ compiler, and there is none here: install g\+\+'):
        runs.train(epochs=1, compile=True, device='cpu', out=tmp_path/'run')
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere torch looks for clang++')
def test_a_compiler_that_torch_does_not_look_for(tmp_path, monkeypatch):
    "On Linux clang++ counts where CXX names it, and not else"
    clang = tmp_path/'clang++'
    clang.write_text('')
    clang.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(OSError, match='name another by CXX'): runs._check_compiler(torch.device('cpu'))
    monkeypatch.setenv('CXX', 'clang++')
    runs._check_compiler(torch.device('cpu'))

def test_what_a_compiler_could_not_do_is_a_sentence():
    class InductorError(RuntimeError): pass
    with pytest.raises(RuntimeError, match='^another'), runs._compiling(): raise InductorError('another')
    InductorError.__module__ = 'torch._inductor.exc'
    with pytest.raises(OSError, match=r'could not compile the model \(no Python.h\): mend its C\+\+ compiler'):
        with runs._compiling(): raise InductorError('no\nPython.h')

# --- names of folders and classes ---

def test_a_link_that_leads_nowhere_is_refused_at_once(tmp_path):
    (tmp_path/'out').symlink_to(tmp_path/'nowhere')
    with pytest.raises(FileExistsError, match='out is a link that leads nowhere: choose another --out'):
        runs.train(device='cpu', out=tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir()] == ['out']

def test_what_is_said_can_be_typed(tmp_path, monkeypatch, capsys, no_pictures, few_digits):
    "A name with a space is quoted, and the asterisk is not"
    monkeypatch.chdir(tmp_path)
    runs.train(epochs=1, device='cpu', out='my run')
    assert capsys.readouterr().out.endswith("use it: vit_predict 'my run' 'my run/samples'/*.png\n")

def test_a_list_of_fastai_is_a_list(tmp_path, few_digits):
    learn = vit_learner(digits_dls(device='cpu'), 'digits')
    files = [tmp_path/f'{i}.png' for i in range(2)]
    for i, file in enumerate(files): Image.fromarray(np.full((8, 8), 100*i, np.uint8)).save(file)
    assert predict(learn, L(files)) == predict(learn, files)

@pytest.mark.parametrize('labels', ['one', 'several'])
def test_a_trained_model_takes_the_names_of_what_it_learns(labels, tmp_path):
    "Of as many other classes, or of several labels: from the model itself as from the learner"
    rng = np.random.default_rng(0)
    def folder(name, classes):
        for c in classes:
            (tmp_path/name/c).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(256, size=(8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path/name/c/f'{i}.png')
        return tmp_path/name
    common = dict(img_size=8, in_chans=1, bs=4, device='cpu')
    first = vit_learner(folder_dls(folder('first', 'abc'), **common), 'digits')
    run = save_run(first, tmp_path/'run')
    other = folder('other', 'xyz')
    if labels == 'one': dls = folder_dls(other, **common)
    else:
        rows = [f'{f.relative_to(other)},{f.parent.name};all' for f in sorted(other.rglob('*.png'))]
        (other/'labels.csv').write_text('name,label\n' + '\n'.join(rows))
        dls = table_dls(other/'labels.csv', delim=';', **common)
    learn = vit_learner(dls, pretrained=run)
    file = next(other.rglob('*.png'))
    assert predict(learn, file) == predict(learn.model, file)
    assert learn.model.preprocessing == dls.preprocessing and learn.model.preprocessing.several == (labels == 'several')
    assert set('xyz') <= set(learn.model.preprocessing.labels)
