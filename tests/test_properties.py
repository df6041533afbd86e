"""Promises that hold for every registered granularity, criterion, context, layer type and schedule, beside an oracle in numpy."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
import oracle
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from fasterai_lib.core.criteria import criteria as registered, reducers
from fasterai_lib.core.granularity import Granularities, Tile
from fasterai_lib.core.masks import Masks
from fasterai_lib.core.schedule import Schedule, gradual, iterative, schedules
from fasterai_lib.core.units import layers_of
from fasterai_lib.show.report import SparsityReport
from fasterai_lib.sparse.sparsifier import Sparsifier

# Those that are a mean of scores of single weights and their reference; tests/test_data_criteria.py has the others.
criteria = {n: c for n, c in registered.items() if not c.needs_data and not c.between and not c.normalizer and c.reducer is reducers['mean']}
CONTEXTS = ['local', 'global', 'per_row', '2:4']
some = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

CASES = { # two layers of different sizes for every registered type
    'Conv1d': (lambda: nn.Conv1d(8, 6, 3), lambda: nn.Conv1d(4, 4, 2)),
    'Conv1d grouped': (lambda: nn.Conv1d(8, 6, 3, groups=2), lambda: nn.Conv1d(4, 4, 2)),
    'Conv1d depthwise': (lambda: nn.Conv1d(6, 6, 3, groups=6), lambda: nn.Conv1d(4, 8, 2, groups=4)),
    'Conv2d': (lambda: nn.Conv2d(8, 6, (3, 2)), lambda: nn.Conv2d(4, 5, 1)),
    'Conv2d grouped': (lambda: nn.Conv2d(8, 6, (3, 2), groups=2), lambda: nn.Conv2d(4, 4, 2, bias=False)),
    'Conv2d depthwise': (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.Conv2d(4, 8, (2, 3), groups=4)),
    'Conv3d': (lambda: nn.Conv3d(4, 4, (2, 3, 2)), lambda: nn.Conv3d(4, 3, (1, 2, 2))),
    'Conv3d grouped': (lambda: nn.Conv3d(8, 4, (2, 1, 2), groups=2), lambda: nn.Conv3d(4, 3, (1, 2, 2))),
    'ConvTranspose1d': (lambda: nn.ConvTranspose1d(8, 6, 3), lambda: nn.ConvTranspose1d(4, 4, 2)),
    'ConvTranspose1d grouped': (lambda: nn.ConvTranspose1d(8, 6, 3, groups=2), lambda: nn.ConvTranspose1d(4, 4, 2)),
    'ConvTranspose2d': (lambda: nn.ConvTranspose2d(8, 6, (3, 2)), lambda: nn.ConvTranspose2d(4, 5, 1)),
    'ConvTranspose2d grouped': (lambda: nn.ConvTranspose2d(8, 6, (2, 3), groups=2), lambda: nn.ConvTranspose2d(4, 5, 2)),
    'ConvTranspose2d depthwise': (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), lambda: nn.ConvTranspose2d(4, 8, 2, groups=4)),
    'ConvTranspose3d': (lambda: nn.ConvTranspose3d(4, 4, (2, 3, 2)), lambda: nn.ConvTranspose3d(8, 4, (1, 2, 2), groups=2)),
    'Linear': (lambda: nn.Linear(12, 7), lambda: nn.Linear(8, 5, bias=False)),
    'Bilinear': (lambda: nn.Bilinear(8, 3, 5), lambda: nn.Bilinear(4, 4, 3)),
    'Embedding': (lambda: nn.Embedding(11, 8), lambda: nn.Embedding(5, 4)),
    'EmbeddingBag': (lambda: nn.EmbeddingBag(11, 8), lambda: nn.EmbeddingBag(5, 4)),
    'MultiheadAttention': (lambda: nn.MultiheadAttention(8, 4), lambda: nn.MultiheadAttention(4, 2)),
    'MultiheadAttention kdim': (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=12), lambda: nn.MultiheadAttention(4, 2, bias=False)),
    'LSTM': (lambda: nn.LSTM(8, 4), lambda: nn.LSTM(4, 4, proj_size=2)),
    'LSTMCell': (lambda: nn.LSTMCell(8, 4), lambda: nn.LSTMCell(4, 4)),
    'GRU': (lambda: nn.GRU(8, 4, num_layers=2), lambda: nn.GRU(4, 4, bidirectional=True)),
    'GRUCell': (lambda: nn.GRUCell(8, 4), lambda: nn.GRUCell(4, 4)),
    'RNN': (lambda: nn.RNN(8, 4), lambda: nn.RNN(4, 4)),
    'RNNCell': (lambda: nn.RNNCell(8, 4), lambda: nn.RNNCell(4, 4)),
}
kind_of = lambda case: getattr(nn, case.split()[0])
GRANS = [(c, g) for c in CASES for g in Granularities.available(kind_of(c))]
PATTERNS = dict(
    ints=lambda r, s: r.integers(-8, 9, s), zeros=lambda r, s: np.zeros(s), constant=lambda r, s: np.full(s, -2.), tied=lambda r, s: r.choice([-1, 1], s),
    half_zero=lambda r, s: r.integers(-8, 9, s)*(r.random(s) < .5))


def fill(model, seed=0, pattern='ints'): # small dyadic weights: float32 orders them as float64 does
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.from_numpy(np.asarray(PATTERNS[pattern](rng, tuple(p.shape))/4., dtype=np.float64)))
    return model

def build(case, seed=0, pattern='ints'):
    a, b = CASES[case]
    return fill(nn.ModuleDict(dict(a=a(), b=b())), seed, pattern)

def weights(layer): # parameters that are pruned, as arrays
    return {n: p.detach().double().numpy() for n, p in layer.named_parameters() if 'bias' not in n}

def oracle_units(layer, granularity):
    kind = next(t.__name__ for t in type(layer).__mro__ if t.__name__ in oracle.KINDS)
    if isinstance(granularity, str) and granularity not in oracle.KINDS[kind][0][2]: # registered after the tables were written
        granularity = {a: None if n is ... else n for a, n in Granularities.kind(layer).names[granularity].sizes.items()}
    if isinstance(granularity, Tile): granularity = {a: None if n is ... else n for a, n in granularity.sizes.items()}
    return oracle.units_of(kind, {n: w.shape for n, w in weights(layer).items()}, granularity, getattr(layer, 'groups', 1), getattr(layer, 'num_heads', 1))

def formula(name):
    if name in oracle.FORMULAS: return oracle.FORMULAS[name]
    c = criteria[name] # registered after the table was written
    return lambda w, r: c.elementwise(torch.from_numpy(w), torch.from_numpy(r)).numpy()

def allowed(units, context):
    if context == 'per_row': return all(u.rows() is not None for u in units)
    if context == '2:4': return all(u.groups(4) is not None for u in units)
    return True

def full(masks, prefix, layer): # mask per weight of one layer, by the name of the parameter in it
    return {n: masks.masks[f'{prefix}.{n}'].full(w.shape).numpy() for n, w in weights(layer).items()}

def per_unit(u, masks): # mask per weight -> per unit; every weight of a unit must have one fate
    keep = np.zeros(u.n, int)
    for p, ids in u.ids.items(): np.add.at(keep, ids.ravel(), masks[p].ravel())
    assert ((keep == 0) | (keep == u.sizes)).all(), 'a unit is partly removed'
    return keep > 0

def snapshot(model):
    state = {k: (v.dtype, tuple(v.shape), v.stride(), v.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for k, v in
             [*model.named_parameters(), *model.named_buffers()]}
    hooks = [(n, sorted(vars(m)), m.training, [len(v) for k, v in sorted(vars(m).items()) if 'hooks' in k]) for n, m in model.named_modules()]
    extra = [(n, p.requires_grad, sorted(vars(p)), p.grad is None) for n, p in model.named_parameters()]
    return state, hooks, extra, list(model.state_dict())

def rng_state(): return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), __import__('random').getstate()


# --- the matrix

def test_every_registered_layer_type_has_a_case():
    missing = [t.__name__ for t in Granularities.kinds if not any(kind_of(c) is t for c in CASES)]
    assert not missing, f'add layers of these types to CASES: {missing}'


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('case,granularity', GRANS, ids=lambda x: x.replace(' ', '-'))
def test_every_criterion_decides_as_the_oracle(case, granularity, context):
    model = build(case)
    us = {n: oracle_units(m, granularity) for n, m in model.items()}
    if not all(allowed(u, context) for u in us.values()):
        for c in criteria:
            with pytest.raises(ValueError, match='context|does not divide'): Sparsifier(model, granularity, context, c, layer_type=kind_of(case))
        return
    before = {n: weights(m) for n, m in build(case, 0).items()}
    made = {c: Sparsifier(model, granularity, context, c, layer_type=kind_of(case)) for c in criteria}
    fill(model, 1)
    now, snap, rng = {n: weights(m) for n, m in build(case, 1).items()}, snapshot(model), rng_state()
    sparsity = dict(a=50., b=30.) if context in ('local', 'per_row') else dict(a=50., b=50.)
    for c in sorted(criteria, key=lambda c: c == 'random'): # random last: it alone may draw numbers
        if c == 'random': assert rng == rng_state(), 'a criterion that is not random has drawn random numbers'
        masks = made[c].plan(list(sparsity.values()) if context in ('local', 'per_row') else 50)
        got = {n: [per_unit(u, full(masks, n, model[n])) for u in us[n]] for n in model}
        f = formula(c) if c != 'random' else lambda w, r: np.abs(w)
        scores = {n: [u.score(f, now[n], before[n]) for u in us[n]] for n in model}
        if context == 'per_row':
            for n in model:
                for u, s, keep in zip(us[n], scores[n], got[n]):
                    if c == 'random': s = keep.astype(float) # whatever went is the lowest
                    assert (wrong := oracle.check_per_row(u, s, sparsity[n], keep)) is None, f'{c} {n}: {wrong}'
            continue
        if context == '2:4': want = {n: [oracle.n_of_m(u, s, 2, 4) for u, s in zip(us[n], scores[n])] for n in model}
        elif context == 'local': want = {n: oracle.local(us[n], scores[n], sparsity[n]) for n in model}
        else: want = dict(zip(model, oracle.global_([(us[n], scores[n]) for n in model], 50.)))
        for names in ([['a'], ['b']] if context != 'global' else [['a', 'b']]):
            every = [(u, g, w) for n in names for u, g, w in zip(us[n], got[n], want[n])]
            if c != 'random': assert all((g == w).all() for _, g, w in every), f'{c}, {names}: other units than the oracle'
            gone = sum(int(u.sizes[~g].sum()) for u, g, _ in every)
            target = sum(u.sizes.sum() for u, _, _ in every)*sparsity[names[0]]/100
            assert abs(gone - target) <= max(u.sizes.max() for u, _, _ in every), f'{c}: {gone} weights gone, {target} asked'
        if c == 'random' and context == 'local' and len(set(np.concatenate([u.sizes for u in us['a']]))) == 1:
            assert [sum(int((~k).sum()) for k in got['a'])] == [sum(int((~k).sum()) for k in want['a'])]
    assert snapshot(model) == snap, 'planning has changed the model'


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('context', ['local', 'global', 'per_row'])
@pytest.mark.parametrize('case', CASES, ids=lambda x: x.replace(' ', '-'))
def test_exact_nested_and_back_whatever_the_weights(case, context, pattern):
    for granularity in Granularities.available(kind_of(case)):
        model = build(case, 3, pattern)
        us = {n: oracle_units(m, granularity) for n, m in model.items()}
        if not all(allowed(u, context) for u in us.values()): continue
        s, last, last_asked = Sparsifier(model, granularity, context, 'large_final', layer_type=kind_of(case)), None, 0
        flat = [u for n in model for u in us[n]]
        for step, asked in enumerate((0, 17, 38, 38, 61, 61.8, 83, 99.9, 100, 61, 25, 0)):
            masks = s.sparsify_model(asked)
            got = [per_unit(u, full(masks, n, model[n])) for n in model for u in us[n]]
            where = f'{granularity}, step {step}, {asked} %'
            scopes = {'local': [us[n] for n in model], 'global': [flat], 'per_row': [[u] for u in flat]}[context]
            ends = np.cumsum([len(x) for x in scopes])
            for scope, end in zip(scopes, ends):
                pieces = got[end - len(scope):end]
                gone, total, unit = sum(int(u.sizes[~g].sum()) for u, g in zip(scope, pieces)), sum(u.sizes.sum() for u in scope), max(u.sizes.max() for u in scope)
                floor = sum(int(u.sizes.max()) for u in scope) if asked == 99.9 else 0
                if context == 'global' and asked >= 83: floor = sum(int(u.sizes.max()) for u in scope) # each layer keeps one unit
                if context == 'local' and len(scope) > 1 and asked >= 83: floor = sum(int(u.sizes.max()) for u in scope)
                assert abs(gone - total*asked/100) <= max(unit, floor), f'{where}: {gone} of {total} weights'
                if asked == 100: assert gone == total, where
                if asked == 0: assert gone == 0, where
            if last is not None:
                for a, b in zip(last, got):
                    if asked >= last_asked: assert not (b & ~a).any(), f'{where}: a removed unit came back as sparsity rose'
                    else: assert not (a & ~b).any(), f'{where}: a kept unit went as sparsity fell'
            assert masks.held(model), where
            last, last_asked = got, asked


@pytest.mark.parametrize('criterion', [c for c in criteria if criteria[c].needs_reference])
def test_references_follow_what_the_criterion_says(criterion):
    model = fill(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 4)), 0)
    s = Sparsifier(model, 'kernel', 'local', criterion)
    u, f = oracle_units(model[0], 'kernel')[0], formula(criterion)
    ref = weights(model[0])
    for seed, asked in ((1, 25.), (2, 50.), (3, 75.)):
        ref = {k: v.copy() for k, v in ref.items()}
        fill(model, seed)
        s.masks.apply(model)
        w, dead = {k: v.copy() for k, v in weights(model[0]).items()}, ~per_unit(u, full(s.masks, '0', model[0])) if len(s.masks) else np.zeros(u.n, bool)
        score = u.score(f, w, ref)
        score = np.where(dead, score.min() - 1, score)
        want = oracle.select([(score, u.sizes)], asked)[0]
        got = per_unit(u, full(s.sparsify_model(asked), '0', model[0]))
        assert (got == want).all(), asked
        if criterion.startswith('updating'): ref = weights(model[0])


# --- what is not touched

def zoo():
    return fill(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 4)), 5)

@pytest.mark.parametrize('criterion', criteria)
@pytest.mark.parametrize('context', ['local', 'global', 'per_row'])
def test_the_rest_of_the_model_and_the_generators_are_untouched(criterion, context):
    model = zoo()
    model[0].weight.data[0, 0, 0, 0] = -0.
    model.train(); model[1].eval()
    snap, rng = snapshot(model), rng_state()
    s = Sparsifier(model, 'weight', context, criterion)
    s.sparsify_model(0)
    assert snapshot(model) == snap
    masks = s.sparsify_model(50)
    state, *rest = snapshot(model)
    assert rest == list(snap[1:]), 'attributes, hooks, modes or keys'
    if criterion != 'random': assert rng_state() == rng
    assert rng_state()[1:] == rng[1:]
    assert set(masks) == {'0.weight', '3.weight'}
    for k in state:
        if k not in masks: assert state[k] == snap[0][k], k
    for k, m in masks.masks.items():
        keep = m.full(model.get_parameter(k).shape).numpy().ravel()
        now, then = (np.frombuffer(x[k][3], np.uint32) for x in (state, snap[0]))
        assert (now[keep] == then[keep]).all() and not now[~keep].any(), k

@pytest.mark.parametrize('criterion', criteria)
def test_the_same_again(criterion):
    out = []
    for _ in range(2):
        torch.manual_seed(0)
        model = zoo()
        s = Sparsifier(model, 'weight', 'global', criterion)
        fill(model, 9)
        out.append((s.sparsify_model(63), snapshot(model)[0]))
    assert out[0] == out[1]

def test_one_layer_alone():
    model = zoo()
    snap = snapshot(model)[0]
    s = Sparsifier(model, 'filter', 'global', 'large_final')
    s.sparsify_layer(model[3], 50)
    assert s.context.name == 'global' and [k for k, v in snapshot(model)[0].items() if v != snap[k]] == ['3.weight', '3.bias']
    assert int((model[3].weight.abs().sum((1, 2, 3)) == 0).sum()) == 3 and s.masks.sparsity == 50
    s.sparsify_layer('0', 25)
    assert s.masks.masks['0.weight'].keep.sum() == 6 and s.masks.masks['3.weight'].keep.sum() == 3


# --- dtypes, layouts, sizes

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed', 'strided'])
@pytest.mark.parametrize('granularity', ['weight', 'row', 'kernel', 'filter', 'shared_column', Tile(o=2, i=3), 'layer'], ids=str)
def test_dtypes_and_layouts(dtype, layout, granularity):
    model = fill(nn.Sequential(nn.Conv2d(5, 6, (3, 2)), nn.Conv2d(6, 4, 3, groups=2)), 2).to(dtype)
    wanted = [oracle_units(m, granularity) for m in model]
    want = [oracle.local(us, [us[0].score(oracle.FORMULAS['large_final'], weights(m), weights(m))], 40.) for us, m in zip(wanted, model)]
    for m in model:
        w = m.weight.data
        if layout == 'channels_last': m.to(memory_format=torch.channels_last)
        if layout == 'transposed': m.weight.data = w.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        if layout == 'strided': m.weight.data = torch.stack([w, w], -1)[..., 0]
        assert torch.equal(m.weight.data, w)
    strides = [m.weight.stride() for m in model]
    masks = Sparsifier(model, granularity, 'local', 'large_final').sparsify_model(40)
    for i, (m, us, k) in enumerate(zip(model, wanted, want)):
        assert (per_unit(us[0], full(masks, str(i), m)) == k[0]).all()
        assert (per_unit(us[0], {'weight': (m.weight.detach().double() != 0).numpy() | full(masks, str(i), m)['weight']}) == k[0]).all()
        assert m.weight.stride() == strides[i] and m.weight.dtype == dtype and masks.held(model)

N = 460
LARGE = dict(
    normal=lambda r: r.normal(size=N*N), ties=lambda r: r.integers(-3, 4, N*N), two_values=lambda r: r.choice([-1, 2], N*N), rare=lambda r: (r.random(N*N) < 1e-4)*5.,
    rising=lambda r: np.arange(N*N)/N/N, falling=lambda r: -np.arange(N*N)[::-1]/N/N, heavy=lambda r: np.exp(8*r.normal(size=N*N)).clip(max=1e30),
    outlier=lambda r: np.concatenate([r.normal(size=N*N - 1), [3e38]]), subnormal=lambda r: r.normal(size=N*N)*1e-41, zeros=lambda r: np.zeros(N*N),
    blocks=lambda r: np.repeat(r.normal(size=N), N), zero_half=lambda r: r.normal(size=N*N)*(np.arange(N*N) % 2))

@pytest.mark.parametrize('name', LARGE)
def test_large_tensors_as_a_full_stable_sort(name):
    w = np.asarray(LARGE[name](np.random.default_rng(0)), np.float32)
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, 50))
    def load():
        with torch.no_grad(): model[0].weight.copy_(torch.from_numpy(w).view(N, N)); model[1].weight.copy_(torch.from_numpy(w[::-1][:50*N].copy()).view(50, N))
    both = np.concatenate([w, w[::-1][:50*N]])
    load()
    s, alive = Sparsifier(model, 'weight', 'local', 'large_final', layer_type=nn.Linear), None
    for asked in (.003, 50., 95., 95., 95.3, 99.97): # from the second on, over what has gone
        with pytest.warns() if asked < 1 else _quiet(): masks = s.sparsify_model(asked)
        score = np.abs(w) if alive is None else np.abs(w)*alive
        want = oracle.argsort_keep(score, oracle.half_up(asked*N*N/100), alive)
        got = masks.masks['0.weight'].keep.numpy().ravel()
        assert (got == want).all(), asked
        alive = want
    for asked in (90., 20.): # and back: what is kept stays kept
        keep = s.sparsify_model(asked).masks['0.weight'].keep.numpy().ravel()
        assert keep.sum() == N*N - oracle.half_up(asked*N*N/100) and not (alive & ~keep).any(), asked
        alive = keep
    load()
    s, alive = Sparsifier(model, 'weight', 'global', 'large_final', layer_type=nn.Linear), None
    for asked in (30., 96.): # one scope over two tensors
        masks = s.sparsify_model(asked)
        want = oracle.argsort_keep(np.abs(both) if alive is None else np.abs(both)*alive, oracle.half_up(asked*len(both)/100), alive)
        assert not want[:N*N].any() or not want[N*N:].any() or (np.concatenate([masks.masks[f'{i}.weight'].keep.numpy().ravel() for i in (0, 1)]) == want).all(), asked
        alive = np.concatenate([masks.masks[f'{i}.weight'].keep.numpy().ravel() for i in (0, 1)])
        assert (~alive).sum() == oracle.half_up(asked*len(both)/100)

class _quiet:
    def __enter__(self): return self
    def __exit__(self, *exc): return False

@pytest.mark.parametrize('asked', [1., 50., 99.5])
def test_large_random_is_exact(asked):
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, 300))
    for context in ('local', 'global'):
        masks = Sparsifier(model, 'weight', context, 'random', layer_type=nn.Linear).sparsify_model(asked)
        gone = {k: int((~m.keep).sum()) for k, m in masks.masks.items()}
        if context == 'local': assert gone == {k: oracle.half_up(asked*m.grid.n/100) for k, m in masks.masks.items()}
        else: assert sum(gone.values()) == oracle.half_up(asked*masks.total/100)


# --- shapes, groups, blocks, limits

blocks = st.none() | st.integers(1, 4)

@some
@given(g=st.integers(1, 3), o=st.integers(1, 5), i=st.integers(1, 5), h=st.integers(1, 3), w=st.integers(1, 3), bo=blocks, bi=blocks, bh=blocks, bw=blocks,
       asked=st.floats(0, 100).filter(lambda x: x == 0 or x >= 1), transposed=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_and_tile(g, o, i, h, w, bo, bi, bh, bw, asked, transposed, seed):
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(g*i, g*o, (h, w), groups=g)
    model = fill(nn.Sequential(layer), seed)
    tile = Tile(**{a: ... if b is None else b for a, b in zip('oihw', (bo, bi, bh, bw))})
    us = oracle_units(layer, tile)
    want = oracle.local(us, [us[0].score(oracle.FORMULAS['large_final'], weights(layer), weights(layer))], asked)[0]
    masks = Sparsifier(model, tile, 'local', 'large_final', layer_type=(nn.Conv2d, nn.ConvTranspose2d)).sparsify_model(asked)
    keep = per_unit(us[0], full(masks, '0', layer))
    assert (keep == want).all()
    assert abs(us[0].sizes[~keep].sum() - asked*layer.weight.numel()/100) <= us[0].sizes.max()
    zero = (layer.weight.detach().numpy() == 0)
    assert zero[~full(masks, '0', layer)['weight']].all() and masks.held(model)
    assert ('0.bias' in masks) == all(us[0].block[us[0].axes.index(a)] == layer.weight.shape[d] for a, d in (('i', 1 - transposed), ('h', 2), ('w', 3)) if not (transposed and a == 'i')) \
        or transposed

@some
@given(o=st.integers(1, 12), i=st.integers(2, 9), block=st.integers(1, 4), asked=st.floats(5, 95), pattern=st.sampled_from(['ints', 'constant']))
def test_blocks_in_each_row(o, i, block, asked, pattern): # per row, blocks of several sizes too: weights to within one unit of a row
    model = fill(nn.Sequential(nn.Linear(i, o)), 0, pattern)
    if block >= i: return
    try: masks = Sparsifier(model, Tile(i=block), 'per_row', 'large_final', layer_type=nn.Linear).sparsify_model(asked)
    except ValueError: 
        assert i % block, 'only a row of unequal units may be refused'
        return
    u = oracle_units(model[0], Tile(i=block))[0]
    keep = per_unit(u, full(masks, '0', model[0]))
    assert abs(u.sizes[~keep].sum() - asked*o*i/100) <= block, (u.sizes[~keep].sum(), o*i)

@some
@given(outs=st.lists(st.integers(4, 20), min_size=1, max_size=3), round_to=st.integers(1, 4), asked=st.floats(1, 99.9), seed=st.integers(0, 99),
       context=st.sampled_from(['local', 'global']), granularity=st.sampled_from(['filter', 'kernel']))
def test_round_to_leaves_multiples_and_never_nothing(outs, round_to, asked, seed, context, granularity):
    model = fill(nn.Sequential(*[nn.Conv2d(a, b, 2) for a, b in zip([4, *outs], outs)]), seed)
    masks = Sparsifier(model, granularity, context, 'large_final').sparsify_model(asked, round_to=round_to)
    for k, m in masks.masks.items():
        n, left = m.grid.n, int(m.keep.sum())
        assert left == n or (left % round_to == 0 and 0 < left <= n), (k, n, left)
        if context == 'local' and not m.follows:
            want = n - oracle.half_up(asked*n/100)
            assert left == n or abs(left - want) <= max(round_to/2, round_to - want, want - n//round_to*round_to), (k, left, want)

@some
@given(outs=st.lists(st.integers(4, 12), min_size=2, max_size=3), least=st.integers(0, 2), most=st.floats(50, 100), asked=st.floats(1, 40), seed=st.integers(0, 9),
       context=st.sampled_from(['local', 'global']))
def test_limits_hold_and_the_total_is_still_exact(outs, least, most, asked, seed, context):
    model = fill(nn.Sequential(*[nn.Conv2d(a, b, 2) for a, b in zip([4, *outs], outs)]), seed)
    with torch.no_grad(): model[0].weight.mul_(1/64) # would go first
    masks = Sparsifier(model, 'filter', context, 'large_final', min_kept=least, max_sparsity=most).sparsify_model(min(asked, most))
    for k, m in masks.masks.items(): assert m.keep.sum() >= max(least, math.ceil(m.grid.n*(1 - most/100) - 1e-6)), k
    ws = [m for m in masks.masks.values() if not m.follows]
    if context == 'global': assert abs(sum(m.dead() for m in ws) - asked*sum(m.grid.numel for m in ws)/100) <= max(m.grid.numel/m.grid.n for m in ws)

@pytest.mark.parametrize('layer', [lambda: nn.LSTM(8, 4), lambda: nn.MultiheadAttention(8, 2), lambda: nn.Linear(8, 10)], ids=['LSTM', 'MHA', 'Linear'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_max_sparsity_of_layers_with_several_weights(layer, context):
    model = fill(nn.Sequential(layer()), 1)
    masks = Sparsifier(model, 'weight', context, 'large_final', layer_type=type(model[0]), max_sparsity=80).sparsify_model(80)
    assert abs(masks.sparsity - 80)*masks.total/100 <= 1

@pytest.mark.parametrize('context', ['local', 'per_row'])
def test_a_limit_that_cannot_be_kept_is_an_error(context):
    model = fill(nn.Sequential(nn.Linear(4, 4)), 1)
    with pytest.raises(ValueError, match='min_kept=12'): Sparsifier(model, 'weight', context, 'large_final', nn.Linear, min_kept=12).sparsify_model(75)

def test_min_kept_wins_over_round_to_or_is_an_error():
    model = fill(nn.Sequential(nn.Linear(4, 10)), 1)
    s = Sparsifier(model, 'row', 'local', 'large_final', nn.Linear, min_kept=9)
    try: masks = s.sparsify_model(10, round_to=4)
    except ValueError: return
    assert masks.masks['0.weight'].keep.sum() >= 9

@pytest.mark.parametrize('seed', range(6))
def test_the_floor_of_a_layer_breaks_ties_by_position(seed): # units of several sizes, all scores equal
    model = fill(nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 30, 2)), seed, 'constant')
    masks = Sparsifier(model, 'filter', 'global', 'large_final').sparsify_model(99.9)
    us = [oracle_units(m, 'filter') for m in model]
    want = oracle.global_([(u, [np.full(u[0].n, .5)]) for u in us], 99.9)
    for i, m in enumerate(model): assert (per_unit(us[i][0], full(masks, str(i), m)) == want[i][0]).all(), np.flatnonzero(masks.masks[f'{i}.weight'].keep)


# --- N:M

@pytest.mark.parametrize('n,m', [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8)])
@pytest.mark.parametrize('layer,axis,names', [
    (lambda: nn.Linear(16, 8), '', 'i'), (lambda: nn.Linear(16, 8), ' o', 'o'), (lambda: nn.Conv2d(16, 8, 3), '', 'i'), (lambda: nn.Conv2d(16, 8, 3), ' o', 'o'),
    (lambda: nn.Conv2d(3, 8, (8, 3)), ' h', 'h'), (lambda: nn.Conv2d(3, 2, (2, 8)), ' w', 'w'), (lambda: nn.Conv2d(16, 8, 2, groups=2), '', 'i'), (lambda: nn.ConvTranspose2d(16, 8, 2, groups=2), '', 'i'),
    (lambda: nn.Embedding(5, 16), '', 'd'), (lambda: nn.Embedding(16, 5), ' n', 'n'), (lambda: nn.Bilinear(8, 8, 3), ' j', 'j')], ids=lambda v: 'layer' if callable(v) else str(v))
def test_n_of_m_group_by_group(layer, axis, names, n, m):
    model = fill(nn.Sequential(layer()), 4)
    w0 = weights(model[0])['weight'].copy()
    u = oracle_units(model[0], 'weight')[0]
    if u.groups(m, names) is None: return pytest.raises(ValueError, Sparsifier, model, 'weight', f'{n}:{m}{axis}', 'large_final', layer_type=type(model[0]))
    masks = Sparsifier(model, 'weight', f'{n}:{m}{axis}', 'large_final', layer_type=type(model[0])).sparsify_model(100*(1 - n/m))
    keep = full(masks, '0', model[0])['weight']
    assert (per_unit(u, {'weight': keep}) == oracle.n_of_m(u, np.abs(w0).ravel(), n, m, names)).all()
    lanes = np.moveaxis(keep.reshape(next(iter(u.ids.values())).shape), u.axes.index(names), -1).reshape(-1, m)
    assert (lanes.sum(1) == n).all()


# --- masks

def masked(seed=0, asked=50, granularity='filter'):
    model = zoo()
    fill(model, seed)
    return model, Sparsifier(model, granularity, 'local', 'large_final', layer_type=(nn.Conv2d,)).sparsify_model(asked)

@pytest.mark.parametrize('granularity', Granularities.available(nn.Conv2d) + [Tile(o=2, i=3)], ids=str)
def test_masks_round_trip(granularity, tmp_path):
    model, masks = masked(granularity=granularity)
    masks.save(tmp_path/'m.safetensors')
    back = Masks.load(tmp_path/'m.safetensors')
    assert back == masks and back.report().set_index('parameter').sort_index().equals(masks.report().set_index('parameter').sort_index()) and {n: m.grid for n, m in back.masks.items()} == {n: m.grid for n, m in masks.masks.items()}
    assert back.sparsity == masks.sparsity and abs(back.density + back.sparsity - 100) < 1e-12
    fresh = fill(zoo(), 7)
    once = copy.deepcopy(back.apply(fresh).state_dict())
    assert back.held(fresh) and all(torch.equal(a, b) for a, b in zip(once.values(), back.apply(fresh).state_dict().values()))
    if masks.sparsity:
        k = next(n for n, m in masks.masks.items() if m.dead())
        with torch.no_grad(): fresh.get_parameter(k).fill_(1)
        assert not back.held(fresh)

def test_masks_keep_the_order_of_the_model(tmp_path):
    model = fill(nn.Sequential(*[nn.Linear(2, 2) for _ in range(11)]), 0)
    masks = Sparsifier(model, 'row', 'local', 'large_final', layer_type=nn.Linear).sparsify_model(50)
    masks.save(tmp_path/'m.safetensors')
    assert list(Masks.load(tmp_path/'m.safetensors')) == list(masks)

def test_density_is_a_count():
    model, masks = masked(asked=37, granularity='weight')
    gone = sum(int((~full(masks, n, model[int(n)])['weight']).sum()) for n in '03')
    assert masks.sparsity == 100*gone/(model[0].weight.numel() + model[3].weight.numel())
    assert sum(int((m.weight == 0).sum()) for m in (model[0], model[3])) >= gone

@pytest.mark.parametrize('grans', [('weight', 'weight'), ('filter', 'filter'), ('filter', 'weight'), ('kernel', Tile(o=3))], ids=str)
def test_set_algebra(grans):
    (_, a), (_, b) = masked(0, 50, grans[0]), masked(1, 70, grans[1])
    if set(a) != set(b): a, b = (Masks({n: m for n, m in x.masks.items() if not m.follows}) for x in (a, b))
    nothing, everything = a & ~a, a | ~a
    assert a & b == b & a and a | b == b | a and a ^ b == b ^ a and ~~a == a and a & a == a and a | a == a
    assert ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b and a - b == a & ~b and a ^ b == (a - b) | (b - a)
    assert nothing.sparsity == 100 and everything.sparsity == 0 and a & everything == a and a | nothing == a
    assert abs((a & b).density + (a | b).density - a.density - b.density) < 1e-9 and a != b and a != 3
    c = a.copy()
    next(iter(c.masks.values())).keep.logical_not_()
    assert c != a

def test_from_model_finds_what_is_zero():
    for g in ('weight', 'filter', 'kernel'):
        model, masks = masked(3, 50, g)
        with torch.no_grad():
            for m in (model[0], model[3]): m.weight[m.weight == 0] = 1
        masks.apply(model)
        found = Masks.from_model(model, g, nn.Conv2d)
        assert found == masks, g
    assert Masks.from_model(fill(zoo(), 0, 'zeros')).sparsity == 100

@pytest.mark.parametrize('make', [lambda: nn.MultiheadAttention(8, 4), lambda: nn.MultiheadAttention(8, 4, kdim=6, vdim=5)], ids=['packed', 'kdim'])
def test_attention_heads_die_whole(make):
    model = fill(nn.Sequential(make()), 0, 'constant')
    a = model[0]
    masks = Sparsifier(model, 'head', 'local', 'large_final', layer_type=nn.MultiheadAttention).sparsify_model(50)
    dead = [h for h in range(4) if not a.out_proj.weight[:, 2*h:2*h+2].any()]
    assert len(dead) == 2 and masks.held(model)
    alive = [h for h in range(4) if h not in dead]
    parts = a.in_proj_weight.split(8) if a.in_proj_weight is not None else (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    for w in (*parts, *a.in_proj_bias.split(8)):
        assert all(bool((w[2*h:2*h+2] != 0).all()) for h in alive), 'a living head lost something'
        assert not any(w[2*h:2*h+2].any() for h in dead), 'a dead head keeps a projection or its bias'
    assert (a.out_proj.bias != 0).all() and all(bool((a.out_proj.weight[:, 2*h:2*h+2] != 0).all()) for h in alive)

@pytest.mark.parametrize('case', [c for c in CASES if c.split()[0] in ('Conv1d', 'Conv2d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d', 'Linear', 'Bilinear')],
                         ids=lambda x: x.replace(' ', '-'))
def test_biases_follow_their_outputs_and_only_those(case):
    for granularity in Granularities.available(kind_of(case)):
        model = build(case, 0, 'constant')
        a, u = model['a'], oracle_units(model['a'], granularity)[0]
        masks = Sparsifier(model, granularity, 'local', 'large_final', layer_type=kind_of(case)).sparsify_model(50)
        lanes = u._lanes(' '.join(x for x in u.axes if x not in ('g', 'o')))
        one_unit = all(len(set(l.tolist())) == 1 for l in lanes) # what an output is made of is one unit, or part of one
        keep = per_unit(u, full(masks, 'a', a))
        want = np.array([keep[l[0]] for l in lanes]) if one_unit else np.ones(len(lanes), bool)
        assert ((a.bias.detach().numpy() != 0) == want).all(), granularity

def test_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    fill(model, 0)
    layers = layers_of(model)
    assert list(layers) == ['0', '2']
    masks = Sparsifier(model, 'weight', 'global', 'large_final', layer_type=(nn.Embedding, nn.Linear)).sparsify_model(50)
    assert masks.total == 112 and sum(m.dead() for m in masks.masks.values()) == 56
    assert model[1].weight is model[0].weight and SparsityReport(model, disk=False).total['weights'] == 112


# --- sparsities

def test_lists_dicts_and_globs():
    def net(): return fill(nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)]), 0)
    zeros = lambda masks: {n: m.dead() for n, m in masks.masks.items() if not m.follows}
    s = lambda **kw: Sparsifier(net(), 'weight', 'local', 'large_final', layer_type=nn.Linear, **kw)
    assert zeros(s().sparsify_model([10, 20, 0, 40])) == {'0.weight': 10, '1.weight': 20, '2.weight': 0, '3.weight': 40}
    assert zeros(s().sparsify_model((10, 20, 0, 40))) == zeros(s().sparsify_model({'0': 10, '1': 20, '2': 0, '3': 40}))
    assert zeros(s().sparsify_model({'1': 20})) == {'1.weight': 20}
    assert zeros(s().sparsify_model({'[0-2]': 30, '1': 60})) == {'0.weight': 30, '1.weight': 60, '2.weight': 30} # a name wins over a glob
    assert zeros(s(exclude='0').sparsify_model([20, 0, 40])) == {'1.weight': 20, '2.weight': 0, '3.weight': 40}
    frozen = s()
    frozen.model[1].requires_grad_(False)
    f = Sparsifier(frozen.model, 'weight', 'local', 'large_final', layer_type=nn.Linear)
    assert zeros(f.sparsify_model([10, 20, 30, 40])) == {'0.weight': 10, '2.weight': 30, '3.weight': 40} # the list counts frozen layers too

def test_layers_are_in_the_order_of_the_model():
    model = nn.ModuleDict(dict(z=nn.Linear(2, 2), a=nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Linear(2, 2)), m=nn.Conv1d(1, 1, 1)))
    assert list(layers_of(model)) == ['z', 'a.0', 'a.2', 'm']
    assert list(layers_of(model, layer_type=nn.Linear)) == ['z', 'a.2'] and list(layers_of(model, exclude=('a.*',))) == ['z', 'm']
    class Mine(nn.Linear): pass
    assert list(layers_of(nn.Sequential(Mine(2, 2)), layer_type=nn.Linear)) == ['0']


# --- copies

@pytest.mark.parametrize('copier', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['deepcopy', 'pickle'])
def test_copies_behave_the_same(copier):
    for name, c in criteria.items():
        d = copier(c)
        w, r = torch.tensor([1., -3.]), torch.tensor([-2., 1.])
        if name != 'random': assert torch.equal(d.elementwise(w, r), c.elementwise(w, r))
    for s in schedules.values(): assert (copier(s).over(60, 7, 70) == s.over(60, 7, 70)).all()
    model, masks = masked()
    assert copier(masks) == masks
    s = Sparsifier(model, 'filter', 'local', 'movement')
    fill(model, 8)
    s.sparsify_model(25)
    t = copier(s)
    assert t.model is not s.model and t.masks == s.masks and t.sparsify_model(75) == s.sparsify_model(75)
    s.sparsify_model(100)
    assert t.masks.masks['0.weight'].keep.sum() == 2


# --- schedules

@pytest.mark.parametrize('name', schedules)
@some
@given(n_steps=st.integers(1, 400), n_epochs=st.integers(1, 20), target=st.floats(1, 100))
def test_schedules_end_where_they_should(name, n_steps, n_epochs, target):
    s = schedules[name]
    if name == 'gradual' and target < s.start_sparsity: target = s.start_sparsity
    curve = s.over(target, n_epochs, n_steps)
    assert len(curve) == n_steps and (curve >= 0).all() and (curve <= max(target, s.start_sparsity) + 1e-9).all()
    if name == 'dsd': assert curve[-1] == 0 and (n_steps < 10 or abs(curve.max() - target) < target/4)
    else: assert (np.diff(curve) >= -1e-9).all(), 'not monotone'
    if name == 'gradual': assert curve[-1] == min(target, s.start_sparsity + 5*(n_epochs - 1)) or n_epochs == 1
    elif name != 'dsd': assert abs(curve[-1] - target) < 1e-9
    assert (s.over(target, n_epochs, n_steps) == curve).all()
    if n_steps > 1: assert (np.array([s(target, (t + 1)/n_steps, n_epochs, n_steps) for t in reversed(range(n_steps))])[::-1] == curve).all() # any order of calls

@some
@given(start=st.floats(0, 1), length=st.floats(0, 1), steps=st.integers(1, 200), name=st.sampled_from(['lin', 'cos', 'agp', 'one_cycle', 'iterative', 'one_shot']))
def test_any_start_and_end(start, length, steps, name):
    s = Schedule(schedules[name].f, start=start, end=min(1., start + length), **schedules[name].kwargs)
    curve = s.over(80., 1, steps)
    assert abs(curve[-1] - 80) < 1e-9 and (np.diff(curve) >= -1e-9).all()

def test_two_runs_of_one_schedule_do_not_meet():
    for s in [*schedules.values(), iterative(4, start=.1, end=.9), gradual(20., 7., '3 steps'), Schedule(lambda p: p*p, start='2 steps', end='9 steps')]:
        a, b = s.over(60, 4, 11), s.over(90, 9, 29)
        mixed = [(s(60, (t % 11 + 1)/11, 4, 11), s(90, (t % 29 + 1)/29, 9, 29)) for t in range(58)]
        assert all(x == a[t % 11] and y == b[t % 29] for t, (x, y) in enumerate(mixed))
        assert vars(s) == vars(copy.copy(s))


# --- what is reported

def test_report_counts_as_numpy_does():
    model = fill(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(2), nn.Linear(100, 7)), 6)
    Sparsifier(model, 'filter', 'local', 'large_final').sparsify_model([25, 50])
    r = SparsityReport(model, torch.randn(2, 4, 10, 10))
    layers = {'0': model[0], '2': model[2], '3': model[3], '5': model[5]}
    assert list(r.df.layer) == list(layers)
    for name, macs in {'0': 8*4*9*100, '2': 8*2*9*25, '3': 8*6*4*25, '5': 6*100*7}.items(): # by hand: weights times positions
        row, w = r.df.set_index('layer').loc[name], layers[name].weight.detach().numpy()
        assert row.weights == w.size and row.zeros == (w == 0).sum() and abs(row.sparsity - 100*(w == 0).mean()) < 1e-9
        rows = w.transpose(1, 0, 2, 3).reshape(6, -1) if name == '3' else w.reshape(len(w), -1)
        assert row.outputs == len(rows) and row.dead == (~rows.any(1)).sum()
        assert row.macs == macs and row.macs_left == macs//w.size*np.count_nonzero(w)
    assert r.total['zeros'] == sum((m.weight == 0).sum().item() for m in layers.values()) and abs(r.sparsity - 100*r.total['zeros']/r.total['weights']) < 1e-9
    assert r.raw_bytes == sum(v.numel()*v.element_size() for v in model.state_dict().values()) and 0 < r.disk_bytes < r.raw_bytes

@pytest.mark.parametrize('case', CASES, ids=lambda x: x.replace(' ', '-'))
def test_report_counts_outputs_of_every_layer_type(case):
    model = build(case, 0, 'half_zero')
    for n, m in model.items():
        row = SparsityReport(model, disk=False).df.set_index('layer').loc[n]
        us = oracle_units(m, 'weight')
        lanes = [[w.ravel()[i] for i in u._lanes(' '.join(x for x in u.axes if x not in u.out.split()))] for u in us for w in [weights(m)[next(iter(u.ids))]]]
        assert row.weights == sum(u.n for u in us) and row.zeros == sum((w == 0).sum() for w in weights(m).values())
        assert row.outputs == sum(map(len, lanes)) and row.dead == sum(not line.any() for ls in lanes for line in ls)

@pytest.mark.parametrize('layer,x,macs', [
    (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11), 6*4*3*5), (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), (1, 4, 9, 8), 6*2*6*5*6),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3), 3*2*8*3*3*2), (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 11), 6*4*3*11),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 4*3*9*25), (lambda: nn.Linear(5, 7), (3, 5), 35), (lambda: nn.Linear(5, 7), (3, 4, 5), 140)], ids=lambda v: 'layer' if callable(v) else str(v))
def test_multiply_accumulates_by_hand(layer, x, macs):
    assert SparsityReport(nn.Sequential(layer()), torch.randn(x)).total['macs'] == macs
