"""Parameters, units, BatchNorms, blocks and layers taken out by hand: beside oracles, and bad inputs leave the model as it was."""
import copy
import re

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fasterai_lib.prune.blocks import remove_blocks, remove_layer
from fasterai_lib.prune.surgery import fold_batchnorm, prune_parameter, prune_units


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)

def snapshot(model):
    tensors = {n: (id(t), t.dtype, tuple(t.shape), t.stride(), t.detach().contiguous().view(-1).numpy().tobytes(), None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes()))
               for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]}
    modules = [(n, id(m), type(m), m.training, sorted(vars(m)), {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, bool))}) for n, m in model.named_modules(remove_duplicate=False)]
    return tensors, modules, torch.get_rng_state().numpy().tobytes()

def refused(model, f, error, match):
    before = snapshot(model)
    with pytest.raises(error, match=match): f()
    assert snapshot(model) == before

def lively(model): # BatchNorms and biases that do something
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None: nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, .3, 3)
            if m.affine: nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return model

def value(model, x): # of the eval mode, in float64
    m = copy.deepcopy(model).double().eval()
    with torch.no_grad(): return m(x.double())

@torch.no_grad()
def same(a, b, tol=1e-10): assert a.shape == b.shape and float((a - b).abs().max()) <= tol*float(a.abs().max()), float((a - b).abs().max())

# --- one parameter

@pytest.mark.parametrize('make, name, axis, attrs', [
    (lambda: nn.Linear(5, 7), 'weight', 0, dict(out_features=5, in_features=5)), (lambda: nn.Linear(5, 7), 'weight', -1, dict(out_features=7, in_features=3)),
    (lambda: nn.Conv2d(6, 4, 3), 'weight', 1, dict(out_channels=4, in_channels=4)), (lambda: nn.ConvTranspose1d(6, 4, 3), 'weight', 1, dict(out_channels=2, in_channels=6)),
    (lambda: nn.Conv1d(6, 4, 3), 'bias', 0, dict(out_channels=4)), (lambda: nn.BatchNorm2d(6), 'weight', 0, dict(num_features=4)),
    (lambda: nn.BatchNorm2d(6, affine=False), 'running_var', 0, dict(num_features=4)), (lambda: nn.Embedding(9, 6), 'weight', 1, dict(embedding_dim=4, num_embeddings=9)),
    (lambda: nn.LayerNorm(6), 'weight', 0, dict(normalized_shape=(4,))), (lambda: nn.Sequential(nn.Linear(5, 7)), '0.weight', 0, {})])
def test_prune_parameter(make, name, axis, attrs):
    m = make()
    have = dict([*m.named_parameters(), *m.named_buffers()])
    t = have[name]
    if t.requires_grad: t.grad = torch.randn_like(t)
    want = np.delete(t.detach().numpy().copy(), [0, 2], axis)
    grad = None if t.grad is None else np.delete(t.grad.numpy().copy(), [0, 2], axis)
    prune_parameter(m, name, torch.tensor([2, 0]), axis)
    assert dict([*m.named_parameters(), *m.named_buffers()])[name] is t
    np.testing.assert_array_equal(t.detach().numpy(), want)
    assert grad is None or np.array_equal(t.grad.numpy(), grad)
    for k, v in attrs.items(): assert getattr(m, k) == v

def test_prune_parameter_with_optimizer():
    m = nn.Linear(4, 6)
    opt = optim.Adam(m.parameters())
    m(torch.randn(3, 4)).sum().backward(); opt.step()
    want = np.delete(opt.state[m.weight]['exp_avg'].numpy(), [1], 0)
    prune_parameter(m, 'weight', [1], 0, opt); prune_parameter(m, 'bias', [1], 0, opt)
    np.testing.assert_array_equal(opt.state[m.weight]['exp_avg'].numpy(), want)
    opt.zero_grad(); m(torch.randn(3, 4)).sum().backward(); opt.step()
    assert m.weight.shape == (5, 4)

def test_prune_parameter_of_tied_weights():
    m = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)])
    m[1].weight = m[0].weight
    prune_parameter(m, '1.weight', [5])
    assert m[0].weight is m[1].weight and m[0].out_features == m[1].out_features == 5

@pytest.mark.parametrize('args, error, match', [
    (('wieght', [0]), ValueError, "did you mean 'weight'"), (('weight', [0], 2), ValueError, 'no axis 2'), (('weight', [0], -3), ValueError, 'no axis -3'), (('weight', [0], 1.), TypeError, 'whole number'),
    (('weight', [6]), ValueError, 'index 6.*0 to 5'), (('weight', [-1]), ValueError, 'index -1'), (('weight', [1, 1]), ValueError, '1 is given twice'), (('weight', range(6)), ValueError, 'at least one'),
    (('weight', 3), TypeError, 'list of whole numbers'), (('weight', [True]), TypeError, 'whole numbers'), (('weight', [.5]), TypeError, 'whole numbers'), (('weight', '01'), TypeError, 'list of'),
    (('weight', [0], 0, optim.SGD([nn.Parameter(torch.ones(2))])), ValueError, 'another model'), (('weight', [0], 0, 'adam'), TypeError, 'opt must be')])
def test_prune_parameter_refuses(args, error, match):
    m = nn.Linear(4, 6)
    m.weight.grad = torch.ones_like(m.weight)
    refused(m, lambda: prune_parameter(m, *args), error, match)

def test_prune_parameter_of_nothing():
    m = nn.Linear(4, 6)
    before = snapshot(m)
    prune_parameter(m, 'weight', [])
    assert snapshot(m) == before
    with pytest.raises(TypeError): prune_parameter('m', 'weight', [0])

# --- units

class Residual(nn.Module):
    def __init__(self, n, h, relu=False, inplace=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(n, h, 3, padding=1, bias=False), nn.BatchNorm2d(h), nn.Conv2d(h, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.relu, self.inplace = relu, inplace
    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)))
        y += x
        return F.relu(y, inplace=self.inplace) if self.relu else y

def net(relu=False, inplace=False):
    torch.manual_seed(1)
    return lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Residual(8, 6, relu, inplace), Residual(8, 6, relu, inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(8, 5)))

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))

def zero(model, **slices): # a copy without these outputs, by hand
    m = copy.deepcopy(model)
    with torch.no_grad():
        for n, idx in slices.items(): m.get_parameter(n.replace('__', '.').lstrip('_'))[idx] = 0
    return m

@pytest.mark.parametrize('by', ['name', 'module'])
def test_units_of_one_block(by):
    m = net()
    want = value(zero(m, _2__bn1__weight=[0, 5], _2__bn1__bias=[0, 5]), X)
    ids = {n: id(p) for n, p in m.named_parameters()}
    plan = prune_units(m, X, '2.conv1' if by == 'name' else m[2].conv1, [5, 0])
    same(value(m, X), want)
    assert m[2].conv1.weight.shape[0] == m[2].bn1.num_features == m[2].conv2.in_channels == 4 and m[3].conv1.out_channels == 6
    assert {k for k, _ in plan.removed} == {f'2.{n}' for n in ('conv1.weight', 'bn1.weight', 'bn1.bias', 'bn1.running_mean', 'bn1.running_var', 'conv2.weight')}
    assert ids == {n: id(p) for n, p in m.named_parameters()}

def test_units_of_residual_partners_and_dropout():
    m, other = net().train(), net()
    dead = dict(_0__weight=[1, 2], _0__bias=[1, 2], **{f'_{b}__bn2__{k}': [1, 2] for b in (2, 3) for k in ('weight', 'bias')})
    want = value(zero(m, **dead), X)
    plan = prune_units(m, X, '0', [1, 2], dropout=True)
    same(value(m, X), want)
    assert m.training and m[7].in_features == m[3].bn2.num_features == 6 and m[6].p == .5*6/8
    plan.remove(other) # its copies too
    assert other[6].p == .5*6/8
    same(value(other, X), want)
    plain = net()
    prune_units(plain, X, '0', [1, 2])
    assert plain[6].p == .5

def test_dropout_only_where_channels_go():
    m = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.4), nn.ReLU(), nn.Linear(8, 6), nn.Dropout(.4), nn.Linear(6, 3), nn.Dropout(.4))
    prune_units(m, torch.randn(2, 4), '0', [0, 1], dropout=True)
    assert (m[1].p, m[4].p, m[6].p) == (pytest.approx(.3), .4, .4)

def test_units_with_optimizer():
    m = net().train()
    opt = optim.SGD(m.parameters(), lr=.1, momentum=.9)
    m(X).sum().backward(); opt.step()
    buf, grad = (np.delete(t.numpy(), [3], 0) for t in (opt.state[m[2].conv1.weight]['momentum_buffer'], m[2].conv1.weight.grad))
    prune_units(m, X, '2.conv1', [3], opt)
    np.testing.assert_array_equal(opt.state[m[2].conv1.weight]['momentum_buffer'].numpy(), buf)
    np.testing.assert_array_equal(m[2].conv1.weight.grad.numpy(), grad)
    m(X).sum().backward(); opt.step()

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    def forward(self, x):
        y = self.embed(x)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])

def test_whole_heads_only():
    m, x = Attention(), torch.randn(2, 3, 4)
    together = [*range(4), *range(8, 12), *range(16, 20)]
    refused(m, lambda: prune_units(m, x, 'attention', [0, 1]), ValueError, re.escape(f'outputs {together}') + '.*got \\[0, 1\\]')
    cut = copy.deepcopy(m)
    with torch.no_grad(): cut.attention.out_proj.weight[:, :4] = 0
    want = value(cut, x)
    prune_units(m, x, 'attention', together)
    same(value(m, x), want)
    assert m.attention.in_proj_weight.shape == (12, 8)

def test_depthwise_and_transposed():
    m = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    first = copy.deepcopy(m)
    with torch.no_grad(): first[2].weight[4] = 0
    prune_units(m, X, '1', [4])
    same(value(m, X), value(first, X))
    assert m[1].groups == m[0].out_channels == m[2].in_channels == 5
    second = copy.deepcopy(m)
    with torch.no_grad(): second[4].weight[:, [0, 3]] = 0
    prune_units(m, X, m[2], [0, 3])
    same(value(m, X), value(second, X))
    assert m[2].out_channels == m[4].in_channels == 2

@pytest.mark.parametrize('layer, indices, kw, error, match', [
    ('7', [0], {}, ValueError, 'output of the model'), ('2', [0], {}, ValueError, 'name one of them'), ('1', [0], {}, ValueError, 'without weights'), ('2.conv3', [0], {}, ValueError, 'did you mean'),
    ('0', [8], {}, ValueError, 'allowed are 0 to 7'), ('0', [0, 0], {}, ValueError, 'twice'), ('0', range(8), {}, ValueError, 'at least one'), ('0', 1, {}, TypeError, 'list of whole numbers'),
    (nn.Linear(2, 2), [0], {}, ValueError, 'no module of'), ('0', [1], dict(opt=optim.SGD([nn.Parameter(torch.ones(3))])), ValueError, 'another model')])
def test_units_refused(layer, indices, kw, error, match):
    m = net()
    for p in m.parameters(): p.grad = torch.ones_like(p)
    refused(m, lambda: prune_units(m, X, layer, indices, **kw), error, match)

def test_units_refused_by_a_norm_name_the_place():
    m = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    refused(m, lambda: prune_units(m, X[0, 0, :2, :4], '0', [1]), ValueError, 'a norm averages over it.*native_layer_norm in 1')

# --- folding

CASES = {
    'conv1d': (lambda **k: (nn.Conv1d(4, 6, 3, padding=1, **k), nn.BatchNorm1d), (2, 4, 7)), 'conv2d': (lambda **k: (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, **k), nn.BatchNorm2d), (2, 4, 7, 7)),
    'conv3d': (lambda **k: (nn.Conv3d(4, 6, 2, **k), nn.BatchNorm3d), (1, 4, 3, 3, 3)), 'linear': (lambda **k: (nn.Linear(4, 6, **k), nn.BatchNorm1d), (3, 4)),
    'up1d': (lambda **k: (nn.ConvTranspose1d(4, 6, 3, **k), nn.BatchNorm1d), (2, 4, 7)), 'up2d': (lambda **k: (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, **k), nn.BatchNorm2d), (2, 4, 5, 5))}

@pytest.mark.parametrize('kind', CASES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
def test_fold_after(kind, bias, affine):
    make, shape = CASES[kind]
    layer, norm = make(bias=bias)
    m = lively(nn.Sequential(layer, norm(6, affine=affine), nn.Tanh())).double().eval()
    x, other = torch.randn(shape).double(), torch.randn(shape).double()
    want, weight = value(m, other), m[0].weight
    m[0].weight.grad = torch.ones_like(m[0].weight)
    assert fold_batchnorm(m, x) == [('0', '1')]
    assert type(m[1]) is nn.Identity and m[0].weight is weight and m[0].bias.dtype == torch.float64 and weight.grad is None
    same(value(m, other), want)

@pytest.mark.parametrize('make, shape', [(lambda: nn.Linear(6, 3, bias=False), (4, 6)), (lambda: nn.Conv2d(6, 4, 2, groups=2, stride=2), (2, 6, 5, 5)), (lambda: nn.Conv1d(6, 4, 3), (2, 6, 5))])
def test_fold_before(make, shape):
    layer = make()
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    m = lively(nn.Sequential(norm(6), layer)).double()
    x = torch.randn(shape).double()
    want = value(m, x)
    assert fold_batchnorm(m, x) == [('1', '0')]
    same(value(m, x), want)

def test_both_sides_of_one_layer():
    m = lively(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))).double()
    x = torch.randn(3, 4).double()
    want = value(m, x)
    assert fold_batchnorm(m, x) == [('1', '0'), ('1', '2')]
    same(value(m, x), want)

def test_fold_a_network_in_float32_and_train_mode():
    m = net().train()
    for p in m.parameters(): p.grad = torch.ones_like(p)
    want = value(m, X)
    assert fold_batchnorm(m, X) == [(f'{b}.conv{i}', f'{b}.bn{i}') for b in (2, 3) for i in (1, 2)]
    same(value(m, X), want, 1e-5)
    assert m.training and m[2].bn1.training and all(p.dtype == torch.float32 for p in m.parameters()) and m[0].weight.grad is not None
    before = snapshot(m)
    assert fold_batchnorm(m, X) == [] and snapshot(m) == before

class Odd(nn.Module): # none of these can be folded
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.bn = kind, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=kind != 'no statistics')
        if kind == 'tied': self.b.weight = self.a.weight
        if kind == 'normed': parametrizations.weight_norm(self.a)
        if kind == 'padded before': self.a = nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x):
        k = self.kind
        if k == 'padded before': return self.a(self.bn(x))
        y = self.a(x)
        if k == 'relu between': y = F.relu(y)
        z = self.bn(y)
        if k == 'used elsewhere': return z + y
        if k == 'an output': return z, y
        if k == 'called twice': return self.bn(self.a(z))
        if k == 'norm twice': return self.bn(self.b(z))
        if k == 'weight read': return z + self.a.weight.sum()
        if k == 'tied': return F.relu(z) + self.b(x)
        if k == 'norm read': return z*self.bn.weight.sum()
        return z

@pytest.mark.parametrize('kind', ['no statistics', 'tied', 'normed', 'padded before', 'relu between', 'used elsewhere', 'an output', 'called twice', 'norm twice', 'weight read', 'norm read'])
def test_not_folded(kind):
    m = lively(Odd(kind)).eval()
    x = torch.randn(2, 3, 5, 5)
    before = snapshot(m)
    assert fold_batchnorm(m, x) == []
    assert snapshot(m) == before

class Act(nn.BatchNorm2d): # as in timm: a norm with its activation
    def __init__(self, n): super().__init__(n); self.drop, self.act = nn.Identity(), nn.ReLU()
    def forward(self, x): return self.act(self.drop(super().forward(x)))

class Reads(nn.Module): # its source asks the norm for its size
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.rest = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), Act(4))
    def forward(self, x): return self.rest(self.bn(self.a(x)))/self.bn.num_features

def test_fold_leaves_what_fails():
    m, x = lively(Reads()), torch.randn(2, 3, 5, 5)
    want = value(m, x)
    assert fold_batchnorm(m, x) == [('rest.0', 'rest.1')]
    assert type(m.rest[1]) is nn.ReLU and type(m.bn) is nn.BatchNorm2d
    same(value(m, x), want, 1e-5)

def test_fold_refuses():
    m = net()
    refused(m, lambda: fold_batchnorm(m, None), ValueError, 'example_inputs')
    refused(m, lambda: fold_batchnorm(m, X[:, :2]), Exception, 'channels')
    with pytest.raises(TypeError): fold_batchnorm('model', X)

# --- blocks

def test_dead_block_of_a_norm():
    m = net()
    nn.init.zeros_(m[3].bn2.weight); nn.init.zeros_(m[3].bn2.bias)
    other = torch.randn(3, 3, 12, 12)
    want = value(m, other)
    assert remove_blocks(m, X) == ['3'] and type(m[3]) is nn.Identity and type(m[2]) is Residual
    assert torch.equal(value(m, other), want)
    refused(m, lambda: remove_blocks(m, X), ValueError, 'no branch ends in weights that are all zero')

@pytest.mark.parametrize('inplace', [True, False])
def test_relu_after_the_sum(inplace): # the first block's input comes from a ReLU
    m = net(relu=True, inplace=inplace)
    for b in (2, 3): nn.init.zeros_(m[b].bn2.weight); nn.init.zeros_(m[b].bn2.bias)
    want = value(m, -X)
    assert remove_blocks(m, X) == ['2', '3']
    assert torch.equal(value(m, -X), want)

def test_relu_after_the_sum_of_something_negative():
    m = net(relu=True)
    m[1] = nn.Tanh()
    for b in (2, 3): nn.init.zeros_(m[b].bn2.weight); nn.init.zeros_(m[b].bn2.bias)
    assert remove_blocks(m, X) == ['3'] # what comes out of block 2 is positive
    m = net(relu=True)
    m[1] = nn.Tanh()
    nn.init.zeros_(m[2].bn2.weight); nn.init.zeros_(m[2].bn2.bias)
    refused(m, lambda: remove_blocks(m, X.abs()), ValueError, '2: its branch is zero, but')

class PreNorm(nn.Module):
    def __init__(self, n, scale=False):
        super().__init__()
        self.n1, self.att, self.n2, self.up, self.down, self.drop = nn.LayerNorm(n), nn.MultiheadAttention(n, 2, batch_first=True), nn.LayerNorm(n), nn.Linear(n, 2*n), nn.Linear(2*n, n), nn.Dropout(.1)
        self.gamma = nn.Parameter(torch.zeros(n)) if scale else None
    def forward(self, x):
        y = self.n1(x)
        y = self.drop(self.att(y, y, y)[0])
        x = x + (y if self.gamma is None else self.gamma*y)
        y = self.drop(self.down(F.gelu(self.up(self.n2(x)))))
        return x + (y if self.gamma is None else self.gamma*y)

@pytest.mark.parametrize('scale', [True, False])
def test_dead_transformer_block(scale):
    m, x = nn.Sequential(nn.Linear(4, 8), PreNorm(8), PreNorm(8, scale), nn.Linear(8, 3)), torch.randn(2, 3, 4)
    if not scale:
        for l in (m[2].att.out_proj, m[2].down): nn.init.zeros_(l.weight); nn.init.zeros_(l.bias)
    want = value(m, 10*x)
    assert remove_blocks(m, x) == ['2']
    assert torch.equal(value(m, 10*x), want)

def test_half_dead_block_stays():
    m, x = nn.Sequential(nn.Linear(4, 8), PreNorm(8), nn.Linear(8, 3)), torch.randn(2, 3, 4)
    nn.init.zeros_(m[1].down.weight); nn.init.zeros_(m[1].down.bias)
    refused(m, lambda: remove_blocks(m, x), ValueError, '1: its branch is zero, but no module around it')

class Gate(nn.Module): # zero on some inputs only; `shift` is no residual branch
    def __init__(self): super().__init__(); self.conv, self.shift = nn.Conv2d(8, 8, 1, bias=False), nn.Parameter(torch.zeros(8, 1, 1))
    def forward(self, x): return x + F.relu(self.conv(x) - 1e6)

class Shift(Gate):
    def forward(self, x): return x + self.shift

@pytest.mark.parametrize('block', [Gate, Shift])
def test_zero_by_chance_is_not_dead(block):
    m = net()
    m[3] = block()
    refused(m, lambda: remove_blocks(m, X), ValueError, 'no branch ends in')

def test_a_bias_is_not_zero():
    m = net()
    nn.init.zeros_(m[3].conv2.weight) # its BatchNorm still adds something
    refused(m, lambda: remove_blocks(m, X), ValueError, 'no branch ends in')

class Peeks(nn.Module): # reads an attribute of its block
    def __init__(self): super().__init__(); self.first, self.block = nn.Conv2d(3, 8, 3), Residual(8, 4)
    def forward(self, x): return self.block(self.first(x))*self.block.conv1.out_channels

def test_block_that_is_needed():
    m = Peeks()
    nn.init.zeros_(m.block.bn2.weight)
    refused(m, lambda: remove_blocks(m, X), ValueError, 'block: AttributeError')

def test_min_norm():
    m = net()
    for p in (m[3].bn2.weight, m[3].bn2.bias): nn.init.constant_(p, 1e-4)
    refused(m, lambda: remove_blocks(m, X), ValueError, 'no branch')
    refused(m, lambda: remove_blocks(m, X, min_norm=1e-4), ValueError, 'no branch') # 8 of them: the norm is larger
    for bad in (-1, 'x', True, float('nan')): refused(m, lambda: remove_blocks(m, X, min_norm=bad), ValueError, 'min_norm')
    assert remove_blocks(m, X, min_norm=1e-3) == ['3']

# --- layers

def test_remove_layer():
    m = net().train()
    want = copy.deepcopy(m)
    want[2].bn1.forward = lambda x: x
    assert remove_layer(m, X, '2.bn1') is m and type(m[2].bn1) is nn.Identity and m[2].bn1.training
    same(m.eval()(X), want.eval()(X))
    remove_layer(m, X, m[3])
    assert type(m[3]) is nn.Identity

@pytest.mark.parametrize('make, name, match', [
    (net, '0', r'turns shape \(2, 3, 9, 9\) into \(2, 8, 7, 7\)'), (net, '2.bn', 'did you mean'), (net, '', 'the model itself'), (lambda: nn.ModuleDict(dict(a=net())), 'a', 'does not run|not implemented|missing'),
    (Peeks, 'block', 'AttributeError'), (Attention, 'attention', 'one tensor')])
def test_remove_layer_refuses(make, name, match):
    m = make()
    refused(m, lambda: remove_layer(m, X[0, :, :3, :4] if isinstance(m, Attention) else X, name), Exception, match)
