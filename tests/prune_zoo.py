"""Small architectures for the tests of removal. `must` of a block says which axes have units that can surely be removed, and how many slices a unit has there."""
import torch
from torch import nn
from torch.nn import functional as F

CONVS, BNS, UPS = [nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]

def conv(nd, i, o, k=3, **kw): return CONVS[nd-1](i, o, k, padding=k//2 if k % 2 else 0, **kw)
def must(n, **slices): # n units; slices per unit, or None where this is left open
    out = {}
    for k, s in slices.items():
        name, axis = k.rsplit('__', 1)
        out[name.replace('__', '.'), int(axis)] = (n, s)
    return out


class Block(nn.Module): # from c channels to c channels; `free`: these can be removed too
    free = True
    def __init__(self):
        super().__init__()
        self.must = {}

# --- pictures of nd dimensions

class Residual(Block):
    def __init__(self, nd, c, h, g=2, norm='batch', bias=True):
        super().__init__()
        self.a, self.b = conv(nd, c, h, bias=bias), conv(nd, h, c)
        self.norm = {'batch': BNS[nd-1](h), 'group': nn.GroupNorm(g, h), 'none': nn.Identity(), 'plain': BNS[nd-1](h, affine=False)}[norm]
        self.last = BNS[nd-1](c)
        n, s = (g, h//g) if norm == 'group' else (h, 1)
        self.must = must(n, a__weight__0=s, b__weight__1=s, **(dict(a__bias__0=s) if bias else {}))
        if norm in ('batch', 'group'): self.must |= must(n, norm__weight__0=s, norm__bias__0=s)
        if norm in ('batch', 'plain'): self.must |= must(n, norm__running_mean__0=1, norm__running_var__0=1)
    def forward(self, x): return F.relu(x + self.last(self.b(F.silu(self.norm(self.a(x))))))

class Inverted(Block): # depthwise, m channels out of each, squeeze-excite
    def __init__(self, nd, c, h, m=1, r=2):
        super().__init__()
        self.a, self.na = conv(nd, c, h, 1, bias=False), BNS[nd-1](h)
        self.d, self.nb = conv(nd, h, h*m, groups=h), BNS[nd-1](h*m)
        self.s1, self.s2, self.b = conv(nd, h*m, r, 1), conv(nd, r, h*m, 1), conv(nd, h*m, c, 1)
        self.must = must(h, a__weight__0=1, na__running_var__0=1, d__weight__0=m, d__bias__0=m, nb__weight__0=m, s1__weight__1=m, s2__weight__0=m, s2__bias__0=m, b__weight__1=m)
        self.must |= must(r, s1__weight__0=1, s1__bias__0=1, s2__weight__1=1)
    def forward(self, x):
        y = F.relu(self.nb(self.d(F.relu6(self.na(self.a(x))))))
        s = y.mean(tuple(range(2, y.ndim)), keepdim=True)
        return x + self.b(y*torch.sigmoid(self.s2(F.relu(self.s1(s)))))

class Grouped(Block):
    def __init__(self, nd, c, h, g=2, k=2):
        super().__init__()
        self.a, self.m, self.n, self.b = conv(nd, c, h, 1), conv(nd, h, h*k, groups=g), BNS[nd-1](h*k), conv(nd, h*k, c, 1)
        n = min(g, h//g)
        self.must = must(n, a__weight__0=None, m__weight__0=None, m__bias__0=None, n__weight__0=None, b__weight__1=None)
    def forward(self, x): return x + self.b(F.gelu(self.n(self.m(F.relu(self.a(x))))))

class Dense(Block):
    def __init__(self, nd, c, h):
        super().__init__()
        self.a, self.n, self.b = conv(nd, c, h), BNS[nd-1](c + h), conv(nd, c + h, c)
        self.must = must(h, a__weight__0=1, a__bias__0=1)
    def forward(self, x): return self.b(F.relu(self.n(torch.cat([x, self.a(x)], 1))))

class Split(Block): # parts of an axis, some of them used as they are
    def __init__(self, nd, c, sizes, how='split'):
        super().__init__()
        self.sizes, self.how, h = list(sizes), how, sum(sizes)
        self.a, self.p, self.b = conv(nd, c, h), conv(nd, sizes[1], sizes[1]), conv(nd, h, c, 1)
        same = len(set(sizes)) == 1
        for s in sizes[:1] if same else sizes: self.must |= must(s, a__weight__0=None, a__bias__0=None, b__weight__1=None)
        if same: self.must = must(sizes[0], a__weight__0=len(sizes), a__bias__0=len(sizes), b__weight__1=len(sizes), p__weight__0=1, p__weight__1=1)
    def forward(self, x):
        y = self.a(x)
        if self.how == 'chunk': ys = list(y.chunk(len(self.sizes), 1))
        elif self.how == 'slice': ys = [y[:, :self.sizes[0]], y[:, self.sizes[0]:self.sizes[0]+self.sizes[1]], y[:, self.sizes[0]+self.sizes[1]:]][:len(self.sizes)]
        else: ys = list(torch.split(y, self.sizes, 1))
        ys[1] = self.p(ys[1])
        return x + self.b(torch.cat(ys[::-1], 1).relu())

class Shuffle(Block):
    def __init__(self, nd, c, h, g=2):
        super().__init__()
        self.g, self.a, self.d, self.b = g, conv(nd, c, h), conv(nd, h, h, groups=h), conv(nd, h, c)
        self.must = must(min(g, h//g), a__weight__0=None, d__weight__0=None, b__weight__1=None)
    def forward(self, x):
        y = self.a(x)
        y = y.view(y.shape[0], self.g, y.shape[1]//self.g, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        return x + self.b(self.d(y))

class PixelShuffle(Block):
    def __init__(self, nd, c, h):
        super().__init__()
        self.a, self.b, self.u = nn.Conv2d(c, 4*h, 1), nn.Conv2d(h, 2*h, 2, 2), nn.Conv2d(2*h, c, 1)
        self.must = must(h, a__weight__0=4, a__bias__0=4, b__weight__1=1) | must(2*h, b__weight__0=1, u__weight__1=1)
    def forward(self, x): return x + self.u(self.b(F.pixel_shuffle(self.a(x), 2)))

class Up(Block): # transposed convolution, grouped or not
    def __init__(self, nd, c, h, g=1, k=2):
        super().__init__()
        self.a, self.t, self.n, self.b = conv(nd, c, h, 1), UPS[nd-1](h, h*k, 2, 2, groups=g), BNS[nd-1](h*k), CONVS[nd-1](h*k, c, 2, 2)
        if g == 1: self.must = must(h, a__weight__0=1, t__weight__0=1) | must(h*k, t__weight__1=1, t__bias__0=1, n__weight__0=1, b__weight__1=1)
        elif g == h: self.must = must(h, a__weight__0=1, t__weight__0=1, t__bias__0=k, b__weight__1=k)
        else: self.must = must(min(g, h//g), a__weight__0=None, t__weight__0=None, t__bias__0=None, b__weight__1=None)
    def forward(self, x): return x + self.b(F.relu(self.n(self.t(F.relu(self.a(x))))))

class Gated(Block):
    def __init__(self, nd, c, h):
        super().__init__()
        self.a, self.b = conv(nd, c, 2*h), conv(nd, h, c)
        self.must = must(h, a__weight__0=2, a__bias__0=2, b__weight__1=1)
    def forward(self, x): return x + self.b(F.glu(self.a(x), 1))

class NeXt(Block): # channels last, layer scale
    def __init__(self, nd, c, h, norm=True):
        super().__init__()
        self.d, self.n, self.a, self.b = conv(nd, c, c, groups=c), nn.LayerNorm(c) if norm else nn.Identity(), nn.Linear(c, h), nn.Linear(h, c)
        self.gamma, self.free = nn.Parameter(torch.ones(c)), not norm
        self.must = must(h, a__weight__0=1, a__bias__0=1, b__weight__1=1)
    def forward(self, x): return x + (self.gamma*self.b(F.gelu(self.a(self.n(self.d(x).movedim(1, -1)))))).movedim(-1, 1)

class Twice(Block): # a module used twice, and another with its weight
    def __init__(self, nd, c, h, tied=True):
        super().__init__()
        self.a, self.m, self.t, self.b = conv(nd, c, h), conv(nd, h, h), conv(nd, h, h), conv(nd, h, c)
        self.tied = tied
        if tied: self.t.weight = self.m.weight
        self.must = must(h, a__weight__0=1, m__weight__0=1, m__weight__1=1, m__bias__0=1, b__weight__1=1, **(dict(t__weight__0=1, t__weight__1=1, t__bias__0=1)))
    def forward(self, x): return x + self.b(self.t(F.silu(self.m(F.relu(self.m(F.relu(self.a(x))))))))

class WeightNorm(Block):
    def __init__(self, nd, c, h, old=False, both=False):
        super().__init__()
        wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        self.a, self.b = wrap(conv(nd, c, h)), conv(nd, h, c)
        if both: self.b = wrap(self.b) # its norm is over its inputs
        self.free = False
        g, v = ('a__weight_g__0', 'a__weight_v__0') if old else ('a__parametrizations__weight__original0__0', 'a__parametrizations__weight__original1__0')
        self.must = {} if both else must(h, b__weight__1=1, a__bias__0=1, **{g: 1, v: 1})
    def forward(self, x): return x + self.b(F.relu(self.a(x)))

class Bare(Block): # parameters of its own, and einsum
    def __init__(self, nd, c, h):
        super().__init__()
        self.nd, self.w, self.bias = nd, nn.Parameter(torch.empty(h, c, *[1]*nd)), nn.Parameter(torch.empty(h))
        self.v, self.u = nn.Parameter(torch.empty(2*h, h)), nn.Parameter(torch.empty(c, 2*h))
        self.must = must(h, w__0=1, bias__0=1, v__1=1) | must(2*h, v__0=1, u__1=1)
    def forward(self, x):
        y = [F.conv1d, F.conv2d, F.conv3d][self.nd-1](x, self.w, self.bias).relu()
        return x + torch.einsum('bh...,ch->bc...', torch.einsum('bc...,hc->bh...', y, self.v).tanh(), self.u)

class Picture(nn.Module):
    "A stem, blocks, a head on the pooled or the flattened picture, another head in training"
    def __init__(self, nd, c, makers, flatten=False, aux=0, norm=True):
        super().__init__()
        self.stem, self.norm = conv(nd, 3, c), BNS[nd-1](c) if norm else nn.Identity()
        self.blocks = nn.ModuleList(m(nd, c) for m in makers)
        self.flatten, k = flatten, 4**nd if flatten else 1
        self.head = nn.Linear(c*k, 5)
        if aux: self.aux, self.aux_head = conv(nd, c, aux), nn.Linear(aux, 5)
        self.must = {(f'blocks.{i}.{n}', a): v for i, b in enumerate(self.blocks) for (n, a), v in b.must.items()}
        if aux: self.must |= must(aux, aux__weight__0=1, aux__bias__0=1, aux_head__weight__1=1)
        if all(b.free for b in self.blocks):
            self.must |= must(c, stem__weight__0=1, stem__bias__0=1, head__weight__1=k)
            if norm: self.must |= must(c, norm__weight__0=1, norm__running_mean__0=1)
            for i, b in enumerate(self.blocks):
                if isinstance(b, NeXt): self.must |= must(c, **{f'blocks__{i}__gamma__0': 1, f'blocks__{i}__d__weight__0': 1, f'blocks__{i}__b__bias__0': 1})
    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for b in self.blocks: x = b(x)
        out = self.head(x.flatten(1) if self.flatten else x.flatten(2).mean(2))
        return (out, self.aux_head(self.aux(x).relu().flatten(2).mean(2))) if self.training and hasattr(self, 'aux') else out

# --- sequences

class Attention(Block): # sizes of heads in attributes
    def __init__(self, c, heads, d, fused=True, sdpa=True):
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.fused, self.sdpa = heads, d, d**-.5, fused, sdpa
        if fused: self.qkv = nn.Linear(c, 3*heads*d)
        else: self.q, self.k, self.v = (nn.Linear(c, heads*d) for _ in range(3))
        self.out = nn.Linear(heads*d, c)
        self.must = must(heads, out__weight__1=None, **(dict(qkv__weight__0=None, qkv__bias__0=None) if fused else dict(q__weight__0=None, k__weight__0=None, v__bias__0=None)))
    def attend(self, q, k, v):
        if self.sdpa: return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        return (((q*self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)
    def forward(self, x):
        B, N, _ = x.shape
        if self.fused: q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else: q, k, v = (m(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).reshape(B, N, -1))

class Source_Attention(Attention): # the width of a head is C // num_heads in the source
    free = False
    def __init__(self, c, heads, **kw):
        super().__init__(c, heads, c//heads, **kw)
        self.must = {}
    def forward(self, x):
        B, N, C = x.shape
        if self.fused: q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C//self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        else: q, k, v = (m(x).view(B, N, self.num_heads, C//self.num_heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).reshape(B, N, C))

class Grouped_Query(Block):
    def __init__(self, c, kv, rep, d, expand=False):
        super().__init__()
        self.num_heads, self.num_kv, self.n_rep, self.head_dim, self.expand = kv*rep, kv, rep, d, expand
        self.q, self.k, self.v, self.out = nn.Linear(c, kv*rep*d), nn.Linear(c, kv*d), nn.Linear(c, kv*d, bias=False), nn.Linear(kv*rep*d, c)
        if kv > 1: self.must = must(kv, q__weight__0=None, k__weight__0=None, v__weight__0=None, out__weight__1=None)
    def repeat(self, x):
        if not self.expand: return x.repeat_interleave(self.n_rep, 1)
        B, K, N, d = x.shape
        return x[:, :, None].expand(B, K, self.n_rep, N, d).reshape(B, K*self.n_rep, N, d)
    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.q(x).view(B, N, self.num_heads, self.head_dim), self.k(x).view(B, N, self.num_kv, self.head_dim), self.v(x).view(B, N, self.num_kv, self.head_dim)
        q, k, v = q.transpose(1, 2), self.repeat(k.transpose(1, 2)), self.repeat(v.transpose(1, 2))
        y = (q @ k.transpose(2, 3)*self.head_dim**-.5 if not self.expand else q @ k.transpose(2, 3)/2).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(B, N, self.num_heads*self.head_dim))

class Multihead(Block):
    free = False
    def __init__(self, c, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(c, heads, batch_first=True)
    def forward(self, x): return x + self.attn(x, x, x, need_weights=False)[0]

class Mlp(Block):
    def __init__(self, c, h, kind='gelu'):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(c, 2*h if kind == 'chunk' else h), nn.Linear(h, c)
        if kind == 'swiglu': self.g = nn.Linear(c, h, bias=False)
        s = 2 if kind == 'chunk' else 1
        self.must = must(h, a__weight__0=s, a__bias__0=s, b__weight__1=1, **(dict(g__weight__0=1) if kind == 'swiglu' else {}))
    def forward(self, x):
        if self.kind == 'chunk': y, g = self.a(x).chunk(2, -1); return x + self.b(y*F.silu(g))
        return x + self.b(F.silu(self.g(x))*self.a(x) if self.kind == 'swiglu' else F.gelu(self.a(x)))

class Recurrent(Block):
    def __init__(self, c, h, kind='LSTM', layers=1, both=False):
        super().__init__()
        self.rnn, self.b = getattr(nn, kind)(c, h, layers, batch_first=True, bidirectional=both), nn.Linear(h*(1 + both), c)
        k = {'LSTM': 4, 'GRU': 3}[kind]
        for l in range(layers):
            for r in ('', '_reverse') if both else ('',):
                self.must |= must(h, **{f'rnn__weight_ih_l{l}{r}__0': k, f'rnn__weight_hh_l{l}{r}__0': k, f'rnn__weight_hh_l{l}{r}__1': 1, f'rnn__bias_hh_l{l}{r}__0': k})
        self.must |= must(h, b__weight__1=1 + both)
    def forward(self, x): return x + self.b(self.rnn(x)[0])

class Sequence(nn.Module):
    "Tokens, positions, blocks with norms before them, a head that may be the embedding"
    def __init__(self, c, makers, norm='layer', position='parameter', tied=False, words=11):
        super().__init__()
        self.emb = nn.Embedding(words, c)
        if position == 'parameter': self.pos = nn.Parameter(torch.empty(1, 6, c))
        elif position == 'embedding': self.pos_emb = nn.Embedding(6, c)
        self.position = position
        self.norms = nn.ModuleList({'layer': nn.LayerNorm, 'rms': nn.RMSNorm, 'none': lambda c: nn.Identity()}[norm](c) for _ in makers)
        self.blocks = nn.ModuleList(m(c) for m in makers)
        self.head = nn.Linear(c, words, bias=not tied)
        if tied: self.head.weight = self.emb.weight
        self.must = {(f'blocks.{i}.{n}', a): v for i, b in enumerate(self.blocks) for (n, a), v in b.must.items()}
        if norm == 'none' and all(b.free for b in self.blocks): self.must |= must(c, emb__weight__1=1, head__weight__1=1, **({'parameter': dict(pos__2=1), 'embedding': dict(pos_emb__weight__1=1), 'none': {}}[position]))
    def forward(self, x):
        x = self.emb(x)
        if self.position == 'parameter': x = x + self.pos[:, :x.shape[1]]
        if self.position == 'embedding': x = x + self.pos_emb(torch.arange(x.shape[1]))
        for n, b in zip(self.norms, self.blocks): x = b(n(x))
        return self.head(x)


def randomise(model, seed): # statistics, biases and affine parameters too, so that mistakes show
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.6 if p.ndim > 1 else .5) + (.7 if p.ndim == 1 and 'bias' not in n else .2))
        for n, b in model.named_buffers():
            if 'running_mean' in n: b.copy_(torch.randn(b.shape, generator=g))
            if 'running_var' in n: b.copy_(torch.rand(b.shape, generator=g) + .5)
    return model
