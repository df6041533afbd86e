"""Kernels that take only multiples: what remains is one, the nearest to what is asked. And what a failed trial run holds back is told."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner
from torch import nn

from fasterai_lib.prune.graph import trace
from fasterai_lib.prune.prune_callback import PruneCallback, shrink
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.prune.record import Recorder
from fasterai_lib.prune.rules import Flow

try: F.grouped_mm(torch.ones(2, 4), torch.ones(1, 4, 4), offs=torch.tensor([2], dtype=torch.int32))
except (AttributeError, RuntimeError, NotImplementedError): grouped = False
else: grouped = True
needs_kernel = pytest.mark.skipif(not grouped, reason='this torch has no grouped product on this machine')


class Experts(nn.Module):
    "A mixture of two experts without a router: the first half of the rows is the first one's"
    def __init__(self, hidden=16, inner=56, turned=True):
        super().__init__()
        self.turned, self.front, self.head = turned, nn.Linear(6, hidden), nn.Linear(hidden, 3)
        shape = lambda o, i: (2, o, i) if turned else (2, i, o)
        self.up, self.down = nn.Parameter(torch.randn(shape(2*inner, hidden))/4), nn.Parameter(torch.randn(shape(hidden, inner))/4)
    def product(self, x, w):
        w = w.transpose(1, 2) if self.turned else w
        half = len(x)//2
        if x.dtype == torch.float64: return torch.cat([x[:half] @ w[0], x[half:] @ w[1]]) # what the kernel computes
        return F.grouped_mm(x, w, offs=torch.tensor([half, len(x)], dtype=torch.int32))
    def forward(self, x):
        gate, value = self.product(self.front(x), self.up).chunk(2, -1)
        return self.head(self.product(F.silu(gate)*value, self.down))
    def widths(self): return [self.front.out_features, self.down.shape[-1 if self.turned else 1], self.head.in_features]

def made(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return Experts(**kwargs).to(dtype), torch.randn(4, 6).to(dtype)

def nearest(n, percent, k): # the multiple of k nearest to what is to stay, the larger of two
    left = n - np.floor(n*percent/100 + .5)
    return min(range(k, n + 1, k), key=lambda m: (abs(m - left), -m))


@needs_kernel
@pytest.mark.parametrize('turned', [True, False])
@pytest.mark.parametrize('dtype,k', [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)])
def test_experts_lose_what_is_asked_to_the_nearest_multiple(dtype, k, turned):
    for percent in (10, 30, 50, 70, 93):
        model, x = made(dtype, turned=turned)
        pruner = Pruner(model, x)
        assert [g.multiple for g in pruner.groups] == [k]*3 and not pruner.graph.pins
        plan = pruner.plan(percent)
        assert not pruner.graph.pins
        a, b = (made(dtype, turned=turned)[0] for _ in range(2))
        plan.apply(a), plan.remove(b)
        assert b.widths() == [nearest(n, percent, k) for n in (16, 56, 16)]
        torch.testing.assert_close(a.double()(x.double()), b.double()(x.double()), rtol=1e-10, atol=1e-12)
        b.to(dtype)(x).sum().backward() # the kernel takes it backward too
        assert b.up.grad.shape == b.up.shape


@needs_kernel
@pytest.mark.parametrize('dtype,fails', [(torch.float32, range(1, 10)), (torch.bfloat16, range(1, 18))])
def test_the_rule_asks_for_no_more_than_the_kernel_does(dtype, fails):
    for turned in (True, False):
        runs = []
        for n in fails: # the width that the kernel reads, in and out
            model, x = made(dtype, hidden=16, inner=n, turned=turned)
            try: model(x).sum().backward(); runs.append(n)
            except RuntimeError as e: assert 'multiple of 16 bytes' in str(e)
        assert runs == [n for n in fails if n % (16//dtype.itemsize) == 0]


@needs_kernel
def test_multiples_go_with_round_to_min_kept_context_and_several_prunings():
    model, x = made()
    assert [r[2] for r in Pruner(model, x, round_to=6).plan(40).groups] == [36, 12, 12]
    assert [r[2] for r in Pruner(model, x, min_kept=13).plan(90).groups] == [16] # the others stay whole
    assert [r[2] for r in Pruner(model, x, max_sparsity=30).plan(90).groups] == [40, 12, 12]
    kept = [r[2] for r in Pruner(model, x, context='global').plan(40).groups]
    assert all(n % 4 == 0 for n in kept)
    pruner = Pruner(model, x)
    for percent in (20, 30, 30, 10, 55, 70): pruner.prune_model(percent)
    assert model.widths() == [nearest(n, 70, 4) for n in (16, 56, 16)] and not pruner.graph.pins


@needs_kernel
@pytest.mark.parametrize('context', ['local', 'global'])
def test_training_removes_multiples(context):
    model, x = made()
    data = [(x[i % 4], torch.zeros(3)) for i in range(32)]
    cb = PruneCallback(65, context, 'large_final', 'lin')
    learn = Learner(DataLoaders.from_dsets(data, data, bs=4, device='cpu', num_workers=0), model, loss_func=nn.MSELoss(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    assert not cb.pruner.graph.pins and all(n % 4 == 0 for n in model.widths())
    if context == 'local': assert model.widths() == [nearest(n, 65, 4) for n in (16, 56, 16)]
    else: assert cb.measured > 60


@needs_kernel
@pytest.mark.parametrize('dead', [1, 5, 8, 55, 56])
def test_shrink_keeps_what_the_kernel_needs(dead):
    model, x = made()
    with torch.no_grad():
        for part in (0, 56): model.up[:, part:part + dead] = 0
        want = model.double()(x.double())
    model.float()
    if dead < 4:
        with pytest.raises(ValueError, match='no dead unit'): shrink(model, x)
        return
    shrink(model, x)
    assert model.widths() == [16, max(4, 56 - dead//4*4), 16]
    torch.testing.assert_close(model.double()(x.double()), want, rtol=1e-6, atol=1e-6)


def test_units_with_several_indices_of_an_axis_need_fewer():
    class Heads(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 24), nn.Linear(24, 2)
        def forward(self, x): return self.b(self.a(x).unflatten(1, (-1, 2)).softmax(2).flatten(1))
    model = Heads()
    graph = trace(model, torch.ones(2, 4))
    assert [(g.n, g.multiple) for g in graph.groups] == [(12, 1)]
    old = Flow.read
    def read(self, *args, **kwargs): old(self, *args, **kwargs); [self.multiple(self.params['b.weight'][1], k) for k in (8, 3)]
    try:
        Flow.read = read
        pruner = Pruner(model, torch.ones(2, 4))
    finally: Flow.read = old
    assert [g.multiple for g in pruner.groups] == [12] # 4 of two indices are 8, and 3 of two are 6
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pruner.groups[0], 'multiple', 4)
        assert [r[2] for r in pruner.plan(40).groups] == [8]


def test_a_record_knows_the_size_of_elements():
    record = Recorder(nn.Identity()).run((torch.ones(2, dtype=torch.bfloat16),))
    assert record.outputs[0].itemsize == 2


# --- what a failed trial run holds back
class Picky(nn.Module):
    "Two weights in one module, and an operator that fails for other widths; perhaps after a reshape"
    def __init__(self, heads):
        super().__init__()
        self.heads, self.up, self.down = heads, nn.Parameter(torch.randn(24, 4)), nn.Parameter(torch.randn(4, 24))
    def forward(self, x):
        x = F.linear(x, self.up)
        if self.heads: x = x.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)
        x = x.relu()
        if x.shape[-1] % 24: raise RuntimeError('only multiples of 24')
        return F.linear(x.sigmoid(), self.down)

class Around(nn.Module):
    def __init__(self, heads=False): super().__init__(); self.experts, self.other = Picky(heads), nn.Linear(4, 2)
    def forward(self, x): return self.other(self.experts(x).softmax(-1))


@pytest.mark.parametrize('heads', [False, True])
def test_what_a_trial_run_holds_back_is_told(heads):
    torch.manual_seed(0)
    pruner = Pruner(Around(heads), torch.randn(2, 4))
    assert len(pruner.groups) == 1 and len(pruner.graph.reasons()) == 2
    with pytest.raises(ValueError) as e: pruner.plan(50)
    (_, (text, op, _, line)), = pruner.graph.pins
    reasons = pruner.graph.reasons()
    assert reasons['other'] == 'it is an output of the model'
    assert list(reasons['experts']) == [f'{text}, in {op}', '_softmax runs over it']
    for r in reasons: assert f'{r} (1 layer)' in str(e.value)
    for channel in (0, 13): assert f'{text} ({op} in experts, ' in pruner.graph.why('experts', channel) and f':{line[1]})' in pruner.graph.why('experts', channel)
    assert text not in pruner.graph.why('other')
