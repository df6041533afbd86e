"""PruneCallback and shrink in fastai's real training loop: units really go, when they should, and training goes on."""
import copy
import math
import pickle
import random
from functools import partial

import pandas as pd
import pytest
import torch
from fastai.callback.core import *
from fastai.callback.core import Callback
from fastai.callback.fp16 import to_bf16, to_fp16
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.rnn import ModelResetter
from fastai.callback.schedule import *
from fastai.callback.tracker import *
from fastai.callback.training import *
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import *
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import *
from fastcore.basics import noop
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai_lib.core.schedule import Schedule, agp, dsd, gradual, iterative, lin, one_shot, sched_lin, schedules
from fasterai_lib.prune.prune_callback import PruneCallback, shrink
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsify_callback import MaskCallback, SparsifyCallback

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*pin_memory')


# --- small things to train

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


def images(n, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 1, 6, 6, generator=g)
    for i, c in enumerate(y): x[i, 0, c] += 2.
    return list(zip(x.to(dtype), y))


def tokens(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 12, (n, 5), generator=g)
    return list(zip(x, x[:, 0] % 4))


def loaders(n_batches=3, bs=8, items=images, device='cpu', **kwargs):
    return DataLoaders.from_dsets(items(n_batches*bs), items(16, 1), bs=bs, val_bs=16, device=device, num_workers=0, **kwargs)


IMAGES, LABELS = zip(*images(40))
def image(i): return IMAGES[i]
def label(i): return LABELS[i]
def exportable(): return Datasets(range(40), [[image], [label]], splits=[list(range(24)), list(range(24, 40))]).dataloaders(bs=8, val_bs=16, device='cpu', num_workers=0)


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 4)
    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).relu().mean((2, 3)))


class TextNet(nn.Module): # keeps its hidden state, as fastai's language models do
    def __init__(self):
        super().__init__()
        self.emb, self.lstm, self.out, self.hidden = nn.Embedding(12, 8), nn.LSTM(8, 10, batch_first=True), nn.Linear(10, 4), None
    def reset(self): self.hidden = None
    def forward(self, x):
        h = self.hidden if self.hidden is not None and self.hidden[0].shape[1] == len(x) else None
        x, h = self.lstm(self.emb(x), h)
        self.hidden = tuple(t.detach() for t in h)
        return self.out(x[:, -1])


def body_head(m): return [list(m[:6].parameters()), list(m[6:].parameters())]


@pytest.fixture
def make(tmp_path):
    def learner(n_batches=3, model=None, dls=None, items=images, metrics=accuracy, **kwargs):
        learn = Learner(dls or loaders(n_batches, items=items), model or conv_net(), loss_func=CrossEntropyLossFlat(), metrics=metrics, path=tmp_path, **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return learner


def prune(sparsity=50, context='local', criteria='large_final', schedule=agp, **kwargs): return PruneCallback(sparsity, context, criteria, schedule, **kwargs)


# --- what must be true

def sizes(m): return [m[0].out_channels, m[3].out_channels]
def left(n, percent): return n - math.floor(percent*n/100 + .5)
def snapshot(model): return {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def state_of(learn, p): return getattr(learn.opt, 'opt', learn.opt).state.get(p, {})


def consistent(m):
    "A plain model whose layers state their sizes, and that an ordinary one of these sizes can be loaded from"
    n, k = sizes(m)
    assert m[1].num_features == n == m[3].in_channels and m[4].num_features == k == m[8].in_features
    fresh = nn.Sequential(nn.Conv2d(1, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(k, 4))
    fresh.load_state_dict(m.state_dict())
    x = torch.randn(3, 1, 6, 6)
    training = m.training
    torch.testing.assert_close(fresh.eval()(x), m.eval()(x), rtol=1e-4, atol=1e-5)
    m.train(training)
    return True


class Spy(Callback):
    "Looks at each batch: sizes, optimizer state, losses"
    order = 1000
    def __init__(self): self.sizes, self.steps, self.losses = [], 0, []
    def after_step(self):
        self.steps += 1
        for p in self.learn.model.parameters():
            for k, v in state_of(self.learn, p).items(): assert not isinstance(v, torch.Tensor) or v.numel() == 1 or v.shape == p.shape, k
            assert p.grad is None or p.grad.shape == p.shape
    def after_batch(self):
        if not self.training: return
        if isinstance(self.learn.model, nn.Sequential): self.sizes.append(sizes(self.learn.model))
        if hasattr(self.learn, 'loss'): self.losses.append(float(self.learn.loss))
        assert all(p.isfinite().all() for p in self.learn.model.parameters())


class Do(Callback):
    "Do `f(learn)` at one event, at one batch"
    def __init__(self, event, f, at=None, order=0): self.at, self.f, self.order = at, f, order; setattr(self, event, self._do)
    def _do(self):
        if self.at is None or (self.learn.training and (self.epoch, getattr(self.learn, 'iter', 0)) == self.at): self.f(self.learn)


def throw(e):
    def f(learn): raise e
    return f


class Score(Metric):
    "A metric that says what we want at each epoch"
    def __init__(self, values): self.values = values
    def reset(self): pass
    def accumulate(self, learn): self.epoch = learn.epoch
    @property
    def value(self): return self.values[self.epoch]
    @property
    def name(self): return 'score'


# --- the asked number of units, at the asked batch

@pytest.mark.parametrize('name', [n for n in schedules if n not in ('dsd', 'gradual')])
@pytest.mark.parametrize('n', [1, 7])
def test_last_batch_reaches_the_target(make, name, n):
    learn, cb = make(n), prune(60, schedule=name)
    learn.fit(2, 1e-2, cbs=[cb, spy := Spy()])
    expected = [[left(6, s), left(10, s)] for s in schedules[name].over(60, 2, 2*n)]
    assert spy.sizes == expected and sizes(learn.model) == [2, 4] and spy.steps == 2*n
    assert cb.current == pytest.approx(60) and consistent(learn.model) and all(map(math.isfinite, spy.losses))


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('criterion', ['large_final', 'random', 'movement', 'updating_movmag', 'small_final'])
def test_contexts_and_criteria(make, context, criterion):
    learn, cb = make(5), prune(40, context, criterion)
    before = sum(p.numel() for p in learn.model.parameters())
    learn.fit(3, 1e-2, cbs=[cb, spy := Spy()])
    assert consistent(learn.model) and (sizes(learn.model) == [4, 6] if context == 'local' else 2 <= sum(sizes(learn.model)) < 16)
    assert cb.measured == pytest.approx(100*(1 - sum(p.numel() for p in learn.model.parameters())/before)) and cb.measured > 30
    assert spy.sizes == sorted(spy.sizes, reverse=True)


def test_global_is_the_pruner(make):
    "As many units as the Pruner takes at once from the same weights"
    learn, cb = make(5), prune(50, 'global', schedule='static')
    model = copy.deepcopy(learn.model)
    learn.fit(1, 0., wd=0., cbs=[cb])
    Pruner(model, torch.randn(2, 1, 6, 6), context='global').prune_model(50)
    assert sizes(model) == sizes(learn.model)


@pytest.mark.parametrize('sparsity, expected', [(0, (6, 10)), ([50, 20], (3, 8)), ({'0': 50}, (3, 10)), ({'0': 50, '3': 70}, (3, 3)), ({'*': 50}, (3, 5)), (99, (1, 1))])
def test_sparsity_as_number_list_dict(make, sparsity, expected):
    learn, cb = make(), prune(sparsity)
    learn.fit(2, 1e-2, cbs=[cb, Spy()])
    assert sizes(learn.model) == list(expected) and consistent(learn.model)


@pytest.mark.parametrize('kwargs, expected', [(dict(round_to=4), (6, 4)), (dict(min_kept=4), (4, 5)), (dict(ignored='0'), (6, 5)), (dict(max_sparsity=30.), (5, 7)), (dict(check=False), (3, 5)), (dict(exact=False), (3, 5))])
def test_options_of_the_pruner(make, kwargs, expected):
    learn = make()
    model = copy.deepcopy(learn.model)
    Pruner(model, torch.randn(2, 1, 6, 6), **kwargs).prune_model(50)
    learn.fit(2, 1e-2, cbs=[cb := prune(50, **kwargs), Spy()])
    assert sizes(learn.model) == sizes(model) and consistent(learn.model)
    assert 'round_to' in kwargs or sizes(model) == list(expected)


@pytest.mark.parametrize('every, k', [('1 epoch', 5), ('3 steps', 3), (.5, 10), (None, 1)])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_every(make, every, k, context):
    learn, cb = make(5), prune(80, context, schedule=lin, every=every)
    learn.fit(4, 1e-2, cbs=[cb, spy := Spy()])
    changes = [t for t, (a, b) in enumerate(zip([[6, 10], *spy.sizes], spy.sizes)) if a != b]
    assert set(changes) <= set(cb.due) and all(t % k == 0 or t == 19 for t in cb.due)
    if context == 'local': assert sizes(learn.model) == [1, 2] and changes == list(cb.due)


def test_schedule_in_epochs(make):
    learn, cb = make(4), prune(50, schedule=Schedule(sched_lin, start='1 epoch', end='3 epochs'))
    learn.fit(5, 1e-2, cbs=[cb, spy := Spy()])
    assert spy.sizes[3] == [6, 10] and spy.sizes[10] != spy.sizes[11] == [3, 5] == spy.sizes[-1]


def test_traced_once_and_scored_only_when_due(make, monkeypatch):
    from fasterai_lib.prune import pruner
    traced, decided = [], []
    trace, decide = pruner.trace, pruner.Pruner.decide
    monkeypatch.setattr(pruner, 'trace', lambda *a, **k: traced.append(1) or trace(*a, **k))
    monkeypatch.setattr(pruner.Pruner, 'decide', lambda *a, **k: decided.append(1) or decide(*a, **k))
    learn, cb = make(10), prune(50, schedule=lin)
    learn.fit(3, 1e-2, cbs=[cb, spy := Spy()])
    changes = sum(a != b for a, b in zip([[6, 10], *spy.sizes], spy.sizes))
    assert traced == [1] and changes == len(cb.due) == len(decided) - 1  # and once before anything goes, for the proof
    learn.fit(2, 1e-2, cbs=cb)
    assert traced == [1] and sizes(learn.model) == [3, 5]


# --- the same as by hand

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_by_hand(make, opt_func, context):
    "A loop that removes with the Pruner at the same batches ends with the same weights"
    def learner(): return make(dls=loaders(5, shuffle=False), model=copy.deepcopy(first), opt_func=opt_func)
    first = conv_net()
    a, b = learner(), learner()
    a.fit(3, 1e-2, cbs=[cb := prune(60, context, schedule=lin)])
    curve = lin.over(60, 3, 15)
    class ByHand(Callback):
        order = 100
        def before_batch(self):
            if not self.training: return
            if not hasattr(self, 'pruner'): self.pruner = Pruner(self.learn.model, torch.randn(2, 1, 6, 6), context=context)
            t = self.epoch*5 + self.iter
            if t in cb.due: self.pruner.prune_model(curve[t], self.opt)
    b.fit(3, 1e-2, cbs=ByHand())
    assert same(snapshot(a.model), snapshot(b.model))
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        for k, v in state_of(a, p).items(): assert not isinstance(v, torch.Tensor) or torch.equal(v, state_of(b, q)[k])


def test_chance_is_not_disturbed(make):
    "With 0 % asked, training is bit for bit what it is without the callback"
    first = nn.Sequential(*conv_net()[:8], nn.Dropout(.3), nn.Linear(10, 4))
    def run(cbs):
        torch.manual_seed(3); random.seed(3)
        learn = make(model=copy.deepcopy(first))
        learn.fit(2, 1e-2, cbs=cbs)
        return snapshot(learn.model)
    assert same(run([]), run([prune(0)]))


# --- optimizers

fastai_optimizers = dict(SGD=SGD, SGD_mom=partial(SGD, mom=.9), Adam=Adam, RMSProp=partial(RMSProp, mom=.9), RAdam=RAdam, QHAdam=QHAdam, Larc=Larc, Lamb=Lamb, ranger=partial(ranger, k=2))
torch_optimizers = dict(SGD=partial(torch.optim.SGD, lr=.1, momentum=.9, nesterov=True), Adam=torch.optim.Adam, amsgrad=partial(torch.optim.AdamW, amsgrad=True), Adagrad=torch.optim.Adagrad,
                        RMSprop=partial(torch.optim.RMSprop, momentum=.9, centered=True), NAdam=torch.optim.NAdam, Adadelta=torch.optim.Adadelta, Adafactor=getattr(torch.optim, 'Adafactor', torch.optim.Adam),
                        Rprop=torch.optim.Rprop, foreach=partial(torch.optim.Adam, foreach=True))
optimizers = fastai_optimizers | {f'torch_{k}': partial(OptimWrapper, opt=v) for k, v in torch_optimizers.items()}


@pytest.mark.parametrize('name', optimizers)
def test_optimizers(make, name):
    learn, cb = make(4, opt_func=optimizers[name], splitter=body_head), prune(60, schedule=lin)
    learn.fit(1, 1e-2)
    opt, params, groups = learn.opt, list(learn.model.parameters()), [len(g) for g in learn.opt.param_lists]
    class Shapes(Callback):
        order = 900
        def after_step(self):
            for p in self.learn.model.parameters():
                for k, v in state_of(self.learn, p).items(): assert name == 'torch_Adafactor' or not isinstance(v, torch.Tensor) or v.numel() == 1 or v.shape == p.shape
    learn.fit(2, slice(1e-3, 1e-2), cbs=[cb, Shapes()])
    assert learn.opt is opt and all(p is q for p, q in zip(params, learn.model.parameters())) and [len(g) for g in opt.param_lists] == groups
    assert [h['lr'] for h in opt.hypers] == [1e-3, 1e-2] and sizes(learn.model) == [2, 4] and consistent(learn.model)
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert not torch.equal(before['3.weight'], learn.model[3].weight)


def test_an_optimizer_that_cannot_be_cut(make):
    learn, cb = make(4), prune(60, schedule='static')
    before = snapshot(learn.model)
    class Odd(Callback):
        order = -100
        def before_batch(self): self.opt.state.setdefault(self.learn.model[3].weight, {})['basis'] = torch.zeros(17, 3)
    with pytest.raises(ValueError, match='basis'): learn.fit(1, 0., wd=0., cbs=[cb, Odd()])
    assert same(before, snapshot(learn.model)) and sizes(learn.model) == [6, 10]


# --- phases of training

@pytest.mark.parametrize('context', ['local', 'global'])
def test_frozen_layers_keep_their_units(make, context):
    learn, cb = make(4, splitter=body_head), prune(50, context)
    learn.freeze()
    learn.fit(1, 1e-2, cbs=cb)
    assert sizes(learn.model) == [6, 10] and not cb.targets
    learn.unfreeze()
    learn.fit(1, 1e-2, cbs=cb)
    assert sizes(learn.model) == [3, 5] or context == 'global'
    assert cb.measured > 40 and learn.opt.frozen_idx == 0


def test_frozen_on_request(make):
    learn = make(4, splitter=body_head)
    learn.freeze()
    learn.fit(1, 1e-2, cbs=[cb := prune(50, frozen=True), Spy()])
    assert sizes(learn.model) == [3, 5] and learn.opt.frozen_idx == 1 and not learn.model[0].weight.requires_grad


def test_fine_tune(make):
    net = nn.Sequential(nn.Sequential(*conv_net()[:8]), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)))
    learn, seen = make(4, net, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())]), []
    cb = prune(50)
    learn.fine_tune(2, 1e-2, cbs=[cb, Do('after_fit', lambda l: seen.append((l.model[0][0].out_channels, l.model[1][0].out_features)), order=1000)])
    assert seen == [(6, 4), (3, 4)] and learn.model[0][3].out_channels == 5


@pytest.mark.parametrize('schedule', [agp, one_shot, iterative()])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_second_fit(make, schedule, context):
    learn, cb = make(4), prune(50, context, schedule=schedule)
    learn.fit(2, 1e-2, cbs=cb)
    first = sizes(learn.model)
    learn.fit_one_cycle(2, 1e-2, cbs=[cb, spy := Spy()])
    assert all(s == first for s in spy.sizes) and len(cb.due) <= (context == 'global') and cb.history[0] > 45


def test_second_fit_goes_on_from_an_interrupted_one(make):
    learn, cb = make(4), prune(80, schedule=lin)
    learn.fit(4, 1e-2, cbs=[cb, Do('after_batch', throw(CancelFitException()), at=(1, 3))])
    assert sizes(learn.model) == [left(6, 40), left(10, 40)]
    learn.fit(4, 1e-2, cbs=[cb, spy := Spy()])
    assert spy.sizes[0] == [4, 6] and sizes(learn.model) == [1, 2] and len(spy.sizes) == 16


def test_more_in_a_second_callback(make):
    "A new callback begins with the model as it is"
    learn = make(4)
    learn.fit(1, 1e-2, cbs=prune(50))
    learn.fit(1, 1e-2, cbs=prune(40))
    assert sizes(learn.model) == [2, 3]


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('how', ['same', 'fresh', 'pickled'])
def test_resume(make, context, how):
    "At start_epoch, the schedule goes on, in percent of the model as it was built"
    whole = make(5)
    learn, cb = make(5, copy.deepcopy(whole.model)), prune(60, context, schedule=lin)
    learn.fit(4, 1e-2, cbs=[cb, Do('after_batch', throw(CancelFitException()), at=(1, 4))])
    half = sizes(learn.model)
    cb = dict(same=cb, fresh=prune(60, context, schedule=lin), pickled=pickle.loads(pickle.dumps(cb)))[how]
    learn.fit(4, 1e-2, start_epoch=2, cbs=[cb, spy := Spy()])
    assert [6, 10] != half != sizes(learn.model) and len(spy.sizes) == 10 and cb.history == pytest.approx(list(lin.over(60, 4, 20)[10:]), abs=9)
    assert sizes(learn.model) == [2, 4] if context == 'local' else cb.measured > 50
    assert cb.first == sum(p.numel() for p in whole.model.parameters())


def test_permanently_attached(make):
    cb = prune(50)
    learn = make(dls=exportable(), cbs=cb)
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape == (16, 4) and sizes(learn.model) == [6, 10]
    for _ in range(2):
        learn.fit(2, 1e-2, cbs=Spy())
        assert sizes(learn.model) == [3, 5]
        before, values = snapshot(learn.model), list(learn.recorder.values)
        assert len(learn.validate()) == 2 and learn.get_preds()[0].shape == (16, 4) and len(learn.predict(3)) == 3
        assert same(before, snapshot(learn.model))
        assert [len(v) for v in values] == [5, 5]


def test_validate_in_the_middle_of_a_fit(make):
    learn, cb, fetch = make(4), prune(50, schedule=lin), FetchPredsCallback()
    learn.fit(3, 1e-2, cbs=[cb, Do('after_train', lambda l: l.validate(), order=1500)])
    assert sizes(learn.model) == [3, 5]
    learn = make(4)
    learn.fit(3, 1e-2, cbs=[prune(schedule=lin), fetch, Spy()])
    assert sizes(learn.model) == [3, 5] and fetch.preds[0].shape == (16, 4) and [len(v) for v in learn.recorder.values] == [5, 5, 5]


def test_lr_find(make):
    cb = prune(50, schedule=lin)
    learn = make(4, cbs=cb)
    before = snapshot(learn.model)
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert same(before, snapshot(learn.model)) and cb.pruner is None
    learn.fit(4, 1e-2, cbs=Do('after_batch', throw(CancelFitException()), at=(2, 1)))
    before = snapshot(learn.model)
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert same(before, snapshot(learn.model)) and sizes(learn.model) != [6, 10]
    learn.fit(4, 1e-2)
    assert sizes(learn.model) == [3, 5]


def test_without_recorder_and_no_epochs(make):
    learn, cb = make(4), prune()
    learn.fit(0, 1e-2, cbs=cb)
    assert sizes(learn.model) == [6, 10]
    learn.remove_cb(Recorder)
    learn.fit(2, 1e-2, cbs=[cb, Spy()])
    assert sizes(learn.model) == [3, 5]


# --- other callbacks

@pytest.mark.parametrize('end, scores, best', [(1., [9, 8, 7, 6], 3), (.5, [9, 8, 7, 6], 1), (.5, [9, 3, 4, 5], 3), (.3, [1, 7, 5, 6], 1)])
@pytest.mark.parametrize('with_opt', [True, False])
def test_save_model(make, end, scores, best, with_opt):
    learn, cb, ends = make(4, metrics=Score(scores)), prune(50, schedule=Schedule(sched_lin, end=end)), []
    learn.fit(4, 1e-2, cbs=[SaveModelCallback(monitor='score', with_opt=with_opt), cb, Spy(), Do('after_epoch', lambda l: ends.append(snapshot(l.model)), order=1000)])
    assert same(ends[best], snapshot(learn.model)) and sizes(learn.model) == [3, 5]
    learn.fit(1, 1e-2)


@pytest.mark.parametrize('at', [(0, 2), (1, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize('reset_on_fit', [True, False])
def test_save_model_when_stopped_between_sizes(make, at, reset_on_fit):
    "The last checkpoint is of a larger model: what is there is kept"
    learn, cb, last = make(4, metrics=Score([9, 8, 7, 6])), prune(80, schedule=lin), {}
    saver = SaveModelCallback(monitor='score', reset_on_fit=reset_on_fit)
    learn.fit(4, 1e-2, cbs=[saver, cb, Do('after_batch', lambda l: last.update(snapshot(l.model)), order=-1000), Do('after_batch', throw(CancelFitException()), at=at)])
    assert same(last, snapshot(learn.model))
    make(model=learn.model).load('model')
    learn.fit(4, 1e-2, cbs=[saver, cb])
    assert sizes(learn.model) == [1, 2]


@pytest.mark.parametrize('kwargs', [dict(every_epoch=True), dict(at_end=True)])
def test_save_model_otherwise(make, kwargs):
    learn = make(4)
    learn.fit(2, 1e-2, cbs=[SaveModelCallback(**kwargs), prune()])
    assert sizes(learn.model) == [3, 5]


def test_trackers_wait_for_the_last_size(make):
    learn, cb = make(4, metrics=Score([9, 8, 7, 6, 5, 4, 3, 2])), prune(50, schedule=Schedule(sched_lin, end=.5))
    learn.fit(8, 1e-2, cbs=[EarlyStoppingCallback(monitor='score', patience=2), cb])
    assert learn.epoch == 5 and sizes(learn.model) == [3, 5]
    lrs, learn = [], make(4, metrics=Score([9, 8, 7, 6, 5, 4]))
    learn.fit(6, 1e-2, cbs=[ReduceLROnPlateau(monitor='score', patience=2), prune(50, schedule=Schedule(sched_lin, end=.5)), Do('before_train', lambda l: lrs.append(l.opt.hypers[-1]['lr']))])
    assert lrs == [1e-2]*5 + [pytest.approx(1e-3)]


@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_gradient_accumulation(make, opt_func):
    learn, cb = make(7, opt_func=opt_func), prune(80, schedule=lin)
    grads = []
    def look(l): grads.append(l.model[3].weight.grad is not None and bool(l.model[3].weight.grad.any()))
    learn.fit(2, 1e-2, cbs=[cb, GradientAccumulation(16), spy := Spy(), Do('before_batch', look, order=100)])
    assert spy.steps == 7 and sizes(learn.model) == [1, 2] and any(grads)


def test_gradients_in_flight_are_those_of_what_is_kept(make):
    learn, cb, seen = make(dls=loaders(2, shuffle=False)), prune(50, schedule=Schedule(sched_lin, start=.5)), []
    def before(l): seen.append([p.grad.clone() if p.grad is not None else None for p in l.model.parameters()])
    learn.fit(1, 0., wd=0., cbs=[cb, GradientAccumulation(1000), Do('before_batch', before, at=(0, 1), order=-10), Do('before_batch', before, at=(0, 1), order=100)])
    kept = [i for i in range(6) if any(torch.equal(seen[0][0][i], g) for g in seen[1][0])]
    assert len(seen[1][0]) == len(kept) == 3 and torch.equal(seen[0][0][kept], seen[1][0])


@pytest.mark.filterwarnings('ignore:User provided device_type', 'ignore:.*GradScaler is enabled', 'ignore:.*CUDA is not available')
@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision(make, precision):
    try: getattr(make(), precision)().fit(1)
    except Exception as e: pytest.skip(f'fastai cannot do {precision} on the CPU: {e}')
    learn = getattr(make(4), precision)()
    learn.fit_one_cycle(2, 1e-2, cbs=[prune(), spy := Spy(), GradientClip(.1)])
    assert spy.steps == 8 and sizes(learn.model) == [3, 5]


def test_autocast_of_the_loop_is_not_that_of_the_proof(make):
    "A batch in bfloat16 would show differences that are not there"
    class Half(Callback):
        order = 10
        def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
        def after_loss(self): self.cast.__exit__(None, None, None)
        def after_pred(self): self.learn.pred = self.pred.float()
    learn = make(4)
    learn.fit(2, 1e-2, cbs=[cb := prune(), Half(), spy := Spy()])
    assert sizes(learn.model) == [3, 5] and cb.pruner.error < 1e-5


def test_mixup_and_clip(make):
    learn = make(4)
    learn.fit_one_cycle(2, 1e-2, cbs=[prune(), MixUp(), GradientClip(.01), Spy()])
    assert sizes(learn.model) == [3, 5]


class EMA(Callback):
    order = 70
    def __init__(self, kind): self.kind = kind
    def before_fit(self):
        if self.kind == 'averaged': self.average = AveragedModel(self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(.5))
        else: self.ema_model = copy.deepcopy(self.learn.model)
    def after_step(self):
        if self.kind == 'averaged': return self.average.update_parameters(self.learn.model)
        with torch.no_grad():
            for p, q in zip(self.ema_model.parameters(), self.learn.model.parameters()): p.lerp_(q, .5)
    @property
    def copy(self): return self.average.module if self.kind == 'averaged' else self.ema_model


@pytest.mark.parametrize('kind', ['averaged', 'deepcopy'])
def test_ema(make, kind):
    learn, ema, seen = make(4), EMA(kind), []
    cb = prune(60, schedule=lin)
    class Look(Callback): # the average of the kept units is what it was
        order = 1000
        def before_batch(self):
            if self.training and self.learn.iter: seen.append(ema.copy[8].weight.shape[1])
    learn.fit(3, 1e-2, cbs=[cb, ema, Look(), Spy()])
    assert sizes(learn.model) == sizes(ema.copy) == [2, 4] and consistent(ema.copy) and seen == sorted(seen, reverse=True)
    assert torch.allclose(ema.copy[0].weight, learn.model[0].weight, atol=.1)


def test_copies(make):
    learn = make(4)
    other, teacher = copy.deepcopy(learn.model), copy.deepcopy(learn.model)
    class Teach(Callback):
        def __init__(self): self.teacher = teacher
    learn.fit(1, 1e-2, cbs=[prune(copies=[other]), Teach()])
    assert sizes(other) == [3, 5] and sizes(teacher) == [6, 10]  # a teacher is no average
    wrong = nn.Linear(3, 3)
    learn = make(4)
    with pytest.raises(ValueError): learn.fit(1, 1e-2, cbs=prune(copies=[wrong]))
    assert sizes(learn.model) == [6, 10]


def test_hidden_state_is_reset(make):
    learn, cb = make(4, TextNet(), items=tokens), prune(50, schedule=lin)
    learn.fit(2, 1e-2, cbs=[cb, ModelResetter(), Spy()])
    assert learn.model.lstm.hidden_size == 5 and learn.model.out.in_features == 5


@pytest.mark.parametrize('add_time', [True, False])
@pytest.mark.parametrize('train_metrics', [True, False])
def test_recorder(make, add_time, train_metrics):
    learn, cb = make(4), prune(80)
    learn.recorder.add_time, learn.recorder.train_metrics = add_time, train_metrics
    lines, counted, total = [], [], sum(p.numel() for p in learn.model.parameters())
    learn.logger = lambda line: lines.append(list(line))
    learn.fit(3, 1e-2, cbs=[cb, Do('after_epoch', lambda l: counted.append(100*(1 - sum(p.numel() for p in l.model.parameters())/total)), order=-1000)])
    names = list(learn.recorder.metric_names)
    at = names.index('sparsity')
    assert names[at:] == ['sparsity', 'removed'] + ['time']*add_time and all(len(line) == len(names) for line in lines)
    assert [line[at] for line in lines] == pytest.approx([agp(80, (e + 1)/3) for e in range(3)]) and [line[at + 1] for line in lines] == pytest.approx(counted)
    assert [list(v)[at-1:at+1] for v in learn.recorder.values] == [line[at:at+2] for line in lines] and len(cb.history) == 12
    learn.fit(1, 1e-2)
    assert 'sparsity' not in learn.recorder.metric_names


def test_csv_logger_and_silence(make, tmp_path, capsys, recwarn):
    learn = make(4)
    with learn.no_logging(): learn.fit(2, 1e-2, cbs=[CSVLogger(), prune(schedule=lin)])
    df = pd.read_csv(tmp_path/'history.csv')
    assert list(df['sparsity']) == pytest.approx([25, 50]) and (df['removed'].diff()[1:] > 0).all()
    assert capsys.readouterr() == ('', '') and not [w for w in recwarn if 'fasterai' in str(w.filename) or 'shadowing' in str(w.message)]


# --- cancelled and broken

@pytest.mark.parametrize('event, exception, at', [
    ('before_batch', CancelBatchException, (0, 2)), ('after_pred', CancelBatchException, (1, 3)), ('after_loss', CancelBatchException, (0, 0)), ('before_backward', CancelBackwardException, (1, 1)),
    ('after_backward', CancelBatchException, (1, 1)), ('before_step', CancelStepException, (1, 3)), ('after_step', CancelBatchException, (1, 1)), ('before_batch', CancelTrainException, (0, 1)),
    ('after_batch', CancelTrainException, (0, 2)), ('before_batch', CancelEpochException, (0, 2)), ('before_validate', CancelValidException, None)])
@pytest.mark.parametrize('order', [-5, 1500])
def test_cancelled(make, event, exception, at, order):
    learn = make(4)
    learn.fit(3, 1e-2, cbs=[prune(80, schedule=lin), spy := Spy(), Do(event, throw(exception()), at=at, order=order)])
    assert sizes(learn.model) == [1, 2] and consistent(learn.model) and spy.sizes == sorted(spy.sizes, reverse=True)


@pytest.mark.parametrize('exception', [RuntimeError('boom'), KeyboardInterrupt(), CancelFitException()])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'after_step'])
def test_interrupted(make, exception, event):
    cb = prune(80, schedule=lin)
    learn = make(4, cbs=cb)
    try: learn.fit(3, 1e-2, cbs=Do(event, throw(exception), at=(1, 2), order=1500))
    except (RuntimeError, KeyboardInterrupt): pass
    assert sizes(learn.model) == [left(6, 80*7/12), left(10, 80*7/12)] and consistent(learn.model)
    assert len(learn.validate()) == 2
    learn.fit(2, 1e-2, cbs=Spy())
    assert sizes(learn.model) == [1, 2]


def test_an_error_in_a_removal_changes_nothing(make, monkeypatch):
    "Half way through the cut of the tensors"
    from fasterai_lib.prune import plan
    learn, cb = make(4), prune(80, schedule='static', check=False)
    learn.fit(1, 1e-2)
    before, state, n = snapshot(learn.model), {k: v.clone() for k, v in state_of(learn, learn.model[3].weight).items() if isinstance(v, torch.Tensor)}, []
    replace = plan._replace
    def broken(*a):
        n.append(1)
        if len(n) == 3: raise MemoryError('full')
        replace(*a)
    monkeypatch.setattr(plan, '_replace', broken)
    with pytest.raises(MemoryError): learn.fit(1, 0., wd=0., cbs=cb)
    monkeypatch.undo()
    assert same(before, snapshot(learn.model)) and sizes(learn.model) == [6, 10]
    assert all(torch.equal(v, state_of(learn, learn.model[3].weight)[k]) for k, v in state.items())
    learn.fit(1, 1e-2, cbs=cb)
    assert sizes(learn.model) == [1, 2]


# --- saving and copying

def test_save_and_load(make, tmp_path):
    learn, cb = make(4), prune()
    learn.fit(2, 1e-2, cbs=cb)
    learn.save('small', with_opt=True)
    want, avg = snapshot(learn.model), state_of(learn, learn.model[3].weight)['grad_avg'].clone()
    learn.fit(1, 1e-2)
    learn.load('small', with_opt=True)
    assert same(want, snapshot(learn.model)) and torch.equal(avg, state_of(learn, learn.model[3].weight)['grad_avg'])
    learn.fit(1, 1e-2, cbs=Spy())
    with pytest.raises(RuntimeError): make(4).load('small')


@pytest.mark.parametrize('attached', [True, False])
def test_export(make, tmp_path, attached):
    cb = prune()
    learn = make(dls=exportable(), cbs=cb if attached else None)
    learn.fit(2, 1e-2, cbs=[] if attached else cb)
    expected = learn.predict(5)
    learn.export('export.pkl')
    loaded = load_learner(tmp_path/'export.pkl')
    assert same(snapshot(learn.model), snapshot(loaded.model)) and torch.equal(loaded.predict(5)[2], expected[2])
    learn.fit(1, 1e-2, cbs=[] if attached else cb)
    loaded.dls = exportable()
    loaded.fit(2, 1e-2)
    assert sizes(loaded.model) == sizes(learn.model) == [3, 5]  # the percentages stay those of the model as it was


def test_pickle_and_deepcopy(make):
    learn, cb = make(4), pickle.loads(pickle.dumps(prune(schedule=lin)))
    learn.fit(2, 1e-2, cbs=cb)
    again = pickle.loads(pickle.dumps(cb))
    learn.fit(2, 1e-2, cbs=[again, spy := Spy()])
    assert sizes(learn.model) == [3, 5] and all(s == [3, 5] for s in spy.sizes)
    learn = make(4, cbs=(cb := prune(80, schedule=lin)))
    learn.fit(2, 1e-2, cbs=Do('after_epoch', throw(CancelFitException()), order=100))
    before, other = snapshot(learn.model), copy.deepcopy(learn)
    other.fit(2, 1e-2)
    assert sizes(other.model) == [1, 2] and same(before, snapshot(learn.model))
    learn.fit(2, 1e-2)
    assert sizes(learn.model) == [1, 2]


# --- models

def test_coupled_layers(make):
    learn = make(4, ResNet())
    learn.fit(2, 1e-2, cbs=[prune(), Spy()])
    m = learn.model
    assert [m.stem.out_channels, m.a.in_channels, m.a.out_channels, m.b.in_channels, m.b.out_channels, m.head.in_features] == [4, 4, 3, 3, 4, 4]


def test_model_is_a_part(make):
    learn = make(model=nn.Sequential(nn.Sequential(*conv_net()[:3]), conv_net()[3:]))
    cb = prune(model=learn.model[1])
    learn.fit(2, 1e-2, cbs=cb)
    assert learn.model[0][0].out_channels == 6 and learn.model[1][0].out_channels == 5 and cb.current == 50
    with pytest.raises(ValueError, match='not a part'): make().fit(1, 1e-2, cbs=prune(model=conv_net()))
    learn = make()
    with pytest.raises(ValueError, match='nothing can be removed'): learn.fit(1, 1e-2, cbs=prune(model=learn.model[8]))


def test_double_precision_and_channels_last(make):
    learn = make(4, conv_net().double(), items=partial(images, dtype=torch.float64))
    learn.fit(2, 1e-2, cbs=[prune(), Spy()])
    assert sizes(learn.model) == [3, 5] and learn.model[0].weight.dtype == torch.float64
    learn = make(4, conv_net().to(memory_format=torch.channels_last))
    learn.fit(2, 1e-2, cbs=[prune(), Spy()])
    assert sizes(learn.model) == [3, 5] and learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_two_inputs_and_given_examples(make):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        def forward(self, x, y): return self.out((self.a(x) + self.b(y)).relu())
    def items(n, seed=0): return [(x[0, 0], x[0, 1], y) for x, y in images(n, seed)]
    for kwargs in ({}, dict(example_inputs=(torch.randn(3, 6), torch.randn(3, 6))), dict(example_inputs=dict(x=torch.randn(1, 6), y=torch.randn(1, 6)))):
        learn = make(4, Two(), dls=DataLoaders.from_dsets(items(24), items(16, 1), bs=8, val_bs=16, device='cpu', num_workers=0, n_inp=2))
        learn.fit(1, 1e-2, cbs=[prune(**kwargs), Spy()])
        assert learn.model.a.out_features == learn.model.b.out_features == learn.model.out.in_features == 4


def test_batches_of_one(make):
    learn = make(model=nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4)), dls=loaders(4, bs=1))
    learn.fit(2, 1e-2, cbs=prune())
    assert learn.model[1].out_features == 4


def test_a_model_with_attributes_like_ours(make):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.net, self.columns, self.targets, self.history, self.due, self.ready = conv_net(), ['x'], {}, [1.], [0], True
        def forward(self, x): return self.net(x)
    learn = make(4, Net())
    learn.fit(2, 1e-2, cbs=prune())
    assert sizes(learn.model.net) == [3, 5] and learn.model.columns == ['x']


def test_another_model_in_the_learner(make):
    learn, cb = make(4), prune()
    learn.fit(1, 1e-2, cbs=cb)
    learn.model, learn.opt = conv_net(), None
    learn.fit(1, 1e-2, cbs=cb)
    assert sizes(learn.model) == [3, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('fp16', [True, False])
def test_cuda(make, fp16):
    learn = make(dls=loaders(4, device='cuda'))
    if fp16: learn.to_fp16()
    learn.fit_one_cycle(3, 1e-2, cbs=[prune(example_inputs=torch.randn(2, 1, 6, 6)), Spy()])
    assert sizes(learn.model) == [3, 5] and learn.model[0].weight.is_cuda


# --- bad input

@pytest.mark.parametrize('kwargs, error, match', [
    (dict(sparsity=100), ValueError, '100'), (dict(sparsity=-1), ValueError, 'sparsity'), (dict(sparsity='half'), (TypeError, ValueError), 'sparsity'), (dict(sparsity=120), ValueError, 'sparsity'),
    (dict(context='per_row'), ValueError, 'global'), (dict(context='2:4'), ValueError, 'global'), (dict(context='globl'), ValueError, 'global'), (dict(criteria='large'), ValueError, 'large_final'),
    (dict(schedule='agpp'), ValueError, 'agp'), (dict(model='0'), TypeError, 'model'), (dict(every='2 weeks'), ValueError, 'every'), (dict(every=-1), ValueError, 'every'),
    (dict(sparsity=[10, 20], context='global'), ValueError, 'local'), (dict(nonsense=1), TypeError, 'nonsense')])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match): prune(**kwargs)


@pytest.mark.parametrize('kwargs, match', [
    (dict(sparsity=[10, 20, 30]), '3 values'), (dict(sparsity={'x': 30}), "'x'"), (dict(schedule=dsd), 'cannot come back'), (dict(schedule=gradual(10, 5, '1 epoch')), 'reaches only'),
    (dict(example_inputs=torch.randn(2, 3, 6, 6)), 'channels'), (dict(round_to=0), 'round_to'), (dict(ignored='zzz'), 'zzz'), (dict(min_kept=-1), 'min_kept')])
def test_errors_leave_the_model_untouched(make, kwargs, match):
    learn, cb = make(4), prune(**kwargs)
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match=match): learn.fit(2, 1e-2, cbs=cb)
    assert same(before, snapshot(learn.model)) and cb not in learn.cbs and '_pruned' not in vars(learn.model)
    learn.fit(1, 1e-2)


@pytest.mark.parametrize('other', [MaskCallback, lambda: SparsifyCallback(50, 'weight', 'local', 'large_final', agp), lambda: prune(30)])
def test_not_with_masks(make, other):
    learn = make(4)
    with pytest.raises(ValueError, match='share'): learn.fit(1, 1e-2, cbs=[prune(), other()])


def test_no_training_batches_and_outside(make):
    learn = make(4)
    learn.dls.train.drop_last, learn.dls.train.bs = True, 10**6
    with pytest.raises(ValueError, match='no batches'): learn.fit(1, 1e-2, cbs=prune())
    with pytest.raises(ValueError, match='Learner'): prune().before_fit()


# --- shrink

def masked(make, model=None, percent=50, granularity='filter', **kwargs):
    learn = make(4, model or conv_net(), **kwargs)
    learn.fit(2, 1e-2, cbs=SparsifyCallback(percent, granularity, 'local', 'large_final', agp))
    return learn


@pytest.mark.parametrize('opt_func', [Adam, partial(ranger, k=2), partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_shrink(make, opt_func):
    learn = masked(make, opt_func=opt_func)
    m = learn.model
    dead = [(c.weight == 0).flatten(1).all(1) for c in (m[0], m[3])]
    for bn, d in ((m[1], dead[0]), (m[4], dead[1])): # what the dead still give out goes with them
        with torch.no_grad(): bn.bias[d] = 0
        bn.running_mean[d] = 0
    x = torch.randn(5, 1, 6, 6)
    want, params = m.eval()(x), list(m.parameters())
    plan = learn.shrink()
    assert sizes(m) == [3, 5] and consistent(m) and torch.allclose(m.eval()(x), want, atol=1e-5)
    assert all(p is q for p, q in zip(params, m.parameters())) and all(torch.equal(plan.removed[f'{i}.weight', 0], d.nonzero().flatten()) for i, d in zip((0, 3), dead))
    learn.fit(1, 1e-2, cbs=Spy())
    with pytest.raises(ValueError, match='no dead unit'): learn.shrink()
    assert sizes(m) == [3, 5]


def test_shrink_needs_all_layers_of_a_unit(make):
    m = ResNet()
    with torch.no_grad():
        m.stem.weight[[1, 2, 3]] = 0
        m.b.weight[[2, 3, 5]] = 0
        m.a.weight[:4] = 0
    shrink(m, torch.randn(2, 1, 6, 6))
    assert [m.stem.out_channels, m.b.out_channels, m.a.out_channels, m.b.in_channels] == [6, 6, 2, 2]
    m(torch.randn(2, 1, 6, 6))


def test_shrink_keeps_one_unit(make):
    m = conv_net()
    with torch.no_grad(): m[0].weight.zero_()
    shrink(m, torch.randn(2, 1, 6, 6))
    assert sizes(m) == [1, 10] and consistent(m)


def test_shrink_of_other_layers(make):
    m = TextNet()
    with torch.no_grad():
        for p in (m.lstm.weight_ih_l0, m.lstm.weight_hh_l0): p.view(4, 10, -1)[:, [0, 7]] = 0
        m.emb.weight[:, 3] = 0
    shrink(m, torch.randint(0, 12, (2, 5)))
    assert m.lstm.hidden_size == 8 and m.lstm.input_size == 7 and m(torch.randint(0, 12, (2, 5))).shape == (2, 4)


def test_shrink_with_nothing_dead(make):
    learn = masked(make, granularity='weight')
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='no dead unit'): learn.shrink()
    assert same(before, snapshot(learn.model)) and sizes(learn.model) == [6, 10]


def test_shrink_does_not_change_the_mode_or_chance(make):
    learn = masked(make)
    learn.model.train()
    state = torch.get_rng_state(), random.getstate()
    learn.shrink(torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert learn.model.training and torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()


def test_shrink_after_pruning_again(make):
    learn = masked(make)
    learn.shrink()
    learn.fit(1, 1e-2, cbs=prune(40))
    assert sizes(learn.model) == [left(3, 40), left(5, 40)] and consistent(learn.model)
