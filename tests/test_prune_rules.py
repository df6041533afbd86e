"""Every rule of every operator: zeroing what is dead and slicing it away give the same for what is kept.

A case is a small function of a few tensors. Its signature says, in the manner of einsum, which axes of the inputs and outputs are free: one letter per
axis, the same letter where the indices are the same units, another where they merely can be removed, `.` where nothing can.
"""
import numpy as np
import pytest
import torch
import torchvision  # it brings operators
from torch import nn

from fasterai_lib.prune import rules_layers, rules_shapes  # noqa: F401 they register the operators
from fasterai_lib.prune.record import Op, Record, Recorder, tensors_in
from fasterai_lib.prune.rules import Flow, rules

LIBS = [torch.ops.aten, torch.ops.torchvision]
def packet(name): return next((getattr(lib, name) for lib in LIBS if hasattr(lib, name)), None)

class Operators:
    "Calls an operator by name; where it would be taken apart before it is recorded, or needs a GPU, records it by hand"
    rec = None
    def __getattr__(self, name): return self.with_name(name, packet(name))
    def with_name(self, name, does):
        def run(*args, **kwargs):
            if self.rec is None: return does(*args, **kwargs)
            to_refs = lambda x: self.rec.ref(x) if isinstance(x, torch.Tensor) else type(x)(map(to_refs, x)) if isinstance(x, (list, tuple)) else x
            a, k = tuple(to_refs(x) for x in args), {n: to_refs(x) for n, x in kwargs.items()}
            out = does(*args, **kwargs)
            self.rec.record.ops.append(Op(name, getattr(packet(name), packet(name).overloads()[0]), a, k, [self.rec.ref(t) for t in tensors_in(out)], (), ('', 0)))
            return out
        return run
A = Operators()

class Case:
    def __init__(self, name, does, signature, *inputs, values=True, exact=True):
        self.name, self.does, self.signature, self.inputs, self.values, self.exact = name, does, signature, inputs, values, exact

class Sizes:
    "The sizes that a case's function is given: as they are (dense), or of what is alive"
    def __init__(self, count=None): self.count = count
    def out(self, old, d, i=0): return old if self.count is None else self.count(('out', i, d), None, None)  # of axis d of output i
    def of(self, i, d, a, b): return b - a if self.count is None else self.count(('in', i, d), a, b)  # of indices a..b of axis d of input i

class Call(nn.Module):
    def __init__(self, case, inputs):
        super().__init__()
        self.case, self.n = case, len(inputs)
        for i, t in enumerate(inputs): self.register_buffer(f'b{i}', t)
    def forward(self, _): return self.case.does(Sizes(), *(getattr(self, f'b{i}') for i in range(self.n)))

def tensor(spec, seed): # a shape of random numbers, or a tensor
    if isinstance(spec, torch.Tensor): return spec.clone()
    return torch.randn(spec, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

class Open(Flow): # outputs may shrink
    def pin(self, a, reason):
        if reason != 'it is an output of the model': super().pin(a, reason)

def recorded(case, inputs): # the flow after the rule has run; labels of inputs and outputs
    model = Call(case, inputs)
    rec = Recorder(model)
    refs = [rec.ref(getattr(model, f'b{i}')) for i in range(len(inputs))]
    record = rec.run(torch.zeros(()))
    if not any(op.name == case.name for op in record.ops): # taken apart, or needs other hardware: by hand
        model = Call(case, inputs)
        rec = A.rec = Recorder(model)
        try: out, record = model(None), rec.record
        finally: A.rec = None
        record.outputs = [rec.ref(t) for t in tensors_in(out)]
    assert any(op.name == case.name for op in record.ops), f'{case.name} was not run, but {[op.name for op in record.ops]}'
    flow, outs = Open(case.exact), record.outputs
    flow.read(record, {f'b{i}': tuple(t.shape) for i, t in enumerate(inputs)})
    assert not flow.unknown, f'no rule for {list(flow.unknown)}'
    flow.settle()
    roots = lambda labels, r: [None if a is None else flow.atoms.find(a) for a in (labels or [None]*len(r.shape))]
    return flow, [roots(flow.params.get(f'b{i}'), r) for i, r in enumerate(refs)], [roots(flow.labels.get(r.id), r) for r in outs]

def killed(axes, n, rng): # which roots are dead: some, but two of an axis stay
    dead = rng.random(n) < .45
    dead[0] = False
    while True:
        few = [r for r in axes if dead[r].any() and (~dead[r]).sum() < 2] # an axis of one index is another matter: it is broadcast, or squeezed away
        if not few: return dead
        dead[rng.choice(few[0][dead[few[0]]])] = False

def zeroed(t, roots, dead):
    t = t.clone()
    if t.is_floating_point() or t.is_complex():
        for d, r in enumerate(roots):
            if r is not None: t.index_fill_(d, torch.from_numpy(np.flatnonzero(dead[r])), 0)
    return t

def sliced(t, roots, dead):
    for d, r in enumerate(roots):
        if r is not None: t = t.index_select(d, torch.from_numpy(np.flatnonzero(~dead[r])))
    return t.clone()

def check_signature(case, ins, outs):
    left, right = case.signature.split('->')
    letters = {}
    for side, specs, labels in (('input', left, ins), ('output', right, outs)):
        specs = specs.split(',') if specs else []
        assert len(specs) <= len(labels)
        for i, (spec, axes) in enumerate(zip(specs, labels)):
            assert len(spec) == len(axes), f'{side} {i} has {len(axes)} axes'
            for d, (c, r) in enumerate(zip(spec, axes)):
                free = r is not None and bool(r.any())
                assert free is (c != "."), f'{side} {i}, axis {d} is {"free" if free else "pinned"}'
                if free: assert np.array_equal(letters.setdefault(c, r), r), f'{side} {i}, axis {d}: not the units of {c}'

cases = []
def case(names, does, signature, *inputs, values=True, exact=True):
    "`does(op, sizes, *inputs)` for each name"
    for n in names.split(): cases.append(Case(n, lambda s, *x, n=n: does(getattr(A, n) if isinstance(n, str) else n, s, *x), signature, *inputs, values=values, exact=exact))
def stand_in(name, other, signature, *inputs, **kwargs):
    "For an operator that runs on other hardware: the rule sees its arguments, `other` computes it"
    cases.append(Case(name, lambda s, *x: other(A.with_name, s, *x), signature, *inputs, **kwargs))

def long(*a, **k): return torch.tensor(*a, **k)
def mask(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(1)) > .5

# --- elementwise
X = (3, 4, 5)
unary = 'abc->abc'
case('alias clone detach lift_fresh lift_fresh_copy lift _to_copy zeros_like ones_like hardswish hardsigmoid silu mish celu elu gelu softplus leaky_relu softshrink hardshrink erf sigmoid tanh '
     'nan_to_num hardtanh relu exp sqrt neg abs reciprocal log_sigmoid_forward', lambda op, s, x: op(x), unary, X)
case('empty_like rand_like randn_like bernoulli', lambda op, s, x: op(x.sigmoid()), unary, X, values=False)
case('detach_', lambda op, s, x: op(x), unary, X)
case('zero_ hardswish_ hardsigmoid_ silu_ mish_ elu_ leaky_relu_ hardtanh_ relu_', lambda op, s, x: op(x.clone()), unary, X)
case('bernoulli_ uniform_ normal_ exponential_ random_', lambda op, s, x: op(x.clone()), unary, X, values=False)
case('fill_', lambda op, s, x: op(x.clone(), 2.), unary, X)
case('full_like', lambda op, s, x: op(x, 2.), unary, X)
case('clamp', lambda op, s, x: op(x, -.5, .5), unary, X)
case('threshold', lambda op, s, x: op(x, .1, 2.), unary, X)
case('native_dropout', lambda op, s, x: op(x, .5, False), 'abc->abc,abc', X)
stand_in('_fused_dropout', lambda op, s, x: op('_fused_dropout', lambda x, p: (x*1., x > 0))(x, .5), 'abc->abc,abc', X)
case('rrelu_with_noise', lambda op, s, x, y: op(x, y, .125, .3, False), 'abc,abc->abc', X, X)
case('add sub mul div maximum', lambda op, s, x, y: op(x, y), 'abc,c->abc', X, (5,))
case('mul', lambda op, s, x, y: op(x, y), 'abc,a..->abc', X, (3, 1, 1))
case('add_ mul_', lambda op, s, x, y: op(x.clone(), y), 'abc,bc->abc', X, (4, 5))
case('masked_fill', lambda op, s, x, m: op(x, m, -1.), 'abc,bc->abc', X, mask(4, 5))
case('masked_fill_', lambda op, s, x, m: op(x.clone(), m, -1.), 'abc,abc->abc', X, mask(*X))
case('where', lambda op, s, m, x, y: op(m, x, y), 'abc,abc,c->abc', mask(*X), X, (5,))
case('_prelu_kernel', lambda op, s, x, w: op(x, w), 'abc,.b.->abc', X, (1, 4, 1))
case('copy', lambda op, s, x, y: op(x, y), 'abc,bc->abc', X, (4, 5))
case('copy_', lambda op, s, x, y: op(x.clone(), y), 'abc,bc->abc', X, (4, 5))
case('lerp', lambda op, s, x, y: op(x, y, .3), 'abc,abc->abc', X, X)
case('addcmul', lambda op, s, x, y, z: op(x, y, z), 'abc,abc,c->abc', X, X, (5,))
case('addcdiv', lambda op, s, x, y, z: op(x, y, z.exp()), 'abc,abc,c->abc', X, X, (5,))
case('complex', lambda op, s, x, y: op(x, y), 'abc,abc->abc', X, X)
case('polar', lambda op, s, x, y: op(x.abs(), y), 'abc,c->abc', X, (5,))
case('_conj', lambda op, s, x: op(torch.complex(x, x + 1)), unary, X)
case('resolve_conj', lambda op, s, x: op(x), unary, X)
case('bitwise_not', lambda op, s, m: op(m), unary, mask(*X))

# --- without an input, or looking at all of it
def ignored(op, s, *x): # its answer is no tensor
    op(*x)
    return x[0]*1
case('equal', ignored, 'abc,def->abc', X, X)
case('_local_scalar_dense is_nonzero _assert_async', lambda op, s, x: (op(x), x*1)[1], '->', torch.tensor(2.))
case('_assert_tensor_metadata', ignored, unary, X)
case('sym_size', lambda op, s, x: (op(x, 0), x)[1], unary, X)
case('zeros ones', lambda op, s: op([s.out(4, 0), s.out(3, 1)]), '->ab')
case('rand randn empty', lambda op, s: op([s.out(4, 0), s.out(3, 1)]), '->ab', values=False)
case('full', lambda op, s: op([s.out(4, 0)], 2.), '->a')
case('new_zeros new_ones', lambda op, s, x: op(x, [s.out(4, 0), 1]), 'a->b.', (3,))
case('new_empty', lambda op, s, x: op(x, [s.out(4, 0)]), 'a->b', (3,), values=False)
case('new_full', lambda op, s, x: op(x, [s.out(4, 0)], 3.), 'a->b', (3,))
case('empty_strided', lambda op, s: op([s.out(4, 0)], [1]), '->a', values=False)
case('new_empty_strided', lambda op, s, x: op(x, [s.out(4, 0)], [1]), 'a->b', (3,), values=False)
case('empty_permuted', lambda op, s: op([s.out(4, 0)], [0]), '->a', values=False)
case('scalar_tensor', lambda op, s: op(2.), '->')
case('arange', lambda op, s: op(4), '->.')
case('eye', lambda op, s: op(4), '->..')
case('linspace logspace', lambda op, s: op(0, 1, 5), '->.')
case('randint', lambda op, s: op(9, [4]), '->.', values=False)
case('randperm', lambda op, s: op(4), '->.', values=False)
case('hann_window', lambda op, s: op(4), '->.')
case('tril_indices triu_indices', lambda op, s: op(3, 3), '->..')
case('nonzero unique_consecutive _unique2', lambda op, s, x: op(x), '..->', (3, 4))
case('unique_dim', lambda op, s, x: op(x, 0), '..->', (3, 4))
case('bincount', lambda op, s, i: op(i), '.->.', long([0, 2, 2, 1]))
case('histc', lambda op, s, x: op(x, 3), '.->.', (5,))
case('multinomial', lambda op, s, x: op(x.exp(), 2), '.->.', (5,), values=False)
case('bucketize', lambda op, s, x, b: op(x, b.sort()[0]), '.,.->.', (5,), (3,))
case('searchsorted', lambda op, s, b, x: op(b.sort()[0], x), '.,.->.', (5,), (3,))
case('isin', lambda op, s, x, y: op(x, y), '.,.->.', long([1, 2, 3]), long([2, 3]))
case('masked_select', lambda op, s, x, m: op(x, m), '..,..->.', (3, 4), mask(3, 4))
case('nms', lambda op, s, b, x: op(b.abs().cumsum(1), x, .5), '..,.->.', (5, 4), (5,))
case('_assert_scalar', lambda op, s: (op(True, ''), torch.zeros(()))[1], '->')
case('tril triu', lambda op, s, x: op(x), 'a..->a..', X)
case('tril_ triu_', lambda op, s, x: op(x.clone()), 'a..->a..', X)

# --- moving, cutting, joining
case('view reshape _unsafe_view _reshape_copy view_copy', lambda op, s, x: op(x, [s.out(3, 0), s.out(20, 1)]), 'a.c->ad', X)
case('view reshape', lambda op, s, x: op(x, [s.out(3, 0), 1, s.out(4, 2), s.out(5, 3)]), 'abc->a.bc', X)
case('view', lambda op, s, x: op(x, [s.out(3, 0), 4, s.out(3, 2)]), 'ab->a.c', (3, 12))
case('view', lambda op, s, x: op(x, torch.int64), 'abc->abc', X)
case('_reshape_alias', lambda op, s, x: op(x, [s.out(3, 0), s.out(20, 1)], [s.out(20, 1), 1]), 'a.c->ad', X)
case('permute', lambda op, s, x: op(x, [2, 0, -2]), 'abc->cab', X)
case('transpose', lambda op, s, x: op(x, 0, -1), 'abc->cba', X)
case('transpose_', lambda op, s, x: op(x.clone(), 0, -1), 'abc->cba', X)
case('t', lambda op, s, x: op(x), 'ab->ba', (3, 4))
case('t_', lambda op, s, x: op(x.clone()), 'ab->ba', (3, 4))
case('squeeze', lambda op, s, x: op(x), 'a.b->ab', (3, 1, 4))
case('squeeze', lambda op, s, x: op(x, 1), '..ab->.ab', (1, 1, 3, 4))
case('squeeze_', lambda op, s, x: op(x.clone(), 1), 'a.b->ab', (3, 1, 4))
case('unsqueeze', lambda op, s, x: op(x, 1), 'ab->a.b', (3, 4))
case('unsqueeze_', lambda op, s, x: op(x.clone(), -1), 'ab->ab.', (3, 4))
case('expand', lambda op, s, x: op(x, [s.out(2, 0), -1, s.out(5, 2)]), 'a.->bac', (3, 1))
case('repeat', lambda op, s, x: op(x, [s.out(2, 0), 1, 2]), 'ab->cad', (3, 4))
case('repeat_interleave', lambda op, s, n: op(n), '.->.', long([1, 2, 0, 1]))
case('slice', lambda op, s, x: op(x, 1, s.of(0, 1, 0, 2), s.of(0, 1, 0, 4)), 'ab->ac', (3, 7))
case('slice', lambda op, s, x: op(x, -1), 'ab->ab', (3, 7))
case('slice', lambda op, s, x: torch.cat([op(x, 1, 0, s.of(0, 1, 0, 3)), op(x, 1, s.of(0, 1, 0, 3), s.of(0, 1, 0, 6))], 0), 'ab->cd', (3, 6))
case('select', lambda op, s, x: op(x, 1, 2), 'a.c->ac', X)
case('unbind', lambda op, s, x: op(x, -2), 'a.c->ac,ac,ac,ac', X)
case('split unsafe_split', lambda op, s, x: op(x, s.of(0, 1, 0, 2), 1), 'ab->ac,ac,ac', (3, 6))
case('split_with_sizes unsafe_split_with_sizes', lambda op, s, x: op(x, [s.of(0, 1, 0, 2), s.of(0, 1, 2, 7)], 1), 'ab->ac,ad', (3, 7))
case('cat', lambda op, s, x, y: op([x, y], -1), 'ab,ac->ad', (3, 4), (3, 5))
case('stack', lambda op, s, x, y: op([x, y], 1), 'ab,ab->a.b', (3, 4), (3, 4))
case('flip', lambda op, s, x: op(x, [0, -1]), 'abc->dbe', X)
case('roll', lambda op, s, x: op(x, [1], [1]), 'a.c->a.c', X)
case('roll', lambda op, s, x: op(x, [1]), '..->..', (3, 4))
case('constant_pad_nd', lambda op, s, x: op(x, [1, 2], 3.), 'ab->ac', (3, 4))
case('constant_pad_nd', lambda op, s, x: op(x, [-1, 2, 0, 0]), 'a.->a.', (3, 4))
case('as_strided as_strided_', lambda op, s, x: op(x, [s.out(3, 0), s.out(4, 1)], [s.out(4, 1), 1]), 'ab->ab', (3, 4))
case('as_strided', lambda op, s, x: op(x, [2, 6], [6, 1]), '..->..', (3, 4))

# --- reducing
case('mean amax amin var std logsumexp', lambda op, s, x: op(x, [1]), 'a.c->ac', X)
case('mean var', lambda op, s, x: op(x, [0, -1], keepdim=True), '.b.->.b.', X)
case('mean max min median prod any all std', lambda op, s, x: op(x), '...->', X)
case('any all argmax argmin prod count_nonzero', lambda op, s, x: op(x, 1), 'a.c->ac', X)
case('argmax', lambda op, s, x: op(x, None), '..->', (3, 4))
case('max min median nanmedian mode', lambda op, s, x: op(x, 1), 'a.c->ac,ac', X)
case('max', lambda op, s, x, y: op(x, y), 'abc,c->abc', X, (5,))
case('mode', lambda op, s, x: op(x), 'ab.->ab,ab', X)
case('kthvalue', lambda op, s, x: op(x, 2), 'ab.->ab,ab', X)
case('kthvalue', lambda op, s, x: op(x, 2, 0), '.bc->bc,bc', X)
case('var_mean std_mean', lambda op, s, x: op(x, [1]), 'a.c->ac,ac', X)
case('aminmax', lambda op, s, x: op(x, dim=1), 'a.c->ac,ac', X)
case('sum nansum', lambda op, s, x: op(x, [1]), 'abc->ac', X)
case('sum', lambda op, s, x: op(x), 'abc->', X)
case('sum', lambda op, s, x: op(x, [-1], True), 'abc->ab.', X)
case('linalg_vector_norm', lambda op, s, x: op(x, 2, [1]), 'abc->ac', X)
case('linalg_vector_norm', lambda op, s, x: op(x, -float('inf'), [1]), 'a.c->ac', X)
case('norm', lambda op, s, x: op(x, 2, [1], True), 'abc->a.c', X)
case('norm', lambda op, s, x: op(x), 'abc->', X)
case('norm', lambda op, s, x: op(x, -1., [1]), 'a.c->ac', X)
case('_softmax _log_softmax', lambda op, s, x: op(x, 1, False), 'a.c->a.c', X)
case('_safe_softmax softmax log_softmax cumsum cumprod logcumsumexp', lambda op, s, x: op(x, 1), 'a.c->a.c', X)
case('cumsum_', lambda op, s, x: op(x.clone(), -1), 'ab.->ab.', X)
case('sort', lambda op, s, x: op(x), 'ab.->ab.,ab.', X)
case('sort', lambda op, s, x: op(x, stable=True, dim=0, descending=True), '.bc->.bc,.bc', X)
case('cummax', lambda op, s, x: op(x, 1), 'a.c->a.c,a.c', X)
case('topk', lambda op, s, x: op(x, 2), 'ab.->ab.,ab.', X)
case('topk', lambda op, s, x: op(x, 2, 1), 'a.c->a.c,a.c', X)

# --- products
case('mm', lambda op, s, x, y: op(x, y), 'ab,bc->ac', (3, 4), (4, 5))
case('bmm', lambda op, s, x, y: op(x, y), 'nab,nbc->nac', (2, 3, 4), (2, 4, 5))
case('baddbmm', lambda op, s, z, x, y: op(z, x, y), '.c,nab,nbc->nac', (1, 5), (2, 3, 4), (2, 4, 5))
case('addmm', lambda op, s, z, x, y: op(z, x, y), 'c,ab,bc->ac', (5,), (3, 4), (4, 5))
case('addbmm', lambda op, s, z, x, y: op(z, x, y), 'c,nab,nbc->ac', (5,), (2, 3, 4), (2, 4, 5))
case('mv', lambda op, s, x, y: op(x, y), 'ab,b->a', (3, 4), (4,))
case('dot vdot', lambda op, s, x, y: op(x, y), 'a,a->', (4,), (4,))
case('linear', lambda op, s, x, w, b: op(x, w, b), 'nxi,oi,o->nxo', X, (6, 5), (6,))
case('linear', lambda op, s, x, w: op(x, w), 'i,oi->o', (5,), (6, 5))
stand_in('_grouped_mm', lambda op, s, x, w, e: op('_grouped_mm', lambda x, w, offs: torch.cat([x[a:b] @ w[i] for i, (a, b) in enumerate(zip([0, *offs[:-1]], offs))]))(x, w, e), '.a,.ab,.->.b', (6, 4), (2, 4, 5), long([2, 6]))

# --- convolutions
def conv(op, s, x, w, b, stride=(1, 1), padding=(1, 1), transposed=False): # groups are what the channels say
    return op(x, w, b, list(stride), list(padding), [1, 1], transposed, [0, 0], (x.shape[1]//w.shape[1] if not transposed else b.shape[0]//w.shape[1]))
case('convolution', conv, 'nc..,oc..,o->no..', (2, 4, 5, 5), (6, 4, 3, 3), (6,))
case('convolution', lambda op, s, x, w, b: conv(op, s, x, w, b, padding=(0, 0)), 'ncxy,oc..,o->noxy', (2, 4, 3, 4), (6, 4, 1, 1), (6,))
case('convolution', lambda op, s, x, w, b: conv(op, s, x, w, b, (2, 2), (0, 0)), 'nc..,oc..,o->no..', (2, 4, 3, 4), (6, 4, 1, 1), (6,))
case('convolution', lambda op, s, x, w, b: conv(op, s, x, w, b, transposed=True), 'nc..,co..,o->no..', (2, 4, 5, 5), (4, 6, 3, 3), (6,))
case('convolution', conv, 'nc..,c...,c->nc..', (2, 4, 5, 5), (4, 1, 3, 3), (4,))                    # depthwise
case('convolution', conv, 'nc..,d...,d->nd..', (2, 4, 5, 5), (8, 1, 3, 3), (8,))                    # two for each
case('convolution', conv, 'nc..,oi..,o->no..', (2, 6, 5, 5), (8, 3, 3, 3), (8,))                    # two groups
case('convolution', conv, 'nc..,o...,o->no..', (2, 12, 5, 5), (12, 2, 3, 3), (12,))                 # six groups of two
case('convolution', lambda op, s, x, w, b: conv(op, s, x, w, b, transposed=True), 'nc..,c...,c->nc..', (2, 4, 5, 5), (4, 1, 3, 3), (4,))
case('convolution', lambda op, s, x, w, b: conv(op, s, x, w, b, transposed=True), 'nc..,co..,d->nd..', (2, 6, 5, 5), (6, 4, 3, 3), (8,))
case('_convolution', lambda op, s, x, w, b: op(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, True, True), 'nc..,oc..,o->no..', (2, 4, 5, 5), (6, 4, 3, 3), (6,))
stand_in('convolution_overrideable', lambda op, s, x, w, b: op('convolution_overrideable', torch.ops.aten.convolution)(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), 'nc..,oc..,o->no..', (2, 4, 5, 5), (6, 4, 3, 3), (6,))
case('deform_conv2d', lambda op, s, x, w, o, m, b: op(x, w, o, m, b, 1, 1, 1, 1, 1, 1, 1, 1, True), '.c..,oc..,....,....,o->.o..', (2, 4, 5, 5), (6, 4, 3, 3), (2, 18, 5, 5), (2, 9, 5, 5), (6,))

# --- norms
B, C4 = (2, 4, 3, 5), (4,)
STATS = (torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + .5)
case('_native_batch_norm_legit_no_training _batch_norm_no_update', lambda op, s, x, w, b, m, v: op(x, w, b, m, v, .1, 1e-5)[0], 'nchw,c,c,c,c->nchw', B, C4, C4, *STATS)
case('native_batch_norm _native_batch_norm_legit', lambda op, s, x, w, b, m, v: op(x, w, b, m.clone(), v.clone(), False, .1, 1e-5)[0], 'nchw,c,c,c,c->nchw', B, C4, C4, *STATS)
case('native_batch_norm _native_batch_norm_legit', lambda op, s, x, w, b, m, v: op(x, w, b, m.clone(), v.clone(), True, .1, 1e-5), '.c..,c,c,c,c->.c..,c,c', B, C4, C4, *STATS)
case('native_batch_norm', lambda op, s, x, w: op(x, w, None, None, None, True, .1, 1e-5), '.c..,c->.c..,c,c', B, C4)
case('_native_batch_norm_legit', lambda op, s, x, w, b: op(x, w, b, True, .1, 1e-5), '.c..,c,c->.c..,c,c', B, C4, C4)
case('_batch_norm_with_update', lambda op, s, x, w, b, m, v: op(x, w, b, m.clone(), v.clone(), .1, 1e-5)[:3], '.c..,c,c,c,c->.c..,c,c', B, C4, C4, *STATS)
case('batch_norm', lambda op, s, x, w, b, m, v: op(x, w, b, m, v, False, .1, 1e-5, False), 'nchw,c,c,c,c->nchw', B, C4, C4, *STATS)
stand_in('cudnn_batch_norm', lambda op, s, x, w, b, m, v: op('cudnn_batch_norm', lambda *a: (*torch.ops.aten.native_batch_norm(*a), x.new_zeros(0)))(x, w, b, m, v, True, .1, 1e-5), '.c..,c,c,c,c->.c..,c,c', B, C4, C4, *STATS)
case('native_layer_norm', lambda op, s, x, w, b: op(x, [5], w, b, 1e-5), 'ab.,.,.->ab.,ab.,ab.', X, (5,), (5,))
case('native_layer_norm', lambda op, s, x: op(x, [4, 5], None, None, 1e-5), 'a..->a..', X)
case('layer_norm', lambda op, s, x, w, b: op(x, [5], w, b, 1e-5), 'ab.,.,.->ab.', X, (5,), (5,))
case('rms_norm _fused_rms_norm', lambda op, s, x, w: op(x, [5], w, 1e-5), 'ab.,.->ab.', X, (5,))
def group_norm(groups): return lambda op, s, x, w, b: op(x, w, b, x.shape[0], x.shape[1], x.shape[2], groups if x.shape[1] == 12 else groups*x.shape[1]//12, 1e-5)
case('native_group_norm', group_norm(1), 'n..,.,.->n..,n.,n.', (3, 12, 5), (12,), (12,))
case('native_group_norm', group_norm(3), 'nc.,c,c->nc.,ng,ng', (2, 12, 5), (12,), (12,))
case('native_group_norm', group_norm(12), 'nc.,c,c->nc.,nc,nc', (2, 12, 5), (12,), (12,))
case('_weight_norm_interface', lambda op, s, v, g: op(v, g, 0), 'abc,a..->abc,a..', X, (3, 1, 1))
case('_weight_norm_interface', lambda op, s, v, g: op(v, g, 2), 'abc,..c->abc,..c', X, (1, 1, 5))

# --- look-ups
I, I2 = long([0, 2, 2, 1]), long([[0, 2, 1], [2, 2, 0]])
case('embedding', lambda op, s, w, i: op(w, i), '.e,ab->abe', (3, 5), I2)
case('_embedding_bag _embedding_bag_forward_only', lambda op, s, w, i, o: op(w, i, o)[0], '.e,.,.->.e', (3, 5), I, long([0, 2]))
case('index _unsafe_index', lambda op, s, x, i: op(x, [None, i]), 'a.c,.->a.c', (4, 3, 5), I)
case('index', lambda op, s, x, i: op(x, [i]), '.bc,..->..bc', (3, 4, 5), I2)
case('index', lambda op, s, x, i, j: op(x, [i, None, j]), '.b.,.,.->.b', (3, 4, 3), I, I)
case('index', lambda op, s, x, m: op(x, [m]), '..c,..->.c', (3, 4, 5), mask(3, 4))
case('index', lambda op, s, x, m: op(x, [None, m]), 'a.c,.->a.c', (3, 4, 5), torch.tensor([True, False, True, True]))
case('index_put _unsafe_index_put', lambda op, s, x, i, v: op(x, [None, i], v), 'a.c,.,.->a.c', (4, 3, 5), long([0, 2]), (1,))
case('index_put', lambda op, s, x, i, v: op(x, [i], v), '.bc,.,.bc->.bc', (3, 4, 5), long([0, 2]), (2, 4, 5))
case('index_put_', lambda op, s, x, i, v: op(x.clone(), [None, None, i], v), 'ab.d,.,ab.d->ab.d', (2, 3, 4, 5), long([0, 2]), (2, 3, 2, 5))
case('index_put_', lambda op, s, x, m, v: op(x.clone(), [m], v), '..c,..,c->..c', (3, 4, 5), mask(3, 4), (5,))
case('_index_put_impl_', lambda op, s, x, i, v: op(x.clone(), [i], v), '.b,.,b->.b', (3, 4), long([0, 2]), (4,))
case('index_select', lambda op, s, x, i: op(x, 1, i), 'a.c,.->a.c', (4, 3, 5), I)
case('index_add index_copy', lambda op, s, x, i, v: op(x, 1, i, v), 'a.c,.,a.c->a.c', (4, 3, 5), long([0, 2]), (4, 2, 5))
case('index_add_ index_copy_', lambda op, s, x, i, v: op(x.clone(), 1, i, v), 'a.c,.,a.c->a.c', (4, 3, 5), long([0, 2]), (4, 2, 5))
case('index_reduce_', lambda op, s, x, i, v: op(x.clone(), 1, i, v, 'amax'), 'a.c,.,a.c->a.c', (4, 3, 5), long([0, 2]), (4, 2, 5))
case('index_fill', lambda op, s, x, i: op(x, 1, i, 2.), 'a.c,.->a.c', (4, 3, 5), long([0, 2]))
case('index_fill_', lambda op, s, x, i: op(x.clone(), 1, i, 2.), 'a.c,.->a.c', (4, 3, 5), long([0, 2]))
IX = torch.randint(0, 3, (4, 2, 5), generator=torch.Generator().manual_seed(0))
case('gather', lambda op, s, x, i: op(x, 1, i), 'a.c,a.c->a.c', (4, 3, 5), IX)
case('gather', lambda op, s, x, i: op(x, 1, i), '..c,..c->..c', (4, 3, 5), IX[:3])
case('scatter scatter_add', lambda op, s, x, i, v: op(x, 1, i, v), 'a.c,a.c,a.c->a.c', (4, 3, 5), torch.argsort(torch.rand(4, 3, 5), 1)[:, :2], (4, 2, 5))
case('scatter_ scatter_add_', lambda op, s, x, i, v: op(x.clone(), 1, i, v), 'a.c,a.c,a.c->a.c', (4, 3, 5), torch.argsort(torch.rand(4, 3, 5), 1)[:, :2], (4, 2, 5))
case('scatter', lambda op, s, x, i: op(x, 1, i, 2.), 'a.c,a.c->a.c', (4, 3, 5), IX)
case('scatter_reduce', lambda op, s, x, i, v: op(x, 1, i, v, 'sum'), 'a.c,a.c,a.c->a.c', (4, 3, 5), IX, (4, 2, 5))
case('scatter_reduce_', lambda op, s, x, i, v: op(x.clone(), 1, i, v, 'amax'), 'a.c,a.c,a.c->a.c', (4, 3, 5), IX, (4, 2, 5))

# --- what slides over pictures
for d in (1, 2, 3):
    P, k, keep = (2, 3, *(6,)*d), [2]*d, 'nc' + '.'*d
    one = f'{keep}->{keep}'
    case(f'avg_pool{d}d', lambda op, s, x, k=k: op(x, k, k), one, P)
    case(f'adaptive_max_pool{d}d', lambda op, s, x, k=k: op(x, k), f'{keep}->{keep},{keep}', P)
    case(f'adaptive_avg_pool{d}d', lambda op, s, x, k=k: op(x, k), one, P)
    case(f'reflection_pad{d}d replication_pad{d}d', lambda op, s, x, d=d: op(x, [1, 2]*d), one, P)
    case(f'upsample_nearest{d}d _upsample_nearest_exact{d}d', lambda op, s, x, d=d: op(x, [9]*d), one, P)
    case({1: 'upsample_linear1d', 2: 'upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa', 3: 'upsample_trilinear3d'}[d], lambda op, s, x, d=d: op(x, [9]*d, False), one, P)
    if d > 1:
        case(f'max_pool{d}d_with_indices', lambda op, s, x, k=k: op(x, k, k), f'{keep}->{keep},{keep}', P)
        case(f'_adaptive_avg_pool{d}d', lambda op, s, x, k=k: op(x, k), one, P)
        stand_in(f'mkldnn_max_pool{d}d', lambda op, s, x, d=d, k=k: op(f'mkldnn_max_pool{d}d', packet(f'max_pool{d}d'))(x, k, k), one, P)
        case(f'fractional_max_pool{d}d', lambda op, s, x, r, k=k: op(x, k, k, r.sigmoid()), f'{keep},nc.->{keep},{keep}', P, (2, 3, d))
case('max_unpool3d', lambda op, s, x, i: op(x, i, [6, 6, 6], [2, 2, 2], [0, 0, 0]), 'nc...,nc...->nc...', (2, 3, 2, 2, 2), torch.arange(8).reshape(2, 2, 2).expand(2, 3, 2, 2, 2)*27)
case('max_unpool2d', lambda op, s, x, i: op(x, i, [6, 6]), 'nc..,nc..->nc..', (2, 3, 2, 2), torch.arange(4).reshape(2, 2).expand(2, 3, 2, 2)*9)
case('grid_sampler_2d', lambda op, s, x, g: op(x, g.tanh(), 0, 0, False), '.c..,....->.c..', (2, 3, 4, 4), (2, 5, 5, 2))
case('grid_sampler_3d', lambda op, s, x, g: op(x, g.tanh(), 0, 0, False), '.c...,.....->.c...', (2, 3, 4, 4, 4), (2, 5, 5, 5, 3))
stand_in('cudnn_grid_sampler', lambda op, s, x, g: op('cudnn_grid_sampler', lambda x, g: torch.ops.aten.grid_sampler_2d(x, g, 0, 0, False))(x, g), '.c..,....->.c..', (2, 3, 4, 4), (2, 5, 5, 2))
BOXES = torch.tensor([[0, 0, 0, 3, 3], [1, 1, 1, 3, 3]], dtype=torch.float64)
case('roi_align', lambda op, s, x, b: op(x, b, 1., 2, 2, 2, False), '.c..,..->.c..', (2, 3, 4, 4), BOXES)
case('roi_pool', lambda op, s, x, b: op(x, b, 1., 2, 2)[0], '.c..,..->.c..', (2, 3, 4, 4), BOXES)
case('affine_grid_generator', lambda op, s, t: op(t, [2, 3, 4, 4], False), '...->....', (2, 2, 3))
case('im2col', lambda op, s, x: op(x, [2, 3], [1, 1], [0, 0], [1, 1]), 'nc..->nd.', (2, 3, 4, 5))
case('col2im', lambda op, s, x: op(x, [4, 5], [2, 3], [1, 1], [0, 0], [1, 1]), 'nc.->nd..', (2, 18, 9))
case('pixel_shuffle', lambda op, s, x: op(x, 2), 'nc..->nd..', (2, 12, 3, 3))
case('pixel_unshuffle', lambda op, s, x: op(x, 2), 'nc..->nd..', (2, 3, 4, 4))
case('channel_shuffle', lambda op, s, x: op(x, 2), 'ncxy->ndxy', (2, 6, 3, 3))
case('unfold', lambda op, s, x: op(x, 1, 2, 1), 'a.c->a.c.', (3, 5, 4))
case('glu', lambda op, s, x: op(x, 1), 'abc->adc', (3, 6, 4))

# --- complex numbers
case('view_as_real', lambda op, s, x: op(torch.complex(x, x + 1)), 'ab->ab.', (3, 4))
case('view_as_complex', lambda op, s, x: op(x), 'ab.->ab', (3, 4, 2))
case('_fft_r2c', lambda op, s, x: op(x, [1], 0, True), 'a.c->a.c', X)
case('_fft_c2c', lambda op, s, x: op(torch.complex(x, x), [1, 2], 0, True), 'a..->a..', X)
case('_fft_c2r', lambda op, s, x: op(torch.complex(x, x), [2], 0, 8), 'ab.->ab.', X)


def test_every_rule_has_a_case():
    known = {n for n in rules if packet(n) is not None}
    assert known <= {c.name for c in cases}, sorted(known - {c.name for c in cases})

def test_every_rule_is_of_an_operator():
    elsewhere = {'grouped_mm_fallback'} # of transformers
    assert not [n for n in rules if packet(n) is None and n not in elsewhere]


@pytest.mark.parametrize('case', [c for c in cases if c.name], ids=[f'{c.name} {c.signature}' for c in cases if c.name])
def test_zeroed_is_sliced(case):
    inputs = [tensor(x, i) for i, x in enumerate(case.inputs)]
    flow, ins, outs = recorded(case, inputs)
    check_signature(case, ins, outs)
    axes = [r for ls in ins + outs for r in ls if r is not None and len(r)]
    rng, died = np.random.default_rng(0), False
    for _ in range(4):
        dead = killed(axes, flow.atoms.n, rng)
        died |= any(dead[r].any() for r in axes)
        def count(place, a, b):
            side, i, d = place
            r = (ins if side == 'in' else outs)[i][d]
            if r is None: return b - a if b is not None else dense[i].shape[d]
            return int((~dead[r[a:b]]).sum())
        torch.manual_seed(0)
        dense = tensors_in(case.does(Sizes(), *(zeroed(t, r, dead) for t, r in zip(inputs, ins))))
        small = tensors_in(case.does(Sizes(count), *(sliced(t, r, dead) for t, r in zip(inputs, ins))))
        for i, (want, got, r) in enumerate(zip(dense, small, outs, strict=True)):
            want = sliced(want, r, dead)
            assert got.shape == want.shape, f'output {i}'
            if case.values: torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert died or not any(r.any() for r in axes)
