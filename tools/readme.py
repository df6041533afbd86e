"""README.md from index.ipynb: `python -m tools.readme` writes it, `--check` fails where it is stale."""
import argparse
import re
import sys

import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from traitlets.config import Config

from tools.notebooks import ROOT, Processors, link_symbols

IMAGES = 'docs/images'
_config = Config({
    'ExtractOutputPreprocessor': {'output_filename_template': IMAGES + '/readme_{cell_index}_{index}{extension}'},
    'NbConvertBase': {'display_data_priority': ['text/markdown', 'image/png', 'image/svg+xml', 'text/html', 'text/plain']},
})


def link(cell):
    "A symbol in the prose leads to its notebook"
    if cell.cell_type == 'markdown':
        cell.source = link_symbols(cell.source, lambda shown, full, nb: f'[{shown}]({nb})')


def render(root=ROOT):
    "The files that README.md consists of, as `path: bytes`"
    nb = Processors(link)(read_nb(root/'index.ipynb'))
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev cleans it away; the fences want it
    text, resources = MarkdownExporter(config=_config).from_notebook_node(nbformat.reads(nb2str(nb), as_version=4))
    text = re.sub(r'<style scoped>.*?</style>\s*', '', text, flags=re.DOTALL)  # pandas' style: GitHub shows it as text
    text = re.sub(r'[ \t]+$', '', text, flags=re.MULTILINE)
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return {'README.md': text.encode(), **resources.get('outputs', {})}


def stale(root=ROOT):
    "The names of files that differ from what index.ipynb gives"
    want = render(root)
    have = {p.relative_to(root).as_posix() for p in (root/IMAGES).glob('readme_*')}
    changed = [f for f, data in want.items() if not (root/f).exists() or (root/f).read_bytes() != data]
    return sorted(set(changed) | (have - want.keys()))


def write(root=ROOT):
    "Write README.md and its images, and remove images that it no longer uses"
    want = render(root)
    for name in stale(root):
        path = root/name
        if name not in want: path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(want[name])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true')
    if not parser.parse_args().check: write()
    elif old := stale(): sys.exit(f"Stale: {', '.join(old)}. Run `make readme`.")
