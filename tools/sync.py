"""Do notebooks and modules agree? Export and clean a copy, then compare it with the tree (which need not be committed)."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.notebooks import ROOT, notebooks

_export = '''
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
nbdev_export()
nbdev_clean()
nbdev_clean('index.ipynb')
'''


def _files(root):
    "Everything that is compared, as `relative path: bytes`"
    modules = [p for p in (root/'fasterai_lib').rglob('*') if p.is_file() and '__pycache__' not in p.parts and p.suffix != '.json']
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in modules + notebooks(root)}


def regenerate(root, copy):
    "In the empty folder `copy`: the notebooks of `root`, cleaned, and the modules that they export"
    hidden = shutil.ignore_patterns('.*', '_*')
    shutil.copytree(root/'nbs', copy/'nbs', ignore=hidden)
    for name in ['index.ipynb', 'pyproject.toml', 'fasterai_lib/__init__.py']:
        if (root/name).exists():
            (copy/name).parent.mkdir(exist_ok=True)
            shutil.copy(root/name, copy/name)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # with it, nbdev does not export
    run = subprocess.run([sys.executable, '-c', _export], cwd=copy, env=env, text=True, capture_output=True)
    if run.returncode: raise RuntimeError(f'nbdev could not export:\n{run.stdout}{run.stderr}')


def differences(root=ROOT):
    "One line per file of `root` that is not what the notebooks give"
    with tempfile.TemporaryDirectory() as copy:
        regenerate(root, Path(copy))
        have, want = _files(root), _files(Path(copy))
    out = []
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) == want.get(name): continue
        if name.endswith('.ipynb'): out.append(f'{name}: not clean')
        elif name not in want: out.append(f'{name}: no notebook exports it')
        elif name not in have: out.append(f'{name}: not exported')
        else: out.append(f'{name}: not what its notebook exports')
    return out


if __name__ == '__main__':
    if found := differences(): sys.exit('\n'.join([*found, 'Run `make export` (and delete modules that have no notebook).']))
