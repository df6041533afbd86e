"""Masks chosen again for the pruned network, beside a loop written by hand."""
import copy
import warnings

import pytest
import torch
from test_properties import rng_state, snapshot
from test_prune_bad_input import randomised
from torch import nn
from torch.nn import functional as F

from fasterai_lib.sparse.reconstruct import reconstruct
from fasterai_lib.sparse.refine import reconstruct_in_steps, refine

def net():
    torch.manual_seed(0)
    return randomised(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 3)))

def batches(sizes=(8, 8, 3)):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]

def by_hand(model, data, percent, epochs, rate): # with all weights in one row
    names = ['0.weight', '3.weight']
    ws = [model.get_parameter(n).detach().clone() for n in names]
    scores, size = torch.cat([w.abs().flatten() for w in ws]), None
    gone = int(len(scores)*percent/100 + .5)
    edge = scores.sort().values[gone - 1]
    def keep():
        k = torch.ones(len(scores), dtype=torch.bool)
        k[scores.argsort(stable=True)[:gone]] = False
        return k
    for _ in range(epochs):
        for x, y in data:
            k = [m.view(w.shape) for m, w in zip(keep().split([w.numel() for w in ws]), ws)]
            a, b = (w.mul(m).requires_grad_() for w, m in zip(ws, k))
            z = F.relu(F.batch_norm(F.conv2d(x, a, model[0].bias), None, None, model[1].weight, model[1].bias, True))
            grads = torch.autograd.grad(F.cross_entropy(model[5](F.conv2d(z, b, model[3].bias).flatten(1)), y), (a, b))
            move = torch.cat([(-w*g).flatten() for w, g in zip(ws, grads)])
            mean = move.abs().mean()
            size = mean if size is None else .9*size + .1*mean
            scores = scores + rate*edge*move/size
    return keep()

@pytest.mark.parametrize('rate', [.01, .1])
@pytest.mark.parametrize('percent', [30, 70, 90])
def test_as_by_hand_and_nothing_is_changed(percent, rate):
    model = net()
    model.train(); model[1].eval(); model[3].weight.requires_grad_(True)
    before, rng = snapshot(model), rng_state()
    masks = refine(model, percent, batches(), nn.CrossEntropyLoss(), rate=rate)
    assert snapshot(model) == before and rng_state() == rng
    got = torch.cat([masks.masks[n].full(model.get_parameter(n).shape).flatten() for n in ('0.weight', '3.weight')])
    want = by_hand(model, batches(), percent, 2, rate)
    assert got.sum() == want.sum() and (got == want).all()

@pytest.mark.parametrize('context,granularity', [('local', 'weight'), ('per_row', 'weight'), ('2:4', 'weight'), ('global', 'kernel'), ('local', 'filter')])
def test_other_units(context, granularity):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8*16, 3))
    g = torch.Generator().manual_seed(2)
    masks = refine(model, 50, [(torch.randn(6, 4, 6, 6, generator=g), torch.randint(3, (6,), generator=g))], nn.CrossEntropyLoss(), granularity, context)
    assert masks.sparsity == pytest.approx(50, abs=1)

def test_after_an_error_the_model_is_as_before():
    model = net()
    for data, loss, match in (([(torch.full((4, 1, 6, 6), torch.nan), torch.zeros(4, dtype=torch.long))], nn.CrossEntropyLoss(), 'NaN'), ([b[0] for b in batches()], None, 'pass loss='),
                              (batches(), nn.CrossEntropyLoss(reduction='none'), 'one number'), ([(torch.randn(2, 3), torch.zeros(2))], nn.CrossEntropyLoss(), '')):
        before = snapshot(model)
        with pytest.raises((ValueError, RuntimeError), match=match or None): refine(model, 50, data, loss)
        assert snapshot(model) == before

@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('kwargs', [dict(), dict(granularity='filter', context='local', epochs=1), dict(layer_type=(nn.Conv2d, nn.Linear), exclude='0')])
def test_in_steps_is_refine_and_reconstruct_by_turns(steps, kwargs):
    dense, loss = net(), nn.CrossEntropyLoss()
    got, want = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = reconstruct_in_steps(got, 70, batches(), loss, steps, dict(layers='*'), **kwargs)
    for percent in ([70] if steps == 1 else [100*(1 - .3**(1/3)), 100*(1 - .3**(2/3)), 70]):
        chosen = refine(want, percent, batches(), loss, **kwargs)
        want = copy.deepcopy(dense) # what is fitted is the dense network
        reconstruct(want, chosen, batches(), layers='*')
    assert snapshot(got) == snapshot(want) and masks.held(got)
    assert all((masks.masks[n].keep == m.keep).all() for n, m in chosen.masks.items())
    assert masks.sparsity == refine(dense, 70, batches(), loss, **kwargs).sparsity

def test_steps_take_what_a_sparsifier_takes():
    loss = nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter('error') # a small step is no share that somebody took for a percentage
        for asked, want in (({'0': 50, '3': 2}, [18, 212]), ([50, 25], [18, 162]), ({'3': 0}, [None, 216])):
            masks = reconstruct_in_steps(net(), asked, batches(), loss, context='local')
            assert [int(masks.masks[n].keep.sum()) if n in masks.masks else None for n in ('0.weight', '3.weight')] == want

def test_after_an_error_in_a_later_step_the_model_is_as_before():
    model, calls = net(), []
    def loss(out, y):
        calls.append(1)
        return F.cross_entropy(out, y)*(torch.nan if len(calls) > 8 else 1.) # three batches, twice: in the second step
    before = snapshot(model)
    with pytest.raises(ValueError, match='NaN'): reconstruct_in_steps(model, 80, batches(), loss)
    assert len(calls) > 8 and snapshot(model) == before
    with pytest.raises(TypeError, match='must be a percentage'): reconstruct_in_steps(model, '80', batches(), nn.CrossEntropyLoss())
    for kwargs, match in ((dict(steps=0), 'steps must be'), (dict(steps=2.), 'steps must be'), (dict(context='2:4'), 'pass steps=1'), (dict(sparsity=120), 'between 0 and 100'), (dict(sparsity={'3': 120}, context='local'), "sparsity of '3' must be between"), (dict(fit=dict(damp=-1)), 'damp must be'),
                          (dict(fit=dict(layers='nothing')), 'matches no Linear')):
        with pytest.raises(ValueError, match=match): reconstruct_in_steps(**{**dict(model=model, sparsity=50, data=batches(), loss=nn.CrossEntropyLoss()), **kwargs})
        assert snapshot(model) == before
