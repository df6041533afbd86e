"""Masked equals removed: random small architectures, beside an oracle that zeroes slices by itself."""
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn

import prune_zoo as zoo
from fasterai_lib.prune.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore:.*weight_norm')
some = settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


# --- oracle

def half_up(n, percent): return min(math.floor(n*percent/100 + .5), n - 1) # at least one is left

def named(model): # tied ones under each name
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

def everywhere(model, removed): # under every name of a tied tensor
    have = named(model)
    out = {(m, axis): idx for (n, axis), idx in removed.items() for m, t in have.items() if t is have[n]}
    assert all((out[k] == v).all() for k, v in removed.items()), 'tied tensors are pruned differently'
    return out

def weight_normed(name, t): # directions of rows: their length is elsewhere, and of length 0 they are no direction
    return name.endswith('weight_v') or name.endswith('weight.original1')

def zeroed(model, removed): # a float64 copy with every removed slice of every parameter at zero
    model = copy.deepcopy(model).double()
    params = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for (n, axis), idx in removed.items():
            if n not in params or (axis == 0 and weight_normed(n, params[n])): continue
            rows = np.moveaxis(params[n].detach().numpy(), axis, 0) # a view
            rows[np.asarray(idx)] = 0
    return model

def snapshot(model):
    tensors = {k: (id(v), tuple(v.shape), v.requires_grad, v.grad is None, v.detach().numpy().tobytes()) for k, v in named(model).items()}
    modules = [(n, m.training, {k: repr(v) for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, list, bool))}, sorted(vars(m))) for n, m in model.named_modules()]
    return tensors, modules

def stated(model): # the sizes that layers state are those of their weights
    for n, m in model.named_modules():
        w = getattr(m, 'weight_v', getattr(m, 'weight', None))
        w = tuple(w.shape) if isinstance(w, torch.Tensor) else None
        if isinstance(m, nn.modules.conv._ConvNd):
            o, i = (w[1]*m.groups, w[0]) if m.transposed else (w[0], w[1]*m.groups)
            assert (m.out_channels, m.in_channels) == (o, i), f'{n}: {m}, the weight is {w}'
        elif isinstance(m, nn.Linear): assert (m.out_features, m.in_features) == w, f'{n}: {m}, the weight is {w}'
        elif isinstance(m, nn.Embedding): assert (m.num_embeddings, m.embedding_dim) == w, f'{n}: {m}, the weight is {w}'
        elif isinstance(m, nn.modules.batchnorm._BatchNorm) and (w or m.running_mean is not None): assert (m.num_features,) == (w or tuple(m.running_mean.shape)), f'{n}: {m}'
        elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)): assert m.normalized_shape == w, f'{n}: {m}'
        elif isinstance(m, nn.GroupNorm): assert (m.num_channels,) == w, f'{n}: {m}'
        elif isinstance(m, nn.RNNBase): assert (m.hidden_size, m.input_size) == m.weight_hh_l0.shape[1:] + m.weight_ih_l0.shape[1:], f'{n}: {m}'

def rng(): return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

def batch(x, n, seed): # another input of the same kind
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (n, *x.shape[1:]), generator=g) if not x.is_floating_point() else torch.randn(n, *x.shape[1:], generator=g).double()

def run(model, x, train=False):
    model.train(train)
    out = model(x)
    return list(out) if isinstance(out, tuple) else [out]

def error(want, got):
    assert [t.shape for t in want] == [t.shape for t in got], 'an output has another shape'
    return max(float(((a - b).abs().max()/a.abs().max()).detach()) for a, b in zip(want, got))


# --- the property

def prepare(model, x): # hooks have run once, so that the model can be copied
    model = zoo.randomise(model, 1).eval()
    with torch.no_grad(): model(x)
    return model

def check(model, x, percent, criteria='large_final', context='local'):
    "Plan, remove from a copy, and compare; returns the plan and the small model, or None if there is nothing to remove"
    model = prepare(model, x)
    before, numbers = snapshot(model), rng()
    p = Pruner(model, x, criteria=criteria, context=context, exact=True)
    try: plan = p.plan(percent)
    except ValueError:
        assert not any(half_up(n, percent) > 0 for n, _ in model.must.values()), 'refused, though there is something to remove'
        assert snapshot(model) == before
        return None
    assert snapshot(model) == before, 'planning has changed the model'
    if criteria != 'random': assert rng() == numbers, 'planning has drawn random numbers'
    removed = everywhere(model, {k: np.asarray(v) for k, v in plan.removed.items()})
    for k, v in removed.items(): assert len(v) and len(set(v.tolist())) == len(v), f'{k}: {v}'

    small = copy.deepcopy(model).double()
    assert plan.remove(small) in (small, None)
    assert snapshot(model) == before
    assert list(small.state_dict()) == list(model.state_dict())
    new = named(small)
    for n, t in named(model).items():
        shape = list(t.shape)
        for (m, axis), idx in removed.items():
            if m == n: shape[axis] -= len(idx)
        assert list(new[n].shape) == shape, f'{n}: {tuple(new[n].shape)}, the plan says {shape}'
    stated(small)
    ties = lambda m: {(a, b) for a, p in m.named_parameters(remove_duplicate=False) for b, q in m.named_parameters(remove_duplicate=False) if p is q}
    assert ties(small) == ties(model), 'tied weights are no longer tied'

    masked = zeroed(model, removed)
    with torch.no_grad():
        for n, seed in ((len(x), 2), (len(x) + 1, 3)): # another input, another batch size
            e = error(run(masked, batch(x, n, seed)), run(small, batch(x, n, seed)))
            assert e < 1e-10, f'masked and removed differ by {e:.1e}'
    twins = [copy.deepcopy(m) for m in (masked, small)]
    outs = [run(m, batch(x, 4, 4), True) for m in twins]
    assert (e := error(*outs)) < 1e-10, f'masked and removed differ by {e:.1e} in training'
    sum(o.square().mean() for o in outs[1]).backward()
    for n, q in twins[1].named_parameters(): assert q.grad is None or (q.grad.shape == q.shape and q.grad.isfinite().all()), n

    if context == 'local': # as many as asked, in each group and on each axis
        gone, total = {}, {}
        for g in p.groups:
            for n, axis, idx in [(m, a, i) for n, a, i in g.members for m, t in named(model).items() if t is named(model)[n]]:
                assert idx.shape[0] == g.n
                hit = np.isin(idx, removed.get((n, axis), []))
                assert (hit.all(1) == hit.any(1)).all(), f'{n}: a unit is partly removed'
                assert hit.all(1).sum() == half_up(g.n, percent), f'{g}: {hit.all(1).sum()} of {g.n} removed at {percent} %'
                gone[n, axis] = gone.get((n, axis), 0) + hit.sum()
        assert {k: len(v) for k, v in removed.items()} == {k: v for k, v in gone.items() if v}
        for k, (n, slices) in model.must.items():
            if half_up(n, percent) <= 0: continue
            assert k in removed, f'{k} is not pruned'
            if slices is not None: assert len(removed[k]) == half_up(n, percent)*slices, f'{k}: {len(removed[k])} removed, {n} units of {slices} at {percent} %'
    return plan, small


# --- architectures

even = st.integers(2, 5).map(lambda n: 2*n)
def block(f, **kw): return st.builds(lambda **k: partial(at, f, k), **kw)
def at(f, k, *args): return f(*args, **k)

flag, width = st.booleans(), st.integers(3, 9)
pictures = [
    block(zoo.Residual, h=even, norm=st.sampled_from(['batch', 'group', 'none', 'plain']), bias=flag),
    block(zoo.Inverted, h=width, m=st.integers(1, 3), r=st.integers(2, 4)),
    block(lambda nd, c, g, n, k: zoo.Grouped(nd, c, g*n, g, k), g=st.integers(2, 4), n=st.integers(2, 4), k=st.integers(1, 2)),
    block(zoo.Dense, h=width),
    block(zoo.Split, sizes=st.one_of(st.lists(st.integers(3, 6), min_size=2, max_size=3), st.integers(3, 6).map(lambda n: [n]*3)), how=st.sampled_from(['split', 'slice'])),
    block(zoo.Split, sizes=st.integers(3, 6).map(lambda n: [n, n]), how=st.just('chunk')),
    block(lambda nd, c, g, n: zoo.Shuffle(nd, c, g*n, g), g=st.integers(2, 4), n=st.integers(2, 4)),
    block(lambda nd, c, h: zoo.PixelShuffle(nd, c, h) if nd == 2 else zoo.Gated(nd, c, h), h=width),
    block(lambda nd, c, g, n, k: zoo.Up(nd, c, g*n, g, k), g=st.integers(1, 3), n=st.integers(1, 4), k=st.integers(1, 2)),
    block(zoo.Gated, h=width),
    block(zoo.NeXt, h=width, norm=flag),
    block(zoo.Twice, h=width, tied=flag),
    block(zoo.WeightNorm, h=width, old=flag, both=flag),
    block(zoo.Bare, h=width)]
sequences = [
    block(zoo.Attention, heads=st.integers(2, 4), d=st.integers(2, 4), fused=flag, sdpa=flag),
    block(zoo.Source_Attention, heads=st.just(2), fused=flag, sdpa=flag),
    block(zoo.Grouped_Query, kv=st.integers(1, 4), rep=st.integers(2, 3), d=st.integers(2, 4), expand=flag),
    block(zoo.Multihead, heads=st.just(2)),
    block(zoo.Mlp, h=width, kind=st.sampled_from(['gelu', 'swiglu', 'chunk'])),
    block(zoo.Recurrent, h=st.integers(3, 6), kind=st.sampled_from(['LSTM', 'GRU']), layers=st.integers(1, 2), both=flag)]
ratio = st.integers(10, 90)
CRITERIA = st.sampled_from(['large_final', 'squared_final', 'small_final', 'random'])


@some
@given(nd=st.sampled_from([2, 2, 1, 3]), c=even, makers=st.lists(st.one_of(pictures), min_size=1, max_size=3), flatten=flag, aux=st.sampled_from([0, 0, 4]), norm=flag, percent=ratio, criteria=CRITERIA)
def test_pictures(nd, c, makers, flatten, aux, norm, percent, criteria):
    check(zoo.Picture(nd, c, makers, flatten, aux, norm), torch.randn(2, 3, *[4]*nd, generator=torch.Generator().manual_seed(0)), percent, criteria)


@some
@given(c=even, makers=st.lists(st.one_of(sequences), min_size=1, max_size=3), norm=st.sampled_from(['layer', 'rms', 'none']), position=st.sampled_from(['parameter', 'embedding', 'none']),
       tied=flag, percent=ratio, criteria=CRITERIA)
def test_sequences(c, makers, norm, position, tied, percent, criteria):
    check(zoo.Sequence(c, makers, norm, position, tied), torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0)), percent, criteria)


# --- each block alone: what surely can be removed is removed

IMAGE, TOKENS = torch.linspace(-1, 1, 96).view(2, 3, 4, 4), torch.arange(12).view(2, 6) % 11
ONES = {f'{name} {args}': partial(f, **args) for name, f, argss in [
    ('residual', zoo.Residual, [dict(h=8), dict(h=8, norm='group', g=4), dict(h=6, norm='none'), dict(h=6, norm='plain', bias=False)]), ('inverted', zoo.Inverted, [dict(h=6), dict(h=6, m=2, r=4)]),
    ('grouped', zoo.Grouped, [dict(h=8, g=2, k=1), dict(h=8, g=4, k=2)]), ('dense', zoo.Dense, [dict(h=4)]),
    ('split', zoo.Split, [dict(sizes=[4, 4], how='chunk'), dict(sizes=[3, 5]), dict(sizes=[4, 6], how='slice'), dict(sizes=[4, 4, 4], how='slice'), dict(sizes=[4, 4, 4]), dict(sizes=[2, 4, 6])]),
    ('shuffle', zoo.Shuffle, [dict(h=8), dict(h=12, g=3)]), ('pixel shuffle', zoo.PixelShuffle, [dict(h=4)]),
    ('up', zoo.Up, [dict(h=6), dict(h=8, g=2), dict(h=8, g=2, k=1), dict(h=4, g=4, k=1), dict(h=4, g=4, k=2)]), ('gated', zoo.Gated, [dict(h=5)]), ('next', zoo.NeXt, [dict(h=8), dict(h=8, norm=False)]),
    ('twice', zoo.Twice, [dict(h=6), dict(h=6, tied=False)]), ('weight norm', zoo.WeightNorm, [dict(h=6), dict(h=6, old=True), dict(h=6, both=True), dict(h=6, both=True, old=True)]), ('bare', zoo.Bare, [dict(h=5)])] for args in argss}
STEPS = {f'{name} {args}': partial(f, **args) for name, f, argss in [
    ('attention', zoo.Attention, [dict(heads=4, d=3, fused=a, sdpa=b) for a in (True, False) for b in (True, False)]),
    ('source attention', zoo.Source_Attention, [dict(heads=2, fused=a) for a in (True, False)]),
    ('grouped query', zoo.Grouped_Query, [dict(kv=4, rep=2, d=3), dict(kv=4, rep=2, d=3, expand=True), dict(kv=1, rep=4, d=2), dict(kv=2, rep=3, d=3, expand=True)]), ('multihead', zoo.Multihead, [dict(heads=2)]),
    ('mlp', zoo.Mlp, [dict(h=7), dict(h=7, kind='swiglu'), dict(h=7, kind='chunk')]),
    ('recurrent', zoo.Recurrent, [dict(h=4, kind=k, layers=l, both=b) for k in ('LSTM', 'GRU') for l in (1, 2) for b in (False, True)])] for args in argss}


@pytest.mark.parametrize('percent', [30, 50, 70])
@pytest.mark.parametrize('name', ONES)
def test_each_picture_block(name, percent):
    check(zoo.Picture(2, 6, [ONES[name]], percent == 30, 4 if percent == 70 else 0), IMAGE, percent)

@pytest.mark.parametrize('name', STEPS)
def test_each_sequence_block(name): check(zoo.Sequence(8, [STEPS[name], partial(zoo.Mlp, h=6)], 'layer'), TOKENS, 50)

@pytest.mark.parametrize('name', STEPS)
def test_each_sequence_block_without_norms(name): # and with the head tied to the embedding
    check(zoo.Sequence(8, [STEPS[name], partial(zoo.Mlp, h=6)], 'none', tied=True), TOKENS, 50)


# --- the comparison itself

@pytest.mark.parametrize('kind', ['picture', 'sequence'])
def test_a_shifted_consumer_is_noticed(kind):
    model, x = (zoo.Picture(2, 6, [ONES["residual {'h': 8}"], ONES["split {'sizes': [3, 5]}"], ONES["gated {'h': 5}"]]), IMAGE) if kind == 'picture' else (
        zoo.Sequence(8, [STEPS["mlp {'h': 7, 'kind': 'swiglu'}"], partial(zoo.Mlp, h=6)], 'layer'), TOKENS)
    plan, small = check(model, x, 50)
    masked = zeroed(model, plan.removed)
    with torch.no_grad(): want = run(masked, batch(x, 3, 5))
    tried = 0
    for n, axis in plan.removed:
        p = dict(small.named_parameters()).get(n)
        if axis != 1 or p is None or p.shape[1] < 2: continue
        tried, old = tried + 1, p.data
        p.data = old.roll(1, 1)
        with torch.no_grad(): assert error(want, run(small, batch(x, 3, 5))) > 1e-6, f'{n} is shifted, and nobody notices'
        p.data = old
    assert tried >= 2
