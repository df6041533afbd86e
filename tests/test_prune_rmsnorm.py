"""Norms over a width that shrinks: RMSNorm and its relatives are folded, so that what is left computes what zeros left, in float64 to the last digits."""
import copy

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from test_prune_bad_input import picture, rng, trained
from test_prune_rollback import ERRORS, PLACES, Fails
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import fasterai_lib.prune.plan
from fasterai_lib.prune.folds import find_folds
from fasterai_lib.prune.plan import load_plan, load_pruned, save_pruned
from fasterai_lib.prune.prune_callback import PruneCallback
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.prune.record import Op, Record, Ref
from fasterai_lib.prune.surgery import prune_units

rms = lambda x: x.pow(2).mean(-1, keepdim=True)

def in_place(x, w, e):
    v = rms(x)
    v.add_(e)
    return x*v.rsqrt_()*w

def grn(x, w, e):
    g = x.norm(p=2, dim=1, keepdim=True)
    return torch.addcmul(x, w.view(1, 1, -1), x*(g/(g.mean(-1, keepdim=True) + e)))

SPELLINGS = dict(
    llama=lambda x, w, e: w*(x.float()*torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + e)).to(x.dtype),
    t5=lambda x, w, e: w*(x*torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + e)),
    gemma=lambda x, w, e: (x.float()*torch.rsqrt(rms(x.float()) + e)*(1. + w.float())).type_as(x),
    one_less=lambda x, w, e: x*torch.rsqrt(rms(x) + e)*(w - 1),
    divided=lambda x, w, e: x/torch.sqrt((x*x).mean(-1, keepdim=True) + e)*w,
    in_place=in_place,
    outside=lambda x, w, e: w*x/(rms(x).sqrt() + e),
    clamped=lambda x, w, e: x/rms(x).clamp(min=e).sqrt()*w,
    power=lambda x, w, e: x*(rms(x) + e)**-.5*w,
    reciprocal=lambda x, w, e: w*(x*(1/(rms(x) + e).sqrt())),
    no_dim=lambda x, w, e: w*x/torch.sqrt((x*x).mean(-1) + e)[..., None],
    weight_first=lambda x, w, e: (x*w[None, None])*torch.rsqrt(rms(x) + e),
    weight_in_root=lambda x, w, e: x*(w*torch.rsqrt(rms(x) + e)),
    divisor=lambda x, w, e: x*torch.rsqrt(rms(x) + e)/(w + 3),
    other_axis=lambda x, w, e: (x.mT*torch.rsqrt(x.mT.square().mean(1, keepdim=True) + e)*w[:, None]).mT,
    halved=lambda x, w, e: .5*(x*torch.rsqrt(rms(x) + e))*w,
    functional=lambda x, w, e: F.rms_norm(x, x.shape[-1:], w, e),
    fused=lambda x, w, e: torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], w, e)[0],
    no_epsilon=lambda x, w, e: x*torch.rsqrt(rms(x))*w,
    grn=grn)

class Norm(nn.Module):
    def __init__(self, n, f, eps=1e-2): super().__init__(); self.weight, self.variance_epsilon, self.f = nn.Parameter(torch.ones(n)), eps, f
    def forward(self, x): return self.f(x, self.weight, self.variance_epsilon)

class Block(nn.Module):
    def __init__(self, n, norm): super().__init__(); self.norm, self.up, self.down = norm(n), nn.Linear(n, 10), nn.Linear(10, n)
    def forward(self, x): return x + self.down(torch.relu(self.up(self.norm(x))))

IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))

def net(norm, n=12):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, n), Block(n, norm), Block(n, norm), norm(n), nn.Linear(n, 5))
    for p in model.parameters(): nn.init.normal_(p, std=.5)
    return model
plain = lambda: net(lambda n: nn.RMSNorm(n, eps=1e-2))

def zeroed(model, plan): # the slow way: every index that goes, one by one, in float64
    model, params = copy.deepcopy(model).double(), None
    params = dict(model.named_parameters(remove_duplicate=False))
    for (n, axis), gone in plan.removed.items():
        for i in gone.tolist(): params[n].data.select(axis, i).zero_()
    return model

def error(model, plan, *x):
    small = plan.remove(copy.deepcopy(model).double())
    torch.set_default_dtype(torch.float64) # `.float()` in a norm costs digits in both
    real, torch.Tensor.float, to = torch.Tensor.float, torch.Tensor.double, torch.Tensor.to
    torch.Tensor.to = lambda t, *a, **k: to(t, *(torch.float64 if v is torch.float32 else v for v in a), **k)
    try: a, b = zeroed(model, plan)(*x), small(*x)
    finally: torch.set_default_dtype(torch.float32); torch.Tensor.float, torch.Tensor.to = real, to
    return float((a - b).abs().max()/a.abs().max())

# --- what folds

@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_folds(spelling):
    model = net(lambda n: Norm(n, SPELLINGS[spelling]))
    before = picture(model)
    for sparsity in (25, 50, 75):
        plan = (p := Pruner(model, IDS)).plan(sparsity)
        assert len(plan.cuts['0.weight'][1]) == 12 - round(12*sparsity/100) and len(plan.scales) == 3
        assert error(model, plan, IDS) < 1e-12 and p.error < 1e-12
    assert picture(model) == before

@pytest.mark.parametrize('eps', [None, 0., 1e-6, 3.])
def test_torch_rms_norm(eps):
    model = net(lambda n: nn.RMSNorm(n, eps=eps))
    plan = Pruner(model, IDS).plan(50)
    assert error(model, plan, IDS) < 1e-12
    plan.remove(model)
    at = torch.finfo(torch.float32).eps if eps is None else eps
    assert all(m.normalized_shape == (6,) and (m.eps == pytest.approx(2*at) if eps != 0 else m.eps == 0) for m in model.modules() if isinstance(m, nn.RMSNorm))

def test_by_hand(): # 4 of 16 stay: twice the weight, four times epsilon
    model = nn.Sequential(nn.Linear(3, 16), nn.RMSNorm(16, eps=.5), nn.Linear(16, 2))
    weight = model[1].weight.data.copy_(torch.arange(1., 17.)).clone()
    plan = Pruner(model, torch.randn(2, 3)).prune_model(75)
    assert torch.equal(model[1].weight.detach(), 2*weight[plan.cuts['1.weight'][0]]) and model[1].eps == 2

def test_widths_of_several_layers_side_by_side(): # 6 + 10 features in one norm
    class Cat(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.norm, self.out = nn.Linear(4, 6), nn.Linear(4, 10), nn.RMSNorm(16, eps=.1), nn.Linear(16, 2)
        def forward(self, x): return self.out(self.norm(torch.cat([self.a(x), self.b(x)], -1)))
    model, x = Cat(), torch.randn(3, 4)
    nn.init.normal_(model.norm.weight)
    plan = Pruner(model, x).plan({'a': 50, 'b': 20})
    assert plan.scales['norm.weight'][0] == pytest.approx((16/11)**.5) and error(model, plan, x.double()) < 1e-12

class Heads(nn.Module): # norms of queries and keys over the head dimension; after them a gated one in groups
    def __init__(self, heads):
        super().__init__()
        self.heads, self.q, self.k, self.v, self.g, self.o = heads, *(nn.Linear(12, 24) for _ in range(4)), nn.Linear(24, 12)
        self.nq, self.nk, self.weight, self.eps = nn.RMSNorm(24//heads, eps=.1), nn.RMSNorm(24//heads, eps=.2), nn.Parameter(torch.randn(24)), .3
        nn.init.normal_(self.nq.weight); nn.init.normal_(self.nk.weight)
    def forward(self, x):
        b, t, _ = x.shape
        q, k, v, g = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v, self.g))
        y = ((self.nq(q) @ self.nk(k).mT/3).softmax(-1) @ v)
        y = (y*torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)*torch.sigmoid(g)).transpose(1, 2)
        return self.o(y.flatten(2)*self.weight)

@pytest.mark.parametrize('heads', [1, 4])
def test_norms_inside_attention(heads): # one head loses some of its width, of four whole ones go
    torch.manual_seed(0)
    model, x = Heads(heads), torch.randn(2, 5, 12)
    plan = Pruner(model, x).plan(50)
    assert error(model, plan, x.double()) < 1e-12
    assert {n: s[0] for n, s in plan.scales.items()} == ({n: pytest.approx(2**.5) for n in ('nq.weight', 'nk.weight', 'weight')} if heads == 1 else {})
    plan.remove(model)
    assert (model.nq.eps, model.nk.eps, model.eps) == pytest.approx((.2, .4, .6) if heads == 1 else (.1, .2, .3))
    assert model.q.out_features == model.v.out_features == 12

def test_a_norm_used_twice():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.norm, self.b, self.c = nn.Linear(4, 8), nn.RMSNorm(8, eps=.1), nn.Linear(8, 8), nn.Linear(8, 3)
        def forward(self, x): x = self.a(x); return self.c(self.norm(x + self.b(self.norm(x))))
    model, x = Twice(), torch.randn(3, 4)
    plan = Pruner(model, x).plan(50)
    assert plan.scales['norm.weight'][0] == pytest.approx(2**.5) and error(model, plan, x.double()) < 1e-12

class Shared(nn.Module): # one epsilon for the norms of two widths; perhaps one gain
    def __init__(self, gain=None):
        super().__init__()
        self.a, self.b, self.out, self.eps = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(16, 2), .3
        self.wa = nn.Parameter(torch.randn(gain or 8))
        self.wb = self.wa if gain else nn.Parameter(torch.randn(8))
    def forward(self, x): return self.out(torch.cat([a*torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)*w for a, w in ((self.a(x), self.wa), (self.b(x), self.wb))], -1))

@pytest.mark.parametrize('gain', [None, 1])
def test_norms_that_share_a_number_keep_their_width(gain):
    model, x = Shared(gain), torch.randn(3, 4)
    for check in (True, False):
        with pytest.raises(ValueError, match='norms share'): Pruner(model, x, check=check).plan({'a': 50})
    plan = Pruner(model, x, exact=False).prune_model({'a': 50}) # half a fold would be worse than none
    assert not plan.scales and model.eps == .3 and model.a.out_features == 4 and model(x).shape == (3, 2)

# --- what stays

def read_elsewhere(x, w, e): return x*torch.rsqrt(rms(x) + e)*w + w.sum()
def root_elsewhere(x, w, e): r = torch.rsqrt(rms(x) + e); return x*r*w + r
def twice_epsilon(x, w, e): return torch.relu(x + e)*torch.rsqrt(rms(x) + e)*w
REFUSED = dict(constant=lambda x, w, e: x*torch.rsqrt(rms(x) + 1e-4)*w, no_weight=lambda x, w, e: x*torch.rsqrt(rms(x) + e), read_elsewhere=read_elsewhere, root_elsewhere=root_elsewhere,
               twice_epsilon=twice_epsilon, centred=lambda x, w, e: (x - x.mean(-1, keepdim=True))*torch.rsqrt(rms(x) + e)*w, added=lambda x, w, e: x + x.mean(-1, keepdim=True)*w,
               layer_norm=lambda x, w, e: F.layer_norm(x, x.shape[-1:], w, eps=e), two_weights=lambda x, w, e: x*torch.rsqrt(rms(x) + e)*(w*w), softmax=lambda x, w, e: torch.softmax(torch.rsqrt(rms(x) + e)*x*2, 1)*w)

@pytest.mark.parametrize('how', REFUSED)
@pytest.mark.parametrize('check', [True, False])
def test_what_cannot_fold_stays(how, check):
    model = nn.Sequential(nn.Linear(4, 8), Norm(8, REFUSED[how]), nn.Linear(8, 2))
    x, before = torch.randn(2, 3, 4), picture(model)
    with pytest.raises(ValueError, match='exactly: (mean depends on how many there are|a norm averages over it)'): Pruner(model, x, check=check).plan(50)
    assert picture(model) == before
    Pruner(model, x, exact=False).prune_model(50)
    assert model[0].out_features == 4 and model(x).shape == (2, 3, 2)

def test_training_that_reads_the_weight_elsewhere():
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.a, self.norm, self.out = nn.Linear(4, 8), nn.RMSNorm(8, eps=.1), nn.Linear(8, 2)
        def forward(self, x): x = self.a(x); return self.out(self.norm(x) if not self.training else self.norm(x) + self.norm.weight)
    with pytest.raises(ValueError, match='mean depends'): Pruner(Model(), torch.randn(3, 4)).plan(50)

# --- zeroing, slicing, keeping, again

def test_zeroing_does_not_scale_and_float32_rounds_once():
    model = plain()
    plan, old = Pruner(model, IDS).plan(50), model[3].weight.detach().clone()
    masked = plan.apply(copy.deepcopy(model))
    kept = plan.cuts['3.weight'][0]
    assert torch.equal(masked[3].weight[kept], old[kept]) and masked[3].eps == 1e-2
    plan.remove(model)
    assert torch.equal(model[3].weight.detach(), (old[kept].double()*2**.5).float()) and model[3].eps == 2e-2
    torch.testing.assert_close(masked(IDS), model(IDS), rtol=1e-5, atol=1e-6)

def test_modules_of_one_class_have_their_own_epsilon():
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=.1), nn.Linear(8, 16), nn.RMSNorm(16, eps=.1), nn.Linear(16, 2))
    plan = Pruner(model, torch.randn(3, 4)).prune_model({'0': 50, '2': 75})
    assert (model[1].eps, model[3].eps) == (.2, .4) and [plan.scales[f'{i}.weight'][0] for i in (1, 3)] == [pytest.approx(2**.5), 2.]

@pytest.mark.parametrize('spelling', ['llama', 'gemma', 'outside', 'grn'])
def test_pruned_again_and_again(spelling, tmp_path):
    make = lambda: net(lambda n: Norm(n, SPELLINGS[spelling]))
    model, double = make(), make().double()
    p, gone = Pruner(model, IDS), {}
    for sparsity in (20, 45): p.prune_model(sparsity).remove(double)
    Pruner(model, IDS).prune_model(30).remove(double) # traced anew
    save_pruned(model, tmp_path/'m.safetensors')
    loaded, plan = load_pruned(make(), tmp_path/'m.safetensors'), load_plan(tmp_path/'m.safetensors')
    assert torch.equal(loaded(IDS), model(IDS)) and [m.variance_epsilon for m in loaded.modules() if isinstance(m, Norm)] == [m.variance_epsilon for m in model.modules() if isinstance(m, Norm)]
    small = plan.remove(make().double()) # the three as one
    torch.testing.assert_close(small.state_dict(), double.state_dict(), rtol=1e-14, atol=0)
    assert error(make(), plan, IDS) < 1e-12
    save_pruned(loaded, tmp_path/'again.safetensors')
    assert torch.equal(load_pruned(make(), tmp_path/'again.safetensors')(IDS), model(IDS))

@pytest.mark.parametrize('place', [*PLACES, (fasterai_lib.prune.plan, '_times'), (fasterai_lib.prune.plan, 'epsilon')], ids=lambda p: f'{p[0].__name__.split(".")[-1]}-{p[1]}')
def test_rolled_back(place, monkeypatch):
    model = plain()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    model(IDS).square().mean().backward(); opt.step()
    plan, snap, before = Pruner(model, IDS).plan(50), picture(model, opt), rng()
    for n in (1, 2, 3):
        for e in ERRORS:
            monkeypatch.setattr(*place, f := Fails(getattr(*place), n, e))
            twin = copy.deepcopy((model, opt))
            try: plan.remove(model, opt)
            except BaseException as got: assert got is e and picture(model, opt) == snap and rng() == before and [m.eps for m in model.modules() if isinstance(m, nn.RMSNorm)] == [1e-2]*3
            else: assert f.calls < n; model, opt = twin
            finally: monkeypatch.undo()

def test_units_by_name():
    model = plain()
    before = zeroed(model, plan := prune_units(copy.deepcopy(model), IDS, '0', [0, 3, 7]))
    small = plan.remove(copy.deepcopy(model).double())
    torch.testing.assert_close(small(IDS), before(IDS), rtol=1e-12, atol=1e-12)
    assert small[0].embedding_dim == 9

# --- in training

def test_the_optimizer_goes_on():
    model = plain()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2): opt.zero_grad(); model(IDS).square().mean().backward(); opt.step()
    w = model[3].weight
    state, grad = {k: v.clone() for k, v in opt.state[w].items()}, w.grad.clone()
    plan = Pruner(model, IDS).prune_model(50, opt)
    kept = plan.cuts['3.weight'][0]
    assert model[3].weight is w and all(torch.equal(opt.state[w][k], v[kept] if v.dim() else v) for k, v in state.items())
    torch.testing.assert_close(w.grad, grad[kept]/2**.5) # what the weight gained, a gradient by it lost
    model(IDS).square().mean().backward(); opt.step()

def test_gradients_are_those_of_the_zeroed_model():
    model = plain().double()
    plan = Pruner(model, IDS).plan(50)
    dense, small = zeroed(model, plan), plan.remove(copy.deepcopy(model))
    for m in (dense, small): m(IDS).square().mean().backward()
    for n, p in small.named_parameters():
        want = dict(dense.named_parameters())[n].grad
        for axis, kept in plan.cuts.get(n, {}).items(): want = want.index_select(axis, kept)
        torch.testing.assert_close(p.grad*plan.scales.get(n, (1.,))[0], want, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('criteria', ['large_final', 'movement'])
def test_gradual_removal_in_a_fit(criteria):
    torch.manual_seed(0)
    x = torch.randint(0, 11, (32, 7))
    dl = torch.utils.data.DataLoader(list(zip(x, x[:, 0] % 5)), 8)
    model = nn.Sequential(plain(), nn.Flatten(), nn.Linear(35, 5))
    ema = AveragedModel(model)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=nn.CrossEntropyLoss(), cbs=(cb := PruneCallback(50, 'local', criteria, 'lin', copies=(ema,))))
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert model[0][0].embedding_dim == 6 and model[0][3].eps == pytest.approx(2e-2) and ema.module[0][3].eps == model[0][3].eps
    assert cb.pruner.error < 1e-10 and ema(x).shape == (32, 5)
    torch.testing.assert_close(ema.module[0][1].norm.weight.shape, model[0][1].norm.weight.shape)

def test_half_precision():
    model = plain().bfloat16()
    plan = Pruner(model, IDS).plan(50)
    assert error(model, plan, IDS) < 1e-12 and plan.remove(model)[3].weight.dtype == torch.bfloat16

@pytest.mark.parametrize('eps', [1e-2, None])
def test_the_fused_operator(eps): # what CUDA runs
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=eps))
    x, y, r = Ref(10, (3, 8)), Ref(11, (3, 8)), Ref(12, (3, 1))
    fused = Op('_fused_rms_norm', torch.ops.aten._fused_rms_norm.default, (x, [8], Ref(2, (8,)), eps), {}, [y, r], ('', '1'), ('', 0))
    record = Record(ops=[fused], sources={2: '1.weight'}, outputs=[y])
    find_folds([record], model)
    assert [(f.name, f.power, f.epsilons) for f in record.folds.values()] == [('1.weight', .5, [('1', 'eps', 1.)])]
    record.ops.append(Op('relu', torch.ops.aten.relu.default, (r,), {}, [Ref(13, (3, 1))], ('', '1'), ('', 0)))
    find_folds([record], model)
    assert not record.folds
