"""With exact=False also the widths that something averages over go: what is left runs and trains, but computes something else."""
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai_lib.prune.plan import load_pruned, save_pruned
from fasterai_lib.prune.pruner import Pruner

class Scaled(nn.Module): # something without a size of its own, and a weight
    def __init__(self, n, f): super().__init__(); self.weight, self.f = nn.Parameter(torch.ones(n)), f
    def forward(self, x): return self.f(x)*self.weight

def percent(x): # integers from the extremes, as IBERT's
    low, high = x.min(), x.max()
    step = (high - low)/255
    return torch.round((x - low)/step)*step + low

NORMS = dict(
    layer_norm=nn.LayerNorm, group_norm=lambda n: nn.Sequential(nn.Flatten(0, 1), nn.GroupNorm(1, n), nn.Unflatten(0, (2, 5))), no_weight=lambda n: nn.RMSNorm(n, elementwise_affine=False),
    constant=lambda n: Scaled(n, lambda x: x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    var=lambda n: Scaled(n, lambda x: (x - x.mean(-1, keepdim=True))/(x.var(-1, keepdim=True) + 1e-5).sqrt()),
    std=lambda n: Scaled(n, lambda x: (x - x.mean(-1, keepdim=True))/(x.std(-1, keepdim=True) + 1e-5)),
    var_mean=lambda n: Scaled(n, lambda x: (lambda v, m: (x - m)*torch.rsqrt(v + 1e-5))(*torch.var_mean(x, -1, keepdim=True))),
    peak=lambda n: Scaled(n, lambda x: x/(x.abs().amax(-1, keepdim=True) + 1e-5)), percent=lambda n: Scaled(n, percent), logsumexp=lambda n: Scaled(n, lambda x: x - x.logsumexp(-1, keepdim=True)))

class Block(nn.Module):
    def __init__(self, n, norm): super().__init__(); self.norm, self.up, self.down = norm(n), nn.Linear(n, 16), nn.Linear(16, n)
    def forward(self, x): return x + self.down(F.gelu(self.up(self.norm(x))))

def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(8, norm), Block(8, norm), norm(8), nn.Linear(8, 3))

@pytest.mark.parametrize('check', [True, False])
@pytest.mark.parametrize('norm', NORMS)
def test_the_residual_width_goes(norm, check, tmp_path):
    model, x = net(NORMS[norm]), torch.randn(2, 5, 4)
    exact = copy.deepcopy(model)
    Pruner(exact, x).prune_model(50)
    assert exact[0].out_features == 8 and exact[1].up.out_features == 8 # inner widths only
    Pruner(model, x, exact=False, check=check).prune_model(50)
    assert {tuple(p.shape) for n, p in model.named_parameters() if n.endswith('up.weight')} == {(8, 4)} and model[0].out_features == model[4].in_features == 4
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.shape == p.shape for p in model.parameters())
    save_pruned(model, tmp_path/'m.safetensors')
    assert torch.equal(load_pruned(net(NORMS[norm]), tmp_path/'m.safetensors')(x), model(x))

@pytest.mark.parametrize('norm', [n for n in NORMS if n != 'constant'])
def test_exactly_nothing_goes_and_the_error_says_what_would_help(norm):
    model = nn.Sequential(nn.Linear(4, 8), NORMS[norm](8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match='With exact=False these may go too'): Pruner(model, torch.randn(2, 5, 4)).plan(50)
    assert Pruner(model, torch.randn(2, 5, 4), exact=False).plan(50).cuts['0.weight'][0].numel() == 4

@pytest.mark.parametrize('f', [lambda x: x.softmax(-1), lambda x: x.sort(-1).values, lambda x: x*x.argmax(-1, keepdim=True), lambda x: x - x.max(-1, keepdim=True).values, lambda x: x.cumsum(-1)])
def test_what_depends_on_the_position_stays(f):
    model = nn.Sequential(nn.Linear(4, 8), Scaled(8, f), nn.Linear(8, 3))
    with pytest.raises(ValueError, match='runs over it|depends on how many'): Pruner(model, torch.randn(2, 5, 4), exact=False).plan(50)

def test_groups_and_channels_first():
    class First(nn.LayerNorm):
        def forward(self, x): return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), First(8), nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1))
    Pruner(model, x := torch.randn(2, 3, 9, 9), exact=False).prune_model(50)
    assert model[0].out_channels == 4 and model[1].normalized_shape == (4,) and model[2].out_channels == 8
    model(x).sum().backward()

@pytest.mark.parametrize('norm', [nn.LayerNorm, nn.RMSNorm])
def test_a_layer_whose_result_nobody_reads(norm): # as the poolers of encoders
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.a, self.norm, self.pooler, self.out = nn.Linear(4, 8), norm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        def forward(self, x): x = self.norm(self.a(x)); torch.tanh(self.pooler(x[:, 0])); return self.out(x)
    model = Model()
    Pruner(model, x := torch.randn(2, 5, 4), exact=norm is nn.RMSNorm).prune_model({'a': 50})
    assert model.a.out_features == model.pooler.in_features == 4 and model(x).shape == (2, 5, 3)
