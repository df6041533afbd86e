"""The benchmark programs run: each in a process of its own, on a model of two layers, without the peers that need installing."""
import subprocess, sys
from pathlib import Path

import pytest

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
}
COMMON = '''
import sys; sys.path.insert(0, sys.argv[1])
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
