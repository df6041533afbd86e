"""What the programs share: one thread, optional libraries, interleaved timing, tables, the machine."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported: ratios must not depend on idle cores

import contextlib, copy, datetime, gc, importlib, importlib.metadata, io, platform, statistics, sys, time, warnings
import torch, torch.nn as nn
from torch.nn.utils import prune as torch_prune

torch.set_num_threads(1)
warnings.filterwarnings('ignore')
DENSE_TYPES = (nn.Conv2d, nn.Linear)
SHORT = 3  # exit status: everything was measured and printed, and falls short of what it must reach


def optional(name):
    "The module called `name`, or None with a message when it cannot be imported"
    try: return importlib.import_module(name)
    except ImportError as e: print(f'*Left out: `{name}` ({type(e).__name__}, {e.name}).*\n')


def note(message):
    "Progress goes to stderr: stdout is the report"
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet():
    "Swallow what a library prints"
    with contextlib.redirect_stdout(io.StringIO()): yield


def tensors(model, types=DENSE_TYPES):
    "The (module, parameter name) pairs that every contender prunes"
    names = lambda m: ['in_proj_weight'] if isinstance(m, nn.MultiheadAttention) else ['weight']
    return [(m, n) for m in model.modules() if isinstance(m, types) for n in names(m)]


def zeros(model, types=DENSE_TYPES):
    return sum(int((getattr(m, n) == 0).sum()) for m, n in tensors(model, types))


def asked_zeros(model, percent, context, types=DENSE_TYPES):
    "How many zeros `percent` means, of the whole or rounded layer by layer; zeros already there are never filled"
    counts = [(w.numel(), int((w == 0).sum())) for w in (getattr(m, n) for m, n in tensors(model, types))]
    if context == 'global': counts = [tuple(map(sum, zip(*counts)))]
    return sum(max(round(size*percent/100), already) for size, already in counts)


# A contender prepares a model (not timed in oneshot.py, counted in memory.py) and returns what does the work for a
# percentage, or None where it has no such thing. Each is used as its documentation says, nothing tuned.

def ours(lib, model, granularity, context, types):
    return lib.Sparsifier(model, granularity, context, lib.large_final, layer_type=types).sparsify_model


def fasterai(lib, model, granularity, context, types):
    if nn.MultiheadAttention in types: return None  # it prunes `weight` only
    sparsifier = lib.Sparsifier(model, granularity, context, lib.large_final, layer_type=types)
    return lambda percent: sparsifier.sparsify_model(percent/100)  # it wants a fraction


def torch_utils(lib, model, granularity, context, types):
    pairs = tensors(model, types)
    def weight_global(percent): lib.global_unstructured(pairs, lib.L1Unstructured, amount=percent/100)
    def weight_local(percent):
        for m, n in pairs: lib.l1_unstructured(m, n, amount=percent/100)
    def filter_local(percent):
        for m, n in pairs: lib.ln_structured(m, n, amount=percent/100, n=1, dim=0)
    return locals().get(f'{granularity}_{context}')


def contenders():
    "name -> function(model, granularity, context, types), for those installed"
    libs = {'ours': (ours, optional('fasterai_lib.all')), 'fasterai': (fasterai, optional('fasterai.sparse.all')),
            'torch prune': (torch_utils, torch_prune)}
    return {name: (lambda *args, f=f, lib=lib: f(lib, *args)) for name, (f, lib) in libs.items() if lib}


def interleave(jobs, repeats, slow=1.):
    """Seconds of each job, one repetition of all before the next, so that a slow spell hits everyone.
    `jobs`: name -> function that prepares and returns the function to time. Past 3 rounds, jobs above `slow` seconds rest."""
    seconds = {name: [] for name in jobs}
    for i in range(repeats):
        for name in sorted(jobs, reverse=i % 2):
            if i >= 3 and min(seconds[name]) > slow: continue
            work = jobs[name]()
            gc.collect()
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
            del work
    return seconds


def spread(values, digits=1, scale=1.):
    "median (min-max)"
    values = [v*scale for v in values]
    return f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})'


def table(headers, rows):
    lines = [headers, ['---']*len(headers), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines) + '\n'


def version(package):
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return 'not installed'


def machine():
    "What the numbers were taken on, without names of hosts or folders"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    packages = ['fasterai_lib', 'fasterai', 'torch', 'torchvision', 'fastai', 'numpy', 'scikit-learn']
    return table(['what', 'value'], [
        ['CPU', f'{cpu}, {os.cpu_count()} cores, one thread used'], ['load when started', f'{os.getloadavg()[0]:.1f}'],
        ['date', datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d')],
        ['Python', platform.python_version()], *[[p, version(p)] for p in packages]])
