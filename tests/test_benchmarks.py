"""The benchmark programs run: each in a process of its own, on a model of two layers, without the peers that need installing."""
import importlib, re, subprocess, sys
from pathlib import Path

import pytest, torch

BENCHMARKS = Path(__file__).resolve().parents[1]/'benchmarks'
PROGRAMS = {
    'oneshot': '''
names = {'ours': lambda *args: common.ours(lib, *args), 'torch prune': lambda *args: common.torch_utils(common.torch_prune, *args)}
for context in 'global', 'local':
    lines = list(oneshot.rows('tiny', 'case', tiny(), context, 50, names, 2))
    assert len(lines) == 3 and all(line[-1] == '+0' for line in lines if line[4] != 'floor'), lines
''',
    'memory': '''
got = memory.measure('ours', 'tiny', 'weight', 'global')
assert got['model'] == 4*(8*3*9 + 8), got
assert got['peak'] >= 0 and abs(got['kept']) < 2**22, got
''',
    'fit': '''
def arch(num_classes): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
made = {('weight', 'global', 'ours'): lambda: [lib.SparsifyCallback(50, 'weight', 'global', lib.large_final, lib.agp)]}
(got,), = fit.measure(made, 1, arch=arch, batches=3, batch_size=4, size=8, opt_func=fit.Adam).values()
assert got[-1] == 108, got
''',
    'accuracy': '''
train, test, _ = accuracy.digits(None)
data = tuple(t[:128] for t in train), tuple(t[:50] for t in test), 1
for cbs in [accuracy.TorchPrune(90)], [lib.SparsifyCallback(90, 'weight', 'global', lib.large_final, lib.agp, layer_type=common.DENSE_TYPES)]:
    score, zeros = accuracy.train(data, cbs, 0)
    assert 0 <= score <= 100 and zeros == common.asked_zeros(accuracy.net(), 90, 'global'), zeros
''',
    'block': '''
import contextlib, io
sys.argv[1:] = ['--quick']
with contextlib.redirect_stdout(out := io.StringIO()): block.main()
lines = {l.split(' | ')[0].strip('| '): l.strip('| ').split(' | ') for l in out.getvalue().splitlines() if l.startswith('|')}
for what in ('wanda', 'sparsegpt'):
    ours, reference = (lines[f'{what}, {who}'] for who in ('ours', 'reference'))
    assert ours[3] == reference[3] == '50.00' and float(ours[4]) < 1.1*float(reference[4]), lines
''',
    'criteria': '''
(x, y), (x_test, y_test), _ = criteria.accuracy.digits(None)
net, data = criteria.mlp(64), [(x[:40], y[:40]), (x[40:64], y[40:64])]
for name in 'wanda, per_row', 'lamp', 'obd / layer':
    sparse = criteria.from_name(name)(net, data)(80)
    assert common.zeros(sparse) == common.asked_zeros(net, 80, 'local' if 'row' in name else 'global'), name
assert 0 <= criteria.trained_sparse(net, None, (x[:128], y[:128]), 1, 0, (x_test[:50], y_test[:50])) <= 100
rows = criteria.Rows(Path(tempfile.mkdtemp())/'rows.jsonl')
assert rows(['a'], lambda: [1]) == criteria.Rows(rows.path)(['a'], lambda: [2]) == [1] and 'error' in rows(['b'], lambda: 1/0)
sys.argv[1:] = ['nowhere', '--parts', 'oneshot']
criteria.main()
''',
    'budget': '''
import contextlib, io, torch
torch.manual_seed(0)
dense, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)).eval(), torch.randn(1, 3, 8, 8)
model, said = budget.reached(dense, x, '0.5x macs', 'knapsack', 'squared_final / max')
ratio = budget.macs_of(model, x)/budget.macs_of(dense, x)
assert .35 < ratio == said['predicted'] <= .5 and said['kept'] > 40, (ratio, said)
assert budget.timed(model, dense, x, 5)['latency'] > 0
(best, some) = budget.enumerated(['add up'], ['knapsack', 'uniform'], 8)
assert best[2] == '1.0000' and best[-1].startswith('yes') and float(some[3]) < 1, (best, some)
path = Path(tempfile.mkdtemp())/'rows.jsonl'
rows = budget.Rows(path, 'costs: *')
assert rows(('costs', 'a'), lambda: dict(b=1))['b'] == budget.Rows(path, '*')(('costs', 'a'), lambda: 1/0)['b'] and 'error' in rows(('costs', 'c'), lambda: 1/0)
assert rows(('peers', 'a'), lambda: dict(b=1)) is None
sys.argv[1:] = ['nowhere', '--models', 'resnet56', '--problems', '2']
with contextlib.redirect_stdout(out := io.StringIO()): budget.main()
assert 'Left out' in out.getvalue() and '| stairs | knapsack |' in out.getvalue(), out.getvalue()
''',
}
COMMON = '''
import sys, tempfile; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch.nn as nn, common, fasterai_lib.all as lib, {name}
def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(6, 6))
'''


@pytest.mark.parametrize('name', PROGRAMS)
def test_program_measures(name):
    code = COMMON.format(name=name) + PROGRAMS[name]
    result = subprocess.run([sys.executable, '-c', code, BENCHMARKS], capture_output=True, text=True)
    assert not result.returncode, result.stderr[-2000:]


def test_tables_and_machine_name_no_place():
    code = COMMON.format(name='run') + "print(common.table(['a', 'b'], [[1, 2]]), common.machine())"
    text = subprocess.run([sys.executable, '-c', code, BENCHMARKS], capture_output=True, text=True, check=True).stdout
    assert text.startswith('| a | b |\n| --- | --- |\n| 1 | 2 |') and 'CPU' in text
    assert str(Path.home()) not in text and str(BENCHMARKS) not in text


HEAD = '# Benchmark results\n\nKept.\n\n'
OLD = HEAD + '## By hand\n\nText.\n\n### Part\n\n| a |\n\n## B\n\nold\n\n### of B\n\nold too\n\n## Last: c\n\nkept\n'


@pytest.fixture
def run(monkeypatch):
    "run.py, imported once its thread setting cannot leak into other tests"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module('run')
    torch.set_num_threads(threads)


def test_sections_are_replaced_in_place_and_others_stay(run):
    assert ''.join(text for _, text in run.sections(OLD)) == OLD
    assert run.merged(OLD, '## B\n\nnew\n') == HEAD + '## By hand\n\nText.\n\n### Part\n\n| a |\n\n## B\n\nnew\n\n## Last: c\n\nkept\n'
    assert run.merged(OLD, '## Last\n\nnew\n') == OLD + '\n## Last\n\nnew\n'  # another heading, though this one begins like it
    two = run.merged(OLD, 'left out\n\n## New\n\nn\n\n## By hand\n\nagain\n')
    assert two == HEAD + '## By hand\n\nagain\n' + OLD[OLD.index('\n## B\n'):] + '\n## New\n\nn\n\nleft out\n'
    assert run.merged('', '## B\n\nnew\n') == '# Benchmark results\n\n## B\n\nnew\n'
    for new in '### no section\n', '', '## B\n\n# another title\n':
        with pytest.raises(ValueError, match='heading'): run.merged(OLD, new)


def test_results_survive_a_run(run):
    text = (BENCHMARKS/'RESULTS.md').read_text()
    before, after = run.sections(text), run.sections(run.merged(text, '## One-shot magnitude pruning\n\nnew\n'))
    assert [h for h, _ in before] == [h for h, _ in after] and len({h for h, _ in before}) == len(before)
    assert [h for (h, a), (_, b) in zip(before, after) if a.strip() != b.strip()] == ['## One-shot magnitude pruning']
    assert [line for line in text.splitlines() if line.startswith('# ')] == ['# Benchmark results']


def test_a_failed_program_leaves_its_section(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, 'HERE', tmp_path)
    out = tmp_path/'RESULTS.md'
    out.write_text(OLD)
    (tmp_path/'fit.py').write_text("print('## B'); raise SystemExit(1)")
    (tmp_path/'latency.py').write_text("import sys; print('## Last: c', *sys.argv[1:])")
    (tmp_path/'coverage.py').write_text(f"import sys; print('## Quick', *sys.argv[1:]); sys.exit({run.SHORT})")
    monkeypatch.setattr('sys.argv', ['run.py', '--only', 'fit', 'latency', 'coverage'])
    with pytest.raises(SystemExit, match='failed: fit, coverage'): run.main()
    got = dict(run.sections(out.read_text()))
    assert list(got) == ['', '## By hand', '## B', '## Last: c', '## Quick --quick'] and 'old too' in got['## B'] and 'kept' not in got['## Last: c']
    assert 'CPU' in got['## Last: c'] and '--only latency`' in got['## Last: c']
    out.write_text(OLD)
    monkeypatch.setattr('sys.argv', ['run.py', '--quick', '--only', 'latency'])
    run.main()  # not to quote: not written
    assert out.read_text() == OLD


def test_programs_print_the_headings_that_they_replace(run):
    headings = {h for h, _ in run.sections((BENCHMARKS/'RESULTS.md').read_text())}
    assert set(run.DEFAULT) < set(run.PROGRAMS) and all((BENCHMARKS/f'{name}.py').exists() for name in run.PROGRAMS)
    for name in {*run.PROGRAMS} - {'coverage', 'prune_accuracy'}:  # theirs depend on their arguments
        printed = re.search(r"print\(f?'(## .+?)\\n", (BENCHMARKS/f'{name}.py').read_text())[1]
        assert printed in headings, name
