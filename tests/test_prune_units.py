"""The units found in small modules, beside units written down by hand."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai_lib.prune.graph import trace

one = lambda n, at=0: [[at + i] for i in range(n)] # a slice per unit
run = lambda n, k, at=0: [[at + k*i + j for j in range(k)] for i in range(n)] # k neighbours per unit
far = lambda n, k, step=None, at=0: [[at + i + (step or n)*j for j in range(k)] for i in range(n)] # k slices per unit, n (or step) apart

class Net(nn.Module): # modules and what they do
    def __init__(self, forward, **parts):
        super().__init__()
        self.does = forward
        for k, v in parts.items(): setattr(self, k, v)
    def forward(self, x): return self.does(self, x)

def first_name(model): # tied tensors go by the first of their names
    names = {}
    for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]: names.setdefault(id(t), n)
    return lambda n: names[id(dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])[n])]

def units_of(members): # every unit as what it holds; the order of units means nothing
    n = {len(i) for i in members.values()}
    assert len(n) == 1
    return frozenset(frozenset((name, axis, tuple(sorted(int(v) for v in idx[u]))) for (name, axis), idx in members.items()) for u in range(n.pop()))

def check(model, x, *want):
    "The groups of `model` are those of `want`: dicts of 'name axis' to indices per unit"
    name = first_name(model)
    graph = trace(model.eval(), x)
    for g in graph.groups: assert all(idx.shape[0] == g.n for _, _, idx in g.members)
    got = [units_of({(name(n), a): np.asarray(i) for n, a, i in g.members}) for g in graph.groups]
    expected = [units_of({(name(k.split()[0]), int(k.split()[1])): v for k, v in w.items()}) for w in want]
    key = lambda g: sorted(map(sorted, g))
    assert sorted(map(key, got)) == sorted(map(key, expected))

def bn(name, idx, stats=True): return {f'{name}.{k} 0': idx for k in ('weight', 'bias') + (('running_mean', 'running_var') if stats else ())}
PIC, SEQ = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_convolutions_in_a_row():
    check(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1, bias=False), nn.Conv2d(5, 2, 1)), PIC,
        {'0.weight 0': one(3), '0.bias 0': one(3), **bn('1', one(3)), '3.weight 1': one(3)}, {'3.weight 0': one(5), '4.weight 1': one(5)})

def test_residual_partners():
    m = Net(lambda s, x: s.c(F.relu((y := s.a(x)) + s.n(s.b(y)))), a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 2, 1))
    check(m, PIC, {'a.weight 0': one(3), 'a.bias 0': one(3), 'b.weight 0': one(3), 'b.weight 1': one(3), 'b.bias 0': one(3), **bn('n', one(3)), 'c.weight 1': one(3)})

def test_a_residual_of_the_input_is_pinned():
    check(Net(lambda s, x: s.c(x + s.b(x)), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(2, 2, 1)), PIC)

def test_concat_offsets():
    m = Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(2, 2, 1, bias=False), c=nn.Conv2d(5, 2, 1))
    check(m, PIC, {'a.weight 0': one(3), 'a.bias 0': one(3), 'c.weight 1': one(3)}, {'b.weight 0': one(2), 'c.weight 1': one(2, 3)})

def test_concat_with_itself():
    m = Net(lambda s, x: s.c(torch.cat([(y := s.a(x)), y], 1)), a=nn.Conv2d(2, 3, 1), c=nn.Conv2d(6, 2, 1))
    check(m, PIC, {'a.weight 0': one(3), 'a.bias 0': one(3), 'c.weight 1': far(3, 2)})

def test_equal_parts_lose_the_same():
    m = Net(lambda s, x: s.c(torch.mul(*s.a(x).chunk(2, 1))), a=nn.Conv2d(2, 6, 1), c=nn.Conv2d(3, 2, 1))
    check(m, PIC, {'a.weight 0': far(3, 2), 'a.bias 0': far(3, 2), 'c.weight 1': one(3)})

def test_unequal_parts_are_apart():
    def forward(s, x):
        p, q = s.a(x).split([2, 3], 1)
        return s.b(p) + s.c(q)
    m = Net(forward, a=nn.Conv2d(2, 5, 1), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(3, 2, 1))
    check(m, PIC, {'a.weight 0': one(2), 'a.bias 0': one(2), 'b.weight 1': one(2)}, {'a.weight 0': one(3, 2), 'a.bias 0': one(3, 2), 'c.weight 1': one(3)})

@pytest.mark.parametrize('k', [1, 2, 4])
def test_depthwise(k): # the channels out of a channel die with it
    m = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3*k, 3, groups=3), nn.BatchNorm2d(3*k), nn.Conv2d(3*k, 2, 1))
    check(m, PIC, {'0.weight 0': one(3), '0.bias 0': one(3), '1.weight 0': run(3, k), '1.bias 0': run(3, k), **bn('2', run(3, k)), '3.weight 1': run(3, k)})

def test_grouped_convolution(): # the same places in each of 2 groups: 3 in, 4 out
    m = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.Conv2d(8, 2, 1))
    check(m, PIC, {'0.weight 0': far(3, 2), '0.bias 0': far(3, 2), '1.weight 1': one(3)}, {'1.weight 0': far(4, 2), '2.weight 1': far(4, 2)})

def test_transposed_convolution():
    check(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 5, 2), nn.Conv2d(5, 2, 1)), PIC,
        {'0.weight 0': one(3), '0.bias 0': one(3), '1.weight 0': one(3)}, {'1.weight 1': one(5), '1.bias 0': one(5), '2.weight 1': one(5)})

def test_grouped_transposed_convolution():
    check(nn.Sequential(nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.Conv2d(8, 2, 1)), PIC,
        {'0.weight 0': far(3, 2), '0.bias 0': far(3, 2), '1.weight 0': far(3, 2)}, {'1.weight 1': one(4), '1.bias 0': far(4, 2), '2.weight 1': far(4, 2)})

@pytest.mark.parametrize('k', [1, 2])
def test_depthwise_transposed_convolution(k):
    check(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4*k, 2, groups=4), nn.Conv2d(4*k, 2, 1)), PIC,
        {'0.weight 0': one(4), '0.bias 0': one(4), '1.weight 0': one(4), '1.bias 0': run(4, k), '2.weight 1': run(4, k)})

def test_squeeze_excite():
    m = Net(lambda s, x: s.c((y := s.a(x))*s.e(F.relu(s.r(y.mean((2, 3), keepdim=True)))).sigmoid()), a=nn.Conv2d(2, 4, 1), r=nn.Conv2d(4, 3, 1), e=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 2, 1))
    check(m, PIC, {'a.weight 0': one(4), 'a.bias 0': one(4), 'r.weight 1': one(4), 'e.weight 0': one(4), 'e.bias 0': one(4), 'c.weight 1': one(4)},
        {'r.weight 0': one(3), 'r.bias 0': one(3), 'e.weight 1': one(3)})

def test_flatten_into_linear(): # 16 pixels of each channel
    check(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(48, 2)), PIC, {'0.weight 0': one(3), '0.bias 0': one(3), '2.weight 1': run(3, 16)})

def test_groups_of_a_norm_go_whole():
    check(nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)), PIC, {'0.weight 0': run(3, 2), '0.bias 0': run(3, 2), **bn('1', run(3, 2), False), '2.weight 1': run(3, 2)})

def test_what_a_norm_averages_over_is_pinned():
    for norm in (nn.LayerNorm(5), nn.GroupNorm(1, 5)): check(nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 2)), torch.randn(3, 4))

def test_pixel_shuffle(): # 4 neighbours become a channel
    check(nn.Sequential(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1)), PIC, {'0.weight 0': run(3, 4), '0.bias 0': run(3, 4), '2.weight 1': one(3)})

def test_channel_shuffle(): # of 2 groups of 3: the i-th of both go to places 2i and 2i + 1
    m = Net(lambda s, x: s.b(s.a(x).view(len(x), 2, 3, 4, 4).transpose(1, 2).reshape(len(x), 6, 4, 4)), a=nn.Conv2d(2, 6, 1), b=nn.Conv2d(6, 2, 1))
    check(m, PIC, {'a.weight 0': far(3, 2), 'a.bias 0': far(3, 2), 'b.weight 1': run(3, 2)})

def test_gates():
    check(nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 2)), SEQ, {'0.weight 0': far(3, 2), '0.bias 0': far(3, 2), '2.weight 1': one(3)})
    m = Net(lambda s, x: s.d(F.silu(s.g(x))*s.u(x)), g=nn.Linear(4, 3), u=nn.Linear(4, 3, bias=False), d=nn.Linear(3, 2))
    check(m, SEQ, {'g.weight 0': one(3), 'g.bias 0': one(3), 'u.weight 0': one(3), 'd.weight 1': one(3)})

def attention(s, x):
    B, N, _ = x.shape
    q, k, v = s.qkv(x).reshape(B, N, 3, s.heads, s.d).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v) if s.sdpa else (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return s.out(y.transpose(1, 2).reshape(B, N, -1))

@pytest.mark.parametrize('sdpa', [False, True])
def test_whole_heads(sdpa): # 2 heads of 3: rows of q at 0, of k at 6, of v at 12
    m = Net(attention, qkv=nn.Linear(4, 18), out=nn.Linear(6, 2), heads=2, d=3, sdpa=sdpa)
    rows = [[6*j + 3*h + i for j in range(3) for i in range(3)] for h in range(2)]
    check(m, SEQ, {'qkv.weight 0': rows, 'qkv.bias 0': rows, 'out.weight 1': run(2, 3)})

def grouped(s, x):
    B, N, _ = x.shape
    q, k, v = (m(x).view(B, N, -1, 2).transpose(1, 2) for m in (s.q, s.k, s.v))
    k, v = (t.repeat_interleave(s.rep, 1) if s.how == 'repeat' else t[:, :, None].expand(B, s.kv, s.rep, N, 2).reshape(B, s.kv*s.rep, N, 2) for t in (k, v))
    return s.out(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(B, N, -1))

@pytest.mark.parametrize('how', ['repeat', 'expand'])
def test_query_heads_with_their_key(how): # 3 key heads of 2, each for 2 query heads
    m = Net(grouped, q=nn.Linear(4, 12), k=nn.Linear(4, 6), v=nn.Linear(4, 6, bias=False), out=nn.Linear(12, 2), kv=3, rep=2, how=how)
    check(m, SEQ, {'q.weight 0': run(3, 4), 'q.bias 0': run(3, 4), 'k.weight 0': run(3, 2), 'k.bias 0': run(3, 2), 'v.weight 0': run(3, 2), 'out.weight 1': run(3, 4)})

def test_embeddings(): # with positions, and a head that is tied: words are outputs, and stay
    m = Net(lambda s, x: s.head(s.emb(x) + s.pos), emb=nn.Embedding(7, 3), pos=nn.Parameter(torch.randn(5, 3)), head=nn.Linear(3, 7, bias=False))
    check(m, torch.arange(5)[None], {'emb.weight 1': one(3), 'pos 1': one(3), 'head.weight 1': one(3)})
    m.head.weight = m.emb.weight
    check(m, torch.arange(5)[None], {'emb.weight 1': one(3), 'pos 1': one(3)})

def test_a_module_used_twice():
    m = Net(lambda s, x: s.c(s.b(F.relu(s.b(F.relu(s.a(x)))))), a=nn.Linear(4, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    check(m, SEQ, {'a.weight 0': one(3), 'a.bias 0': one(3), 'b.weight 0': one(3), 'b.weight 1': one(3), 'b.bias 0': one(3), 'c.weight 1': one(3)})

def test_tied_layers(): # one weight, two biases
    m = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    m[2].weight = m[1].weight
    check(m, SEQ, {'0.weight 0': one(3), '0.bias 0': one(3), '1.weight 0': one(3), '1.weight 1': one(3), '1.bias 0': one(3), '2.bias 0': one(3), '3.weight 1': one(3)})

@pytest.mark.parametrize('kind,k', [('LSTM', 4), ('GRU', 3), ('RNN', 1)])
def test_gates_of_recurrent_layers(kind, k): # the rows of all gates, and the state that comes back
    m = Net(lambda s, x: s.out(s.rnn(x)[0]), rnn=getattr(nn, kind)(4, 3, batch_first=True), out=nn.Linear(3, 2))
    rows = far(3, k)
    check(m, SEQ, {'rnn.weight_ih_l0 0': rows, 'rnn.weight_hh_l0 0': rows, 'rnn.bias_ih_l0 0': rows, 'rnn.bias_hh_l0 0': rows, 'rnn.weight_hh_l0 1': one(3), 'out.weight 1': one(3)})

def test_layer_scale_and_bare_parameters():
    m = Net(lambda s, x: s.c((y := F.linear(x, s.w)) + s.gamma*s.b(y)), w=nn.Parameter(torch.randn(3, 4)), gamma=nn.Parameter(torch.ones(3)), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    check(m, SEQ, {'w 0': one(3), 'gamma 0': one(3), 'b.weight 0': one(3), 'b.weight 1': one(3), 'b.bias 0': one(3), 'c.weight 1': one(3)})

def test_einsum(): # b n i, h i d -> b n h d, summed over heads and their places afterwards
    m = Net(lambda s, x: torch.einsum('bnh,oh->bno', torch.einsum('bni,hi->bnh', x, s.w), s.v), w=nn.Parameter(torch.randn(3, 4)), v=nn.Parameter(torch.randn(2, 3)))
    check(m, SEQ, {'w 0': one(3), 'v 1': one(3)})

def test_weight_norm():
    m = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))
    w = '0.parametrizations.weight.original'
    check(m, SEQ, {f'{w}0 0': one(3), f'{w}1 0': one(3), '0.bias 0': one(3), '2.weight 1': one(3)})

def test_another_head_in_training():
    m = Net(lambda s, x: (s.b(y := s.a(x)), s.d(s.c(y))) if s.training else s.b(y := s.a(x)), a=nn.Linear(4, 3), b=nn.Linear(3, 2), c=nn.Linear(3, 5), d=nn.Linear(5, 2))
    check(m, SEQ, {'a.weight 0': one(3), 'a.bias 0': one(3), 'b.weight 1': one(3), 'c.weight 1': one(3)}, {'c.weight 0': one(5), 'c.bias 0': one(5), 'd.weight 1': one(5)})
