"""What a user can get wrong when units are removed: the error that says so, the model untouched bit for bit."""
import copy
import random
import re
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fasterai_lib.core.criteria import Criteria
from fasterai_lib.prune.graph import trace
from fasterai_lib.prune.pruner import Pruner

nan, inf, X = float('nan'), float('inf'), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def randomised(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]: t.copy_(torch.rand(t.shape, generator=g) + .1 if t.ndim == 1 else torch.randn(t.shape, generator=g)/4)
    return model

def net():
    return randomised(nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), relu=nn.ReLU(), drop=nn.Dropout(.1), conv2=nn.Conv2d(8, 6, 3),
                                                pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(6, 4)))).train()

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.a, self.b, self.fc, self.memory = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1), nn.Linear(8, 5), {}
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc((x + self.b(self.a(x).relu())).mean((2, 3)))
def residual(): return randomised(Residual())

def recurrent():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 4)
        def forward(self, x): return self.fc(self.rnn(x)[0])
    return randomised(Net())

def changed(f):
    def make():
        m = net()
        f(m)
        return m
    return make
def spoiled(value): return changed(lambda m: m.conv2.weight.data[1, 2, 0, :1].fill_(value) is None)
def put(name, make): return changed(lambda m: setattr(m, name, make(m)))
def old_style(m): nn.utils.weight_norm(m.conv2)
def quantised():
    m = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8)

# --- a model bit for bit

def value(x, memo):
    if isinstance(x, torch.Tensor):
        if isinstance(x, nn.parameter.UninitializedTensorMixin): return id(x), 'empty'
        data = None if x.device.type == 'meta' or x.is_quantized else (x.data_ptr(), x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return id(x), x.dtype, tuple(x.shape), x.stride(), x.requires_grad, data, None if x.grad is None else value(x.grad, memo)[2:], sorted(vars(x))
    if isinstance(x, (dict, list, tuple, set)) and id(x) in memo: return id(x)
    memo.add(id(x))
    if isinstance(x, dict): return type(x), [(id(k) if isinstance(k, torch.Tensor) else k, value(v, memo)) for k, v in x.items()]
    if isinstance(x, (list, tuple)): return type(x), [value(v, memo) for v in x]
    return x if isinstance(x, (int, float, str, bool, type(None), set)) else id(x)

def picture(model, opt=None):
    inner = getattr(opt, 'opt', opt)
    return ([(n, id(m), type(m), value(copy.copy(vars(m)), set())) for n, m in model.named_modules(remove_duplicate=False)],
            None if opt is None else value([dict(inner.state), inner.param_groups], set()))

def rng(): return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

def trained(model, x=X, kind=torch.optim.Adam, **kw): # with gradients and an optimizer's state
    opt = kind(model.parameters(), lr=1e-3, **kw)
    model(x).square().sum().backward()
    opt.step()
    model.register_forward_hook(lambda m, i, o: None)
    next(model.parameters()).register_hook(lambda g: g)
    return opt

# --- errors

def new(x=X, **kw): return lambda w: Pruner(w.model, x, **kw)
def prune(sparsity=50, x=X, opt=None, **kw): return lambda w: Pruner(w.model, x, **kw).prune_model(sparsity, opt)
def other_adam(w): Pruner(w.model, X).prune_model(50, trained(net()))
def lbfgs(w): Pruner(w.model, X).prune_model(50, torch.optim.LBFGS(w.model.parameters()))
def odd_state(w):
    opt = torch.optim.SGD(w.model.parameters(), lr=.1)
    opt.state[w.model.conv1.weight]['sketch'] = torch.zeros(7)
    Pruner(w.model, X).prune_model(50, opt)
NOTHING, DID = r'nothing can be removed from Sequential exactly:.*', r'.*did you mean '

CASES = [
    ('no inputs', new(None), ValueError, r'example_inputs are needed.*tensor, a tuple or a dict'),
    ('an empty tuple', new(()), ValueError, r'example_inputs are needed'),
    ('an empty dict', new({}), ValueError, r'example_inputs are needed'),
    ('inputs left out', lambda w: Pruner(w.model), TypeError, r'example_inputs'),
    ('channels of the inputs', new(torch.randn(2, 5, 8, 8)), ValueError, r'Sequential does not run on the example inputs.*5 channels'),
    ('inputs too small', new(torch.randn(2, 3, 2, 2)), ValueError, r'does not run on the example inputs.*[Kk]ernel'),
    ('one input too many', new((X, X)), ValueError, r'does not run on the example inputs.*argument'),
    ('a keyword too many', new(dict(input=X, mask=X)), ValueError, r'does not run on the example inputs.*mask'),
    ('inputs as text', new('picture'), (ValueError, TypeError), r'example.inputs'),
    ('inputs on another device', new(X.to('meta')), ValueError, r'model is on cpu.*inputs on meta'),
    ('model on another device', new(), ValueError, r'model is on meta.*inputs on cpu', changed(lambda m: m.to('meta'))),
    ('no module', lambda w: Pruner(list(w.model), X), TypeError, r'model must be an nn.Module, got list'),
    ('a class', lambda w: Pruner(nn.Conv2d, X), TypeError, r'model must be an nn.Module, got type'),
    ('a state dict', lambda w: trace(w.model.state_dict(), X), TypeError, r'nn.Module, got OrderedDict'),
    ('quantised', new(torch.randn(2, 3)), TypeError, r'0 is a quantised layer.*before quantising', quantised),
    ('scripted', lambda w: Pruner(torch.jit.trace(net().eval(), X), X), TypeError, r'scripted or traced'),
    ('scripted layer', prune(), TypeError, r'conv2.*(scripted|traced)', put('conv2', lambda m: torch.jit.trace(m.conv2, torch.randn(2, 8, 6, 6)))),
    ('DataParallel', lambda w: Pruner(nn.DataParallel(w.model), X), TypeError, r'DataParallel.*model\.module'),
    ('lazy', new(), ValueError, r'conv2: not initialised yet.*run the model once', put('conv2', lambda m: nn.LazyConv2d(6, 3))),
    ('lazy statistics', new(), ValueError, r'bn: not initialised yet', put('bn', lambda m: nn.LazyBatchNorm2d(affine=False))),
    ('everything ignored', prune(ignored='*'), ValueError, NOTHING + 'it is ignored'),
    ('all layers ignored', prune(ignored=('conv*', 'fc')), ValueError, NOTHING + 'it is ignored'),
    ('the model ignored', lambda w: Pruner(w.model, X, ignored=w.model).plan(50), ValueError, NOTHING + 'it is ignored'),
    ('only outputs', prune(x=torch.randn(2, 3)), ValueError, r'nothing can be removed from Linear', lambda: nn.Linear(3, 4)),
    ('no parameters', prune(), ValueError, r'nothing can be removed from ReLU.*no layer makes channels', nn.ReLU),
    ('ignored nothing', new(ignored='conv9'), ValueError, r"ignored: 'conv9' is no layer of Sequential" + DID + r"'conv\d'"),
    ('ignored one of two', new(ignored=('conv1', 'head.*')), ValueError, r"ignored: 'head\.\*' is no layer"),
    ('ignored a stranger', new(ignored=nn.Conv2d(1, 1, 1)), ValueError, r'ignored: Conv2d is no layer of Sequential'),
    ('ignored a number', new(ignored=3), TypeError, r'ignored.*got 3'),
    ('ignored numbers', new(ignored=(3,)), TypeError, r'ignored.*got 3'),
    ('ignored none', new(ignored=None), TypeError, r'ignored.*None'),
    ('100 %', prune(100), ValueError, r'100 % leaves nothing.*remove_layer'),
    ('100 % of one', prune({'conv1': 100}), ValueError, r'100 % leaves nothing'),
    ('100 % global', prune(100, context='global'), ValueError, r'100 % leaves nothing'),
    ('below 0', prune(-1), ValueError, r'sparsity.*between 0 and 100.*-1'),
    ('above 100', prune(150), ValueError, r'sparsity.*between 0 and 100.*150'),
    ('bool', prune(True), TypeError, r'sparsity.*percentage.*True'),
    ('text', prune('50'), TypeError, r"sparsity.*percentage.*'50'"),
    ('nan', prune(nan), ValueError, r'sparsity.*nan'),
    ('infinite', prune(inf), ValueError, r'sparsity.*inf'),
    ('none', prune(None), TypeError, r'sparsity.*None'),
    ('a set', prune({50}), TypeError, r'sparsity.*\{50\}'),
    ('list too short', prune([50]), ValueError, r'got 1 values for 2 groups of units: conv1, conv2'),
    ('list too long', prune([50, 20, 10]), ValueError, r'got 3 values for 2 groups'),
    ('empty list', prune([]), ValueError, r'got 0 values for 2 groups'),
    ('list with a bad entry', prune([50, 120]), ValueError, r"sparsity of 'conv2'.*120"),
    ('list with text', prune([50, 'x']), TypeError, r"sparsity of 'conv2'.*'x'"),
    ('dict of an unknown layer', prune({'conv9': 50}), ValueError, r"no layer that can be pruned matches 'conv9'" + DID + r"'conv\d'"),
    ('dict of the output', prune({'fc': 50}), ValueError, r"no layer that can be pruned matches 'fc'.*conv1, conv2"),
    ('dict of a number', prune({3: 50}), ValueError, r'no layer that can be pruned matches 3'),
    ('dict with a bad entry', prune({'conv1': -4}), ValueError, r"sparsity of 'conv1'.*-4"),
    ('dict with a bool', prune({'conv1': True}), TypeError, r"sparsity of 'conv1'.*True"),
    ('empty dict', prune({}), ValueError, r'sparsity.*(empty|no layer|conv1)'),
    ('dict with a conflict', prune({'stem': 30, 'b': 50}), ValueError, r'layers stem, b lose the same units.*\[30\.0, 50\.0\]', residual),
    ('dict with a conflict of globs', prune({'*': 30, 'conv1': 50}), ValueError, r'conv1 lose the same units.*\[30\.0, 50\.0\]'),
    ('dict in global', prune({'conv1': 50}, context='global'), ValueError, r"dict.*context='local'"),
    ('list in global', prune([50, 50], context='global'), ValueError, r"list.*context='local'"),
    ('min_kept 0', new(min_kept=0), ValueError, r'min_kept.*at least 1.*0'),
    ('min_kept bool', new(min_kept=True), TypeError, r'min_kept.*True'),
    ('min_kept fraction', new(min_kept=.5), TypeError, r'min_kept.*0\.5'),
    ('round_to 0', new(round_to=0), ValueError, r'round_to.*at least 1.*0'),
    ('round_to negative', new(round_to=-8), ValueError, r'round_to.*-8'),
    ('round_to bool', new(round_to=True), TypeError, r'round_to.*True'),
    ('round_to fraction', new(round_to=2.5), TypeError, r'round_to.*2\.5'),
    ('round_to text', new(round_to='8'), TypeError, r"round_to.*'8'"),
    ('max_sparsity', new(max_sparsity=150), ValueError, r'max_sparsity.*150'),
    ('max_sparsity text', new(max_sparsity='80'), TypeError, r"max_sparsity.*'80'"),
    ('unknown criterion', new(criteria='large_finl'), ValueError, r"criteria 'large_finl'" + DID + "'large_final'"),
    ('a bare function', new(criteria=torch.abs), TypeError, r'Criteria\(f\)'),
    ('criterion of nan', prune(criteria=Criteria(lambda w: w*nan, name='odd')), ValueError, r'conv1.*odd.*NaN'),
    ('criterion of another shape', prune(criteria=Criteria(lambda w: w.sum(), name='odd')), ValueError, r'conv1.*odd.*shape'),
    ('unknown context', new(context='globel'), ValueError, r"'globel'" + DID + "'global'"),
    ('context of a number', new(context=2), TypeError, r'context.*2.*local, global'),
    ('n:m', new(context='2:4'), ValueError, r"context '2:4'.*'local' or 'global'"),
    ('per row', new(context='per_row'), ValueError, r"context 'per_row'.*'local' or 'global'"),
    ('optimizer of another model', other_adam, ValueError, r'optimizer of another model'),
    ('LBFGS', lbfgs, ValueError, r'LBFGS.*flat history'),
    ('state of an odd shape', odd_state, ValueError, r"SGD keeps 'sketch'.*\(7,\)"),
    ('optimizer a number', prune(opt=3), TypeError, r'optimizer of fastai or torch, got int'),
    ('optimizer a class', prune(opt=torch.optim.Adam), TypeError, r'optimizer of fastai or torch, got type'),
    ('nan weights', prune(), ValueError, r'conv2.*NaN', spoiled(nan)),
    ('nan weights in global', prune(context='global'), ValueError, r'conv2.*NaN', spoiled(nan)),
    ('infinite weights', prune(context='global'), ValueError, r'conv2.*(inf|NaN)', spoiled(inf)),
    ('why of no layer', lambda w: trace(w.model, X).why('conv9'), ValueError, r"'conv9' is not a layer" + DID),
    ('why of no channel', lambda w: trace(w.model, X).why('conv1', 8), ValueError, r'conv1 has 8 outputs'),
]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('case', CASES, ids=[c[0].replace(' ', '-') for c in CASES])
def test_error_says_what_is_wrong_and_changes_nothing(case):
    name, call, kind, message, model = (*case, net)[:5]
    torch.manual_seed(0)
    w = SimpleNamespace(model=model())
    snap, before = picture(w.model), None if 'another model' in name or name == 'scripted' else rng()
    with pytest.raises(kind) as caught: call(w)
    assert re.search(message, str(caught.value), re.S), f'message: {caught.value}'
    assert picture(w.model) == snap, 'the model has changed'
    assert before is None or rng() == before, 'a generator has moved'

def test_after_errors_the_same_pruner_works():
    model, twin = net(), net()
    p = Pruner(model, X)
    for bad in (130, 'x', [50], {'conv3': 50}, 100):
        with pytest.raises((ValueError, TypeError)): p.prune_model(bad)
    with pytest.raises(ValueError, match='another model'): p.prune_model(50, trained(net()))
    p.prune_model(50); Pruner(twin, X).prune_model(50)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values())) and model.conv1.out_channels == 4

def test_a_fraction_warns():
    with pytest.warns(UserWarning, match=r'0\.5.*did you mean 50 %'): Pruner(net(), X).plan(.5)

# --- what is allowed

@pytest.mark.parametrize('make', [net, residual])
def test_a_plan_changes_nothing(make):
    model = make()
    if make is residual: model.memory['table'] = torch.ones(3) # kept from one run to the next
    opt = trained(model)
    snap, before = picture(model, opt), rng()
    p = Pruner(model, X, criteria='movement')
    for s in (30, 70, 0): p.plan(s).table()
    trace(model, X, exact=False).table()
    assert picture(model, opt) == snap and rng() == before

def test_frozen_weights_go_too_and_stay_frozen():
    model = net().requires_grad_(False)
    model.conv2.bias.requires_grad_(True)
    Pruner(model, X).prune_model(50)
    assert (model.conv1.out_channels, model.conv2.in_channels, model.conv2.out_channels, model.fc.in_features) == (4, 4, 3, 3)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ['conv2.bias']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrap', [old_style, lambda m: parametrizations.weight_norm(m.conv2) and None, lambda m: parametrizations.spectral_norm(m.conv2) and None, lambda m: nn.utils.spectral_norm(m.conv2) and None])
def test_parametrised_weights_are_exact_or_stay(wrap):
    torch.manual_seed(0)
    model, masked = (changed(wrap)().eval() for _ in range(2))
    masked.load_state_dict(model.state_dict())
    plan = Pruner(model, X).plan(50)
    plan.apply(masked); plan.remove(model)
    assert model.conv1.out_channels == 4 or len(model.conv1.weight) == 8
    assert torch.allclose(model.double()(X.double()), masked.double()(X.double()), rtol=1e-10, atol=1e-12)
    model.train()(X.double()).sum().backward()

def test_limits_leave_a_layer_whole():
    model = net()
    plan = Pruner(model, X, min_kept=7).plan(50) # conv2 has 6
    assert plan.table().set_index('layer').kept.to_dict() == {'conv1': 7}
    snap = picture(model)
    assert not len(Pruner(model, X, min_kept=9).prune_model(50).cuts) and not len(Pruner(model, X, round_to=16).prune_model(50).cuts)
    snap[0][0][3][1][:] = [kv for kv in snap[0][0][3][1] if kv[0] != '_pruned']
    now = picture(model)
    now[0][0][3][1][:] = [kv for kv in now[0][0][3][1] if kv[0] != '_pruned']
    assert now == snap
