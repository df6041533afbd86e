"What each layer loses at least and at most, against brute force"
import itertools
import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from fasterai_lib.core.allocation import _simple
from fasterai_lib.core.cost import cost
from fasterai_lib.prune.compress import compress
from fasterai_lib.prune.prune_callback import PruneCallback
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.recipe.recipe import Recipe
from fasterai_lib.sparse.sparsifier import Sparsifier
from fasterai_lib.sparse.sparsify_callback import SparsifyCallback

SHARED = ['global', *[c for c in _simple() if c not in ('global', 'balanced')]]
half_up = lambda x: math.floor(x + .5)

def net(seed=0, sizes=((3, 4), (4, 3), (3, 2))):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(i, o, bias=False) for i, o in sizes])

def kept(masks): return {n.removesuffix('.weight'): int(m.keep.sum()) for n, m in masks.masks.items()}
def counted(model): return {n: int(m.weight.count_nonzero()) for n, m in model.named_children()}
def bounds(n, low, high): # in units kept, in exact fractions
    least = max(1, -(-n*(100 - high)//100))
    return least, max(n*(100 - low)//100, least)

percents = st.integers(0, 10).map(lambda x: 10*x)
@st.composite
def limits(draw): # of three layers; some by name, some by a glob, some not at all
    low = {k: draw(percents.filter(lambda x: x < 100)) for k in draw(st.sets(st.sampled_from(['0', '1', '2'])))}
    high = {k: draw(percents.filter(lambda x: x >= low.get(k, 0) and x > 0)) for k in draw(st.sets(st.sampled_from(['0', '1', '2'])))}
    return low, high

@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize('context', SHARED)
@given(limits(), percents.filter(lambda x: x < 100), st.integers(0, 5))
def test_every_layer_within_its_limits(context, given_limits, sparsity, seed):
    (low, high), model = given_limits, net(seed)
    n = {k: m.weight.numel() for k, m in model.named_children()}
    b = {k: bounds(n[k], low.get(k, 0), high.get(k, 100)) for k in n}
    asked, most = sum(n.values()) - half_up(sum(n.values())*sparsity/100), sum(hi for _, hi in b.values())
    s = Sparsifier(model, 'weight', context, 'large_final', nn.Linear, min_sparsity=low, max_sparsity=high)
    try: got = kept(s.plan(sparsity))
    except ValueError as e:
        assert 'min_sparsity' in str(e) and sum(n[k]*low.get(k, 0) for k in n) > sum(n.values())*sparsity or 'max_sparsity' in str(e) and sum(lo for lo, _ in b.values()) > asked, e
        return
    assert sum(got.values()) == max(asked, sum(lo for lo, _ in b.values())) or context == 'erk' and abs(sum(got.values()) - asked) <= 1 # exactly as many
    for k in n:
        assert b[k][0] <= got[k]
        assert got[k] <= b[k][1] or most < asked <= most + len(n) and got[k] <= b[k][1] + 1, (k, got, b) # minima that are rounded up may be a unit more than was asked

@settings(deadline=None, max_examples=40, derandomize=True)
@given(limits(), percents.filter(lambda x: x < 100), st.integers(0, 5))
def test_global_keeps_the_most_it_can(given_limits, sparsity, seed):
    (low, high), model = given_limits, net(seed)
    w = {k: np.sort(m.weight.detach().abs().double().numpy().ravel())[::-1] for k, m in model.named_children()}
    n = sum(map(len, w.values()))
    k = n - half_up(n*sparsity/100)
    each = [range(lo, hi + 1) for lo, hi in (bounds(len(x), low.get(l, 0), high.get(l, 100)) for l, x in w.items())]
    best = max((sum(x[:c].sum() for x, c in zip(w.values(), cs)) for cs in itertools.product(*each) if sum(cs) == k), default=None)
    if best is None or sum(len(w[l])*x for l, x in low.items()) > n*sparsity: return # refused
    masks = Sparsifier(model, 'weight', 'global', 'large_final', nn.Linear, min_sparsity=low, max_sparsity=high).sparsify_model(sparsity)
    assert sum(float(m.weight.detach().double().abs().sum()) for m in model) == pytest.approx(best, rel=1e-6)

@pytest.mark.parametrize('context', SHARED)
def test_a_schedule_starts_at_nothing_and_never_goes_back(context):
    model = net(3, ((10, 20), (20, 10), (10, 30)))
    s = Sparsifier(model, 'weight', context, 'large_final', nn.Linear, min_sparsity={'1': 60, '2': 30}, max_sparsity={'2': 50, '0': 70})
    top, was = {'1': 80, '2': 210}, None
    s.check(s.targets(50))
    for sparsity in np.linspace(0, 50, 26):
        masks = s.adopt(s.decide(s.targets(float(sparsity))))
        now = kept(masks)
        assert sum(now.values()) == 700 - half_up(7*sparsity)
        assert now['0'] == 200 and now['1'] >= 80 and now['2'] >= 210 if 700 - half_up(7*sparsity) > 490 else now['1'] <= 80 and now['2'] <= 210
        if was: assert all(not (masks.masks[n].keep & ~m.keep).any() for n, m in was.masks.items()), sparsity
        was = masks
    assert now['2'] >= 150 and now['0'] >= 60

def test_filters_and_multiples():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 24, 3))
    for context in SHARED:
        s = Sparsifier(model, 'filter', context, 'large_final', min_sparsity={'1': 50, '0': 20}, max_sparsity=75)
        got = {k.removesuffix('.weight'): v for k, v in kept(s.plan(50, round_to=4)).items() if 'bias' not in k}
        assert all(v % 4 == 0 for v in got.values()) and got['1'] <= 16 and got['0'] <= 12 and got['0'] >= 4 and got['1'] >= 8 and got['2'] >= 8, (context, got)

def test_one_layer_per_number_in_local():
    model = net()
    s = Sparsifier(model, 'weight', 'local', 'large_final', nn.Linear, min_sparsity={'0': 50}, max_sparsity={'[12]': 60})
    with pytest.raises(ValueError, match="0: sparsity 40 is below min_sparsity=50"): s.plan(40)
    with pytest.raises(ValueError, match="1: sparsity 70 is above max_sparsity=60"): s.plan(70)
    with pytest.raises(ValueError, match="0: sparsity 20 is below min_sparsity=50"): s.sparsify_layer('0', 20)
    assert kept(s.plan({'0': 75, '*': 25})) == {'0': 3, '1': 9, '2': 4}
    assert kept(s.plan(50)) == {'0': 6, '1': 6, '2': 3}

@pytest.mark.parametrize('how, message', [
    (dict(min_sparsity={'3': 10}), r"min_sparsity: no layer matches '3'"),
    (dict(max_sparsity={'nope*': 10}), r"max_sparsity: no layer matches 'nope\*'"),
    (dict(min_sparsity={'0': 110}), r"min_sparsity of '0' must be between 0 and 100"),
    (dict(min_sparsity=60, max_sparsity={'1': 50}), r"1: min_sparsity=60 is above max_sparsity=50"),
    (dict(min_sparsity=60), r"50 % of the weights are fewer than min_sparsity asks for: 60.00 % of them, in 3 layers"),
    (dict(min_sparsity={'2': 70}, min_kept=4), r"2: min_sparsity=70 leaves at most 1.8 of 6 units, but min_kept, max_sparsity and round_to keep 4"),
    (dict(min_sparsity={'1': 100}), r"1: min_sparsity=100 leaves at most 0 of 12 units"),
])
def test_what_cannot_be_is_refused(how, message):
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message): Sparsifier(model, 'weight', 'global', 'large_final', nn.Linear, **how).sparsify_model(50)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(TypeError, match='min_sparsity must be a percentage'): Sparsifier(model, 'weight', 'global', 'large_final', nn.Linear, min_sparsity='half')

# --- while training

def learner(model, x):
    y = torch.randint(0, 5, (len(x),))
    return Learner(DataLoaders(DataLoader(TensorDataset(x, y), 8), DataLoader(TensorDataset(x, y), 8)), model, loss_func=nn.functional.cross_entropy, lr=1e-3)

@pytest.mark.parametrize('context', ['global', 'uniform', 'lamp'])
def test_sparsify_callback(context):
    model, seen = net(0, ((10, 20), (20, 10), (10, 5))), []
    class Look(Callback):
        order = 100
        def after_batch(self):
            if self.training: seen.append(tuple(counted(self.model).values()))
    learn = learner(model, torch.randn(64, 10))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[SparsifyCallback(60, 'weight', context, 'large_final', 'agp', layer_type=nn.Linear, min_sparsity={'2': 80}, max_sparsity={'0': 65, '1': 70}), Look()])
    assert (np.diff(np.array(seen), axis=0) <= 0).all() and len(set(seen)) > 3 # nothing comes back
    a, b, c = seen[-1]
    assert a + b + c == 180 and c <= 10 and a >= 70 and b >= 60
    with pytest.raises(ValueError, match='fewer than min_sparsity asks for'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=SparsifyCallback(5, 'weight', context, 'large_final', 'agp', layer_type=nn.Linear, min_sparsity={'2': 80}))

@pytest.mark.parametrize('context', ['global', 'uniform', 'local'])
def test_prune_callback(context):
    model = cnn()
    learn = learner(model.train(), torch.randn(64, 3, 12, 12))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=PruneCallback(50, context, 'large_final', 'agp', min_sparsity={'2': 50}, max_sparsity={'4': 25}))
    w = widths(model)
    assert w['2'] <= 12 and w['4'] >= 9 and w['0'] < 16, w

# --- units that really go

def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()
X = torch.randn(2, 3, 12, 12)
def widths(m): return {n: c.weight.shape[0] for n, c in m.named_children() if isinstance(c, nn.Conv2d)}

@pytest.mark.parametrize('context', SHARED)
def test_pruner(context):
    model = cnn()
    p = Pruner(model, X, context=context, min_sparsity={'2': 50, '0': 10}, max_sparsity={'4': 25, '0': 60})
    for s in (20, 50): # and on from there
        if s == 20:
            with pytest.raises(ValueError, match='fewer than min_sparsity asks for'): p.plan(s)
        else: p.prune_model(s)
    w = widths(model)
    assert w['2'] <= 12 and 7 <= w['0'] <= 14 and w['4'] >= 9, w

def test_pruner_in_local():
    with pytest.raises(ValueError, match='2: sparsity 40 is below min_sparsity=50'): Pruner(cnn(), X, min_sparsity={'2': 50}).plan(40)
    with pytest.raises(ValueError, match="min_sparsity: no layer matches '7x'"): Pruner(cnn(), X, min_sparsity={'7x': 50})
    m = cnn(); Pruner(m, X, min_sparsity={'2': 50}, max_sparsity={'4': 25}).prune_model(50)
    assert widths(m) == {'0': 8, '2': 12, '4': 9}

def test_coupled_layers_obey_the_strictest():
    class Res(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
        def forward(self, x): x = self.a(x); return self.c((x + self.b(x)).mean((2, 3)))
    with pytest.raises(ValueError, match='lose the same units, but min_sparsity=60 of one is above max_sparsity=50 of another'): Pruner(Res(), X, min_sparsity={'a': 60}, max_sparsity={'b': 50})
    m = Res(); Pruner(m, X, max_sparsity={'b': 25, 'a': 50}).prune_model(50)
    assert m.a.out_channels == 6

# --- allocators that try out: with an objective only

DATA = [(torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,)))]
@pytest.mark.parametrize('context', ['netadapt', 'simulated_annealing', 'sensitivity'])
def test_allocators_that_try_out_take_objectives(context):
    model = cnn()
    before = cost(model, X, latency=False, disk=False).total['macs']
    p = Pruner(model, X, context=context, data=DATA, loss=nn.functional.cross_entropy)
    for f in (p.plan, p.prune_model):
        with pytest.raises(ValueError, match=f'{context}.* tries candidates out .*not with a sparsity; for that: local, global'): f(50)
    assert widths(model) == {'0': 16, '2': 24, '4': 12}
    p.prune_model('50% macs')
    after = cost(model, X, latency=False, disk=False).total['macs']
    assert .45 <= after/before <= .5 and model(X).shape == (2, 5)
    with pytest.raises(ValueError, match='a Pruner with data= and loss='): Pruner(cnn(), X, context=context).prune_model('50% macs')
    with pytest.raises(ValueError, match='not with a sparsity'): PruneCallback(50, context, 'large_final', 'agp')

@pytest.mark.parametrize('remove', [True, False])
def test_compress_tries_out(remove):
    learn = learner(cnn().train(), torch.randn(32, 3, 12, 12))
    with learn.no_bar(), learn.no_logging(): done = compress(learn, '50% macs' if remove else '50% nonzero', context='netadapt', steps=1, fine_tune=0, remove=remove, n_batches=1)
    assert done.reached

# --- with an objective

@pytest.mark.parametrize('context', ['global', 'local', 'knapsack', 'netadapt'])
def test_limits_hold_with_an_objective(context):
    limits = dict(min_sparsity={'2': 50, '0': 10}, max_sparsity={'4': 25, '0': 60})
    model = cnn()
    dense = cost(model, X, latency=False, disk=False).total['macs']
    p = Pruner(model, X, context=context, data=DATA, loss=nn.functional.cross_entropy, **limits)
    p.prune_model('40% macs')
    w = widths(model)
    assert w['2'] <= 12 and 7 <= w['0'] <= 14 and w['4'] >= 9 and cost(model, X, latency=False, disk=False).total['macs'] <= .4*dense, w
    with pytest.raises(ValueError, match='the nearest that is possible.*max_sparsity=.*25'): p.plan('5% macs')
    m = cnn(); Pruner(m, X, context=context, data=DATA, loss=nn.functional.cross_entropy, min_sparsity={'2': 50}).prune_model('90% macs') # the minimum is more than what is asked
    assert widths(m)['2'] <= 12

@pytest.mark.parametrize('remove', [True, False])
def test_limits_in_compress_and_recipes(remove):
    aim, how = '45% macs' if remove else '40% nonzero', dict(min_sparsity={'2': 70}, max_sparsity={'0': 40})
    learn = learner(cnn().train(), torch.randn(32, 3, 12, 12))
    with learn.no_bar(), learn.no_logging(): done = compress(learn, aim, steps=2, fine_tune=0, remove=remove, **how)
    other = cnn()
    Recipe.from_dict({'objective': aim, 'remove': remove, 'default': {'context': 'global', **how}}).apply(other, X)
    for m in (learn.model, other):
        share = {n: m[int(n)].weight.shape[0]/k if remove else float((m[int(n)].weight != 0).double().mean()) for n, k in (('0', 16), ('2', 24))}
        assert share['2'] <= .3 + 1e-6 + .05*remove and share['0'] >= .6, share
    assert done.reached

def test_recipe_with_limits_is_what_sparsifiers_do():
    a, b = cnn(), cnn()
    Recipe.from_dict({'layers': [{'match': {'type': 'Conv2d'}, 'sparsity': 60, 'context': 'global', 'min_sparsity': {'0': 50}, 'max_sparsity': 70}]}).apply(a)
    Sparsifier(b, 'weight', 'global', 'large_final', min_sparsity={'0': 50}, max_sparsity=70).sparsify_model(60)
    assert all(map(torch.equal, a.parameters(), b.parameters())) and .5 <= float((a[0].weight == 0).double().mean()) <= .7
