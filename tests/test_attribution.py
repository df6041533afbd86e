"""Attributions against answers by hand, all orders tried one by one, and autograd on samples one by one."""
import random
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai_lib.core.attribution import _Site, attribute, attribution_criteria, methods
from fasterai_lib.core.collect import collect
from fasterai_lib.core.criteria import criteria
from fasterai_lib.core.running import batches, untouched
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsifier import Sparsifier

mse, ce = nn.MSELoss(), nn.CrossEntropyLoss()
close = lambda a, b, tol=1e-10: np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=tol, atol=tol)

def seeded(make, *args, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make(*args, **kwargs).double()
        for b in model.modules():
            if isinstance(b, nn.BatchNorm2d):
                for t in (b.weight, b.bias, b.running_mean): nn.init.normal_(t)
                nn.init.uniform_(b.running_var, .5, 2)
    return model

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def classes(n, k, seed=1): return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed))

# --- the model with known answers

X = torch.tensor([[0., 1], [1, 0], [1, 2], [2, 1]])
Y = X.max(1, keepdim=True).values

class Toy(nn.Module):
    def __init__(self, last, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False), how
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[-.5, .5], [1, -1], [1, 1], [1, 1]]))
            self.b.weight.copy_(torch.tensor([[1, .5, .5, last]]))
    def forward(self, x):
        z = self.a(x)
        return self.b({'module': nn.ReLU(), 'functional': F.relu, 'method': torch.Tensor.relu, 'inplace': nn.ReLU(inplace=True)}[self.how](z))

def v1(how='module'): return Toy(0, how)
def v2(how='module'): return Toy(-.1, how)

KNOWN = [(v1, 'weight_norm', {}, [1, 2, 2, 2]), (v1, 'apoz', {}, [.5, .5, 1, 1]), (v2, 'sensitivity', dict(at='layer'), [.2, .1, .2, .04]), (v2, 'taylor', {}, [.1, .1, .5, .1]),
         (v2, 'taylor', dict(signed=True), [.1, .1, .5, -.1]), (v1, 'taylor', {}, [0, 0, 0, 0]), (v1, 'shapley', {}, [.375, .375, 1.75, 0]),
         (v1, 'shapley', dict(exact=0, tolerance=0, permutations=200), [.375, .375, 1.75, 0])]

@pytest.mark.parametrize('how', ['module', 'functional', 'method', 'inplace'])
@pytest.mark.parametrize('model,method,options,answer', KNOWN)
@pytest.mark.parametrize('size', [1, 3, 4])
def test_known_answers(how, model, method, options, answer, size):
    data = [(X[i:i + size], Y[i:i + size]) for i in range(0, 4, size)]
    close(attribute(model(how), 'a', data, mse, method, **options), answer, 1e-6)

def test_sensitivity_moves_with_its_point(): # beyond the ReLU the gradient does not know that a unit was off
    g = 2*.1*torch.tensor([1., 1, 3, 3]) # the errors of v2 are -.1 times x1 + x2
    close(attribute(v2(), 'a', (X, Y), mse, 'sensitivity'), g.mean()*torch.tensor([1, .5, .5, .1]), 1e-6)

# --- Shapley: every order

def worth(model, b, see, loss, keep): # the loss of one sample with the output of a module masked by a plain hook
    h = see.register_forward_hook(lambda m, i, z: torch.where(torch.tensor(keep).view(-1, *[1]*(2 if z.ndim == 4 else 0)), z, 0.))
    try:
        with torch.no_grad(): return b.loss(b.run(model), loss).item()
    finally: h.remove()

def all_orders(model, see, units, data, loss): # [samples, units]
    rows = []
    for b in (x for y in batches(data) for x in y.parts()):
        v = {keep: worth(model, b, see, loss, keep) for keep in product((True, False), repeat=units)}
        total, orders = np.zeros(units), list(permutations(range(units)))
        for order in orders:
            keep = [True]*units
            for u in order:
                before, keep[u] = v[tuple(keep)], False
                total[u] += v[tuple(keep)] - before
        rows.append(total/len(orders))
    return np.array(rows)

class Marked(nn.Module): # activations are functions; `mark` shows a hook where the output goes on
    def __init__(self):
        super().__init__()
        self.mark = nn.Identity()

class Fallback(Marked): # adds what depends on the coalition to what does not, in place: vmap refuses
    def __init__(self):
        super().__init__()
        self.skip, self.a, self.fc = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
    def forward(self, x):
        out = self.skip(x)
        out += self.mark(F.gelu(self.a(x)))
        return self.fc(out.mean((2, 3)))

class Residual(Marked):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.Linear(4, 3)
    def forward(self, x):
        x = self.mark(F.silu(self.a(x)))
        out = self.bn(self.b(x))
        out += x
        return self.fc(F.relu_(out).mean((2, 3)))

class Twice(Marked): # a layer used twice
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
    def forward(self, x): return self.fc(self.mark(torch.tanh(self.a(self.mark(torch.tanh(self.a(x)))))))

class Attention(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.e, self.o, self.batch_first = nn.TransformerEncoderLayer(4, 2, 4, activation=nn.Tanh(), batch_first=batch_first), nn.Linear(4, 3), batch_first
    def forward(self, x): return self.o(self.e(x).mean(1)) if self.batch_first else self.o(self.e(x.transpose(0, 1)).mean(0))

class Windows(Marked): # several rows per sample
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(8, 3)
    def forward(self, x): return self.fc(self.mark(torch.relu(self.a(x.reshape(-1, 4)))).reshape(len(x), -1, 4)[:, :2].flatten(1))

class Hugging(Marked): # a loss of its own, a dict in and out
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
    def forward(self, x, labels):
        out = self.fc(self.mark(self.a(x).sigmoid()))
        return dict(loss=F.cross_entropy(out, labels), logits=out)

def branchy(out, y): return F.cross_entropy(out, y)*(2. if out.sum().item() > 0 else 1.) # looks at values
def weighted(out, y): return F.cross_entropy(out, y, weight=torch.tensor([1., 2, 5], dtype=out.dtype)) # over a batch not the mean of its samples

flat, image, sequence = randn(5, 4), randn(5, 2, 4, 4), randn(5, 3, 4)
conv = lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
up = lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 3))
CASES = { # model, layer, module whose output is masked by the oracle, inputs, loss, options
    'linear': (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), '0', '0', flat, ce, dict(at='layer')),
    'activation': (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)), '0', '1', flat, ce, {}),
    'norm': (conv, '0', '2', image, ce, {}), 'before the norm': (conv, '0', '0', image, ce, dict(at='layer')), 'output of the model': (conv, '4', '4', image, ce, {}),
    'residual': (Residual, 'a', 'mark', image, ce, {}), 'residual, grouped': (Residual, 'b', 'bn', image, ce, {}), 'no vmap': (Fallback, 'a', 'mark', image, ce, {}),
    'transposed': (up, '0', '0', image, ce, {}), 'twice': (Twice, 'a', 'mark', flat, ce, {}), 'windows': (Windows, 'a', 'mark', sequence, ce, {}),
    'attention': (Attention, 'e.linear1', 'e.activation', sequence, ce, {}), 'attention, sequence first': (lambda: Attention(False), 'e.linear1', 'e.activation', sequence, ce, {}),
    'own loss': (Hugging, 'a', 'mark', flat, None, {}), 'dict of outputs': (Hugging, 'fc', 'fc', flat, lambda out, b: F.cross_entropy(out['logits'], b['labels']), {}),
    'loss with values': (conv, '0', '2', image, branchy, {}), 'weighted loss': (conv, '0', '2', image, weighted, {})}

def case(name):
    make, layer, see, x, loss, options = CASES[name]
    model, y = seeded(make).eval(), classes(5, 3)
    if make is Hugging: data = [dict(x=x[:2], labels=y[:2]), dict(x=x[2:], labels=y[2:])]
    else: data = [(x[:2], y[:2]), (x[2:], y[2:])]
    return model, layer, model.get_submodule(see), data, loss, options

@pytest.mark.parametrize('name', CASES)
def test_shapley_is_the_mean_over_all_orders(name):
    model, layer, see, data, loss, options = case(name)
    units = attribute(model, layer, method='weight_norm').numel()
    want = all_orders(model, see, units, data, loss)
    close(attribute(model, layer, data, loss, reduction='none', **options), want, 1e-6 if name.startswith('attention') else 1e-10)
    few, se = attribute(model, layer, data, loss, exact=0, tolerance=0, permutations=20, return_se=True, **options)
    assert (se <= .4*np.abs(want).max()).all() and ((few - torch.tensor(want.mean(0))).abs() <= 5*se + 2e-3*np.abs(want).max()).all() # the error of few orders is known roughly
    close(few.sum(), want.mean(0).sum(), 1e-6) # each order adds up to the same

@pytest.mark.parametrize('name', CASES)
def test_gradient_methods_are_those_of_samples_alone(name):
    model, layer, see, data, loss, options = case(name)
    rows = {'sensitivity': [], 'taylor': [], 'signed': [], 'apoz': []}
    def hook(m, i, z): # adds a zero whose gradient is that of z, so that what happens to z in place does not matter
        zs.append(z.detach().clone()); zeros.append(torch.zeros_like(z, requires_grad=True))
        return z + zeros[-1]
    by_unit = lambda t: t[0].flatten(1) if t.ndim > 3 else t.reshape(-1, t.shape[-1]).T
    for b in (x for y in batches(data) for x in y.parts()):
        zs, zeros = [], []
        h = see.register_forward_hook(hook)
        try: gs = torch.autograd.grad(b.loss(b.run(model), loss), zeros)
        finally: h.remove()
        z, g = (torch.cat([by_unit(t) for t in ts], 1) for ts in (zs, gs))
        for k, v in dict(sensitivity=g.abs().sum(1), taylor=(g*z).sum(1).abs(), signed=-(g*z).sum(1), apoz=(z > 0).double().mean(1)).items(): rows[k].append(v)
    for method, want in rows.items():
        kw = dict(method='taylor', signed=True) if method == 'signed' else dict(method=method)
        close(attribute(model, layer, data, loss, reduction='none', **kw, **options), torch.stack(want), 1e-6)

# --- how it is computed does not show

@pytest.mark.parametrize('name', CASES)
def test_coalitions_at_once_are_coalitions_one_by_one(name): # and vmap is what runs, except where it cannot
    model, layer, see, data, loss, options = case(name)
    keep = torch.rand(7, 5, attribute(model, layer, method='weight_norm').numel(), generator=torch.Generator().manual_seed(0)) > .4
    tables = []
    for vmap, rows in ((True, None), (True, 3), (False, None), (False, 1)):
        site = _Site(model, layer, loss, options.get('at', 'activation'))
        site.vmap, bs = vmap, list(batches(data))
        with untouched(model):
            site.probe(bs[0])
            tables.append(site.table(bs, lambda i, j: keep[:, i:j], 7, rows))
        if vmap: assert site.vmap == (name not in ('no vmap', 'loss with values'))
    for t in tables[1:]: close(t, tables[0], 1e-6)

def test_the_head_runs_once(): # for all coalitions of a few samples
    model, y = seeded(conv).eval(), classes(4, 3)
    shapes = {0: [], 4: []}
    for i in shapes: model[i].register_forward_hook(lambda m, x, z, i=i: shapes[i].append(tuple(x[0].shape)))
    attribute(model, '0', (image[:4], y), ce, exact=4)
    assert max(s[0] for s in shapes[0]) == 4 and len(shapes[0]) <= 4 # two to look, one for all 16 coalitions: inside vmap the batch keeps its size

def net(n=12): return seeded(lambda: nn.Sequential(nn.Conv2d(2, n, 3), nn.BatchNorm2d(n), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(n, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)))

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none', 'mean+2std', lambda rows: rows.amax(0)])
@pytest.mark.parametrize('method', methods)
def test_batch_size_does_not_matter(method, reduction):
    model, x, y = net().float(), image.float().repeat(2, 1, 1, 1)[:7] + torch.arange(7.).view(7, 1, 1, 1)/10, classes(7, 3)
    found = [attribute(model, '0', [(x[i:i + n], y[i:i + n]) for i in range(0, 7, n)], ce, method, reduction, tolerance=0, permutations=4) for n in (1, 3, 7)]
    assert found[0].shape == ((1 if method in ('random', 'weight_norm') else 7, 12) if reduction == 'none' else (12,)) and found[0].dtype == torch.float32
    for f in found[1:]: close(f, found[0], 1e-5)

def test_reductions():
    model, data = net(), (image, classes(5, 3))
    rows = attribute(model, '0', data, ce, 'taylor', 'none', signed=True).numpy()
    of = lambda r: attribute(model, '0', data, ce, 'taylor', r, signed=True)
    close(of('mean'), rows.mean(0)); close(of('sum'), rows.sum(0)); close(of('mean+2std'), rows.mean(0) + 2*rows.std(0)); close(of(lambda t: t.median(0).values), np.median(rows, 0))

@pytest.mark.parametrize('make,shape', [(lambda: nn.Linear(3, 5), (5, 3)), (lambda: nn.Conv1d(4, 6, 3, groups=2), None), (lambda: nn.ConvTranspose2d(4, 6, 3), None), (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), None)])
def test_weight_norm(make, shape):
    m = seeded(make)
    w, g = m.weight.detach().abs().numpy(), getattr(m, 'groups', 1)
    if getattr(m, 'transposed', False): want = [w[u//(6//g)*(4//g):(u//(6//g) + 1)*(4//g), u % (6//g)].sum() for u in range(6)]
    else: want = [w[u].sum() for u in range(len(w))]
    close(attribute(m, m, method='weight_norm'), want)

# --- standard errors, seeds

def test_standard_errors_are_honest():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)))
    data = (image[:3], classes(3, 3))
    true = attribute(model, '0', data, ce, exact=8)
    runs = [attribute(model, '0', data, ce, exact=0, tolerance=0, permutations=12, seed=s, return_se=True) for s in range(16)]
    values, ses = (torch.stack(t) for t in zip(*runs))
    close(values.mean(0), true, float(6*ses.max()/16**.5))
    ratio = (values - true).square().mean(0).sqrt()/ses.square().mean(0).sqrt()
    assert .6 < ratio.median() < 1.5, ratio
    for r in ('sum', 'none'):
        v, se = attribute(model, '0', data, ce, exact=0, tolerance=0, permutations=12, reduction=r, return_se=True)
        if r == 'sum': close(se, 3*ses[0])
        else: close(se.square().sum(0).sqrt()/3, ses[0])
    assert not attribute(model, '0', data, ce, 'taylor', return_se=True)[1].any() and not attribute(model, '0', data, ce, exact=8, return_se=True)[1].any()

def test_sampling_ends_when_it_is_sure():
    model, data = net(), (image, classes(5, 3))
    runs = []
    h = model.register_forward_hook(lambda *_: runs.append(0))
    counts = []
    for tolerance in (.5, .1):
        runs.clear()
        v, se = attribute(model, '0', data, ce, tolerance=tolerance, permutations=500, return_se=True)
        counts.append(len(runs))
        assert se.max() <= tolerance*v.abs().max()
    assert counts[0] < counts[1]
    h.remove()
    with pytest.warns(UserWarning, match='0: after 4 permutations of 5 samples.*tolerance=0.0001'): attribute(model, '0', data, ce, tolerance=1e-4, permutations=4)

def test_seeds():
    model, data = net(), (image, classes(5, 3))
    for method in ('random', 'shapley'):
        a, b, c = (attribute(model, '0', data, ce, method, tolerance=0, permutations=4, seed=s) for s in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)

# --- as it was

def state(model):
    return [(n, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in model.named_modules()], \
           [(n, id(t), t._version, t.requires_grad, t.detach().numpy().tobytes(), t.grad if t.grad is None else t.grad.numpy().tobytes()) for n, t in [*model.named_parameters(), *model.named_buffers()]]
def rng(): return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

def touched():
    model = net().train()
    model[2].eval(); model[4].weight.requires_grad_(False)
    ce(model(image), classes(5, 3)).backward()
    return model

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('layer', ['0', '7'])
def test_the_model_is_untouched(method, layer):
    model = touched()
    before = state(model), rng()
    value = attribute(model, layer, (image, classes(5, 3)), ce, method, tolerance=0, permutations=4)
    assert (state(model), rng()) == before and torch.isfinite(value).all() and not value.requires_grad
    for f in (lambda out, y: 1/0, lambda out, y: out): # and after errors
        if method in ('sensitivity', 'taylor', 'shapley'):
            with pytest.raises((ZeroDivisionError, ValueError)): attribute(model, layer, (image, classes(5, 3)), f, method)
            assert (state(model), rng()) == before

def test_frozen_models_have_gradients_too():
    model, data = net(), (image, classes(5, 3))
    want = attribute(model, '0', data, ce, 'taylor')
    close(attribute(model.requires_grad_(False), '0', data, ce, 'taylor'), want)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x, y = net(), image, classes(5, 3)
    for method in ('taylor', 'shapley'):
        want = attribute(model.double(), '0', (x, y), ce, method, tolerance=0, permutations=4)
        got = attribute(model.to(dtype), '0', (x.to(dtype), y), ce, method, tolerance=0, permutations=4)
        assert got.dtype == torch.float32 and (got - want).abs().max() < .1*want.abs().max()

# --- mistakes

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)
    def forward(self, x): return self.a(x)
class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
    def forward(self, x): return self.a(x).detach()
class Mixed(nn.Module): # rows of the samples between each other
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(4, 3), nn.Linear(9, 3)
    def forward(self, x): return self.fc(self.a(x.transpose(0, 1).reshape(-1, 4)).reshape(3, len(x), 3).transpose(0, 1).flatten(1))
class Pooled(nn.Module): # no samples left
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
    def forward(self, x): return self.a(x.mean(0)).expand(len(x), 3)

spoiled = flat.clone()
spoiled[3, 1] = float('nan')
D = (flat, classes(5, 3))
mlp = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
BAD = [
    ('no data', mlp, dict(layer='0', loss=ce), ValueError, '0: shapley looks at data: pass data=, and loss='),
    ('no data for apoz', mlp, dict(layer='0', method='apoz'), ValueError, r'apoz looks at data: pass data=$'),
    ('no loss', mlp, dict(layer='0', data=D), ValueError, 'pass loss='),
    ('loss not a scalar', mlp, dict(layer='0', data=D, loss=lambda out, y: out), ValueError, 'one number.*shape'),
    ('loss not a scalar, gradient', mlp, dict(layer='0', data=D, loss=lambda out, y: out, method='taylor'), ValueError, 'one number.*shape'),
    ('loss no tensor', mlp, dict(layer='0', data=D, loss=lambda out, y: 3), ValueError, 'one number.*3'),
    ('unknown layer', Residual, dict(layer='sk'), ValueError, "layer 'sk' is not in the model"),
    ('nearest name', lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))), dict(layer='0.0.0'), ValueError, "did you mean '0.0'"),
    ('other module', mlp, dict(layer=nn.Linear(4, 4)), ValueError, 'this Linear is not in the model; allowed: 0, 2'),
    ('layer without units', mlp, dict(layer='1'), TypeError, '1: .* got a ReLU; .*allowed: 0, 2'),
    ('never reached', Unused, dict(layer='aside', data=D, loss=ce), ValueError, 'aside: the data never reaches'),
    ('NaN, shapley', mlp, dict(layer='0', data=[D, (spoiled, D[1])], loss=ce), ValueError, '0: the loss of a batch is NaN'),
    ('NaN, taylor', mlp, dict(layer='0', data=[D, (spoiled, D[1])], loss=ce, method='taylor'), ValueError, '0: the (loss|output).* of a batch is NaN'),
    ('NaN, apoz', mlp, dict(layer='0', data=[D, (spoiled, D[1])], method='apoz'), ValueError, '0: the output.* of a batch is NaN'),
    ('detached', Detached, dict(layer='a', data=D, loss=ce, method='taylor'), ValueError, 'a: the loss does not depend .* gradient'),
    ('mixed samples', Mixed, dict(layer='a', data=(sequence, D[1]), loss=ce), ValueError, 'a: .* mixes the samples'),
    ('no samples', Pooled, dict(layer='a', data=D, loss=ce), ValueError, 'a: .* cannot be told apart'),
    ('method', mlp, dict(layer='0', method='shaply'), ValueError, "did you mean 'shapley'"), ('reduction', mlp, dict(layer='0', reduction='meen'), ValueError, "did you mean 'mean'"),
    ('reduction to one', mlp, dict(layer='0', data=D, loss=ce, reduction=torch.mean), ValueError, r'0: reduction must make \[units\]'),
    ('at', mlp, dict(layer='0', at='layers'), ValueError, "did you mean 'layer'"), ('signed', mlp, dict(layer='0', signed=True), ValueError, 'signed=True is for'),
    ('se', mlp, dict(layer='0', reduction='mean+2std', return_se=True), ValueError, 'return_se goes with'), ('permutations', mlp, dict(layer='0', permutations=1), ValueError, 'permutations must be at least 4'),
    ('permutations no number', mlp, dict(layer='0', permutations=8.5), TypeError, 'permutations must be a whole number'), ('rows', mlp, dict(layer='0', rows=-1), ValueError, 'rows must be at least 1'),
    ('tolerance', mlp, dict(layer='0', tolerance=float('nan')), ValueError, 'tolerance must be at least 0'), ('data', mlp, dict(layer='0', data=3, loss=ce), TypeError, 'data must be'), ('empty', mlp, dict(layer='0', data=[], loss=ce), ValueError, 'no batch')]

@pytest.mark.parametrize('make,options,error,match', [pytest.param(*b[1:], id=b[0]) for b in BAD])
def test_mistakes(make, options, error, match):
    model = seeded(make).train()
    before = state(model), rng()
    with pytest.raises(error, match=match): attribute(model, **options)
    assert (state(model), rng()) == before

# --- as criteria

def test_the_statistic_is_the_attribution_of_each_output():
    model, data = net(6), [(image[:3], classes(5, 3)[:3]), (image[3:], classes(5, 3)[3:])]
    params = {n: p for n, p in model.named_parameters() if n in ('0.weight', '4.weight', '7.weight')}
    for c, kw in ((criteria['shapley'], {}), (attribution_criteria('taylor', reduction='mean+2std', signed=True), dict(method='taylor', reduction='mean+2std', signed=True))):
        for n, s in collect(c, model, params, data, ce).items():
            assert s.shape == params[n].shape
            close(s, attribute(model, n[:-7], data, ce, **kw).view(-1, *[1]*(s.ndim - 1)).expand_as(s), 1e-6)

@pytest.mark.parametrize('context', ['local', 'global'])
def test_sparsifier(context):
    model, data = net(6), (image, classes(5, 3))
    found = {n: attribute(model, n, data, ce) for n in ('0', '4')}
    Sparsifier(model, 'filter', context, 'shapley', data=data, loss=ce).sparsify_model(50)
    kept = {n: model.get_submodule(n).weight.detach().flatten(1).any(1) for n in found}
    for n, v in found.items():
        if context == 'local': assert set(v.argsort()[:len(v)//2].tolist()) == set((~kept[n]).nonzero().flatten().tolist())
        if not kept[n].all(): assert v[~kept[n]].max() <= v[kept[n]].min() # in global, layers with different sizes of units

def test_rows_of_linear_layers():
    model = seeded(mlp)
    v = attribute(model, '0', D, ce)
    Sparsifier(model, 'row', 'local', 'shapley', nn.Linear, data=D, loss=ce).sparsify_layer('0', 50)
    assert set((model[0].weight == 0).all(1).nonzero().flatten().tolist()) == set(v.argsort()[:2].tolist())

def test_pruner():
    model, data = net(6).eval(), (image, classes(5, 3))
    v = attribute(model, '0', data, ce)
    best, w = v.argsort(descending=True)[:3].sort().values, model[0].weight.detach().clone()
    Pruner(model, image, 'shapley', data=data, loss=ce).prune_model({'0': 50})
    assert torch.equal(model[0].weight, w[best]) and model[4].in_channels == 3

def test_pruner_leaves_out_what_has_no_units():
    model = seeded(Residual).eval()
    Pruner(model, image, 'shapley', data=(image, classes(5, 3)), loss=ce).prune_model(50)
    assert model.a.out_channels == 2 and torch.isfinite(model(image)).all()

def test_criteria_mistakes():
    for kw, match in ((dict(method='shap'), 'shapley'), (dict(reduction='none'), 'one value per unit'), (dict(return_se=True), 'one value per unit')):
        with pytest.raises(ValueError, match=match): attribution_criteria(**kw)
    with pytest.raises(ValueError, match='pass data='): Sparsifier(net(6), 'filter', 'local', 'shapley').sparsify_model(50)
    model = seeded(Unused)
    with pytest.raises(ValueError, match='aside.weight: the batches never reach'): Sparsifier(model, 'row', 'local', 'shapley', nn.Linear, data=D, loss=ce).sparsify_model(50)
