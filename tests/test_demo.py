"""`make demo` in small: both kinds of data, the figures, and the sparsity that it prints."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def images(folder):
    rng = np.random.default_rng(0)
    for label in ('dark', 'light'):
        (folder/label).mkdir(parents=True)
        for i in range(20): Image.fromarray(rng.integers(0, 100, (16, 16, 3), np.uint8) + np.uint8(150*(label == 'light'))).save(folder/label/f'{i}.png')
    return folder


@pytest.mark.parametrize('own_images', [False, True])
def test_demo(tmp_path, own_images):
    data = ['--data', str(images(tmp_path/'images'))] if own_images else []
    run = subprocess.run([sys.executable, ROOT/'tools/demo.py', '--epochs', '2', '--seeds', '1', '--out', tmp_path/'out', *data],
                         capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r'total .* 95\.\d\d %', run.stdout) and '95 % sparse: accuracy' in run.stdout and 'sparsity' in run.stdout
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'weights.png', 'schedule.png', 'layers.png'}
    assert all((tmp_path/'out'/n).stat().st_size > 5000 for n in ('weights.png', 'schedule.png', 'layers.png'))
