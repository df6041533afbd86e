"""What the library should decide, computed again the slow way: plain numpy, loops and tables written out by hand."""
import math
from functools import lru_cache

import numpy as np

# --- tables: the axes of each weight, those a unit spans whole, those that tell outputs apart, those that N:M groups lie along

_conv_1 = dict(weight='', shared_weight='o', channel='i', row='w', shared_channel='o i', shared_row='o w', horizontal_slice='i w', kernel='w',
               shared_horizontal_slice='o i w', shared_kernel='o w', filter='i w', layer='g o i w')
_conv_2 = dict(weight='', shared_weight='o', channel='i', column='h', row='w', shared_channel='o i', shared_column='o h', shared_row='o w',
               vertical_slice='i h', horizontal_slice='i w', kernel='h w', shared_vertical_slice='o i h', shared_horizontal_slice='o i w',
               shared_kernel='o h w', filter='i h w', layer='g o i h w')
_conv_3 = dict(weight='', shared_weight='o', channel='i', column='h', row='w', shared_channel='o i', shared_column='o h', shared_row='o w',
               vertical_slice='i h', horizontal_slice='i w', kernel='d h w', shared_vertical_slice='o i h', shared_horizontal_slice='o i w',
               shared_kernel='o d h w', filter='i d h w', layer='g o i d h w')
_gated = {'weight': '', 'row': 'i', 'column': 'gate unit', 'layer': 'gate unit i'}
_projected = {'weight': '', 'row': 'i', 'column': 'o', 'layer': 'o i'}
_heads = {'weight': '', 'row': 'i', 'column': 'head d', 'head': 'd i', 'layer': 'head d i'}
_table = {'weight': '', 'row': 'd', 'column': 'n', 'layer': 'n d'}

# kind -> [(how the parameter's name begins, its axes, granularity -> axes spanned whole, output axes, input axes)]
KINDS = {
    'Conv1d': [('weight', 'g o i w', _conv_1, 'g o', 'i')],
    'Conv2d': [('weight', 'g o i h w', _conv_2, 'g o', 'i')],
    'Conv3d': [('weight', 'g o i d h w', _conv_3, 'g o', 'i')],
    'ConvTranspose1d': [('weight', 'g i o w', _conv_1, 'g o', 'i')],
    'ConvTranspose2d': [('weight', 'g i o h w', _conv_2, 'g o', 'i')],
    'ConvTranspose3d': [('weight', 'g i o d h w', _conv_3, 'g o', 'i')],
    'Linear': [('weight', 'o i', {'weight': '', 'row': 'i', 'column': 'o', 'layer': 'o i'}, 'o', 'i')],
    'Bilinear': [('weight', 'o i j', {'weight': '', 'row': 'i j', 'column': 'o j', 'layer': 'o i j'}, 'o', 'i')],
    'Embedding': [('weight', 'n d', _table, 'n', 'd')],
    'EmbeddingBag': [('weight', 'n d', _table, 'n', 'd')],
    'MultiheadAttention': [
        ('in_proj_weight', 'qkv head d i', {'weight': '', 'row': 'i', 'column': 'qkv head d', 'head': 'qkv d i', 'layer': 'qkv head d i'}, 'qkv head d', 'i'),
        ('q_proj_weight', 'head d i', _heads, 'head d', 'i'), ('k_proj_weight', 'head d i', _heads, 'head d', 'i'), ('v_proj_weight', 'head d i', _heads, 'head d', 'i'),
        ('out_proj.weight', 'o head d', {'weight': '', 'row': 'head d', 'column': 'o', 'head': 'o d', 'layer': 'o head d'}, 'o', 'head d')],
    **{t: [('weight_hr', 'o i', _projected, 'o', 'i'), ('weight_', 'gate unit i', _gated, 'gate unit', 'i')]
       for t in ('LSTM', 'GRU', 'RNN', 'LSTMCell', 'GRUCell', 'RNNCell')}}
GATES = dict(LSTM=4, LSTMCell=4, GRU=3, GRUCell=3, RNN=1, RNNCell=1)
JOINT = {(k, 'layer') for k in KINDS} | {('MultiheadAttention', 'head')} # one unit over all the weights of the layer

FORMULAS = dict( # score of each weight, from weights w and reference weights r; `random` has none
    large_final=lambda w, r: np.abs(w), squared_final=lambda w, r: w*w, small_final=lambda w, r: -np.abs(w),
    large_init=lambda w, r: np.abs(r), small_init=lambda w, r: -np.abs(r),
    large_init_large_final=lambda w, r: np.where(np.abs(w) < np.abs(r), np.abs(w), np.abs(r)),
    small_init_small_final=lambda w, r: np.where(np.abs(w) < np.abs(r), -np.abs(r), -np.abs(w)),
    magnitude_increase=lambda w, r: np.abs(w) - np.abs(r), movement=lambda w, r: np.abs(w - r), movmag=lambda w, r: np.abs(w*w - w*r))
FORMULAS |= {f'updating_{n}': FORMULAS[n] for n in ('magnitude_increase', 'movement', 'movmag')} # r: the weights at the last decision


# --- units

@lru_cache(None)
def ids_of(view, axes, block): # the number of each weight's unit, in order of first appearance
    seen, out = {}, np.empty(view, np.int64)
    for at in np.ndindex(*view):
        out[at] = seen.setdefault(tuple(a//b for a, b in zip(at, block)), len(seen))
    return out

class Units: # units that are numbered together: `ids[param]` has the factored shape of that parameter
    def __init__(self, ids, axes, block, out, inp):
        self.ids, self.axes, self.block, self.out, self.inp = ids, axes, block, out, inp
        self.sizes = np.bincount(np.concatenate([i.ravel() for i in ids.values()]))
        self.n = len(self.sizes)

    def score(self, formula, w, r): # mean over the weights of each unit
        values = np.concatenate([formula(w[p].astype(np.float64), r[p].astype(np.float64)).ravel() for p in self.ids])
        ids = np.concatenate([i.ravel() for i in self.ids.values()])
        return np.bincount(ids, values)/self.sizes

    def expand(self, keep, shapes): # per unit -> per weight
        return {p: np.asarray(keep)[i].reshape(shapes[p]) for p, i in self.ids.items()}

    def _lanes(self, names): # the units of each line along the named axes of the (only) weight, one row per line
        ids, axes = next(iter(self.ids.values())), self.axes
        last = [axes.index(a) for a in names.split() if a in axes]
        rest = [d for d in range(len(axes)) if d not in last]
        return ids.transpose(rest + last).reshape(-1, math.prod(ids.shape[d] for d in last))

    def rows(self): # the units of each output, or None where an output has not several units of its own
        ids = next(iter(self.ids.values()))
        if len(self.ids) > 1: return None
        lines = self._lanes(' '.join(a for a in self.axes if a not in self.out.split()))
        rows = [sorted(set(l.tolist())) for l in lines]
        if len(set().union(*map(set, rows))) < sum(map(len, rows)) or any(len(r) < 2 for r in rows): return None
        return rows

    def groups(self, m, names=None): # the units of each m neighbours along an axis, or None where that cannot be
        names = self.inp if names is None else names
        if len(self.ids) > 1 or any(self.block[self.axes.index(a)] != 1 for a in names.split()): return None
        lines = self._lanes(names)
        if not names or lines.shape[1] % m: return None
        return sorted({tuple(g) for l in lines for g in l.reshape(-1, m).tolist()})

def units_of(kind, shapes, granularity, g=1, heads=1): # granularity: a name, or axis -> block size (None: the whole axis)
    out = []
    for p, shape in shapes.items():
        _, axes, spans, rows, inp = next(k for k in KINDS[kind] if p.startswith(k[0]))
        axes, view = axes.split(), list(shape)
        if axes[0] == 'g': view[:1] = [g, shape[0]//g]
        if axes[0] == 'gate': view[:1] = [GATES[kind], shape[0]//GATES[kind]]
        if axes[0] == 'qkv': view[:1] = [3, heads, shape[0]//3//heads]
        if axes[0] == 'head': view[:1] = [heads, shape[0]//heads]
        if axes[-2:] == ['head', 'd']: view[-1:] = [heads, shape[-1]//heads]
        if isinstance(granularity, dict): block = [v if granularity.get(a, 1) is None else min(granularity.get(a, 1), v) for a, v in zip(axes, view)]
        else: block = [v if a in spans[granularity].split() else 1 for a, v in zip(axes, view)]
        out.append(Units({p: ids_of(tuple(view), tuple(axes), tuple(block))}, axes, block, rows, inp))
    if isinstance(granularity, str) and (kind, granularity) in JOINT:
        return [Units({p: i for u in out for p, i in u.ids.items()}, out[0].axes, out[0].block, out[0].out, out[0].inp)]
    return out


# --- selection: one boolean per unit, True for kept

def half_up(x): return math.floor(x + .5)

def _order(scores): return sorted(range(len(scores)), key=lambda u: (scores[u], u))

def select(items, sparsity, floors=None): # items: (scores, sizes) of what competes; as near to the target as whole units allow
    scores, sizes = np.concatenate([s for s, _ in items]), np.concatenate([z for _, z in items])
    floors = floors or [int(len(s) > 1 and sparsity < 100) for s, _ in items]
    protected, at = set(), 0
    for (s, _), f in zip(items, floors):
        protected |= {at + u for u in _order(s)[len(s)-f:]}
        at += len(s)
    line = [u for u in _order(scores) if u not in protected]
    if len(set(sizes.tolist())) == 1: n_gone = half_up(sparsity*len(scores)/100)
    else:
        target, sums = half_up(sparsity*int(sizes.sum())/100), [0]
        for u in line: sums.append(sums[-1] + int(sizes[u]))
        n_gone = min(range(len(sums)), key=lambda j: (abs(sums[j] - target), j))
    keep = np.ones(len(scores), bool)
    keep[line[:n_gone]] = False
    return np.split(keep, np.cumsum([len(s) for s, _ in items])[:-1])

def local(us, scores, sparsity):
    n = sum(u.n for u in us)
    return select([(s, u.sizes) for u, s in zip(us, scores)], sparsity, [int(n > 1 and sparsity < 100)]*len(us))

def global_(layers, sparsity): # layers: [(units, scores)], one per layer
    floors = [int(sum(u.n for u in us) > 1 and sparsity < 100) for us, _ in layers for _ in us]
    keeps = iter(select([(s, u.sizes) for us, scores in layers for u, s in zip(us, scores)], sparsity, floors))
    return [[next(keeps) for _ in us] for us, _ in layers]

def n_of_m(unit, scores, n, m, names=None):
    keep = np.ones(unit.n, bool)
    for group in unit.groups(m, names):
        for u in sorted(group, key=lambda u: (scores[u], u))[:m-n]: keep[u] = False
    return keep

def check_per_row(unit, scores, sparsity, keep): # any fair share of the total is right: say what is wrong, or None
    rows, k = unit.rows(), min(half_up(sparsity*unit.n/100), unit.n - int(sparsity < 100))
    gone = [sum(not keep[u] for u in row) for row in rows]
    if sum(gone) != k: return f'{sum(gone)} units gone, not {k}'
    if not set(gone) <= {k//len(rows), -(-k//len(rows))}: return f'uneven rows: {gone}'
    for row, g in zip(rows, gone):
        want = sorted(row, key=lambda u: (scores[u], u))[:g]
        if set(want) != {u for u in row if not keep[u]}: return f'row {row[:4]}…: wrong units'

def argsort_keep(scores, k, alive=None): # a full stable sort, for large tensors: the dead first
    order = np.lexsort((np.arange(len(scores)), scores) if alive is None else (np.arange(len(scores)), scores, alive))
    keep = np.ones(len(scores), bool)
    keep[order[:k]] = False
    return keep
