"""Extra memory of one-shot magnitude pruning, in multiples of the model's own bytes: peak while deciding, and kept after."""
import argparse, ctypes, gc, json, os, subprocess, sys
from pathlib import Path

CASES = [('resnet50', 'weight', 'global'), ('resnet50', 'weight', 'local'), ('vit_b_16', 'weight', 'global'),
         ('vit_b_16', 'weight', 'local'), ('resnet50', 'filter', 'global'), ('resnet50', 'filter', 'local')]
GOAL = {'weight': (1.5, .3), 'filter': (1.5, .01)}  # peak, kept; a mask per filter is next to nothing
HEADERS = ['model', 'granularity', 'context', 'contender', 'model MB', 'peak extra x', 'kept extra x', 'goal (ours)']


def status(field):
    "Kilobytes of a field of /proc/self/status"
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(field + ':'))


def settle():
    "Give free memory back to the system, so that the resident size is what is held"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def child(name, label, granularity, context, percent=90):
    "Run one case in this process and print bytes as JSON"
    import torch, torch.nn as nn, torchvision
    from common import DENSE_TYPES, contenders, quiet
    types = DENSE_TYPES if granularity == 'weight' else nn.Conv2d
    def run(model):
        with quiet():
            work = contenders()[name](model, granularity, context, types if isinstance(types, tuple) else (types,))
            if work: work(percent)
        return work  # holds the sparsifier, as a user does
    run(nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv2d(96, 512, 3), nn.Linear(512, 512)))  # load libraries and kernels before we look
    model = nn.Sequential(nn.Conv2d(3, 8, 3)) if label == 'tiny' else getattr(torchvision.models, label)(weights=None)
    settle()
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    work = run(model)
    peak = status('VmHWM')
    settle()
    print(json.dumps(None if work is None else {'peak': (peak - before)*1024, 'kept': (status('VmRSS') - before)*1024,
                                                'model': sum(p.nbytes for p in model.parameters())}))


def measure(name, *case):
    "One case in a fresh process. Blocks above 64 kB are mapped one by one, so that what is freed leaves the resident size"
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536'}
    result = subprocess.run([sys.executable, __file__, '--child', name, *case], env=env, capture_output=True, text=True)
    if result.returncode: print(f'*{name} on {" ".join(case)} failed: {result.stderr.strip().splitlines()[-1]}*\n')
    return json.loads(result.stdout.splitlines()[-1]) if not result.returncode else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='resnet50 only')
    parser.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(*args.child)
    print(f'## Memory\n\n{__doc__}\n')
    from common import contenders, note, table
    lines, names = [], list(contenders())
    for case in [c for c in CASES if not args.quick or c[0] == 'resnet50']:
        for name in names:
            note(f'memory: {name}, {", ".join(case)}')
            got = measure(name, *case)
            if not got: continue
            peak, kept = got['peak']/got['model'], got['kept']/got['model']
            met = peak <= GOAL[case[1]][0] and kept <= GOAL[case[1]][1]
            goal = f'{GOAL[case[1]][0]} and {GOAL[case[1]][1]}: {"met" if met else "MISSED"}' if name == 'ours' else ''
            lines.append([*case, name, f'{got["model"]/1e6:.0f}', f'{peak:.2f}', f'{kept:.2f}', goal])
    print('''90 % asked, each case in a fresh process after a warm-up on a model of three layers. Counted from before the
sparsifier is built: peak = high-water mark of the resident size (reset just before), kept = resident size afterwards,
garbage collected and free memory returned, model and sparsifier still held; one model more = 1. Weight granularity on
Conv2d and Linear, filter on Conv2d. torch prune has no global choice of filters.\n''')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
