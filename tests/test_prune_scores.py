"""Which units go: every decision of a `Pruner` beside an oracle in numpy."""
import math

import numpy as np
import pytest
import torch
from test_prune_bad_input import X, net, randomised, residual
from torch import nn

from fasterai_lib.prune.pruner import Pruner

def even(): return randomised(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6))) # all units of one size

NETS = { # the matrix slices of a unit, by hand: (parameter, axis)
    'net': (net, X, {'conv1': [('conv1.weight', 0), ('conv2.weight', 1)], 'conv2': [('conv2.weight', 0), ('fc.weight', 1)]}),
    'residual': (residual, X, {'stem': [('stem.weight', 0), ('a.weight', 1), ('b.weight', 0), ('fc.weight', 1)], 'a': [('a.weight', 0), ('b.weight', 1)]}),
    'even': (even, torch.randn(2, 6), {'0': [('0.weight', 0), ('2.weight', 1)], '2': [('2.weight', 0), ('4.weight', 1)]})}
FORMULAS = dict(
    large_final=lambda w, r: abs(w), squared_final=lambda w, r: w*w, small_final=lambda w, r: -abs(w), large_init=lambda w, r: abs(r), small_init=lambda w, r: -abs(r),
    large_init_large_final=lambda w, r: np.minimum(abs(w), abs(r)), small_init_small_final=lambda w, r: -np.maximum(abs(w), abs(r)), magnitude_increase=lambda w, r: abs(w) - abs(r),
    movement=lambda w, r: abs(w - r), movmag=lambda w, r: abs(w*(w - r)), updating_magnitude_increase=lambda w, r: abs(w) - abs(r), updating_movement=lambda w, r: abs(w - r),
    updating_movmag=lambda w, r: abs(w*(w - r)))
half_up = lambda x: math.floor(x + .5)
arrays = lambda model: {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}

class Oracle:
    "Knows the weights in full size; what is removed is only marked"
    def __init__(self, model, groups, criterion):
        self.groups, self.criterion, now = groups, criterion, arrays(model)
        self.alive = {g: np.ones(now[ms[0][0]].shape[ms[0][1]], bool) for g, ms in groups.items()}
        self.first = {g: len(a) for g, a in self.alive.items()}
        self.remember(now)
    def remember(self, now): self.refs = now
    def sliced(self, full, alive): # one tensor of each group after the other
        out = dict(full)
        for g, members in self.groups.items():
            for n, a in members: out[n] = np.compress(alive[g], out[n], a)
        return out
    def scores(self, now, g): # of those that are left: the mean of all weights of a unit
        parts = [np.moveaxis(FORMULAS[self.criterion](now[n], self.refs[n]), a, 0).reshape(int(self.alive[g].sum()), -1) for n, a in self.groups[g]]
        return np.concatenate(parts, 1).mean(1)
    def step(self, now, kept=None, total=None): # kept: units that stay of each group; total: of all together
        scores, before = {g: self.scores(now, g) for g in self.groups}, {g: int(a.sum()) for g, a in self.alive.items()}
        if total is not None:
            best = {g: s.argmax() for g, s in scores.items()} # each keeps one
            order = sorted((s, g, i) for g, ss in scores.items() for i, s in enumerate(ss) if i != best[g])[::-1][:total - len(best)]
            keep = {g: {int(best[g])} | {i for _, h, i in order if h == g} for g in scores}
        else: keep = {g: set(np.argsort(-s, kind='stable')[:kept[g]].tolist()) for g, s in scores.items()}
        local = {g: np.array([i in keep[g] for i in range(before[g])]) for g in scores}
        for g, k in local.items(): self.alive[g][np.flatnonzero(self.alive[g])[~k]] = False
        self.refs = self.sliced(self.refs, local)
        expected = self.sliced(now, local)
        if self.criterion.startswith('updating'): self.remember(expected)
        return expected

def shaken(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p += torch.randn(p.shape, generator=g)/5

def agree(model, expected, groups):
    now = arrays(model)
    for n in {n for ms in groups.values() for n, _ in ms}: assert now[n].shape == expected[n].shape and (now[n] == expected[n]).all(), n

@pytest.mark.parametrize('criterion', FORMULAS)
@pytest.mark.parametrize('name', NETS)
def test_gradual_removal_goes_by_the_criterion(name, criterion):
    make, x, groups = NETS[name]
    model = make()
    p, o = Pruner(model, x, criteria=criterion), Oracle(model, groups, criterion)
    assert {g.name: {(n, a) for n, a, _ in g.weights} for g in p.groups} == {g: set(ms) for g, ms in groups.items()}
    for i, s in enumerate([20, 45, 45, 70, 30]):
        shaken(model, i)
        for g in p.groups: np.testing.assert_allclose(p.scores(g).numpy(), o.scores(arrays(model), g.name), rtol=1e-5, atol=1e-7)
        expected = o.step(arrays(model), {g: min(int(o.alive[g].sum()), max(1, n - half_up(s*n/100))) for g, n in o.first.items()})
        p.plan(s)
        p.prune_model(s)
        agree(model, expected, groups)

@pytest.mark.parametrize('criterion', ['large_final', 'large_init', 'movement', 'updating_movement', 'updating_movmag', 'small_final'])
def test_global_goes_by_the_criterion(criterion):
    make, x, groups = NETS['even']
    model = make()
    p, o = Pruner(model, x, criteria=criterion, context='global'), Oracle(model, groups, criterion)
    for i, s in enumerate([20, 45, 80]):
        shaken(model, i)
        expected = o.step(arrays(model), total=20 - half_up(20*s/100))
        p.prune_model(s)
        left = {g.name: g.n for g in p.groups}
        if {g: int(a.sum()) for g, a in o.alive.items()} == left: agree(model, expected, groups)
        else: pytest.fail(f'{left}, the oracle {({g: int(a.sum()) for g, a in o.alive.items()})}')

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('r', [2, 3, 4, 8])
@pytest.mark.parametrize('s', [10, 50, 60, 90])
def test_round_to(name, r, s, context):
    make, x, groups = NETS[name]
    model = make()
    o, now = Oracle(model, groups, 'large_final'), arrays(model)
    p = Pruner(model, x, context=context, round_to=r)
    p.prune_model(s)
    left = {g.name: g.n for g in p.groups}
    for g, n in o.first.items():
        want = n - half_up(s*n/100)
        if n < r: assert left[g] == n
        elif context == 'local': assert left[g] == (n if want == n else min(max(half_up(want/r), 1), n//r)*r)
        else: assert left[g] % r == 0 or left[g] == n
    agree(model, o.step(now, left), groups) # the best of each

@pytest.mark.parametrize('kw, s, left', [
    (dict(min_kept=5), 80, dict(conv1=5, conv2=5)), (dict(min_kept=7), 80, dict(conv1=7, conv2=6)), (dict(max_sparsity=50), 80, dict(conv1=4, conv2=3)), (dict(max_sparsity=0), 80, dict(conv1=8, conv2=6)),
    (dict(max_sparsity=30), 20, dict(conv1=6, conv2=5)), (dict(min_kept=3, round_to=2), 99, dict(conv1=4, conv2=4)), ({}, 99.9, dict(conv1=1, conv2=1)), ({}, 0, dict(conv1=8, conv2=6)),
    ({}, [50, 0], dict(conv1=4, conv2=6)), ({}, (0, 34), dict(conv1=8, conv2=4)), ({}, {'conv1': 75}, dict(conv1=2, conv2=6)), ({}, {'conv?': 50}, dict(conv1=4, conv2=3)),
    ({}, {'*1': 25, '*2': 50}, dict(conv1=6, conv2=3)), (dict(ignored='conv2'), 50, dict(conv1=4)), (dict(ignored=('fc', 'conv1')), [50], dict(conv2=3))])
def test_limits_lists_and_dicts(kw, s, left):
    model = net()
    groups = {g: NETS['net'][2][g] for g in left}
    o, now, p = Oracle(model, groups, 'large_final'), arrays(model), Pruner(model, X, **kw)
    p.prune_model(s)
    assert {g.name: g.n for g in p.groups} == left
    agree(model, o.step(now, left), groups)

def test_limits_in_steps_are_of_what_there_was_at_first():
    model = net()
    p = Pruner(model, X, max_sparsity=50)
    for s, left in ((25, (6, 4)), (40, (5, 4)), (90, (4, 3)), (90, (4, 3))):
        p.prune_model(s)
        assert (model.conv1.out_channels, model.conv2.out_channels) == left

def test_random_is_the_same_with_the_same_seed():
    kept = []
    for seed in (0, 0, 2, 3, 4, 5):
        model = net()
        p = Pruner(model, X, criteria='random')
        torch.manual_seed(seed)
        p.prune_model(50)
        kept.append(model.conv1.weight.detach())
    assert torch.equal(kept[0], kept[1]) and not all(torch.equal(kept[0], k) for k in kept[2:])
