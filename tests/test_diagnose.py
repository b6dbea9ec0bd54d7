"Diagnose: planted bugs are found where they are, right models raise no alarm, nothing is left behind"
import random
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import healthy_models
import planted_bugs as bugs
from vit_nbdev.diagnose import CHECKS, Probe, check_overfit, diagnose, other
from vit_nbdev.vit import ViT, ViTConfig, vit

@pytest.fixture(autouse=True)
def one_thread():
    "Many small operations: a second thread costs more than it gives"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

def worse_than_notes(report): return [(f.check, f.module, f.detail) for f in report if f.severity != 'note']

# ---- sick and healthy ----

@pytest.mark.parametrize('bug', bugs.CATALOGUE, ids=lambda b: b.name)
def test_planted_bug_is_found_and_its_module_named(bug):
    found = {f[:2] for f in worse_than_notes(diagnose(bug.make(), **bug.given(), show=False))}
    assert {(bug.check, bug.module), *bug.also} <= found

def test_the_regression_suite_uses_every_check_and_holds_no_bug_twice():
    assert {b.check for b in bugs.CATALOGUE} == set(CHECKS)
    assert len({b.name for b in bugs.CATALOGUE}) == len(bugs.CATALOGUE) == 48

RIGHT = {'ViT': (bugs.ViT, bugs.images), 'ViT, class token': (bugs.in_vit(pool=bugs.ClassToken), bugs.images),
         'ViT, torch attention': (bugs.in_vit(attn=lambda: bugs.TorchAttention(batch_first=True)), bugs.images),
         'ViT, torch attention, sequence first': (bugs.in_vit(attn=bugs.SequenceFirst), bugs.images),
         'Decoder': (bugs.Decoder, bugs.causal_ids), 'PaddedEncoder': (bugs.PaddedEncoder, bugs.padded_ids),
         'WithPositions': (lambda: bugs.WithPositions(bugs.Positions), bugs.tokens)}

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', RIGHT)
def test_the_models_behind_the_catalogue_are_right(name, seed):
    torch.manual_seed(seed)
    make, given = RIGHT[name]
    assert worse_than_notes(diagnose(make(), **given(), show=False)) == []

@pytest.mark.parametrize('name', healthy_models.HEALTHY)
def test_healthy_model_raises_no_alarm(name):
    if package := healthy_models.missing(name): pytest.skip(f'{package} is not installed')
    model, x = healthy_models.HEALTHY[name]()
    report = diagnose(model, x, healthy_models.labels(x), show=False)
    assert worse_than_notes(report) == [] and bool(report)

def test_batch_norm_is_a_note_and_frozen_parameters_are_fine():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 5))
    model[0].requires_grad_(False)
    report = diagnose(model, **bugs.images(), show=False)
    assert [(f.check, f.severity, f.module) for f in report] == [('training batch', 'note', '1')]

def test_evidence_of_mixing_is_that_of_an_image_that_hears_of_others():
    "Image 0 does not, where a recurrence runs along the batch"
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.embed = nn.LSTM(8, 8), nn.Embedding(11, 8)
        def forward(self, x): return self.rnn(x if x.is_floating_point() else self.embed(x))[0][:, -1]
    for x, what in (torch.randn(4, 6, 8), 'of the gradient'), (torch.randint(2, 11, (4, 6)), "of an image's output"):
        found, = (f for f in diagnose(Recurrent(), x, show=False) if f.check == 'batch')
        assert found.evidence > 0.1 and found.detail.startswith(what)

def test_what_had_nothing_to_go_by_is_named():
    "Without labels, no loss was looked at; of a causal model, no positions"
    x = bugs.images()['x']
    assert diagnose(bugs.ViT(), x, show=False).moot == ['mask', 'loss', 'overfit']
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = diagnose(layer, torch.randn(4, 6, 16), mask=torch.ones(4, 6, dtype=torch.bool), show=False,
                      skip=['loss', 'overfit'])
    assert report.moot == ['positions'] and repr(report).endswith('not asked: positions>')

def test_tensors_that_a_model_keeps_hold_what_they_held():
    "Neither parameters nor buffers, and written in place"
    class Counts(bugs.ViT):
        def forward(self, x):
            self.seen += len(x)
            return super().forward(x)
    model = Counts()
    model.seen = seen = torch.tensor(3.)
    diagnose(model, **bugs.images(), show=False)
    assert model.seen is seen and seen == 3

def test_lists_and_dicts_that_a_model_keeps_hold_what_they_held():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.last, self.head = ['before'], {'a': 1}, nn.Linear(4, 2)
        def forward(self, x):
            self.maps.append(x)
            self.last['x'] = x
            return self.head(x)
    model = Keeps()
    maps, last = model.maps, model.last
    diagnose(model, torch.randn(4, 4), torch.arange(4) % 2, show=False)
    assert model.maps is maps and maps == ['before'] and model.last is last and last == {'a': 1}

@pytest.mark.parametrize('reverse', [False, True])
def test_a_recurrence_along_the_batch_in_training(reverse):
    "Its first image hears of none, or its last"
    class Cumulative(nn.Module):
        def forward(self, x):
            if not self.training: return x
            return x.flip(0).cumsum(0).flip(0) if reverse else x.cumsum(0)
    report = diagnose(nn.Sequential(nn.Linear(8, 8), Cumulative()), torch.randn(4, 8), show=False)
    assert [(f.severity, f.module) for f in report if f.check == 'training batch'] == [('warning', '1')]

def test_mixing_beside_batch_norm_is_reported_once():
    class Mixing(nn.Module):
        def forward(self, x): return x + x.roll(1, 0) if self.training else x
    def found(*layers):
        report = diagnose(nn.Sequential(nn.Linear(8, 8), *layers), torch.randn(4, 8), show=False)
        return [(f.severity, f.module) for f in report if f.check == 'training batch']
    assert found(Mixing(), nn.BatchNorm1d(8)) == [('warning', '1')]
    assert found(nn.BatchNorm1d(8), Mixing()) == [('warning', '2'), ('note', '1')]

def test_a_frozen_trunk_under_no_grad_is_fine():
    class Frozen(bugs.TrunkWithoutGrad):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.head.requires_grad_(True)
    assert worse_than_notes(diagnose(Frozen(), **bugs.images(), skip=['overfit'], show=False)) == []

def test_zero_initialised_parts_hide_nothing_and_raise_no_alarm():
    model = bugs.ViT()
    for p in (model.head.weight, model.embed.pos, *(b.attn.proj.weight for b in model.blocks)): nn.init.zeros_(p)
    assert worse_than_notes(diagnose(model, **bugs.images(), show=False)) == []
    model = bugs.ViT(attn=bugs.TorchAttention)
    nn.init.zeros_(model.head.weight)
    assert ('batch', 'blocks.0.attn') in [f[:2] for f in worse_than_notes(diagnose(model, **bugs.images(), show=False))]

@pytest.mark.parametrize('seed', range(8))
def test_a_model_of_four_channels_learns_two_examples(seed):
    "Steps as far as a straight line goes jumped about, and were at the loss of one answer for both after 60 of them"
    torch.manual_seed(seed)
    config = ViTConfig(img_size=16, patch_size=4, in_chans=1, n_classes=5, dim=4, depth=2, n_heads=2)
    assert check_overfit(Probe(ViT(config), **bugs.images())) == []

@pytest.mark.parametrize('scale', [1e-24, 1e-25, 1e-26, 1e-30])
def test_a_gradient_too_faint_for_any_step(scale):
    "Its square is zero, or a step that divides by it is no number: two examples that can't be learnt by heart"
    class Faint(ViT):
        def forward(self, x): return super().forward(x)*scale
    model = Faint(ViTConfig(img_size=16, patch_size=4, in_chans=1, n_classes=5, dim=4, depth=1, n_heads=2))
    assert [f.check for f in check_overfit(Probe(model, **bugs.images()))] == ['overfit']

# ---- nothing is left behind ----

def snapshot(model, x):
    "Everything that a diagnosis could change"
    from torch.nn.modules import module
    hooks = [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    grads = [p.grad for p in model.parameters()]
    return ([t.clone() for t in (*model.state_dict().values(), *grads, x, torch.get_rng_state())],
            [id(p) for p in model.parameters()], [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()], hooks, len(module._global_forward_hooks),
            torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())

def same(a, b): return all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:]

@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('bug', [None, 'batch statistics in eval mode', 'F.dropout without training',
                                 'layers in a plain list', 'batch_first forgotten, mean over the tokens'])
def test_model_input_and_random_state_are_left_as_they_were(bug, train):
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.3), nn.Flatten(), nn.Linear(784, 5))
    model = norm if bug is None else next(b for b in bugs.CATALOGUE if b.name == bug).make()
    given = bugs.images()
    model(given['x']).sum().backward()
    for p in model.parameters(): p.grad = torch.randn_like(p)
    model.train(train)
    next(model.children()).train(not train)
    before = snapshot(model, given['x'])
    diagnose(model, **given, show=False)
    assert same(before, snapshot(model, given['x']))

def test_state_is_restored_when_the_model_raises():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
        def forward(self, x):
            self.inner(x)
            raise KeyError('mine')
    model = Raises().train()
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    x = torch.randn(4, 3)
    before = snapshot(model, x)
    with pytest.raises(KeyError, match="mine.*diagnose was running in eval mode"): diagnose(model, x)
    assert same(before, snapshot(model, x))

# ---- inputs and outputs of all kinds ----

class Wrapped(nn.Module):
    "A right model that takes keywords and returns a dict, with a loss in front of the logits"
    def __init__(self):
        super().__init__()
        self.vit = bugs.ViT()
    def forward(self, pixels, scale=1.):
        out = self.vit(pixels*scale)
        return {'loss': out.mean(), 'logits': out, 'n': 3}

def test_dicts_tuples_and_output():
    given = bugs.images()
    assert diagnose(Wrapped(), {'pixels': given['x']}, given['y'], show=False)
    assert diagnose(Wrapped(), {'pixels': given['x'], 'scale': .5}, given['y'], show=False)
    assert diagnose(Wrapped(), (given['x'], .5), given['y'], output=lambda out: out['logits'], show=False)
    first = diagnose(Wrapped(), given['x'], output=lambda out: out['loss'][None], show=False)
    assert 'batch' in [f.check for f in first]     # a mean over the batch is what was asked to be looked at

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    given = bugs.images()
    given['x'] = given['x'].to(dtype)
    assert worse_than_notes(diagnose(bugs.ViT().to(dtype), **given, show=False)) == []
    report = diagnose(bugs.ViT(attn=bugs.TorchAttention).to(dtype), **given, show=False)
    assert (report.findings[0].check, report.findings[0].module) == ('batch', 'blocks.0.attn')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    given = {k: v.cuda() for k, v in bugs.images().items()}
    assert worse_than_notes(diagnose(bugs.ViT().cuda(), **given, show=False)) == []
    report = diagnose(bugs.ViT(attn=bugs.TorchAttention).cuda(), **given, show=False)
    assert (report.findings[0].check, report.findings[0].module) == ('batch', 'blocks.0.attn')

def test_two_images_are_enough():
    given = {k: v[:2] for k, v in bugs.images().items()}
    assert diagnose(bugs.ViT(), **given, show=False)

@pytest.mark.parametrize('kwargs, error, words', [
    (dict(x=torch.rand(1, 1, 16, 16)), ValueError, 'batch of 1; at least 2'),
    (dict(x=torch.rand(0, 1, 16, 16)), ValueError, 'batch of 0; at least 2'),
    (dict(x='an image'), TypeError, 'str without a tensor'),
    (dict(x=torch.rand(4, 1, 16, 16), y=torch.zeros(3).long()), ValueError, 'y has 3 entries; expected 4'),
    (dict(x=torch.rand(4, 1, 16, 16), causal=True), ValueError, 'need tokens'),
    (dict(x=torch.rand(4, 1, 16, 16), skip=['nonsense']), ValueError, 'nonsense'),
    (dict(x=torch.rand(4, 3, 16, 16)), RuntimeError, 'diagnose was running')])
def test_what_cannot_be_is_said_in_one_sentence(kwargs, error, words):
    with pytest.raises(error, match=words): diagnose(bugs.ViT(), **kwargs)

def test_masks_are_checked():
    ids = bugs.token_ids()['x']
    with pytest.raises(ValueError, match='expected torch.bool'): diagnose(bugs.Decoder(), ids, mask=torch.ones(9, 9))
    everything = torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match='n = 9'): diagnose(bugs.Decoder(), ids, mask=everything[:4, :7])
    assert diagnose(bugs.Decoder(), ids, mask=everything.tril(), show=False)

def test_a_mask_of_padding_is_not_read_as_queries_by_keys():
    "Of eight texts of three tokens three are looked at, which makes no (3 3) of the mask; where b is n, that is said"
    keep = torch.arange(3) < torch.tensor([2, 1, 3, 3, 3, 2, 1, 3])[:, None]
    given = dict(x=(torch.randint(11, (8, 3)), keep), mask=keep, show=False)
    bug = next(b for b in bugs.CATALOGUE if b.name == 'padding mask not passed on')
    assert diagnose(bugs.PaddedEncoder(), **given)
    assert ('mask', bug.module) in [(f.check, f.module) for f in diagnose(bug.make(), **given)]
    few = [t[:3] for t in given['x']]
    with pytest.raises(ValueError, match=r'\(3, 3\) may be \(n n\) or \(b n\), as x holds 3 examples of 3 tokens'):
        diagnose(bugs.PaddedEncoder(), tuple(few), mask=keep[:3])
    with pytest.raises(ValueError, match='expected torch.bool, .* with n = 3 and b = 8'):
        diagnose(bugs.PaddedEncoder(), given['x'], mask=keep[:5])

@pytest.mark.parametrize('smoothing', [0., .1])
def test_a_loss_that_is_summed(smoothing):
    "A sum is as many times larger as there are examples: the right model is healthy, a huge head is not"
    given, summed = bugs.images(), nn.CrossEntropyLoss(reduction='sum', label_smoothing=smoothing)
    assert diagnose(bugs.ViT(), **given, loss_func=summed, show=False)
    huge = next(b for b in bugs.CATALOGUE if b.name == 'head with huge weights')
    assert 'loss' in [f.check for f in diagnose(huge.make(), **huge.given(), loss_func=summed, show=False)]

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_a_loss_of_logarithms(reduction):
    "It takes no logits, of which equal ones would be zeros"
    class Logarithms(bugs.ViT):
        def forward(self, x): return super().forward(x).log_softmax(-1)
    assert diagnose(Logarithms(), **bugs.images(), loss_func=nn.NLLLoss(reduction=reduction), show=False)

def test_skip_and_report(capsys):
    report = diagnose(bugs.ViT(attn=bugs.NotScaled), **bugs.images(), skip=['attention'])
    assert report and 'attention' not in report.checks and report.moot == ['mask']
    assert {'attention', *report.moot, *report.checks} == {*CHECKS}
    assert capsys.readouterr().out == 'healthy: 0 findings in 13 checks; not asked: mask\n'

# ---- whatever surrounds the call, and models of unusual make ----

@cache
def without_switches():
    "A report that no switch surrounds"
    torch.manual_seed(0)
    return diagnose(bugs.ViT(attn=bugs.TorchAttention), **bugs.images(), show=False)

@pytest.mark.parametrize('switch', [torch.no_grad, torch.inference_mode, lambda: torch.autocast('cpu', torch.bfloat16)],
                         ids=['no_grad', 'inference_mode', 'autocast'])
def test_switches_of_the_caller_change_nothing(switch):
    given, plain = bugs.images(), without_switches()
    torch.manual_seed(0)
    model = bugs.ViT(attn=bugs.TorchAttention)
    with switch():
        assert worse_than_notes(diagnose(bugs.ViT(), **given, show=False)) == []      # built inside, too
        assert list(diagnose(model, **given, show=False)) == list(plain)
        detached = diagnose(bugs.ViT(attn=bugs.DetachedQK), **bugs.images(), show=False)   # input made inside
    assert ('gradient', 'blocks.0.attn') in [f[:2] for f in worse_than_notes(detached)]

def test_a_tensor_kept_from_inference_mode_is_named_as_the_reason():
    class Gated(bugs.ViT):
        def __init__(self):
            super().__init__()
            with torch.inference_mode(): self.gate = torch.ones(bugs.DIM)
        def forward(self, x): return self.head(self.gate * self.pool(self.norm(self.blocks(self.embed(x)))))
    found = worse_than_notes(diagnose(Gated(), **bugs.images(), show=False))
    assert 'gradient' in [f[0] for f in found] and all('made in inference mode' in f[2] for f in found)

class Drawing(nn.Module):
    "Noise from all sources, in training mode only, or always"
    def __init__(self, always=False):
        super().__init__()
        self.vit, self.always = bugs.ViT(), always
        self.own = torch.Generator().manual_seed(3), random.Random(3), np.random.default_rng(3)
        self.torch_own, self.python_own, self.numpy_own = self.own
    def forward(self, x):
        out = self.vit(x)
        if not (self.training or self.always): return out
        drawn = (random.random() + np.random.rand() + torch.rand(1) + torch.rand(1, generator=self.torch_own)
                 + self.python_own.random() + self.numpy_own.random())
        return out * (1 + .1*drawn)

def generator_states(model):
    return (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),
            model.torch_own.get_state().tolist(), model.python_own.getstate(), model.numpy_own.bit_generator.state)

def test_random_numbers_of_python_numpy_and_own_generators():
    model = Drawing(always=True)
    before = generator_states(model)
    found = worse_than_notes(diagnose(model, **bugs.images(), show=False))
    assert generator_states(model) == before
    assert [f[:2] for f in found] == [('repeat', '')]     # and nothing else: two runs of one seed draw alike
    model = Drawing()
    before = generator_states(model)
    assert worse_than_notes(diagnose(model, **bugs.images(), show=False)) == []
    assert generator_states(model) == before

def test_attributes_that_a_forward_pass_sets_are_set_back():
    class Counting(bugs.ViT):
        calls, last = 0, None
        def forward(self, x):
            self.calls += 1
            self.last = super().forward(x)
            return self.last
    model = Counting()
    before = dict(vars(model))
    assert diagnose(model, **bugs.images(), show=False)
    assert vars(model) == before and model.calls == 0 and model.last is None

def test_tied_weights():
    class Tied(bugs.Decoder):
        "Embedding and head share one matrix, and so do two layers inside the blocks"
        def __init__(self, **kw):
            super().__init__(**kw)
            self.embed.weight = self.head.weight
            self.blocks[1].mlp.fc1.weight = self.blocks[0].mlp.fc1.weight
            self.blocks[0].attn.proj.weight = self.blocks[1].attn.proj.weight
    class TiedInside(bugs.Attention):
        "Two names for one matrix in one module: what the gradient check has to run by itself"
        def __init__(self, **kw):
            super().__init__(**kw)
            self.out = nn.Linear(bugs.DIM, bugs.DIM)
            self.out.weight = self.proj.weight
        def forward(self, x): return self.out(super().forward(x.detach() if self.cut else x))
    assert worse_than_notes(diagnose(Tied(), **bugs.causal_ids(), show=False)) == []
    for cut in (False, True):
        TiedInside.cut = cut
        found = [f[:2] for f in worse_than_notes(diagnose(bugs.ViT(attn=TiedInside), **bugs.images(), show=False))]
        assert (('gradient', 'blocks.0.attn') in found) if cut else found == []

def test_a_buffer_that_two_modules_share():
    model = bugs.ViT(attn=lambda: nn.Sequential(bugs.Positions(), bugs.Attention()))
    model.blocks[1].attn[0].pe = model.blocks[0].attn[0].pe
    assert worse_than_notes(diagnose(model, **bugs.images(), show=False)) == []
    model.blocks[0].attn[1] = bugs.DetachedQK()
    found = [f[:2] for f in worse_than_notes(diagnose(model, **bugs.images(), show=False))]
    assert found == [('gradient', 'blocks.0.attn.1')]

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile], ids=['DataParallel', 'compile'])
def test_wrappers(wrap):
    assert diagnose(wrap(bugs.ViT()), **bugs.images(), show=False)
    found = worse_than_notes(diagnose(wrap(bugs.ViT(attn=bugs.TorchAttention)), **bugs.images(), show=False))
    assert found[0][:2] == ('batch', 'blocks.0.attn')

def test_a_frozen_model_is_healthy_and_said_to_be_frozen():
    report = diagnose(bugs.ViT().requires_grad_(False), **bugs.images(), show=False)
    found = [(f.check, f.detail) for f in report]
    assert report and found == [('parameters', 'parameters are trained: all are frozen')]
    report = diagnose(bugs.ViT(attn=bugs.TorchAttention).requires_grad_(False), **bugs.images(), show=False)
    assert (report.findings[0].check, report.findings[0].module) == ('batch', 'blocks.0.attn')

@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_nan_and_inf_in_the_input_are_not_blamed_on_the_model(value):
    x = bugs.images()['x']
    x[0, 0, 0, 0] = value
    report = diagnose(bugs.ViT(), x, show=False)
    assert [(f.check, f.module, f.detail) for f in report] == [('finite', '', 'of the input is NaN or Inf')]
    assert abs(report.findings[0].evidence - 1/(3*256)) < 1e-6     # one pixel of the three images that are used
    assert not diagnose(bugs.ViT(), torch.full_like(x, value), show=False)

# ---- fastai, and without it ----

def test_callback_stops_before_a_step_or_warns():
    pytest.importorskip('fastai')
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from vit_nbdev.diagnose import NotHealthy, diagnose_callback
    data = list(zip(torch.rand(16, 1, 16, 16), torch.arange(16) % 5))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    def learner(model, **kw): return Learner(dls, model, nn.functional.cross_entropy, cbs=diagnose_callback(**kw))
    sick = learner(bugs.ViT(attn=bugs.TorchAttention))
    before = [p.clone() for p in sick.model.parameters()]
    with sick.no_logging(), pytest.raises(NotHealthy, match='blocks.0.attn') as error: sick.fit(1)
    assert error.value.report.findings[0].check == 'batch' and all(map(torch.equal, before, sick.model.parameters()))
    sick = learner(bugs.ViT(attn=bugs.TorchAttention), stop=False)
    with sick.no_logging(), pytest.warns(UserWarning, match='blocks.0.attn'): sick.fit(1)
    assert not torch.equal(before[0], next(sick.model.parameters()))
    well = learner(bugs.ViT())
    with well.no_logging(): well.fit(1)
    assert well.diagnose.report

@pytest.mark.parametrize('name', ['MixUp', 'CutMix'])
def test_callback_beside_a_mixup(name):
    "It puts a loss in place of the learner's that can't be computed yet; the one underneath is checked"
    mixup = pytest.importorskip('fastai.callback.mixup')
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from vit_nbdev.diagnose import diagnose_callback
    data = list(zip(torch.rand(16, 1, 16, 16), torch.arange(16) % 5))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    learn = Learner(dls, bugs.ViT(), CrossEntropyLossFlat(), cbs=[getattr(mixup, name)(0.2), diagnose_callback()])
    with learn.no_logging(): learn.fit(1)
    assert worse_than_notes(learn.diagnose.report) == [] and learn.diagnose.report.moot == ['mask']

# ---- what no optimizer sees ----

class Hidden(bugs.ViT):
    "A right ViT that adds to its tokens what `hide` keeps somewhere"
    def __init__(self, hide, use):
        super().__init__()
        hide(self)
        self.use = use
    def forward(self, x): return self.head(self.pool(self.norm(self.blocks(self.use(self, self.embed(x))))))

def table(**kw): return torch.randn(1, 17, bugs.DIM, **kw)
def pair(): return bugs.Block(), nn.Linear(bugs.DIM, bugs.DIM)

HIDDEN = {
    'a parameter times a number': (lambda m: setattr(m, 'pos', nn.Parameter(table())*.02),
                                   lambda m, x: x + m.pos, 'pos'),
    'a plain tensor': (lambda m: setattr(m, 'pos', table(requires_grad=True)), lambda m, x: x + m.pos, 'pos'),
    'a list of tuples': (lambda m: setattr(m, 'layers', [pair(), pair()]),
                         lambda m, x: m.layers[1][0](x + m.layers[0][1](x)), 'layers'),
    'a dict of lists': (lambda m: setattr(m, 'layers', {'a': [nn.Parameter(table())]}),
                        lambda m, x: x + m.layers['a'][0], 'layers'),
    'a list with an underscore': (lambda m: setattr(m, '_layers', [bugs.Block()]), lambda m, x: m._layers[0](x),
                                  '_layers')}

@pytest.mark.parametrize('name', HIDDEN)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_what_no_optimizer_sees_is_named(name, dtype):
    hide, use, key = HIDDEN[name]
    given = bugs.images()
    if dtype == torch.float64: torch.set_default_dtype(dtype)
    try: model = Hidden(hide, use)
    finally: torch.set_default_dtype(torch.float32)
    found = worse_than_notes(diagnose(model, given['x'].to(dtype), given['y'], show=False))
    assert [f for f in found if f[:2] == ('parameters', '') and f[2].endswith(f'`{key}`')]

def seen(m, x):
    "Keeps what it is given, in an attribute and in a list that grows"
    m.last, _ = x, m.maps.append(x)
    return x

INNOCENT = {
    'a frozen teacher': (lambda m: setattr(m, 'teacher', [bugs.ViT().requires_grad_(False)]), lambda m, x: x),
    'modules without parameters': (lambda m: setattr(m, 'acts', [nn.ReLU(), nn.Identity()]), lambda m, x: m.acts[1](x)),
    'a list of what is registered': (lambda m: setattr(m, 'order', [[*m.blocks], m.head.weight]), lambda m, x: x),
    'a view of a parameter': (lambda m: setattr(m, 'first', m.head.weight[:1]*2), lambda m, x: x),
    'what it was given last': (lambda m: vars(m).update(last=table(requires_grad=True), maps=[]), seen)}

@pytest.mark.parametrize('name', INNOCENT)
def test_what_is_kept_for_other_reasons_is_innocent(name):
    hide, use = INNOCENT[name]
    model = Hidden(hide, use)
    assert worse_than_notes(diagnose(model, **bugs.images(), show=False)) == []

# ---- padding ----

class Padded(nn.Module):
    "Tokens, or numbers (b n d), and keep (b n) -> classes, by the mean of the real tokens or for each of them"
    def __init__(self, embed, per_token=False):
        super().__init__()
        self.embed, self.pos = embed, nn.Parameter(torch.randn(1, 9, bugs.DIM))
        self.layer = nn.TransformerEncoderLayer(bugs.DIM, bugs.HEADS, 2*bugs.DIM, batch_first=True)
        self.head, self.per_token = nn.Linear(bugs.DIM, bugs.CLASSES), per_token
    def forward(self, x, keep):
        x = self.layer(self.embed(x) + self.pos, src_key_padding_mask=~keep)
        if self.per_token: return self.head(x) * keep[..., None]
        return self.head((x*keep[..., None]).sum(1) / keep.sum(1, keepdim=True))

def lengths(*n): return torch.arange(9) < torch.tensor(n)[:, None]

@pytest.mark.parametrize('per_token', [False, True])
@pytest.mark.parametrize('numbers', [False, True])
def test_places_that_are_padding_everywhere_need_not_be_read(numbers, per_token):
    keep = lengths(7, 5, 6, 7, 4, 7, 3, 5)
    x, embed = torch.randint(11, (8, 9)), nn.Embedding(11, bugs.DIM)
    if numbers: x, embed = torch.randn(8, 9, 8), nn.Linear(8, bugs.DIM)
    assert worse_than_notes(diagnose(Padded(embed, per_token), (x, keep), mask=keep, show=False)) == []

def test_places_that_no_mask_hides_must_be_read():
    class Short(Padded):
        def forward(self, x, keep): return super().forward(x, keep & (torch.arange(9) < 5))
    keep = lengths(7, 5, 6, 7, 4, 7, 3, 5)
    report = diagnose(Short(nn.Embedding(11, bugs.DIM)), (torch.randint(11, (8, 9)), keep), mask=keep, show=False)
    assert {'reach', 'parameters'} <= {f.check for f in report if 'part' in f.detail or 'axis 1, 2 from 5' in f.detail}

def test_a_padded_example_is_looked_at_wherever_it_stands_in_the_batch():
    keep, y = lengths(*[9]*5, 4, 9, 9), torch.arange(8) % 5
    report = diagnose(bugs.CrossDropped(), (torch.randint(11, (8, 9)), keep), y, mask=keep, show=False)
    assert ('mask', 'layer.self_attn') in [f[:2] for f in worse_than_notes(report)]

# ---- experts, caches, numbers made on the way ----

class Experts(nn.Module):
    "A mixture of experts, each of them called with the tokens that choose it, if there are any"
    mixing = 0.
    def __init__(self, n=4):
        super().__init__()
        self.gate, self.experts = nn.Linear(bugs.DIM, n), nn.ModuleList(bugs.MLP() for _ in range(n))
    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)
            if len(row): out = out.index_add(0, row, expert(tokens[row]) * weights[row, place, None])
        return out.view(x.shape) + self.mixing*x.mean(0)

class MixingExperts(Experts):
    mixing = .1

@pytest.mark.parametrize('seed', range(3))
def test_experts_whose_rows_depend_on_what_is_in_them(seed):
    torch.manual_seed(seed)
    for model, given in (bugs.ViT(mlp=Experts), bugs.images()), (bugs.Decoder(mlp=Experts), bugs.causal_ids()):
        assert worse_than_notes(diagnose(model, **given, skip=['parameters'], show=False)) == []    # some have no token
    found = [f[:2] for f in worse_than_notes(diagnose(bugs.ViT(mlp=MixingExperts), **bugs.images(), show=False))]
    assert ('batch', 'blocks.0.mlp') in found
    leaking = bugs.Decoder(attn=bugs.MaskDropped, mlp=Experts)
    found = [f[:2] for f in worse_than_notes(diagnose(leaking, **bugs.causal_ids(), show=False))]
    assert ('mask', 'blocks.0.attn') in found

class Cache:
    "Keys and values so far, as the layers of a decoder pass them on"
    def __init__(self): self.kept = {}
    def update(self, layer, *new):
        self.kept[layer] = [torch.cat(pair, 2) for pair in zip(self.kept[layer], new)] if layer in self.kept else new
        return self.kept[layer]

class Cached(bugs.Attention):
    n_layer = 0
    def mask(self, scores): return scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    def forward(self, x, cache):
        q, k, v = (self.split(t) for t in self.qkv(x).chunk(3, -1))
        return self.proj(self.merge(self.attend(q, *cache.update(self.n_layer, k, v))))

class CachedDecoder(bugs.Decoder):
    def forward(self, x):
        x, cache = self.pos(self.embed(x)), Cache()
        for i, b in enumerate(self.blocks):
            b.attn.n_layer = i
            x = x + b.attn(b.norm1(x), cache)
            x = x + b.mlp(b.norm2(x))
        return self.head(self.norm(x))

def test_a_cache_that_modules_write_into_is_given_anew_to_each_run():
    assert worse_than_notes(diagnose(CachedDecoder(attn=Cached), **bugs.causal_ids(), show=False)) == []

class Diffusion(nn.Module):
    "Tokens and a time (b), which sines in float32 encode -> tokens"
    def __init__(self, attn=bugs.Attention):
        super().__init__()
        self.time, self.blocks = nn.Linear(16, bugs.DIM), nn.ModuleList(bugs.Block(attn) for _ in range(2))
    def forward(self, x, t):
        angle = t[:, None].float() * torch.exp(-torch.arange(8, dtype=torch.float32))
        kept = torch.zeros(x.shape)
        kept[:] = x
        x = kept + self.time(torch.cat([angle.cos(), angle.sin()], -1))[:, None]
        for b in self.blocks: x = b(x)
        return x

class DetachedValues(bugs.Attention):
    def attend(self, q, k, v): return super().attend(q, k, v.detach())

@pytest.mark.parametrize('seed', range(3))
def test_numbers_made_in_float32_do_not_stop_the_gradient_check(seed):
    torch.manual_seed(seed)
    x = torch.randn(4, 9, bugs.DIM), torch.randint(1000, (4,))
    assert worse_than_notes(diagnose(Diffusion(), x, skip=['positions'], show=False)) == []
    found = worse_than_notes(diagnose(Diffusion(DetachedValues), x, show=False))
    assert ('gradient', 'blocks.0.attn') in [f[:2] for f in found]

def test_a_model_that_knows_no_float64_gets_a_note():
    class Single(nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64: raise RuntimeError('expected Float')
            return super().forward(x)
    report = diagnose(bugs.ViT(head=Single), **bugs.images(), show=False)
    assert report and [(f.check, f.severity) for f in report] == [('gradient', 'note')]

@pytest.mark.parametrize('loss', ['binary', 'squares'])
def test_one_number_for_each_example_and_integer_targets(loss):
    class One(bugs.ViT):
        def forward(self, x): return super().forward(x)[:, 0]
    binary = loss == 'binary'
    loss_func = nn.functional.binary_cross_entropy_with_logits if binary else nn.functional.mse_loss
    report = diagnose(One(), bugs.images()['x'], torch.tensor([0, 1, 1, 0]), lambda out, y: loss_func(out, y.float()),
                      skip=['parameters', 'reach'], show=False)
    assert worse_than_notes(report) == [] and 'loss' in report.checks

# ---- attention of other kinds ----

class Sink(bugs.Attention):
    "One more score for each head, which takes weight and has no value"
    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.randn(1, bugs.HEADS, 1, 1))
    def weights(self, scores):
        sink = self.sink.expand(len(scores), -1, scores.shape[2], -1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

class Differential(bugs.Attention):
    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.tensor(.4))
    def attend(self, q, k, v):
        halves = zip(q.chunk(2, -1), k.chunk(2, -1))
        a, b = ((q @ k.mT * q.shape[-1]**-.5).softmax(-1) for q, k in halves)
        return (a - self.part*b) @ v

class OneKey(bugs.Attention):
    def attend(self, q, k, v): return super().attend(q, k.mean(2, keepdim=True), v.mean(2, keepdim=True))

class Temperature(bugs.Attention):
    "Learned, as logarithms or as they are, for all heads or for each, of the scores or of the queries"
    form, shape, early = staticmethod(torch.exp), (), False
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.full(self.shape, -.7))
    def attend(self, q, k, v):
        t = self.form(self.t)
        return (q*t @ k.mT if self.early else t*(q @ k.mT)).softmax(-1) @ v

class Clamped(Temperature):
    form = staticmethod(lambda t: t.clamp(max=4.6).exp())
class Softplus(Temperature):
    form, shape = staticmethod(nn.functional.softplus), (bugs.HEADS, 1, 1)
class OfQueries(Temperature):
    form, shape, early = staticmethod(torch.abs), (1,), True

class Disentangled(bugs.Attention):
    "Each score is a sum of three products, over content and distance, scaled as one (DeBERTa)"
    terms, scaled_positions = 3, True
    def __init__(self):
        super().__init__()
        self.far = nn.Parameter(torch.randn(1, 33, bugs.DIM))     # of 17 tokens
        self.far_q, self.far_k = nn.Linear(bugs.DIM, bugs.DIM), nn.Linear(bugs.DIM, bugs.DIM)
    def total(self, parts): return sum(parts)
    def attend(self, q, k, v):
        n, scale = q.shape[2], (self.terms*q.shape[-1])**-.5
        far = (torch.arange(n)[:, None] - torch.arange(n) + n - 1).expand(*q.shape[:3], n)
        places = [(q @ self.split(self.far_k(self.far)).mT).gather(-1, far),
                  (k @ self.split(self.far_q(self.far)).mT).gather(-1, far).mT]
        if self.scaled_positions: places = [part*scale for part in places]
        return self.weights(self.total([q @ k.mT * scale, *places])) @ v

class InPlace(Disentangled):
    def total(self, parts):
        scores = parts[0]
        for part in parts[1:]: scores += part
        return scores

class Channels(bugs.Attention):
    "The channels of a head attend to each other: q k sums over the tokens"
    def scale(self, q): return q.shape[2]**-.5
    def attend(self, q, k, v): return (self.weights(q.mT @ k * self.scale(q)) @ v.mT).mT

class RightToLeft(bugs.Attention):
    def forward(self, x): return super().forward(x.flip(1)).flip(1)

@pytest.mark.parametrize('attn', [Sink, Differential, OneKey, Temperature, Clamped, Softplus, OfQueries, RightToLeft,
                                  Disentangled, InPlace, Channels])
def test_right_attention_of_another_kind_raises_no_alarm(attn):
    report = diagnose(bugs.ViT(attn=attn), **bugs.images(), show=False)
    assert worse_than_notes(report) == []
    assert ('attention' in [f.check for f in report]) == (attn in (Sink, Differential))

@pytest.mark.parametrize('wrong', [dict(terms=2), dict(scaled_positions=False)], ids=['for two', 'content alone'])
def test_a_sum_of_products_with_a_wrong_scale_is_found(wrong):
    attn = type('Wrong', (Disentangled,), wrong)
    found = worse_than_notes(diagnose(bugs.ViT(attn=attn), **bugs.images(), show=False))
    assert ('attention', 'blocks.0.attn', 'is the factor on q k, a sum of 8 products; expected 0.3536') in found

class ChannelsByWidth(Channels):
    def scale(self, q): return q.shape[-1]**-.5

def test_channels_that_attend_are_scaled_by_the_tokens():
    "By the width of a head the scores grow with the picture; what is said of that is true"
    found = worse_than_notes(diagnose(bugs.ViT(attn=ChannelsByWidth), **bugs.images(), show=False))
    assert found == [('attention', 'blocks.0.attn', 'is the factor on q k, a sum of 17 products; expected 0.2425')]

def test_the_first_davit_scales_channels_by_the_width_of_a_head():
    "As published; its later version, by the tokens, is among the healthy models"
    pytest.importorskip('timm')
    report = diagnose(*healthy_models.timm_davit('davit_tiny'), show=False)
    found, = (f for f in report if f.severity != 'note')
    assert (found.check, found.module, found.evidence) == ('attention', 'stages.0.blocks.0.1.attn', 16**-.5)
    assert found.detail == 'is the factor on q k, a sum of 256 products; expected 0.0625'
    assert 'the tokens if channels attend' in found.advice

class Torn(bugs.Attention):
    "Only the queries, keys or values are split by a reshape"
    which = 0
    def forward(self, x):
        parts = list(self.qkv(x).chunk(3, -1))
        torn = parts[self.which].reshape(x.shape[0], self.n_heads, x.shape[1], -1)
        parts = [torn if i == self.which else self.split(t) for i, t in enumerate(parts)]
        return self.proj(self.merge(self.attend(*parts)))

@pytest.mark.parametrize('which', range(3), ids=['queries', 'keys', 'values'])
def test_one_of_three_torn_apart_is_found(which):
    attn = type('Torn', (Torn,), {'which': which})
    found = worse_than_notes(diagnose(bugs.ViT(attn=attn), **bugs.images(), show=False))
    assert ('attention', 'blocks.0.attn', 'of the heads see a token; expected 1') in found

# ---- tokens of two kinds, positions as an input, norms that follow the weights ----

class Sentences(nn.Module):
    "Tokens and their places (b n), or without `places` tokens alone -> classes"
    def __init__(self, places=True):
        super().__init__()
        self.embed, self.pos, self.places = nn.Embedding(11, bugs.DIM), nn.Embedding(20, bugs.DIM), places
        self.block, self.head = bugs.Block(), nn.Linear(bugs.DIM, bugs.CLASSES)
    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids)
        if self.places: x = x + self.pos(position_ids)
        return self.head(self.block(x).mean(1))

@pytest.mark.parametrize('first', [0, 2])
def test_positions_that_are_an_input_stay_where_they_are(first):
    ids, places = bugs.token_ids()['x'], torch.arange(first, first + 9).expand(4, 9)
    for x in dict(input_ids=ids, position_ids=places), dict(position_ids=places, input_ids=ids):
        assert worse_than_notes(diagnose(Sentences(), x, skip=['parameters'], show=False)) == []
        found = worse_than_notes(diagnose(Sentences(places=False), x, show=False))
        assert ('positions', '') in [f[:2] for f in found]

def test_tokens_in_a_row_with_no_others_are_moved():
    "As in `torch.arange(9)` for a try: they look like positions, but are all there is"
    class Bag(Sentences):
        def forward(self, input_ids): return super().forward(input_ids, None)
    ids = torch.arange(9).repeat(4, 1)
    assert ('positions', '') in [f[:2] for f in worse_than_notes(diagnose(Bag(places=False), ids, show=False))]
    for x in (torch.zeros_like(ids), ids), (ids, torch.zeros_like(ids)):       # which of them are the tokens?
        assert worse_than_notes(diagnose(Sentences(), x, skip=['parameters'], show=False)) == []

def test_tokens_of_two_kinds_are_content():
    x = torch.randint(2, (8, 9))
    assert worse_than_notes(diagnose(bugs.Decoder(), x, causal=True, show=False)) == []
    for attn, check in (bugs.MaskDropped, 'mask'), (lambda: bugs.TorchAttention(), 'batch'):
        given = dict(causal=True) if check == 'mask' else {}
        found = [f[:2] for f in worse_than_notes(diagnose(bugs.Decoder(attn=attn), x, **given, show=False))]
        assert (check, 'blocks.0.attn') in found

@pytest.mark.parametrize('norm', [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_norm_that_follows_the_weights_explains_a_difference_of_modes(norm):
    class Normed(bugs.MLP):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = norm(self.fc1), norm(self.fc2)
    class Wrong(Normed):
        def forward(self, x): return super().forward(x) * (1.1 if self.training else 1)
    right, wrong = bugs.ViT(mlp=Normed).train(), bugs.ViT(mlp=Wrong).train()
    for _ in range(100): right(bugs.images()['x'])      # to where u and v stay
    assert worse_than_notes(diagnose(right, **bugs.images(), show=False)) == []
    assert ('modes', 'blocks.0.mlp') in [f[:2] for f in worse_than_notes(diagnose(wrong, **bugs.images(), show=False))]

def test_bytes_from_black_to_white():
    "Pixels as a file has them, through a model that divides them itself"
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit('S/16', img_size=16, patch_size=4, dim=16, depth=2, n_heads=2, n_classes=3)
            nn.init.normal_(self.vit.head.weight)
        def forward(self, x): return self.vit(x.float()/255 - 0.5)
    torch.manual_seed(0)
    x = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 255
    report = diagnose(Bytes().eval(), x)
    assert report, report
    whole = other(x, torch.ones(4, dtype=torch.bool))
    assert (whole != x).all() and whole.dtype == torch.uint8

@pytest.mark.parametrize('padding', [False, True])
def test_a_mask_of_floats_is_the_mask_all_the_same(padding):
    "Of ones where there is something, or where there is nothing"
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, bugs.DIM)
            self.head = nn.Linear(bugs.DIM, bugs.CLASSES)
        def forward(self, x, keep):
            if padding: keep = 1 - keep
            return self.head((self.embed(x)*keep[..., None]).sum(1)/keep.sum(1, keepdim=True))
    keep = lengths(7, 5, 6, 7, 4, 7, 3, 5)
    given = (~keep if padding else keep).float()
    report = diagnose(Mean(), (torch.randint(11, (8, 9)), given), torch.arange(8) % bugs.CLASSES, mask=keep, show=False)
    assert [f for f in worse_than_notes(report) if f[0] == 'mask'] == []
    with pytest.raises(ValueError, match='mask is torch.float32'):
        diagnose(Mean(), (torch.randint(11, (8, 9)), given), torch.arange(8) % bugs.CLASSES, mask=given, show=False)
