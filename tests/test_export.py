"""Exported files answer like the model, for any batch, and a failure leaves what was there as it was."""
import json, shutil, sys, types
from types import SimpleNamespace

import pytest
import torch
import yaml

from vit_nbdev import export as module
from vit_nbdev.cli import vit_export
from vit_nbdev.export import Deployed, export, largest_difference, model_card, push_to_hub
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.pretrained import load_pretrained
from vit_nbdev.runs import load_model, save_model, train
from vit_nbdev.vit import ViT, vit

def random_model(img_size=8, in_chans=1, **changes):
    torch.manual_seed(0)
    shape = dict(img_size=img_size, in_chans=in_chans, n_classes=3, dim=32, depth=1, n_heads=2)
    model = vit('digits', **shape | changes).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    model.preprocessing = Preprocessing(img_size, [0.3]*in_chans, [0.4]*in_chans, in_chans=in_chans, labels=list('abc'))
    return model

def test_onnx_with_many_parts(tmp_path):
    changes = dict(pool='map', n_registers=2, gated=True, qk_norm=True, layer_scale=0.1, rotary='eva02', stem='conv',
                   img_size=(8, 16), in_chans=3)
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = random_model(**changes)
    assert export(model, tmp_path/'m.onnx') < 1e-5
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    prep, n = model.preprocessing, 3
    pixels = torch.randint(256, (n, prep.in_chans, *prep.img_size), dtype=torch.uint8)
    logits, p = session.run(None, {'pixels': pixels.numpy()})
    expected = model(prep.normalise(pixels)).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(p), expected.softmax(1), rtol=1e-4, atol=1e-5)
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored['labels']) == ['a', 'b', 'c']
    assert Preprocessing.from_dict(json.loads(stored['preprocessing'])) == prep

@pytest.mark.parametrize('sizes', [(1,), (64,)])
def test_the_check_sees_a_batch_that_became_a_constant(sizes):
    model = random_model()
    deployed = Deployed(model, model.preprocessing)
    assert largest_difference(lambda pixels: deployed(pixels)[0], deployed, sizes) == 0
    first = lambda pixels: deployed(pixels[:1])[0].expand(len(pixels), -1)
    assert (largest_difference(first, deployed, sizes) > 1e-3) == (sizes != (1,))

@pytest.mark.parametrize('img_size, largest', [(8, 64), (64, 8)])
def test_the_check_takes_few_images_of_many_tokens(img_size, largest):
    "64 matrices of attention between 4,096 tokens, which ONNX writes out, would fill eight gigabytes"
    model, seen = random_model(img_size, patch_size=1), []
    deployed = Deployed(model, model.preprocessing)
    def answer(pixels):
        seen.append(len(pixels))
        return deployed(pixels)[0]
    assert largest_difference(answer, deployed) == 0 and seen == [1, 2, 5, largest]

@pytest.mark.parametrize('wrong', ['another function', 'NaN'])
def test_a_file_that_answers_otherwise_is_not_kept(wrong, tmp_path, monkeypatch):
    model, file = random_model(), tmp_path/'m.pt2'
    file.write_text('the old one')
    factor = 1.01 if wrong == 'another function' else float('nan')
    write, read = module.FORMATS['.pt2']
    def misread(name):
        answer = read(name)
        return lambda pixels: answer(pixels)*factor
    monkeypatch.setitem(module.FORMATS, '.pt2', (write, misread))
    with pytest.raises(ValueError, match='differs from the model'): export(model, file, force=True)
    assert file.read_text() == 'the old one' and list(tmp_path.iterdir()) == [file]

def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setitem(module.FORMATS, '.pt2', (fail, module.FORMATS['.pt2'][1]))
    (tmp_path/'m.pt2').write_text('the old one')
    with pytest.raises(OSError, match='No space'): export(random_model(), tmp_path/'m.pt2', force=True)
    assert (tmp_path/'m.pt2').read_text() == 'the old one' and len(list(tmp_path.iterdir())) == 1

def test_weights_that_onnx_would_keep_in_a_second_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_ONE_FILE', 1000)
    with pytest.raises(ValueError, match=r'weights fill .* GB, which ONNX keeps in a second file: write a .pt2'):
        export(random_model(), tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())
    export(random_model(), tmp_path/'m.pt2')

def test_the_model_is_as_it_was(tmp_path):
    "Exporting a model in training leaves its weights, and a second export gives the same function"
    model = random_model().double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, tmp_path/'a.pt2')
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())

# --- on the hub ---

@pytest.fixture(scope='module')
def trained(tmp_path_factory, few_digits_in_module):
    return train(epochs=1, bs=128, tta=True, early_stop=1, device='cpu', out=tmp_path_factory.mktemp('runs')/'digits')

@pytest.fixture
def run(trained, tmp_path): return shutil.copytree(trained, tmp_path/'digits')

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A folder that is the hub"
    hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    def create(self, repo, **facts): (tmp_path/'hub'/repo).mkdir(parents=True, exist_ok=facts['exist_ok'])
    def upload(self, repo_id, folder_path): shutil.copytree(folder_path, tmp_path/'hub'/repo_id, dirs_exist_ok=True)
    public = SimpleNamespace(names=set())
    monkeypatch.setattr(hub.HfApi, 'repo_info', lambda self, repo: SimpleNamespace(private=repo not in public.names))
    monkeypatch.setattr(hub, 'public', public.names, raising=False)
    monkeypatch.setattr(hub.HfApi, 'create_repo', create)
    monkeypatch.setattr(hub.HfApi, 'upload_folder', upload)
    monkeypatch.setattr(hub, 'snapshot_download', lambda name, **_: str(tmp_path/'hub'/name))
    return tmp_path/'hub'

def test_a_run_comes_back_from_the_hub_as_it_was(run, hub, monkeypatch):
    "Uploaded and loaded by its name: the same numbers; no image of the data, no path of this machine goes with it"
    assert push_to_hub(run, 'me/digits') == 'https://huggingface.co/me/digits'
    assert {p.name for p in (hub/'me/digits').iterdir()} == \
           {'README.md', 'config.json', 'model.safetensors', 'metrics.csv', 'curves.png', 'confusion.png'}
    there, (here, _) = load_pretrained('me/digits'), load_model(run)
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True))
    assert there.preprocessing == here.preprocessing and there.config == here.config
    config = json.loads((run/'config.json').read_text())
    config['settings'] |= dict(path='/home/me/secret/pictures', pretrained='/home/me/weights')
    config['data'] = config.get('data', {}) | dict(stream='what was decoded is kept in /home/me/secret/cache')
    (run/'config.json').write_text(json.dumps(config))
    push_to_hub(run, 'me/digits')
    card = (hub/'me/digits/README.md').read_text()
    assert '- pretrained: weights\n' in card and '/home/me' not in card
    settings = json.loads((hub/'me/digits/config.json').read_text())['settings']
    assert (settings['path'], settings['pretrained']) == ('pictures', 'weights')
    assert '/home/me' not in (hub/'me/digits/config.json').read_text()

def test_a_public_repository_is_not_called_private(run, hub):
    "The hub ignores `private` where the name is taken"
    import huggingface_hub
    huggingface_hub.public.add('me/open')
    with pytest.raises(ValueError, match='me/open is on the hub already, and public'): push_to_hub(run, 'me/open')
    assert not list((hub/'me/open').iterdir())
    push_to_hub(run, 'me/open', private=False)
    assert (hub/'me/open/config.json').is_file()

def test_the_card_has_the_figures_of_the_run(run, hub, tmp_path):
    "What a stranger must know, and metadata that the hub can read; a card that was edited stays"
    push_to_hub(run, 'me/my-digits')
    card, config = (hub/'me/my-digits/README.md').read_text(), json.loads((run/'config.json').read_text())
    facts = yaml.safe_load(card.split('---')[1])
    assert facts['model-index'][0]['results'][0]['metrics'] == [dict(type='accuracy', value=config['test_accuracy'])]
    assert facts['library_name'] == 'vit_nbdev' and 'license' not in facts and '\n# license: yours to say' in card
    plain, balanced, tta = (f"{100*config[f'{name}_accuracy']:.2f} %" for name in ('test', 'balanced', 'tta'))
    for words in (f'{plain} of 360 test images', f"classes' accuracies is {balanced}",
                  f'views of each image: {tta}', 'with seed 0',
                  "load_pretrained('me/my-digits')", 'Kept is epoch 1 of 1', '- img_size: (8, 8)', '- batch size: 128',
                  '- recipe: digits'):
        assert words in card, words
    push_to_hub(run, 'me/other')
    other = (hub/'me/other/README.md').read_text()
    assert "load_pretrained('me/other')" in other and 'my-digits' not in other
    (tmp_path/'odd').mkdir()
    odd = config | dict(preprocessing=config['preprocessing'] | dict(labels=['caf\udce9', *map(str, range(9))]))
    (tmp_path/'odd'/'config.json').write_text(json.dumps(odd))
    shutil.copy(run/'model.safetensors', tmp_path/'odd')
    push_to_hub(tmp_path/'odd', 'me/odd')
    assert '`caf\\udce9`' in (hub/'me/odd/README.md').read_text()
    assert not (run/'README.md').exists()
    (run/'README.md').write_text('mine')
    push_to_hub(run, 'me/my-digits')
    assert (hub/'me/my-digits/README.md').read_text() == (run/'README.md').read_text() == 'mine'
    del config['balanced_accuracy']                     # of a run that says less, the card says no more
    (run/'config.json').write_text(json.dumps(config))
    assert "of the classes' accuracies" not in (card := model_card(run, 'me/x')) and ' %). This is one training' in card

def test_a_run_that_was_never_tested_says_so(run, hub, tmp_path):
    model, _ = load_model(run)
    save_model(model, tmp_path/'by hand', model.preprocessing, epochs=3, metrics=dict(accuracy=0.5))
    push_to_hub(tmp_path/'by hand', 'me/x')
    card = (hub/'me/x/README.md').read_text()
    assert 'Never tested. In the last of 3 epochs: accuracy 0.5000.' in card and 'model-index' not in card
    save_model(model, tmp_path/'by hand', model.preprocessing, test_accuracy=0.75)
    card = model_card(tmp_path/'by hand', 'me/x')
    assert '75.00 % of the test images are right; no more of the test is on record' in card
    assert 'model-index' not in card

def test_a_hub_that_cant_be_reached_or_written_to(run, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
    with monkeypatch.context() as m:
        m.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
        sentence = "^vit_export: the hub can't be reached, nothing was uploaded, and .* is whole: try again"
        with pytest.raises(SystemExit, match=sentence):
            vit_export.__wrapped__(str(run), hub='me/digits')
    def refuse(self, *_, **__):
        e = hub.errors.LocalTokenNotFoundError()
        e.response = types.SimpleNamespace(status_code=401)
        raise e
    with monkeypatch.context() as m:
        m.setattr(hub.HfApi, 'create_repo', refuse)
        with pytest.raises(PermissionError, match='without a token that may: log in with `hf auth login`'):
            push_to_hub(run, 'me/digits')
    def full(self, *_, **__):
        answer = types.SimpleNamespace(headers={}, request=None, status_code=413)
        raise hub.errors.HfHubHTTPError('Client error', response=answer, server_message='your storage is full')
    with monkeypatch.context() as m:
        m.setattr(hub.HfApi, 'create_repo', full)
        with pytest.raises(OSError, match=r'answers 413 to the upload to me/digits \(your storage is full\)'):
            push_to_hub(run, 'me/digits')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install 'vit_nbdev\[hub\]'"):
        push_to_hub(run, 'me/digits')
    with pytest.raises(SystemExit, match='--hub uploads a run folder: leave out --pretrained'):
        vit_export.__wrapped__(str(run), hub='me/digits', pretrained=True)

# --- what a format can't hold ---

def test_a_model_that_a_format_cant_hold(tmp_path, monkeypatch):
    "The exporters' pages of text become a sentence; the file that was there stays"
    class Odd(ViT):
        def forward(self, x): return super().forward(x) if x.sum().item() >= -1e9 else x
    model = random_model()
    model.__class__ = Odd
    (tmp_path/'m.pt2').write_text('the old one')
    with pytest.raises(ValueError, match=r"^m\.pt2 can't hold this model \(.{5,200}\): [^\n]*$"):
        export(model, tmp_path/'m.pt2', force=True)
    assert (tmp_path/'m.pt2').read_text() == 'the old one' and len(list(tmp_path.iterdir())) == 1

def test_features_are_called_so(tmp_path):
    "A model without classes gives no probabilities"
    model = vit('digits', n_classes=0, depth=1)
    model.preprocessing = Preprocessing(8, [0.5], [0.5], in_chans=1)
    export(model, tmp_path/'m.pt2')
    pixels = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    features, = torch.export.load(tmp_path/'m.pt2').module()(pixels)
    with torch.no_grad(): torch.testing.assert_close(features, model.eval()(model.preprocessing.normalise(pixels)))
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    export(model, tmp_path/'m.onnx')
    assert [o.name for o in runtime.InferenceSession(tmp_path/'m.onnx').get_outputs()] == ['features']

def test_a_full_disk_is_no_fault_of_the_format(tmp_path):
    import resource
    model = vit('digits', depth=1)
    model.preprocessing = Preprocessing(8, [0.5], [0.5], in_chans=1, labels=list('0123456789'))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError): export(model, tmp_path/'m.pt2')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
