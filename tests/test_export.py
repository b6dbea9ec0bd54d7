"""Exported files answer like the model, for any batch, and a failure leaves what was there as it was."""
import json

import pytest
import torch

from vit_nbdev import export as module
from vit_nbdev.export import Deployed, export, largest_difference
from vit_nbdev.preprocessing import Preprocessing
from vit_nbdev.vit import vit

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

def test_the_model_is_as_it_was(tmp_path):
    "Exporting a model in training leaves its weights, and a second export gives the same function"
    model = random_model().double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, tmp_path/'a.pt2')
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
