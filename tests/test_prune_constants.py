"""What dead units emit goes into the biases that read it, or is dropped and reported. Oracle: the masked model, run in float64 before anything is removed."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from hypothesis import given, settings, strategies as st
from torch import nn

import prune_zoo as zoo
from fasterai_lib.core.schedule import agp
from fasterai_lib.prune import constants
from fasterai_lib.prune.constants import fold_constants
from fasterai_lib.prune.plan import load_pruned, save_pruned
from fasterai_lib.prune.prune_callback import PruneCallback, _dead, _producers, shrink
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsify_callback import SparsifyCallback
from test_prune_exact import batch, named, pictures, rng, sequences, snapshot, some


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- models with dead units, in float64

def kill(model, dead): # rows of weights, and nothing else
    model = zoo.randomise(model, 1).double().eval()
    with torch.no_grad():
        for layer, units in dead.items(): model.get_submodule(layer).weight[units] = 0
    return model

def error(want, got): return float(((want - got).abs().max()/want.abs().max()).detach())

def shrunk(model, x, **kwargs): # the masked model as it was, the small one, and the plan
    masked = copy.deepcopy(model)
    plan = shrink(model, x, **kwargs)
    assert not model.training and plan.removed
    return masked, model, plan

def image(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def chain(*layers): return nn.Sequential(*layers)
def conv(i, o, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
bn, sigmoid = nn.BatchNorm2d, nn.Sigmoid

class Net(nn.Module): # layers by name, and a function of them
    def __init__(self, forward, **layers):
        super().__init__()
        for n, m in layers.items(): setattr(self, n, m)
        self.run = forward
    def forward(self, x): return self.run(self, x)

def concat(): return Net(lambda s, x: s.c(torch.cat([s.a(x).sigmoid(), F.softplus(s.b(x))], 1)), a=conv(3, 5, 3), b=conv(3, 4, 3), c=conv(9, 4))
def residual(): # all that adds to the stream
    return Net(lambda s, x: s.head((lambda y: y + s.last(s.b(F.relu(s.a(y)))))(s.norm(s.stem(x)).sigmoid())), stem=conv(3, 6, bias=False), norm=bn(6), a=conv(6, 4), b=conv(4, 6), last=bn(6), head=conv(6, 3))
def squeeze(): # squeeze and excite
    return Net(lambda s, x: s.b((lambda y: y*s.e(F.relu(s.d(y.mean((2, 3), keepdim=True)))).sigmoid())(F.silu(s.n(s.a(x))))), a=conv(3, 8, 3), n=bn(8), d=conv(8, 3), e=conv(3, 8), b=conv(8, 3))

X = (3, 6, 6)
FOLDED = { # model, its dead rows, where the constants go, shape of an example, may the picture be larger?
    'batchnorm takes it': (lambda: chain(conv(3, 8, 3, bias=False), bn(8), nn.ReLU(), conv(8, 5, bias=False), bn(5), nn.ReLU()), {'0': [1, 4]}, {'4.running_mean'}, X, True),
    'no padding': (lambda: chain(conv(3, 8, 3, bias=False, padding=1), bn(8), nn.SiLU(), conv(8, 5, 3, bias=False), bn(5)), {'0': [0, 4]}, {'4.running_mean'}, X, True),
    'bias before batchnorm': (lambda: chain(conv(3, 8), bn(8), nn.GELU(), conv(8, 5, 2, stride=2), bn(5)), {'0': [0, 4]}, {'3.bias'}, X, True),
    'reflected': (lambda: chain(conv(3, 8), sigmoid(), conv(8, 5, 3, padding=1, padding_mode='reflect')), {'0': [7]}, {'2.bias'}, X, True),
    'round the corner': (lambda: chain(conv(3, 8), sigmoid(), conv(8, 5, 3, padding=1, padding_mode='circular')), {'0': [7]}, {'2.bias'}, X, True),
    'pooled': (lambda: chain(conv(3, 8, 3, padding=1), nn.Softplus(), nn.MaxPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), {'0': [2, 3]}, {'5.bias'}, X, True),
    'flattened': (lambda: chain(conv(3, 8, 3), bn(8), nn.PReLU(8), nn.Flatten(), nn.Linear(128, 4)), {'0': [2, 3]}, {'4.bias'}, X, False),
    'two in a row': (lambda: chain(nn.Linear(4, 8), sigmoid(), nn.Linear(8, 6), sigmoid(), nn.Linear(6, 2)), {'0': [1, 4], '2': [0, 5]}, {'2.bias', '4.bias'}, (4,), True),
    'words': (lambda: chain(nn.Linear(4, 8), sigmoid(), nn.Dropout(), nn.Linear(8, 3)), {'0': [0]}, {'3.bias'}, (5, 4), True),
    'batchnorm of a linear layer': (lambda: chain(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3)), {'0': [0]}, {'3.running_mean'}, (4,), True),
    'grouped': (lambda: chain(conv(3, 8), sigmoid(), conv(8, 8, groups=2), sigmoid(), conv(8, 5, groups=1)), {'0': [0, 4], '2': [1, 5]}, {'2.bias', '4.bias'}, X, True),
    'depthwise': (lambda: chain(conv(3, 8), bn(8), nn.ReLU6(), conv(8, 8, 3, padding=1, groups=8, bias=False), bn(8), nn.ReLU6(), conv(8, 5, bias=False), bn(5)), {'0': [1, 4], '3': [1, 4]}, {'7.running_mean'}, X, True),
    'concat': (concat, {'a': [1, 2], 'b': [0]}, {'c.bias'}, X, True),
    'residual': (residual, {'stem': [1, 2], 'b': [1, 2, 3]}, {'a.bias', 'head.bias'}, X, True),
    'squeeze and excite': (squeeze, {'a': [1, 2], 'e': [1, 2, 3]}, {'d.bias', 'b.bias'}, X, True),
    'transposed': (lambda: chain(conv(3, 8), sigmoid(), nn.ConvTranspose2d(8, 4, 1)), {'0': [3]}, {'2.bias'}, X, True)}


@pytest.mark.parametrize('name', FOLDED)
def test_folded(name):
    make, dead, into, shape, larger = FOLDED[name]
    model = kill(make(), dead)
    numbers = rng()
    masked, small, plan = shrunk(model, image(2, *shape))
    assert {t for _, t in plan.folded.values()} == into and plan.dropped == {} and plan.change < 1e-10 and set(plan.shifts) == into
    assert rng() == numbers and [n for n, _ in small.named_parameters()] == [n for n, _ in masked.named_parameters()]
    for n, s in (((2, *shape), 1), ((5, *shape), 2), *([((2, 3, 9, 8), 3)] if larger and shape == X else [])):
        x = 3*image(*n, seed=s)
        with torch.no_grad(): assert error(masked(x), small(x)) < 1e-10

@pytest.mark.parametrize('name', FOLDED)
def test_without_folding_something_is_lost(name):
    make, dead, _, shape, _ = FOLDED[name]
    masked, small, plan = shrunk(kill(make(), dead), image(2, *shape), fold=False)
    assert plan.shifts == plan.folded == plan.dropped == {} and plan.change is None and 'constants' not in repr(plan)
    with torch.no_grad(): assert error(masked(image(2, *shape)), small(image(2, *shape))) > 1e-4


# --- what cannot be folded is dropped, and told

def gated(): # nobody will ever draw an input for which the gate is not one
    return Net(lambda s, x: s.b(s.a(x).sigmoid()*(1 + F.relu(x.mean(1, keepdim=True) - 1000))), a=conv(3, 6), b=conv(6, 4))
def tied(): return Net(lambda s, x: F.conv2d(s.a(x).sigmoid(), s.b.weight, s.b.bias) + s.b.bias.view(-1, 1, 1)*x[:, :1], a=conv(3, 6), b=conv(6, 4))
def always_training(): return Net(lambda s, x: s.c(F.batch_norm(s.b(s.a(x).sigmoid()), s.n.running_mean, s.n.running_var, training=True)), a=conv(3, 6), b=conv(6, 5, bias=False), n=bn(5), c=conv(5, 2))
def places(): return Net(lambda s, x: s.b((s.a(x) + s.p).sigmoid()), a=conv(3, 6), b=conv(6, 4), p=nn.Parameter(torch.zeros(6, 6, 6)))
def summed(): return Net(lambda s, x: s.b(s.a(x).sigmoid().sum((2, 3))), a=conv(3, 6), b=nn.Linear(6, 4))

DROPPED = {
    'zero padding': (lambda: chain(conv(3, 8, 3, bias=False), bn(8), nn.ReLU(), conv(8, 5, 3, padding=1, bias=False), bn(5)), {'0': [1, 4]}, '3', 'zero padding', X),
    'zero padding of one position': (lambda: chain(conv(3, 8), sigmoid(), nn.AdaptiveAvgPool2d(1), conv(8, 5, 3, padding=1)), {'0': [1, 4]}, '3', 'zero padding', X), # elsewhere the map may be larger
    'padded average': (lambda: chain(conv(3, 8), sigmoid(), nn.AvgPool2d(3, padding=1), conv(8, 5)), {'0': [1, 4]}, '3', 'depends on', X),
    'padded average of one position': (lambda: chain(conv(3, 8), sigmoid(), nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(3, padding=1), conv(8, 5)), {'0': [1, 4]}, '4', 'depends on', X),
    'no bias': (lambda: chain(nn.Linear(4, 8), sigmoid(), nn.Linear(8, 3, bias=False)), {'0': [1]}, '2', 'no bias', (4,)),
    'a norm in training mode': (always_training, {'a': [1]}, 'b', 'no bias', X),
    'a gate': (gated, {'a': [1, 2]}, 'b', 'depends on', X),
    'bias used elsewhere': (tied, {'a': [1, 2]}, '', 'no bias', X),
    'positions': (places, {'a': [1, 2]}, 'b', 'depends on', X),
    'sum over positions': (summed, {'a': [1, 2]}, 'b', 'depends on', X),
    'transposed': (lambda: chain(conv(3, 8), sigmoid(), nn.ConvTranspose2d(8, 4, 2, stride=2)), {'0': [3]}, '2', 'depends on', X)}

@pytest.mark.parametrize('name', DROPPED)
def test_dropped(name):
    make, dead, reader, why, shape = DROPPED[name]
    x = image(2, *shape)
    masked, small, plan = shrunk(kill(make(), dead), x)
    (path, (units, reason)), = plan.dropped.items()
    assert path == reader and why in reason and plan.folded == plan.shifts == {}
    if name != 'a norm in training mode': assert units and plan.change > 1e-6 and 'dropped' in repr(plan) # such a norm takes constants away
    with torch.no_grad(): assert abs(error(masked(x), small(x)) - plan.change) <= .9*plan.change + 1e-12
    if reader: # the same as the masked model that does not read them
        masked.get_submodule(reader).register_forward_pre_hook(lambda m, a: (a[0].index_fill(1, torch.tensor(*dead.values()), 0),))
        for s in (x, image(4, *shape, seed=5)):
            with torch.no_grad(): assert error(masked(s), small(s)) < 1e-10

def test_dropped_at_one_reader_and_folded_at_another():
    model = Net(lambda s, x: (lambda y: s.b(y) + s.c(y))(s.a(x).sigmoid()), a=conv(3, 6), b=conv(6, 4), c=conv(6, 4, 3, padding=1))
    masked, small, plan = shrunk(kill(model, {'a': [1, 2]}), image(2, *X))
    assert plan.folded == {'b': (2, 'b.bias')} and list(plan.dropped) == ['c'] and plan.dropped['c'][0] == 2
    masked.c.register_forward_pre_hook(lambda m, a: (a[0].index_fill(1, torch.tensor([1, 2]), 0),))
    with torch.no_grad(): assert error(masked(image(3, *X)), small(image(3, *X))) < 1e-10

def test_some_units_at_one_reader():
    model = Net(lambda s, x: s.b(torch.cat([s.a(x).sigmoid(), s.c(x).sigmoid()*x[:, :1]], 1)), a=conv(3, 6), c=conv(3, 4), b=conv(10, 4))
    masked, small, plan = shrunk(kill(model, {'a': [1, 2], 'c': [3]}), image(2, *X))
    assert plan.folded == {'b': (2, 'b.bias')} and plan.dropped == {'b': (1, 'it depends on the input or on the position')}
    masked.b.register_forward_pre_hook(lambda m, a: (a[0].index_fill(1, torch.tensor([9]), 0),))
    with torch.no_grad(): assert error(masked(image(3, *X)), small(image(3, *X))) < 1e-10

def test_some_units_that_are_the_same_everywhere():
    model = Net(lambda s, x: s.b(torch.cat([s.a(x).sigmoid(), F.avg_pool2d(s.c(x).sigmoid(), 3, 1, 1), F.pad(s.d(x).sigmoid()[..., 1:-1, 1:-1], [1]*4)], 1)), a=conv(3, 6), c=conv(3, 4), d=conv(3, 4), b=conv(14, 4))
    masked, small, plan = shrunk(kill(model, {'a': [1, 2], 'c': [3], 'd': [1]}), image(2, *X))
    assert plan.folded == {'b': (2, 'b.bias')} and plan.dropped == {'b': (2, 'it depends on the input or on the position')}
    masked.b.register_forward_pre_hook(lambda m, a: (a[0].index_fill(1, torch.tensor([9, 11]), 0),))
    with torch.no_grad(): assert error(masked(image(3, *X)), small(image(3, *X))) < 1e-10

def test_silent_units_are_not_mentioned():
    model = kill(chain(conv(3, 8, bias=False), nn.ReLU(), conv(8, 4, 3, padding=1, bias=False)), {'0': [1, 2]})
    masked, small, plan = shrunk(model, image(2, *X))
    assert plan.folded == plan.dropped == plan.shifts == {} and plan.change < 1e-10 and 'constants' not in repr(plan)

def test_layer_norm():
    make = lambda: kill(chain(nn.Linear(4, 8), sigmoid(), nn.LayerNorm(8), nn.Linear(8, 3)), {'0': [1, 2]})
    with pytest.raises(ValueError, match='no dead unit'): shrink(make(), image(2, 4))
    masked, small, plan = shrunk(make(), image(2, 4), exact=False)
    with torch.no_grad(): assert plan.change > 1e-3 and abs(error(masked(image(2, 4)), small(image(2, 4))) - plan.change) < plan.change


# --- training mode, other copies, files

def test_batchnorm_in_training_mode():
    make, dead, _, shape, _ = FOLDED['batchnorm takes it']
    masked, small, _ = shrunk(kill(make(), dead), image(2, *shape))
    for m in (masked, small): m.train()
    for s in range(3): assert error(masked(image(4, *shape, seed=s)), small(image(4, *shape, seed=s))) < 1e-10 # statistics are updated
    for m in (masked, small): m.eval()
    a, b = masked[4].running_mean, small[4].running_mean
    assert not torch.allclose(a, b) # they hold another constant

def test_a_copy_and_a_file(tmp_path):
    make, dead, _, shape, _ = FOLDED['no padding']
    masked = kill(make(), dead)
    pruner = Pruner(masked, image(2, *shape))
    alive, before = _dead(pruner.graph), snapshot(masked)
    assert pruner.prover.prove(alive) is None
    plan = fold_constants(pruner.prover, alive)
    assert snapshot(masked) == before
    small = plan.remove(copy.deepcopy(masked))
    with torch.no_grad(): assert error(masked(image(3, *shape)), small(image(3, *shape))) < 1e-10
    save_pruned(small, tmp_path/'small.safetensors')
    again = load_pruned(make().double().eval(), tmp_path/'small.safetensors')
    with torch.no_grad(): assert torch.equal(again(image(3, *shape)), small(image(3, *shape)))
    with pytest.raises(ValueError, match='4.running_mean'):
        small[4] = nn.Identity()
        plan.cuts = {}
        plan.remove(small)

def test_single_precision_and_frozen():
    make, dead, _, shape, _ = FOLDED['depthwise']
    model = kill(make(), dead).float().requires_grad_(False)
    with torch.no_grad(): want = model(image(2, *shape).float())
    plan = shrink(model, image(2, *shape).float())
    assert plan.change < 1e-10 and all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())
    assert torch.allclose(model(image(2, *shape).float()), want, atol=1e-5) and not any(p.requires_grad for p in model.parameters())


# --- errors leave everything as it was

def optimizer_of(model, kind):
    opt = kind(model.parameters(), **(dict(lr=.01, momentum=.9) if kind is torch.optim.SGD else dict(lr=.01)))
    model(image(4, *X)).square().mean().backward()
    opt.step()
    with torch.no_grad(): # what a mask does
        for p, m in [(model[0].weight, opt.state[model[0].weight])]:
            for t in (p, *(v for v in m.values() if v.ndim)): t[[1, 4]] = 0
    return opt

@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adam])
def test_a_failed_proof_and_a_wrong_optimizer(monkeypatch, kind):
    make, dead, _, shape, _ = FOLDED['no padding']
    model = kill(make(), dead)
    opt = optimizer_of(model, kind)
    state = {k: {n: v.clone() for n, v in s.items() if isinstance(v, torch.Tensor)} for k, s in opt.state.items()}
    before = snapshot(model)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=.1)
    with pytest.raises(ValueError, match='another model'): shrink(model, image(2, *shape), other)
    assert snapshot(model) == before
    right = constants._Constants.holder
    monkeypatch.setattr(constants._Constants, 'holder', lambda *a: (right(*a)[0], -right(*a)[1]))
    with pytest.raises(ValueError, match='fold=False'): shrink(model, image(2, *shape), opt)
    assert snapshot(model) == before and all(torch.equal(opt.state[k][n], v) for k, s in state.items() for n, v in s.items())
    shrink(model, image(2, *shape), opt, fold=False)
    assert model[0].out_channels == 6

@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize('name', ['no padding', 'bias before batchnorm'])
def test_the_optimizer_goes_on(kind, name): # as if the dead units had not been there
    make, dead, (into,), shape, _ = FOLDED[name]
    model = kill(make(), {'0': [1, 4]})
    opt = optimizer_of(model, kind)
    model.zero_grad()
    params, groups = list(model.parameters()), [list(map(id, g['params'])) for g in opt.param_groups]
    masked = copy.deepcopy(model)
    plan = shrink(model, image(2, *shape), opt)
    assert {t for _, t in plan.folded.values()} == {into} and all(p is q for p, q in zip(params, model.parameters())) and groups == [list(map(id, g['params'])) for g in opt.param_groups]
    assert all(v.shape == p.shape for p, s in opt.state.items() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim)
    grads = []
    for m in (masked, model):
        m(image(4, *shape, seed=3)).square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    for n, g in grads[1].items(): # gradients of what is left are those of the masked model
        want = grads[0][n]
        for (k, axis), gone in plan.removed.items():
            if k == n: want = want.index_select(axis, torch.tensor([i for i in range(want.shape[axis]) if i not in gone]))
        assert torch.allclose(want, g, atol=1e-12)
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('opt_func', [SGD, Adam])
def test_learn_shrink(opt_func, tmp_path):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (24,), generator=g)
    items = list(zip(torch.randn(24, 1, 6, 6, generator=g) + y.view(-1, 1, 1, 1), y))
    net = chain(conv(1, 6, 3), bn(6), nn.ReLU(), conv(6, 8), bn(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = Learner(DataLoaders.from_dsets(items, items, bs=8, device='cpu'), net, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2, cbs=SparsifyCallback(50, 'filter', 'local', 'large_final', agp, layer_type=nn.Conv2d))
        x = torch.randn(7, 1, 6, 6)
        with torch.no_grad(): want = net.eval()(x)
        plan = learn.shrink()
        assert plan.folded and not plan.dropped and (net[0].out_channels, net[3].out_channels) == (3, 4)
        with torch.no_grad(): assert torch.allclose(net.eval()(x), want, atol=1e-5)
        before = [p.detach().clone() for p in net.parameters()]
        learn.fit(1, 1e-2)
    assert not any(torch.equal(p, q) for p, q in zip(before, net.parameters()) if p.ndim > 1)
    assert 'no dead' in str(pytest.raises(ValueError, learn.shrink, fold=False).value)

def test_one_source_of_what_is_asked(): assert PruneCallback.current is SparsifyCallback.current


# --- random architectures

def any_units(model, x, share, seed): # dead ones
    g, graph = np.random.default_rng(seed), Pruner(model, x).graph
    now, n = graph.tensors(), 0
    for group in graph.groups:
        dead = np.flatnonzero(g.random(len(group.roots)) < share)[:len(group.roots) - 1]
        for name, axis, idx in _producers(graph, group):
            with torch.no_grad(): now[name].movedim(axis, 0)[torch.from_numpy(idx[dead].ravel())] = 0
        n += len(dead)
    return n

def check(model, x, share, seed):
    model = zoo.randomise(model, 1).double().eval()
    if not any_units(model, x, share, seed): return
    masked = copy.deepcopy(model)
    try: plan = shrink(model, x)
    except ValueError as e: assert 'no dead unit' in str(e); return
    want, got = [[m(batch(x, n, n)).detach() for n in (2, 3)] for m in (masked, model)]
    errors = list(map(error, want, got))
    assert plan.dropped or max(errors) < 1e-10, errors
    assert not plan.dropped or plan.change > 1e-14

@some
@given(nd=st.sampled_from([1, 2, 2]), c=st.sampled_from([4, 6]), makers=st.lists(st.one_of([p for i, p in enumerate(pictures) if i != 12]), min_size=1, max_size=2), flatten=st.booleans(), norm=st.booleans(), share=st.floats(.1, .6), seed=st.integers(0, 99))
def test_random_pictures(nd, c, makers, flatten, norm, share, seed):
    check(zoo.Picture(nd, c, makers, flatten, 0, norm), torch.randn(2, 3, *[4]*nd, dtype=torch.float64), share, seed)

@settings(some, max_examples=15)
@given(c=st.sampled_from([4, 6]), makers=st.lists(st.one_of(sequences), min_size=1, max_size=2), norm=st.sampled_from(['layer', 'rms', 'none']), position=st.sampled_from(['parameter', 'none']), share=st.floats(.1, .6), seed=st.integers(0, 99))
def test_random_sequences(c, makers, norm, position, share, seed):
    check(zoo.Sequence(c, makers, norm, position), torch.randint(0, 11, (2, 6)), share, seed)
