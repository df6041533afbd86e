"""compress: what it says is true, what was asked is reached, and a killed run ends as an undisturbed one."""
import copy
import json
import math
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn

from fasterai_lib.core.allocators import allocators
from fasterai_lib.core.cost import cost
from fasterai_lib.core.latency import Timing
from fasterai_lib.core.schedule import iterative, lottery
from fasterai_lib.prune import budget as budget_module
from fasterai_lib.prune.compress import Compression, compress

pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory')


def seed(s=0):
    torch.set_num_threads(1)
    torch.manual_seed(s)
    random.seed(s)
    np.random.seed(s)

@pytest.fixture(autouse=True)
def seeded(): seed()

def images(n, s=0):
    g = torch.Generator().manual_seed(s)
    y = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 1, 8, 8, generator=g)
    for i, c in enumerate(y): x[i, 0, c] += 2.
    return list(zip(x, y))

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(.1), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))

def learner(model=None, metrics=accuracy, s=0, **kw):
    seed(s)
    dls = DataLoaders.from_dsets(images(24), images(16, 1), bs=8, val_bs=16, device='cpu', num_workers=0)
    learn = Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), metrics=metrics, **kw)
    learn.remove_cb(ProgressCallback)
    return learn

def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def metrics_of(learn):
    with learn.no_bar(), learn.no_logging(): return list(learn.validate())
def counted(learn): return cost(learn.model, (torch.zeros(2, 1, 8, 8),), latency=False).total
def plain(df): return df.drop(columns='seconds', errors='ignore')


# --- what it says is true

class Watch: # trains, and writes down what there is before and after, on its own
    def __init__(self): self.before, self.after = [], []
    def __call__(self, learn):
        self.before.append((counted(learn), metrics_of(learn)))
        learn.fit(1, 1e-2)
        self.after.append((counted(learn), metrics_of(learn)))

@pytest.mark.parametrize('kw, objective', [({}, '40% macs'), (dict(context='local', schedule='lin'), ['50% parameters', '60% macs']), (dict(remove=False), '30% nonzero'), (dict(remove=False, granularity='filter', criteria='taylor'), '50% effective_macs'), (dict(criteria='taylor', context='knapsack'), '3 kB disk')])
def test_every_row_is_true(kw, objective):
    learn, watch = learner(), Watch()
    dense, first = counted(learn), metrics_of(learn)
    r = compress(learn, objective, steps=3, fine_tune=watch, keep_best=False, **kw)
    df = r.df
    assert len(df) == 4 and list(df.step) == [0, 1, 2, 3] and df.kept.all() and r.reached and list(df.done)[-1] == 1 and df.done.is_monotonic_increasing
    for q in ('parameters', 'nonzero', 'macs', *[o.name for o in r.costs]):
        assert df[q][0] == dense[q]
        assert [df[q][t + 1] for t in range(3)] == [watch.after[t][0][q] for t in range(3)]
        if f'{q} measured' in df or f'{q} predicted' in df: assert not df[f'{q} asked'][1:].isna().any()
    for i, m in enumerate(('valid_loss', 'accuracy')):
        assert df[m][0] == pytest.approx(first[i])
        assert list(df[f'{m} pruned'][1:]) == pytest.approx([w[1][i] for w in watch.before]) and list(df[m][1:]) == pytest.approx([w[1][i] for w in watch.after])
    for o in r.costs:
        got, want = counted(learn)[o.name], o.target(dense[o.name])
        assert got <= want and got >= (.97 if not kw.get('remove', True) and 'granularity' not in kw else .75)*want # whole units, of those that the step before has left
    assert 'reached in 3 steps' in repr(r) and 'seconds' in df

def test_counted_costs_within_one_percent():
    for q in ('macs', 'parameters', 'disk', 'memory', 'nonzero'):
        seed()
        m = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
        learn = learner(m)
        before = counted(learn)[q]
        r = compress(learn, f'30% {q}', steps=2, fine_tune=0)
        got = counted(learn)[q]/before
        assert r.reached and .28 <= got <= .3 # whole units
    for q in ('nonzero', 'effective_macs'):
        learn = learner()
        before = counted(learn)[q]
        assert compress(learn, f'30% {q}', steps=2, remove=False).reached
        assert .297 <= counted(learn)[q]/before <= .3


# --- floors

def falling(f, name='accuracy', **kw): # the metric is a function of the share of parameters that are left
    seed()
    m = net()
    n = sum(p.numel() for p in m.parameters())
    def score(): return f(sum(p.numel() for p in m.parameters())/n)
    def metric(inp, targ): return torch.tensor(score())
    metric.__name__ = name
    return learner(m, metrics=[metric], **kw)

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), Adam])
def test_floors_restore_what_was_kept(opt):
    learn, kept = falling(lambda left: .9 if left > .5 else .5, opt_func=opt), []
    learn.fit(1, 1e-2)
    def train(learn):
        learn.fit(1, 1e-2)
        kept.append((state(learn), copy.deepcopy(learn.opt.state_dict())))
    r = compress(learn, ['20% parameters', 'accuracy >= dense - 1'], steps=4, schedule='lin', fine_tune=train, retries=2, keep_best=False)
    df = r.df
    assert not r.reached and df.accuracy[df.kept].ge(.89).all() and df.accuracy[~df.kept].lt(.89).all() and (~df.kept).sum() >= 1
    last = df.index[df.kept][-1]
    assert same(state(learn), kept[last - 1][0])
    now, was = learn.opt.state_dict(), kept[last - 1][1]
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for a, b in zip(now['state'], was['state']) for k in a)
    assert counted(learn)['parameters'] == df.parameters[last] and f'stopped {100*df.done[last]:.0f} % of the way' in repr(r) and 'asks for 0.89' in repr(r)
    learn.fit(1, 1e-3) # the optimizer goes on

def test_retries_halve_the_step():
    for retries, rows in ((0, 1), (1, 2), (3, 4)):
        learn = falling(lambda left: .9 if left > .99 else .5)
        before = state(learn)
        r = compress(learn, ['20% parameters', 'accuracy >= dense - 1'], steps=1, fine_tune=0, retries=retries)
        assert list(r.df.done[1:]) == [1/2**k for k in range(rows)] and not r.df.kept[1:].any() and not r.reached and same(before, state(learn))

def test_floors_of_other_kinds():
    r = compress(falling(lambda left: .1/left, 'error_rate'), ['20% parameters', 'error_rate <= dense + 5'], steps=3, schedule='lin', fine_tune=0, retries=0)
    assert not r.reached and r.df.error_rate[r.df.kept].le(.15 + 1e-6).all() and r.less
    r = compress(falling(lambda left: math.nan if left < .5 else .9), ['20% parameters', 'accuracy >= dense - 1'], steps=2, fine_tune=0, retries=0)
    assert not r.reached and not r.df.accuracy[r.df.kept].isna().any()
    assert compress(falling(lambda left: .9), ['50% parameters', 'accuracy >= 89'], steps=2, fine_tune=0).reached
    r = compress(falling(lambda left: .9 if left > .5 else .5), ['20% nonzero', 'accuracy >= 89'], steps=2, fine_tune=0, remove=False)
    assert r.reached # zeros are still parameters


# --- killed, and gone on with

class Boom(Exception): pass
class Kill(Callback): # in the fit of step k
    def __init__(self, k, how): self.k, self.how, self.fits = k, how, 0
    def before_train(self): self.fits += 1
    def after_batch(self):
        if self.training and self.fits == self.k and self.iter == 1: self.how()
def boom(): raise Boom('in the middle')
def bye(): os._exit(3)

CASES = {'adam': dict(opt=Adam), 'sgd': dict(opt=partial(SGD, mom=.9)), 'taylor': dict(opt=Adam, criteria='taylor', context='local'), 'movement': dict(opt=Adam, criteria='movmag', context='local'), 'masks': dict(opt=Adam, remove=False, objective='30% nonzero'),
         'masks movement': dict(opt=partial(SGD, mom=.9), remove=False, criteria='movmag', objective='30% nonzero'), 'masks taylor': dict(opt=Adam, remove=False, granularity='filter', criteria='taylor', objective='50% effective_macs'),
         'discriminative': dict(opt=Adam, fine_tune=lambda l: l.fit_one_cycle(1, slice(1e-4, 1e-2)), splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())]), 'torch': dict(opt=partial(OptimWrapper, opt=torch.optim.AdamW)), 'netadapt': dict(opt=Adam, context='netadapt', n_batches=1)}

def go(case, path=None, cbs=(), s=0):
    kw = dict(CASES[case])
    learn = learner(opt_func=kw.pop('opt'), cbs=list(cbs), s=s, **({'splitter': kw.pop('splitter')} if 'splitter' in kw else {}))
    return learn, lambda: compress(learn, kw.pop('objective', '45% macs'), steps=3, path=path, **{'fine_tune': 1, **kw})

@pytest.mark.parametrize('case', CASES)
def test_killed_and_gone_on_with_is_undisturbed(case, tmp_path):
    learn, run = go(case)
    want = run()
    for k in (1, 2, 3) if case in ('adam', 'masks') else (3,):
        path = tmp_path/f'{k}'
        broken, run = go(case, path, [Kill(k, boom)])
        with pytest.raises(Boom): run()
        random.random(), torch.rand(3), np.random.rand(2)
        again, run = go(case, path)
        got = run()
        assert same(state(learn), state(again)), k
        pd.testing.assert_frame_equal(plain(got.df), plain(want.df))
        assert got.reached == want.reached
        a, b = learn.opt.state_dict(), again.opt.state_dict()
        if case != 'torch': assert all(torch.equal(x[n], y[n]) if isinstance(x[n], torch.Tensor) else x[n] == y[n] for x, y in zip(a['state'], b['state']) for n in x) and a['hypers'] == b['hypers']
        learn2, run = go(case, path) # finished: the same log, at once
        calls = []
        learn2.add_cb(Kill(1, lambda: calls.append(1)))
        log = (path/'log.json').read_text()
        assert plain(run().df).equals(plain(got.df)) and same(state(learn2), state(again)) and not calls and (path/'log.json').read_text() == log
    for l in (learn, again): seed(5); l.fit(1, 1e-3)
    assert [tuple(p.shape) for p in learn.model.parameters()] == [tuple(p.shape) for p in again.model.parameters()]

def test_killed_for_real(tmp_path):
    learn, run = go('adam')
    want = run()
    p = subprocess.run([sys.executable, __file__, '--killed', str(tmp_path/'run')], capture_output=True, text=True, timeout=120)
    assert p.returncode == 3, p.stderr[-2000:]
    assert json.loads((tmp_path/'run'/'log.json').read_text())['step'] == 1
    again, run = go('adam', tmp_path/'run')
    got = run()
    assert same(state(learn), state(again)) and plain(got.df).equals(plain(want.df))

def test_floors_survive_a_kill(tmp_path):
    def run(path=None, cbs=()):
        learn = falling(lambda left: .9 if left > .5 else .5, cbs=list(cbs))
        return learn, lambda: compress(learn, ['20% parameters', 'accuracy >= dense - 1'], steps=2, schedule='lin', path=path)
    learn, f = run()
    want = f()
    for k in range(1, len(want.df)):
        broken, f = run(tmp_path/f'{k}', [Kill(k, boom)])
        with pytest.raises(Boom): f()
        again, f = run(tmp_path/f'{k}')
        got = f()
        assert plain(got.df).equals(plain(want.df)) and same(state(learn), state(again)) and got.state['stopped'] == want.state['stopped'] and repr(got) == repr(want)

def test_another_run_in_the_folder(tmp_path):
    learn = learner()
    compress(learn, '50% macs', steps=1, fine_tune=0, path=tmp_path/'run')
    for kw, says in ((dict(objective='40% macs'), "objective was .*50% macs.* there and is .*40% macs"), (dict(criteria='random'), 'criteria was'), (dict(context='local'), "context was 'knapsack' there and is 'local' here"), (dict(steps=2), 'steps was 1 there and is 2'), (dict(fine_tune=2), 'fine_tune was'),
                     (dict(remove=False), 'remove was'), (dict(schedule='lin'), 'schedule was'), (dict(schedule=iterative(4)), 'schedule was'), (dict(round_to=2), 'round_to was None there and is .2. here'), (dict(keep_best=False), 'keep_best was'), (dict(min_kept=3), 'min_kept'), (dict(model=1), 'model was')):
        other = learner(s=kw.pop('model', 0))
        before = state(other)
        with pytest.raises(ValueError, match=f'holds another run: .*{says}'):
            compress(other, **{**dict(objective='50% nonzero' if kw.get('remove') is False else '50% macs', steps=1, fine_tune=0, path=tmp_path/'run'), **kw})
        assert same(before, state(other)) and other.opt is None

@pytest.mark.parametrize('file, text, says', [('settings.json', '{', 'settings.json: not of a run'), ('settings.json', '[]', 'settings.json: not of'), ('log.json', '{"step"', 'log.json: not of a run'), ('log.json', '{}', 'missing'), ('step_1.state', 'x', 'step 1 cannot be read'), ('step_1.state', None, 'step 1 cannot be read'),
                                              ('step_1.safetensors', 'xxxxxxxxxxxxxx', 'step 1 cannot be read'), ('step_1.safetensors', None, 'step 1 cannot be read'), ('step_1.masks', 'x', 'step 1 cannot be read')])
def test_damaged_files(tmp_path, file, text, says):
    masks = file.endswith('masks')
    run = lambda: (l := learner(), lambda: compress(l, '50% nonzero' if masks else '50% macs', steps=1, fine_tune=1, remove=not masks, path=tmp_path/'run'))
    run()[1]()
    if text is None: (tmp_path/'run'/file).unlink()
    else: (tmp_path/'run'/file).write_text(text)
    learn, again = run()
    before = state(learn)
    with pytest.raises(ValueError, match=says): again()
    assert same(before, state(learn)) and learn.opt is None and [tuple(p.shape) for p in learn.model.parameters()] == [tuple(p.shape) for p in net().parameters()]
    learn.fit(1)


# --- training

def test_masks_hold_and_the_learner_goes_on():
    learn = learner()
    r = compress(learn, '20% nonzero', remove=False, steps=2, fine_tune=2)
    zero = {n: (p == 0).clone() for n, p in learn.model.named_parameters()}
    masks = r.maker.masks
    for n, mask in masks.masks.items(): assert zero[n][~mask.full(zero[n].shape)].all()
    assert counted(learn)['nonzero'] == r.df.nonzero.iloc[-1]
    learn = learner()
    r = compress(learn, '50% macs', steps=2)
    opt = learn.opt
    learn.fit(1)
    assert learn.opt is not None and {id(p) for p in opt.all_params().itemgot(0)} == {id(p) for p in learn.model.parameters()}
    assert not [cb for cb in learn.cbs if 'Mask' in type(cb).__name__ or 'KeepBest' in type(cb).__name__]

def test_keep_best_keeps_the_best():
    for best, name, values in ((2, 'accuracy', [.3, .2, .9, .4]), (1, 'rmse', [.3, .2, .9, .4]), (0, 'accuracy', [.9, .2, .9, .4]), (3, 'accuracy', [math.nan, .2, .3, .4])):
        seen = []
        class Score(Callback):
            trained = False
            def before_train(self): self.trained = True
            def after_epoch(self):
                if self.trained: seen.append(state(self.learn))
                self.trained = False
        def metric(inp, targ): return torch.tensor(values[min(len(seen), 3)])
        metric.__name__ = name
        learn = learner(metrics=[metric], cbs=[Score()])
        compress(learn, '60% macs', steps=1, fine_tune=4)
        assert len(seen) == 4 and [same(state(learn), s) for s in seen] == [i == best for i in range(4)]

def test_no_training_and_own_training():
    learn = learner()
    r = compress(learn, '50% macs', steps=2, fine_tune=0)
    assert learn.opt is None and list(r.df['accuracy'][1:]) == list(r.df['accuracy pruned'][1:])
    seen = []
    def mine(learn): seen.append(learn); learn.fit_one_cycle(1, 1e-3)
    assert compress(learner(), '50% macs', steps=2, fine_tune=mine).reached and len(seen) == 2

@pytest.mark.parametrize('schedule', ['agp', 'lin', 'one_shot', 'iterative', 'cos', 'one_cycle', lottery(3), iterative(2)])
def test_schedules(schedule):
    r = compress(learner(), '50% macs', steps=3, schedule=schedule, fine_tune=0)
    assert r.reached and r.df.done.is_monotonic_increasing and r.df.macs.iloc[-1] <= .5*r.df.macs[0]

@pytest.mark.parametrize('context', ['local', *(a for a in allocators if a != 'balanced')])
@pytest.mark.parametrize('remove', [True, False])
def test_every_allocator_runs(context, remove):
    learn = learner()
    r = compress(learn, '50% macs' if remove else '50% nonzero', context=context, remove=remove, steps=2, fine_tune=0, n_batches=1)
    q = 'macs' if remove else 'nonzero'
    assert r.reached and .8*.5 <= counted(learn)[q]/r.df[q][0] <= .5

def test_latency_with_a_clock_of_our_own(monkeypatch):
    def clock(models, **kw): return [Timing([1e-9*sum(p.numel() for p in m.parameters())], batch=2) for m, _ in models]
    monkeypatch.setattr(budget_module, 'time_models', clock)
    monkeypatch.setattr(budget_module.Predictor, 'latency', lambda self, counts=None: 1e-9*self.parameters(counts) + 1e-6)
    for ask in ('2x latency', '2x throughput'):
        learn = learner()
        r = compress(learn, ask, steps=2, fine_tune=0)
        assert r.reached and .45 <= r.df.latency.iloc[-1]/r.df.latency[0] <= .525 and 'reference' not in r.df

def test_kinds_of_learners():
    learn = learner(metrics=None)
    r = compress(learn, '50% macs', steps=1)
    assert r.reached and r.monitor == 'valid_loss' and r.less
    learn = learner(nn.DataParallel(net()))
    assert compress(learn, '30% macs', steps=1).reached and learn.model.module[3].out_channels < 16
    learn = learner(metrics=[accuracy, error_rate])
    r = compress(learn, {'macs': '50%', 'accuracy': '>= 0', 'error_rate': '<= 100'}, steps=1, keep_best='error_rate')
    assert r.reached and r.less
    learn = learner()
    r = learn.compress('50% macs', steps=1, example_inputs=torch.zeros(1, 1, 8, 8), check=False)
    assert r.reached and isinstance(r, Compression)

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 6, 3), nn.Linear(14, 4)
    def forward(self, x, y): return self.head(torch.cat([self.a(x).relu().mean((2, 3)), self.b(y).relu().mean((2, 3))], 1))

def test_several_inputs():
    items = [(x, x.flip(1), y) for x, y in images(24)]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0)
    dls.n_inp = 2
    learn = Learner(dls, Two(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    assert compress(learn, '50% macs', criteria='taylor', steps=2).reached and learn.model.head.in_features < 14

def test_plot():
    import matplotlib
    matplotlib.use('Agg')
    r = compress(falling(lambda left: .9 if left > .5 else .5), ['20% parameters', 'accuracy >= dense - 1'], steps=3, schedule='lin', fine_tune=0)
    ax = r.plot()
    assert ax.get_xlabel().startswith('parameters') and ax.get_ylabel() == 'accuracy' and len(ax.texts) == len(r.df)
    assert r.plot('macs', 'valid_loss', ax=ax) is ax
    for kw in (dict(cost='latncy'), dict(metric='accurcy')):
        with pytest.raises(ValueError, match='not in the log'): r.plot(**kw)
    assert 'stopped' in repr(r)


# --- mistakes

@pytest.mark.parametrize('kw, error, says', [
    (dict(objective=['50% macs', 'acuracy >= 90']), ValueError, "no metric 'acuracy'; did you mean 'accuracy'"), (dict(objective=['50% macs', 'accuracy >= 0.5']), ValueError, 'Did you mean 50'), (dict(objective='accuracy >= dense - 1'), ValueError, 'not what should become less'), (dict(objective='50%'), ValueError, 'of what'),
    (dict(objective=None), TypeError, 'is a text'), (dict(context='globl'), ValueError, "did you mean 'global'"), (dict(context='2:4'), ValueError, 'inside units'), (dict(context=3), TypeError, 'context must be'), (dict(criteria='nope'), ValueError, 'nope'), (dict(steps=0), ValueError, 'steps must be at least 1'), (dict(steps=2.5), TypeError, 'steps must be a whole'),
    (dict(steps=None), TypeError, 'steps'), (dict(fine_tune=-1), ValueError, 'fine_tune'), (dict(fine_tune=.5), TypeError, 'fine_tune'), (dict(fine_tune=None), TypeError, 'fine_tune'), (dict(retries=-1), ValueError, 'retries'), (dict(n_batches=0), ValueError, 'n_batches'), (dict(keep_best='f1'), ValueError, "no metric 'f1'"), (dict(schedule='dsd'), ValueError, 'goes back'),
    (dict(schedule='gradual'), ValueError, 'reaches only|goes back|no way'), (dict(schedule='agpp'), ValueError, 'agpp'), (dict(round_too=8), TypeError, 'round_too'), (dict(objective='1% macs'), ValueError, 'nearest that is possible'), (dict(objective='100 GB'), ValueError, 'there already'), (dict(objective='50% macs', remove=False), ValueError, 'zeros do not change'),
    (dict(remove=False, granularity='filtr', objective='50% nonzero'), ValueError, 'granularity'), (dict(remove=False, context='per_row', objective='50% nonzero'), ValueError, 'settles how much'), (dict(ignored='nope*'), ValueError, 'nope'), (dict(min_kept=0), ValueError, 'min_kept'), (dict(max_sparsity=130), ValueError, 'max_sparsity')])
def test_mistakes_leave_the_learner_untouched(kw, error, says, tmp_path):
    for learn in (learner(), learner(opt_func=partial(SGD, mom=.9))):
        if learn.opt_func is not Adam: learn.fit(1, 1e-2)
        before, cbs, opt = state(learn), [type(c) for c in learn.cbs], learn.opt
        held = None if opt is None else copy.deepcopy(opt.state_dict())
        with pytest.raises(error, match=says): compress(learn, **{'objective': '50% macs', 'steps': 2, 'path': tmp_path/'run', **kw})
        assert same(before, state(learn)) and [type(c) for c in learn.cbs] == cbs and learn.opt is opt and not any(p.grad is not None and opt is None for p in learn.model.parameters())
        if opt is not None: assert str(held) == str(opt.state_dict())
        if (tmp_path/'run').exists(): assert error is ValueError and 'log.json' not in os.listdir(tmp_path/'run')


if __name__ == '__main__':
    learn, run = go('adam', sys.argv[2], [Kill(2, bye)])
    run()
