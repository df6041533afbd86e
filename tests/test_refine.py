"""Masks chosen again for the pruned network, beside a loop written by hand."""
import pytest
import torch
from test_properties import rng_state, snapshot
from test_prune_bad_input import randomised
from torch import nn
from torch.nn import functional as F

from fasterai_lib.sparse.refine import refine

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
