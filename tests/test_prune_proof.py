"""Short cuts of the proof and of tracing: they must not change what is found"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai_lib.prune.graph import trace
from fasterai_lib.prune.plan import sources
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.prune.compare import in_double


class Reads(nn.Module):
    "Its source reads a large weight past the layer that owns it"
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(8, 160), nn.Linear(160, 160), nn.Linear(160, 3)
    def forward(self, x):
        x = self.a(x).relu()
        if self.how == 'past': return self.c(F.linear(x, self.b.weight))
        if self.how == 'forward': return self.c(self.b.forward(x))
        if self.how == 'scale': return self.c(self.b(x)*self.b.weight.norm())
        return self.c(self.b(x.to(self.b.weight.dtype)))


@pytest.mark.parametrize('how', ['past', 'forward', 'scale', 'dtype'])
def test_a_weight_read_past_its_layer_is_proven_in_float64(how):
    torch.manual_seed(0)
    model, x = Reads(how), torch.randn(2, 8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruner = Pruner(model, x)
    plan = pruner.plan(50)
    assert pruner.prover.precise and pruner.error < 1e-12
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
    a, b = Reads(how).double(), Reads(how).double()
    b.load_state_dict(a.state_dict())
    plan.apply(a), plan.remove(b)
    torch.testing.assert_close(a(x.double()), b(x.double()), rtol=1e-10, atol=1e-12)
    assert b.a.out_features < 160


@pytest.mark.parametrize('late', [False, True])
def test_in_double_is_the_float64_model_and_leaves_nothing(late):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 80, 3), nn.BatchNorm2d(80), nn.ReLU(), nn.Conv2d(80, 80, 3), nn.Flatten(), nn.Linear(80*4, 60)).eval()
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    was = {n: (t, t.data_ptr(), t.grad) for n, t in sources(model).items()}
    want = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), in_double(model, late=late): got = model(x.double())
    assert torch.equal(got, want)
    try:
        with torch.no_grad(), in_double(model, late=late): model(x)
    except RuntimeError: pass
    assert all(t is sources(model)[n] and t.data_ptr() == p and t.grad is g and t.dtype != torch.float64 for n, (t, p, g) in was.items())
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def helper(module, x): return module.extra(x) if module.training else x

class Asks(nn.Module):
    "Another path in training, chosen where no class of the model shows it"
    def __init__(self):
        super().__init__()
        self.a, self.extra, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    def forward(self, x): return self.c(helper(self, self.a(x).relu()))

class Switches(nn.Sequential):
    "Another path in training, prepared when the mode changes"
    def train(self, mode=True):
        self.mode = mode
        return super().train(mode)
    def forward(self, x):
        x = self[0](x)
        return self[2](self[1](x) if self.mode else x)


def test_a_training_run_is_recorded_where_somebody_asks():
    assert len(trace(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 2)).eval(), torch.randn(2, 4)).records) == 1
    graph = trace(Asks().eval(), torch.randn(2, 4))
    assert len(graph.records) == 2 and any('extra.weight' == n for g in graph.groups for n, _, _ in g.members)
    model = Switches(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    assert len(trace(model, torch.randn(2, 4)).records) == 2 and model.mode is False
    with pytest.raises(ValueError, match='does not run'): trace(Asks(), torch.randn(2, 5))
    assert 'training' not in vars(nn.Module)


@pytest.mark.parametrize('training', [False, True])
def test_modes_stay(training):
    model = Asks().train(training)
    model.extra.train(not training)
    Pruner(model, torch.randn(2, 4)).prune_model(50)
    assert [m.training for m in (model, model.a, model.extra, model.c)] == [training, training, not training, training]
