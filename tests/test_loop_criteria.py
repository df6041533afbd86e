"""Criteria that look at data, inside the callbacks: the loop's own gradients and activations, beside a loop written by hand."""
import copy
import math

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from test_prune_bad_input import randomised
from torch import nn

from fasterai_lib.core.criteria import criteria
from fasterai_lib.core.schedule import Schedule, lin, one_shot
from fasterai_lib.prune.prune_callback import PruneCallback
from fasterai_lib.sparse.sparsifier import Sparsifier
from fasterai_lib.sparse.sparsify_callback import SparsifyCallback

DATA = [criteria[n] for n in criteria if criteria[n].needs_data]
ids = lambda c: c.name

def net():
    torch.manual_seed(0)
    return randomised(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)))

def learner(model, n=24, bs=8, **kw):
    g = torch.Generator().manual_seed(1)
    items = [(torch.randn(1, 6, 6, generator=g), int(torch.randint(3, (), generator=g))) for _ in range(n)]
    dls = DataLoaders(DataLoader(items, bs=bs, num_workers=0), DataLoader(items[:8], bs=bs, num_workers=0))
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=.05, **kw)

def fit(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kw)

@pytest.mark.parametrize('criterion', DATA, ids=ids)
def test_every_criterion_delivers_what_was_asked(criterion):
    for schedule in (one_shot, lin):
        model = net()
        learn = learner(model)
        cb = SparsifyCallback(50, 'weight', 'local', criterion, schedule)
        fit(learn, cbs=cb)
        assert cb.measured == pytest.approx(50, abs=1) and (model[3].weight == 0).sum() == model[3].weight.numel()//2
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and torch.overrides._len_torch_function_stack() == 0

class Watcher(Callback):
    "What the loop has seen before each decision"
    order = SparsifyCallback.order - 1
    def __init__(self): self.grads, self.weights = [], []
    def after_backward(self):
        self.grads.append(self.model[3].weight.grad.clone()); self.weights.append(self.model[3].weight.detach().clone())

def at(k): # everything at the k-th of 3 batches
    return Schedule(lambda t: float(t > (k + .5)/3), name='late')

@pytest.mark.parametrize('name', ['gradient', 'taylor', 'fisher', 'movement_grad'])
def test_gradients_are_those_of_the_loop(name, monkeypatch):
    def no(*args, **kwargs): raise RuntimeError('a second pass')
    monkeypatch.setattr('fasterai_lib.sparse.sparsifier.collect', no)
    model, w = net(), Watcher()
    learn, cb = learner(model), SparsifyCallback(50, 'weight', 'local', name, at(2))
    fit(learn, cbs=[w, cb])
    gs, ws = torch.stack(w.grads[:2]), torch.stack(w.weights[:2]) # of the batches before the decision
    now = w.weights[1] - .05*w.grads[1] # the decision is made before the third batch
    score = dict(gradient=gs.mean(0).abs(), taylor=(now*gs.mean(0)).abs(), fisher=gs.square().mean(0), movement_grad=-(gs*ws).mean(0))[name].flatten()
    keep = torch.ones(len(score), dtype=torch.bool)
    keep[score.argsort()[:len(score)//2]] = False
    assert (cb.masks.masks['3.weight'].keep.flatten() == keep).all()

def test_activations_are_those_of_the_loop(monkeypatch):
    def no(*args, **kwargs): raise RuntimeError('a second pass')
    monkeypatch.setattr('fasterai_lib.sparse.sparsifier.collect', no)
    model, seen = net(), []
    class Inputs(Callback):
        def before_batch(self): self.h = self.model[3].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
        def after_pred(self): self.h.remove()
    learn, cb = learner(model), SparsifyCallback(50, 'weight', 'local', 'wanda', at(2))
    before = []
    class Before(Callback):
        order = SparsifyCallback.order - 1
        def before_batch(self): before.append(self.model[3].weight.detach().clone())
    fit(learn, cbs=[Inputs(), Before(), cb])
    norm = torch.cat(seen[:2]).square().mean((0, 2, 3)).sqrt()
    score = (before[2].abs()*norm[:, None, None]).flatten()
    keep = torch.ones(len(score), dtype=torch.bool)
    keep[score.argsort()[:len(score)//2]] = False
    assert (cb.masks.masks['3.weight'].keep.flatten() == keep).all()

@pytest.mark.parametrize('name', ['taylor', 'wanda', 'apoz', 'synflow', 'grasp'])
def test_the_first_decision_looks_at_its_batch(name):
    model = net()
    dense, learn = copy.deepcopy(model), learner(model)
    cb = SparsifyCallback(50, 'weight', 'local', name, at(0))
    first = []
    class First(Callback):
        order = SparsifyCallback.order + 1
        def before_batch(self):
            first.append((self.x, self.y))
            raise CancelFitException
    fit(learn, cbs=[cb, First()])
    want = Sparsifier(dense, 'weight', 'local', name, data=[first[0]], loss=nn.CrossEntropyLoss()).plan(50)
    assert cb.masks == want

def test_part_of_a_model():
    model = nn.ModuleDict(dict(body=net()))
    model.forward = lambda x: model['body'](x)
    for name in ('taylor', 'wanda'):
        learn = learner(model)
        cb = SparsifyCallback(50, 'weight', 'local', name, lin, model=model['body'])
        fit(learn, cbs=cb)
        assert set(cb.masks) == {'0.weight', '3.weight'} and cb.measured == pytest.approx(50, abs=1)

def test_an_exception_in_the_model_leaves_no_hook():
    model = net()
    learn, cb = learner(model), SparsifyCallback(50, 'weight', 'local', 'wanda', lin)
    def broken(x): raise RuntimeError('broken')
    model[6].forward = broken
    with pytest.raises(RuntimeError, match='broken'): fit(learn, cbs=cb)
    assert not model._forward_hooks and not model._forward_pre_hooks and torch.overrides._len_torch_function_stack() == 0

def test_its_own_context():
    model = net()
    fit(learner(model), cbs=SparsifyCallback(50, 'weight', None, 'wanda', lin))
    assert ((model[3].weight == 0).flatten(1).sum(1) == model[3].weight[0].numel()//2).all() # in each row


# --- removal

@pytest.mark.parametrize('criterion', DATA, ids=ids)
def test_every_criterion_removes_what_was_asked(criterion):
    model = net()
    learn = learner(model, n=16)
    fit(learn, cbs=PruneCallback(50, 'local', criterion, lin))
    assert (model[0].out_channels, model[3].out_channels) == (2, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and torch.overrides._len_torch_function_stack() == 0

def test_removal_goes_by_the_gradients_of_the_loop():
    model, w = net(), Watcher()
    learn = learner(model)
    fit(learn, cbs=[w, PruneCallback({'3': 50}, 'local', 'movement_grad', at(2))])
    learn = learner(model2 := net())
    seen = []
    class Two(Callback):
        def after_backward(self):
            if self.iter < 2: seen.append({n: (-p*p.grad).detach().clone() for n, p in self.model.named_parameters()})
        def before_batch(self):
            if self.iter == 2: raise CancelFitException
    fit(learn, cbs=Two())
    mean = {n: (seen[0][n] + seen[1][n])/2 for n in seen[0]}
    score = torch.cat([mean['3.weight'].flatten(1), mean['7.weight'].reshape(3, 6, 4).transpose(0, 1).flatten(1)], 1).mean(1)
    keep = score.argsort()[3:].sort().values
    step = model2[3].weight[keep].detach()
    assert model[3].weight.shape == step.shape and (model[3].weight.detach() - step).abs().max() < .1*step.abs().max() # one step of training later

def test_the_scale_of_mixed_precision_is_taken_out():
    from types import SimpleNamespace
    from fastai.callback.fp16 import MixedPrecision
    from fasterai_lib.core.loop import LoopStatistics
    from fasterai_lib.sparse.sparsify_callback import _loss_scale
    learn = SimpleNamespace(cbs=[MixedPrecision()], scaler=torch.amp.GradScaler('cpu', init_scale=8.), loss=torch.tensor(0.)) # another callback may have added to loss_grad
    assert _loss_scale(learn) == 8 and _loss_scale(SimpleNamespace(cbs=[])) is None
    layer = nn.Linear(3, 1)
    seen = LoopStatistics(criteria['gradient'], layer, {'weight': layer.weight})
    for g in (torch.tensor([[8., 16, -8]]), torch.full((1, 3), math.inf)): # the second overflows
        layer.weight.grad = g
        seen.gradients(torch.tensor(8.))
    assert seen.result()['weight'].tolist() == [[.5, 1, -.5]]
