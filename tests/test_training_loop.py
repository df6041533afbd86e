"""SparsifyCallback and MaskCallback in fastai's real training loop: exact, held, and gone without a trace."""
import copy
import math
import pickle
import random
import warnings
from functools import partial

import pandas as pd
import pytest
import torch
from fastai.callback.core import *
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.tracker import *
from fastai.callback.training import *
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import *
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import *
from fastcore.basics import noop
from safetensors.torch import load_model
from torch import nn

import fasterai_lib.all as fl
from fasterai_lib.all import MaskCallback, Masks, Schedule, SparsifyCallback, agp, dsd, lin, one_shot
from fasterai_lib.core.criteria import criteria
from fasterai_lib.core.schedule import gradual, iterative, lottery, sched_lin, schedules

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*pin_memory')


# --- small things to train

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)  # fastai shuffles with it


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


def loaders(n_batches=3, bs=8, items=images, device='cpu', num_workers=0):
    return DataLoaders.from_dsets(items(n_batches*bs), items(16, 1), bs=bs, val_bs=16, device=device, num_workers=0)


IMAGES, LABELS = zip(*images(40))
def image(i): return IMAGES[i]
def label(i): return LABELS[i]
def exportable(): return Datasets(range(40), [[image], [label]], splits=[list(range(24)), list(range(24, 40))]).dataloaders(bs=8, val_bs=16, device='cpu', num_workers=0)


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def body_head(m): return [list(m[:6].parameters()), list(m[6:].parameters())]


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


@pytest.fixture
def make(tmp_path):
    def learner(n_batches=3, model=None, dls=None, items=images, metrics=accuracy, **kwargs):
        return quiet(Learner(dls or loaders(n_batches, items=items), model or conv_net(), loss_func=CrossEntropyLossFlat(), metrics=metrics, path=tmp_path, **kwargs))
    return learner


def sparsify(sparsity=80, granularity='weight', context='local', criteria='large_final', schedule=agp, **kwargs):
    return SparsifyCallback(sparsity, granularity, context, criteria, schedule, **kwargs)


# --- what must be true

def weights(model, kind=nn.Conv2d): return {f'{n}.weight': m.weight for n, m in model.named_modules() if isinstance(m, kind)}
def zeros(*ws): return sum(int((w == 0).sum()) for w in ws)
def exact(w, percent): return zeros(w) == math.floor(percent*w.numel()/100 + .5)
def snapshot(model): return {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
def snapshot_of(tensors): return {k: v.clone() for k, v in tensors.items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def zero_sets(model, kind=nn.Conv2d): return {n: w.detach() == 0 for n, w in weights(model, kind).items()}
def within(a, b): return all((b[n] | ~a[n]).all() for n in a)  # every zero of a is one of b
def dead(masks, model): return {n: (p, ~masks[n].full(p.shape)) for n, p in masks.params(model).items()}


def state_of(learn, p): return getattr(learn.opt, 'opt', learn.opt).state.get(p, {})


def slow_weights(learn):  # of Lookahead, by parameter
    slow = getattr(learn.opt, 'slow_weights', None)
    return {} if slow is None else {p: s for ps, ss in zip(learn.opt.param_lists, slow) for p, s in zip(ps, ss)}


class Spy(Callback):
    "Looks on after everyone else: what is masked must be zero, and so must be its gradient and its optimizer state"
    order = 1000

    def __init__(self, *cbs): self.watched, self.steps, self.zeros, self.early = cbs, 0, [], None

    def masked(self):
        for cb in self.watched:
            if cb.masks: yield from dead(cb.masks, getattr(cb, 'target', None) or self.learn.model).values()

    def before_step(self):
        for p, gone in self.masked():
            if p.grad is None: continue
            g = p.grad.to_dense() if p.grad.is_sparse else p.grad
            assert not g[gone].any(), 'a masked weight has a gradient'

    def after_step(self):
        self.steps += 1
        for p, gone in self.masked():
            assert not p.detach()[gone].any(), 'a masked weight is not zero'
            for k, v in state_of(self.learn, p).items():
                if isinstance(v, torch.Tensor) and v.shape == p.shape: assert not (v.to_dense() if v.is_sparse else v)[gone].any(), f'optimizer state {k} of a masked weight'

    def after_batch(self):
        if self.training: self.zeros.append(zeros(*weights(self.learn.model, (nn.Conv2d, nn.Linear)).values()))


class FirstSpy(Spy):
    "The same, before everyone else"
    order = -1000


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


# --- exact at the last batch

@pytest.mark.parametrize('name', schedules)
@pytest.mark.parametrize('n', [1, 2, 7, 13])
def test_last_batch_reaches_the_target(make, name, n):
    learn, target = make(n), 10 if name == 'gradual' else 77
    cb = sparsify(target, schedule=name)
    learn.fit(1, 1e-2, cbs=[cb, spy := Spy(cb)])
    end = 0 if name == 'dsd' else target
    assert spy.steps == n and cb.current == pytest.approx(end)
    for n, w in weights(learn.model).items():
        assert cb.masks[n].dead() == math.floor(end*w.numel()/100 + .5) if n in cb.masks else end == 0
        assert exact(w, end) or name == 'dsd'  # what has just come back is still zero where it has no gradient


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('epochs', [1, 3])
def test_exact_in_all(make, context, epochs):
    learn, cb = make(5), sparsify(61.8, context=context)
    learn.fit(epochs, 1e-2, cbs=cb)
    ws = list(weights(learn.model).values())
    assert zeros(*ws) == math.floor(.618*sum(w.numel() for w in ws) + .5) if context == 'global' else all(exact(w, 61.8) for w in ws)


def test_nothing_is_pruned_early_by_the_last_step(make):
    "The curve that was asked is the curve that is there, batch by batch"
    learn, cb = make(10), sparsify(80, schedule=agp)
    learn.fit(2, 1e-2, cbs=[cb, spy := Spy(cb)])
    ws = list(weights(learn.model).values())
    expected = [sum(math.floor(s*w.numel()/100 + .5) for w in ws) for s in agp.over(80, 2, 20)]
    assert spy.zeros == expected


def test_gradual_that_cannot_arrive_says_so(make):
    "Promise: the last batch reaches the target, or it is an error; never silently 20 % when 80 % was asked"
    learn, cb = make(3), sparsify(80, schedule=gradual(10, 5, '1 epoch'))
    with pytest.raises(ValueError): learn.fit(3, 1e-2, cbs=cb)


def test_schedule_in_epochs(make):
    learn, cb = make(4), sparsify(80, schedule=Schedule(sched_lin, start='1 epoch', end='3 epochs'))
    learn.fit(5, 1e-2, cbs=[cb, spy := Spy(cb)])
    assert spy.zeros[3] == 0 < spy.zeros[4] < spy.zeros[10] < spy.zeros[11] == spy.zeros[-1]
    assert all(exact(w, 80) for w in weights(learn.model).values())


def test_schedule_in_steps(make):
    learn, cb = make(4), sparsify(80, schedule=Schedule(sched_lin, start='2 steps', end='7 steps'))
    learn.fit(3, 1e-2, cbs=[cb, spy := Spy(cb)])
    assert spy.zeros[1] == 0 < spy.zeros[2] < spy.zeros[5] < spy.zeros[6] == spy.zeros[-1]


@pytest.mark.parametrize('sparsity, expected', [(50, (50, 50)), ([30, 90], (30, 90)), ({'0': 25, '3': 75}, (25, 75)), ({'3': 75}, (0, 75)), ({'*': 40, '0': 20}, (20, 40)),
                                                (0, (0, 0)), (100, (100, 100))])
def test_sparsity_as_number_list_dict(make, sparsity, expected):
    learn, cb = make(), sparsify(sparsity)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, s) for w, s in zip(weights(learn.model).values(), expected))


def test_columns_agree_for_a_dict(make):
    "sparsity (asked) and zeros (counted) are about the same layers"
    learn, cb = make(), sparsify({'3': 75})
    learn.fit(2, 1e-2, cbs=cb)
    assert learn.recorder.values[-1][-2] == pytest.approx(learn.recorder.values[-1][-1], abs=.5)


@pytest.mark.parametrize('criterion', criteria)
@pytest.mark.parametrize('context', ['local', 'global'])
def test_every_criterion(make, criterion, context):
    learn, cb = make(), sparsify(70, context=context, criteria=criterion)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    ws = list(weights(learn.model).values())
    assert zeros(*ws) == sum(math.floor(.7*w.numel() + .5) for w in ws) if context == 'local' else zeros(*ws) == math.floor(.7*sum(w.numel() for w in ws) + .5)


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', 'row', 'shared_weight', 'channel'])
def test_every_granularity(make, granularity):
    learn = make(model=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    cb = sparsify(50, granularity, schedule=lin, exclude='0')
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    w = learn.model[3].weight
    assert abs(zeros(w) - w.numel()/2) <= cb.masks['3.weight'].grid.numel//cb.masks['3.weight'].grid.n
    if granularity == 'filter': assert torch.equal(learn.model[3].bias == 0, (w == 0).flatten(1).all(1)) and zeros(learn.model[3].bias) == 4


def test_round_to(make):
    learn, cb = make(), sparsify(60, 'filter', schedule=lin, round_to=4, exclude='0')
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert int((learn.model[3].weight != 0).flatten(1).any(1).sum()) == 4


@pytest.mark.parametrize('schedule', ['agp', 'one_cycle', 'iterative'])
def test_two_of_four(make, schedule):
    learn, cb = make(4), sparsify(50, context='2:4', schedule=schedule, layer_type=nn.Conv2d, exclude='0')
    learn.fit(2, 1e-2, cbs=[cb, spy := Spy(cb)])
    groups = learn.model[3].weight.permute(0, 2, 3, 1).reshape(-1, 4)  # neighbours along the input channels
    assert ((groups != 0).sum(1) == 2).all() and spy.zeros == sorted(spy.zeros)


def test_per_row(make):
    learn, cb = make(), sparsify(50, context='per_row')
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert exact(learn.model[3].weight, 50) and ((learn.model[3].weight == 0).flatten(1).sum(1) == 18).all()


# --- masks: weights, gradients, optimizer state

fastai_optimizers = dict(SGD=SGD, SGD_mom=partial(SGD, mom=.9), SGD_l2=partial(SGD, mom=.9, wd=.1, decouple_wd=False), Adam=Adam, AdamW=partial(Adam, wd=.1), RMSProp=partial(RMSProp, mom=.9),
                         RAdam=RAdam, QHAdam=QHAdam, Larc=Larc, Lamb=Lamb, ranger=partial(ranger, k=2))
torch_optimizers = dict(SGD=partial(torch.optim.SGD, lr=.1, momentum=.9, nesterov=True), Adam=torch.optim.Adam, AdamW=torch.optim.AdamW, amsgrad=partial(torch.optim.AdamW, amsgrad=True),
                        Adagrad=partial(torch.optim.Adagrad, initial_accumulator_value=.1), RMSprop=partial(torch.optim.RMSprop, momentum=.9, centered=True), NAdam=torch.optim.NAdam,
                        RAdam=torch.optim.RAdam, Adadelta=torch.optim.Adadelta, foreach=partial(torch.optim.Adam, foreach=True))
optimizers = fastai_optimizers | {f'torch_{k}': partial(OptimWrapper, opt=v) for k, v in torch_optimizers.items()}


@pytest.mark.parametrize('name', optimizers)
def test_optimizer_state(make, name):
    learn, cb = make(4, opt_func=optimizers[name]), sparsify(75, schedule=lin)
    learn.fit(1, 1e-2)  # the state is not empty when the first weights go
    before = learn.model[3].weight.detach().clone()
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)] + ([] if name == 'ranger' else [FirstSpy(cb)]))
    assert all(exact(w, 75) for w in weights(learn.model).values())
    p, gone = dead(cb.masks, learn.model)['3.weight']
    kept = {k: v for k, v in state_of(learn, p).items() if isinstance(v, torch.Tensor) and v.shape == p.shape}
    assert name == 'SGD' or (kept and all(v[~gone].any() for v in kept.values()))  # what is left keeps its own
    assert not torch.equal(p[~gone], before[~gone])


def test_slow_weights_of_lookahead(make):
    "The copy that Lookahead keeps is optimizer state: a masked weight must not come back from it"
    learn, cb = make(4, opt_func=partial(ranger, k=3)), sparsify(75, schedule=lin)
    learn.fit(1, 1e-2)
    learn.fit(2, 1e-2, cbs=[cb, FirstSpy(cb)])
    for p, gone in dead(cb.masks, learn.model).values(): assert not slow_weights(learn)[p][gone].any()
    learn.fit(1, 1e-2, cbs=[MaskCallback(cb.masks), FirstSpy(cb)])


def test_masked_training_by_hand(make):
    "The same as SGD with momentum and masks, written out"
    learn, items = make(4, opt_func=partial(SGD, mom=.9)), images(32)
    learn.dls = DataLoaders.from_dsets(items, items[:8], bs=8, val_bs=8, device='cpu', num_workers=0, shuffle=False)
    model = copy.deepcopy(learn.model)
    keep = {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) > .6 for n, w in weights(model).items()}
    for m in (model, learn.model):
        for n, w in weights(m).items(): w.data.mul_(keep[n])
    learn.fit(1, .05, cbs=MaskCallback(), wd=0.)
    momentum, params = {}, dict(model.named_parameters())
    model.train()
    for i in range(4):
        x, y = (torch.stack(t) for t in zip(*items[8*i:8*i+8]))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for n, p in params.items():
            g = p.grad*keep.get(n, 1)
            momentum[n] = g if n not in momentum else .9*momentum[n] + g
            p.data -= .05*momentum[n]
    for n, p in learn.model.named_parameters(): torch.testing.assert_close(p, params[n], rtol=1e-4, atol=1e-6)


def test_no_gradient_before_any_step_callback(make):
    seen, raw = [], {}
    learn, cb = make(4), sparsify(80, schedule=lin)
    def capture(learn): raw.update({n: p.grad.clone() for n, p in learn.model.named_parameters()})
    def check(learn):
        masked = {n: g*cb.masks[n].full(g.shape) if n in cb.masks else g for n, g in raw.items()}
        norm = math.sqrt(sum(float((g.double()**2).sum()) for g in masked.values()))
        clipped = {n: g*.01/norm for n, g in masked.items()}
        for n, p in learn.model.named_parameters(): torch.testing.assert_close(p.grad, clipped[n], rtol=1e-3, atol=1e-9)
        seen.append(norm < math.sqrt(sum(float((g.double()**2).sum()) for g in raw.values())))
    learn.fit(2, 1e-2, cbs=[cb, GradientClip(.01), Do('after_backward', capture, order=-1000), Do('before_step', check, order=12), FirstSpy(cb)])
    assert len(seen) == 8 and all(seen)


def test_frozen_groups_are_untouched(make):
    learn, cb = make(4, splitter=body_head), sparsify(80, layer_type=(nn.Conv2d, nn.Linear))
    learn.freeze()
    before = snapshot(learn.model)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    after = snapshot(learn.model)
    for k in ('0.weight', '0.bias', '3.weight', '3.bias'): assert torch.equal(before[k], after[k]), k
    assert list(cb.masks) == ['8.weight'] and exact(learn.model[8].weight, 80)


def test_list_counts_frozen_layers(make):
    learn, cb = make(4, splitter=body_head), sparsify([10, 20, 75], layer_type=(nn.Conv2d, nn.Linear))
    learn.freeze()
    learn.fit(1, 1e-2, cbs=cb)
    assert exact(learn.model[8].weight, 75) and zeros(learn.model[0].weight, learn.model[3].weight) == 0


def test_dsd(make):
    learn, cb = make(10), sparsify(80, schedule=dsd)
    learn.fit(2, 1e-2, cbs=[cb, spy := Spy(cb)])
    total = 36 + 288
    assert spy.zeros[9] == 29 + 230 == max(spy.zeros)  # 80 % half way
    assert spy.zeros[:10] == sorted(spy.zeros[:10]) and spy.zeros[10] < spy.zeros[9] and spy.zeros[-1] < .3*total  # what came back last has hardly had a gradient
    assert cb.masks.sparsity == 0


def test_dsd_weights_come_back_from_zero(make):
    "Also with Lookahead: no stale copy is brought back"
    learn, cb = make(10, opt_func=partial(ranger, k=2)), sparsify(80, schedule=dsd)
    seen = []
    class Back(Callback):
        order = 1000
        def before_batch(self):
            if not self.training: return
            now = {n: m.full(p.shape) for n, m, p in ((n, cb.masks[n], p) for n, p in cb.masks.params(self.model).items())}
            for n, p in cb.masks.params(self.model).items():
                back = now[n] & ~self.last[n] if hasattr(self, 'last') else torch.zeros_like(now[n])
                if back.any():
                    seen.append(int(back.sum()))
                    assert not p.detach()[back].any()
                    if p in slow_weights(self.learn): assert not slow_weights(self.learn)[p][back].any()
            self.last = now
    learn.fit(2, 1e-2, cbs=[cb, Back()])
    assert sum(seen) == 29 + 230


def test_two_callbacks_share_a_schedule(make):
    learn = make(4)
    schedule = Schedule(sched_lin, start='1 epoch')
    convs, lins = sparsify(80, schedule=schedule), sparsify(50, schedule=schedule, layer_type=nn.Linear)
    learn.fit(3, 1e-2, cbs=[convs, lins, Spy(convs, lins)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and exact(learn.model[8].weight, 50)
    names = list(learn.recorder.metric_names)
    assert names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'zeros', 'sparsity 2', 'zeros 2', 'time']
    assert [list(v)[3:] for v in learn.recorder.values] == [pytest.approx(v, abs=1.) for v in ([0, 0, 0, 0], [40, 40, 25, 25], [80, 80, 50, 50])]
    assert learn.cbs.attrgot('name').filter(lambda n: 'sparsify' in n) == [] and not hasattr(learn, 'sparsify')


def test_two_lottery_callbacks(make):
    "One rewinds; what the other has masked stays zero"
    learn = make(4)
    convs = sparsify(80, schedule=iterative(2, start='1 epoch'), lth=True)
    lins = sparsify(50, schedule=iterative(2, start='2 epochs'), lth=True, layer_type=nn.Linear)
    bad = []
    def check(learn): bad.extend(n for cb in (convs, lins) if not cb.masks.held(learn.model) for n in ['held'])
    learn.fit(6, 1e-2, cbs=[convs, lins, Do('after_pred', check, order=1000)])
    assert not bad and all(exact(w, 80) for w in weights(learn.model).values()) and exact(learn.model[8].weight, 50)


def test_two_callbacks_one_rewinds(make):
    learn = make(4)
    lins, convs = sparsify(50, schedule='static', layer_type=nn.Linear), sparsify(80, schedule=iterative(2, start='1 epoch'), lth=True)
    bad = []
    learn.fit(4, 1e-2, cbs=[lins, convs, Do('after_pred', lambda learn: lins.masks.held(learn.model) or bad.append(1), order=1000)])
    assert not bad


# --- fine_tune and further fits

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('layer_type', [nn.Conv2d, (nn.Conv2d, nn.Linear)])
def test_fine_tune(make, context, layer_type):
    learn, cb = make(4, splitter=body_head), sparsify(80, context=context, layer_type=layer_type)
    body, head, heads = snapshot(learn.model), [], []
    class Phases(Spy):
        def after_fit(self):
            head.append(zero_sets(learn.model, nn.Linear))
            if len(head) == 1:  # the body is frozen, not even pruned
                assert all(torch.equal(learn.model.get_parameter(k), body[k]) for k in ('0.weight', '3.weight'))
                assert layer_type is nn.Conv2d or exact(learn.model[8].weight, 80)
        def after_step(self):
            super().after_step()
            heads.append(zeros(learn.model[8].weight))
    learn.fine_tune(2, 1e-2, cbs=[cb, Phases(cb)])
    ws = list(weights(learn.model, layer_type).values())
    if context == 'local': assert all(exact(w, 80) for w in ws)
    else: assert zeros(*ws) == math.floor(.8*sum(w.numel() for w in ws) + .5)
    assert heads == sorted(heads) and len(head) == 2 and within(*head)


@pytest.mark.parametrize('criterion', ['movement', 'large_init', 'updating_movmag'])
def test_fine_tune_with_references(make, criterion):
    learn, cb = make(4, splitter=body_head), sparsify(80, criteria=criterion, layer_type=(nn.Conv2d, nn.Linear))
    learn.fine_tune(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model, (nn.Conv2d, nn.Linear)).values())


@pytest.mark.parametrize('schedule', [agp, one_shot, iterative()])
def test_second_fit(make, schedule):
    learn, cb = make(4), sparsify(80, schedule=schedule)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    first = zero_sets(learn.model)
    learn.fit_one_cycle(2, 1e-2, cbs=[cb, spy := Spy(cb)])
    assert set(spy.zeros) == {29 + 230} and within(first, zero_sets(learn.model))


def test_second_fit_goes_on_from_an_interrupted_one(make):
    learn, cb = make(4), sparsify(80, schedule=lin)
    learn.fit(4, 1e-2, cbs=[cb, Do('after_batch', throw(CancelFitException()), at=(1, 3))])
    assert zeros(*weights(learn.model).values()) == 14 + 115
    first = zero_sets(learn.model)
    learn.fit(4, 1e-2, cbs=[cb, spy := Spy(cb)])
    assert spy.zeros[0] == 14 + 115 and spy.zeros == sorted(spy.zeros) and spy.zeros[-1] == 29 + 230 and within(first, zero_sets(learn.model))


def test_permanently_attached(make):
    cb = sparsify(80)
    learn = make(dls=exportable(), cbs=cb)
    assert len(learn.validate()) == 2  # before any fit
    assert learn.get_preds()[0].shape == (16, 4)
    assert zeros(*weights(learn.model).values()) == 0
    for _ in range(2):
        learn.fit(2, 1e-2, cbs=Spy(cb))
        assert all(exact(w, 80) for w in weights(learn.model).values())
        before, values = snapshot(learn.model), [list(v) for v in learn.recorder.values]
        assert len(learn.validate()) == 2 and learn.get_preds()[0].shape == (16, 4) and len(learn.predict(3)) == 3
        assert same(before, snapshot(learn.model)) and cb.masks.held(learn.model) and len(values) == 2


def test_permanently_attached_lottery(make):
    cb = sparsify(80, schedule=iterative(2, start='1 epoch'), lth=True, reset_end=True)
    learn = make(cbs=cb)
    learn.validate()
    learn.fit(3, 1e-2)
    before = snapshot(learn.model)
    learn.validate(); learn.get_preds()
    assert same(before, snapshot(learn.model)) and all(exact(w, 80) for w in weights(learn.model).values())


def test_validate_is_not_a_fit(make):
    "fastai's `validate` runs `before_fit` to `after_fit`: the callback must not take it for training"
    cb = sparsify(80, schedule=iterative(2, start='1 epoch'), lth=True, rewind_epoch=1, reset_end=True, save_tickets=True)
    learn = make(cbs=cb)
    assert len(learn.validate()) == 2  # rewind_epoch=1 is not reached in one epoch; nothing trains here
    learn.fit(3, 1e-2)
    before, tickets, history, saved = snapshot(learn.model), list(cb.tickets), list(cb.history), snapshot_of(cb.saved)
    learn.opt.state[learn.model[3].weight]['grad_avg'] = torch.ones(8, 4, 3, 3)
    learn.validate(); learn.get_preds()
    assert same(before, snapshot(learn.model)) and len(tickets) == 2 and cb.tickets == tickets and cb.history == history and same(saved, cb.saved)
    assert learn.opt.state[learn.model[3].weight]['grad_avg'].all()


def test_validate_in_the_middle_of_a_fit(make):
    learn, cb = make(4), sparsify(80, schedule=lin)
    learn.fit(3, 1e-2, cbs=[cb, Do('after_train', lambda l: l.validate(), order=1500), spy := Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and spy.zeros == sorted(spy.zeros)


def test_fetch_preds(make):
    learn, cb = make(4), sparsify(80)
    fetch = FetchPredsCallback()
    learn.fit(2, 1e-2, cbs=[cb, fetch, Spy(cb)])
    assert fetch.preds[0].shape == (16, 4) and all(exact(w, 80) for w in weights(learn.model).values())
    assert [len(v) for v in learn.recorder.values] == [5, 5]


def test_without_recorder(make):
    learn, cb = make(4), sparsify(80)
    learn.remove_cb(Recorder)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values())


def test_fit_of_no_epochs(make):
    learn, cb = make(), sparsify(80)
    before = snapshot(learn.model)
    learn.fit(0, 1e-2, cbs=cb)
    assert same(before, snapshot(learn.model))


def test_one_cycle(make):
    learn, cb = make(4), sparsify(80, schedule='one_cycle')
    learn.fit_one_cycle(3, 1e-2, cbs=[cb, Spy(cb), FirstSpy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values())


def test_discriminative_learning_rates(make):
    learn, cb = make(4, splitter=body_head), sparsify(80, layer_type=(nn.Conv2d, nn.Linear))
    lrs = []
    learn.fit_one_cycle(3, slice(1e-4, 1e-2), cbs=[cb, Spy(cb), Do('before_step', lambda l: lrs.append([h['lr'] for h in l.opt.hypers]))])
    assert all(exact(w, 80) for w in weights(learn.model, (nn.Conv2d, nn.Linear)).values())
    assert all(b == pytest.approx(100*a) for a, b in lrs)


# --- other callbacks

def plain(x):  # an optimizer's state as something to compare
    if isinstance(x, torch.Tensor): return x.tolist()
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) or type(x).__name__ == 'L' else x


@pytest.mark.parametrize('kwargs', [{}, dict(criteria='movement'), dict(schedule=iterative(2, start='1 epoch'), lth=True)])
def test_lr_find(make, kwargs):
    cb = sparsify(80, **kwargs)
    learn = make(4, cbs=[cb])
    learn.create_opt()
    before, state = snapshot(learn.model), plain(learn.opt.state_dict()['state'])
    pruned = []
    learn.add_cb(look := Do('after_step', lambda l: pruned.append(zeros(*weights(l.model).values())), order=1000))
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert same(before, snapshot(learn.model)) and plain(learn.opt.state_dict()['state']) == state and not any(pruned) and len(pruned) > 5 and not cb.masks
    learn.remove_cb(look)
    learn.fit(4, 1e-2, cbs=[Spy(cb), Do('after_batch', throw(CancelFitException()), at=(2, 1))])
    part, masks = cb.masks.sparsity, cb.masks.copy()
    before, state = snapshot(learn.model), plain(learn.opt.state_dict()['state'])
    learn.add_cb(spy := Spy(cb))
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert 0 < part < 81 and spy.steps > 5 and len(set(spy.zeros)) == 1
    assert same(before, snapshot(learn.model)) and plain(learn.opt.state_dict()['state']) == state and cb.masks == masks and cb.masks.held(learn.model)
    learn.remove_cb(spy)
    learn.fit(4, 1e-2)
    assert all(exact(w, 80) for w in weights(learn.model).values())


@pytest.mark.parametrize('end, scores, best', [(1., [9, 8, 7, 6], 3), (.5, [9, 8, 7, 6], 1), (.5, [9, 3, 4, 5], 3), (.5, [9, 3, 8, 5], 2), (.3, [1, 7, 5, 6], 1)])
@pytest.mark.parametrize('first', [True, False])
def test_save_model(make, end, scores, best, first):
    learn, cb = make(4, metrics=Score(scores)), sparsify(80, schedule=Schedule(sched_lin, end=end))
    ends = []
    cbs = [SaveModelCallback(monitor='score'), cb]
    learn.fit(4, 1e-2, cbs=(cbs if first else cbs[::-1]) + [Spy(cb), Do('after_epoch', lambda l: ends.append(snapshot(l.model)), order=1000)])
    assert all(exact(w, 80) for w in weights(learn.model).values())
    assert same(ends[best], snapshot(learn.model))


def test_save_model_without_a_change(make):
    "Once the target is there, a second fit with reset_on_fit=False keeps the best of the first"
    scores = [5, 9]
    learn, cb = make(4, metrics=Score(scores)), sparsify(80, schedule=Schedule(sched_lin, end=.4))
    saver = SaveModelCallback(monitor='score', reset_on_fit=False)
    learn.fit(2, 1e-2, cbs=[cb, saver])
    best = snapshot(learn.model)
    scores[:] = [3, 4]
    learn.fit(2, 1e-2, cbs=[cb, saver])
    assert same(best, snapshot(learn.model)) and saver.best == 9


def test_save_model_in_a_second_fit(make):
    "The sparsity does not move any more: every epoch counts"
    scores = [1, 2]
    learn, cb, ends = make(4, metrics=Score(scores)), sparsify(80), []
    learn.fit(2, 1e-2, cbs=cb)
    scores[:] = [9, 3, 4]
    learn.fit(3, 1e-2, cbs=[cb, SaveModelCallback(monitor='score'), Do('after_epoch', lambda l: ends.append(snapshot(l.model)), order=1000)])
    assert same(ends[0], snapshot(learn.model))


def test_early_stopping(make):
    learn, cb = make(4, metrics=Score([9, 8, 7, 6, 5, 4, 3, 2])), sparsify(80, schedule=Schedule(sched_lin, end=.5))
    learn.fit(8, 1e-2, cbs=[EarlyStoppingCallback(monitor='score', patience=2), cb])
    assert learn.epoch == 5 and all(exact(w, 80) for w in weights(learn.model).values())  # complete at the end of epoch 3; two more


def test_early_stopping_in_the_middle_of_an_epoch(make):
    learn, cb = make(4, metrics=Score([9, 8, 7, 6, 5, 4, 3, 2])), sparsify(80, schedule=Schedule(sched_lin, end='14 steps'))
    learn.fit(8, 1e-2, cbs=[EarlyStoppingCallback(monitor='score', patience=1), cb])
    assert learn.epoch == 4 and all(exact(w, 80) for w in weights(learn.model).values())


def test_reduce_lr_on_plateau(make):
    learn, cb = make(4, metrics=Score([9, 8, 7, 6, 5, 4])), sparsify(80, schedule=Schedule(sched_lin, end=.5))
    lrs = []
    learn.fit(6, 1e-2, cbs=[ReduceLROnPlateau(monitor='score', patience=2), cb, Do('before_train', lambda l: lrs.append(l.opt.hypers[-1]['lr']))])
    assert lrs == [1e-2]*5 + [pytest.approx(1e-3)]  # complete at the end of epoch 2; reduced after two worse ones
    assert all(exact(w, 80) for w in weights(learn.model).values())


@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_gradient_accumulation(make, opt_func):
    learn, cb = make(7, opt_func=opt_func), sparsify(80, schedule=lin)
    learn.fit(2, 1e-2, cbs=[cb, GradientAccumulation(16), spy := Spy(cb), FirstSpy(cb)])
    assert spy.steps == 7 and all(exact(w, 80) for w in weights(learn.model).values())


@pytest.mark.filterwarnings('ignore:User provided device_type', 'ignore:.*GradScaler is enabled', 'ignore:.*CUDA is not available')
@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision(make, precision):
    try: getattr(make(), precision)().fit(1)
    except Exception as e: pytest.skip(f'fastai cannot do {precision} on the CPU: {e}')
    learn, cb = getattr(make(4), precision)(), sparsify(80)
    learn.fit_one_cycle(2, 1e-2, cbs=[cb, spy := Spy(cb), GradientClip(.1)])
    assert spy.steps == 8 and all(exact(w, 80) for w in weights(learn.model).values())


def test_infinite_gradients_of_masked_weights(make):
    "What mixed precision overflows to: infinity times zero is not zero, masked it must be"
    def overflow(learn):
        for p, gone in dead(cb.masks, learn.model).values(): p.grad[gone] = float('inf')
    learn, cb = make(4), sparsify(80, schedule='static')
    learn.fit(1, 1e-2, cbs=[cb, Do('after_backward', overflow, order=-1000), spy := Spy(cb)])
    assert spy.steps == 4 and all(exact(w, 80) and w.isfinite().all() for w in weights(learn.model).values())


def test_mixup(make):
    learn, cb = make(4), sparsify(80)
    learn.fit(2, 1e-2, cbs=[cb, MixUp(), Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values())


def test_csv_logger(make, tmp_path):
    learn, cb = make(4), sparsify(80, schedule=lin)
    with learn.no_logging(): learn.fit(2, 1e-2, cbs=[CSVLogger(), cb])
    df = pd.read_csv(tmp_path/'history.csv')
    assert list(df['sparsity']) == pytest.approx([40, 80]) and list(df['zeros']) == pytest.approx([100*129/324, 100*259/324])


@pytest.mark.parametrize('add_time', [True, False])
@pytest.mark.parametrize('train_metrics', [True, False])
def test_recorder(make, add_time, train_metrics):
    learn, cb = make(4), sparsify(80)
    learn.recorder.add_time, learn.recorder.train_metrics = add_time, train_metrics
    lines, counted = [], []
    learn.logger = lambda line: lines.append(list(line))
    learn.fit(3, 1e-2, cbs=[cb, Do('after_epoch', lambda l: counted.append(100*zeros(*weights(l.model).values())/324), order=-1000)])
    names = list(learn.recorder.metric_names)
    at = names.index('sparsity')
    assert names[at:] == ['sparsity', 'zeros'] + ['time']*add_time and all(len(line) == len(names) for line in lines)
    assert [line[at] for line in lines] == pytest.approx([agp(80, (e + 1)/3) for e in range(3)])
    assert [line[at + 1] for line in lines] == pytest.approx(counted) and counted[-1] == pytest.approx(100*259/324)
    assert [list(v)[at-1:at+1] for v in learn.recorder.values] == [line[at:at+2] for line in lines]
    learn.fit(1, 1e-2)  # and no columns without the callback
    assert 'sparsity' not in learn.recorder.metric_names and len(learn.recorder.values[-1]) == (4 if train_metrics else 3)


def test_prints_nothing(make, capsys, recwarn):
    learn, cb = make(4), sparsify(80, schedule=iterative(2, start='1 epoch'), lth=True, save_tickets=True)
    learn.fit(3, 1e-2, cbs=cb)
    learn.validate()
    assert capsys.readouterr() == ('', '') and not [w for w in recwarn if 'fasterai' in str(w.filename) or 'shadowing' in str(w.message)]


def test_progress_bar_and_log(make, tmp_path, capsys):
    learn = Learner(loaders(), conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    learn.fit(2, 1e-2, cbs=sparsify(80))
    out = capsys.readouterr().out
    assert 'sparsity' in out and '80.0' in out


def test_sparsity_report(make):
    learn, cb = make(4), sparsify(80)
    learn.fit(2, 1e-2, cbs=cb)
    report = learn.sparsity_report(layer_type=nn.Conv2d)
    assert report.sparsity == pytest.approx(cb.measured) == pytest.approx(100*259/324) and cb.masks.held(learn.model)


# --- saving, resuming, copying

def test_save_and_load(make, tmp_path):
    learn, cb = make(4), sparsify(80)
    learn.fit(2, 1e-2, cbs=cb)
    learn.save('sparse', with_opt=False)
    assert set(learn.model.state_dict()) == set(conv_net().state_dict())
    other = make(4)
    other.load('sparse', with_opt=False)
    other.model.load_state_dict(torch.load(tmp_path/'models'/'sparse.pth', weights_only=True), strict=True)
    assert same(snapshot(learn.model), snapshot(other.model))
    other.fit(1, 1e-2, cbs=[mask := MaskCallback(), spy := Spy(mask)])
    assert all(exact(w, 80) for w in weights(other.model).values()) and spy.steps == 4


@pytest.mark.parametrize('granularity', ['weight', 'kernel'])
@pytest.mark.parametrize('how', ['zeros', 'path', 'masks'])
@pytest.mark.parametrize('criterion', ['large_final', 'random', 'updating_movement'])
def test_resume(make, tmp_path, granularity, how, criterion):
    kwargs = dict(granularity=granularity, schedule=agp, criteria=criterion)
    learn, cb = make(5), sparsify(80, **kwargs)
    learn.fit(4, 1e-2, cbs=[cb, _StopAfter(1)])
    learn.save('half', with_opt=True)
    cb.masks.save(tmp_path/'masks.safetensors')
    before = zero_sets(learn.model)
    assert 0 < cb.masks.sparsity < 80
    other = make(5)
    other.load('half', with_opt=True)
    masks = dict(zeros=None, path=str(tmp_path/'masks.safetensors'), masks=cb.masks.copy())[how]
    again = sparsify(80, masks=masks, **kwargs)
    first = []
    other.fit(4, 1e-2, start_epoch=2, cbs=[again, spy := Spy(again), Do('before_fit', lambda l: first.append(again.masks.copy()), order=1000)])
    assert first == [cb.masks] and within(before, zero_sets(other.model)) and spy.steps == 10
    assert spy.zeros == sorted(spy.zeros) and spy.zeros[0] >= zeros(*weights(learn.model).values())
    expected = sum((math.floor(.8*w.numel()/u + .5))*u for w, u in zip(weights(other.model).values(), [1, 1] if granularity == 'weight' else [9, 9]))
    assert zeros(*weights(other.model).values()) == expected
    curve = agp.over(80, 4, 20)
    assert again.history == pytest.approx(list(curve[10:]), abs=100/36)


class _StopAfter(Callback):
    order = 100
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch == self.last: raise CancelFitException()


def test_lottery_cannot_resume_after_its_rewind_epoch(make):
    "The weights to go back to are gone: an error, not the checkpoint's own weights"
    learn = make(4)
    with pytest.raises(ValueError): learn.fit(4, 1e-2, start_epoch=2, cbs=sparsify(80, schedule=iterative(2, start='3 epochs'), lth=True, rewind_epoch=1))


def test_masks_of_another_model(make):
    learn, cb = make(4), sparsify(80)
    learn.fit(1, cbs=cb)
    other = make(4, model=nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    with pytest.raises(ValueError, match='0.weight'): other.fit(1, cbs=sparsify(80, masks=cb.masks))


@pytest.mark.parametrize('attached', [True, False])
def test_export(make, tmp_path, attached):
    cb = sparsify(80)
    learn = make(dls=exportable(), cbs=cb if attached else None)
    learn.fit(2, 1e-2, cbs=[] if attached else cb)
    expected = learn.predict(5)
    learn.export('export.pkl')
    assert all(exact(w, 80) for w in weights(learn.model).values())
    loaded = load_learner(tmp_path/'export.pkl')
    assert same(snapshot(learn.model), snapshot(loaded.model)) and torch.equal(loaded.predict(5)[2], expected[2])
    learn.fit(1, 1e-2, cbs=[Spy(cb)] if attached else [cb, Spy(cb)])  # and it goes on
    assert all(exact(w, 80) for w in weights(learn.model).values())
    loaded.dls = exportable()
    loaded.fit(1, 1e-2)
    assert all(exact(w, 80) == attached for w in weights(loaded.model).values())  # held by the callback that came along


def test_pickle(make):
    learn, cb = make(4), sparsify(80, criteria='movement')
    fresh = pickle.loads(pickle.dumps(cb))
    learn.fit(2, 1e-2, cbs=[fresh, Spy(fresh)])
    again = pickle.loads(pickle.dumps(fresh))
    assert again.masks == fresh.masks
    learn.fit(2, 1e-2, cbs=[again, spy := Spy(again)])
    assert set(spy.zeros) == {259}


def test_deepcopy(make):
    cb = sparsify(80, schedule=lin)
    learn = make(4, cbs=cb)
    learn.fit(2, 1e-2, cbs=_StopAfter(0))
    before, masks = snapshot(learn.model), cb.masks.copy()
    other = copy.deepcopy(learn)
    assert other.sparsify is not cb and other.sparsify.masks == cb.masks
    other.fit(2, 1e-2, cbs=Spy(other.sparsify))
    assert all(exact(w, 80) for w in weights(other.model).values())
    assert same(before, snapshot(learn.model)) and cb.masks == masks
    learn.fit(2, 1e-2, cbs=Spy(cb))
    assert all(exact(w, 80) for w in weights(learn.model).values())


# --- cancelled and broken

@pytest.mark.parametrize('event, exception, at', [
    ('before_batch', CancelBatchException, (0, 2)), ('after_pred', CancelBatchException, (1, 3)), ('after_loss', CancelBatchException, (0, 0)), ('before_backward', CancelBackwardException, (1, 1)),
    ('after_backward', CancelBatchException, (1, 1)), ('before_step', CancelStepException, (1, 3)), ('before_step', CancelBatchException, (1, 1)), ('after_step', CancelBatchException, (1, 1)),
    ('before_batch', CancelTrainException, (0, 1)), ('after_batch', CancelTrainException, (0, 2)), ('before_batch', CancelEpochException, (0, 2)), ('before_validate', CancelValidException, None)])
@pytest.mark.parametrize('order', [-5, 1500])
def test_cancelled(make, event, exception, at, order):
    learn, cb = make(4), sparsify(80, schedule=lin)
    learn.fit(3, 1e-2, cbs=[cb, spy := Spy(cb), Do(event, throw(exception()), at=at, order=order)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and spy.zeros == sorted(spy.zeros)


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'after_step', 'after_batch'])
@pytest.mark.parametrize('order', [-5, 1500])
def test_cancelled_fit(make, event, order):
    learn, cb = make(4), sparsify(80, schedule=lin)
    learn.fit(3, 1e-2, cbs=[cb, spy := Spy(cb), Do(event, throw(CancelFitException()), at=(1, 2), order=order)])
    assert_plain(learn, cb)
    n = 6 + (event != 'before_batch' or order > 0)
    assert [cb.masks[k].dead() for k in ('0.weight', '3.weight')] == [math.floor(80*n/12*w/100 + .5) for w in (36, 288)]


def assert_plain(learn, cb):
    "The model is a plain one, as sparse as its masks"
    fresh = conv_net()
    for m, f in zip(learn.model.modules(), fresh.modules()):
        assert vars(m).keys() == vars(f).keys() and type(m) is type(f)
        assert not any(v for k, v in vars(m).items() if 'hooks' in k)
    assert all(not p._backward_hooks and not getattr(p, '_post_accumulate_grad_hooks', None) and type(p) is nn.Parameter for p in learn.model.parameters())
    assert learn.model.state_dict().keys() == fresh.state_dict().keys()
    assert cb not in learn.cbs and cb.learn is None and not hasattr(learn, 'sparsify')
    assert 0 < cb.masks.sparsity < 80 and cb.masks.held(learn.model) and zeros(*weights(learn.model).values()) == sum(cb.masks[n].dead() for n in cb.masks if n.endswith('weight'))


@pytest.mark.parametrize('exception, order', [(RuntimeError('boom'), 1500), (KeyboardInterrupt(), -5)])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'before_step', 'after_step', 'after_batch'])
def test_interrupted(make, exception, event, order):
    learn, cb = make(4), sparsify(80, schedule=lin)
    learn.fit(1, 1e-2)
    with pytest.raises(type(exception)): learn.fit(3, 1e-2, cbs=[cb, Do(event, throw(exception), at=(1, 2), order=order)])
    assert_plain(learn, cb)
    before = zero_sets(learn.model)
    assert len(learn.validate()) == 2
    learn.fit(1, 1e-2, cbs=[mask := MaskCallback(cb.masks), Spy(mask)])
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and within(before, zero_sets(learn.model))


@pytest.mark.parametrize('exception', [RuntimeError('boom'), KeyboardInterrupt()])
def test_interrupted_while_attached(make, exception):
    cb = sparsify(80, schedule=lin)
    learn = make(4, cbs=cb)
    with pytest.raises(type(exception)): learn.fit(3, 1e-2, cbs=Do('after_batch', throw(exception), at=(1, 2)))
    assert len(learn.validate()) == 2  # no leftover columns
    learn.fit(2, 1e-2, cbs=Spy(cb))
    assert all(exact(w, 80) for w in weights(learn.model).values())


def test_error_before_the_fit_changes_nothing(make):
    learn, cb = make(4), sparsify([10, 20, 30])
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='3 values for 2 layers'): learn.fit(1, cbs=cb)
    assert same(before, snapshot(learn.model)) and cb not in learn.cbs


# --- lottery tickets

@pytest.mark.parametrize('rewind_epoch', [0, 1])
@pytest.mark.parametrize('reset_end', [False, True])
@pytest.mark.parametrize('opt_func', [Adam, partial(ranger, k=2), partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_lottery(make, rewind_epoch, reset_end, opt_func):
    learn = make(4, opt_func=opt_func)
    cb = sparsify(80, schedule=lottery(3, start='2 epochs'), lth=True, rewind_epoch=rewind_epoch, reset_end=reset_end)
    saved, changes = {}, []
    def keep(learn):
        if learn.epoch == rewind_epoch: saved.update(snapshot(learn.model))
    def ticket(): return {k: v*cb.masks[k].full(v.shape) if k in cb.masks else v for k, v in saved.items()}
    class Look(Callback):
        order = 1000
        def before_batch(self):
            if not self.training: return
            if not changes or cb.masks != changes[-1]:
                if changes:
                    assert same(ticket(), snapshot(self.model))
                    assert not any(isinstance(v, torch.Tensor) and v.any() for p in self.model.parameters() for v in state_of(self.learn, p).values())
                    assert not slow_weights(self.learn)
                changes.append(cb.masks.copy())
    learn.fit(6, 1e-2, cbs=[cb, Do('before_epoch', keep, order=-1000), Look(), Spy(cb)])
    assert [m.sparsity for m in changes[1:]] == pytest.approx([100*(1 - .2**(i/3)) for i in (1, 2, 3)], abs=1.5)
    assert len(saved) == len(snapshot(learn.model)) and saved['1.num_batches_tracked'] == 4*rewind_epoch
    assert all(exact(w, 80) for w in weights(learn.model).values())
    assert same(ticket(), snapshot(learn.model)) == reset_end


def test_reset_end_alone(make):
    learn, cb = make(4), sparsify(80, reset_end=True)
    first = snapshot(learn.model)
    learn.fit(3, 1e-2, cbs=cb)
    assert same({k: v*cb.masks[k].full(v.shape) if k in cb.masks else v for k, v in first.items()}, snapshot(learn.model))


def test_tickets_on_disk(make, tmp_path):
    learn, cb = make(4), sparsify(80, schedule=iterative(3, start='1 epoch'), lth=True, save_tickets=True)
    first = snapshot(learn.model)
    learn.fit(4, 1e-2, cbs=cb)
    assert len(cb.tickets) == 3 and all(p.parent == tmp_path/'models' for p in cb.tickets)
    for path, asked in zip(cb.tickets, (80/3, 160/3, 80)):
        model, masks = conv_net(), Masks.load(path.with_suffix('.masks.safetensors'))
        missing, extra = load_model(model, str(path))
        assert not missing and not extra and all(exact(w, asked) for w in weights(model).values()) and masks.held(model)
        assert same({k: v*masks[k].full(v.shape) if k in masks else v for k, v in first.items()}, snapshot(model))


def test_second_lottery_starts_from_its_own_weights(make):
    "A fit that ends before its rewind epoch must not go back to the weights of an earlier fit"
    learn, cb = make(4), sparsify(80, schedule=iterative(2, start='2 epochs'), lth=True, rewind_epoch=1, reset_end=True)
    learn.fit(4, 1e-2, cbs=cb)
    last = {}
    learn.fit(4, 1e-2, cbs=[cb, Do('after_batch', lambda l: last.update(snapshot(l.model)), order=-1000), Do('after_batch', throw(CancelFitException()), at=(0, 2))])
    assert same(last, snapshot(learn.model))


# --- models and layers

def test_model_is_a_part(make):
    learn = make(model=nn.Sequential(nn.Sequential(*conv_net()[:3]), conv_net()[3:]))
    cb = sparsify(80, model=learn.model[1], layer_type=(nn.Conv2d, nn.Linear))
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert zeros(learn.model[0][0].weight) == 0 and all(exact(w, 80) for w in weights(learn.model[1], (nn.Conv2d, nn.Linear)).values())
    assert list(cb.masks) == ['3.weight', '8.weight'] and learn.recorder.values[-1][-1] == pytest.approx(80, abs=.5)


def test_model_is_a_part_lottery(make):
    learn = make(model=nn.Sequential(nn.Sequential(*conv_net()[:3]), conv_net()[3:]))
    cb = sparsify(80, model=learn.model[1], schedule=iterative(2, start='1 epoch'), lth=True, reset_end=True)
    first = snapshot(learn.model)
    learn.fit(3, 1e-2, cbs=[cb, Spy(cb)])
    assert exact(learn.model[1][0].weight, 80) and torch.equal(first['0.0.weight'], learn.model[0][0].weight)


def test_model_is_not_a_part(make):
    "To sparsify a model that is not trained is a silent no-op: refuse"
    with pytest.raises(ValueError): make().fit(1, 1e-2, cbs=sparsify(80, model=conv_net()))


@pytest.mark.parametrize('layer_type', [nn.Linear, (nn.Conv2d, nn.Linear), (nn.Linear, nn.Conv2d), nn.Module])
def test_layer_types(make, layer_type):
    learn, cb = make(4), sparsify(60, layer_type=layer_type)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    kind = (nn.Conv2d, nn.Linear) if layer_type is nn.Module else layer_type
    assert all(exact(w, 60) for w in weights(learn.model, kind).values()) and (nn.Conv2d in (kind if isinstance(kind, tuple) else (kind,)) or zeros(*weights(learn.model).values()) == 0)


class TextNet(nn.Module):
    def __init__(self, kind='embedding', sparse=False, tied=False):
        super().__init__()
        self.emb = nn.Embedding(12, 8, sparse=sparse)
        self.mid = nn.MultiheadAttention(8, 4, batch_first=True) if kind == 'attention' else nn.LSTM(8, 8, num_layers=2, batch_first=True) if kind == 'lstm' else None
        self.decoder = nn.Linear(8, 12, bias=False) if tied else None
        if tied: self.decoder.weight = self.emb.weight
        self.out = nn.Linear(12 if tied else 8, 4)
    def forward(self, x):
        x = self.emb(x)
        if self.mid is not None: x = self.mid(x, x, x)[0] if isinstance(self.mid, nn.MultiheadAttention) else self.mid(x)[0]
        x = x[:, 0]
        return self.out(x if self.decoder is None else self.decoder(x))


@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('granularity', ['weight', 'row'])
@pytest.mark.parametrize('momentum', [0, .9])
def test_embedding(make, sparse, granularity, momentum):
    opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=momentum))
    learn, cb = make(4, TextNet(sparse=sparse), items=tokens, opt_func=opt_func), sparsify(50, granularity, layer_type=nn.Embedding)
    seen = []
    learn.fit(1, .1, wd=0.)
    learn.fit(2, .1, wd=0., cbs=[cb, spy := Spy(cb), Do('before_step', lambda l: seen.append(l.model.emb.weight.grad.is_sparse))])
    assert exact(learn.model.emb.weight, 50) and spy.steps == 8 and all(s == sparse for s in seen)


def test_infinite_sparse_gradients(make):
    def overflow(learn):
        p, gone = dead(cb.masks, learn.model)['emb.weight']
        g = p.grad.coalesce()
        g.values()[gone[g.indices()[0]]] = float('inf')
        p.grad = g
    learn, cb = make(4, TextNet(sparse=True), items=tokens, opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), sparsify(50, schedule='static', layer_type=nn.Embedding)
    learn.fit(1, .1, wd=0., cbs=[cb, Do('after_backward', overflow, order=-1000), Spy(cb)])
    assert exact(learn.model.emb.weight, 50) and learn.model.emb.weight.isfinite().all()


@pytest.mark.parametrize('granularity', ['head', 'weight', 'row'])
def test_attention(make, granularity):
    learn, cb = make(4, TextNet('attention'), items=tokens), sparsify(50, granularity, layer_type=nn.MultiheadAttention)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    qkv, out = learn.model.mid.in_proj_weight, learn.model.mid.out_proj.weight
    assert zeros(qkv, out) == 128
    if granularity == 'head':
        gone = (out == 0).view(8, 4, 2).all(2).all(0)
        assert int(gone.sum()) == 2 and torch.equal((qkv == 0).view(3, 4, 2, 8).all(3).all(2).all(0), gone)


@pytest.mark.parametrize('context', ['local', 'global'])
def test_lstm(make, context):
    learn, cb = make(4, TextNet('lstm'), items=tokens), sparsify(70, context=context, layer_type=nn.LSTM)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    ws = [p for n, p in learn.model.mid.named_parameters() if 'weight' in n]
    assert zeros(*ws) == math.floor(.7*sum(w.numel() for w in ws) + .5)


@pytest.mark.parametrize('layer_type', [nn.Embedding, (nn.Embedding, nn.Linear)])
def test_tied_weights(make, layer_type):
    learn, cb = make(4, TextNet(tied=True), items=tokens), sparsify(50, layer_type=layer_type)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert learn.model.emb.weight is learn.model.decoder.weight and exact(learn.model.emb.weight, 50)
    assert exact(learn.model.out.weight, 50) == (layer_type is not nn.Embedding)


def test_channels_last(make):
    learn, cb = make(4, conv_net().to(memory_format=torch.channels_last)), sparsify(80)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_double_precision(make):
    learn, cb = make(4, conv_net().double(), items=partial(images, dtype=torch.float64)), sparsify(80)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('how', ['fp32', 'fp16', 'masks', 'movement', 'global', 'lth'])
def test_cuda(make, tmp_path, how):
    kwargs = dict(movement=dict(criteria='movement'), **{'global': dict(context='global')}, lth=dict(schedule=iterative(2, start='1 epoch'), lth=True)).get(how, {})
    masks = None
    if how == 'masks':
        m = conv_net()
        fl.Sparsifier(m, 'weight', 'local', 'large_final').sparsify_model(20).save(tmp_path/'m')
        masks = tmp_path/'m'
    learn, cb = make(dls=loaders(4, device='cuda')), sparsify(80, masks=masks, **kwargs)
    if how == 'fp16': learn.to_fp16()
    learn.fit_one_cycle(3, 1e-2, cbs=cb)
    ws = list(weights(learn.model).values())
    assert ws[0].is_cuda and (zeros(*ws) == 259)


def test_a_model_with_attributes_like_ours(make):
    "fastai's callbacks see the attributes of the model: names must not mix"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.columns, self.saved, self.searching, self.history = conv_net(), ['x'], {}, True, [1.]
        def forward(self, x): return self.net(x)
    learn, cb = make(4, Net()), sparsify(80)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert all(exact(w, 80) for w in weights(learn.model).values()) and learn.model.columns == ['x'] and learn.recorder.values[-1][-2] == 80


# --- memory and chance

@pytest.mark.parametrize('criterion', criteria)
def test_references_only_where_needed(make, criterion):
    learn, cb = make(), sparsify(70, criteria=criterion)
    first = snapshot(learn.model)
    learn.fit(2, 1e-2, cbs=cb)
    c = criteria[criterion]
    assert cb.saved is None and set(cb.sparsifier.refs) == ({'0.weight', '3.weight'} if c.needs_init or c.needs_update else set())
    if c.needs_init: assert all(torch.equal(r, first[n]) for n, r in cb.sparsifier.refs.items())
    learn.fit(2, 1e-2, cbs=cb)
    if c.needs_init: assert all(torch.equal(r, first[n]) for n, r in cb.sparsifier.refs.items())  # still those of the first


def test_masks_are_a_byte_per_weight(make):
    learn, cb = make(), sparsify(70)
    learn.fit(1, 1e-2, cbs=cb)
    assert all(m.keep.dtype == torch.bool and m.keep.numel() == p.numel() for m, p in ((cb.masks[n], p) for n, p in cb.masks.params(learn.model).items()))
    learn.fit(1, 1e-2, cbs=(filters := sparsify(50, 'filter')))
    assert filters.masks['3.weight'].keep.numel() == 8


@pytest.mark.parametrize('criterion', ['large_final', 'random'])
def test_deterministic(make, criterion):
    def run(seed):
        torch.manual_seed(seed)
        model = conv_net()
        learn, cb = make(4, model, dls=DataLoaders.from_dsets(images(32), images(8, 1), bs=8, val_bs=8, device='cpu', num_workers=0, shuffle=False)), sparsify(80, criteria=criterion)
        learn.fit(2, 1e-2, cbs=cb)
        return snapshot(learn.model)
    assert same(run(1), run(1)) and not same(run(1), run(2))


def test_ties_are_deterministic_and_exact(make):
    model = conv_net()
    with torch.no_grad(): model[3].weight.fill_(.1)
    learn, cb = make(4, model), sparsify(50, schedule='static')
    learn.fit(1, 0., wd=0., cbs=cb)
    assert exact(learn.model[3].weight, 50)


# --- MaskCallback

def test_mask_callback_holds_what_is_zero(make):
    learn = make(4)
    fl.Sparsifier(learn.model, 'weight', 'local', 'large_final').sparsify_model(70)
    before = zero_sets(learn.model)
    learn.fit(2, 1e-2, cbs=[cb := MaskCallback(), Spy(cb), FirstSpy(cb)])
    assert same(before, zero_sets(learn.model))
    learn.fit_one_cycle(1, 1e-2, cbs=[cb, Spy(cb)])
    assert same(before, zero_sets(learn.model))
    learn.fit(1, 1e-2)  # and without it they come back
    assert zeros(*weights(learn.model).values()) == 0


def test_mask_callback_with_masks(make):
    learn = make(4)
    masks = fl.Sparsifier(learn.model, 'filter', 'local', 'large_final').plan(50)
    assert zeros(learn.model[3].weight) == 0
    learn.fit(1, 1e-2, cbs=[cb := MaskCallback(masks), Spy(cb)])
    assert int((learn.model[3].weight == 0).flatten(1).all(1).sum()) == 4 and zeros(learn.model[3].bias) == 4


def test_mask_callback_attached(make):
    learn = make(4, cbs=MaskCallback())
    fl.Sparsifier(learn.model, 'weight', 'local', 'large_final').sparsify_model(70)
    learn.validate()
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    learn.fit(2, 1e-2, cbs=SaveModelCallback())
    assert all(exact(w, 70) for w in weights(learn.model).values())
    assert 'sparsity' not in learn.recorder.metric_names


def test_mask_callback_looks_when_training_begins(make):
    "Not when a model is validated before"
    learn = make(4, cbs=MaskCallback())
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape == (16, 4)
    fl.Sparsifier(learn.model, 'weight', 'local', 'large_final').sparsify_model(70)
    learn.fit(1, 1e-2)
    assert all(exact(w, 70) for w in weights(learn.model).values())


def test_mask_callback_after_lr_find(make):
    "A search for a learning rate is not yet training either"
    learn = make(4, cbs=MaskCallback())
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    fl.Sparsifier(learn.model, 'weight', 'local', 'large_final').sparsify_model(70)
    learn.fit(1, 1e-2)
    assert all(exact(w, 70) for w in weights(learn.model).values())


def test_no_training_batches(make):
    "Fewer items than a batch: fastai would train nothing, and say nothing"
    learn, cb = make(4), sparsify(80)
    learn.dls.train.drop_last, learn.dls.train.bs = True, 10**6
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='no batches'): learn.fit(1, 1e-2, cbs=cb)
    assert same(before, snapshot(learn.model))
