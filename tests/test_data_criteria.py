"""Criteria that look at data, or at more than one weight: every registered one that tests/test_properties.py leaves out, beside loops in float64."""
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import oracle
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import test_properties
from test_properties import CONTEXTS, allowed, full, oracle_units, per_unit, rng_state, snapshot, weights
from fasterai_lib.core.collect import collect, collectors
from fasterai_lib.core.criteria import Criteria, criteria as registered
from fasterai_lib.core.granularity import Granularities
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsifier import Sparsifier

OTHERS = {n: c for n, c in registered.items() if n not in test_properties.criteria and c.needs != 'attribution'} # tests/test_attribution.py has those
DATA = [n for n, c in OTHERS.items() if c.needs_data]


# --- oracles: from weight w and statistic s to a score, how the weights of a unit become one, what units of a layer then become

def lamp(scores): return np.array([a/sum(b for b in scores if b >= a) if a > 0 else a for a in scores])
def distances(rows): return np.array([sum(math.sqrt(sum((a - b)**2 for a, b in zip(r, q))) for q in rows) for r in rows])
def same(x): return x

STATISTIC, WEIGHT = (lambda w, s: s), (lambda w, s: np.abs(w))
ORACLES = dict(
    l1=(WEIGHT, 'sum', same), l2=(WEIGHT, 'l2', same), layer_magnitude=(WEIGHT, 'mean', lambda s: s/np.mean(s)), lamp=(lambda w, s: w*w, 'sum', lamp), fpgm=(lambda w, s: w, distances, same),
    gradient=(lambda w, s: np.abs(s), 'mean', same), taylor=(lambda w, s: np.abs(w*s), 'mean', same), taylor_signed=(lambda w, s: -w*s, 'sum', same),
    sensitivity=(STATISTIC, 'mean', same), fisher=(STATISTIC, 'mean', same), obd=(lambda w, s: .5*w**2*s, 'sum', same), movement_grad=(STATISTIC, 'mean', same),
    snip=(lambda w, s: np.abs(w*s), 'sum', same), grasp=(lambda w, s: w*s, 'sum', same), synflow=(lambda w, s: np.abs(w*s), 'sum', same),
    apoz=(STATISTIC, 'mean', same), mean_activation=(STATISTIC, 'mean', same), hrank=(STATISTIC, 'mean', same), wanda=(lambda w, s: np.abs(w)*np.sqrt(s), 'mean', same),
    bn_scale=(lambda w, s: np.abs(s), 'mean', same))

def unit_scores(name, groups): # groups: a list of [units, weights] whose rows belong together
    score, join, norm = ORACLES[name]
    rows = np.concatenate(groups, 1)
    return norm(join(rows) if callable(join) else dict(mean=rows.mean(1), sum=rows.sum(1), l2=np.sqrt((rows**2).sum(1)))[join])

def test_every_criterion_has_an_oracle():
    missing = sorted({*OTHERS} - {*ORACLES} | {n for n in DATA if n not in {*PER_SAMPLE, *PER_CHANNEL, 'grasp', 'synflow', 'bn_scale'}})
    assert not missing, f'registered without an oracle here: {missing}'


# --- nets, of which everything inside can be computed step by step

class Net(nn.Module): # a layer, its norm, a functional activation, and a head over the mean of all positions
    def __init__(self, layer, norm=True, width=None, last=False):
        super().__init__()
        self.layer, self.last = layer, last
        width = width or getattr(layer, 'out_channels', None) or layer.out_features
        self.norm, self.head = nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Linear(width, 3)
    def steps(self, x):
        z = self.layer(x)
        z = F.relu(self.norm(z.flatten(2)).reshape(z.shape) if z.ndim > 2 and not self.last else self.norm(z))
        pooled = z.mean(1) if self.last and z.ndim > 2 else z.flatten(2).mean(2) if z.ndim > 2 else z
        return z, pooled, self.head(pooled)
    def forward(self, x): return self.steps(x)[-1]

class NormNet(Net): # the norm directly follows the layer
    def __init__(self, layer, norm=nn.BatchNorm2d):
        super().__init__(layer)
        self.norm = norm(self.norm.num_features)
    def steps(self, x):
        z = F.relu(self.norm(self.layer(x)))
        pooled = z.flatten(2).mean(2) if z.ndim > 2 else z
        return z, pooled, self.head(pooled)

LAYERS = {
    'Linear': (lambda: NormNet(nn.Linear(5, 4), nn.BatchNorm1d), (5,)),
    'Linear with positions': (lambda: Net(nn.Linear(5, 4), False, last=True), (3, 5)),
    'Conv2d': (lambda: NormNet(nn.Conv2d(4, 6, 3, padding=1)), (4, 5, 4)),
    'Conv2d grouped': (lambda: NormNet(nn.Conv2d(4, 6, (3, 2), groups=2)), (4, 5, 4)),
    'Conv2d depthwise': (lambda: NormNet(nn.Conv2d(4, 8, 3, groups=4, bias=False)), (4, 5, 4)),
    'Conv1d': (lambda: NormNet(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d), (4, 7)),
    'Conv3d': (lambda: NormNet(nn.Conv3d(2, 4, (2, 1, 2)), nn.BatchNorm3d), (2, 3, 4, 3)),
    'ConvTranspose2d': (lambda: NormNet(nn.ConvTranspose2d(4, 6, 2, stride=2)), (4, 3, 2)),
    'ConvTranspose2d grouped': (lambda: NormNet(nn.ConvTranspose2d(4, 6, 2, groups=2)), (4, 3, 3))}
N = 7

def made(case, seed=0):
    torch.manual_seed(seed)
    make, shape = LAYERS[case]
    return noisy(make()), torch.randn(N, *shape) + .2, torch.randint(0, 3, (N,))

def noisy(net): # statistics and biases that matter
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t, at in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0), (m.running_var, 1)): t.copy_(at + .4*torch.rand_like(t) - .1)
    return net

def params(net, only=('',)): return {n: p for n, p in net.named_parameters() if n.endswith('weight') and p.ndim > 1 and n.startswith(tuple(only))}
def judged(name): return ('layer',) if name == 'bn_scale' else ('',) # nothing normalises what the head gives
def arrays(d): return {n: t.detach().double().numpy() for n, t in d.items()}

def per_sample(net, x, y): # gradients, one sample at a time, in float64
    net = copy.deepcopy(net).double().eval().requires_grad_(True)
    ps = params(net)
    gs = [torch.autograd.grad(F.cross_entropy(net(x[i:i+1].double()), y[i:i+1]), list(ps.values())) for i in range(len(x))]
    return {n: np.stack([g[k].numpy() for g in gs]) for k, n in enumerate(ps)}

PER_SAMPLE = dict(gradient=lambda w, g: g.mean(0), taylor=lambda w, g: g.mean(0), taylor_signed=lambda w, g: g.mean(0), snip=lambda w, g: g.mean(0), movement_grad=lambda w, g: -w*g.mean(0),
                  sensitivity=lambda w, g: np.abs(g).mean(0), fisher=lambda w, g: (g*g).mean(0), obd=lambda w, g: (g*g).mean(0))

def curvature(net, x, y, only=('',)): # the gradient's change along the gradient, by a finite difference in float64; over the weights that are judged
    net = copy.deepcopy(net).double().eval()
    ps = params(net, only)
    def gradient(): return torch.autograd.grad(F.cross_entropy(net(x.double()), y), list(ps.values()))
    g, at, ends = gradient(), [p.detach().clone() for p in ps.values()], []
    for e in (1e-6, -1e-6):
        with torch.no_grad():
            for p, w, d in zip(ps.values(), at, g): p.copy_(w + e*d)
        ends.append(gradient())
    return {n: ((a - b)/2e-6).numpy() for n, a, b in zip(ps, *ends)}

def flow(net, x): # of the signal of ones through absolute weights, nothing added on the way
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for n, p in net.named_parameters(): p.abs_().mul_(not n.endswith('bias'))
        for n, b in net.named_buffers(): b.mul_(not n.endswith('mean'))
    net.zero_grad()
    net(torch.ones_like(x[:1], dtype=torch.float64)).sum().backward()
    return {n: p.grad.numpy() for n, p in params(net).items()}

PER_CHANNEL = dict( # side of the layer, and the mean over samples and positions of one channel's values v [samples, positions or height, width]
    wanda=('in', lambda v: (v**2).mean()), apoz=('out', lambda v: np.count_nonzero(v > 0)/v.size), mean_activation=('out', lambda v: np.abs(v).mean()),
    hrank=('out', lambda v: np.mean([np.linalg.matrix_rank(m) for m in v])))

def channel(layer, side, shape, at): # the channel that one weight multiplies, or adds to, by hand
    groups = getattr(layer, 'groups', 1)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    own, shared = (at[1], shape[1]), (at[0], shape[0]//groups) # of the axis that each group has for itself, of the axis that all groups share
    group = at[0]//shared[1]
    if side == ('in' if transposed else 'out'): return at[0]
    return group*own[1] + own[0]

def per_channel(net, name, x):
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad(): z, pooled, out = net.steps(x.double())
    side, f = PER_CHANNEL[name]
    result = {}
    for n, m, v in (('layer', net.layer, x.double() if side == 'in' else z), ('head', net.head, pooled if side == 'in' else out)):
        v = v.movedim(-1, 1) if isinstance(m, nn.Linear) and v.ndim == 3 else v # channels second
        v = (v.reshape(*v.shape[:3], -1) if v.ndim > 3 else v.reshape(*v.shape, *[1]*(4 - v.ndim))).numpy() # [samples, channels, height, width]
        stats, shape = [f(v[:, c]) for c in range(v.shape[1])], tuple(m.weight.shape)
        result[f'{n}.weight'] = np.array([stats[channel(m, side, shape, at)] for at in np.ndindex(*shape)]).reshape(shape)
    return result

def statistic(name, net, x, y):
    w = arrays(params(net))
    if name in PER_SAMPLE: return {n: PER_SAMPLE[name](w[n], g) for n, g in per_sample(net, x, y).items()}
    if name == 'grasp': return curvature(net, x, y)
    if name == 'synflow': return flow(net, x)
    if name == 'bn_scale':
        scale, shape = net.norm.weight.detach().double().numpy(), tuple(net.layer.weight.shape)
        return {'layer.weight': np.array([scale[channel(net.layer, 'out', shape, at)] for at in np.ndindex(*shape)]).reshape(shape)}
    return per_channel(net, name, x)

def scores(name, net, x, y):
    s = statistic(name, net, x, y)
    return {n: ORACLES[name][0](w, s[n]) for n, w in arrays(params(net)).items() if n in s}

def gather(name, net, data, only=None, **kw): return collect(registered[name], net, params(net, judged(name) if only is None else only), data, F.cross_entropy, **kw)
def near(got, want, tol=1e-4): assert (d := np.abs(np.asarray(got, np.float64) - want).max()) <= tol*(np.abs(want).max() + 1e-9), f'off by {d} of {np.abs(want).max()}'

@pytest.mark.parametrize('case', LAYERS, ids=lambda x: x.replace(' ', '-'))
@pytest.mark.parametrize('name', DATA)
def test_scores_of_single_weights(name, case):
    if name == 'bn_scale' and case == 'Linear with positions': return # has no norm
    net, x, y = made(case)
    want, w, refs = scores(name, net, x, y), params(net), gather(name, net, (x, y))
    assert set(refs) == set(want)
    for n, s in want.items():
        assert refs[n].shape == w[n].shape
        near(registered[name].elementwise(w[n].detach(), refs[n]), s)

def attention(cross): # what the input projections and the output projection are fed, in numpy
    torch.manual_seed(1)
    m = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    class Attend(nn.Module):
        def __init__(self): super().__init__(); self.a = m
        def forward(self, q, k): return self.a(q, k, k, need_weights=False)[0]
    q, k = torch.randn(4, 3, 6), torch.randn(4, 5, 6)
    return Attend(), q, k if cross else q

@pytest.mark.parametrize('cross', [False, True], ids=['self', 'cross'])
def test_wanda_of_attention(cross):
    net, q, k = attention(cross)
    m, (a, b) = net.a, (t.double().numpy() for t in (q, k))
    w, bias = m.in_proj_weight.detach().double().numpy(), m.in_proj_bias.detach().double().numpy()
    def heads(t): return t.reshape(4, -1, 2, 3).transpose(0, 2, 1, 3)
    qs, ks, vs = (heads(t@w[i:i+6].T + bias[i:i+6]) for t, i in ((a, 0), (b, 6), (b, 12)))
    e = np.exp(qs@ks.transpose(0, 1, 3, 2)/np.sqrt(3))
    inner = (e/e.sum(-1, keepdims=True)@vs).transpose(0, 2, 1, 3).reshape(-1, 6)
    ps = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    refs = collect(registered['wanda'], net, ps, [(q, k, torch.zeros(4))])
    near(refs['a.out_proj.weight'], np.broadcast_to((inner**2).mean(0), (6, 6)))
    sides = [(t.reshape(-1, 6)**2).mean(0) for t in (a, b, b)]
    near(refs['a.in_proj_weight'], np.repeat(np.stack(sides), 6, 0))


# --- decisions, statistics given

def two(kind, seed=0):
    rng = np.random.default_rng(seed)
    net = nn.ModuleDict(dict(a=nn.Conv2d(8, 6, (3, 2)), b=nn.Conv2d(4, 5, 1)) if kind == 'Conv2d' else dict(a=nn.Linear(12, 7), b=nn.Linear(8, 5, bias=False)))
    return net, rng

def given(name, net, rng): # numbers whose sums float32 holds exactly, in the shape of a statistic; where layers are normalised, numbers that do not tie
    exact = name not in ('l2', 'lamp', 'layer_magnitude', 'fpgm')
    def draw(shape): return torch.from_numpy(rng.integers(-8, 9, shape)/4. if exact else rng.normal(size=shape)).float()
    refs, needs = {}, registered[name].needs
    for n, m in net.items():
        with torch.no_grad():
            for p in m.parameters(): p.copy_(draw(tuple(p.shape)))
        w = m.weight
        side = dict(inputs=(1, w.shape[1]), outputs=(w.shape[0], 1), maps=(w.shape[0], 1), norm=(w.shape[0], 1)).get(needs)
        s = draw(tuple(w.shape)) if side is None else draw((*side, *[1]*(w.ndim - 2)))
        refs[f'{n}.weight'] = (s.square() if name == 'wanda' else s.abs() if name in ('sensitivity', 'fisher', 'obd', 'apoz', 'mean_activation', 'hrank') else s).expand_as(w)
    return refs

def rows_of(u, values): # [units, weights], of units of one size
    order = np.argsort(next(iter(u.ids.values())).ravel(), kind='stable')
    return values.ravel()[order].reshape(u.n, -1)

@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('kind,granularity', [(k, g) for k in ('Conv2d', 'Linear') for g in Granularities.available(getattr(nn, k))])
def test_decisions_are_those_of_the_oracle(kind, granularity, context):
    net, rng = two(kind)
    us = {n: oracle_units(m, granularity)[0] for n, m in net.items()}
    if not all(allowed([u], context) for u in us.values()): return
    asked = dict(a=50., b=30.) if context in ('local', 'per_row') else dict(a=50., b=50.)
    for name, c in OTHERS.items():
        refs = given(name, net, rng)
        s = Sparsifier(net, granularity, context, c, layer_type=getattr(nn, kind))
        s.refs, snap = refs, snapshot(net)
        masks = s.plan(list(asked.values()) if context in ('local', 'per_row') else 50)
        assert snapshot(net) == snap, name
        got = {n: per_unit(us[n], full(masks, n, m)) for n, m in net.items()}
        sc = {n: unit_scores(name, [rows_of(u, ORACLES[name][0](weights(net[n])['weight'], refs[f'{n}.weight'].double().numpy()))]) for n, u in us.items()}
        if context == 'per_row':
            for n, u in us.items(): assert (wrong := oracle.check_per_row(u, sc[n], asked[n], got[n])) is None, f'{name} {n}: {wrong}'
            continue
        if context == '2:4': want = {n: oracle.n_of_m(u, sc[n], 2, 4) for n, u in us.items()}
        elif context == 'local': want = {n: oracle.local([u], [sc[n]], asked[n])[0] for n, u in us.items()}
        else: want = {n: k[0] for n, k in zip(us, oracle.global_([([u], [sc[n]]) for n, u in us.items()], 50.))}
        for n in us: assert (got[n] == want[n]).all(), f'{name} {n}: {sc[n]}'


# --- what every criterion promises

def chain(seed=0):
    torch.manual_seed(seed)
    net = noisy(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(54, 4)))
    return net, torch.randn(N, 3, 5, 5), torch.randint(0, 4, (N,))

def parts(x, y, size): return list(zip(x.split(size), y.split(size)))
def convs(net): return {n: p for n, p in params(net).items() if p.ndim == 4}
def seen(name, net, data, loss=F.cross_entropy): return collect(registered[name], net, convs(net), data, loss)

@pytest.mark.parametrize('name', DATA)
def test_finite_deterministic_and_whatever_the_batches(name):
    net, x, y = chain()
    whole = seen(name, net, (x, y))
    assert all(torch.isfinite(s).all() and s.dtype in (torch.float32, torch.float64) for s in whole.values())
    torch.manual_seed(77)
    assert all(torch.equal(s, whole[n]) for n, s in seen(name, net, (x, y)).items())
    for data in (parts(x, y, 1), parts(x, y, 3), [(x[:5], y[:5]), (x[5:], y[5:])], DataLoader(TensorDataset(x, y), 2), DataLoader(TensorDataset(x, y), 2, shuffle=True)):
        for n, s in seen(name, net, data).items(): near(s, whole[n].double().numpy(), 1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', DATA)
def test_low_precision_is_summed_in_float32(name, dtype):
    net, x, y = chain()
    net, x = net.to(dtype), x.to(dtype)
    got, want = seen(name, net, parts(x, y, 3)), seen(name, copy.deepcopy(net).double(), (x.double(), y))
    for n, s in got.items():
        assert s.dtype in (torch.float32, torch.float64) and torch.isfinite(s).all()
        near(s, want[n].double().numpy(), .15 if name == 'grasp' else .06)
    if name in ('fisher', 'obd') and dtype == torch.float16: # squares of these gradients are zero in float16
        assert all((s > 0).float().mean() > .5 for s in seen(name, net, parts(x, y, 3), lambda out, y: F.cross_entropy(out.float(), y)/1000).values())

def whole_state(model): # everything, gradients and dicts of modules too
    return snapshot(model), [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()], [p.grad_fn for p in model.parameters()], rng_state()

def awkward(seed=0): # gradients that wait, a frozen layer, mixed modes, a hook
    net, x, y = chain(seed)
    F.cross_entropy(net(x), y).backward()
    net[3].weight.grad = None
    net[0].requires_grad_(False)
    net.train(); net[1].eval()
    net[2].register_forward_hook(lambda *a: None)
    return net, x, y

@pytest.mark.parametrize('name', DATA)
def test_the_model_is_as_before(name):
    net, x, y = awkward()
    loader = DataLoader(TensorDataset(x, y), 3, shuffle=True)
    state = whole_state(net)
    seen(name, net, loader)
    assert whole_state(net) == state
    s = Sparsifier(net, 'filter', 'local', name, frozen=True, data=loader, loss=F.cross_entropy)
    s.plan(50)
    assert whole_state(net) == state, 'planning'
    p = Pruner(net, x[:1], name, data=loader, loss=F.cross_entropy, ignored='8')
    p.plan(50)
    assert whole_state(net) == state, 'planning to remove'
    bad = lambda out, y: out.sum() if 1/0 else 0
    if name not in ('apoz', 'mean_activation', 'hrank', 'wanda', 'bn_scale', 'synflow'):
        with pytest.raises(ZeroDivisionError): seen(name, net, loader, bad)
        assert whole_state(net) == state, 'after an error'

def chain_statistic(name, net, x, y, only): # of `chain`, step by step in float64
    net = copy.deepcopy(net).double().eval()
    w = arrays(params(net))
    if name in PER_SAMPLE: return {n: PER_SAMPLE[name](w[n], g) for n, g in per_sample(net, x, y).items()}
    if name == 'grasp': return curvature(net, x, y, only)
    if name == 'synflow': return flow(net, x)
    with torch.no_grad(): a = net[:3](x.double()); b = net[3:6](a)
    out = {}
    for n, i, o, bn in (('0.weight', x.double(), a, net[1]), ('3.weight', a, b, net[4])):
        if name == 'bn_scale': v = bn.weight.detach().numpy()[:, None, None, None]
        else:
            side, f = PER_CHANNEL[name]
            t = (i if side == 'in' else o).numpy()
            v = np.array([f(t[:, c]) for c in range(t.shape[1])])
            v = v[None, :, None, None] if side == 'in' else v[:, None, None, None]
        out[n] = np.broadcast_to(v, w[n].shape)
    return out

@pytest.mark.parametrize('name', OTHERS)
def test_sparsifier_and_pruner_choose_as_the_oracle(name):
    def right(removed, score, k): # k of the lowest; where scores tie, any of them
        assert removed.sum() == k and score[removed].max() <= score[~removed].min() + 1e-4*np.abs(score).max(), (removed, score)
    def by_oracle(*only):
        w, stats = arrays(params(net)), chain_statistic(name, net, x, y, only) if name in DATA else {}
        return {n: ORACLES[name][0](w[n], stats.get(n)) for n in ('0.weight', '3.weight')}
    net, x, y = chain()
    kw = dict(data=parts(x, y, 3), loss=F.cross_entropy) if name in DATA else {}
    if registered[name].rounds == 1:
        masks = Sparsifier(net, 'filter', 'local', name, **kw).plan(50)
        for n, s in by_oracle('0', '3').items(): right(~masks[n].keep.flatten().numpy(), unit_scores(name, [s.reshape(len(s), -1)]), len(s)//2)
    s, before = by_oracle('0', '3', '8'), net[0].weight.detach().clone()
    sides = [s['0.weight'].reshape(8, -1)]
    if registered[name].needs not in ('outputs', 'maps', 'norm'): sides.append(s['3.weight'].swapaxes(0, 1).reshape(8, -1)) # what reads a unit is scored too, where it is told apart
    Pruner(net, x[:1], name, **kw).prune_model({'0': 50})
    right(np.array([not any(torch.equal(r, q) for q in net[0].weight) for r in before]), unit_scores(name, sides), 4)

class Talks(nn.Module): # as transformers' models: takes names, returns an object with its loss
    def __init__(self): super().__init__(); self.body = chain()[0]
    def forward(self, pixels, labels=None): return SimpleNamespace(logits=(z := self.body(pixels)), loss=None if labels is None else F.cross_entropy(z, labels))

@pytest.mark.parametrize('name', DATA)
def test_any_kind_of_data(name):
    from fastai.data.core import DataLoaders
    net, x, y = chain()
    want, few = seen(name, net, (x, y)), [(a, b) for a, b in zip(x, y)]
    for data in (DataLoaders.from_dsets(few, few, bs=3), DataLoaders.from_dsets(few, few, bs=3).train, DataLoader(few, 4), [[a, b] for a, b in parts(x, y, 4)], parts(x, y, 4)):
        for n, s in seen(name, net, data).items(): near(s, want[n].double().numpy(), 1e-5)
    talks = Talks()
    for data, loss in (([dict(pixels=a, labels=b) for a, b in parts(x, y, 3)], None), (dict(pixels=x, labels=y), lambda out, b: F.cross_entropy(out.logits, b['labels']))):
        got = collect(registered[name], talks, {f'body.{n}': p for n, p in convs(talks.body).items()}, data, loss)
        for n, s in got.items(): near(s, want[n.removeprefix('body.')].double().numpy(), 1e-5)
    loaders = DataLoaders.from_dsets(few, few, bs=3)
    state = rng_state()
    seen(name, net, loaders)
    assert rng_state() == state
    if registered[name].needs in ('inputs', 'outputs', 'maps', 'norm', 'signal'): near(seen(name, net, [x[:3], x[3:]], None)['0.weight'], want['0.weight'].double().numpy(), 1e-5) # no targets


# --- SynFlow

def narrow(): # deep and narrow, with one layer of small weights
    torch.manual_seed(3)
    widths = [20, 100, 100, 12, 12, 12, 12, 12, 100, 10]
    net = nn.Sequential(*itertools.chain.from_iterable((nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:])))[:-1]
    with torch.no_grad(): net[8].weight.mul_(.1)
    return net

def reference(net, x, asked, rounds=100): # Tanaka et al., 2020, algorithm 1
    net = copy.deepcopy(net).double()
    keep = {n: np.ones(w.shape, bool) for n, w in arrays(params(net)).items()}
    total = sum(k.size for k in keep.values())
    for k in range(1, rounds + 1):
        with torch.no_grad():
            for n, p in params(net).items(): p.mul_(torch.from_numpy(keep[n]))
        w, s = arrays(params(net)), flow(net, x)
        score = np.concatenate([np.where(keep[n], np.abs(w[n]*s[n]), -1).ravel() for n in keep])
        left = score.argsort(kind='stable')[round(total*(1 - (1 - asked/100)**(k/rounds))):]
        flat = np.zeros(total, bool)
        flat[left] = True
        keep = dict(zip(keep, (f.reshape(keep[n].shape) for n, f in zip(keep, np.split(flat, np.cumsum([v.size for v in keep.values()])[:-1])))))
    return keep

def test_synflow_is_the_reference_and_never_empties_a_layer():
    x, left = torch.randn(2, 20), {}
    for name in ('large_final', 'synflow'):
        net = narrow()
        masks = Sparsifier(net, 'weight', 'global', name, layer_type=nn.Linear, min_kept=0, data=x).sparsify_model(99)
        left[name] = {n: int(m.keep.sum()) for n, m in masks.masks.items() if not m.follows}
        if name == 'synflow':
            want = reference(narrow(), x, 99)
            assert abs(masks.sparsity - 99) < .01 and all((full(masks, n.removesuffix('.weight'), net.get_submodule(n.removesuffix('.weight')))['weight'] == k).all() for n, k in want.items())
    assert min(left['large_final'].values()) == 0, left
    assert min(left['synflow'].values()) > 0 and flow(net, x)['0.weight'].any(), left # and a path through all of them

def by_hand(net, x, percent, rounds): # hidden units of a plain chain that are left: each round, the least flow goes
    left = [np.ones(m.out_features, bool) for m in net if isinstance(m, nn.Linear)][:-1]
    for k in range(1, rounds + 1):
        now = copy.deepcopy(net)
        hidden = [m for m in now if isinstance(m, nn.Linear)]
        for m, after, alive in zip(hidden, hidden[1:], left): m.weight.data[~alive], after.weight.data[:, ~alive] = 0, 0
        s = [np.abs(v*g) for v, g in zip(arrays(params(now)).values(), flow(now, x).values())]
        gone = [math.floor(len(u)*(1 - (1 - percent/100)**(k/rounds)) + .5) for u in left]
        left = [~np.isin(np.arange(len(u)), np.where(u, a.sum(1) + b.sum(0), -1).argsort(kind='stable')[:n]) for u, n, a, b in zip(left, gone, s, s[1:])]
    return left

def test_a_pruner_goes_round_as_often_as_synflow_wants():
    differ = 0
    for seed in range(3):
        torch.manual_seed(seed)
        net, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)
        state, p = whole_state(net), Pruner(net, x, 'synflow')
        plan = p.plan(75)
        assert whole_state(net) == state
        want, once = by_hand(net, x, 75, 100), by_hand(net, x, 75, 1)
        got = [plan.masks[f'{i}.bias'].keep.flatten().numpy() for i in (0, 2, 4)]
        assert all((a == b).all() for a, b in zip(got, want)), seed
        differ += any((a != b).any() for a, b in zip(once, want))
        p.prune_model(40)
        p.prune_model(75) # goes on from what is gone
        assert [net[i].out_features for i in (0, 2, 4)] == [4, 4, 4]
    assert differ

@pytest.mark.parametrize('context', ['local', 'global', 'lamp'])
def test_rounds_go_with_limits_and_contexts(context):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)
    table = Pruner(net, x, 'synflow', context, min_sparsity={'0': 30}, max_sparsity=75).plan(50).table()
    gone = dict(zip(table.layer, table['removed %']))
    assert 30 <= gone['0'] <= 75 and 0 <= gone['2'] <= 75, gone
    weights = Sparsifier(net, 'weight', context, 'synflow', layer_type=nn.Linear, min_sparsity={'0': 30}, max_sparsity=75, data=x)
    assert abs(weights.plan(50).sparsity - 50) < 1

def test_synflow_looks_at_one_batch_only():
    net, x, y = chain()
    calls = []
    net.register_forward_hook(lambda *a: calls.append(1))
    seen('synflow', net, parts(x, y, 1))
    assert len(calls) == 1

def test_synflow_leaves_biases_alone_while_it_plans():
    net, x, y = chain()
    with torch.no_grad(): net[0].bias.fill_(1.)
    state = whole_state(net)
    Sparsifier(net, 'filter', 'local', 'synflow', data=x).plan(50)
    assert whole_state(net) == state

def test_signals_beyond_float32_count():
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(30)])
    with torch.no_grad():
        for m in net: m.weight.fill_(500.)
    refs = collect(registered['synflow'], net, params(net), torch.ones(1, 4))
    assert all(torch.isfinite(registered['synflow'].elementwise(net.get_parameter(n).detach(), s)).all() for n, s in refs.items())


# --- bad input

def unreached():
    net, x, y = chain()
    net.add_module('spare', nn.Conv2d(2, 2, 1))
    net.add_module('other', nn.Conv2d(2, 2, 1))
    net.forward = lambda v: nn.Sequential(*list(net)[:9])(v)
    return net, x, y

class Detached(nn.Module):
    def __init__(self): super().__init__(); self.body = chain()[0]
    @torch.no_grad()
    def forward(self, x): return self.body(x)

def refuses(net, says, name, data, loss=F.cross_entropy, kind=ValueError):
    state = whole_state(net)
    s = Sparsifier(net, 'weight', 'local', name, data=data, loss=loss)
    with pytest.raises(kind) as e: s.sparsify_model(50)
    assert all(w in str(e.value) for w in says), e.value
    assert whole_state(net) == state and not len(s.masks), 'touched'

GRADIENTS = [n for n in DATA if registered[n].needs in ('grad', 'loss')]
INPUTS = [n for n in DATA if registered[n].needs in ('inputs', 'outputs', 'maps')]

@pytest.mark.parametrize('name', DATA)
def test_no_data_and_unreached_layers(name):
    net, x, y = chain()
    refuses(net, ['looks at data', 'pass data='], name, None)
    refuses(net, ['no batch'], name, [])
    if name in ('grasp', 'synflow'): refuses(net, ['no batch', 'an iterator'], name, iter(parts(x, y, 3))) # several passes
    refuses(net, ['data must be'], name, 3, kind=TypeError)
    refuses(net, ['batch 1 is a str'], name, ['x'], kind=TypeError)
    net, x, y = unreached()
    refuses(net, ['spare.weight', '1 more', name], name, (x, y))

@pytest.mark.parametrize('name', GRADIENTS)
def test_bad_losses(name):
    net, x, y = awkward()
    net[0].requires_grad_(True)
    refuses(net, ['one number', '(7,)'], name, (x, y), lambda out, y: F.cross_entropy(out, y, reduction='none') if len(out) > 1 else torch.ones(7))
    refuses(net, ['one number', '1.5'], name, (x, y), lambda out, y: 1.5)
    refuses(net, ['pass loss='], name, (x, y), None)
    refuses(net, ['does not depend on the weights'], name, (x, y), lambda out, y: F.cross_entropy(out.detach(), y))
    refuses(Detached(), ['does not depend on the weights'], name, (x, y))
    refuses(net, ['NaN in the data'], name, parts(torch.where(torch.arange(N).view(-1, 1, 1, 1) == 4, torch.nan, x), y, 3))
    refuses(net, ['loss'], name, (x, y), lambda out, y: F.cross_entropy(out, y)*math.inf)

@pytest.mark.parametrize('name', INPUTS)
def test_nan_in_what_layers_see(name):
    net, x, y = awkward()
    net[0].requires_grad_(True)
    refuses(net, ['0.weight', 'NaN'], name, parts(torch.where(torch.arange(N).view(-1, 1, 1, 1) == 4, torch.nan, x), y, 3))

def test_a_layer_without_norm_says_so():
    net, x, y = made('Linear with positions')
    with pytest.raises(ValueError, match='layer.weight.*norm'): gather('bn_scale', net, (x, y))

def test_collectors_that_are_not():
    net, x, y = chain()
    with pytest.raises(ValueError, match="needs 'gradd'.*grad"): seen_by(Criteria(torch.abs, needs='gradd'), net, x)
    with pytest.raises(ValueError, match='two references'): Criteria(torch.abs, needs='grad', needs_init=True)
    with pytest.raises(TypeError, match='gather must be a function'): Criteria(torch.abs, needs='grad', gather='mean')
    lstm = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    for name in INPUTS:
        with pytest.raises(ValueError, match=f'0.weight.*{name}.*Embedding'): collect(registered[name], lstm, dict(lstm.named_parameters()), torch.zeros(2, dtype=torch.long))
    s = Sparsifier(net, 'weight', 'local', 'wanda')
    s.refs = collect(registered['apoz'], net, {'0.weight': net[0].weight}, x) # of another criterion, and not of every layer
    with pytest.raises(ValueError, match='3.weight.*inputs'): s.plan(50)

def seen_by(c, net, data): return collect(c, net, convs(net), data)

def test_normalised_layers_may_be_all_zero():
    net = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    with torch.no_grad(): net['a'].weight.zero_()
    for name in ('layer_magnitude', 'lamp'):
        masks = Sparsifier(net, 'weight', 'global', name, layer_type=nn.Linear, min_kept=0).plan(50)
        assert not masks['a.weight'].keep.any() and masks['b.weight'].keep.all()

def test_out_of_memory_says_what_to_do():
    def full(x): raise torch.OutOfMemoryError('no room')
    layer = nn.Linear(3, 2)
    with pytest.raises(torch.OutOfMemoryError, match='batch of 5 samples; give smaller batches'):
        collect(Criteria(torch.abs, needs='inputs', gather=full, return_init=True, name='full'), layer, {'weight': layer.weight}, torch.ones(5, 3))
