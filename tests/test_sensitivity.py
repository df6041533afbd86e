"""Sensitivity analysis beside weights zeroed by hand, a model that is really smaller, and runs that were cut short."""
import copy
import json
import math
import random

import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from test_prune_bad_input import randomised
from test_properties import rng_state, snapshot
from torch import nn
from torch.nn import functional as F

from fasterai_lib.core import allocators
from fasterai_lib.core.criteria import Criteria
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.prune.sensitivity import less_is_better, Sensitivity, sensitivity_analysis
from fasterai_lib.sparse.sparsifier import Sparsifier

matplotlib.use('Agg')
G = lambda seed=1: torch.Generator().manual_seed(seed)
X, Y = torch.randn(40, 2, 6, 6, generator=G()), torch.randint(3, (40,), generator=G(2))
LEVELS = (30, 60, 90)

def net(seed=0):
    torch.manual_seed(seed)
    return randomised(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), seed).train()

def loss(m): return F.cross_entropy(m(X), Y)
def sparsifier(m, granularity='weight', **kw): return Sparsifier(m, granularity, kw.pop('context', 'local'), kw.pop('criteria', 'large_final'), **kw)
def pruner(m, **kw): return Pruner(m, X[:2], kw.pop('criteria', 'large_final'), **kw)
WHAT = {'weights': sparsifier, 'filters': lambda m: sparsifier(m, 'filter'), 'units': pruner}

def by_hand(model, layer, percent, granularity): # its loss with the smallest of one layer at zero
    m = copy.deepcopy(model).eval()
    w = m.get_parameter(f'{layer}.weight').detach().numpy()
    rows = w.reshape(len(w) if granularity == 'filter' else w.size, -1)
    order = np.argsort(np.abs(rows).mean(1, dtype=np.float64), kind='stable')
    gone = order[:min(int(len(order)*percent/100 + .5), len(order) - 1)]
    rows[gone] = 0
    if granularity == 'filter': m.get_parameter(f'{layer}.bias').detach().numpy()[gone] = 0
    with torch.no_grad(): return float(loss(m)), 100*len(gone)/len(order)


# --- what is measured

@pytest.mark.parametrize('granularity,types', [('weight', (nn.Conv2d, nn.Linear)), ('filter', nn.Conv2d)])
def test_as_zeroed_by_hand(granularity, types):
    model = net()
    found = sensitivity_analysis(sparsifier(model, granularity, layer_type=types), loss, LEVELS)
    assert len(found.df) == len(LEVELS)*len(found.layers) and found.layers == (['0', '4', '7'] if granularity == 'weight' else ['0', '4'])
    with torch.no_grad(): assert found.dense == {'loss': float(loss(copy.deepcopy(model).eval()))}
    for r in found.df.itertuples():
        assert (r.loss, r.delivered) == pytest.approx(by_hand(model, r.layer, r.asked, granularity), rel=1e-6)
        assert r.delivered == pytest.approx(100*r.zeroed/r.weights)

@pytest.mark.parametrize('context', ['local', 'global'])
def test_units_as_really_removed(context):
    model = net().double()
    found = sensitivity_analysis(Pruner(model, X[:2].double(), 'l1', context), lambda m: F.cross_entropy(m(X.double()), Y), LEVELS)
    assert found.layers == ['0', '4']
    for r in found.df.itertuples():
        small = copy.deepcopy(model)
        Pruner(small, X[:2].double(), 'l1').prune_model({r.layer: r.asked})
        with torch.no_grad(): assert r.loss == pytest.approx(float(F.cross_entropy(small.eval()(X.double()), Y)), rel=1e-9)
        assert r.delivered == pytest.approx(100*(1 - small.get_submodule(r.layer).out_channels/model.get_submodule(r.layer).out_channels))

class Six(nn.Module): # one layer cannot lose units, which only a run of the smaller model tells
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(32, 8), nn.Linear(8, 3)
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.d(F.relu(self.c(F.relu(self.b(x if x.shape[1] == 6 else x.mean(1, keepdim=True))).flatten(1))))

def test_what_cannot_go_is_left_out():
    p = Pruner(randomised(Six()), X[:2])
    assert [g.name for g in p.groups] == ['a', 'b', 'c'] # before anything was tried
    assert sensitivity_analysis(p, loss, LEVELS).layers == ['c']
    assert sensitivity_analysis(Pruner(randomised(Six()), X[:2], check=False), loss, LEVELS[:1]).layers == ['a', 'b', 'c']

class Sequence(nn.Module): # other kinds of layers
    def __init__(self):
        super().__init__()
        self.e, self.r, self.a, self.o = nn.Embedding(12, 8), nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    def forward(self, x):
        x, _ = self.r(self.e(x))
        return self.o(self.a(x, x, x)[0].mean(1))

def test_every_type_of_layer():
    torch.manual_seed(0)
    model, x = Sequence(), torch.randint(12, (20, 5), generator=G())
    f = lambda m: F.cross_entropy(m(x), Y[:20])
    found = sensitivity_analysis(sparsifier(model, layer_type=None), f, (50, 80))
    assert found.layers == ['e', 'r', 'a', 'o']
    for r in found.df.itertuples():
        m = copy.deepcopy(model).eval()
        sparsifier(m, layer_type=None).sparsify_layer(r.layer, r.asked)
        with torch.no_grad(): assert r.loss == pytest.approx(float(f(m)), rel=1e-6)
        zeros = sum(int((p == 0).sum()) for n, p in m.get_submodule(r.layer).named_parameters() if 'bias' not in n)
        assert r.zeroed == zeros

def test_frozen_layers_as_the_sparsifier_has_them():
    model = net()
    model[0].weight.requires_grad_(False)
    assert sensitivity_analysis(sparsifier(model), loss, LEVELS).layers == ['4']
    assert sensitivity_analysis(sparsifier(model, frozen=True), loss, LEVELS).layers == ['0', '4']

def test_two_of_four_and_what_is_gone_already():
    model = randomised(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 3)))
    x = torch.randn(8, 4, 6, 6, generator=G())
    f = lambda m: F.cross_entropy(m(x), Y[:8])
    assert sensitivity_analysis(sparsifier(model, context='2:4'), f, (50,)).df['delivered'].tolist() == [50]
    s = sparsifier(model)
    s.sparsify_model(50)
    calls = []
    found = sensitivity_analysis(s, lambda m: calls.append(0) or f(m), (20, 50, 75))
    assert found.df['delivered'].tolist() == [50, 50, 75] and found.df['loss'][1] == found.dense['loss'] and len(calls) == 2 # what is gone stays gone, and is not measured again

@pytest.mark.parametrize('context', ['local', 'global']) # a layer alone competes with itself
def test_limits_are_kept(context):
    found = sensitivity_analysis(sparsifier(net(), 'filter', context=context, min_kept=4, max_sparsity=40), loss, LEVELS)
    assert found.df['delivered'].max() <= 40 and found.df['delivered'].tolist()[:3] == [pytest.approx(100/3)]*3

def test_scores_once_per_layer():
    seen = []
    score = Criteria(lambda w: seen.append(tuple(w.shape)) or w.abs(), name='counted')
    sensitivity_analysis(sparsifier(net(), 'filter', criteria=score), loss, LEVELS)
    assert len(seen) == 2
    seen.clear()
    p = pruner(net(), criteria=score, check=False)
    sensitivity_analysis(p, loss, LEVELS)
    assert len(seen) == sum(len(g.weights) for g in p.groups)

@pytest.mark.parametrize('criteria', ['random', 'movement', 'fpgm', 'taylor', 'apoz', 'wanda', 'synflow'])
def test_any_criterion(criteria):
    model, data = net(), [(X, Y)]
    what = sparsifier(model, 'weight' if criteria in ('random', 'wanda', 'synflow', 'movement') else 'filter', criteria=criteria, data=data, loss=nn.CrossEntropyLoss())
    refs, masks, rng, before = dict(what.refs), what.masks, rng_state(), snapshot(model)
    a, b = (sensitivity_analysis(what, loss, LEVELS).df for _ in range(2))
    assert a.equals(b) and snapshot(model) == before and rng_state() == rng
    assert what.refs == refs and what.masks is masks


# --- nothing is changed

@pytest.mark.parametrize('how', WHAT)
@pytest.mark.parametrize('error', [None, RuntimeError, KeyboardInterrupt])
def test_model_is_as_before(how, error):
    model, calls = net(), []
    loss(model).backward()
    what, places = WHAT[how](model), [p.data_ptr() for p in model.parameters()]
    grads, before, rng = [p.grad.clone() for p in model.parameters()], snapshot(model), rng_state()
    def metric(m):
        calls.append(0)
        if error and len(calls) == 4: raise error('here')
        assert not m.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1), m[1].running_mean.add_(1)
        return loss(m)
    if error:
        with pytest.raises(error, match='here'): sensitivity_analysis(what, metric, LEVELS)
    else: sensitivity_analysis(what, metric, LEVELS)
    assert snapshot(model) == before and rng_state() == rng and places == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads)) and what.context.name == 'local'


# --- the file

@pytest.mark.parametrize('how', WHAT)
@pytest.mark.parametrize('at', [1, 3, 5])
def test_interrupted_and_resumed_is_undisturbed(how, at, tmp_path):
    path, calls = tmp_path/'rows.jsonl', []
    whole = sensitivity_analysis(WHAT[how](net()), loss, LEVELS)
    def metric(m):
        calls.append(0)
        if len(calls) == at + 1: raise KeyboardInterrupt
        return loss(m)
    with pytest.raises(KeyboardInterrupt): sensitivity_analysis(WHAT[how](net()), metric, LEVELS, path)
    assert len(path.read_text().splitlines()) >= at # the first line, and a row for each measurement
    if at > 1: path.write_bytes(path.read_bytes()[:-7]) # a kill in the middle of a line
    resumed = sensitivity_analysis(WHAT[how](net()), metric, LEVELS, path)
    assert resumed.df.equals(whole.df) and resumed.dense == whole.dense
    calls.clear()
    again = sensitivity_analysis(WHAT[how](net()), lambda m: calls.append(0) or loss(m), LEVELS, path)
    assert again.df.equals(whole.df) and len(calls) == 1 # the dense model, to see that it is the same
    more = sensitivity_analysis(WHAT[how](net()), lambda m: loss(m)*(1 + 1e-5), (30, 45, 60), str(path)) # as another machine rounds
    assert more.dense == whole.dense and more.df['asked'].unique().tolist() == [30, 45, 60] and not list(tmp_path.glob('*.part'))

def other_weights(m): m[7].bias.data[0] += 1e-6
def other_buffer(m): m[1].num_batches_tracked += 1

@pytest.mark.parametrize('change,name', [(other_weights, 'weights'), (other_buffer, 'weights'), (dict(criteria='l1'), 'criteria'), (dict(context='per_row'), 'context'), (dict(min_kept=2), 'min_kept'),
                                         (dict(granularity='kernel'), 'granularity'), ('units', 'units'), ('data', 'dense loss'), ('metric', 'dense accuracy')])
def test_another_analysis_is_refused_with_what_differs(change, name, tmp_path):
    path, model, metric, what = tmp_path/'rows.jsonl', net(), loss, sparsifier
    sensitivity_analysis(sparsifier(net()), loss, LEVELS, path)
    before = path.read_bytes()
    if change == 'units': what = pruner
    elif change == 'data': metric = lambda m: 1.01*loss(m)
    elif change == 'metric': metric = lambda m: {'loss': loss(m), 'accuracy': .5}
    elif isinstance(change, dict): what = lambda m: sparsifier(m, **change)
    else: change(model)
    with pytest.raises(ValueError, match=f'another analysis: .*{name}'): sensitivity_analysis(what(model), metric, LEVELS, path)
    assert path.read_bytes() == before

def test_other_references_and_masks_are_another_analysis(tmp_path):
    s = sparsifier(net(), criteria='movement')
    sensitivity_analysis(s, loss, LEVELS, tmp_path/'a')
    for r in s.refs.values(): r += 1
    with pytest.raises(ValueError, match='another analysis: weights'): sensitivity_analysis(s, loss, LEVELS, tmp_path/'a')
    s = sparsifier(net())
    s.sparsify_model(50)
    sensitivity_analysis(s, loss, LEVELS, tmp_path/'b')
    with pytest.raises(ValueError, match='another analysis: weights'): sensitivity_analysis(sparsifier(s.model), loss, LEVELS, tmp_path/'b') # one that does not know what is gone

@pytest.mark.parametrize('text,message', [('hello\n', 'line 1: not a file of a sensitivity'), ('hello', 'not a file of a sensitivity'), ('{"a": 1}\n', 'line 1: not a file'), ('[1]\n', 'line 1: not a file'), (b'\xff\xfe\n', 'line 1: not a file')])
def test_a_file_of_something_else_is_left_alone(text, message, tmp_path):
    path = tmp_path/'notes.txt'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message): sensitivity_analysis(sparsifier(net()), loss, LEVELS, path)
    assert path.read_bytes() == before

@pytest.mark.parametrize('line', ['{"layer": "0"}', 'x', ''])
def test_a_damaged_row_is_named(line, tmp_path):
    path = tmp_path/'rows.jsonl'
    sensitivity_analysis(sparsifier(net()), loss, LEVELS, path)
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match='line 3: damaged'): sensitivity_analysis(sparsifier(net()), loss, LEVELS, path)

def test_paths_that_cannot_be(tmp_path):
    for path, error, message in [(3, TypeError, 'path: a file name, got 3'), (tmp_path, ValueError, 'is a folder'), (tmp_path/'no'/'rows', ValueError, 'there is no folder')]:
        with pytest.raises(error, match=message): sensitivity_analysis(sparsifier(net()), loss, LEVELS, path)


# --- bad input

@pytest.mark.parametrize('sparsities,message', [(50, r'several percentages, such as \(25, 50, 75\), got 50'), ('50', 'several percentages'), ({'0': 50}, 'several percentages'), ((), 'at least one'),
                                                ((10, 101), 'between 0 and 100'), ((-1,), 'between 0 and 100'), ((10, 'x'), 'must be a percentage'), ((True,), 'must be a percentage'), ((float('nan'),), 'between 0 and 100')])
def test_bad_sparsities(sparsities, message):
    with pytest.raises((ValueError, TypeError), match=message): sensitivity_analysis(sparsifier(net()), loss, sparsities)

@pytest.mark.parametrize('metric,message', [(None, 'metric must be a function'), ('loss', 'metric must be a function'), (lambda m: m(X), 'of shape'), (lambda m: 'low', "'low'"), (lambda m: {}, 'empty dict'), (lambda m: None, 'None'),
                                            (lambda m: {'weights': 1.}, "'weights' is taken"), (lambda m: {'dense loss': 1.}, "'dense loss' is taken"), (lambda m: math.nan, 'of the dense model is nan'), (lambda m: torch.tensor(math.inf), 'is inf')])
def test_bad_metrics(metric, message):
    model = net()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message): sensitivity_analysis(sparsifier(model), metric, LEVELS)
    assert snapshot(model) == before

def test_bad_subjects():
    frozen = net().requires_grad_(False)
    for what, error, message in [(net(), TypeError, 'a Sparsifier or a Pruner.*got Sequential'), (None, TypeError, 'NoneType'), (sparsifier(frozen), ValueError, 'all frozen'),
                                 (Pruner(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), X[:2]), ValueError, 'nothing can be removed from Sequential')]:
        with pytest.raises(error, match=message): sensitivity_analysis(what, loss, LEVELS)
    with pytest.raises(ValueError, match='a Pruner keeps at least one unit'): sensitivity_analysis(pruner(net()), loss, (50, 100))
    with pytest.raises(ValueError, match=r"'2:4' means a sparsity of 50 %: pass sparsities=\(50,\)"):
        sensitivity_analysis(Sparsifier(nn.Conv2d(4, 8, 3), 'weight', '2:4', 'large_final'), loss, LEVELS)
    with pytest.raises(ValueError, match='looks at data'): sensitivity_analysis(sparsifier(net(), criteria='taylor'), loss, LEVELS)
    names = iter(['a', 'b'])
    with pytest.raises(ValueError, match='metric gave a for the dense model, and b for 0 at 30 %'): sensitivity_analysis(sparsifier(net()), lambda m: {next(names): 1.}, LEVELS)


# --- the result

def made(values, dense, metric='accuracy'): # {layer: [values at 25, 50, 75]}
    return Sensitivity([dict(layer=n, asked=s, delivered=s + 1., weights=100, zeroed=int(s) + 1, values={metric: v}) for n, vs in values.items() for s, v in zip((25., 50., 75.), vs)], {metric: dense})

def test_caps_curves_and_ranking_by_hand():
    found = made({'a': [.9, .8, .7], 'b': [.89, .9, .2], 'c': [.5, .9, .9], 'd': [.95, math.nan, .9]}, .9)
    assert found.caps(.0) == {'a': 25, 'b': 0, 'c': 0, 'd': 25}
    assert found.caps(.1001) == {'a': 50, 'b': 50, 'c': 0, 'd': 25} and found.caps(1) == {'a': 75, 'b': 75, 'c': 75, 'd': 25}
    assert found.caps(.1001, more_is_better=False) == {'a': 75, 'b': 75, 'c': 75, 'd': 25}
    assert found.most_sensitive().to_dict() == pytest.approx({'d': math.inf, 'b': (.01 + 0 + .7)/3, 'c': .4/3, 'a': .1}) and list(found.most_sensitive(2).index) == ['d', 'b']
    assert found.curves['a'] == [(0, -.9), (26, -.9), (51, -.8), (76, -.7)] # less is better
    rising = made({'a': [1, 2, 3], 'b #2': [1, 1, 1], 'b': [2, 1, 1]}, 1., 'valid_loss')
    assert rising.caps(.5) == {'a': 25, 'b': 0} and rising.curves['b'] == [(0, 1), (26, 2), (51, 1), (76, 1)]

@pytest.mark.parametrize('how,types', [('weights', (nn.Conv2d,)), ('filters', (nn.Conv2d,)), ('units', None)])
def test_caps_are_what_a_plan_takes(how, types):
    model = net()
    with torch.no_grad(): dense = model.eval()(X)
    found = sensitivity_analysis(WHAT[how](model), lambda m: F.mse_loss(m(X), dense))
    caps = found.caps(found.df['loss'].median())
    assert any(caps.values()) and found.dense == {'loss': 0}
    plan = WHAT[how](model).plan(caps)
    for n, cap in caps.items():
        if not cap: continue
        row = found.df[(found.df['layer'] == n) & (found.df['asked'] == cap)].iloc[0]
        if how == 'units': assert dict((g[0], 100*(1 - g[2]/g[1])) for g in plan.groups)[n] == pytest.approx(row['delivered'])
        else: assert plan.masks[f'{n}.weight'].dead() == row['zeroed']

def test_curves_are_what_the_allocator_takes():
    p = pruner(net())
    with torch.no_grad(): dense = net().eval()(X)
    found = sensitivity_analysis(p, lambda m: F.mse_loss(m(X), dense), LEVELS)
    scores, sizes = {g.name: p.scores(g) for g in p.groups}, {g.name: g.size for g in p.groups}
    keep = allocators.allocate(scores, sizes, .5*sum(g.numel for g in p.groups), allocator='sensitivity', curves=found.curves, caps=found.caps(found.df['loss'].max()))
    share = {n: float(k.float().mean()) for n, k in keep.items()}
    first, last = found.most_sensitive().index[[0, -1]]
    assert 0 < share[last] < share[first] <= 1

@pytest.mark.parametrize('call,message', [(lambda s: s.caps(-1), 'drop must be a number >= 0'), (lambda s: s.caps('1%'), "got '1%'"), (lambda s: s.caps(True), 'drop'), (lambda s: s.caps(math.nan), 'drop'), (lambda s: s.caps(.1, 'acuracy'), "'acuracy' was not measured.*accuracy"),
                                          (lambda s: s.plot('lots'), "'lots' was not measured"), (lambda s: s.most_sensitive(0), 'n must be at least 1'), (lambda s: s.most_sensitive(metric='f1'), 'was not measured')])
def test_bad_questions(call, message):
    with pytest.raises((ValueError, TypeError), match=message): call(made({'a': [.9, .8, .7]}, .9))

def test_plot():
    import matplotlib.pyplot as plt
    found = made({f'l{i}': [.9, .8 - i/100, .7 - i/20] for i in range(9)}, .9)
    ax = found.plot(n=3)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['l8', 'l7', 'l6', '6 other layers', 'dense'] and len(ax.lines) == 10
    assert ax.lines[0].get_xdata().tolist() == [0, 26, 51, 76] and ax.lines[0].get_ydata().tolist() == [.9, .9, .8, .7]
    assert len({l.get_color() for l in found.plot(n=99).lines}) == 9 # seven, the others, dense
    _, mine = plt.subplots()
    assert found.plot(ax=mine) is mine
    plt.close('all')


# --- in a Learner

def learner(path='.', metrics=accuracy, cbs=None, seed=0):
    dls = DataLoaders.from_dsets(list(zip(X[:20], Y[:20])), list(zip(X[20:], Y[20:])), bs=8, num_workers=0, device='cpu')
    return Learner(dls, net(seed), loss_func=nn.CrossEntropyLoss(), metrics=metrics, path=path, cbs=cbs)

def everything(learn): # that a fit or a validation could change
    flat = lambda o: {k: (type(v), id(v) if hasattr(v, '__dict__') and not hasattr(v, 'items') else repr(v)) for k, v in vars(o).items()}
    return [snapshot(learn.model), rng_state(), flat(learn), [(id(c), flat(c)) for c in learn.cbs], [(id(m), flat(m)) for m in [*learn.metrics, learn.recorder.loss, learn.recorder.smooth_loss]],
            repr(learn.opt.state_dict() if learn.opt else None), learn.dls.valid.rng.getstate(), learn.dls.train.rng.getstate()]

@pytest.mark.parametrize('error', [None, KeyboardInterrupt])
def test_learner_is_as_before(error, tmp_path):
    learn = learner(tmp_path, cbs=[SaveModelCallback(), CSVLogger()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    files, before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}, everything(learn)
    if error:
        calls, plain = [], learn.loss_func
        def stops(*args):
            calls.append(0)
            if len(calls) == 12: raise error
            return plain(*args)
        learn.loss_func = stops
        with pytest.raises(error): learn.sensitivity()
        learn.loss_func = plain
    else:
        for kw in ({}, dict(granularity='filter', criteria='taylor'), dict(remove=True), dict(n_batches=2)): learn.sensitivity(sparsities=LEVELS, **kw)
    assert files == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for a, b in zip(everything(learn), before): assert a == b

def test_learner_measures_loss_and_metrics():
    learn = learner()
    found = learn.sensitivity(layer_type=(nn.Conv2d, nn.Linear), sparsities=LEVELS, n_batches=None)
    assert found.items == 20 and list(found.dense) == ['loss', 'accuracy']
    for r in found.df.itertuples():
        m = copy.deepcopy(learn.model).eval()
        sparsifier(m, layer_type=(nn.Conv2d, nn.Linear)).sparsify_layer(r.layer, r.asked)
        with torch.no_grad(): out = m(X[20:])
        assert (r.loss, r.accuracy) == (pytest.approx(float(F.cross_entropy(out, Y[20:])), rel=1e-6), pytest.approx(float((out.argmax(1) == Y[20:]).float().mean())))

def test_learner_samples_its_batches():
    a, b, c = (learner().sensitivity(sparsities=(50,), n_batches=2, seed=s) for s in (0, 0, 1))
    assert a.items == 16 and a.df.equals(b.df) and a.dense != c.dense
    assert learner().sensitivity(sparsities=(50,), n_batches=99).items == 20
    assert learner().sensitivity(remove=True, sparsities=(50,), ignored='0').layers == ['4']

def test_a_model_may_write_into_its_input():
    learn = learner()
    learn.model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 6), nn.Flatten())
    learn.model[0].register_forward_pre_hook(lambda m, args: (args[0].mul_(-1),)) # the second time it would be another sign
    found = learn.sensitivity(sparsities=(0, 50), n_batches=None)
    learn.model[0]._forward_pre_hooks.clear()
    with torch.no_grad(): assert found.dense['loss'] == pytest.approx(float(F.cross_entropy(learn.model.eval()(-X[20:]), Y[20:])), rel=1e-6)
    sparsifier(learn.model).sparsify_layer('1', 50)
    with torch.no_grad(): assert found.df['loss'].tolist() == [found.dense['loss'], pytest.approx(float(F.cross_entropy(learn.model.eval()(-X[20:]), Y[20:])), rel=1e-6)]

def test_learner_goes_on_from_a_file(tmp_path):
    a = learner().sensitivity(sparsities=LEVELS, path=tmp_path/'rows')
    assert learner().sensitivity(sparsities=LEVELS, path=tmp_path/'rows').df.equals(a.df)
    assert json.loads((tmp_path/'rows').read_text().splitlines()[0])['settings']['items'] == 20
    with pytest.raises(ValueError, match='another analysis: .*items 20 there, 16 here'): learner().sensitivity(sparsities=LEVELS, n_batches=2, path=tmp_path/'rows')
    with pytest.raises(ValueError, match='another analysis: weights'): learner(seed=1).sensitivity(sparsities=LEVELS, path=tmp_path/'rows')

def metric_a(p, t): return (p.argmax(1) == t).float().mean()

@pytest.mark.parametrize('kw,message', [(dict(granularity='filter', remove=True), "granularity='filter' does not go with it"), (dict(n_batches=0), 'n_batches must be at least 1'), (dict(n_batches=1.5), 'n_batches must be a whole number'),
                                        (dict(granularity='filtre'), 'filter'), (dict(criteria='l3'), "criteria 'l3'"), (dict(layer_type=nn.Conv1d), 'no Conv1d layer'), (dict(exclude='9'), "exclude '9' matches no layer"),
                                        (dict(remove=True, context='per_row'), 'whole units compete'), (dict(remove=True, layer_type=nn.Linear), 'layer_type'), (dict(colour=1), 'colour'), (dict(sparsities=()), 'at least one')])
def test_bad_arguments_of_the_learner(kw, message):
    learn = learner()
    before = everything(learn)
    with pytest.raises((ValueError, TypeError), match=message): learn.sensitivity(**kw)
    for a, b in zip(everything(learn), before): assert a == b

def test_learners_that_cannot():
    train = DataLoaders.from_dsets(list(zip(X, Y)), bs=8, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='no validation set'): Learner(train, net(), loss_func=nn.CrossEntropyLoss()).sensitivity()
    empty = DataLoaders.from_dsets(list(zip(X, Y)), [], bs=8, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='validation set is empty'): Learner(empty, net(), loss_func=nn.CrossEntropyLoss()).sensitivity()
    with pytest.raises(ValueError, match='two metrics of the Learner have one name'): learner(metrics=[metric_a, metric_a]).sensitivity()
    learn = learner()
    learn.recorder.valid_metrics = False
    with pytest.raises(ValueError, match='valid_metrics=True'): learn.sensitivity()


@pytest.mark.parametrize('name, less', [('wer', True), ('val_wer', True), ('WER', True), ('answer_accuracy', False), ('power', False), ('accuracy', False), ('valid_loss', True), ('error_rate', True), ('_rmse', True)])
def test_which_metrics_fall(name, less): assert less_is_better(name) is less
