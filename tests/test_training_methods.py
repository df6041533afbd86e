"""Terms of the training loss, distillation and regrowth in fastai's real training loop, against what is written out by hand."""
import copy
import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, Adam
from fastai.torch_core import to_float
from test_training_loop import (Do, FirstSpy, Spy, body_head, conv_net, exact, exportable, images, make, one_thread, plain, same, snapshot, state_of,
                                throw, tokens, weights, zeros, TextNet)
from torch import nn
from torch.nn import functional as F

from fasterai_lib.all import (ADMMCallback, DistillCallback, LossTermCallback, Masks, MovementCallback, RegrowCallback, RegularizeCallback, Schedule, SoftThresholdCallback,
                              SparsifyCallback, StraightThroughCallback, TidyCallback, erk, exchange, lin)
from fasterai_lib.core.criteria import Criteria, criteria
from fasterai_lib.core.schedule import sched_lin

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*pin_memory')


def in_order(n_batches=4, bs=8, dtype=torch.float32):
    return DataLoaders.from_dsets(images(n_batches*bs, dtype=dtype), images(16, 1, dtype=dtype), bs=bs, val_bs=16, device='cpu', num_workers=0, shuffle=False)


def plain_net():  # without statistics of batches: the same loss whatever the batch
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def gradients(learn, cb, **kwargs):
    "Of the first step of a fit, by name; also with the callback in use"
    found = {}
    def take(learn): found.update({n: p.grad.clone() for n, p in learn.model.named_parameters()}) if not found else None
    learn.fit(1, 0., wd=0., cbs=[*([cb] if cb else []), *kwargs.get('cbs', []), Do('before_step', take, order=1000)])
    return found


def losses(learn): return [float(x) for x in learn.recorder.losses], [list(v)[:3] for v in learn.recorder.values]


def terms(): return dict(regularize=lambda model: RegularizeCallback(weight=.1), distill=lambda model: DistillCallback(conv_net(), features=['0', '3']))


every_term = pytest.mark.parametrize('term', terms())


# --- terms: only what is trained

@every_term
def test_recorded_losses_are_those_of_the_task(make, term):
    "With a learning rate of 0, everything that is recorded is the same with and without the term"
    model = conv_net()
    before, rows = snapshot(model), []
    for cb in (None, terms()[term](model)):
        learn = make(model=copy.deepcopy(model), dls=in_order())
        learn.fit(2, 0., wd=0., cbs=cb)
        rows.append(losses(learn))
    assert rows[0] == rows[1] and len(cb.history) == 8 and all(t != 0 for t in cb.history)
    assert same(before, snapshot(model))


@every_term
def test_nothing_in_validation(make, term):
    cb = terms()[term](None)
    learn = make(cbs=cb)
    calls = []
    trained = cb.trained
    cb.trained = lambda loss: calls.append(learn.training) or trained(loss)
    learn.validate()
    learn.get_preds()
    assert not calls
    learn.fit(2, 1e-2)
    assert calls == [True]*6
    first = cb.history
    learn.validate()
    assert cb.history == first and len(first) == 6


@every_term
def test_lr_find(make, term):
    cb = terms()[term](None)
    learn = make(4, cbs=[cb])
    learn.fit(1, 1e-2)
    before, state, history = snapshot(learn.model), plain(learn.opt.state_dict()['state']), cb.history
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    assert same(before, snapshot(learn.model)) and plain(learn.opt.state_dict()['state']) == state and cb.history == history


@every_term
@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt(), CancelFitException()])
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'forward'])
def test_errors_leave_nothing(make, term, error, at):
    learn, cb = make(4), terms()[term](None)
    class Fail(nn.Module):
        def forward(self, x):
            if fail: raise error
            return x
    learn.model.add_module('9', Fail())
    modes, fail = {n: m.training for n, m in getattr(cb, 'teacher', nn.Module()).named_modules()}, at == 'forward'
    try: learn.fit(2, 1e-2, cbs=[cb, *([] if fail else [Do(at, throw(error), at=(0, 2), order=-5)])])
    except (RuntimeError, KeyboardInterrupt): pass
    fail = False
    for net in (learn.model, getattr(cb, 'teacher', nn.Module())):
        for m in net.modules(): assert not m._forward_hooks and not m._forward_pre_hooks
    assert modes == {n: m.training for n, m in getattr(cb, 'teacher', nn.Module()).named_modules()}
    learn.fit(1, 1e-2, cbs=cb)
    assert len(cb.history) == 4


@every_term
def test_gradient_accumulation(make, term):
    "Two batches of 8 make one step of 16: the same gradient as one batch of 16"
    model, cb = plain_net().double(), None
    grads = []
    for bs, cbs in ((16, []), (8, [GradientAccumulation(16)])):
        dls = in_order(32//bs, bs, torch.float64)
        cb = RegularizeCallback(weight=.1) if term == 'regularize' else DistillCallback(plain_net_of(3), features=['0', '2'])
        grads.append(gradients(make(model=copy.deepcopy(model), dls=dls), cb, cbs=cbs))
    for n in grads[0]: torch.testing.assert_close(grads[1][n], grads[0][n], rtol=1e-9, atol=1e-12)


def plain_net_of(seed):
    torch.manual_seed(seed)
    return plain_net().double()


# --- regularisation

def by_hand(w, criterion, granularity, kind, ref):
    "The penalty of a convolution's weight, by loops over numpy-like indices, in float64"
    o, i, h, v = w.shape
    units = {'filter': [w[a] for a in range(o)], 'kernel': [w[a, b] for a in range(o) for b in range(i)], 'weight': list(w.flatten()),
             'channel': [w[a, :, y, x] for a in range(o) for y in range(h) for x in range(v)], 'shared_kernel': [w[:, b] for b in range(i)]}[granularity]
    f = dict(large_final=torch.abs, squared_final=torch.square, l1=torch.abs, l2=torch.abs)[criterion]
    if kind == 'l1': return sum(f(u).sum() for u in units)
    if kind == 'group_lasso': return sum(u.numel()**.5*(f(u)**2).sum()**.5 for u in units)
    reduce = dict(large_final=torch.mean, squared_final=torch.mean, l1=torch.sum, l2=lambda s: (s**2).sum()**.5)[criterion]
    return sum(reduce(f(u)) for u in units)


@pytest.mark.parametrize('kind', [None, 'l1', 'group_lasso'])
@pytest.mark.parametrize('granularity', ['filter', 'kernel', 'weight', 'channel', 'shared_kernel'])
@pytest.mark.parametrize('criterion', ['large_final', 'squared_final', 'l1', 'l2'])
def test_gradient_of_the_penalty(make, criterion, granularity, kind):
    learn = make(1, plain_net().double(), dls=in_order(1, dtype=torch.float64))
    cb = RegularizeCallback(criterion, granularity, .3, kind=kind)
    base = gradients(learn, None)
    got = gradients(learn, cb)
    params = dict(learn.model.named_parameters())
    total = .3*sum(by_hand(params[n], criterion, granularity, kind, None) for n in ('0.weight', '2.weight'))
    want = torch.autograd.grad(total, [params['0.weight'], params['2.weight']])
    for n, g in zip(('0.weight', '2.weight'), want): torch.testing.assert_close(got[n] - base[n], g, rtol=1e-9, atol=1e-12)
    assert torch.equal(got['6.weight'], base['6.weight'])
    assert cb.history == [pytest.approx(total.item())]


differentiable = [n for n, c in criteria.items() if not c.needs_data and n not in ('random', 'large_init', 'small_init')]


@pytest.mark.parametrize('name', criteria)
def test_every_criterion_pushes_or_is_refused(make, name):
    if name not in differentiable:
        with pytest.raises(ValueError, match='gradient|looks at'): RegularizeCallback(name)
        return
    state = torch.get_rng_state()
    cb = RegularizeCallback(name, weight=1e-3)
    assert torch.equal(state, torch.get_rng_state())
    learn = make(4)
    learn.fit(2, 1e-2, cbs=cb)
    assert all(math.isfinite(t) for t in cb.history) and all(p.isfinite().all() for p in learn.model.parameters())


def test_steps_and_signs_have_no_gradient():
    for f in (torch.sign, lambda w: (w > 0).float(), lambda w: w.detach().abs(), torch.round):
        with pytest.raises(ValueError, match='no gradient'): RegularizeCallback(Criteria(f, name='f'))


def test_reference_is_of_the_first_fit(make):
    learn, cb = make(4), RegularizeCallback('movement', 'weight', 10.)
    first = snapshot(learn.model)
    learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
    learn.add_cb(cb)
    learn.fit(1, 1e-2)
    learn.fit(1, 1e-2)
    assert all(torch.equal(r, first[n]) for n, r in cb.first.items()) and len(cb.first) == 2


def test_grows(make):
    learn, cb = make(4, dls=in_order()), RegularizeCallback(weight=.5, schedule=Schedule(sched_lin, start='1 epoch'))
    learn.fit(3, 0., wd=0., cbs=cb)
    full = RegularizeCallback(weight=.5)
    learn.fit(3, 0., wd=0., cbs=full)
    assert cb.history == pytest.approx([f*max(0, k - 3)/8 for k, f in enumerate(full.history)], rel=1e-5)


def test_only_some_layers(make):
    learn, cb = make(1, plain_net(), dls=in_order(1)), RegularizeCallback(exclude='0', weight=1.)
    base, got = gradients(learn, None), gradients(learn, cb)
    assert [n for n in base if not torch.equal(base[n], got[n])] == ['2.weight']
    got = gradients(learn, RegularizeCallback('large_final', 'row', 1., layer_type=nn.Linear, model=learn.model))
    assert [n for n in base if not torch.equal(base[n], got[n])] == ['6.weight']
    with pytest.raises(ValueError, match='not a part'): learn.fit(1, cbs=RegularizeCallback(model=plain_net()))


def test_frozen_body_is_left_alone(make):
    learn, cb = make(4, splitter=body_head), RegularizeCallback(weight=1.)
    learn.freeze()
    before = snapshot(learn.model)
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.history == [0.]*4 and torch.equal(before['3.weight'], learn.model[3].weight)
    learn.fine_tune(1, 1e-2, cbs=cb)
    assert all(t > 0 for t in cb.history)


def test_group_lasso_makes_filters_small(make):
    "and with the masks of a SparsifyCallback beside it, in every order"
    norms = []
    for cbs in ([], [RegularizeCallback(weight=.03, kind='group_lasso')]):
        torch.manual_seed(0)
        learn = make(10)
        learn.fit(6, 1e-2, wd=0., cbs=cbs)
        norms.append(learn.model[3].weight.flatten(1).norm(dim=1))
    assert norms[1].min() < norms[0].min()/3
    cb = SparsifyCallback(50, 'filter', 'local', 'large_final', 'static')
    learn.fit(2, 1e-2, cbs=[RegularizeCallback(weight=.03, kind='group_lasso'), cb, Spy(cb)])
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_half_precision_weights_are_penalised_in_float():
    from fasterai_lib.core.units import units_of
    m = nn.Conv2d(2, 3, 3).to(torch.bfloat16)
    s = criteria['large_final'].differentiable_scores(units_of(m, 'filter')[0])
    assert s.dtype == torch.float32 and s.requires_grad


class FakeAmp(Callback):
    "What MixedPrecision does, on a CPU: bfloat16 and a scaled loss"
    order = 10
    def before_batch(self): self.autocast = torch.autocast('cpu', torch.bfloat16); self.autocast.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.autocast.__exit__(None, None, None)
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad = p.grad/1024


@every_term
def test_mixed_precision(make, term):
    model, teacher, grads = plain_net(), plain_net(), []
    for cbs in ([], [FakeAmp()]):
        cb = RegularizeCallback('l2', weight=.1) if term == 'regularize' else DistillCallback(teacher, features=['0', '2'])
        grads.append(gradients(make(1, copy.deepcopy(model), dls=in_order(1)), cb, cbs=cbs))
    for n in grads[0]: torch.testing.assert_close(grads[1][n], grads[0][n], rtol=.05, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('half', [False, True])
def test_cuda(make, half):
    from test_training_loop import loaders
    learn = make(dls=loaders(6, device='cuda'))
    if half: learn.to_fp16()
    regrow = RegrowCallback(50, every='2 steps')
    reg, dis = RegularizeCallback(weight=.01), DistillCallback(conv_net(), features=['0'])
    learn.fit_one_cycle(3, 1e-2, cbs=[reg, dis, regrow, Spy(regrow)])
    assert len(regrow.updates) >= 5 and len(reg.history) == 18 and all(math.isfinite(x) for x in reg.history + dis.history)
    assert all(exact_masks(regrow, learn.model, 50))


# --- distillation

def test_soft_targets_and_features_by_hand(make):
    "The gradient that is trained, in float64: (1 - a) loss + a T² KL + b sum of MSE"
    model, teacher = plain_net_of(1), plain_net_of(2)
    teacher.train()
    learn = make(1, copy.deepcopy(model), dls=in_order(1, dtype=torch.float64))
    got = gradients(learn, DistillCallback(teacher, 3., .7, features={'0': '0', '[24]': '[24]'}, feature_weight=.2))
    x, y = (torch.stack(t) for t in zip(*images(8, dtype=torch.float64)))
    outs = {}
    for who, net in (('s', model), ('t', teacher)):
        h = x
        for k, m in enumerate(net): h = m(h); outs[who, k] = h
    zs, zt = outs['s', 6]/3, outs['t', 6].detach()/3
    p, q = zt.exp()/zt.exp().sum(1, keepdim=True), zs.exp()/zs.exp().sum(1, keepdim=True)
    total = .3*learn.loss_func(outs['s', 6], y) + .7*9*(p*(p.log() - q.log())).sum()/8 + .2*sum(((outs['s', k] - outs['t', k].detach())**2).mean() for k in (0, 2, 4))
    want = torch.autograd.grad(total, list(model.parameters()))
    for (n, g), w in zip(got.items(), want): torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_is_untouched(make):
    teacher = nn.Sequential(*conv_net()[:7], nn.Dropout(), *conv_net()[7:])
    teacher.train()
    teacher[1].eval()
    for p in teacher[0].parameters(): p.requires_grad_(False)
    before, modes, needs = snapshot(teacher), [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    learn, cb = make(4, dls=exportable()), DistillCallback(teacher)
    seen = []
    cb.logits = lambda out: seen.append(out) or out
    keys = set(learn.model.state_dict())
    state = None
    learn.fit(2, 1e-2, cbs=cb)
    assert same(before, snapshot(teacher)) and [m.training for m in teacher.modules()] == modes and [p.requires_grad for p in teacher.parameters()] == needs
    assert all(not o.requires_grad for o in seen[1::2]) and all(o.requires_grad for o in seen[::2]) and len(seen) == 12
    assert set(learn.model.state_dict()) == keys and all(p.grad is None for p in teacher.parameters())


def test_teacher_is_not_exported(make, tmp_path):
    from fastai.learner import load_learner
    teacher = conv_net()
    teacher.secret = 'x'*1000
    learn = make(dls=exportable(), cbs=DistillCallback(teacher))
    learn.fit(1, 1e-2)
    learn.export(tmp_path/'l.pkl')
    back = load_learner(tmp_path/'l.pkl')
    assert len(back.predict(3)) == 3 and b'x'*1000 not in (tmp_path/'l.pkl').read_bytes()
    back.dls = learn.dls
    with pytest.raises(ValueError, match='not saved'): back.fit(1)
    assert learn.cbs[-1].teacher is teacher


def test_teacher_hears_what_the_student_hears(make):
    "Also when a callback has changed the batch"
    heard = []
    class Ear(nn.Module):
        def __init__(self): super().__init__(); self.net = plain_net()
        def forward(self, x): heard.append(x.clone()); return self.net(x)
    learn = make(2, Ear(), dls=in_order(2))
    learn.fit(1, 0., cbs=[DistillCallback(Ear()), Do('before_batch', lambda l: setattr(l, 'xb', (l.xb[0]*2 + 1,)))])
    assert len(heard) == 4 + len(learn.dls.valid) and torch.equal(heard[0], heard[1]) and torch.equal(heard[2], heard[3])


def test_no_chance_is_used_up(make):
    "A teacher with dropout is in eval mode: the run of the student is the same with alpha=0"
    def run(cbs):
        torch.manual_seed(5)
        learn = make(4, nn.Sequential(*conv_net()[:8], nn.Dropout(.5), *conv_net()[8:]), dls=in_order())
        learn.fit(1, 1e-2, cbs=cbs)
        return snapshot(learn.model)
    teacher = nn.Sequential(*conv_net()[:8], nn.Dropout(.5), *conv_net()[8:])
    assert same(run([]), run([DistillCallback(teacher, alpha=0, features='0', feature_weight=1e-30)]))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_teacher_of_another_precision(make, dtype):
    learn, cb = make(2), DistillCallback(conv_net().to(dtype), features='0')
    learn.fit(1, 1e-2, cbs=cb)
    assert all(math.isfinite(t) for t in cb.history) and next(learn.model.parameters()).dtype == torch.float32


def test_outputs_with_logits(make):
    class Out(dict):
        @property
        def logits(self): return self['logits']
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.net = conv_net()
        def forward(self, x): return Out(logits=self.net(x))
    learn = make(2, Net(), metrics=None)
    loss = learn.loss_func
    learn.loss_func = lambda out, y: loss(out.logits, y)
    cb = DistillCallback(Net(), axis=-1)
    learn.fit(1, 1e-2, cbs=cb)
    assert len(cb.history) == 2
    class Pair(Net):
        def forward(self, x): return self.net(x), None
    with pytest.raises(TypeError, match='pass logits='): learn.fit(1, 1e-2, cbs=DistillCallback(Pair()))
    learn.fit(1, 1e-2, cbs=DistillCallback(Pair(), logits=lambda o: o[0] if isinstance(o, tuple) else o.logits))


def test_distill_bad_input(make):
    learn = make(2)
    before = snapshot(learn.model)
    with pytest.raises(TypeError, match='teacher must be'): DistillCallback('resnet')
    for bad in (dict(alpha=2), dict(alpha=-1), dict(temperature=0), dict(temperature=True), dict(feature_weight=-1), dict(alpha=0), dict(alpha=float('nan'))):
        with pytest.raises(ValueError): DistillCallback(conv_net(), **bad)
    part = nn.Sequential(learn.model[0], *conv_net()[1:])
    for cb, match in ((DistillCallback(learn.model), 'shares'), (DistillCallback(part), 'shares'), (DistillCallback(conv_net(), features='10'), "allowed: 0"),
                      (DistillCallback(conv_net(), features={'0': '3'}), r"'0' of the student gives out \(8, 4, 6, 6\)"), (DistillCallback(conv_net(), features={'[03]': '0'}), '2 modules of the student'),
                      (DistillCallback(nn.Sequential(*conv_net()[:-1], nn.Linear(8, 5))), r'logits of shape \(8, 5\)')):
        with pytest.raises(ValueError, match=match): learn.fit(1, 1e-2, cbs=cb)
    assert same({k: v for k, v in before.items() if 'running' not in k and 'num_b' not in k}, {k: v for k, v in snapshot(learn.model).items() if 'running' not in k and 'num_b' not in k})


def test_one_class_is_refused(make):
    net = lambda: nn.Sequential(*conv_net()[:-1], nn.Linear(8, 1))
    learn = make(2, net(), metrics=None)
    learn.loss_func = lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], (y > 1).float())
    with pytest.raises(ValueError, match='two classes'): learn.fit(1, 1e-2, cbs=DistillCallback(net()))


# --- regrowth

def exact_masks(cb, model, percent):
    for n, w in weights(model).items():
        if n in cb.masks: yield cb.masks[n].dead() == math.floor(percent*w.numel()/100 + .5)


class Watcher(Callback):
    "Keeps, at each step, the dense gradient, the weights after the step and the masks before and after the exchange"
    order = -500
    def __init__(self, cb): self.cb, self.log, self.grads, self.last = cb, [], {}, None

    def after_backward(self):  # before the masks
        for n, p in self.cb.sparsifier.params.items(): self.grads[n] = self.grads.get(n, 0) + p.grad.clone()

    def after_step(self): self.stepped = True


class After(Callback):
    order = 500
    def __init__(self, watcher): self.w = watcher
    def after_step(self):
        w = self.w
        w.before = {n: w.cb.masks[n].full(p.shape).clone() for n, p in w.cb.masks.params(self.learn.model).items()}
        w.weights = {n: p.detach().clone() for n, p in w.cb.masks.params(self.learn.model).items()}
    def after_batch(self):
        w = self.w
        if not self.training or not getattr(w, 'stepped', False): return
        now = {n: w.cb.masks[n].full(p.shape).clone() for n, p in w.cb.masks.params(self.learn.model).items()}
        w.log.append(dict(before=w.before, weights=w.weights, grads=w.grads, now=now, values={n: p.detach().clone() for n, p in w.cb.masks.params(self.learn.model).items()},
                          state={n: {k: v.clone() for k, v in state_of(self.learn, p).items() if isinstance(v, torch.Tensor) and v.shape == p.shape} for n, p in w.cb.masks.params(self.learn.model).items()}))
        w.grads, w.stepped = {}, False


def watched(cb): w = Watcher(cb); return [cb, w, After(w), Spy(cb)], w.log


def brute_exchange(keep, weight, grad, n):
    "The n smallest |w| of those in use go; the n largest |g| of the others come: by full sorts of Python lists"
    w, g, k = (t.flatten().tolist() for t in (weight, grad, keep))
    gone = sorted((abs(w[i]), i) for i in range(len(k)) if k[i])[:n]
    come = sorted((-abs(g[i]), i) for i in range(len(k)) if not k[i])[:n]
    for _, i in gone: k[i] = False
    for _, i in come: k[i] = True
    return torch.tensor(k).view(keep.shape)


@pytest.mark.parametrize('acc', [False, True])
@pytest.mark.parametrize('decay', ['cos', None, 'lin'])
def test_rigl_by_brute_force(make, decay, acc):
    learn = make(6, plain_net(), dls=in_order(6))
    cb = RegrowCallback(70, every='4 steps', decay=decay, fraction=.4, first='random')
    cbs, log = watched(cb)
    learn.fit(3, 1e-2, cbs=cbs + ([GradientAccumulation(16)] if acc else []))
    stop, moved = 18*.75, 0
    for t, s in enumerate(log):
        batch = 2*t + 1 if acc else t
        due = [b for b in ([batch - 1, batch] if acc else [batch]) if b and b % 4 == 0 and b < stop]
        for n in s['now']:
            used = int(s['before'][n].sum())
            assert used == s['before'][n].numel() - math.floor(.7*s['before'][n].numel() + .5) == int(s['now'][n].sum())
            if not due: assert torch.equal(s['before'][n], s['now'][n]); continue
            pos = batch/stop
            share = .4*{'cos': (1 + math.cos(math.pi*pos))/2, 'lin': 1 - pos, None: 1}[decay]
            count = min(math.floor(share*used + .5), s['before'][n].numel() - used)
            assert torch.equal(s['now'][n], brute_exchange(s['before'][n], s['weights'][n], s['grads'][n], count))
            grown = s['now'][n] & ~s['before'][n]
            moved += int(grown.sum())
            assert not s['values'][n][grown].any() and all(not v[grown].any() for v in s['state'][n].values())
    assert moved > 20 and [u['batch'] for u in cb.updates] == ([5, 9, 13] if acc else [4, 8, 12])
    assert list(exact_masks(cb, learn.model, 70)) == [True, True] and cb.masks.held(learn.model)


def test_grown_weights_then_train(make):
    learn, cb = make(6), RegrowCallback(70, every='4 steps')
    cbs, log = watched(cb)
    learn.fit(3, 1e-2, cbs=cbs)
    last = log[-1]
    assert (last['values']['3.weight'][last['now']['3.weight']] != 0).all() and exact(learn.model[3].weight, 70)


def test_set_is_random_and_never_takes_back(make):
    learn, cb = make(6), RegrowCallback(60, grow='random', fraction=1., decay=None, every='2 steps')
    cbs, log = watched(cb)
    learn.fit(3, 1e-2, cbs=cbs)
    n = 0
    for s in log:
        for k in s['now']:
            b, a = s['before'][k], s['now'][k]
            if not torch.equal(b, a): n += 1; assert int((b & ~a).sum()) == int((a & ~b).sum()) == min(int(b.sum()), int((~b).sum()))
    assert n == 12


@pytest.mark.parametrize('granularity, context, kwargs', [('weight', 'global', {}), ('kernel', 'local', {}), ('filter', 'local', dict(exclude='0')), ('weight', 'per_row', {}),
                                                         ('weight', '2:4', dict(exclude='0')), ('channel', 'local', {}), ('layer', 'global', {})])
def test_number_is_constant_in_every_lane(make, granularity, context, kwargs):
    learn = make(6, plain_net())
    cb = RegrowCallback(50, granularity, context, every='2 steps', fraction=.5, decay=None, **kwargs)
    cbs, log = watched(cb)
    learn.fit(3, 1e-2, cbs=cbs)
    changed = 0
    for s in log:
        for n, now in s['now'].items():
            if not n.endswith('weight'): continue
            first = log[0]['now'][n]
            assert int(now.sum()) == int(first.sum())
            if context == 'per_row': assert torch.equal(now.flatten(1).sum(1), first.flatten(1).sum(1))
            if context == '2:4': assert (now.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all()
            if granularity == 'filter': assert all(x.all() or not x.any() for x in now) and torch.equal(s['now']['2.bias'], now.flatten(1).all(1))
            changed += not torch.equal(now, s['before'][n])
    assert changed or granularity == 'layer'


def test_gradient_criteria_may_drop(make):
    learn, cb = make(6), RegrowCallback(50, drop='taylor', first='random', every='2 steps')
    cbs, log = watched(cb)
    learn.fit(2, 1e-2, cbs=cbs)
    assert len(cb.updates) == 4 and cb.masks.held(learn.model)
    with pytest.raises(ValueError, match='first='): RegrowCallback(50, drop='taylor')


@pytest.mark.parametrize('drop', ['movement', 'updating_movmag'])
def test_drop_compares(make, drop):
    learn, cb = make(6), RegrowCallback(50, drop=drop, first='random', every='2 steps')
    first = snapshot(learn.model)
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert len(cb.updates) == 4 and set(cb.refs) == {'0.weight', '3.weight'}
    assert all(torch.equal(r, first[n]) for n, r in cb.refs.items()) == (drop == 'movement')


@pytest.mark.parametrize('sparse', [False, True])
def test_regrow_embedding(make, sparse):
    from functools import partial
    from fastai.optimizer import OptimWrapper
    learn = make(4, TextNet(sparse=sparse), items=tokens, opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    cb = RegrowCallback(50, layer_type=nn.Embedding, every='2 steps', first='random')
    learn.fit(3, .1, wd=0., cbs=[cb, Spy(cb)])
    assert len(cb.updates) == 4 and exact_masks and cb.masks['emb.weight'].dead() == 48


def test_regrow_lr_find_validate_and_second_fit(make):
    cb = RegrowCallback(70, every='2 steps')
    learn = make(4, cbs=[cb])
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    assert not cb.masks and not cb.updates
    learn.fit(2, 1e-2)
    before, masks, updates = snapshot(learn.model), cb.masks.copy(), list(cb.updates)
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    learn.validate()
    assert same(before, snapshot(learn.model)) and cb.masks == masks and cb.updates == updates
    learn.fit(2, 1e-2, cbs=Spy(cb))
    assert list(exact_masks(cb, learn.model, 70)) == [True, True] and cb.masks != masks


@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt()])
def test_regrow_after_an_error(make, error):
    learn, cb = make(6), RegrowCallback(70, every='2 steps')
    with pytest.raises((RuntimeError, KeyboardInterrupt)): learn.fit(2, 1e-2, cbs=[cb, Do('after_backward', throw(error), at=(0, 4), order=1000)])
    assert cb.masks.held(learn.model) and list(exact_masks(cb, learn.model, 70)) == [True, True]
    learn.fit(1, 1e-2, cbs=[cb, Spy(cb)])
    assert [u['batch'] for u in cb.updates] == [2, 4]


def test_regrow_resumes(make, tmp_path):
    learn, cb = make(6), RegrowCallback(70, every='3 steps')
    learn.fit(4, 1e-2, cbs=[cb, SaveModelCallback(every_epoch=1), Do('after_epoch', throw(CancelFitException()), at=None, order=2000)])
    learn.load('model_0')
    cb = RegrowCallback(70, every='3 steps')
    learn.fit(4, 1e-2, start_epoch=1, cbs=[cb, Spy(cb)])
    assert [u['batch'] for u in cb.updates] == [6, 9, 12, 15] and list(exact_masks(cb, learn.model, 70)) == [True, True]


def test_overflow_waits_for_the_next_step(make):
    def overflow(learn): learn.model[3].weight.grad[0, 0, 0, 0] = float('inf')
    learn, cb = make(6), RegrowCallback(70, every='4 steps')
    class Skip(Callback):
        order = 10
        def before_step(self):
            from fastai.callback.core import CancelStepException
            if not self.learn.model[3].weight.grad.isfinite().all() or (self.epoch, self.iter) == (0, 4): raise CancelStepException()
    learn.fit(2, 1e-2, cbs=[cb, Do('after_backward', overflow, at=(0, 4), order=-1000), Skip(), Spy(cb)])
    assert [u['batch'] for u in cb.updates] == [5, 8] and learn.model[3].weight.isfinite().all()


def test_regrow_bad_input(make):
    learn = make(4)
    before = snapshot(learn.model)
    for bad in (dict(fraction=0), dict(fraction=True), dict(every='often'), dict(end=2), dict(grow='large_init'), dict(drop='wanda'), dict(grow='fisher'), dict(decay='co'), dict(drop='large')):
        with pytest.raises(ValueError): RegrowCallback(50, **bad)
    with pytest.raises(TypeError): RegrowCallback(50, schedule=lin)
    for bad in (dict(every='1 epoch', end='2 steps'), dict(granularity='kernel', context='2:4')):
        with pytest.raises(ValueError): learn.fit(2, cbs=RegrowCallback(50, **bad))
    assert same(before, snapshot(learn.model))


@pytest.mark.parametrize('sparsity', [0, 50, 90, 99, 100])
def test_erk_by_hand(sparsity):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 1), nn.Linear(64, 10))
    of = erk(model, sparsity, (nn.Conv2d, nn.Linear))
    ws = {n: model.get_submodule(n).weight for n in of}
    total = sum(w.numel() for w in ws.values())
    assert sum(w.numel()*of[n]/100 for n, w in ws.items()) == pytest.approx(total*sparsity/100)
    raw = {n: sum(w.shape)/w.numel() for n, w in ws.items()}
    lo, hi = 0., 1e9  # density = min(1, scale*raw), with the scale found by bisection
    for _ in range(200):
        mid = (lo + hi)/2
        if sum(min(1, mid*raw[n])*ws[n].numel() for n in ws) < total*(1 - sparsity/100): lo = mid
        else: hi = mid
    assert of == pytest.approx({n: 100*(1 - min(1, hi*raw[n])) for n in ws}, abs=1e-4)


def test_exchange_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lanes, n = rng.integers(1, 4), rng.integers(1, 9)
        keep, drop, grow = rng.random((lanes, n)) < .6, rng.integers(0, 4, (lanes, n)).astype(float), rng.integers(0, 4, (lanes, n)).astype(float)
        f = rng.random()
        got = exchange(torch.tensor(keep), torch.tensor(drop), torch.tensor(grow), f).numpy()
        for k, d, g, r in zip(keep, drop, grow, got):
            want, m = k.copy(), min(math.floor(f*k.sum() + .5), int((~k).sum()))
            want[sorted(np.flatnonzero(k), key=lambda i: (d[i], i))[:m]] = False
            want[sorted(np.flatnonzero(~k), key=lambda i: (-g[i], i))[:m]] = True
            assert (r == want).all()


# --- weights behind weights: straight-through, movement, soft thresholds

def batches_of(n_batches=4, bs=8):
    items = images(n_batches*bs, dtype=torch.float64)
    return [tuple(torch.stack(t) for t in zip(*items[bs*k:bs*k + bs])) for k in range(n_batches)]


def loss_of(params, x, y):
    "plain_net with these parameters"
    h = F.conv2d(F.conv2d(x, params['0.weight'], params['0.bias'], padding=1).relu(), params['2.weight'], params['2.bias'], padding=1).relu().mean((2, 3))
    return F.cross_entropy(F.linear(h, params['6.weight'], params['6.bias']), y)


def top(score, percent):
    "One boolean per entry: all but the lowest, by a full sort"
    flat, keep = score.flatten(), torch.ones(score.numel(), dtype=torch.bool)
    keep[sorted(range(len(flat)), key=lambda i: (flat[i].item(), i))[:math.floor(percent*len(flat)/100 + .5)]] = False
    return keep.view(score.shape)


CONVS = ('0.weight', '2.weight')


def run_by_hand(model, lr, epochs, outer, after=lambda grads, w, t: None):
    "SGD on dense weights, with the gradients of what the network runs with; returns the dense weights and the last outer ones"
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    for t in range(4*epochs):
        x, y = batches_of()[t % 4]
        seen = {n: (outer(n, v, t) if n in CONVS else v).detach().requires_grad_() for n, v in w.items()}
        g = dict(zip(seen, torch.autograd.grad(loss_of(seen, x, y), list(seen.values()))))
        g = after(g, w, t) or g
        for n in w: w[n] = w[n] - lr*g[n]
    return w


def fit_of(make, cb, epochs=2, lr=.1, seed=1, cbs=(), **kwargs):
    learn = make(model=plain_net_of(seed), dls=in_order(dtype=torch.float64), opt_func=SGD, **kwargs)
    inner = {}
    def keep(learn): inner.update({n: p.detach().clone() for n, p in learn.model.named_parameters()})
    learn.fit(epochs, lr, wd=0., cbs=[cb, *cbs, Do('after_step', keep, order=1000)])
    return learn, inner


def test_straight_through_by_hand(make):
    cb = StraightThroughCallback(60, 'weight', 'local', 'large_final', Schedule(sched_lin, end=.75))
    learn, inner = fit_of(make, cb)
    percent = lambda t: 60*min((t + 1)/8/.75, 1)
    masks = {}
    def outer(n, v, t):
        masks[n] = top(v.abs(), percent(t))
        return v*masks[n]
    want = run_by_hand(plain_net_of(1), .1, 2, outer)
    for n in want:
        torch.testing.assert_close(inner[n], want[n], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(dict(learn.model.named_parameters())[n], want[n]*masks[n] if n in CONVS else want[n], rtol=1e-7, atol=1e-9)
    assert all(exact(w, 60) for w in weights(learn.model).values()) and all(zeros(inner[n]) == 0 for n in CONVS)


@pytest.mark.parametrize('schedule', ['agp', 'static', Schedule(sched_lin, end=.7)])
def test_masks_are_chosen_every_so_often(make, schedule):
    learn, cb, seen = make(5), StraightThroughCallback(60, 'weight', 'local', 'large_final', schedule, every=4), []
    learn.fit(3, 1e-2, cbs=[cb, Do('before_batch', lambda l: l.training and seen.append(cb.masks), order=1000)])
    changed = [t for t in range(1, 15) if seen[t] is not seen[t - 1]]
    assert changed == sorted({4, 8, 12, cb.last_move} - {0}) and all(exact(w, 60) for w in weights(learn.model).values())


@pytest.mark.parametrize('criterion', ['taylor', 'wanda', 'apoz'])
def test_straight_through_with_data(make, criterion):
    learn, cb = make(4), StraightThroughCallback(50, 'weight', 'local', criterion, 'agp', every=2)
    learn.fit(2, 1e-2, cbs=cb)
    assert all(exact(w, 50) for w in weights(learn.model).values()) and cb.loop is None
    learn, cb = make(4), RegrowCallback(50, first=criterion, every='2 steps')
    learn.fit(2, 1e-2, cbs=[cb, Spy(cb)])
    assert list(exact_masks(cb, learn.model, 50)) == [True, True] and len(cb.updates) == 2


def test_movement_by_hand(make):
    cb = MovementCallback(60, context='local', schedule=Schedule(sched_lin, end=.75))
    learn, inner = fit_of(make, cb)
    s = {n: torch.zeros_like(p, dtype=torch.float32).requires_grad_() for n, p in plain_net_of(1).named_parameters() if n in CONVS}
    opt = torch.optim.Adam(s.values(), lr=.01)
    def train_scores(g, w, t):
        for n in CONVS: s[n].grad = (g[n]*w[n]).float()
        opt.step()
    want = run_by_hand(plain_net_of(1), .1, 2, lambda n, v, t: v*top(s[n].detach(), 60*min((t + 1)/8/.75, 1)), train_scores)
    for n in want: torch.testing.assert_close(inner[n], want[n], rtol=1e-6, atol=1e-8)
    for n in CONVS: torch.testing.assert_close(cb.scores[n], s[n], rtol=1e-4, atol=1e-6)
    assert all(exact(w, 60) for w in weights(learn.model).values())


def test_soft_movement_by_hand(make):
    cb = MovementCallback(None, threshold=.4, weight=50., score_lr=.3)
    learn, inner = fit_of(make, cb, epochs=3)
    s = {n: torch.zeros_like(p, dtype=torch.float32).requires_grad_() for n, p in plain_net_of(1).named_parameters() if n in CONVS}
    opt, total = torch.optim.Adam(s.values(), lr=.3), sum(t.numel() for t in s.values())
    def train_scores(g, w, t):
        opt.zero_grad()
        (50*sum(v.sigmoid().sum() for v in s.values())/total + sum((v*(g[n]*w[n]).float()).sum() for n, v in s.items())).backward()
        opt.step()
    want = run_by_hand(plain_net_of(1), .1, 3, lambda n, v, t: v*((s[n].detach().sigmoid() > .4) | (s[n].detach() == s[n].detach().max())), train_scores)
    for n in want: torch.testing.assert_close(inner[n], want[n], rtol=1e-6, atol=1e-8)
    assert 0 < zeros(*weights(learn.model).values()) < 324


def test_soft_thresholds_by_hand(make):
    cb = SoftThresholdCallback(decay=.02, init=-3., score_lr=.1)
    learn, inner = fit_of(make, cb, epochs=3)
    w = {n: p.detach().clone() for n, p in plain_net_of(1).named_parameters()}
    s = {n: torch.tensor(-3., dtype=torch.float64) for n in CONVS}
    t32 = {n: torch.tensor(-3.).requires_grad_() for n in CONVS}
    opt = torch.optim.Adam(t32.values(), lr=.1)
    for t in range(12):
        x, y = batches_of()[t % 4]
        leaf = {n: v.clone().requires_grad_() for n, v in w.items()}
        s = {n: t32[n].detach().double().requires_grad_() for n in CONVS}
        seen = {n: torch.sign(v)*torch.relu(v.abs() - s[n].sigmoid()) if n in CONVS else v for n, v in leaf.items()}
        (loss_of(seen, x, y) + .01*sum(v**2 for v in s.values())).backward()
        for n in CONVS: t32[n].grad = s[n].grad.float()
        opt.step()
        w = {n: (v - .1*v.grad).detach() for n, v in leaf.items()}
    for n in w: torch.testing.assert_close(inner[n], w[n], rtol=1e-5, atol=1e-7)
    assert cb.masks.held(learn.model) and 0 < cb.masks.sparsity < 100 and zeros(*weights(learn.model).values()) == round(cb.masks.sparsity*3.24)


behind = dict(straight=lambda **kw: StraightThroughCallback(70, 'weight', 'local', 'large_final', 'agp', **kw), movement=lambda **kw: MovementCallback(70, context='local', **kw),
              soft=lambda **kw: MovementCallback(None, weight=20., threshold=.4, score_lr=.1, **kw), threshold=lambda **kw: SoftThresholdCallback(.01, -3., **kw))
every_behind = pytest.mark.parametrize('kind', behind)


@every_behind
def test_what_is_left_is_what_was_validated(make, kind):
    learn, cb = make(4), behind[kind]()
    learn.fit(3, 1e-2, cbs=cb)
    values = list(learn.recorder.values[-1])
    assert list(learn.validate()) == pytest.approx(values[1:3]) and values[-1] == pytest.approx(100*zeros(*weights(learn.model).values())/324)
    assert cb.masks.held(learn.model) and (kind in ('soft', 'threshold') or all(exact(w, 70) for w in weights(learn.model).values()))
    assert set(learn.model.state_dict()) == set(conv_net().state_dict()) and not cb.inner and not cb.old


@every_behind
def test_behind_is_not_disturbed(make, kind):
    "by validate, get_preds or lr_find, in the middle of a fit or after it"
    def run(*cbs):
        torch.manual_seed(0)
        learn = make(4, dls=in_order())
        learn.fit(3, 1e-2, cbs=[behind[kind](), *cbs])
        return snapshot(learn.model)
    look = [Do(at, lambda l: l.lock.locked() or l.validate(), order=1500) for at in ('after_train', 'after_epoch')]
    a, b = run(), run(*look)
    assert all(torch.equal(a[k], b[k]) for k in a)
    cb = behind[kind]()
    learn = make(4, cbs=[cb])
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    learn.fit(2, 1e-2)
    before, masks, scores = snapshot(learn.model), cb.masks.copy(), {n: s.detach().clone() for n, s in cb.scores.items()}
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    learn.validate(); learn.get_preds()
    assert same(before, snapshot(learn.model)) and cb.masks == masks and all(torch.equal(s, scores[n]) for n, s in cb.scores.items())
    learn.fit(1, 1e-2)


@every_behind
def test_the_best_is_sparse(make, kind):
    from test_training_loop import Score
    learn, cb, shown = make(4, metrics=Score([1, 9, 2])), behind[kind](), []
    cb.schedule = Schedule(sched_lin, end=.1)  # a model that is not yet sparse is not the best
    learn.fit(3, 1e-2, cbs=[SaveModelCallback(monitor='score'), cb, Do('after_epoch', lambda l: shown.append(snapshot(l.model)), order=2000)])
    assert same(shown[1], snapshot(learn.model)) and zeros(*weights(learn.model).values())


@every_behind
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch'])
@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt()])
def test_after_an_error_the_dense_weights_are_back(make, kind, at, error):
    learn, cb, last = make(4), behind[kind](), {}
    def keep(learn): last.update({n: p.detach().clone() for n, p in learn.model.named_parameters()})
    with pytest.raises((RuntimeError, KeyboardInterrupt)): learn.fit(2, 1e-2, cbs=[cb, Do('after_step', keep, order=-1000), Do(at, throw(error), at=(1, 2), order=1000)])
    assert all(torch.equal(p, last[n]) for n, p in learn.model.named_parameters()) and not zeros(*weights(learn.model).values())
    learn.fit(1, 1e-2, cbs=cb)


@every_behind
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_backward', 'after_batch'])
@pytest.mark.parametrize('skip', ['Batch', 'Train', 'Epoch', 'Fit'])
def test_cancelled(make, kind, at, skip):
    import fastai.callback.core as core
    learn, cb = make(4), behind[kind]()
    if at == 'after_batch' and skip == 'Batch': return  # there is nothing left to skip
    learn.fit(3, 1e-2, cbs=[cb, Do(at, throw(getattr(core, f'Cancel{skip}Exception')()), at=(1, 2), order=1000)])
    assert cb.masks.held(learn.model) and not cb.inner and zeros(*weights(learn.model).values())


@every_behind
def test_behind_with_accumulation(make, kind):
    "Two batches of 8 are one step of 16, for the weights and for the scores"
    out = []
    for bs, cbs in ((16, []), (8, [GradientAccumulation(16)])):
        learn = make(model=plain_net_of(1), dls=in_order(32//bs, bs, torch.float64), opt_func=SGD)
        cb, first = behind[kind](), {}
        cb.schedule = Schedule(sched_lin, end=.01)
        learn.fit(1, .01, wd=0., cbs=[cb, *cbs, Do('before_step', lambda l: first or first.update({n: p.grad.clone() for n, p in l.model.named_parameters()}, **{f'score {n}': s.grad.clone() for n, s in cb.scores.items()}), order=1000)])
        out.append(first)
    for n in out[0]: torch.testing.assert_close(out[1][n], out[0][n], rtol=1e-5, atol=1e-8)


def test_skipped_steps_do_not_train_scores(make):
    from fastai.callback.core import CancelStepException
    learn, cb = make(4), MovementCallback(50)
    learn.fit(1, 1e-2, cbs=[cb, Do('before_step', throw(CancelStepException()), order=10)])
    assert not any(s.any() for s in cb.scores.values())


@pytest.mark.parametrize('layer_type, tied', [(nn.Embedding, True), (nn.LSTM, False), (nn.MultiheadAttention, False)])
def test_behind_other_layers(make, layer_type, tied):
    kind = {nn.LSTM: 'lstm', nn.MultiheadAttention: 'attention'}.get(layer_type, 'embedding')
    for make_cb in (lambda: StraightThroughCallback(50, 'weight', 'local', 'large_final', 'agp', layer_type=layer_type), lambda: MovementCallback(50, context='local', layer_type=layer_type)):
        learn, cb = make(4, TextNet(kind, tied=tied), items=tokens), make_cb()
        learn.fit(2, 1e-2, cbs=cb)
        ps = [p for n, p in cb.masks.params(learn.model).items() if 'bias' not in n]
        assert ps and zeros(*ps) == sum(p.numel() for p in ps)//2
        assert not tied or learn.model.emb.weight is learn.model.decoder.weight


def test_filters_take_their_bias_along(make):
    learn, cb = make(4), MovementCallback(50, 'filter', 'local', exclude='0')
    learn.fit(2, 1e-2, cbs=cb)
    w = learn.model[3]
    assert torch.equal(w.bias == 0, (w.weight == 0).flatten(1).all(1)) and zeros(w.bias) == 4


# --- ADMM

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_admm_by_hand(make, granularity):
    model, lr, rho = plain_net_of(1), .1, .5
    cb = ADMMCallback(50, granularity, rho=rho, every='3 steps')
    learn, _ = fit_of(make, cb, epochs=3)
    score = lambda v: v.abs() if granularity == 'weight' else v.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = [*CONVS, *([] if granularity == 'weight' else ['0.bias', '2.bias'])]
    def project(v): return {n: v[n]*(top(score(v[n.replace('bias', 'weight')]), 50).expand_as(v[n]) if n in CONVS else top(score(v[n.replace('bias', 'weight')]), 50).flatten()) for n in names}
    z, u = project(w), {n: torch.zeros_like(w[n]) for n in names}
    for t in range(12):
        if t and t % 3 == 0:
            z = project({n: w[n] + u[n] for n in names})
            u = {n: u[n] + w[n] - z[n] for n in names}
        x, y = batches_of()[t % 4]
        leaf = {n: v.clone().requires_grad_() for n, v in w.items()}
        (loss_of(leaf, x, y) + rho/2*sum(((leaf[n] - z[n] + u[n])**2).sum() for n in names)).backward()
        w = {n: (v - lr*v.grad).detach() for n, v in leaf.items()}
    want = {**w, **project(w)}
    for n, p in learn.model.named_parameters(): torch.testing.assert_close(p, want[n], rtol=1e-5, atol=1e-7)
    assert cb.masks.held(learn.model) and all(exact(v, 50) for v in weights(learn.model).values()) and [h['batch'] for h in cb.history] == [0, 3, 6, 9]


def test_admm_converges_and_cuts_the_best(make):
    from test_training_loop import Score
    learn, cb = make(4, metrics=Score([9, 1, 1])), ADMMCallback(70, context='global', rho=.3, every='2 steps')
    learn.fit(3, 1e-2, cbs=[SaveModelCallback(monitor='score'), cb])
    assert zeros(*weights(learn.model).values()) == round(.7*324) and cb.masks.held(learn.model)
    learn, cb = make(4, opt_func=SGD), ADMMCallback(70, rho=1., every='4 steps')
    learn.fit(10, .05, cbs=cb)
    assert cb.history[-1]['distance'] < cb.history[0]['distance']*.8


def test_admm_elsewhere(make):
    cb = ADMMCallback(70, every='2 steps')
    learn = make(4, cbs=[cb])
    before = snapshot(learn.model)
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    learn.validate()
    assert same({k: v for k, v in before.items()}, snapshot(learn.model)) and cb.masks is None
    learn.remove_cb(cb)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[cb, Do('after_pred', throw(KeyboardInterrupt()), at=(1, 1))])
    assert not cb.z and not cb.u and not zeros(*weights(learn.model).values())
    learn.fit(1, 1e-2, cbs=cb)
    after, masks = snapshot(learn.model), cb.masks
    learn.validate(); learn.get_preds(cbs=cb)
    assert same(after, snapshot(learn.model)) and cb.masks is masks
    for bad in (dict(rho=-1), dict(rho=True), dict(every=3), dict(every='1 week')):
        with pytest.raises(ValueError): ADMMCallback(50, **bad)
    with pytest.raises(ValueError, match='never be updated'): learn.fit(1, cbs=ADMMCallback(50))
    with pytest.raises(ValueError, match='not a part'): learn.fit(2, cbs=ADMMCallback(50, model=conv_net()))
