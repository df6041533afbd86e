"""How many models each library prunes by itself: run, train and equal the masked model after removing some percent of the units.
Every (model, library, percentage) in its own process under a time limit; rows are appended to a file, so that it can be stopped and resumed."""
import common  # one thread, before torch is imported
import argparse, json, multiprocessing, multiprocessing.connection, os, random, statistics, sys, time
os.environ.setdefault('HF_HUB_OFFLINE', '1')
from pathlib import Path
import coverage_checks, zoo
from common import note, table

QUICK = '''torchvision/resnet18 torchvision/mobilenet_v3_small torchvision/shufflenet_v2_x0_5 torchvision/googlenet torchvision/densenet121
torchvision/swin_t torchvision/vit_b_32 torchvision/regnet_y_400mf torchvision/lraspp_mobilenet_v3_large torchvision/raft_small
torchvision/fasterrcnn_mobilenet_v3_large_320_fpn timm/test_byobnet timm/test_vit timm/coat_tiny timm/ghostnet_050 timm/levit_128s
timm/resnest14d timm/test_coatnet timm/xcit_nano_12_p8_224 transformers/bert transformers/deberta transformers/gpt2 transformers/llama
transformers/falcon transformers/t5 transformers/mixtral transformers/mamba transformers/swinv2 transformers/segformer
transformers/wav2vec2 transformers/clip transformers/whisper'''.split()


def child(pipe, job, full):
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try: coverage_checks.measure(*job, full, lambda **found: pipe.send(found))
    except BaseException as e: pipe.send(dict(error=coverage_checks.text(e)))
    pipe.close()


def run(jobs, args, done):
    "Fork a process for each job, `args.jobs` at a time; `done(row)` when it has ended or was ended"
    fork, queue, running = multiprocessing.get_context('fork'), list(jobs), {}
    while queue or running:
        while queue and len(running) < args.jobs:
            job = queue.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(theirs, job, args.full_checks), daemon=True)
            process.start()
            theirs.close()
            row = dict(zip(('model', 'lib', 'sparsity'), job), full_checks=args.full_checks)
            running[ours] = row, process, time.perf_counter()
        for pipe in multiprocessing.connection.wait(list(running), timeout=.2):
            try: running[pipe][0].update(pipe.recv())
            except EOFError:
                row, process, start = running.pop(pipe)
                process.join()
                if process.exitcode: row['error'] = f'ended by signal {-process.exitcode} in stage {row.get("stage")}'
                done({**row, 'wall': time.perf_counter() - start})
        for pipe, (row, process, start) in list(running.items()):
            if time.perf_counter() - start < args.limit: continue
            process.kill()
            process.join()
            while pipe.poll():
                try: row.update(pipe.recv())
                except EOFError: break
            del running[pipe]
            done({**row, 'error': f'over {args.limit:g} s in stage {row.get("stage")}', 'wall': args.limit})


def key(row): return row['model'], row['lib'], row['sparsity']
def works(row): return bool(row.get('pruned') and row.get('runs'))
def perfect(row): return works(row) and (row.get('exact') or row['lib'] == 'inexact') and row.get('backward') and not row.get('error')


def load(path):
    "The last row of each (model, library, sparsity)"
    return {key(row): row for row in map(json.loads, path.read_text().splitlines())} if path and path.exists() else {}


def middle(rows, name, form='{:.2f}'):
    values = [row[name] for row in rows if row.get(name) is not None]
    return form.format(statistics.median(values)) if values else '-'


def reason(row):
    if row.get('error'): return row['error']
    if not row.get('pruned'): return 'nothing was pruned'
    if not row.get('runs'): return 'infinite values'
    return 'not exact: ' + ', '.join(str(row[k]) for k in ('diff', 'note') if row.get(k))


def report(rows):
    "Markdown: a table per library and family, the two libraries where both are right, full checks, failures"
    libs = sorted({row['lib'] for row in rows})
    of = lambda lib, family='': [r for r in rows if r['lib'] == lib and r['model'].startswith(family)]
    count = lambda rows, test: sum(bool(test(r)) for r in rows)
    families = [f for f in ('torchvision/', 'timm/', 'transformers/') if any(r['model'].startswith(f) for r in rows)]
    lines = []
    for family in [*families, ''] if len(families) > 1 else families:
        for lib in libs:
            part = of(lib, family)
            good = [r for r in part if works(r)]
            wrong = lambda r: not r.get('exact') and lib != 'inexact' and not (r.get('error') or '').startswith('over ')  # the time limit proves nothing
            lines.append([family.strip('/') or 'all', lib, len(part), len(good), count(good, lambda r: r.get('exact')), count(good, wrong),
                          count(good, lambda r: r.get('backward')), count(part, lambda r: r.get('refused')), middle(good, 'cut'), middle(good, 'params'),
                          middle(part, 'seconds'), f'{max((r.get("seconds") or 0 for r in part), default=0):.1f}'])
    out = [table(['family', 'library', 'models', 'pruned and run', 'exact', 'wrong', 'backward', 'refused', 'layers cut', 'parameters left', 'CPU seconds', 'longest'], lines)]
    if len(libs) == 2:
        right = [{r['model']: r for r in of(lib) if works(r) and r.get('exact')} for lib in libs]
        common_models = [m for m in right[0] if m in right[1]]
        out.append(f'Where both are exact ({len(common_models)} models), medians:\n')
        out.append(table(['library', 'layers cut', 'parameters left', 'CPU seconds'],
                         [[lib, *(middle([r[m] for m in common_models], k) for k in ('cut', 'params', 'seconds'))] for lib, r in zip(libs, right)]))
        less = [f'{m} ({right[0][m]["cut"]:.2f}, {right[1][m]["cut"]:.2f})' for m in common_models if right[0][m]['cut'] < right[1][m]['cut'] - 1e-9]
        if less: out.append(f'Fewer layers cut by {libs[0]}: {", ".join(less)}\n')
    checked = [r for r in rows if r.get('full')]
    if checked:
        out.append(table(['check', 'ok', 'dense too', 'failed'], [[c, *(count(checked, lambda r: r['full'].get(c) == s) for s in ('ok', 'dense too')),
                   ', '.join(r['model'] for r in checked if r['full'].get(c) not in ('ok', 'dense too')) or '0'] for c in coverage_checks.CHECKS]))
    for lib in libs:
        failed = [r for r in of(lib) if not perfect(r)]
        if failed: out.append(f'{lib}, not perfect: {len(failed)}\n\n' + '\n'.join(f'- `{r["model"]}`: {reason(r)[:200]}' for r in failed) + '\n')
    return '\n'.join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='*', help='globs of family/name, joined by commas')
    parser.add_argument('--libs', default='ours', help=', '.join(coverage_checks.LIBS))
    parser.add_argument('--percents', default='50', help='joined by commas; a model at all of them before the next model')
    parser.add_argument('--shuffle', type=int, metavar='SEED', help='models in random order: stopped early, the rows are a random sample')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--limit', type=float, default=120, help='seconds for one model, library and percentage')
    parser.add_argument('--quick', action='store_true', help=f'{len(QUICK)} models')
    parser.add_argument('--out', type=Path, help='a file of rows, resumed when it exists')
    parser.add_argument('--retry', action='store_true', help='again what is not perfect in the file')
    parser.add_argument('--report', action='store_true', help='only the tables of the file')
    parser.add_argument('--full-checks', action='store_true', help='also save, copy, export, compile, batch size, training and pruning again')
    args = parser.parse_args()
    names, libs, before = list(zoo.models(args.only)), args.libs.split(','), load(args.out)
    if args.quick: names = [n for n in names if n in QUICK]
    if args.shuffle is not None: random.Random(args.shuffle).shuffle(names)
    percents = [float(p) for p in args.percents.split(',')]
    keep = lambda row: not (args.retry and not perfect(row)) and (row.get('full_checks') or not args.full_checks)
    print(f'## Really removing: coverage of {"the quick sample" if args.quick else "real models"}\n\n{__doc__}\n\n{common.machine()}', flush=True)
    rows = {k: r for k, r in before.items() if k[0] in names and k[1] in libs and k[2] in percents and (args.report or keep(r))}
    jobs = [] if args.report else [k for name in names for lib in libs for p in percents if (k := (name, lib, p)) not in rows]
    if jobs: preload(libs)
    def done(row):
        rows[key(row)] = row
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open('a') as file: file.write(json.dumps(row) + '\n')
        short = 'perfect' if perfect(row) else 'refused' if row.get('refused') else 'exact' if works(row) and row.get('exact') else 'wrong' if works(row) else 'failed'
        figures = ' '.join(f'{k} {row[k]:.2g}' for k in ('cut', 'params', 'seconds', 'diff', 'wall') if row.get(k) is not None)
        bad = [c for c, found in row.get('full', {}).items() if found not in ('ok', 'dense too')]
        note(f'{row["model"]} {row["lib"]} {row["sparsity"]:g} %: {short} {figures}' + ('' if perfect(row) else f' | {reason(row)[:160]}') + (f' | checks: {bad}' if bad else ''))
    run(jobs, args, done)
    for p in percents:
        if part := [r for k, r in rows.items() if k[2] == p]: print(f'{p:g} % of the units\n\n{report(part)}')
    if args.quick and not all(perfect(r) for r in rows.values()):
        note('not every model of the quick sample is perfect')
        sys.exit(common.SHORT)


def preload(libs):
    "What every process needs, imported once; nothing is computed here, so no threads are forked"
    import torchvision
    for name in ('timm', 'transformers', 'torch_pruning') if 'torch-pruning' in libs else ('timm', 'transformers'): common.optional(name)
    if 'transformers' in sys.modules:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.BertModel, transformers.LlamaModel, transformers.CLIPModel  # loaded when first asked for, with much else
    if {'ours', 'inexact'} & set(libs): import fasterai_lib.prune.pruner


if __name__ == '__main__': main()
